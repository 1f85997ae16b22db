"""What a call costs on the CPU beyond its kernel: checks, dispatch, the output's allocation.

    python -m benchmarks.call_overhead [--repeats 7] [--calls 4000]

A kernel that does nothing stands in the registry; the time of calling its run() directly is taken
off. The rows take turns, one thread; medians over the repeats. The plan and the choice of kernel
are cached, as in any loop. The last rows say what finding a cached plan and schedule costs, which
a kernel does in its own time, and what torch's SDPA takes for one query and key. Writes
benchmarks/results/call_overhead.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from rich.console import Console
from rich.table import Table

import portattn
from portattn import attention, masks
from portattn.backends import registry
from portattn.backends.base import AttentionInputs, Config
from portattn.backends.reference.forward import ReferenceConfig, ReferenceForward
from portattn.plan import plan_mask

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT_US = 30.0
SHAPE = (1, 8, 64, 64)
RESULTS = Path(__file__).parent / "results" / "call_overhead.json"


class NoKernel(ReferenceForward):
    """Refuses nothing and computes nothing."""

    name: ClassVar[str] = "no_kernel"
    backend: ClassVar[str] = "cpu"

    def run(self, inputs: AttentionInputs, config: Config) -> None:
        """Nothing."""


def calls() -> dict[str, Callable[[], object]]:
    """Row name -> one call through `attention`, or the op, on the kernel that does nothing."""
    query = torch.randn(SHAPE)
    key = torch.randn(1, 2, 64, 64)
    half = query.bfloat16()
    window = masks.sliding_window(32)
    packed = masks.documents([0, 20, 64])
    sinks, slopes, bias = torch.zeros(8), torch.zeros(8), torch.zeros(64, 64)
    op = torch.ops.portattn.attention.default

    def under_autocast() -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return attention(half, half, half)

    def through_op() -> object:
        program, data = list(packed.program), list(packed.data)
        return op(
            *(query, query, query, program, data, None, "unset", None, None, None, None, None),
            *(0.0, False, False, "auto", ""),
        )

    return {
        "dense": lambda: attention(query, query, query),
        "causal": lambda: attention(query, query, query, is_causal=True),
        "window and causal": lambda: attention(query, query, query, window, is_causal=True),
        "documents, GQA": lambda: attention(query, key, key, packed, enable_gqa=True),
        "bshd": lambda: attention(query, query, query, window, layout="bshd"),
        "all terms and LSE": lambda: attention(
            query,
            query,
            query,
            window,
            softcap=2.0,
            alibi_slopes=slopes,
            bias=bias,
            sinks=sinks,
            return_lse=True,
        ),
        "config given": lambda: attention(query, query, query, config={"dtype": "input"}),
        "autocast, with its context": under_autocast,
        "torch.ops.portattn.attention": through_op,
    }


def directly() -> Callable[[], object]:
    """The kernel alone, its inputs made."""
    query = torch.randn(SHAPE)
    inputs = AttentionInputs(
        *(query, query, query, torch.empty_like(query), None, None, 0, None),
        *(0.125, 0.0, None, None, None, False),
    )
    kernel, config = NoKernel(), ReferenceConfig()
    return lambda: kernel.run(inputs, config)


def others() -> dict[str, Callable[[], object]]:
    """For comparison; nothing is taken off."""
    window, token = masks.sliding_window(256), torch.randn(1, 1, 1, 16)

    def cached_plan() -> object:
        sizes = {"batch": 1, "num_heads": 8, "seqlen_q": 4096, "seqlen_k": 4096, "q_offset": 0}
        plan = plan_mask(window, **sizes, block_q=64, block_k=64)
        return plan.schedule(batch=1, num_heads=8, workers=2, head_dim_v=64)

    return {
        "a cached plan and schedule": cached_plan,
        "torch SDPA, one query and key": lambda: torch.nn.functional.scaled_dot_product_attention(
            token, token, token
        ),
    }


def measure(
    functions: dict[str, Callable[[], object]], repeats: int, count: int
) -> dict[str, list[float]]:
    """Microseconds a call, one entry per repeat; the functions take turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(count // 10):
            function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(count):
                function()
            times[name].append((time.perf_counter() - start) / count * 1e6)
    return times


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--calls", type=int, default=4000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    registry.KERNELS = {"no_kernel": ("cpu", __name__, "NoKernel", ()), **registry.KERNELS}
    own, alone = calls(), directly()
    with torch.no_grad():
        functions = {**own, "alone": alone, **others()}
        times = measure(functions, arguments.repeats, arguments.calls)
    kernel_us = statistics.median(times.pop("alone"))
    rows = []
    table = Table("call", "median µs", "min", "max", f"<= {LIMIT_US:g} µs")
    for name, values in times.items():
        taken_off = kernel_us if name in own else 0.0
        median, low, high = (
            summary(values) - taken_off for summary in (statistics.median, min, max)
        )
        rows.append(
            {
                "call": name,
                "overhead": name in own,
                "median_us": median,
                "min_us": low,
                "max_us": high,
            }
        )
        verdict = "" if name not in own else "yes" if median <= LIMIT_US else "no"
        table.add_row(name, f"{median:.1f}", f"{low:.1f}", f"{high:.1f}", verdict)
    Console().print(table)
    RESULTS.write_text(
        json.dumps(
            {
                "benchmark": "call_overhead",
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "device": portattn.device.device_key("cpu").name,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "portattn": portattn.__version__,
                "limit_us": LIMIT_US,
                "kernel_call_us": kernel_us,
                "rows": rows,
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
