"""The equations of attention, in plain differentiable torch operations: the law.

For query row r at position i, and key position j (the mask keeps (i, j) or not):

    s_j = softcap(scale * q . k_j) - slope * |i - j| + bias_j,  softcap(x) = c tanh(x / c)
    s_j = -inf where the mask does not keep (i, j)
    LSE = log(sum_j exp(s_j) + exp(sink)),   O = sum_j exp(s_j - LSE) v_j

The sink is one more logit that has no value (Xiao et al. 2023, arXiv:2309.17453, section 3; as in
gpt-oss), so that O and LSE equal O sigmoid(LSE - sink) and logaddexp(LSE, sink) of the row
without it. A row that keeps nothing has O = 0, LSE = -inf (or the sink) and gradients 0.
"""

from __future__ import annotations

import torch


def attention_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    keep: torch.Tensor | None,
    distance: torch.Tensor,
    scale: float,
    softcap: float,
    slopes: torch.Tensor | None,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of some query rows of one batch element over all its keys.

    Matrix products are computed and rounded in the query's dtype, softmax statistics in float32
    or wider.

    Args:
        query: [num_heads, rows, head_dim].
        key: [num_kv_heads, seqlen_k, head_dim]; seqlen_k >= 1.
        value: [num_kv_heads, seqlen_k, head_dim_v].
        keep: bool [1 or num_heads, rows, seqlen_k]; None keeps all.
        distance: |i - j|, [rows, seqlen_k].
        scale: softmax scale.
        softcap: c; 0 means none.
        slopes: [num_heads] or None.
        bias: broadcastable to [num_heads, rows, seqlen_k], or None.
        sinks: [num_heads] or None.

    Returns:
        The output [num_heads, rows, head_dim_v] in the query's dtype, and the LSE [num_heads,
        rows] in float32 or wider.
    """
    num_heads, rows, head_dim = query.shape
    num_kv_heads, seqlen_k, head_dim_v = value.shape
    # The query heads of one KV head are rows of one product: keys are never repeated in memory.
    scores = query.reshape(num_kv_heads, -1, head_dim) @ key.mT
    scores = scale * scores.reshape(num_heads, rows, seqlen_k)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores - slopes[:, None, None].to(scores.dtype) * distance.to(scores.dtype)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))

    largest = scores.detach().amax(-1, keepdim=True)
    if sinks is not None:
        sink = sinks[:, None, None].to(scores.dtype)
        largest = torch.maximum(largest, sink.detach())
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - largest)

    # A sum of 0 becomes 1 before it divides or meets the logarithm: there the gradients are 0 and
    # not NaN.
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (largest + torch.log(total)).masked_fill(empty, -torch.inf)
    probabilities = (weights / total).to(query.dtype).reshape(num_kv_heads, -1, seqlen_k)
    output = (probabilities @ value).reshape(num_heads, rows, head_dim_v)
    return output, lse.squeeze(-1)
