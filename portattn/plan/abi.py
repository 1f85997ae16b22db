"""ctypes mirror of csrc/portattn.h: planner and scheduler."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_int32, c_int64, c_uint16, c_uint32, c_void_p
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from portattn import native
from portattn.errors import MaskError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

ITEM_FIELDS = 16
# Columns of `Schedule.items`, as PA_ITEM_* in portattn.h.
(
    Q_START,
    Q_STEP,
    NUM_ROWS,
    TILE_BEGIN,
    TILE_END,
    FULL_FIRST,
    FULL_COUNT,
    FULL_STEP,
    FULL_STRIDE,
    SLOT,
    SLOT_FIRST,
    NUM_PIECES,
    COUNTER,
    COST,
    LAYOUT,
) = range(15)
BITS_FULL = -1
BITS_EMPTY = -2

Int32Array = np.ndarray[Any, np.dtype[np.int32]]


class Array(ctypes.Structure):
    """pa_array: one mask-data tensor."""

    _fields_: ClassVar = [
        ("data", c_void_p),
        ("dtype", c_int32),
        ("ndim", c_int32),
        ("shape", c_int64 * 4),
    ]


class PlanArgs(ctypes.Structure):
    """pa_plan_args."""

    _fields_: ClassVar = [
        ("struct_size", c_uint32),
        ("abi_version", c_uint32),
        ("program", POINTER(c_int64)),
        ("program_len", c_int64),
        ("arrays", POINTER(Array)),
        ("num_arrays", c_int64),
        ("batch", c_int64),
        ("num_heads", c_int64),
        ("seqlen_q", c_int64),
        ("seqlen_k", c_int64),
        ("q_offset", c_int64),
        ("block_q", c_int32),
        ("block_k", c_int32),
        ("max_bits_bytes", c_int64),
    ]


_SIZES = ("seqlen_q", "seqlen_k", "q_offset")
_COUNTS = (
    "block_q",
    "block_k",
    "num_layouts",
    "num_passes",
    "num_rows",
    "num_tiles",
    "num_runs",
    "num_bit_tiles",
    "words_per_row",
    "layout_batch",
    "layout_heads",
    "num_id_rows",
    "has_steps",
)
PLAN_ARRAYS = (
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
)


class PlanView(ctypes.Structure):
    """pa_plan_view."""

    _fields_: ClassVar = [
        *((name, c_int64) for name in _SIZES),
        *((name, c_int32) for name in _COUNTS),
        *((name, c_void_p) for name in PLAN_ARRAYS),
        ("transposed", c_int32),
    ]


PLAN_NUMBERS = frozenset((*_SIZES, *_COUNTS, "transposed"))


def plan_shapes(view: Any) -> dict[str, tuple[int, ...]]:  # noqa: ANN401  # a PlanView
    """Shapes of a plan's arrays by name."""
    return {
        "layouts": (view.layout_batch, view.layout_heads),
        "layout_ids": (view.num_layouts,),
        "pass_steps": (view.num_passes,),
        "row_ptr": (view.num_passes * view.num_layouts + 1,),
        "rows": (view.num_rows, 6),
        "tiles": (view.num_tiles, 4),
        "runs": (view.num_runs, 4),
        "bits": (view.num_bit_tiles, view.block_q, view.words_per_row),
        "bit_ranges": (view.num_bit_tiles, -(-view.block_q // 16), 2),
        "q_ids": (view.num_id_rows, view.seqlen_q),
        "k_ids": (view.num_id_rows, view.seqlen_k),
    }


def plan_nbytes(view: Any) -> int:  # noqa: ANN401
    """Bytes of a plan's arrays."""
    of_bit_tile = view.block_q * view.words_per_row + 2 * -(-view.block_q // 16)
    count = view.layout_batch * view.layout_heads + view.num_layouts + view.num_passes + 1
    count += view.num_passes * view.num_layouts + view.num_bit_tiles * of_bit_tile
    count += 6 * view.num_rows + 4 * (view.num_tiles + view.num_runs)
    count += view.num_id_rows * (view.seqlen_q + view.seqlen_k)
    return 4 * int(count)


SCHEDULE_ARRAYS = ("items", "item_ptr", "items_per_pass", "full_list")


def schedule_shapes(view: Any) -> dict[str, tuple[int, ...]]:  # noqa: ANN401  # a ScheduleView
    """Shapes of a schedule's arrays by name."""
    return {
        "items": (view.total_items, ITEM_FIELDS),
        "item_ptr": (view.num_passes,),
        "items_per_pass": (view.num_passes,),
        "full_list": (view.full_list_len, 2),
    }


class ScheduleArgs(ctypes.Structure):
    """pa_schedule_args."""

    _fields_: ClassVar = [
        ("struct_size", c_uint32),
        ("abi_version", c_uint32),
        ("batch", c_int64),
        ("num_heads", c_int64),
        ("workers", c_int64),
        ("min_piece", c_int64),
        ("max_workspace_bytes", c_int64),
        ("head_dim_v", c_int64),
    ]


class ScheduleView(ctypes.Structure):
    """pa_schedule_view."""

    _fields_: ClassVar = [
        ("num_passes", c_int32),
        ("num_layouts", c_int32),
        ("num_slots", c_int32),
        ("num_counters", c_int32),
        ("full_list_len", c_int32),
        ("items_per_pass", c_void_p),
        ("item_ptr", c_void_p),
        ("items", c_void_p),
        ("full_list", c_void_p),
        ("total_items", c_int64),
        ("workspace_bytes", c_int64),
    ]


@functools.cache
def functions() -> ctypes.CDLL:
    """Libportattn with the signatures of planner and scheduler set."""
    lib = native.library()
    text = (ctypes.c_char_p, c_int64)
    lib.portattn_plan_create.argtypes = (POINTER(PlanArgs), *text)
    lib.portattn_plan_create.restype = c_void_p
    lib.portattn_plan_destroy.argtypes = (c_void_p,)
    lib.portattn_plan_destroy.restype = None
    lib.portattn_plan_view.argtypes = (c_void_p,)
    lib.portattn_plan_view.restype = POINTER(PlanView)
    lib.portattn_plan_view_without_ids.argtypes = (c_void_p,)
    lib.portattn_plan_view_without_ids.restype = POINTER(PlanView)
    lib.portattn_plan_bits_by_key.argtypes = (c_void_p,)
    lib.portattn_plan_bits_by_key.restype = POINTER(c_uint16)
    lib.portattn_plan_transpose.argtypes = (c_void_p, *text)
    lib.portattn_plan_transpose.restype = c_void_p
    lib.portattn_schedule_create.argtypes = (c_void_p, POINTER(ScheduleArgs), *text)
    lib.portattn_schedule_create.restype = c_void_p
    lib.portattn_schedule_destroy.argtypes = (c_void_p,)
    lib.portattn_schedule_destroy.restype = None
    lib.portattn_schedule_view.argtypes = (c_void_p,)
    lib.portattn_schedule_view.restype = POINTER(ScheduleView)
    lib.portattn_pack.argtypes = (c_void_p, c_void_p, c_void_p, c_void_p)
    lib.portattn_pack.restype = c_int64
    return lib


@functools.lru_cache(maxsize=256)
def encoded(program: tuple[int, ...]) -> ctypes.Array[c_int64]:
    """A mask's program, which masks of one kind share, as C reads it."""
    return (c_int64 * len(program))(*program)


_EMPTY = (Array * 1)()
_DTYPE_NAMES = ("torch.int32", "torch.int64", "torch.bool")  # by pa_array's codes


def as_numpy(address: int | None, shape: tuple[int, ...]) -> Int32Array:
    """A read-only int32 view of native memory; an empty array where nothing is stored."""
    count = int(np.prod(shape, dtype=np.int64))
    if count == 0 or not address:
        return np.zeros(shape, np.int32)
    buffer = (c_int32 * count).from_address(address)
    view: Int32Array = np.ctypeslib.as_array(buffer).reshape(shape)
    view.flags.writeable = False
    return view


def mask_arrays(data: Sequence[torch.Tensor]) -> ctypes.Array[Array]:
    """The mask's data tensors (int32, int64 or bool, contiguous, on the CPU) as pa_array."""
    if not data:
        return _EMPTY
    arrays = (Array * len(data))()
    for slot, tensor in enumerate(data):
        dtype, shape = str(tensor.dtype), tensor.shape
        if dtype not in _DTYPE_NAMES or len(shape) > 4 or not tensor.is_contiguous():
            raise MaskError(
                f"mask data {slot} is {dtype} {tuple(shape)}; it must be a contiguous int32, "
                "int64 or bool tensor of at most 4 dimensions"
            )
        code = _DTYPE_NAMES.index(dtype)
        arrays[slot] = Array(tensor.data_ptr(), code, len(shape), tuple(shape))
    return arrays
