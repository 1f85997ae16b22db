"""The counter-based hash and draw of RANDOM_BLOCKS (docs/formats.md) in standard ONNX ops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portattn.export.emitter import Emitter, Value

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def _wrapped(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= _MASK
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix_int(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def _mix(emitter: Emitter, value: Value) -> Value:
    """mix() of int64 bit patterns: products wrap in int64, shifts go through uint64."""

    def folded(bits: Value, shift: int) -> Value:
        amount = emitter.constant(shift, np.uint64)
        shifted = emitter.op("BitShift", bits.cast(TensorProto.UINT64), amount, direction="RIGHT")
        return emitter.op("BitwiseXor", bits, shifted.cast(TensorProto.INT64))

    value = folded(value, 30) * _wrapped(_FIRST)
    value = folded(value, 27) * _wrapped(_SECOND)
    return folded(value, 31)


def drawn_blocks(
    emitter: Emitter, query_block: Value, seqlen_k: Value, operands: Sequence[int]
) -> list[Value]:
    """The key blocks drawn for each query block, by Floyd's algorithm.

    Args:
        emitter: receives the nodes.
        query_block: int64, any shape: i // n.
        seqlen_k: int64 [1].
        operands: n, count, seed.

    Returns:
        ``count`` int64 tensors of query_block's shape; -1 where there are fewer blocks than
        ``count``.
    """
    size, count, seed = operands
    num_blocks = (seqlen_k + (size - 1)) // size
    row_hash = _mix(emitter, query_block + _wrapped(_mix_int(seed + _GOLDEN)))
    drawn: list[Value] = []
    for step in range(count):
        last = num_blocks - (count - step)
        hashed = _mix(emitter, row_hash + last).cast(TensorProto.UINT64)
        # Steps before the first block (last < 0) draw from a modulus of 1 and are thrown away
        # below.
        modulus = (last.maximum(0) + 1).cast(TensorProto.UINT64)
        block = (hashed % modulus).cast(TensorProto.INT64)
        if drawn:
            taken = drawn[0].equals(block)
            for earlier in drawn[1:]:
                taken = taken | earlier.equals(block)
            block = emitter.where(taken, last, block)
        drawn.append(emitter.where(last < 0, -1, block))
    return drawn
