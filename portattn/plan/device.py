"""Plans and schedules on a device: one pinned copy, ordered between streams by an event."""

from __future__ import annotations

import ctypes
import math
from itertools import islice
from typing import TYPE_CHECKING, Any

from portattn.errors import MaskError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from portattn.plan.abi import NativeArrays
    from portattn.plan.plan import Plan
    from portattn.plan.schedule import Schedule

# Arrays start at multiples of 128 bytes, so that wide loads are aligned.
_ALIGN_BYTES = 128


class _Copy:
    """Native int32 arrays in one tensor on a device, copied without waiting."""

    def __init__(self, arrays: Sequence[tuple[int, int]], device: torch.device) -> None:
        """Copy (address, count) arrays; `starts` has where each begins, in int32 elements."""
        import torch

        on_gpu = device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise MaskError(
                "a plan was needed for the first time while a CUDA graph is being captured. Call "
                "attention once with these lengths before the capture, or plan.to(device)"
            )
        starts, total = [], 0
        for _, count in arrays:
            starts.append(total // 4)
            # An empty array still gets a place, so that its pointer is valid.
            total += -(-max(4 * count, 4) // _ALIGN_BYTES) * _ALIGN_BYTES
        # Torch keeps pinned memory for reuse, and not before the copy out of it is done.
        host = torch.empty(total // 4, dtype=torch.int32, pin_memory=on_gpu)
        target = host.data_ptr()
        for start, (address, count) in zip(starts, arrays, strict=True):
            if count:
                ctypes.memmove(target + 4 * start, address, 4 * count)
        self.starts = starts
        self._device_index = -1
        self._event: torch.cuda.Event | None = None
        self._ordered: set[int] = set()
        if not on_gpu:
            self.buffer = host if device.type == "cpu" else host.to(device)
        else:
            self.buffer = host.to(device, non_blocking=True)
            self._device_index = self.buffer.get_device()
            stream = torch.cuda.current_stream(self._device_index)
            self._event = stream.record_event()
            self._ordered.add(stream.cuda_stream)
        self.address = self.buffer.data_ptr()

    def use(self) -> bool:
        """Make the current stream wait for the copy; True while a CUDA graph is being captured."""
        if self._event is None:
            return False
        import torch

        capturing = bool(torch._C._cuda_isCurrentStreamCapturing())
        # In a capture the copy is long done: a foreign event must not be recorded into the graph.
        if not capturing:
            stream = torch._C._cuda_getCurrentRawStream(self._device_index)
            if stream not in self._ordered:
                current = torch.cuda.current_stream(self._device_index)
                current.wait_event(self._event)
                # Else the memory of a dropped plan could be handed out under this stream's work.
                self.buffer.record_stream(current)
                self._ordered.add(stream)
        return capturing


class _Arrays:
    """Part of a copy: int32 tensors by name, made when they are asked for."""

    def __init__(self, copy: _Copy, places: Mapping[str, tuple[int, tuple[int, ...]]]) -> None:
        self._copy, self._places = copy, places

    @property
    def buffer(self) -> torch.Tensor:
        """The memory that all arrays lie in."""
        return self._copy.buffer

    def use(self) -> bool:
        """Make the current stream wait for the copy; True while a CUDA graph is being captured."""
        return self._copy.use()

    def address(self, name: str) -> int:
        """Where an array starts in the device's memory; valid for an empty one too."""
        return self._copy.address + 4 * self._places[name][0]

    def __getattr__(self, name: str) -> torch.Tensor:
        places: Mapping[str, Any] = self.__dict__.get("_places", {})
        if name not in places:
            raise AttributeError(name)
        start, shape = places[name]
        size = math.prod(shape)
        view = self.buffer[start : start + max(size, 1)]
        view = view.view(shape if size else (1,) * len(shape))
        self.__dict__[name] = view
        return view


class DevicePlan(_Arrays):
    """A plan's arrays as int32 tensors, under the plan's names."""


class DeviceSchedule(_Arrays):
    """A schedule's arrays as int32 tensors, under the schedule's names."""


def copy_arrays(
    groups: Sequence[NativeArrays], device: torch.device
) -> list[tuple[_Copy, dict[str, tuple[int, tuple[int, ...]]]]]:
    """Groups of arrays in one copy: what `DevicePlan` and `DeviceSchedule` are made of.

    Raises:
        MaskError: a CUDA graph is being captured.
    """
    # Arrays that share their memory (ids that are the same for rows and keys) are copied once.
    sources: dict[tuple[int, int], int] = {}
    places = []
    for group in groups:
        for name, (address, shape) in group.items():
            size = math.prod(shape)
            source = (address, size) if size else (0, 0)
            places.append((name, sources.setdefault(source, len(sources)), shape))
    copy = _Copy(list(sources), device)
    found = iter(places)
    return [
        (
            copy,
            {
                name: (copy.starts[index], shape)
                for name, index, shape in islice(found, len(group))
            },
        )
        for group in groups
    ]


def to_device(
    plan: Plan, schedule: Schedule, device: torch.device
) -> tuple[DevicePlan, DeviceSchedule]:
    """A plan and one of its schedules on a device, in one copy if neither is there yet.

    Raises:
        MaskError: they are not there yet while a CUDA graph is being captured.
    """
    if not plan.is_on(device) and not schedule.is_on(device):
        for_plan, for_schedule = copy_arrays((plan.arrays(), schedule.arrays()), device)
        plan.keep_on(device, DevicePlan(*for_plan))
        schedule.keep_on(device, DeviceSchedule(*for_schedule))
    return plan.to(device), schedule.to(device)
