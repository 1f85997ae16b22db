"""The CPU forward kernels beside what one would use without them.

    python -m benchmarks.cpu_forward [--threads 2] [--only NAME] [--no-flex] [--budget 10]
    [--thread-time]

Every case runs `portattn.attention` (its output's allocation and dispatch counted) and its peers
in turn; medians and the 10 to 90 % spread. The FMA rate and the read bandwidth are measured before
and after each case, and shares are of their mean. FlexAttention's compiling and block masks, and
masks of SDPA, are made before and not timed. "Needed" operations are those of the kept pairs.
Writes benchmarks/results/cpu_forward.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import portattn
from benchmarks.cpu_cases import Case, all_cases
from portattn import attention
from portattn.bench.limits import cpu_limits
from portattn.bench.timing import interleaved, ratio
from portattn.device import device_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from portattn.bench.limits import CpuLimits

RESULTS = Path(__file__).parent / "results" / "cpu_forward.json"
_READ_BYTES = 1 << 28


def run_case(
    case: Case, *, flex: bool, budget_seconds: float, clock: Callable[[], float]
) -> dict[str, Any]:
    """Time one case beside its peers."""
    query, key, value = case.tensors()

    def ours() -> torch.Tensor:
        return attention(query, key, value, case.mask, q_offset=case.q_offset)

    peers = case.peers(query, key, value, flex=flex)
    before = cpu_limits(read_bytes=_READ_BYTES)
    timings = interleaved({"portattn": ours, **peers}, budget_seconds=budget_seconds, clock=clock)
    after = cpu_limits(read_bytes=_READ_BYTES)
    mine = timings["portattn"]
    rate = case.gbytes if case.memory_bound else case.gflop
    limit = _mean(before, after, "read_gbps" if case.memory_bound else "fma_gflops")
    return {
        "case": case.name,
        "timings": {name: dataclasses.asdict(timing) for name, timing in timings.items()},
        "ratios": {name: ratio(timings[name], mine) for name in peers},
        "goals": case.goals,
        "rate": rate / mine.median_ms * 1e3,
        "unit": "GB/s" if case.memory_bound else "GFLOP/s",
        "share_of_limit": rate / mine.median_ms * 1e3 / limit,
        "goal_of_limit": case.goal_of_limit,
        "limit": limit,
        "explain": str(portattn.explain(query, key, value, case.mask, q_offset=case.q_offset)),
    }


def _mean(before: CpuLimits, after: CpuLimits, name: str) -> float:
    return float(getattr(before, name) + getattr(after, name)) / 2


def reached(row: dict[str, Any]) -> bool:
    """Whether every goal of a row that was measured is reached."""
    ratios = (row["ratios"].get(peer, goal) >= goal for peer, goal in row["goals"].items())
    return all(ratios) and row["share_of_limit"] >= row["goal_of_limit"]


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The table; ratios below their goal are red."""
    table = Table("case", "ms", "rate", "% of limit", "times faster than (goal)")
    for row in rows:
        mine = row["timings"]["portattn"]
        against = []
        for peer, value in row["ratios"].items():
            goal = row["goals"].get(peer, 0.0)
            colour = "red" if value < goal else "green" if goal else "default"
            against.append(f"{peer} [{colour}]{value:.2f}[/]" + (f" ({goal})" if goal else ""))
        share = f"{100 * row['share_of_limit']:.0f}"
        if row["goal_of_limit"]:
            share += f" ({100 * row['goal_of_limit']:.0f})"
        spread = f"{mine['median_ms']:.3f} [{mine['low_ms']:.3f}, {mine['high_ms']:.3f}]"
        table.add_row(
            row["case"], spread, f"{row['rate']:.1f} {row['unit']}", share, ", ".join(against)
        )
    console.print(table)
    by_name = {row["case"]: row for row in rows}
    blocks, dense = by_name.get("8 random blocks a row S4096"), by_name.get("dense S4096 D64")
    if blocks and dense:
        share = f"{blocks['rate'] / dense['rate']:.2f}"
        console.print(f"speed per kept tile, 8 tiles a row, of dense: {share} (0.9)")


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument(
        "--no-flex", action="store_true", help="leave out FlexAttention (minutes of compiling)"
    )
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of timing a case")
    parser.add_argument(
        "--thread-time", action="store_true", help="one thread's CPU time, on a busy machine"
    )
    arguments = parser.parse_args()
    if arguments.thread_time and arguments.threads != 1:
        parser.error("--thread-time counts one thread; give --threads 1 with it")
    clock = time.thread_time if arguments.thread_time else time.perf_counter
    torch.set_num_threads(arguments.threads)
    console = Console(width=160)
    rows = []
    for case in all_cases():
        if arguments.only in case.name:
            flex = not arguments.no_flex
            rows.append(run_case(case, flex=flex, budget_seconds=arguments.budget, clock=clock))
            show(rows[-1:], console)
    show(rows, console)
    missed = [row["case"] for row in rows if not reached(row)]
    console.print(
        f"goals reached in {len(rows) - len(missed)} of {len(rows)} cases; not in: {missed}"
    )
    if arguments.only or arguments.thread_time:
        return  # a part is for looking at
    record = {
        "benchmark": "cpu_forward",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": dataclasses.asdict(device_key("cpu")),
        "limits": dataclasses.asdict(cpu_limits(arguments.threads)),
        "versions": {
            "portattn": portattn.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"wrote {RESULTS.name}")


if __name__ == "__main__":
    main()
