"""What a call costs the host: repeated calls, first calls of new masks, planning and upload.

    python -m benchmarks.host_cost [--out FILE] [--calls 2000] [--profile KERNEL] [--no-flex]

On a GPU: every portattn kernel beside SDPA and FlexAttention on short sequences, where the host is
all that one waits for. Calls are timed in batches without waiting for the device; the device is
waited for between batches, so that its queue never fills. Then each mask's planning and upload,
its first call, what compiled in it, and whether a CUDA graph of the call replays. Without a GPU:
the Python of a call whose launches do nothing, and planning. Prints tables; --out gets JSON.
"""

from __future__ import annotations

import argparse
import cProfile
import datetime
import functools
import json
import platform
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention as sdpa

import portattn
from benchmarks.host_cost_cases import LONG, PATTERNS, NoLaunchForward, planning_us
from portattn import attention, masks
from portattn.backends import registry
from portattn.backends.cupy import loader
from portattn.errors import PortattnError

if TYPE_CHECKING:
    from collections.abc import Sequence

Call = Callable[[], object]


def batches_us(calls: dict[str, Call], count: int, wait: Callable[[], object]) -> dict[str, Any]:
    """Microseconds a call: the calls take turns in batches of 100, `count` of each in all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(20):
            call()
    for _ in range(max(count // 100, 3)):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            for _ in range(100):
                call()
            times[name].append((time.perf_counter() - start) * 1e4)
    wait()
    return {
        name: {
            "median_us": statistics.median(values),
            "min_us": min(values),
            "max_us": max(values),
        }
        for name, values in times.items()
    }


def gpu_kernels() -> list[str]:
    """Kernels that can run a plain bfloat16 call here, by asking them."""
    query = torch.randn(1, 8, 64, 128, device="cuda", dtype=torch.bfloat16)
    found = []
    for name, (backend, *_) in registry.KERNELS.items():
        if backend in ("triton", "cupy"):
            try:
                attention(query, query, query, backend=name)
                found.append(name)
            except PortattnError as error:
                print(f"{name}: {error}")
    return found


def peers(query: torch.Tensor, *, flex: bool) -> dict[str, Call]:
    """SDPA, each of its GPU backends, and compiled FlexAttention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import flex_attention

    def under(backend: SDPBackend) -> Call:
        def call() -> object:
            with sdpa_kernel(backend):
                return sdpa(query, query, query)

        return call

    made: dict[str, Call] = {"SDPA": lambda: sdpa(query, query, query)}
    made["SDPA flash, with its context"] = under(SDPBackend.FLASH_ATTENTION)
    made["SDPA cuDNN, with its context"] = under(SDPBackend.CUDNN_ATTENTION)
    if flex:
        compiled = torch.compile(flex_attention)
        made["FlexAttention"] = lambda: compiled(query, query, query)
    return made


def own_calls(query: torch.Tensor, kernels: Sequence[str]) -> dict[str, Call]:
    """Dense, causal, a window and documents on each kernel."""
    window, packed = masks.sliding_window(32), masks.documents([0, 20, query.shape[2]])
    made: dict[str, Call] = {}
    for name in kernels:
        call = functools.partial(attention, query, query, query, backend=name)
        made[name] = call
        made[f"{name}, causal"] = functools.partial(call, is_causal=True)
        made[f"{name}, window"] = functools.partial(call, mask=window)
        made[f"{name}, documents"] = functools.partial(call, mask=packed)
    return made


class CompileCount:
    """Compilations of Triton and NVRTC while it is entered."""

    def __enter__(self) -> CompileCount:
        from triton import knobs

        self.count, self._knobs, self._compile = 0, knobs, loader.compile_program

        def compiled(*_: object, **__: object) -> None:
            self.count += 1

        def compile_program(program: loader.Program) -> loader.Compiled:
            self.count += 1
            return self._compile(program)

        self._knobs.runtime.jit_post_compile_hook = compiled
        loader.compile_program = compile_program
        return self

    def __exit__(self, *_: object) -> None:
        self._knobs.runtime.jit_post_compile_hook = None
        loader.compile_program = self._compile


