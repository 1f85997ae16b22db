"""Tensor maps as emulator_sm90.hpp reads them, in place of cuTensorMapEncodeTiled's."""

import struct

import torch

from portattn.backends.cupy.tensor_map import BOX_COLUMNS, MAP_BYTES, MapShape, map_shape


def encode(address: int, shape: MapShape) -> bytes:
    """An emulator::Tensor, with the driver's checks.

    Args:
        address: of the first element.
        shape: see `MapShape`.
    """
    assert address % 16 == 0
    assert all(0 < size < 2**32 for size in shape.sizes)
    assert all(0 < stride < 2**40 and stride % 16 == 0 for stride in shape.strides)
    assert 1 <= shape.box_rows <= 256
    assert BOX_COLUMNS == 64
    packed = struct.pack("=Q5II4Q", address, *shape.sizes, shape.box_rows, *shape.strides)
    return packed.ljust(MAP_BYTES, b"\0")


def matrices(tensor: torch.Tensor, box_rows: int) -> bytes:
    """Of a [batch, rows, columns] tensor: coordinates are column, row, 0, 0, batch."""
    shape = map_shape(tensor[:, None], box_rows, 1, ragged=False)
    assert shape is not None
    return encode(tensor.data_ptr(), shape)
