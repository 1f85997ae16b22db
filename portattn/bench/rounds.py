"""Times of contenders that take turns, in rounds whose number follows from a time to spend.

On a GPU the L2 cache is overwritten before each call (cold, as in a model, where other layers ran
in between), which also keeps the GPU busy while the host prepares the call: host cost is measured
apart, by `host_us`.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import statistics
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MIN_ROUNDS, MAX_ROUNDS = 10, 200
_FLUSH_BYTES = 1 << 30  # twenty times the L2 cache; 0.35 ms of writing hides the host's work
_BETWEEN_SECONDS = 4e-4
_HOST_CALLS = 100  # of one block; the launch queue holds more


@dataclasses.dataclass(frozen=True, slots=True)
class Spread:
    """Times of one call.

    Attributes:
        median, p20, p80: in the unit of the samples.
        rounds: how many samples.
    """

    median: float
    p20: float
    p80: float
    rounds: int


def spread(samples: list[float]) -> Spread:
    """Median and the 20th and 80th percentile of samples."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Spread(
        statistics.median(ordered),
        ordered[math.floor(0.2 * last)],
        ordered[math.ceil(0.8 * last)],
        len(ordered),
    )


class Timer(abc.ABC):
    """How long calls take on one kind of device, in milliseconds."""

    @abc.abstractmethod
    def once(self, call: Callable[[], object]) -> float:
        """One call, waited for."""

    @abc.abstractmethod
    def rounds(self, calls: Mapping[str, Callable[[], object]], count: int) -> dict[str, Spread]:
        """All calls in turn, `count` times."""


class CpuTimer(Timer):
    """The host's clock."""

    def once(self, call: Callable[[], object]) -> float:
        """See `Timer.once`."""
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1e3

    def rounds(self, calls: Mapping[str, Callable[[], object]], count: int) -> dict[str, Spread]:
        """See `Timer.rounds`."""
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(count):
            for name, call in calls.items():
                samples[name].append(self.once(call))
        return {name: spread(values) for name, values in samples.items()}


class CudaTimer(Timer):
    """Events around each call on the current stream, with a cold L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def once(self, call: Callable[[], object]) -> float:
        """See `Timer.once`."""
        begin, end = self._timed(call)
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))

    def _timed(self, call: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = _event(), _event()
        self._flush.zero_()
        begin.record()
        call()
        end.record()
        return begin, end

    def rounds(self, calls: Mapping[str, Callable[[], object]], count: int) -> dict[str, Spread]:
        """See `Timer.rounds`."""
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in calls}
        for _ in range(count):
            for name, call in calls.items():
                events[name].append(self._timed(call))
        torch.cuda.synchronize()
        return {
            name: spread([float(begin.elapsed_time(end)) for begin, end in pairs])
            for name, pairs in events.items()
        }


def _event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event


class HungError(RuntimeError):
    """A call did not finish: nothing else can run on this GPU in this process."""


def wait(seconds: float) -> None:
    """Wait for the current CUDA device, but not for ever.

    Raises:
        HungError: it was not done in time.
    """
    done, end = _event(), time.monotonic() + seconds
    done.record()
    while not done.query():  # type: ignore[no-untyped-call]
        if time.monotonic() > end:
            raise HungError(f"did not finish in {seconds:.0f} s")
        time.sleep(1e-4)


def is_lost(device: torch.device) -> bool:
    """Whether a crashed or hung kernel keeps this process from using the device."""
    if device.type != "cuda":
        return False
    try:
        wait(1.0)
    except RuntimeError:
        return True
    return False


def timer_for(device: torch.device) -> Timer:
    """The timer of a torch device."""
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def take_turns(
    timer: Timer, calls: Mapping[str, Callable[[], object]], seconds: float
) -> dict[str, Spread]:
    """Rounds of all calls, each of which ran before.

    Args:
        timer: how to time.
        calls: name -> the call.
        seconds: to spend on each call on average; at least `MIN_ROUNDS` rounds are taken.
    """
    once_s = sum(timer.once(call) for call in calls.values()) / 1e3 + _BETWEEN_SECONDS * len(calls)
    count = round(seconds * len(calls) / max(once_s, 1e-6))
    return timer.rounds(calls, min(max(count, MIN_ROUNDS), MAX_ROUNDS))


def host_us(
    calls: Mapping[str, Callable[[], object]],
    synchronize: Callable[[], None],
    seconds: float,
    clock: Callable[[], float] = time.thread_time,
) -> dict[str, Spread]:
    """Host microseconds of one call: blocks of calls in turn, none waited for inside a block.

    Args:
        calls: name -> the call; each ran before.
        synchronize: waits for the device, between blocks.
        seconds: to spend on each call on average.
        clock: seconds; by default the thread's CPU time, which other processes do not change.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or min(map(len, samples.values())) < MIN_ROUNDS:
        for name, call in calls.items():
            synchronize()
            started = clock()
            for _ in range(_HOST_CALLS):
                call()
            samples[name].append((clock() - started) / _HOST_CALLS * 1e6)
    synchronize()
    return {name: spread(values) for name, values in samples.items()}


def fresh_times(
    calls: Mapping[str, Callable[[int], object]], synchronize: Callable[[], None], count: int
) -> dict[str, tuple[Spread, Spread]]:
    """Calls with new data each time, in turn.

    Args:
        calls: name -> a call that takes a seed of its data; each ran before.
        synchronize: waits for the device.
        count: rounds; seeds are 1 to count.

    Returns:
        For each call milliseconds until its result is there, and until the host is free again.
    """
    waited: dict[str, list[float]] = {name: [] for name in calls}
    returned: dict[str, list[float]] = {name: [] for name in calls}
    for seed in range(1, count + 1):
        for name, call in calls.items():
            synchronize()
            started = time.perf_counter()
            call(seed)
            returned[name].append((time.perf_counter() - started) * 1e3)
            synchronize()
            waited[name].append((time.perf_counter() - started) * 1e3)
    return {name: (spread(waited[name]), spread(returned[name])) for name in calls}
