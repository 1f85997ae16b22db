"""Schedule: a plan's rows as work items. docs/formats.md describes the item."""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from typing import TYPE_CHECKING, Any

from portattn import native
from portattn.errors import MaskError
from portattn.plan import abi
from portattn.plan.device import DeviceSchedule, copy_arrays

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from portattn.plan.plan import Plan


class Schedule:
    """Work items of one plan, owned by libportattn, shown as numpy arrays.

    Attributes:
        items: int32 [total, 16]; columns are the constants of `portattn.plan.abi`.
        item_ptr: int32 [num_passes]: first item of each pass.
        items_per_pass: int32 [num_passes]: items of one layout.
        full_list: int32 [n, 2]: k_start, k_step.
        num_slots, num_counters: workspace slots and counters per (batch, head).
        workspace_bytes: for all heads.
        num_items: of all passes and layouts.
        arguments: of `Plan.schedule`, in order.
        shapes: of the arrays by name.
        handle: address of the native schedule.
    """

    num_passes: int
    num_layouts: int
    workspace_bytes: int
    shapes: dict[str, tuple[int, ...]]

    def __init__(
        self,
        plan: Plan,
        batch: int,
        num_heads: int,
        workers: int,
        head_dim_v: int,
        min_piece: int,
        max_workspace_bytes: int,
    ) -> None:
        """Schedule `plan`; use `Plan.schedule`, which caches."""
        lib = abi.functions()
        args = abi.ScheduleArgs(
            ctypes.sizeof(abi.ScheduleArgs),
            native.ABI_VERSION,
            batch,
            num_heads,
            workers,
            min_piece,
            max_workspace_bytes,
            head_dim_v,
        )
        error = native.error_buffer()
        handle = lib.portattn_schedule_create(plan.handle, ctypes.byref(args), error, len(error))
        if not handle:
            raise MaskError(error.value.decode(errors="replace"))
        self.handle, self._owner = handle, native.Handle(handle, lib.portattn_schedule_destroy)
        self.arguments = (
            batch, num_heads, workers, head_dim_v, min_piece, max_workspace_bytes,
        )  # fmt: skip
        # In the library's memory, as the arrays are.
        self._view = view = lib.portattn_schedule_view(handle).contents
        self.num_slots, self.num_counters = view.num_slots, view.num_counters
        self.num_items = view.total_items
        self._lock = threading.Lock()
        self._on_device: dict[torch.device, DeviceSchedule] = {}

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # an int or an array
        view = self.__dict__.get("_view")
        made: Any
        if view is not None and name == "shapes":
            made = abi.schedule_shapes(view)
        elif view is not None and name in abi.SCHEDULE_ARRAYS:
            made = abi.as_numpy(getattr(view, name), self.shapes[name])
        elif view is not None and name in ("num_passes", "num_layouts", "workspace_bytes"):
            made = getattr(view, name)
        else:
            raise AttributeError(f"Schedule has no attribute {name!r}")
        self.__dict__[name] = made
        return made

    def shapes_later(self) -> Callable[[], dict[str, tuple[int, ...]]]:
        """What makes `shapes`, and does not hold the schedule."""
        return functools.partial(
            abi.schedule_shapes, abi.ScheduleView.from_buffer_copy(self._view)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return 4 * sum(math.prod(shape) for shape in self.shapes.values())

    def to(self, device: torch.device | str) -> DeviceSchedule:
        """The arrays as int32 tensors on a device, copied once.

        Raises:
            MaskError: the schedule is not there yet while a CUDA graph is being captured.
        """
        import torch

        device = torch.device(device)
        found = self._on_device.get(device)
        if found is None:
            found = self.keep_on(device, copy_arrays(None, self, device)[1])
        found.use()
        return found

    def is_on(self, device: torch.device) -> bool:
        """Whether the arrays have been copied to a device."""
        return device in self._on_device

    def keep_on(self, device: torch.device, made: DeviceSchedule) -> DeviceSchedule:
        """Keep a copy; returns the one that another thread kept first, if there is one."""
        with self._lock:
            return self._on_device.setdefault(device, made)
