"""Plans and schedules on a device: one pinned copy, ordered between streams by an event."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING

from portattn.errors import MaskError
from portattn.plan import abi

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from portattn.plan.plan import Plan
    from portattn.plan.schedule import Schedule


class _Copy:
    """Arrays of a plan, of a schedule or of both in one tensor on a device, copied in one go."""

    def __init__(self, plan: Plan | None, schedule: Schedule | None, device: torch.device) -> None:
        """Copy without waiting; `starts` has where each array begins, in bytes, by name."""
        import torch

        on_gpu = device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise MaskError(
                "a plan was needed for the first time while a CUDA graph is being captured. Call "
                "attention once with these lengths before the capture, or plan.to(device)"
            )
        names: tuple[str, ...] = abi.PLAN_ARRAYS + abi.SCHEDULE_ARRAYS
        if plan is None or schedule is None:
            names = abi.SCHEDULE_ARRAYS if plan is None else abi.PLAN_ARRAYS
        at = [None if one is None else one.handle for one in (plan, schedule)]
        pack, starts = abi.functions().portattn_pack, (ctypes.c_int64 * len(names))()
        size = pack(*at, None, starts)
        # Torch keeps pinned memory for reuse, and not before the copy out of it is done.
        host = torch.empty(size // 4, dtype=torch.int32, pin_memory=on_gpu)
        pack(*at, host.data_ptr(), starts)
        self.starts: dict[str, int] = dict(zip(names, starts, strict=True))
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
        self.address: int = self.buffer.data_ptr()

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

    def __init__(self, copy: _Copy, shapes: Callable[[], Mapping[str, tuple[int, ...]]]) -> None:
        self._copy, self._shapes_of = copy, shapes

    @property
    def buffer(self) -> torch.Tensor:
        """The memory that all arrays lie in."""
        return self._copy.buffer

    def use(self) -> bool:
        """Make the current stream wait for the copy; True while a CUDA graph is being captured."""
        return self._copy.use()

    def address(self, name: str) -> int:
        """Where an array starts in the device's memory; valid for an empty one too."""
        return self._copy.address + self._copy.starts[name]

    def __getattr__(self, name: str) -> torch.Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        shapes = self._shapes_of()
        if name not in shapes:
            raise AttributeError(name)
        start, shape = self._copy.starts[name] // 4, shapes[name]
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
    plan: Plan | None, schedule: Schedule | None, device: torch.device
) -> tuple[DevicePlan, DeviceSchedule]:
    """A plan and a schedule in one copy; of one that is None, there is nothing in it.

    Raises:
        MaskError: a CUDA graph is being captured.
    """
    copy = _Copy(plan, schedule, device)
    return (
        DevicePlan(copy, dict if plan is None else plan.shapes_later()),
        DeviceSchedule(copy, dict if schedule is None else schedule.shapes_later()),
    )


def to_device(
    plan: Plan, schedule: Schedule, device: torch.device
) -> tuple[DevicePlan, DeviceSchedule]:
    """A plan and one of its schedules on a device, in one copy if neither is there yet.

    Raises:
        MaskError: they are not there yet while a CUDA graph is being captured.
    """
    if not plan.is_on(device) and not schedule.is_on(device):
        on_device = copy_arrays(plan, schedule, device)
        plan.keep_on(device, on_device[0])
        schedule.keep_on(device, on_device[1])
    return plan.to(device), schedule.to(device)
