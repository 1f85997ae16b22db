"""Which key blocks each query block gathers, each of them once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import TensorProto

from portattn.export.random_blocks import drawn_blocks

if TYPE_CHECKING:
    from portattn.export.cover import Cover
    from portattn.export.emitter import Value
    from portattn.export.scores import Scorer


def block_columns(scorer: Scorer, cover: Cover, block_index: Value) -> Value:
    """The band around each block, the drawn blocks, and those that tables list.

    Args:
        scorer: of the body.
        cover: with a band, drawn blocks or tables.
        block_index: int64 [blocks]: positions of the query blocks, in blocks.

    Returns:
        int64 [blocks, columns]: key blocks, which may lie outside the keys; -1: none, or one that
        an earlier column names.
    """
    emitter, seqlen_k = scorer.emitter, scorer.inputs.key.dim(2)
    columns = [block_index + step for step in range(cover.low, cover.high + 1)]
    for operands in sorted(cover.random):
        for drawn in drawn_blocks(emitter, block_index, seqlen_k, operands):
            columns.append(_unless_taken(drawn, columns))
    parts = [column.unsqueeze(1) for column in columns]
    for slot, degree in sorted(cover.tables):
        listed = _listed_blocks(scorer, block_index, slot, degree)
        if parts:
            earlier = emitter.concat(parts, 1).unsqueeze(1)
            taken = listed.unsqueeze(2).equals(earlier).cast(TensorProto.INT32)
            taken = taken.reduce("ReduceMax").reshape(-1, degree).cast(TensorProto.BOOL)
            listed = emitter.where(taken, -1, listed)
        parts.append(listed)
    return emitter.concat(parts, 1)


def _unless_taken(drawn: Value, columns: list[Value]) -> Value:
    """The drawn block, or -1 if an earlier column has it."""
    taken = drawn.equals(columns[0]) if columns else drawn < 0
    for column in columns[1:]:
        taken = taken | drawn.equals(column)
    return drawn.emitter.where(taken, -1, drawn)


def _listed_blocks(scorer: Scorer, block_index: Value, slot: int, degree: int) -> Value:
    """[blocks, degree]: key blocks that a table's row keeps for any head or batch; -1: none."""
    emitter = scorer.emitter
    data, shape = scorer.writer.data(slot)
    num_q, num_k = data.dim(len(shape) - 2), data.dim(len(shape) - 1)
    kept = data.cast(TensorProto.FLOAT).reshape(-1, num_q, num_k).reduce("ReduceMax", 0)
    # Blocks without a real row read any row of the table; the predicate stops real ones outside.
    rows = block_index.maximum(0).minimum(num_q - 1)
    kept = kept.reshape(num_q, num_k).gather(rows, 0)
    values, blocks = emitter.ops(
        "TopK", kept, emitter.constant([degree]), count=2, axis=1, sorted=0
    )
    return emitter.where(values > 0.5, blocks, -1)
