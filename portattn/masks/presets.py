"""Known patterns as compositions of primitives.

i is the query's position and j the key's; // and mod are floor, as in Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from portattn.errors import MaskError
from portattn.masks.packed import Documents
from portattn.masks.primitives import (
    Band,
    BlockBand,
    DiffModulo,
    KeyModulo,
    KeyRange,
    QueryRange,
    RandomBlocks,
    SameBlock,
)
from portattn.masks.tables import BlockTable, KeyLengths, KeySet, QuerySet
from portattn.masks.tensors import check_int

if TYPE_CHECKING:
    from portattn.masks.mask import Mask
    from portattn.masks.tensors import TensorLike

DENSE_LIMIT = 2**26
_MAX = 2**61


_CAUSAL = Band(None, 0)


def causal() -> Mask:
    """Causal, j <= i: a query sees itself and what came before.

    Source: Vaswani et al., 2017, section 3.2.3.
    With seqlen_q != seqlen_k, ``q_offset="end"`` is flash-attn's alignment (since 2.1) and
    ``q_offset="start"`` that of torch's SDPA with is_causal.
    """
    return _CAUSAL


def local(left: int | None, right: int | None) -> Mask:
    """-left <= j - i <= right; None is no bound.

    Source: Longformer (Beltagy et al., 2020, section 3.1, "sliding window"), two-sided.
    Peers: the same numbers as flash-attn's and torch varlen_attn's ``window_size=(left, right)``,
    flashinfer's ``window_left`` and ONNX Attention-25's ``left_window_size``, where -1 stands for
    None; ``left`` keys before the query and the query's own are seen, left + 1 + right in all.
    """
    low = None if left is None else -check_int("left", left, 0, _MAX, "None is no bound")
    high = None if right is None else check_int("right", right, 0, _MAX, "None is no bound")
    return Band(low, high)


def sliding_window(n: int) -> Mask:
    """0 <= i - j < n: causal, the last n keys with the query's own.

    Source: Mistral 7B (Jiang et al., 2023, section 2).
    Peers: Hugging Face's ``sliding_window`` and ONNX Runtime's ``local_window_size`` count n keys
    like this; flash-attn's ``window_size=(left, 0)`` is n = left + 1.
    """
    return Band(1 - check_int("sliding_window's n", n, 1, _MAX), 0)


def longformer(window: int, global_tokens: int | TensorLike = 0, dilation: int = 1) -> Mask:
    """|i - j| <= dilation * (window // 2) with (i - j) mod dilation == 0, or i or j is global.

    Source: Longformer (Beltagy et al., 2020, section 3.1 and figure 2): sliding or dilated window,
    and global attention, which is symmetric: a global token sees all and is seen by all.

    Args:
        window: the two-sided size w: w // 2 keys on each side and the query's own, as Hugging
            Face's ``attention_window`` counts; ONNX Runtime's LongformerAttention ``window`` is
            one side, w // 2.
        global_tokens: a number of first tokens, or the global positions (a sequence or tensor).
        dilation: distance between neighbouring keys of the window. Hugging Face's model has none.
    """
    window_mask = dilated(window, dilation)
    if isinstance(global_tokens, (int, np.integer)):
        count = check_int("longformer's global_tokens", global_tokens, 0, _MAX)
        return window_mask | _first(count) if count else window_mask
    keys = KeySet(global_tokens)
    if keys.data[0].numel() == 0:
        return window_mask
    return window_mask | keys | QuerySet(keys.data[0])


def bigbird(
    block: int = 64,
    random_blocks: int = 3,
    window_blocks: int = 3,
    global_blocks: int = 2,
    seed: int = 0,
) -> Mask:
    """Blocks of keys that are near, global, or drawn at random.

    |i//block - j//block| <= (window_blocks - 1)//2, or i or j lies in the first global_blocks
    blocks, or j's block is one of the random_blocks drawn for i's block (`RandomBlocks`).

    Source: BigBird (Zaheer et al., 2020, section 2) with internal global tokens; the defaults are
    the sizes of its BigBird-ITC base model.
    Peers: Hugging Face's BigBird keeps the first and the last block global and draws random blocks
    outside window and global ones, by numpy's generator; here random blocks are drawn from all
    blocks, so that some may fall on blocks already kept, and by a hash that is the same on every
    device.

    Args:
        block: positions in a block.
        random_blocks: random key blocks for each query block.
        window_blocks: two-sided: the query's own block and (window_blocks - 1) // 2 on each side.
        global_blocks: first blocks that see all and are seen by all.
        seed: of the random blocks, 0 <= seed < 2**63.
    """
    check_int("bigbird's block", block, 1, 2**31)
    check_int("bigbird's window_blocks", window_blocks, 1, 2**31)
    check_int("bigbird's global_blocks", global_blocks, 0, 2**31 - 1)
    check_int("bigbird's random_blocks", random_blocks, 0, 2**31 - 1)
    side = (window_blocks - 1) // 2
    mask: Mask = BlockBand(block, -side, side)
    if global_blocks:
        mask = mask | _first(global_blocks * block)
    return mask | RandomBlocks(block, random_blocks, seed) if random_blocks else mask


def sparse_transformer_strided(stride: int) -> Mask:
    """Causal, and i - j < stride or (i - j) mod stride == 0.

    Source: Sparse Transformer (Child et al., 2019, section 4.3, "strided"), both sets in one.
    The paper's first set holds i - j == stride too, which here is in the second.
    """
    check_int("stride", stride, 1, _MAX)
    return Band(1 - stride, 0) | (causal() & DiffModulo(stride, 0, 1))


def sparse_transformer_fixed(stride: int, summary: int = 1) -> Mask:
    """Causal, and the same block of stride or j mod stride >= stride - summary.

    Source: Sparse Transformer (Child et al., 2019, section 4.3, "fixed"), the union of both sets;
    ``summary`` is the paper's c: the last c positions of each block are seen by all that follow.
    """
    check_int("stride", stride, 1, _MAX)
    check_int("summary", summary, 0, stride, "It counts positions of one block")
    same_block = causal() & SameBlock(stride)
    if summary == 0:
        return same_block
    return same_block | (causal() & KeyModulo(stride, stride - summary, stride))


def dilated(window: int, dilation: int) -> Mask:
    """|i - j| <= dilation * (window // 2) and (i - j) mod dilation == 0.

    Source: Longformer (Beltagy et al., 2020, section 3.1, "dilated sliding window").
    window // 2 keys on each side and the query's own, ``dilation`` apart; for a causal one use
    ``dilated(window, dilation) & causal()``.
    """
    check_int("window", window, 1, 2**31)
    check_int("dilation", dilation, 1, 2**30)
    reach = dilation * (window // 2)
    band = Band(-reach, reach)
    return band if dilation == 1 else band & DiffModulo(dilation, 0, 1)


def prefix_lm(n: int) -> Mask:
    """Keep j <= i or j < n: the first n keys are seen by all, the rest is causal.

    Source: T5 (Raffel et al., 2020, section 3.2.1, "causal with prefix").
    """
    count = check_int("prefix_lm's n", n, 0, _MAX)
    return causal() | KeyRange(0, count) if count else causal()


def streaming_llm(sinks: int, window: int) -> Mask:
    """Causal, and j < sinks or i - j < window.

    Source: StreamingLLM (Xiao et al., 2023, section 3.2): attention sinks (4 in the paper) and
    the last ``window`` keys with the query's own. The paper also renumbers positions inside the
    cache, which a mask does not.
    """
    check_int("sinks", sinks, 0, _MAX)
    recent = sliding_window(window)
    return recent | (causal() & KeyRange(0, sinks)) if sinks else recent


def documents(cu_seqlens: TensorLike) -> Mask:
    """Keep i and j in the same document of a packed sequence.

    Peers: flash-attn's varlen functions take the same ``cu_seqlens``; their ``causal=True`` is
    ``documents(cu_seqlens) & causal()`` here.

    Args:
        cu_seqlens: integers [documents + 1], rising from 0: document d has the positions
            cu_seqlens[d] to cu_seqlens[d + 1] - 1; the last is the length that the mask covers.

    Raises:
        MaskError: not rising from 0, or not below 2**31.
    """
    return Documents(cu_seqlens)


def padding(lengths: TensorLike) -> Mask:
    """Keep j < lengths[b]: batch b has lengths[b] keys (of keys; padded queries still give rows).

    Peers: flash-attn's ``seqused_k``; Hugging Face's ``attention_mask`` [batch, seqlen_k] with the
    padding at the right is ``padding(attention_mask.sum(-1))``.

    Args:
        lengths: integers >= 0, [batch].
    """
    return KeyLengths(lengths)


def block_sparse(table: TensorLike, block: int | tuple[int, int]) -> Mask:
    """table[i//block_q, j//block_k]: a table of blocks.

    Peers: flashinfer's BSR masks and Block-Sparse-Attention's ``base_blockmask`` are such tables.

    Args:
        table: bool [nq, nk], [num_heads, nq, nk] or [batch, 1 or num_heads, nq, nk].
        block: (block_q, block_k), or one number for both.
    """
    block_q, block_k = block if isinstance(block, tuple) else (block, block)
    return BlockTable(table, block_q, block_k)


def dense(mask: TensorLike, *, max_elements: int = DENSE_LIMIT) -> Mask:
    """mask[i, j]: any pattern, True where the query may attend (SDPA's bool attn_mask).

    Entries go by position: with q_offset, row r of the call reads row q_offset + r here.

    Args:
        mask: bool [positions, seqlen_k], [num_heads, ...] or [batch, 1 or num_heads, ...].
        max_elements: the limit on its elements, 2**26 (8192 x 8192) unless raised: a dense mask
            costs O(S^2) memory, and planning it O(S^2) time.

    Raises:
        MaskError: more elements than max_elements, not bool, or a wrong rank.
    """
    count = int(mask.numel()) if isinstance(mask, torch.Tensor) else int(np.size(mask))
    if count > max_elements:
        raise MaskError(
            f"dense got {count} elements; at most {max_elements} (max_elements) are taken: use "
            "block_sparse or another pattern, or raise max_elements"
        )
    return BlockTable(mask, 1, 1)


def _first(count: int) -> Mask:
    """Keep i or j in the first ``count`` positions."""
    return KeyRange(0, count) | QueryRange(0, count)
