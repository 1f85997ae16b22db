"""Times of several calls that take turns.

So that a slow moment of the machine hits all of them.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """Times of one call, in milliseconds.

    Attributes:
        median_ms: half of the repeats were faster.
        low_ms, high_ms: the 10th and 90th percentile: the spread.
        repeats: how many were taken.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    repeats: int


def summarise(seconds: list[float]) -> Timing:
    """Median and spread of some times in seconds."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return Timing(
        median_ms=statistics.median(ordered) * 1e3,
        low_ms=ordered[math.floor(0.1 * last)] * 1e3,
        high_ms=ordered[math.ceil(0.9 * last)] * 1e3,
        repeats=len(ordered),
    )


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 15,
    budget_seconds: float = 10.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time the calls in turn: each once as a warm-up, then rounds of all of them.

    Args:
        calls: name -> the call.
        repeats: rounds wanted.
        budget_seconds: no new round begins past it, but three are always taken.
        clock: seconds; `time.thread_time` counts one thread's work and not what others do
        meanwhile.
    """
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + budget_seconds
    for round_index in range(repeats):
        if round_index >= 3 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return {name: summarise(values) for name, values in seconds.items()}


def ratio(peer: Timing, ours: Timing) -> float:
    """How many times faster ours is than the peer, by medians."""
    return peer.median_ms / ours.median_ms
