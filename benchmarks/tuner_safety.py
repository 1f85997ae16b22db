"""The tuning database under writers, kill -9 and spoiled files, at full counts.

    python -m benchmarks.tuner_safety [writers kills fuzz] [--scale 1.0]

writers: 64 processes on PostgreSQL and 8 on SQLite store 1,000 results each at once; none may fail
or be lost, and the best row of each problem must be its smallest time. kills: the tuner, its
compilers and its measuring process are killed 200 times at random instants on each kind of
database (`tests/tuner/killing.py`). fuzz: 10,000 spoiled databases, exports, jobs and seeds
(`tests/tuning_db/fuzzing.py`). The same code does smaller counts in the test suite. Needs
PostgreSQL's programs (`tests/postgresql.py`). Writes benchmarks/results/tuner_safety.json, part by
part.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import multiprocessing
import os
import platform
import random
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy

import portattn
from portattn.device import device_key
from portattn.problem import AttentionProblem
from portattn.tuning_db import schema, snapshot
from portattn.tuning_db.key import bucket
from portattn.tuning_db.records import KernelResult, Measurement, ProblemResult, Timing
from portattn.tuning_db.store import Store
from tests.postgresql import Cluster, programs
from tests.tuner.killing import Hunt
from tests.tuning_db.fuzzing import KINDS, Fuzzer

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).parent / "results" / "tuner_safety.json"
ROWS, KILLS, SPOILED = 1000, 200, 10_000
PROBLEMS, CONFIGS = 8, 40


def result(chance: random.Random, number: int) -> ProblemResult:
    """One problem's best config, with a random time."""
    median = chance.randrange(10_000, 10_000_000)
    timing = Timing(median, median, median, median, 0, 5, median, median)
    params: dict[str, int | bool | str] = {"block": chance.randrange(CONFIGS)}
    best = Measurement(params, number + 1, "ok", timing, 10_000_000)
    kernel = KernelResult(
        "a_kernel", "cpu", "native-1", "a" * 64, "b" * 64, (best,), best, 3, "rule"
    )
    seqlen = 1 << chance.randrange(PROBLEMS)
    problem = AttentionProblem("cpu", "float32", 1, 8, 8, seqlen, 4096, 64, 64)
    shape: dict[str, int | str] = {"seqlen_q": seqlen}
    return ProblemResult(device_key("cpu"), bucket(problem), shape, "eager_warm", (kernel,))


def write(
    url: str, number: int, count: int, told: multiprocessing.Queue[tuple[str, list[float]]]
) -> None:
    """One writer: stores results one by one, then tells how long each took, or what failed."""
    chance, times = random.Random(number), []
    try:
        store = Store(url)
        run_id = store.begin_run(effort="writers", seed=number, budget={})
        for index in range(count):
            one = result(chance, index)
            started = time.perf_counter()
            store.record(run_id, one)
            times.append(time.perf_counter() - started)
        store.finish_run(run_id, "done")
    except BaseException as error:
        told.put((f"{type(error).__name__}: {error}", times))
        raise
    told.put(("", times))