def first_calls(kernel: str) -> list[dict[str, Any]]:
    """Each pattern at a new length with new parameters, after one call at another length."""
    query, longer = (
        torch.randn(1, 2, seqlen, 128, device="cuda", dtype=torch.bfloat16)
        for seqlen in (8192, LONG)
    )
    rows = []
    for name, make in PATTERNS.items():
        before, mask = make(8192, False), make(LONG, True)
        for _ in range(2):
            attention(query, query, query, before, backend=kernel)
        torch.cuda.synchronize()
        with CompileCount() as compiles:
            start = time.perf_counter()
            attention(longer, longer, longer, mask, backend=kernel)
            first_ms = (time.perf_counter() - start) * 1e3
        torch.cuda.synchronize()
        rows.append(
            {"kernel": kernel, "mask": name, "first_ms": first_ms, "compiles": compiles.count}
        )
    return rows


def graph_replays(kernel: str) -> bool:
    """Whether a captured call computes anew when replayed, with cut rows too."""
    mask = masks.longformer(32, 8)
    query = torch.randn(1, 2, 2000, 128, device="cuda", dtype=torch.bfloat16)
    attention(query, query, query, mask, backend=kernel)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attention(query, query, query, mask, backend=kernel)
    same = True
    for _ in range(3):
        query.normal_()
        output.fill_(float("nan"))
        graph.replay()
        same &= torch.equal(output, attention(query, query, query, mask, backend=kernel))
    return same


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows of equal keys as a table."""
    table = Table(*rows[0], title=title)
    for row in rows:
        cells = (f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row.values())
        table.add_row(*cells)
    Console(width=140).print(table)


def profile(call: Call) -> None:
    """Where 2000 calls spend the host's time."""
    profiler = cProfile.Profile()
    for _ in range(20):
        call()
    profiler.enable()
    for _ in range(2000):
        call()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


def measure_calls(
    kernels: Sequence[str], device: torch.device, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Repeated calls, beside the peers on a GPU."""
    on_gpu, found = device.type == "cuda", []
    wait: Callable[[], object] = torch.cuda.synchronize if on_gpu else (lambda: None)
    for seqlen in (64, 512):
        query = torch.randn(1, 16, seqlen, 128, device=device, dtype=torch.bfloat16)
        calls = own_calls(query, kernels)
        if options.profile:
            profile(calls[options.profile])
        beside = peers(query, flex=not options.no_flex) if on_gpu else {}
        times = batches_us({**beside, **calls}, options.calls, wait)
        base = times.get("SDPA", {"median_us": float("nan")})["median_us"]
        rows = [
            {"call": name, "seqlen": seqlen, **values, "of_SDPA": values["median_us"] / base}
            for name, values in times.items()
        ]
        show(f"host cost of a call, {seqlen} tokens", rows)
        found += rows
    return found


def measure_planning(device: torch.device) -> list[dict[str, Any]]:
    """Making each mask, planning and uploading it."""
    rows: list[dict[str, Any]] = []
    for name, make in PATTERNS.items():
        make(LONG, True)  # what it is made of is there from now on
        start = time.perf_counter()
        mask = make(LONG, True)
        made_us = (time.perf_counter() - start) * 1e6
        rows.append({"mask": name, "making_us": made_us, **planning_us(mask, LONG, device, 30)})
    show(f"planning and upload, {LONG} tokens, 16 heads", rows)
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON goes here")
    parser.add_argument("--calls", type=int, default=2000, help="of each kind")
    parser.add_argument("--profile", help="a kernel's name: say where its calls spend their time")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    if not on_gpu:
        entry = ("cpu", NoLaunchForward.__module__, "NoLaunchForward", ())
        registry.KERNELS = {NoLaunchForward.name: entry, **registry.KERNELS}
    kernels = gpu_kernels() if on_gpu else [NoLaunchForward.name]
    record: dict[str, Any] = {"first_calls": [], "graphs": {}}
    with torch.no_grad():
        record["calls"] = measure_calls(kernels, device, options)
        record["planning"] = measure_planning(device)
        if on_gpu:
            for kernel in kernels:
                record["first_calls"] += first_calls(kernel)
                record["graphs"][kernel] = graph_replays(kernel)
            show("first call of a new mask and length", record["first_calls"])
            print("CUDA graphs replay:", record["graphs"])
    if options.out:
        record |= {
            "benchmark": "host_cost",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "device": portattn.device.device_key(device).name,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "portattn": portattn.__version__,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
