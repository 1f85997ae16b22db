"""What a lookup in the tuning database costs on the call path.

    python -m benchmarks.tuner_lookup [--repeats 15]

A database of 1,200 problems and one of 4,800 for one kernel are loaded; then SQL is made
impossible. Timed is `portattn.tuning_db.lookup.find`: for a problem that the process has met, for
new lengths in a bucket that it has met, and for a bucket that it has not met, which takes the
nearest one (the first call of each). On one thread, in its CPU time, which other programs disturb
less than the clock's; medians. Writes benchmarks/results/tuner_lookup.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy

import portattn
from portattn import masks
from portattn.device import device_key
from portattn.problem import AttentionProblem
from portattn.tuning_db import lookup
from portattn.tuning_db.identity import toolchain_class
from portattn.tuning_db.key import bucket
from portattn.tuning_db.records import KernelResult, Measurement, ProblemResult, Timing
from portattn.tuning_db.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

KERNEL = "cpu_forward"
SEEN_US, NEW_US = 1.0, 20.0
RESULTS = Path(__file__).parent / "results" / "tuner_lookup.json"


def problems(heads: tuple[int, ...]) -> Iterator[AttentionProblem]:
    """Tuned problems: 600 for each number of heads."""
    for num_heads, dim, batch, seqlen, window in itertools.product(
        heads, (64, 128, 256), (1, 2, 4, 8, 16), (1 << n for n in range(7, 15)), range(5)
    ):
        program = masks.sliding_window(64 << window).program if window else ()
        yield AttentionProblem(
            *("cpu", "float32", batch, num_heads, num_heads, seqlen, seqlen, dim, dim), program
        )


def fill(heads: tuple[int, ...]) -> int:
    """Store a best config for each problem; how many."""
    timing = Timing(900, 890, 910, 900, 5, 9, 895, 905)
    best = Measurement({"block_q": 32}, 1, "ok", timing, 1000)
    identity = (KERNEL, "cpu", toolchain_class("cpu"), "a" * 64, "b" * 64)
    kernel = KernelResult(*identity, (best,), best, 3, "rule")
    store = Store()
    run_id = store.begin_run(effort="benchmark", seed=0, budget={})
    keys = dict.fromkeys(map(bucket, problems(heads)))
    for number, key in enumerate(keys):
        one = ProblemResult(device_key("cpu"), key, {"number": number}, "eager_warm", (kernel,))
        store.record(run_id, one)
    return len(keys)


def time_each(calls: list[AttentionProblem]) -> dict[str, float]:
    """Microseconds of the first lookup of each problem."""
    device, times = device_key("cpu"), []
    for problem in calls:
        started = time.thread_time_ns()
        lookup.find(KERNEL, problem, device, kernel_source=lambda: "a" * 64)
        times.append((time.thread_time_ns() - started) / 1e3)
    times.sort()
    return {
        "calls": len(times),
        "median_us": round(statistics.median(times), 2),
        "p90_us": round(times[int(0.9 * len(times))], 2),
    }


def time_seen(problem: AttentionProblem, repeats: int, count: int = 20_000) -> dict[str, float]:
    """Microseconds of a lookup that was asked before, the loop's own cost included."""
    device, times = device_key("cpu"), []
    for _ in range(repeats):
        started = time.thread_time_ns()
        for _ in range(count):
            lookup.find(KERNEL, problem, device)
        times.append((time.thread_time_ns() - started) / count / 1e3)
    return {
        "calls": repeats * count,
        "median_us": round(statistics.median(times), 3),
        "max_us": round(max(times), 3),
    }


def measure(heads: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """One database: filled, loaded, and asked without SQL."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PORTATTN_DB"] = str(Path(folder) / "tuning.db")
        rows = fill(heads)
        lookup.reload()
        started = time.thread_time()
        assert lookup.status().rows == rows
        load_ms = 1e3 * (time.thread_time() - started)
    # The file is gone: an answer cannot come from it any more.
    chance = random.Random(0)
    first = next(problems(heads))
    shapes = [
        dataclasses.replace(first, seqlen_q=2 * length, seqlen_k=2 * length, batch=batch)
        for length in range(520, 1020)
        for batch in (1, 3, 6)
    ]
    untuned = [  # other head counts and lengths: their buckets have no row
        dataclasses.replace(first, num_heads=h, num_kv_heads=h, seqlen_q=length, seqlen_k=length)
        for h in range(3, 120)
        if h not in heads
        for length in (100, 1000, 10_000)
    ]
    chance.shuffle(shapes)
    time_each(untuned[:1])  # what happens once in a process
    return {
        "rows": rows,
        "load_ms": round(load_ms, 1),
        "seen": time_seen(first, repeats),
        "new_shape": time_each(shapes),
        "new_bucket": time_each(untuned[1:]),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    found = [measure(heads, options.repeats) for heads in ((8, 32), (1, 2, 8, 16, 24, 32, 48, 64))]
    record = {
        "benchmark": "tuner_lookup",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device_key("cpu").name,
        "python": platform.python_version(),
        "sqlalchemy": sqlalchemy.__version__,
        "portattn": portattn.__version__,
        "limits_us": {"seen": SEEN_US, "new": NEW_US},
        "databases": found,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
