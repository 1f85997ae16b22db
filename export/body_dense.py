"""The body that computes every score: masks without structure, and a few rows of others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from portattn.export.predicates import Coordinates

if TYPE_CHECKING:
    from portattn.export.emitter import Value
    from portattn.export.scores import Scorer


def dense_rows(
    scorer: Scorer, query: Value, rows: Value, positions: Value
) -> tuple[Value, Value | None]:
    """Attention of some query rows over all keys.

    Args:
        scorer: the body's score terms.
        query: [batch, num_heads, rows, head_dim], scaled.
        rows: int64 [rows, 1]: row indices.
        positions: int64 [rows, 1], or [batch, 1, rows, 1] with kv_lengths: key positions of the
            rows.

    Returns:
        The output [batch, num_heads, rows, head_dim_v], and the LSE [batch, num_heads, rows] or
        None.
    """
    inputs, emitter = scorer.inputs, scorer.emitter
    batch, num_heads, count, head_dim = (query.dim(axis) for axis in range(4))
    num_kv_heads, group = inputs.group
    seqlen_k = inputs.key.dim(2)
    keys = emitter.range(seqlen_k).unsqueeze(0)
    at = Coordinates(
        query=positions,
        key=keys,
        difference=keys - positions,
        rank=2,
        seqlen_k=seqlen_k,
        query_per_batch=inputs.kv_lengths is not None,
    )
    keep = scorer.predicate(at)
    if inputs.kv_lengths is not None:
        keep = scorer.writer.both(keep, keys < inputs.kv_lengths, per_batch_head=True)

    # The rows of a group go side by side, so that one product serves them and no key is repeated.
    stacked = query.reshape(batch, num_kv_heads, group * count, head_dim)
    products = stacked @ inputs.key.transpose(0, 1, 3, 2)
    products = products.reshape(batch, num_kv_heads, group, count, seqlen_k)
    scores, nonempty = scorer.scores(products, at, keep, rows)
    weights = scorer.softmax(scores, [nonempty], rank=2)
    flat = weights.value.reshape(batch, num_kv_heads, group * count, seqlen_k)
    output = (flat @ inputs.value).reshape(batch, num_kv_heads, group, count, inputs.value.dim(3))
    output = weights.finish(output).reshape(batch, num_heads, count, inputs.value.dim(3))
    lse = None if weights.lse is None else weights.lse.reshape(batch, num_heads, count)
    return output, lse


def dense_body(scorer: Scorer) -> tuple[Value, Value | None]:
    """Attention of all query rows over all keys."""
    rows = scorer.emitter.range(scorer.inputs.query.dim(2)).unsqueeze(1)
    return dense_rows(scorer, scorer.inputs.query, rows, rows + scorer.inputs.q_offset)
