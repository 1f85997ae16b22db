"""How long a run takes, on a CPU or a GPU, called one by one or replayed from a CUDA graph."""

from __future__ import annotations

import abc
import statistics
import time
import weakref
from collections.abc import Callable

import torch

from portattn.errors import TuningError

# One sample repeats shorter work until it lasts this long: the clock and the launch then weigh
# little.
SAMPLE_NS = 200_000
MAX_REPEATS = 64
# Written before each timed run on a GPU: ten times an H100's L2 cache. That also takes longer than
# the host needs to prepare a call.
_FLUSH_BYTES = 512 << 20
_GPU_REPEATS = ((50_000, 5), (500_000, 3))  # (runs under this many ns, runs of a sample)
_CPU_FLUSH_BYTES = 64 << 20
_MOST_COLD = 3  # runs of a sample on a CPU, each after that much memory was written
# How a run is timed, by device, the default first: called one by one or replayed from a CUDA
# graph; with a cache that holds nothing of the run, as in a model, where other layers ran in
# between, or with what the run before left there.
POLICIES = {
    "cpu": ("eager_warm", "eager_cold"),
    "cuda": ("eager_cold", "eager_warm", "graph_cold", "graph_warm"),
}

Run = Callable[[], object]


class Timer(abc.ABC):
    """How long a run takes, on one kind of device.

    Attributes:
        policy: how runs are timed: one of `POLICIES`.
    """

    policy = "eager_warm"

    @abc.abstractmethod
    def sample(self, run: Run, repeats: int) -> int:
        """Time of one run, in ns, from `repeats` of them."""

    def repeats_for(self, once_ns: int) -> int:
        """How many runs of this time make one sample that noise does not drown."""
        return max(1, min(MAX_REPEATS, SAMPLE_NS // max(once_ns, 1)))


class CpuTimer(Timer):
    """The host's monotonic clock, over runs back to back; with a cold cache, around each.

    Args:
        policy: ``"eager_warm"`` or ``"eager_cold"``.
    """

    def __init__(self, policy: str = "eager_warm") -> None:
        self.policy = policy
        self._flush: torch.Tensor | None = None

    def sample(self, run: Run, repeats: int) -> int:
        """See `Timer.sample`."""
        if self.policy == "eager_warm":
            started = time.perf_counter_ns()
            for _ in range(repeats):
                run()
            return (time.perf_counter_ns() - started) // repeats
        if self._flush is None:
            self._flush = torch.zeros(_CPU_FLUSH_BYTES, dtype=torch.int8)
        times = []
        for _ in range(min(repeats, _MOST_COLD)):
            self._flush.add_(1)
            started = time.perf_counter_ns()
            run()
            times.append(time.perf_counter_ns() - started)
        return int(statistics.median(times))


class CudaTimer(Timer):
    """Events on the device's current stream.

    A cold run is timed alone, after the cache was written; the host has prepared it meanwhile.
    Warm runs follow each other: eager ones at the host's pace, those of a graph at the device's.

    Args:
        device: a CUDA (or ROCm) device.
        policy: one of `POLICIES`.
    """

    def __init__(self, device: str, policy: str = "eager_cold") -> None:
        self.policy = policy
        self._device = torch.device(device)
        self._flush: torch.Tensor | None = None
        # Of each run still wanted: how many of it the graph holds, and the graph.
        self._graphs: weakref.WeakKeyDictionary[Run, tuple[int, torch.cuda.CUDAGraph]] = (
            weakref.WeakKeyDictionary()
        )

    def sample(self, run: Run, repeats: int) -> int:
        """See `Timer.sample`."""
        kind, cache = self.policy.split("_")
        with torch.cuda.device(self._device):
            if cache == "cold":
                return self._cold(self._graph(run, 1).replay if kind == "graph" else run, repeats)
            start, end = timing_event(), timing_event()
            if kind == "graph":
                graph = self._graph(run, repeats)
                start.record()
                graph.replay()
            else:
                start.record()
                for _ in range(repeats):
                    run()
            end.record()
            end.synchronize()
        return max(int(start.elapsed_time(end) * 1e6) // repeats, 1)

    def repeats_for(self, once_ns: int) -> int:
        """See `Timer.repeats_for`."""
        if self.policy.endswith("warm"):
            return super().repeats_for(once_ns)
        return next((repeats for most, repeats in _GPU_REPEATS if once_ns < most), 1)

    def _cold(self, run: Run, repeats: int) -> int:
        """The median of the runs."""
        if self._flush is None:
            self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=self._device)
        pairs = [(timing_event(), timing_event()) for _ in range(repeats)]
        for start, end in pairs:
            self._flush.zero_()
            start.record()
            run()
            end.record()
        pairs[-1][1].synchronize()
        times = [start.elapsed_time(end) for start, end in pairs]
        return max(int(statistics.median(times) * 1e6), 1)

    def _graph(self, run: Run, count: int) -> torch.cuda.CUDAGraph:
        """A graph of so many runs; each run's last one is kept."""
        held, graph = self._graphs.get(run, (0, None))
        if graph is None or held != count:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(count):
                    run()
            self._graphs[run] = count, graph
        return graph


def timing_event() -> torch.cuda.Event:
    """An event that has a time."""
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event


def policy_for(device: str, policy: str | None = None) -> str:
    """The policy that `timer_for`'s timer has, which need not be made for that.

    Raises:
        TuningError: a device type or policy that there is not.
    """
    kind = device.partition(":")[0]
    if kind not in POLICIES:
        raise TuningError(f"device is {device!r}; 'cpu' and 'cuda' devices can be tuned")
    allowed = POLICIES[kind]
    if policy is not None and policy not in allowed:
        raise TuningError(
            f"policy is {policy!r}; on {kind} it must be one of {', '.join(allowed)}"
        )
    return policy or allowed[0]


def timer_for(device: str, policy: str | None = None) -> Timer:
    """The timer of a torch device.

    Args:
        device: where.
        policy: one of the device's `POLICIES`; None for the first of them.

    Raises:
        TuningError: a device type or policy that there is not.
    """
    name = policy_for(device, policy)
    return CpuTimer(name) if device.startswith("cpu") else CudaTimer(device, name)
