"""Plan: which key tiles each query tile visits. docs/formats.md describes every array."""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from portattn import native
from portattn.errors import MaskError
from portattn.plan import abi
from portattn.plan.device import DevicePlan, copy_arrays
from portattn.plan.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    import torch

    from portattn.plan.cache import KeptCall


_MAX_DENSE_ELEMENTS = 1 << 28
_MAX_CALLS = 64


class Plan:
    """An immutable plan, owned by libportattn, shown as numpy arrays.

    Attributes:
        seqlen_q, seqlen_k, q_offset, block_q, block_k: what it was planned for.
        batch, num_heads: the call's; a plan of 1 layout serves any.
        num_layouts, num_passes: distinct resolved masks; sweeps over the rows.
        layouts: int32 [layout_batch, layout_heads].
        layout_ids: int32 [num_layouts].
        pass_steps: int32 [num_passes].
        row_ptr: int32 [num_passes * num_layouts + 1].
        rows: int32 [num_rows, 6]; tiles: int32 [num_tiles, 4]; runs: int32 [num_runs, 4].
        bits: uint32 [num_bit_tiles, block_q, words_per_row].
        bit_ranges: int32 [num_bit_tiles, ceil(block_q / 16), 2].
        q_ids: int32 [num_id_rows, seqlen_q]; k_ids: int32 [num_id_rows, seqlen_k].
        shapes: of the arrays by name.
        transposed: rows are key tiles, for dK and dV.
        calls: what backends keep for calls that they have seen, by their own keys (`keep_call`).
        captured: a CUDA graph reads it: it is never dropped from the cache.
        handle: address of the native plan, for kernels in libportattn.
    """

    seqlen_q: int
    seqlen_k: int
    q_offset: int
    block_q: int
    block_k: int
    num_layouts: int
    num_passes: int
    num_rows: int
    num_tiles: int
    num_runs: int
    num_bit_tiles: int
    num_id_rows: int
    words_per_row: int
    layout_batch: int
    layout_heads: int
    has_steps: bool
    transposed: bool
    shapes: dict[str, tuple[int, ...]]

    def __init__(self, handle: int, batch: int, num_heads: int) -> None:
        """Take ownership of a native plan."""
        lib = abi.functions()
        self._owner = native.Handle(handle, lib.portattn_plan_destroy)
        self.handle, self.batch, self.num_heads = handle, batch, num_heads
        # In the library's memory, as the arrays are.
        self._view = lib.portattn_plan_view_without_ids(handle).contents
        self._lock = threading.Lock()
        self._schedules: dict[tuple[int, ...], Schedule] = {}
        self._on_device: dict[torch.device, DevicePlan] = {}
        self.calls: dict[Hashable, KeptCall] = {}
        self.captured = False

    # A call needs few of the numbers and arrays, and making all takes longer than planning.
    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # an int, a bool or an array
        view = self.__dict__.get("_view")
        if view is None or name.startswith("_"):
            raise AttributeError(f"Plan has no attribute {name!r}")
        made: Any
        if name == "shapes":
            made = abi.plan_shapes(view)
        elif name in abi.PLAN_ARRAYS:
            if name in ("q_ids", "k_ids"):
                abi.functions().portattn_plan_view(self.handle)  # makes them
            made = abi.as_numpy(getattr(view, name), self.shapes[name])
            made = made.view(np.uint32) if name == "bits" else made
        elif name in abi.PLAN_NUMBERS:
            made = getattr(view, name)
            made = bool(made) if name in ("has_steps", "transposed") else made
        else:
            raise AttributeError(f"Plan has no attribute {name!r}")
        self.__dict__[name] = made
        return made

    @classmethod
    def create(
        cls,
        program: Sequence[int],
        data: Sequence[torch.Tensor],
        *,
        batch: int,
        num_heads: int,
        seqlen_q: int,
        seqlen_k: int,
        q_offset: int,
        block_q: int,
        block_k: int,
        max_bits_bytes: int = 0,
    ) -> Plan:
        """Plan a mask program; `plan_mask` is the cached way.

        Args:
            program: the mask's program.
            data: its data tensors.
            batch, num_heads: of the call; masks per batch or head must match them.
            seqlen_q, seqlen_k: lengths in tokens, below 2**30.
            q_offset: key position of query row 0.
            block_q, block_k: rows and keys of a tile, 1 to 4096.
            max_bits_bytes: bound on distinct partial tiles; 0 is 256 MiB.

        Raises:
            MaskError: the mask is malformed, does not fit the sizes, or exceeds the bound.
        """
        code, arrays = abi.encoded(tuple(program)), abi.mask_arrays(data)
        args = abi.PlanArgs(
            ctypes.sizeof(abi.PlanArgs),
            native.ABI_VERSION,
            code,
            len(program),
            arrays,
            len(data),
            batch,
            num_heads,
            seqlen_q,
            seqlen_k,
            q_offset,
            block_q,
            block_k,
            max_bits_bytes,
        )
        error = native.error_buffer()
        handle = abi.functions().portattn_plan_create(ctypes.byref(args), error, len(error))
        if not handle:
            raise MaskError(error.value.decode(errors="replace"))
        return cls(handle, batch, num_heads)

    def shapes_later(self) -> Callable[[], dict[str, tuple[int, ...]]]:
        """What makes `shapes`, and does not hold the plan."""
        return functools.partial(abi.plan_shapes, abi.PlanView.from_buffer_copy(self._view))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return abi.plan_nbytes(self._view)

    def transpose(self) -> Plan:
        """The same pairs with query and key tiles swapped: rows are key tiles.

        In it a full tile's queries may run past seqlen_q.
        """
        error = native.error_buffer()
        handle = abi.functions().portattn_plan_transpose(self.handle, error, len(error))
        if not handle:
            raise MaskError(error.value.decode(errors="replace"))
        return Plan(handle, self.batch, self.num_heads)

    def schedule(
        self,
        *,
        batch: int,
        num_heads: int,
        workers: int,
        head_dim_v: int,
        min_piece: int = 8,
        max_workspace_bytes: int = 256 << 20,
    ) -> Schedule:
        """Work items for this many (batch, head) pairs and workers; cached on the plan.

        Args:
            batch, num_heads: query heads of the call.
            workers: items that run at once (threads, or SMs times blocks per SM).
            head_dim_v: elements of a value row; sizes the workspace.
            min_piece: a row is never cut into pieces smaller than this many tiles.
            max_workspace_bytes: bound on the workspace of cut rows, all heads together.
        """
        return self.schedule_with(
            (batch, num_heads, workers, head_dim_v, min_piece, max_workspace_bytes)
        )

    def schedule_with(self, arguments: tuple[int, ...]) -> Schedule:
        """`schedule`, its arguments in order."""
        found = self._schedules.get(arguments)
        if found is None:
            made = Schedule(self, *arguments)
            with self._lock:
                # A plan serves few different calls; past that, start over rather than grow.
                if len(self._schedules) >= 16:
                    self._schedules.clear()
                found = self._schedules.setdefault(arguments, made)
        return found

    def to(self, device: torch.device | str) -> DevicePlan:
        """The arrays as int32 tensors on a device, copied once.

        Raises:
            MaskError: the plan is not there yet while a CUDA graph is being captured.
        """
        import torch

        device = torch.device(device)
        found = self._on_device.get(device)
        if found is None:
            found = self.keep_on(device, copy_arrays(self, None, device)[0])
        if found.use():
            self.captured = True
        return found

    def is_on(self, device: torch.device) -> bool:
        """Whether the arrays have been copied to a device."""
        return device in self._on_device

    def keep_on(self, device: torch.device, made: DevicePlan) -> DevicePlan:
        """Keep a copy; returns the one that another thread kept first, if there is one."""
        with self._lock:
            return self._on_device.setdefault(device, made)

    def keep_call(self, key: Hashable, made: KeptCall) -> KeptCall:
        """Keep what a backend prepared for calls like one that it has just seen.

        It goes with the plan, and must not hold it. A plan serves few different calls; past 64,
        it starts over.
        """
        with self._lock:
            if len(self.calls) >= _MAX_CALLS:
                self.calls.clear()
            return self.calls.setdefault(key, made)

    def layout_of(self, b: int, h: int) -> int:
        """The layout of batch b, query head h."""
        return int(self.layouts[b % self.layout_batch, h % self.layout_heads])

    def tile_bits(self, index: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Bit tile `index` as bool [block_q, block_k]."""
        words = self.bits[index]
        bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
        return bits[:, : self.block_k].astype(bool)

    def to_dense(self, b: int = 0, h: int = 0) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """The mask that the plan holds, bool [seqlen_q, seqlen_k], decoded tile by tile.

        Raises:
            MaskError: more than 2**28 elements.
        """
        if self.seqlen_q * self.seqlen_k > _MAX_DENSE_ELEMENTS:
            raise MaskError(
                f"to_dense needs {self.seqlen_q} x {self.seqlen_k} elements, above 2**28; use "
                "density or shorter lengths"
            )
        from portattn.plan.decode import decode

        return decode(self, self.layout_of(b, h)) > 0

    @property
    def density(self) -> float:
        """Kept pairs / (seqlen_q * seqlen_k), averaged over the layouts of all (batch, head)."""
        from portattn.plan.decode import count_pairs

        size = self.seqlen_q * self.seqlen_k
        if size == 0:
            return 0.0
        pairs = [count_pairs(self, layout) for layout in range(self.num_layouts)]
        kept: int = sum(pairs[layout] for layout in self.layouts.ravel().tolist())
        return float(kept / (self.layouts.size * size))

    def validate(self) -> None:
        """Check every invariant of docs/formats.md.

        Raises:
            MaskError: one does not hold; the message names it.
        """
        from portattn.plan.decode import validate

        validate(self)

    def __repr__(self) -> str:
        lengths = f"{self.seqlen_q} x {self.seqlen_k}, q_offset={self.q_offset}"
        parts = ("passes", "layouts", "rows", "tiles", "runs", "bit_tiles")
        counts = ", ".join(f"{name}={getattr(self, 'num_' + name)}" for name in parts)
        block = f"block=({self.block_q}, {self.block_k})"
        return f"Plan({lengths}, {block}, {counts}, {self.nbytes} bytes)"
