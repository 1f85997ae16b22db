"""FlexAttention's block mask without its square: the predicate a band of queries at a time.

create_block_mask evaluates the predicate at every pair at once: 4 GiB of bool at 65536 tokens, and
several times that in between; compiled, it takes seconds per mask. Kernels read only the lists of
blocks, which come out the same here: that is what the tests compare.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.attention.flex_attention import BlockMask

if TYPE_CHECKING:
    from torch import Tensor

    from portattn.bench.patterns import MaskMod

_PAIRS_AT_ONCE = 1 << 25  # int64 differences of positions: 256 MiB


def block_mask(
    mask_mod: MaskMod, seqlen_q: int, seqlen_k: int, device: torch.device, block: int = 128
) -> BlockMask:
    """What ``create_block_mask(mask_mod, None, None, ...)`` returns.

    Args:
        mask_mod: FlexAttention's predicate; it must broadcast over query and key positions and
            not depend on batch or head.
        seqlen_q, seqlen_k: lengths.
        device: where.
        block: rows and keys of a block.
    """
    counts = _kept_pairs(mask_mod, seqlen_q, seqlen_k, device, block)
    full = counts == block * block
    partial = (counts > 0) & ~full
    num_blocks, indices = _lists(partial)
    full_num_blocks, full_indices = _lists(full)
    return BlockMask.from_kv_blocks(
        num_blocks, indices, full_num_blocks, full_indices, BLOCK_SIZE=block, mask_mod=mask_mod,
        seq_lengths=(seqlen_q, seqlen_k),
    )  # fmt: skip


def _kept_pairs(
    mask_mod: MaskMod, seqlen_q: int, seqlen_k: int, device: torch.device, block: int
) -> Tensor:
    """Kept pairs of each block: [blocks of queries, blocks of keys]."""
    rows, columns = -(-seqlen_q // block), -(-seqlen_k // block)
    keys = torch.arange(columns * block, device=device)[None, :]
    zero = torch.zeros((), dtype=torch.long, device=device)
    band = max(_PAIRS_AT_ONCE // (columns * block * block), 1)  # rows of blocks
    counts = []
    for first in range(0, rows, band):
        count = min(band, rows - first)
        queries = torch.arange(first * block, (first + count) * block, device=device)[:, None]
        inside = (queries < seqlen_q) & (keys < seqlen_k)
        # Tables have no entries past the lengths: the positions there are clamped, then left out.
        kept = inside & mask_mod(
            zero, zero, queries.clamp(max=seqlen_q - 1), keys.clamp(max=seqlen_k - 1)
        )
        counts.append(kept.view(count, block, columns, block).sum((1, 3)))
    return torch.cat(counts)


def _lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has [1, 1, rows], and which, those first [1, 1, rows, columns]."""
    blocks = blocks.to(torch.int32)
    indices = torch.argsort(blocks, dim=-1, descending=True, stable=True)
    return (
        blocks.sum(-1, dtype=torch.int32)[None, None],
        indices.to(torch.int32).contiguous()[None, None],
    )
