"""What the dense and the gathered bodies share: score terms, the mask, softmax and its empty rows.

    s = softcap(scale * q . k) - slope * |i - j| + bias, -inf where not kept; softcap(x) = c tanh(x
    / c) O = softmax(s) v; with a sink, exp(sink) joins the denominator. A row that keeps nothing
    gives 0.

Scores have shape [batch, num_kv_heads, group, ...]: query heads of one KV head share its keys.
Everything is float32, whatever the model's dtype. Softcap is written out: the order of softcap and
mask in ONNX's Attention changed between versions.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portattn.export.emitter import Emitter, Value
    from portattn.export.expression import Expression
    from portattn.export.predicates import Coordinates, Predicate, PredicateWriter

NEGATIVE_INFINITY = float("-inf")


@dataclasses.dataclass(frozen=True, slots=True)
class BodyInputs:
    """The inputs of one body, in float32 and int64.

    Attributes:
        query: [batch, num_heads, seqlen_q, head_dim], already scaled.
        key: [batch, num_kv_heads, seqlen_k, head_dim].
        value: [batch, num_kv_heads, seqlen_k, head_dim_v].
        q_offset: [1]; with kv_lengths [batch, 1, 1, 1].
        kv_lengths: [batch, 1, 1, 1], or None.
        alibi_slopes: [num_heads] or [batch, num_heads], or None; alibi_rank says which.
        bias: 4-D, broadcastable, or None.
        sinks: [num_heads], or None.
    """

    query: Value
    key: Value
    value: Value
    q_offset: Value
    kv_lengths: Value | None
    alibi_slopes: Value | None
    alibi_rank: int
    bias: Value | None
    sinks: Value | None
    softcap: float
    return_lse: bool

    @property
    def group(self) -> tuple[Value, Value]:
        """[1], [1]: KV heads, and query heads of each."""
        num_kv_heads = self.key.dim(1)
        return num_kv_heads, self.query.dim(1)._binary("Div", num_kv_heads)


@dataclasses.dataclass(frozen=True, slots=True)
class Weights:
    """Softmax of some scores.

    Attributes:
        value: [..., keys]; not yet divided by ``total`` if that is given.
        total: [..., 1], or None.
        nonempty: bool, broadcastable to [..., 1]: the row keeps something; None if every row does.
        lse: [..., 1], or None if not asked for.
    """

    value: Value
    total: Value | None
    nonempty: Value | None
    lse: Value | None

    def finish(self, output: Value) -> Value:
        """Normalise weights @ value, and give empty rows 0."""
        if self.total is not None:
            output = output / self.total
        if self.nonempty is not None:
            output = output.emitter.where(self.nonempty, output, 0.0)
        return output


class Scorer:
    """Writes scores and their softmax for one body."""

    def __init__(
        self, emitter: Emitter, inputs: BodyInputs, expression: Expression, writer: PredicateWriter
    ) -> None:
        self.emitter = emitter
        self.inputs = inputs
        self.expression = expression
        self.writer = writer

    def predicate(self, at: Coordinates) -> Predicate:
        """The mask at these coordinates."""
        return self.writer.write(self.expression, at)

    def scores(
        self, products: Value, at: Coordinates, keep: Predicate, rows: Value
    ) -> tuple[Value, Value | None]:
        """Score terms and mask added to scaled products.

        Args:
            products: scale * q . k, [batch, num_kv_heads, group, ...] with at.rank axes at the
                end.
            at: where they stand.
            keep: which of them count.
            rows: int64, query row index of each entry (for the bias); shaped like at.query.

        Returns:
            The scores, and bool "the row keeps something" (broadcastable to [..., 1]; None: every
            row).
        """
        inputs = self.inputs
        if inputs.softcap:
            capped = self.emitter.op("Tanh", products * (1.0 / inputs.softcap))
            products = capped * inputs.softcap
        if inputs.alibi_slopes is not None:
            distance = self.emitter.op("Abs", at.difference).cast(TensorProto.FLOAT)
            if at.query_per_batch:
                distance = distance.unsqueeze(2)
            products = products - self._slopes(at.rank) * distance
        if inputs.bias is not None:
            products = products + self._bias(inputs.bias, at, rows)
        if keep.value is None:
            return products, None
        mask = self._grouped(keep, at.rank)
        # Adding is the cheaper pass: the mask is small beside the scores and broadcasts.
        additive = self.emitter.where(mask, 0.0, NEGATIVE_INFINITY)
        nonempty = additive.reduce("ReduceMax") > NEGATIVE_INFINITY
        return products + additive, nonempty

    def softmax(self, scores: Value, nonempty: Sequence[Value | None], rank: int) -> Weights:
        """Softmax over the last axis.

        Args:
            scores: [batch, num_kv_heads, group, ..., keys].
            nonempty: of each piece that the scores were put together from.
            rank: number of axes after the group.
        """
        inputs = self.inputs
        if inputs.sinks is not None or inputs.return_lse:
            return self._explicit_softmax(scores, rank)
        some: Value | None = None
        if inputs.bias is not None:
            # -inf in the bias may empty a row; a NaN is not empty.
            some = ~scores.reduce("ReduceMax").equals(NEGATIVE_INFINITY)
        elif all(piece is not None for piece in nonempty):
            for piece in nonempty:
                assert piece is not None
                some = piece if some is None else some | piece
        return Weights(self.emitter.op("Softmax", scores, axis=-1), None, some, None)

    def _explicit_softmax(self, scores: Value, rank: int) -> Weights:
        emitter, sinks = self.emitter, self.inputs.sinks
        largest = scores.reduce("ReduceMax")
        sink = None
        if sinks is not None:
            num_kv_heads, group = self.inputs.group
            sink = sinks.reshape(1, num_kv_heads, group, *[1] * rank)
            largest = largest.maximum(sink)
        largest = emitter.where(largest.equals(NEGATIVE_INFINITY), 0.0, largest)
        weights = emitter.op("Exp", scores - largest)
        total = weights.reduce("ReduceSum")
        if sink is not None:
            total = total + emitter.op("Exp", sink - largest)
        # A sum of 0 becomes 1 before it divides or meets the logarithm.
        empty = total.equals(0.0)
        total = emitter.where(empty, 1.0, total)
        lse = None
        if self.inputs.return_lse:
            lse = emitter.where(empty, NEGATIVE_INFINITY, largest + emitter.op("Log", total))
        return Weights(weights, total, None, lse)

    def _grouped(self, keep: Predicate, rank: int) -> Value:
        """A predicate's value with its head axis split into [num_kv_heads, group]."""
        assert keep.value is not None
        if not keep.per_batch_head:
            return keep.value
        if not keep.per_head:
            return keep.value.unsqueeze(2)
        dims = [keep.value.dim(2 + axis) for axis in range(rank)]
        return keep.value.reshape(keep.value.dim(0), *self.inputs.group, *dims)

    def _slopes(self, rank: int) -> Value:
        slopes = self.inputs.alibi_slopes
        assert slopes is not None
        batch = slopes.dim(0) if self.inputs.alibi_rank == 2 else 1
        return slopes.reshape(batch, *self.inputs.group, *[1] * rank)

    def _bias(self, bias: Value, at: Coordinates, rows: Value) -> Value:
        """bias[b, h, row, key]; a dimension of length 1 is read with stride 0."""
        batch, heads, length_q, length_k = (bias.dim(axis) for axis in range(4))
        row_stride = length_k * (length_q > 1).cast(TensorProto.INT64)
        key_stride = (length_k > 1).cast(TensorProto.INT64)
        row = rows.maximum(0).minimum(length_q - 1)
        key = at.key.maximum(0).minimum(at.seqlen_k - 1)
        index = row * row_stride + key * key_stride
        values = bias.reshape(batch, heads, length_q * length_k).gather(index, 2)
        # The heads axis is 1 or all of them: one group of 1, or KV heads times their group.
        num_kv_heads, group = self.inputs.group
        many = heads > 1
        head_axes = [self.emitter.where(many, size, heads) for size in (num_kv_heads, group)]
        dims = [values.dim(2 + axis) for axis in range(at.rank)]
        return values.reshape(batch, *head_axes, *dims)


def floats(tensor: Value) -> Value:
    """The tensor in float32."""
    return tensor.cast(TensorProto.FLOAT)


def scaled(query: Value, scale: float) -> Value:
    """Query * scale in float32."""
    return floats(query) * query.emitter.constant(scale, np.float32)
