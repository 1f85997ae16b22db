"""Timing: samples, their statistics, and rounds in which drift hits every candidate alike."""

from __future__ import annotations

import abc
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from portattn.errors import TuningError
from portattn.tuning_db.records import Timing

# One sample repeats shorter work until it lasts this long: the clock and the launch then weigh
# little.
SAMPLE_NS = 200_000
MAX_REPEATS = 64
# With five paired samples all on one side, chance is 3 in 100.
MIN_ROUNDS = 5
# Written before each timed run on a GPU: ten times an H100's L2 cache. That also takes longer than
# the host needs to prepare a call.
_FLUSH_BYTES = 512 << 20
_GPU_REPEATS = ((50_000, 5), (500_000, 3))  # (runs under this many ns, runs of a sample)

Run = Callable[[], object]


class Timer(abc.ABC):
    """How long a run takes, on one kind of device.

    Attributes:
        policy: how runs are timed: ``"eager_warm"`` or ``"eager_cold"`` (the L2 cache holds
            nothing of the run, as in a model, where other layers ran in between).
    """

    policy = "eager_warm"

    @abc.abstractmethod
    def sample(self, run: Run, repeats: int) -> int:
        """Time of one run, in ns, from `repeats` of them."""

    def repeats_for(self, once_ns: int) -> int:
        """How many runs of this time make one sample that noise does not drown."""
        return max(1, min(MAX_REPEATS, SAMPLE_NS // max(once_ns, 1)))


class CpuTimer(Timer):
    """The host's monotonic clock, over runs back to back."""

    def sample(self, run: Run, repeats: int) -> int:
        """See `Timer.sample`."""
        started = time.perf_counter_ns()
        for _ in range(repeats):
            run()
        return (time.perf_counter_ns() - started) // repeats


class CudaTimer(Timer):
    """Events around each run on the device's current stream, with a cold L2 cache.

    Args:
        device: a CUDA (or ROCm) device.
    """

    policy = "eager_cold"

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._flush: torch.Tensor | None = None

    def sample(self, run: Run, repeats: int) -> int:
        """See `Timer.sample`: the median of the runs."""
        with torch.cuda.device(self._device):
            if self._flush is None:
                self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=self._device)
            pairs = [(_timing_event(), _timing_event()) for _ in range(repeats)]
            for start, end in pairs:
                self._flush.zero_()
                start.record()
                run()
                end.record()
            pairs[-1][1].synchronize()
        times = [start.elapsed_time(end) for start, end in pairs]
        return max(int(statistics.median(times) * 1e6), 1)

    def repeats_for(self, once_ns: int) -> int:
        """See `Timer.repeats_for`."""
        return next((repeats for most, repeats in _GPU_REPEATS if once_ns < most), 1)


def _timing_event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event


def policy_for(device: str) -> str:
    """The policy of `timer_for`'s timer, which need not be made for that."""
    return CudaTimer.policy if device.startswith("cuda") else CpuTimer.policy


def timer_for(device: str) -> Timer:
    """The timer of a torch device.

    Raises:
        TuningError: another device type.
    """
    if device.startswith("cpu"):
        return CpuTimer()
    if device.startswith("cuda"):
        return CudaTimer(device)
    raise TuningError(f"device is {device!r}; 'cpu' and 'cuda' devices can be tuned")


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


def is_faster(
    candidate: Sequence[int], default: Sequence[int], *, least_gain: float = 0.01
) -> bool:
    """Whether paired samples show a candidate faster, beyond noise and by at least least_gain."""
    ratios = [
        int(1_000_000 * mine / max(other, 1))
        for mine, other in zip(candidate, default, strict=True)
    ]
    spread = summarise(ratios)
    return spread.ci95_hi_ns < 1_000_000 and spread.median_ns <= 1_000_000 * (1 - least_gain)
