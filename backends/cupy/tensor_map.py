"""Tensor maps: what the copy engine of sm_90 reads rows by.

A map describes one tensor of rank 5: columns, rows of one residue modulo a step, residues, heads,
batch. Rows and columns outside it are read as zeros, so that ragged tails never touch the next
head. CUDA Driver API, "Tensor Map Object Management", cuTensorMapEncodeTiled.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from portattn.backends.cuda_launch import check, driver

MAP_BYTES = 128  # sizeof(CUtensorMap)
BOX_COLUMNS = 64  # 128 bytes of 16-bit elements: the span of the swizzle
_ALIGN = 16
_DATA_TYPES = {torch.float16: 6, torch.bfloat16: 9}  # CUtensorMapDataType
# A box row is 128 bytes: with promotion to 256, L2 reads twice what it sends (measured).
_SWIZZLE_128B, _L2_PROMOTION_128B = 3, 2
_RANK = 5


class MapShape(NamedTuple):
    """What a map says beside its address.

    Attributes:
        dtype: of the elements, 16 bits wide.
        sizes: columns, rows, residues, heads, batch.
        strides: of all but the columns, in bytes; multiples of 16.
        box_rows: rows of one copy, at most 256; its columns are BOX_COLUMNS.
    """

    dtype: torch.dtype
    sizes: tuple[int, int, int, int, int]
    strides: tuple[int, int, int, int]
    box_rows: int


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether the copy engine can read [batch, heads, rows, width] in place.

    Rows must start at multiples of 16 bytes, and no dimension may be expanded (a stride of 0).
    """
    size = tensor.element_size()
    return tensor.data_ptr() % _ALIGN == 0 and all(
        length == 1 or (stride > 0 and stride * size % _ALIGN == 0)
        for length, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    )


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it that the copy engine can read."""
    if is_readable(tensor):
        return tensor
    *outer, width = tensor.shape
    padded = -(-width * tensor.element_size() // _ALIGN) * _ALIGN // tensor.element_size()
    copy = torch.empty((*outer, padded), dtype=tensor.dtype, device=tensor.device)[..., :width]
    return copy.copy_(tensor)


def map_shape(tensor: torch.Tensor, box_rows: int, step: int, *, ragged: bool) -> MapShape | None:
    """The map of a readable tensor's rows in steps.

    Args:
        tensor: [batch, heads, rows, width], 16-bit.
        box_rows: rows of one copy.
        step: rows r and r + step are neighbours in the map.
        ragged: of the residues below rows % step, which have one row more than the others; else
            every residue without that row.

    Returns:
        None where there is no such row.
    """
    batch, heads, length, width = tensor.shape
    rows, residues = (length // step + 1, length % step) if ragged else (length // step, step)
    if 0 in (rows, residues, batch, heads):
        return None
    size = tensor.element_size()
    by_batch, by_head, by_row = (stride * size for stride in tensor.stride()[:3])
    lengths = (rows, residues, heads, batch)
    strides = (step * by_row, by_row, by_head, by_batch)
    # The stride of a dimension of one element is never used, but the driver must take it.
    fitting = [_ALIGN if n == 1 else stride for n, stride in zip(lengths, strides, strict=True)]
    return MapShape(
        tensor.dtype,
        (width, *lengths),
        (fitting[0], fitting[1], fitting[2], fitting[3]),
        box_rows,
    )


def encode(address: int, shape: MapShape) -> bytes:
    """The map as the hardware reads it.

    Args:
        address: of the first element, a multiple of 16.
        shape: see `MapShape`.

    Raises:
        PortattnError: the driver refuses it.
    """
    # 64-byte aligned, as the driver demands.
    memory = ctypes.create_string_buffer(MAP_BYTES + 64)
    start = ctypes.addressof(memory) + -ctypes.addressof(memory) % 64
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(start),
        _DATA_TYPES[shape.dtype],
        _RANK,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * _RANK)(*shape.sizes),
        (ctypes.c_uint64 * (_RANK - 1))(*shape.strides),
        (ctypes.c_uint32 * _RANK)(BOX_COLUMNS, shape.box_rows, 1, 1, 1),
        (ctypes.c_uint32 * _RANK)(1, 1, 1, 1, 1),
        0,  # not interleaved
        _SWIZZLE_128B,
        _L2_PROMOTION_128B,
        0,  # outside is zero
    )
    check(status, f"encoding the tensor map of {shape}")
    return ctypes.string_at(start, MAP_BYTES)
