"""`scaled_dot_product_attention` with torch's own signature and rules, computed by portattn."""

from __future__ import annotations

import torch

from portattn import masks
from portattn.api import attention
from portattn.errors import MaskError, ShapeError, UnsupportedError


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | masks.Mask | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention with SDPA's rules: causal is aligned top-left, a fully masked row gives 0.

    Args:
        query: [..., num_heads, seqlen_q, head_dim]; 3-D tensors are [batch, seqlen, head_dim]
            with one head, as in SDPA; leading dimensions of 5-D and larger tensors are batch.
        key: [..., num_kv_heads, seqlen_k, head_dim].
        value: [..., num_kv_heads, seqlen_k, head_dim_v].
        attn_mask: a bool tensor (True attends) or one of the query's dtype that is added to the
            scores, broadcastable to [..., num_heads, seqlen_q, seqlen_k]; a portattn mask is
            taken too, its query positions from 0. A bool tensor is copied to the host and
            planned: a mask that is used again is cheaper made once, with `portattn.masks.dense`.
                While torch traces, it is added as 0 and -inf instead.
        dropout_p: must be 0.
        is_causal: keep j <= i, with query row r at position r; not together with attn_mask, as in
            SDPA.
        scale: default head_dim ** -0.5.
        enable_gqa: allow more query heads than KV heads.

    Returns:
        [..., num_heads, seqlen_q, head_dim_v].

    Raises:
        UnsupportedError: dropout_p is not 0.
        MaskError: attn_mask together with is_causal.
        ShapeError: as `portattn.attention`.
    """
    if dropout_p != 0.0:
        raise UnsupportedError(
            f"dropout_p is {dropout_p}; attention dropout is not computed: pass dropout_p=0.0 (in "
            "a model: "
            "attention_dropout=0 or model.eval())"
        )
    if attn_mask is not None and is_causal:
        raise MaskError(
            "is_causal is True beside attn_mask; SDPA allows one of them: pass portattn masks, "
            "which combine "
            "with &, or put the causal triangle into attn_mask"
        )
    batch_shape = query.shape[:-3]
    query4, key4, value4 = (
        _four_dimensions(name, tensor)
        for name, tensor in (("query", query), ("key", key), ("value", value))
    )
    mask, bias = None, None
    if isinstance(attn_mask, masks.Mask):
        mask = attn_mask
    elif attn_mask is not None:
        full = (*query4.shape[:3], key4.shape[2])
        mask, bias = _mask_or_bias(attn_mask, batch_shape, query.ndim, full, query.dtype)
    output = attention(
        query4,
        key4,
        value4,
        mask,
        is_causal=is_causal,
        q_offset="start",
        scale=scale,
        enable_gqa=enable_gqa,
        bias=bias,
    )
    if query.ndim == 3:
        return output.squeeze(1)
    return output if query.ndim == 4 else output.reshape(*batch_shape, *output.shape[1:])


def _four_dimensions(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """[batch, heads, seqlen, dim] from SDPA's 3-D and more."""
    if tensor.ndim < 3:
        raise ShapeError(
            f"{name} has shape {list(tensor.shape)}; it must be [..., heads, seqlen, dim] or "
            "[batch, seqlen, "
            "dim]: add dimensions"
        )
    if tensor.ndim == 3:
        return tensor.unsqueeze(1)
    return tensor if tensor.ndim == 4 else tensor.flatten(0, -4)


def _mask_or_bias(
    attn_mask: torch.Tensor,
    batch_shape: torch.Size,
    ndim: int,
    full: tuple[int, ...],
    dtype: torch.dtype,
) -> tuple[masks.Mask | None, torch.Tensor | None]:
    """A tensor attn_mask as (mask, None) or (None, bias); full is the shape of all scores."""
    wanted = (full[0], *full[2:]) if ndim == 3 else (*batch_shape, *full[1:])
    fits = attn_mask.ndim <= len(wanted) and all(
        size in (1, limit)
        for size, limit in zip(reversed(attn_mask.shape), reversed(wanted), strict=False)
    )
    if not fits:
        raise ShapeError(
            f"attn_mask has shape {list(attn_mask.shape)}; it must broadcast to {list(wanted)}: "
            "insert "
            "dimensions of size 1"
        )
    if ndim == 3 and attn_mask.ndim == 3:
        attn_mask = attn_mask.unsqueeze(1)
    elif attn_mask.ndim > 4:
        attn_mask = attn_mask.expand(*batch_shape, *attn_mask.shape[-3:]).flatten(0, -4)
    if attn_mask.dtype != torch.bool:
        return None, attn_mask
    if torch.compiler.is_compiling():
        # A traced tensor has no values to plan from.
        return None, torch.zeros_like(attn_mask, dtype=dtype).masked_fill(~attn_mask, -torch.inf)
    attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.ndim) + attn_mask.shape)
    table = attn_mask.expand(*attn_mask.shape[:2], *full[2:])
    if table.shape[0] > 1:
        return masks.dense(table), None
    return masks.dense(table[0] if table.shape[1] > 1 else table[0, 0]), None
