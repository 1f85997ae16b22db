"""Memory that the launches of one stream use one after the other."""

from __future__ import annotations

import collections
import threading
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_STREAMS = 16


def current_stream(device_index: int) -> int:
    """Torch's current stream of a CUDA device as the driver's integer."""
    return int(torch._C._cuda_getCurrentRawStream(device_index))


class _StreamMemory:
    """A tensor for each of the last 16 streams, grown as needed."""

    def __init__(self, make: Callable[[int, torch.device], torch.Tensor]) -> None:
        self._make, self._lock = make, threading.Lock()
        self.kept: collections.OrderedDict[tuple[torch.device, int], torch.Tensor] = (
            collections.OrderedDict()
        )

    def get(self, device: torch.device, count: int) -> torch.Tensor:
        """At least `count` elements, this stream's own. A CUDA graph gets its own."""
        stream = 0
        if device.type == "cuda":
            # A graph may be replayed on any stream.
            if torch._C._cuda_isCurrentStreamCapturing():
                return self._make(count, device)
            stream = current_stream(device.index)
        key = (device, stream)
        with self._lock:
            found = self.kept.get(key)
            if found is None or found.numel() < count:
                found = self.kept[key] = self._make(1 << (count - 1).bit_length(), device)
                while len(self.kept) > MAX_STREAMS:
                    self.kept.popitem(last=False)
            self.kept.move_to_end(key)
            return found


_counters = _StreamMemory(
    lambda count, device: torch.zeros(count, dtype=torch.int32, device=device)
)
_scratch = _StreamMemory(
    lambda count, device: torch.empty(count, dtype=torch.float32, device=device)
)


def arrival_counters(device: torch.device, count: int) -> torch.Tensor:
    """At least `count` int32 zeros, this stream's own; a launch leaves them at zero."""
    return _counters.get(device, count)


def stream_scratch(device: torch.device, count: int) -> torch.Tensor:
    """At least `count` float32, this stream's own, for the time of one launch."""
    return _scratch.get(device, count)
