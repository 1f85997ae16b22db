"""The CPU backward beside torch's.

    python -m benchmarks.cpu_backward [--threads 2] [--only NAME] [--budget 10] [--thread-time]

A dense or causal row times the backward alone: `torch.autograd.grad` of an output that is there,
for portattn's and for SDPA's. A row with a window times a training step, forward and backward,
SDPA having the mask as a dense tensor. Interleaved, medians and the 10 to 90 % spread. Writes
benchmarks/results/cpu_backward.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

import portattn
from portattn import attention, masks
from portattn.bench.limits import cpu_limits
from portattn.bench.timing import interleaved, ratio
from portattn.device import device_key

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).parent / "results" / "cpu_backward.json"
_HEADS = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One problem; batch 1, 8 heads.

    Attributes:
        name: row name.
        seqlen, head_dim, dtype: sizes.
        causal: causal, else dense; with a window always causal.
        window: 0, or the keys of a sliding window: then a whole training step is timed.
        goal: how many times faster than torch it is to be.
    """

    name: str
    seqlen: int
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    causal: bool = False
    window: int = 0
    goal: float = 0.0

    def contenders(self) -> dict[str, Callable[[], Any]]:
        """What to time, by name."""
        shape = (1, _HEADS, self.seqlen, self.head_dim)
        query, key, value = (
            torch.randn(shape, dtype=self.dtype).requires_grad_() for _ in range(3)
        )
        seed = torch.randn(shape, dtype=self.dtype)

        def differentiate(output: torch.Tensor, *, again: bool) -> None:
            torch.autograd.grad(output, (query, key, value), seed, retain_graph=again)

        if self.window:
            mask = masks.sliding_window(self.window)
            dense = mask.to_dense(self.seqlen, self.seqlen)

            def sparse_step() -> None:
                differentiate(attention(query, key, value, mask), again=False)

            def masked_step() -> None:
                output = scaled_dot_product_attention(query, key, value, attn_mask=dense)
                differentiate(output, again=False)

            return {"portattn": sparse_step, "sdpa_mask": masked_step}
        ours = attention(query, key, value, is_causal=self.causal)
        torchs = scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return {
            "portattn": functools.partial(differentiate, ours, again=True),
            "sdpa": functools.partial(differentiate, torchs, again=True),
        }


CASES = (
    Case("float32 dense S1024 D64", 1024, goal=1.15),
    Case("float32 dense S2048 D64", 2048, goal=1.15),
    Case("float32 dense S2048 D128", 2048, 128, goal=1.15),
    Case("float32 causal S1024 D64", 1024, causal=True, goal=1.5),
    Case("float32 causal S1024 D128", 1024, 128, causal=True, goal=1.5),
    Case("bfloat16 dense S1024 D64", 1024, dtype=torch.bfloat16, goal=8.0),
    Case("bfloat16 dense S2048 D128", 2048, 128, dtype=torch.bfloat16, goal=8.0),
    Case("float16 dense S1024 D64", 1024, dtype=torch.float16, goal=8.0),
    Case("float16 dense S2048 D128", 2048, 128, dtype=torch.float16, goal=8.0),
    Case("float32 step, window 256, S4096 D64", 4096, window=256, goal=8.0),
)


def run_case(case: Case, budget_seconds: float, clock: Callable[[], float]) -> dict[str, Any]:
    """Time one case beside torch."""
    timings = interleaved(case.contenders(), budget_seconds=budget_seconds, clock=clock)
    peer = next(name for name in timings if name != "portattn")
    return {
        "case": case.name,
        "timings": {name: dataclasses.asdict(timing) for name, timing in timings.items()},
        "peer": peer,
        "ratio": ratio(timings[peer], timings["portattn"]),
        "goal": case.goal,
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The table; ratios below their goal are red."""
    table = Table("case", "ms", "peer", "times faster (goal)")
    for row in rows:
        mine = row["timings"]["portattn"]
        spread = f"{mine['median_ms']:.2f} [{mine['low_ms']:.2f}, {mine['high_ms']:.2f}]"
        colour = "green" if row["ratio"] >= row["goal"] else "red"
        against = f"[{colour}]{row['ratio']:.2f}[/] ({row['goal']})"
        table.add_row(row["case"], spread, row["peer"], against)
    console.print(table)


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of timing a case")
    parser.add_argument(
        "--thread-time", action="store_true", help="one thread's CPU time, on a busy machine"
    )
    arguments = parser.parse_args()
    if arguments.thread_time and arguments.threads != 1:
        parser.error("--thread-time counts one thread; give --threads 1 with it")
    clock = time.thread_time if arguments.thread_time else time.perf_counter
    torch.set_num_threads(arguments.threads)
    console = Console(width=120)
    rows = [
        run_case(case, arguments.budget, clock) for case in CASES if arguments.only in case.name
    ]
    show(rows, console)
    if arguments.only:
        return  # a part is for looking at
    record = {
        "benchmark": "cpu_backward",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "clock": "thread time" if arguments.thread_time else "wall",
        "device": dataclasses.asdict(device_key("cpu")),
        "limits": dataclasses.asdict(cpu_limits(arguments.threads)),
        "versions": {
            "portattn": portattn.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"wrote {RESULTS.name}")


if __name__ == "__main__":
    main()
