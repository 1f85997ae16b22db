"""What benchmarks/planning.py plans: each mask and the same as a FlexAttention predicate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from portattn import masks
from portattn.masks.drawing import drawn_blocks

if TYPE_CHECKING:
    from portattn.masks import Mask

MILLION = 2**20
PACKED = 2**17
DOCUMENTS = 16

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A mask for a length, the same as a FlexAttention predicate, and what is to be reached."""

    name: str
    mask: Callable[[int], Mask]
    predicate: Callable[[int], Predicate]
    seqlen: int = MILLION
    target_ms: float = 50.0


def _longformer(seqlen: int) -> Predicate:
    return lambda b, h, i, j: ((i - j).abs() <= 256) | (i < 64) | (j < 64)


def _bigbird(seqlen: int) -> Predicate:
    blocks = -(-seqlen // 64)
    drawn = torch.from_numpy(drawn_blocks(np.arange(blocks), blocks, 3, 0))

    def keeps(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near = ((i // 64 - j // 64).abs() <= 1) | (i < 128) | (j < 128)
        return near | drawn[i // 64, j // 64]

    return keeps


def _strided(seqlen: int) -> Predicate:
    return lambda b, h, i, j: (i >= j) & ((i - j < 1024) | ((i - j) % 1024 == 0))


def _document_ends(seqlen: int) -> torch.Tensor:
    """Uneven documents, as packing gives them."""
    cuts = np.random.default_rng(0).choice(np.arange(1, seqlen), DOCUMENTS - 1, replace=False)
    return torch.tensor([0, *np.sort(cuts), seqlen])


def _documents(seqlen: int) -> Predicate:
    ids = torch.repeat_interleave(torch.arange(DOCUMENTS), _document_ends(seqlen).diff())
    return lambda b, h, i, j: (ids[i] == ids[j]) & (i >= j)


PATTERNS = (
    Pattern(
        "sliding_window(4096)",
        lambda seqlen: masks.sliding_window(4096),
        lambda seqlen: lambda b, h, i, j: (i >= j) & (i - j < 4096),
    ),
    Pattern(
        "local(256, 256)",
        lambda seqlen: masks.local(256, 256),
        lambda seqlen: lambda b, h, i, j: (i - j).abs() <= 256,
    ),
    Pattern("longformer(512, 64)", lambda seqlen: masks.longformer(512, 64), _longformer),
    Pattern("bigbird(64, 3, 3, 2)", lambda seqlen: masks.bigbird(64, 3, 3, 2), _bigbird),
    Pattern(
        "sparse_transformer_strided(1024)",
        lambda seqlen: masks.sparse_transformer_strided(1024),
        _strided,
    ),
    Pattern("causal()", lambda seqlen: masks.causal(), lambda seqlen: lambda b, h, i, j: i >= j),
    Pattern(
        f"documents, {DOCUMENTS}, causal",
        lambda seqlen: masks.documents(_document_ends(seqlen)) & masks.causal(),
        _documents,
        seqlen=PACKED,
        target_ms=2.0,
    ),
)
