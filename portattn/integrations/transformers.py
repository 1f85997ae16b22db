"""portattn as an attention of Hugging Face transformers.

After ``portattn.integrations.transformers.register()``, models load with
``attn_implementation="portattn"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from portattn.api import attention
from portattn.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "portattn"
Extra: TypeAlias = Any  # whatever else transformers passes on


def register() -> None:
    """Make ``attn_implementation="portattn"`` known; calling it again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    cache: object = None,
    **kwargs: Extra,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls in every attention layer.

    Args:
        module: the layer; its ``is_causal`` counts where the argument is None.
        query: [batch, num_heads, seqlen_q, head_dim].
        key: [batch, num_kv_heads, seqlen_k, head_dim].
        value: [batch, num_kv_heads, seqlen_k, head_dim_v].
        attention_mask: bool (True attends) or floating (added), broadcastable to [batch,
            num_heads, seqlen_q, seqlen_k], from `attention_mask` below or sdpa_mask; then nothing
            else masks.
        dropout: must be 0.
        scaling: default head_dim ** -0.5.
        is_causal: used where attention_mask is None: query row r attends to keys <= r.
        position_bias: added to the scores; [1 or batch, num_heads, seqlen_q, seqlen_k].
        cache: a paged cache is refused.
        **kwargs: ``softcap`` and ``s_aux`` (sinks) are used; what does not change attention is
            ignored.

    Returns:
        The output [batch, seqlen_q, num_heads, head_dim_v], and None (no attention weights).

    Raises:
        UnsupportedError: dropout, or a paged cache.
    """
    if dropout != 0.0:
        raise UnsupportedError(
            f"dropout is {dropout}; attention dropout is not computed: set attention_dropout=0 in "
            "the model's "
            "config, or call model.eval()"
        )
    if cache is not None:
        raise UnsupportedError(
            f"cache is a {type(cache).__name__}; paged caches are not supported: use another "
            "cache, or "
            'attn_implementation="sdpa"'
        )
    flag = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # Without a mask transformers means what its SDPA layer does: causal aligned top-left, one
    # query sees all.
    causal = attention_mask is None and bool(flag) and query.shape[2] > 1
    output = attention(
        query,
        key,
        value,
        is_causal=causal,
        q_offset="start",
        scale=scaling,
        enable_gqa=True,
        softcap=kwargs.get("softcap"),
        bias=_bias(attention_mask, position_bias, query),
        sinks=kwargs.get("s_aux"),
    )
    return output.transpose(1, 2).contiguous(), None


def _bias(
    mask: torch.Tensor | None, position_bias: torch.Tensor | None, query: torch.Tensor
) -> torch.Tensor | None:
    """Mask and position bias as one tensor to add to the scores."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    elif mask is not None:
        mask = mask.to(query.dtype)
    if position_bias is None:
        return mask
    position_bias = position_bias.to(query.dtype)
    return position_bias if mask is None else position_bias + mask


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = bidirectional_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Extra,
) -> torch.Tensor | None:
    """The mask that transformers hands to every layer of a model; made once for a forward pass.

    Padding of a model that looks both ways is [batch, 1, 1, seqlen_k], not expanded over the
    queries; all else is as transformers' sdpa_mask gives it.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function: as in sdpa_mask.
        attention_mask: [batch, seqlen], true at tokens that are no padding.
        allow_is_bidirectional_skip: None may be returned where nothing is masked.
        **kwargs: for sdpa_mask.
    """
    if (
        mask_function is bidirectional_mask_function
        and attention_mask is not None
        and kv_offset == 0
        and attention_mask.shape[-1] == kv_length
    ):
        tokens = attention_mask.bool()
        is_traced = torch.compiler.is_compiling() or torch.compiler.is_exporting()
        if allow_is_bidirectional_skip and not is_traced and bool(tokens.all()):
            return None
        return tokens[:, None, None, :]
    mask: torch.Tensor | None = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **kwargs,
    )
    return mask
