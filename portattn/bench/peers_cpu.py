"""What attention runs on without portattn on a CPU: SDPA, FlexAttention, eager code.

Each function returns a call that computes attention on the given tensors and returns its output,
shaped [batch, num_heads, seqlen_q, head_dim] unless it says otherwise.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from portattn.masks import Mask

    Call = Callable[[], torch.Tensor]
    # FlexAttention's predicate: (b, h, query row, key row) -> bool, on tensors.
    MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool = False
) -> Call:
    """Torch's scaled_dot_product_attention, its flash kernel on the CPU."""
    grouped = query.shape[1] != key.shape[1]
    return lambda: functional.scaled_dot_product_attention(
        query, key, value, is_causal=causal, enable_gqa=grouped
    )


def sdpa_with_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Mask
) -> Call:
    """SDPA with the mask as a bool tensor, made once and not timed."""
    dense = mask.to_dense(query.shape[2], key.shape[2], key.shape[2] - query.shape[2])
    return lambda: functional.scaled_dot_product_attention(query, key, value, attn_mask=dense)


def flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask_mod: MaskMod | None,
    block: int,
) -> Call:
    """Compiled FlexAttention; block mask and kernel are made here, not in the call.

    Args:
        query, key, value: float32, float16 or bfloat16.
        mask_mod: the mask; None keeps everything.
        block: FlexAttention's BLOCK_SIZE, rows and keys.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Past the default of 8 compiled variants Dynamo falls back to the unfused code without a word.
    torch._dynamo.config.recompile_limit = 1000
    block_mask = None
    if mask_mod is not None:
        block_mask = create_block_mask(
            mask_mod, None, None, query.shape[2], key.shape[2], device="cpu", BLOCK_SIZE=block
        )
    compiled = torch.compile(flex_attention, dynamic=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own deprecations
        compiled(query, key, value, block_mask=block_mask)
    return lambda: compiled(query, key, value, block_mask=block_mask)


class _Given(torch.nn.Module):
    """Stands where a projection was: hands its input on, so that only attention is timed."""

    def __init__(self, copy: bool) -> None:
        super().__init__()
        self.copy = copy

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone() if self.copy else x


def longformer_eager(
    *, seqlen: int, num_heads: int, head_dim: int, window: int, global_tokens: int
) -> Call:
    """Hugging Face's LongformerSelfAttention, its six projections replaced by the identity.

    Times the sliding chunks, the global rows and columns and the softmax; inputs are random, and
    the query is copied because the module divides it in place. Output: [1, seqlen, num_heads *
    head_dim].
    """
    from transformers.models.longformer.configuration_longformer import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=num_heads * head_dim,
        num_attention_heads=num_heads,
        attention_window=[window],
        attention_probs_dropout_prob=0.0,
    )
    module: Any = LongformerSelfAttention(config, 0)  # type: ignore[no-untyped-call]
    module.eval()
    for name in ("query", "key", "value", "query_global", "key_global", "value_global"):
        setattr(module, name, _Given(copy="query" in name))
    hidden = torch.randn(1, seqlen, num_heads * head_dim)
    mask = torch.zeros(1, seqlen)
    mask[:, :global_tokens] = 10000.0
    arguments: dict[str, Any] = {
        "attention_mask": mask,
        "is_index_masked": mask < 0,
        "is_index_global_attn": mask > 0,
        "is_global_attn": global_tokens > 0,
    }

    def call() -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = module(hidden, **arguments)[0]
        return output

    return call


def bigbird_eager(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, block: int, random_blocks: int
) -> Call:
    """Hugging Face's BigBirdBlockSparseAttention on given heads: no projections.

    Its window is 3 blocks, and the first and the last block are global; the random plan is drawn
    in each call, as the module does. Output: [batch, seqlen, num_heads, head_dim].
    """
    from transformers.models.big_bird.configuration_big_bird import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import (
        BigBirdBlockSparseAttention,
        BigBirdModel,
    )

    batch, num_heads, seqlen, head_dim = query.shape
    config = BigBirdConfig(
        hidden_size=num_heads * head_dim,
        num_attention_heads=num_heads,
        block_size=block,
        num_random_blocks=random_blocks,
        max_position_embeddings=seqlen,
    )
    module: Any = BigBirdBlockSparseAttention(config, seed=0)  # type: ignore[no-untyped-call]
    module.eval()
    blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(
        torch.ones(batch, seqlen), block
    )

    def call() -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = module.bigbird_block_sparse_attention(
                query,
                key,
                value,
                band,
                from_mask,
                to_mask,
                blocked,
                blocked,
                num_heads,
                random_blocks,
                head_dim,
                block,
                block,
                batch,
                seqlen,
                seqlen,
                0,
                None,
                None,
            )[0]
        return output

    return call
