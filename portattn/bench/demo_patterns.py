"""The demo's masks, each also as a FlexAttention predicate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from portattn import masks

if TYPE_CHECKING:
    from portattn.masks import Mask

# FlexAttention's mask_mod(batch, head, query position, key position) -> bool tensor
MaskMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

WINDOW = 512
GLOBAL_TOKENS = 64
BLOCK, RANDOM_BLOCKS, WINDOW_BLOCKS, GLOBAL_BLOCKS = 64, 3, 3, 2
STRIDE = 512


@dataclasses.dataclass(frozen=True, slots=True)
class Pattern:
    """One mask of the demo.

    Attributes:
        name: for file names and tables.
        mask: as portattn takes it.
        flex: given the position of row 0 and the number of keys, the predicate that FlexAttention
            takes. The position is an int64 tensor [], so that another one does not recompile.
    """

    name: str
    mask: Mask
    flex: Callable[[Tensor, int], MaskMod]


def _longformer(offset: Tensor, seqlen_k: int) -> MaskMod:
    def keeps(b: Tensor, h: Tensor, q: Tensor, j: Tensor) -> Tensor:
        i = q + offset
        return ((i - j).abs() <= WINDOW // 2) | (i < GLOBAL_TOKENS) | (j < GLOBAL_TOKENS)

    return keeps


def _bigbird(offset: Tensor, seqlen_k: int) -> MaskMod:
    starts = np.arange(0, seqlen_k, BLOCK)
    draw = masks.RandomBlocks(BLOCK, RANDOM_BLOCKS, 0)
    drawn = torch.from_numpy(draw.keeps(starts[:, None], starts[None, :], seqlen_k=seqlen_k))

    def keeps(b: Tensor, h: Tensor, q: Tensor, j: Tensor) -> Tensor:
        i, j = (q + offset) // BLOCK, j // BLOCK
        near = (i - j).abs() <= (WINDOW_BLOCKS - 1) // 2
        return near | (i < GLOBAL_BLOCKS) | (j < GLOBAL_BLOCKS) | drawn[i, j]

    return keeps


def _sliding_window(offset: Tensor, seqlen_k: int) -> MaskMod:
    def keeps(b: Tensor, h: Tensor, q: Tensor, j: Tensor) -> Tensor:
        distance = q + offset - j
        return (distance >= 0) & (distance < WINDOW)

    return keeps


def _strided(offset: Tensor, seqlen_k: int) -> MaskMod:
    def keeps(b: Tensor, h: Tensor, q: Tensor, j: Tensor) -> Tensor:
        distance = q + offset - j
        return (distance >= 0) & ((distance < STRIDE) | (distance % STRIDE == 0))

    return keeps


def patterns() -> list[Pattern]:
    """Longformer, BigBird, sliding window and strided, about 0.6 % dense at 100,000 tokens."""
    return [
        Pattern("longformer", masks.longformer(WINDOW, GLOBAL_TOKENS), _longformer),
        Pattern(
            "bigbird",
            masks.bigbird(BLOCK, RANDOM_BLOCKS, WINDOW_BLOCKS, GLOBAL_BLOCKS, seed=0),
            _bigbird,
        ),
        Pattern("sliding_window", masks.sliding_window(WINDOW), _sliding_window),
        Pattern("strided", masks.sparse_transformer_strided(STRIDE), _strided),
    ]
