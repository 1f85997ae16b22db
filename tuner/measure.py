"""Timing: samples, their statistics, and rounds in which drift hits every candidate alike."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from typing import TYPE_CHECKING

from portattn.tuning_db.records import Timing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portattn.tuner.timers import Run, Timer

# With five paired samples all on one side, chance is 3 in 100.
MIN_ROUNDS = 5


def summarise(samples: Sequence[int]) -> Timing:
    """Statistics of samples in ns.

    The median's 95 % interval is that of its order statistics (binomial).
    """
    ordered = sorted(samples)
    n = len(ordered)
    half = 0.98 * math.sqrt(n)  # 1.96 standard deviations of a binomial with p = 1/2
    low, high = max(math.floor(n / 2 - half), 0), min(math.ceil(n / 2 + half), n - 1)
    return Timing(
        median_ns=max(int(statistics.median(ordered)), 1),
        p20_ns=ordered[int(0.2 * (n - 1))],
        p80_ns=ordered[math.ceil(0.8 * (n - 1))],
        mean_ns=int(statistics.fmean(ordered)),
        stdev_ns=int(statistics.pstdev(ordered)),
        n=n,
        ci95_lo_ns=ordered[low],
        ci95_hi_ns=ordered[high],
    )


def screen(
    timer: Timer, run: Run, *, best_ns: int | None, samples: int = 5, max_ns: int = 50_000_000
) -> list[int]:
    """A few samples of a candidate: fewer once it is clearly slow, or once they took long.

    Args:
        timer: how to time.
        run: the candidate, already run once.
        best_ns: median of the best so far; None if there is none.
        samples: how many at most.
        max_ns: no further sample once this much time went by, but two of runs under ten times it.
    """
    started = time.perf_counter_ns()
    once = max(timer.sample(run, 1), 1)
    repeats = timer.repeats_for(once)
    found = [once] if repeats == 1 else []
    while len(found) < samples:
        slow = (
            best_ns is not None
            and found
            and min(found) > (2.0 if len(found) == 1 else 1.5) * best_ns
        )
        late = len(found) >= (2 if once < 10 * max_ns else 1) and (
            time.perf_counter_ns() - started > max_ns
        )
        if slow or late:
            break
        found.append(timer.sample(run, repeats))
    return found


def interleave(
    timer: Timer,
    runs: Sequence[Run],
    times_ns: Sequence[int],
    *,
    deadline: float,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = 101,
) -> list[list[int]]:
    """Samples of several candidates in rounds.

    Each is timed once a round, and the order turns round each time.

    Args:
        timer: how to time.
        runs: the candidates, each already run once.
        times_ns: about how long each takes.
        deadline: on `time.monotonic`; at least min_rounds are done whatever the time.
        min_rounds, max_rounds: bounds.

    Returns:
        For each candidate its samples, one a round: sample r of all candidates belongs together.
    """
    repeats = [timer.repeats_for(time_ns) for time_ns in times_ns]
    found: list[list[int]] = [[] for _ in runs]
    for index in range(max_rounds):
        if index >= min_rounds and time.monotonic() > deadline:
            break
        order = range(len(runs)) if index % 2 == 0 else reversed(range(len(runs)))
        for candidate in order:
            found[candidate].append(timer.sample(runs[candidate], repeats[candidate]))
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class Ratio:
    """Time of one candidate over another's, from paired samples: the median and its interval."""

    median: float
    low: float
    high: float


def ratio(candidate: Sequence[int], other: Sequence[int]) -> Ratio:
    """Compare paired samples: those of one round belong together."""
    parts = [
        int(1_000_000 * mine / max(its, 1)) for mine, its in zip(candidate, other, strict=True)
    ]
    spread = summarise(parts)
    return Ratio(spread.median_ns / 1e6, spread.ci95_lo_ns / 1e6, spread.ci95_hi_ns / 1e6)


def is_faster(
    candidate: Sequence[int], default: Sequence[int], *, least_gain: float = 0.01
) -> bool:
    """Whether paired samples show a candidate faster, beyond noise and by at least least_gain."""
    found = ratio(candidate, default)
    return found.high < 1 and found.median <= 1 - least_gain
