"""Plans and schedules on a device: one pinned copy each, ordered between streams by an event."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from portattn.errors import MaskError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from portattn.plan.plan import Plan
    from portattn.plan.schedule import Schedule

# Arrays start at multiples of 128 bytes, so that wide loads are aligned.
_ALIGN = 32


class _Upload:
    """Several int32 arrays in one tensor on a device."""

    def __init__(self, arrays: Mapping[str, np.ndarray[Any, Any]], device: torch.device) -> None:
        import torch

        on_gpu = device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise MaskError(
                "a plan was needed for the first time while a CUDA graph is being captured. Call "
                "attention once with these lengths before the capture, or plan.to(device)"
            )
        starts, total = {}, 0
        for name, array in arrays.items():
            starts[name] = total
            # An empty array still gets a place, so that its pointer is valid.
            total += -(-max(array.size, 1) // _ALIGN) * _ALIGN
        host = torch.zeros(total, dtype=torch.int32, pin_memory=on_gpu)
        buffer = host.numpy()
        for name, array in arrays.items():
            buffer[starts[name] : starts[name] + array.size] = array.reshape(-1).view(np.int32)
        self.buffer = host.to(device, non_blocking=True)
        self._host = host  # alive until the copy is done
        self._stream = torch.cuda.current_stream(device) if on_gpu else None
        self._event = self._stream.record_event() if self._stream is not None else None
        self._views = {
            name: self.buffer[starts[name] : starts[name] + max(array.size, 1)].view(
                array.shape if array.size else (1,) * array.ndim
            )
            for name, array in arrays.items()
        }

    def use(self) -> bool:
        """Make the current stream wait for the copy; True while a CUDA graph is being captured."""
        if self._event is None:
            return False
        import torch

        current = torch.cuda.current_stream(self.buffer.device)
        capturing = bool(torch.cuda.is_current_stream_capturing())
        # In a capture the copy is long done: a foreign event must not be recorded into the graph.
        if current != self._stream and not capturing:
            current.wait_event(self._event)
        return capturing

    def __getattr__(self, name: str) -> torch.Tensor:
        views: dict[str, torch.Tensor] = self.__dict__.get("_views", {})
        if name in views:
            return views[name]
        raise AttributeError(name)


class DevicePlan(_Upload):
    """A plan's arrays as int32 tensors, under the plan's names."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        """Copy the plan's arrays to the device."""
        names = [
            "layouts",
            "layout_ids",
            "pass_steps",
            "row_ptr",
            "rows",
            "tiles",
            "runs",
            "bits",
            "bit_ranges",
            "q_ids",
            "k_ids",
        ]
        super().__init__({name: getattr(plan, name) for name in names}, device)


class DeviceSchedule(_Upload):
    """A schedule's arrays as int32 tensors, under the schedule's names."""

    def __init__(self, schedule: Schedule, device: torch.device) -> None:
        """Copy the schedule's arrays to the device."""
        names = ["items", "item_ptr", "items_per_pass", "full_list"]
        super().__init__({name: getattr(schedule, name) for name in names}, device)