def writers(url: str, processes: int, count: int) -> dict[str, Any]:
    """Many writers at once; what they stored against what they say."""
    context = multiprocessing.get_context("fork")  # each would else import for seconds
    told = context.Queue()
    Store(url)
    started = time.perf_counter()
    children = [
        context.Process(target=write, args=(url, number, count, told))
        for number in range(processes)
    ]
    for child in children:
        child.start()
    said = [told.get() for _ in children]
    for child in children:
        child.join()
    seconds = time.perf_counter() - started
    times = sorted(value for _, values in said for value in values)
    m, b, c = schema.measurement, schema.best, schema.config
    with Store(url).transaction() as connection:
        stored = connection.execute(sqlalchemy.select(sqlalchemy.func.count(m.c.id))).scalar_one()
        smallest: dict[int, tuple[int, int]] = {}
        for problem, median, config in connection.execute(
            sqlalchemy.select(m.c.problem_id, m.c.median_ns, m.c.config_id)
        ):
            smallest[problem] = min(smallest.get(problem, (median, config)), (median, config))
        best = {
            row.problem_id: row.median_ns
            for row in connection.execute(sqlalchemy.select(b.c.problem_id, b.c.median_ns))
        }
        configs = connection.execute(sqlalchemy.select(sqlalchemy.func.count(c.c.id))).scalar_one()
    return {
        "processes": processes,
        "rows_each": count,
        "errors": [error for error, _ in said if error],
        "acknowledged": len(times),
        "lost": len(times) - stored,
        "best_is_smallest": best == {problem: one[0] for problem, one in smallest.items()},
        "problems": len(best),
        "configs": configs,
        "seconds": round(seconds, 1),
        "median_ms": round(1e3 * statistics.median(times), 2),
        "p99_ms": round(1e3 * times[int(0.99 * (len(times) - 1))], 1),
        "max_ms": round(1e3 * times[-1], 1),
    }


def kills(url: str, count: int) -> dict[str, Any]:
    """Kill -9, so often."""
    started = time.perf_counter()
    outcome = Hunt(url, seed=count, most_seconds=1.0).run(count)
    return {
        "kills": dict(outcome.kills),
        "runs_finished": outcome.finished,
        "measurements_acknowledged": outcome.acknowledged,
        "problems": outcome.problems[:20],
        "seconds": round(time.perf_counter() - started, 1),
    }


def fuzz(folder: Path, count: int) -> dict[str, Any]:
    """Spoiled databases and texts; the first assertion that fails ends it."""
    snapshot.READ_SECONDS = 0.3
    started = time.perf_counter()

    def set_database(text: str) -> None:
        os.environ["PORTATTN_DB"] = text

    fuzzer = Fuzzer(folder, set_database)
    outcomes: collections.Counter[str] = collections.Counter()
    failures = []
    for number in range(count):
        try:
            found = fuzzer.check(number)
        except BaseException as error:
            failures.append(f"{number} ({KINDS[number % len(KINDS)]}): {error!r}"[:300])
            continue
        used = "stored config" if found.used else "default"
        outcomes[f"{found.kind}: {used}, {len(found.messages)} warnings"] += 1
    return {
        "spoiled": count,
        "failures": failures,
        "outcomes": dict(sorted(outcomes.items())),
        "seconds": round(time.perf_counter() - started, 1),
    }


def both(folder: Path, part: Callable[[str, str], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A part on SQLite and on PostgreSQL, whose commits wait for the disk."""
    found = {"sqlite": part("sqlite", str(folder / "tuning.db"))}
    with Cluster(safe=True) as cluster:
        found["postgresql"] = part("postgresql", cluster.database())
    return found


def main() -> None:
    """Run the parts asked for; write and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["writers", "kills", "fuzz"])
    parser.add_argument("--scale", type=float, default=1.0, help="of the counts")
    options = parser.parse_args()
    os.environ["PORTATTN_DB"] = "none"
    counts = {"sqlite": 8, "postgresql": 64}
    rows, killed, spoiled = (max(1, round(options.scale * n)) for n in (ROWS, KILLS, SPOILED))
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "writers": lambda folder: both(folder, lambda kind, url: writers(url, counts[kind], rows)),
        "kills": lambda folder: both(folder, lambda _, url: kills(url, killed)),
        "fuzz": lambda folder: fuzz(folder, spoiled),
    }
    for name in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            found = parts[name](Path(folder))
        found["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
        record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        record |= {
            "benchmark": "tuner_safety",
            "device": device_key("cpu").name,
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "portattn": portattn.__version__,
            "sqlalchemy": sqlalchemy.__version__,
            "sqlite": sqlite3.sqlite_version,
            "postgresql": programs().parent.name,
            name: found,
        }
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps({name: found}, indent=1))


if __name__ == "__main__":
    main()
