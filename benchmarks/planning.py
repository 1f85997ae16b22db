"""Planning a mask: time and bytes at a million tokens, beside FlexAttention's create_block_mask.

    python -m benchmarks.planning [--repeats 15] [--flex-seconds 10] [--flex-bytes 4000000000]

Planning is measured without the cache, on one core. create_block_mask evaluates its predicate on
every pair, so it is taken at doubling lengths until the next one would pass the time or the memory
given; both sides run in turn at each length, FlexAttention on all cores. Writes
benchmarks/results/planning.json.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from benchmarks.planning_patterns import PACKED, PATTERNS, Pattern, Predicate
from portattn.bench.demo_measure import extra_bytes
from portattn.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from portattn.masks import Mask

BLOCK = 128
TARGET_BYTES = 2_000_000
RESULTS = Path(__file__).parent / "results" / "planning.json"


def plan(mask: Mask, seqlen: int) -> Plan:
    """Plan without the cache."""
    return Plan.create(
        mask.program,
        mask.data,
        batch=1,
        num_heads=1,
        seqlen_q=seqlen,
        seqlen_k=seqlen,
        q_offset=0,
        block_q=BLOCK,
        block_k=BLOCK,
    )


def flex(predicate: Predicate, seqlen: int) -> BlockMask:
    """FlexAttention's counterpart of a plan."""
    return create_block_mask(predicate, None, None, seqlen, seqlen, device="cpu", BLOCK_SIZE=BLOCK)


def flex_nbytes(block_mask: BlockMask) -> int:
    """Bytes of all tensors of a BlockMask."""
    tensors = [part for part in block_mask.as_tuple() if isinstance(part, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def interleaved_ms(
    calls: dict[str, Callable[[], object]], repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) times of each call in ms, the calls taking turns, after one warm-up each."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            if turn:
                spent = (time.perf_counter() - wall, time.process_time() - cpu)
                times[name].append((spent[0] * 1e3, spent[1] * 1e3))
    return times


def measure_plans(repeats: int) -> list[dict[str, Any]]:
    """Every pattern at its length, on one core."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {min(cores)})
    torch.set_num_threads(1)
    try:
        made = [(pattern, pattern.mask(pattern.seqlen)) for pattern in PATTERNS]
        calls = {
            pattern.name: (lambda mask=mask, seqlen=pattern.seqlen: plan(mask, seqlen))
            for pattern, mask in made
        }
        times = interleaved_ms(calls, repeats)
        return [_plan_row(pattern, mask, times[pattern.name]) for pattern, mask in made]
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def _plan_row(pattern: Pattern, mask: Mask, times: list[tuple[float, float]]) -> dict[str, Any]:
    made = plan(mask, pattern.seqlen)
    wall, cpu = zip(*times, strict=True)
    return {
        "pattern": pattern.name,
        "seqlen": pattern.seqlen,
        "block": BLOCK,
        "median_ms": statistics.median(wall),
        "min_ms": min(wall),
        "max_ms": max(wall),
        "cpu_median_ms": statistics.median(cpu),
        "target_ms": pattern.target_ms,
        "nbytes": made.nbytes,
        "target_nbytes": TARGET_BYTES,
        "density": made.density,
        "extra_bytes": extra_bytes(lambda: plan(mask, pattern.seqlen)),
    }


def measure_flex(seconds: float, max_bytes: int, repeats: int) -> list[dict[str, Any]]:
    """Every pattern at doubling lengths, while create_block_mask stays within time and memory."""
    rows = []
    for pattern in PATTERNS:
        seqlen = 2048
        while True:
            mask, predicate = pattern.mask(seqlen), pattern.predicate(seqlen)
            memory = extra_bytes(lambda p=predicate, s=seqlen: flex(p, s))
            times = interleaved_ms(
                {
                    "portattn": lambda m=mask, s=seqlen: plan(m, s),
                    "flex": lambda p=predicate, s=seqlen: flex(p, s),
                },
                repeats,
            )
            median = {
                name: statistics.median(wall for wall, _ in values)
                for name, values in times.items()
            }
            rows.append(
                {
                    "pattern": pattern.name,
                    "seqlen": seqlen,
                    "portattn_median_ms": median["portattn"],
                    "flex_median_ms": median["flex"],
                    "ratio": median["flex"] / median["portattn"],
                    "portattn_nbytes": plan(mask, seqlen).nbytes,
                    "flex_nbytes": flex_nbytes(flex(predicate, seqlen)),
                    "portattn_extra_bytes": extra_bytes(lambda m=mask, s=seqlen: plan(m, s)),
                    "flex_extra_bytes": memory,
                }
            )
            seqlen *= 2  # which costs four times as much
            if 4 * median["flex"] > seconds * 1e3 or 4 * memory > max_bytes or seqlen > PACKED:
                break
    return rows


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    packages = ("torch", "numpy")
    return {
        "device": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "load_average": os.getloadavg()[0],  # a busy machine shows in wall times, not in CPU times
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _table(title: str, headings: str) -> Table:
    table = Table(title=title)
    for n, heading in enumerate(headings.split(", ")):
        table.add_column(heading, justify="right" if n else "left")
    return table


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e6:.2f} MB"


def _mark(value: float, target: float, text: str) -> str:
    return f"[green]{text}[/]" if value <= target else f"[red]{text}[/]"


def print_tables(
    console: Console, plans: list[dict[str, Any]], flexes: list[dict[str, Any]]
) -> None:
    """Both tables, targets reached in green."""
    table = _table(
        f"Planning, tiles of {BLOCK} x {BLOCK}, one core, not cached",
        "mask, tokens, median, min - max, CPU time, target, plan, density",
    )
    for row in plans:
        table.add_row(
            row["pattern"],
            f"{row['seqlen']:,}",
            _mark(row["median_ms"], row["target_ms"], f"{row['median_ms']:.2f} ms"),
            f"{row['min_ms']:.2f} - {row['max_ms']:.2f}",
            f"{row['cpu_median_ms']:.2f} ms",
            f"{row['target_ms']:.0f} ms, {_size(row['target_nbytes'])}",
            _mark(row["nbytes"], row["target_nbytes"], _size(row["nbytes"])),
            f"{row['density']:.3%}",
        )
    console.print(table)
    table = Table(title="Beside FlexAttention's create_block_mask, as long as it can")
    for heading in (
        "mask",
        "tokens",
        "portattn",
        "flex",
        "ratio",
        "plan",
        "BlockMask",
        "flex peak",
    ):
        table.add_column(heading, justify="left" if heading == "mask" else "right")
    for row in flexes:
        table.add_row(
            row["pattern"],
            f"{row['seqlen']:,}",
            f"{row['portattn_median_ms']:.2f} ms",
            f"{row['flex_median_ms']:.1f} ms",
            f"{row['ratio']:.0f}x",
            _size(row["portattn_nbytes"]),
            _size(row["flex_nbytes"]),
            _size(row["flex_extra_bytes"]),
        )
    console.print(table)


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each plan")
    parser.add_argument("--flex-repeats", type=int, default=3, help="timed runs at each length")
    parser.add_argument("--flex-seconds", type=float, default=10.0, help="longest flex call")
    parser.add_argument("--flex-bytes", type=int, default=4 * 10**9, help="most memory of one")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args()
    plans = measure_plans(options.repeats)
    flexes = measure_flex(options.flex_seconds, options.flex_bytes, options.flex_repeats)
    print_tables(Console(), plans, flexes)
    record = {"benchmark": "planning", **_machine(), "plans": plans, "create_block_mask": flexes}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
