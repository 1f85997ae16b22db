"""Mask programs in standard ONNX ops: a bool tensor over query and key positions.

Every primitive of docs/formats.md is written once here, over index tensors that broadcast, so that
the dense and the gathered bodies (and their global pieces) evaluate the same predicate.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from portattn.errors import ExportError
from portattn.export.document_ids import document_ids
from portattn.export.expression import NO_LOWER, NO_UPPER, Expression, Opcode
from portattn.export.random_blocks import drawn_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portattn.export.emitter import Emitter, Value

# Past the end of every table: a position outside becomes an index error instead of a wrong entry.
_OUTSIDE = 1 << 40


@dataclasses.dataclass(frozen=True, slots=True)
class Coordinates:
    """Where a score tensor's entries stand. All int64 and broadcastable to its last ``rank`` axes.

    Attributes:
        query, key: positions. Entries outside the lengths may hold anything; the caller masks
            them.
        difference: key - query; may have a smaller shape than both together (bands in blocks).
        rank: number of trailing axes; positions that depend on the batch have [batch, 1] in front.
        seqlen_k: [1]; the number of keys.
        query_per_batch: the query positions have batch and head axes in front.
        table_query, table_key: the positions moved inside the lengths, for reading tables, where
            entries outside the lengths exist.
    """

    query: Value
    key: Value
    difference: Value
    rank: int
    seqlen_k: Value
    query_per_batch: bool = False
    table_query: Value | None = None
    table_key: Value | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class MaskData:
    """One data tensor of the mask: its value, and its shape with None where it is dynamic."""

    value: Value
    shape: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Predicate:
    """A bool tensor over the coordinates.

    Attributes:
        value: None keeps everything. Broadcastable to [batch, num_heads, ...] if
            ``per_batch_head``.
        per_batch_head: the value has batch and head axes in front (each may be 1).
        per_head: its head axis has length num_heads.
    """

    value: Value | None
    per_batch_head: bool = False
    per_head: bool = False


class PredicateWriter:
    """Writes the predicate of an expression.

    Args:
        emitter: receives the nodes.
        data: the mask's data tensors, by slot.
    """

    def __init__(self, emitter: Emitter, data: Sequence[MaskData]) -> None:
        self._emitter = emitter
        self._data = data
        self._members: dict[int, Value] = {}
        self._document_ids: dict[int, Value] = {}

    def write(self, expression: Expression, at: Coordinates) -> Predicate:
        """The predicate of an expression at these positions."""
        match expression.opcode:
            case Opcode.ALL:
                return Predicate(None)
            case Opcode.AND:
                return self._all([self.write(child, at) for child in expression.children])
            case Opcode.OR:
                return self._any([self.write(child, at) for child in expression.children])
            case Opcode.NOT:
                inner = self.write(expression.children[0], at)
                inner = (
                    inner if inner.value is not None else Predicate(self._emitter.constant(True))
                )
                assert inner.value is not None
                return dataclasses.replace(inner, value=~inner.value)
            case Opcode.PER_HEAD | Opcode.PER_BATCH:
                return self._per_index(expression, at)
            case _:
                return self._primitive(expression, at)

    def both(self, keep: Predicate, value: Value, *, per_batch_head: bool) -> Predicate:
        """The predicate and one more condition."""
        return self._all([keep, Predicate(value, per_batch_head)])

    def data(self, slot: int) -> tuple[Value, tuple[int | None, ...]]:
        """A data tensor and its shape."""
        return self._data[slot].value, self._data[slot].shape

    def positions(self, slot: int) -> Value:
        """int64: the data of a set of positions, or of lengths."""
        return self._data[slot].value.cast(TensorProto.INT64)

    def _all(self, parts: Sequence[Predicate]) -> Predicate:
        kept = [part for part in parts if part.value is not None]
        return self._fold("And", kept) if kept else Predicate(None)

    def _any(self, parts: Sequence[Predicate]) -> Predicate:
        if not parts:
            return Predicate(self._emitter.constant(False))
        if any(part.value is None for part in parts):
            return Predicate(None)
        return self._fold("Or", parts)

    def _fold(self, op_type: str, parts: Sequence[Predicate]) -> Predicate:
        value = parts[0].value
        for part in parts[1:]:
            value = self._emitter.op(op_type, value, part.value)
        return Predicate(
            value,
            any(part.per_batch_head for part in parts),
            any(part.per_head for part in parts),
        )

    def _per_index(self, expression: Expression, at: Coordinates) -> Predicate:
        # Equal children share one evaluation; each is kept at its heads (or batches) only.
        per_head = expression.opcode is Opcode.PER_HEAD
        count = len(expression.children)
        shape = [1, count] if per_head else [count, 1]
        parts = []
        for child in dict.fromkeys(expression.children):
            chosen = np.array([other == child for other in expression.children])
            here = self._emitter.constant(chosen.reshape(shape + [1] * at.rank))
            inner = self.write(child, at)
            value = here if inner.value is None else here & inner.value
            parts.append(Predicate(value, True, per_head or inner.per_head))
        return self._any(parts)

    def _primitive(self, expression: Expression, at: Coordinates) -> Predicate:
        operands = expression.operands
        writers = {
            Opcode.KEY_SET: lambda: Predicate(self.is_member(operands[0], at.key)),
            Opcode.QUERY_SET: lambda: Predicate(self.is_member(operands[0], at.query)),
            Opcode.RANDOM_BLOCKS: lambda: self._random_blocks(operands, at),
            Opcode.BLOCK_TABLE: lambda: self._block_table(operands, at),
            Opcode.SEGMENTS: lambda: self._segments(operands, at),
            Opcode.KEY_LENGTHS: lambda: self._key_lengths(operands, at),
            Opcode.DOCUMENTS: lambda: self._documents(operands[0], at),
        }
        writer = writers.get(expression.opcode)
        return self._arithmetic(expression, at) if writer is None else writer()

    def _arithmetic(self, expression: Expression, at: Coordinates) -> Predicate:
        """Primitives that are an interval of a number made from the positions."""
        operands = expression.operands
        match expression.opcode:
            case Opcode.BAND:
                return self._interval(at.difference, operands[0], operands[1])
            case Opcode.KEY_RANGE:
                return self._interval(at.key, operands[0], _inclusive(operands[1]))
            case Opcode.QUERY_RANGE:
                return self._interval(at.query, operands[0], _inclusive(operands[1]))
            case Opcode.KEY_MODULO:
                return self._interval(at.key % operands[0], operands[1], operands[2] - 1)
            case Opcode.DIFF_MODULO:
                residue = (-at.difference) % operands[0]
                return self._interval(residue, operands[1], operands[2] - 1)
            case _:
                size, low, high = operands
                return self._interval(at.key // size - at.query // size, low, high)

    def _key_lengths(self, operands: Sequence[int], at: Coordinates) -> Predicate:
        lengths = self.positions(operands[0]).unsqueeze(*range(1, at.rank + 2))
        return Predicate(at.key < lengths, per_batch_head=True)

    def _interval(self, value: Value, low: int, high: int) -> Predicate:
        parts = []
        if low > NO_LOWER:
            parts.append(Predicate(value >= low))
        if high < NO_UPPER - 1:
            parts.append(Predicate(value <= high))
        return self._all(parts)

    def is_member(self, slot: int, position: Value) -> Value:
        """bool, the position's shape: is it in the data's positions?"""
        emitter = self._emitter
        if slot not in self._members:
            members = self.positions(slot)
            members = emitter.op("Compress", members, members >= 0, axis=0)
            # One entry more than the largest member: it stays False and stands for "outside".
            last = emitter.concat([members, emitter.constant([-1])], 0)
            size = emitter.op("ReduceMax", last, keepdims=1) + 2
            empty = emitter.op("Expand", emitter.constant([0]), size)
            ones = emitter.op("Expand", emitter.constant([1]), members.dim(0))
            table = emitter.op("ScatterElements", empty, members, ones, axis=0)
            self._members[slot] = table.cast(TensorProto.BOOL)
        table = self._members[slot]
        outside = table.dim(0) - 1
        index = emitter.where(position < 0, outside, position.minimum(outside))
        return table.gather(index, 0)

    def _segments(self, operands: Sequence[int], at: Coordinates) -> Predicate:
        sides = []
        by_batch = False
        query, key = at.table_query or at.query, at.table_key or at.key
        for slot, position in zip(operands, (query, key), strict=True):
            index = self._inside(position)
            if len(self._data[slot].shape) == 1:
                sides.append(self._data[slot].value.gather(index, 0))
                continue
            by_batch = True
            if position is query and at.query_per_batch:
                index = index.unsqueeze(-1)
                ids = self._emitter.op("GatherND", self._data[slot].value, index, batch_dims=1)
            else:
                ids = self._data[slot].value.gather(index, 1).unsqueeze(1)
            sides.append(ids)
        return Predicate(sides[0].equals(sides[1]), per_batch_head=by_batch)

    def _documents(self, slot: int, at: Coordinates) -> Predicate:
        if slot not in self._document_ids:
            self._document_ids[slot] = document_ids(self._emitter, self.positions(slot))
        ids, sides = self._document_ids[slot], (at.table_query or at.query, at.table_key or at.key)
        query, key = (ids.gather(self._inside(side), 0) for side in sides)
        return Predicate(query.equals(key))

    def _block_table(self, operands: Sequence[int], at: Coordinates) -> Predicate:
        slot, block_q, block_k = operands
        table, shape = self._data[slot].value, self._data[slot].shape
        num_q, num_k = table.dim(len(shape) - 2), table.dim(len(shape) - 1)
        column = self._inside(at.table_key or at.key) // block_k
        row = self._inside(at.table_query or at.query) // block_q
        column = self._emitter.where(column >= num_k, _OUTSIDE, column)
        index = row * num_k + column
        if len(shape) == 2:
            return Predicate(table.reshape(num_q * num_k).gather(index, 0))
        if len(shape) == 4 and at.query_per_batch:
            raise ExportError(
                "a block table per batch cannot be exported together with kv_lengths: its rows "
                "would "
                "depend on the batch twice. Give a table [num_heads, nq, nk], or a padding() mask "
                "instead of kv_lengths"
            )
        if len(shape) == 3 and at.query_per_batch:
            flat = table.reshape(table.dim(0), num_q * num_k)
            index = self._emitter.op("Squeeze", index, self._emitter.constant([1]))
            kept = flat.gather(index, 1).transpose(1, 0, 2, 3)
            return Predicate(kept, per_batch_head=True, per_head=True)
        heads = shape[-3]
        if heads is None:
            raise ExportError(
                f"a block table has a dynamic number of heads (shape {shape}); give it a fixed one"
            )
        flat = table.reshape(*([1] if len(shape) == 3 else [table.dim(0)]), heads, num_q * num_k)
        return Predicate(flat.gather(index, 2), per_batch_head=True, per_head=heads != 1)

    def _random_blocks(self, operands: Sequence[int], at: Coordinates) -> Predicate:
        drawn = drawn_blocks(self._emitter, at.query // operands[0], at.seqlen_k, operands)
        column = at.key // operands[0]
        return self._any([Predicate(block.equals(column)) for block in drawn])

    def _inside(self, position: Value) -> Value:
        """As an index whose negatives are errors: Gather would count them from the end."""
        return self._emitter.where(position < 0, _OUTSIDE, position)


def _inclusive(bound: int) -> int:
    """The last value below an exclusive upper bound."""
    return bound if bound >= NO_UPPER else bound - 1
