"""The masks of the benchmark, each as portattn's mask and as FlexAttention's predicate.

A pattern is a name and integers, so that it goes into JSON, and to other processes, as it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from portattn import masks
from portattn.errors import ConfigError

if TYPE_CHECKING:
    from portattn.masks import Mask

# FlexAttention's mask_mod(batch, head, query position, key position) -> bool tensor
MaskMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class Pattern:
    """What may attend.

    Attributes:
        kind: a name of `KINDS`.
        values: the kind's integers, e.g. window and global tokens.
    """

    kind: str
    values: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        wanted = KINDS[self.kind].arguments if self.kind in KINDS else None
        if wanted is None or len(wanted) != len(self.values):
            known = ", ".join(":".join((name, *kind.arguments)) for name, kind in KINDS.items())
            raise ConfigError(f"pattern is {self.text!r}; it must be one of {known}")

    @property
    def text(self) -> str:
        """E.g. ``"longformer:512:64"``."""
        return ":".join((self.kind, *map(str, self.values)))

    @property
    def is_dense(self) -> bool:
        """Whether SDPA has it without a mask tensor: everything, or causal."""
        return self.kind in ("full", "causal")

    @property
    def is_documents(self) -> bool:
        """Whether it is packed documents, whose boundaries change from batch to batch."""
        return self.kind in ("documents", "causal_documents")

    def mask(self, seqlen: int, seed: int = 0) -> Mask | None:
        """The mask for a length; None keeps everything.

        Args:
            seqlen: only documents depend on it.
            seed: of the documents' lengths.
        """
        if self.is_documents:
            mask = masks.documents(document_ends(seqlen, self.values[0], seed))
            return mask & masks.causal() if self.kind == "causal_documents" else mask
        return KINDS[self.kind].mask(*self.values)

    def mask_mod(self, seqlen: int, device: torch.device) -> MaskMod | None:
        """FlexAttention's predicate; None keeps everything."""
        return KINDS[self.kind].mask_mod(seqlen, device, *self.values)


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """How the patterns of one name are made.

    Attributes:
        arguments: what its integers mean.
        mask: integers -> portattn's mask.
        mask_mod: (length, device, *integers) -> FlexAttention's predicate.
        block: the block of FlexAttention's block mask that suits it best.
    """

    arguments: tuple[str, ...]
    mask: Callable[..., Mask | None]
    mask_mod: Callable[..., MaskMod | None]
    block: int = 128


@functools.lru_cache(maxsize=64)
def document_ends(seqlen: int, count: int, seed: int) -> Tensor:
    """Boundaries of `count` packed documents of unequal length: int32 [count + 1], rising from 0.

    Lengths are drawn between half and one and a half of the mean, then scaled to `seqlen`.
    """
    shares = np.random.default_rng(seed).uniform(0.5, 1.5, count)
    ends = np.round(np.cumsum(shares) / shares.sum() * seqlen).astype(np.int32)
    return torch.from_numpy(np.concatenate(([np.int32(0)], ends)))


def document_ids(ends: Tensor) -> Tensor:
    """The document of each position: int32 [seqlen], from the boundaries."""
    return torch.repeat_interleave(
        torch.arange(len(ends) - 1, dtype=torch.int32), ends.diff().long()
    )


def _causal(seqlen: int, device: torch.device) -> MaskMod:
    return lambda b, h, i, j: i >= j


def _sliding_window(seqlen: int, device: torch.device, window: int) -> MaskMod:
    return lambda b, h, i, j: (i >= j) & (i - j < window)


def _longformer(seqlen: int, device: torch.device, window: int, count: int) -> MaskMod:
    return lambda b, h, i, j: ((i - j).abs() <= window // 2) | (i < count) | (j < count)


def _block_table(mask: Mask, seqlen: int, block: int, device: torch.device) -> Tensor:
    starts = np.arange(0, seqlen, block)
    kept = mask.keeps(starts[:, None], starts[None, :], seqlen_k=seqlen)
    return torch.from_numpy(np.ascontiguousarray(kept)).to(device)


def _bigbird(
    seqlen: int, device: torch.device, block: int, drawn: int, window: int, count: int
) -> MaskMod:
    table = _block_table(masks.bigbird(block, drawn, window, count, 0), seqlen, block, device)
    return lambda b, h, i, j: table[i // block, j // block]


def _random_blocks(seqlen: int, device: torch.device, block: int, count: int) -> MaskMod:
    table = _block_table(masks.RandomBlocks(block, count, 0), seqlen, block, device)
    return lambda b, h, i, j: table[i // block, j // block]


def _local_strided(seqlen: int, device: torch.device, stride: int) -> MaskMod:
    return lambda b, h, i, j: (i >= j) & ((i - j < stride) | (j % stride == stride - 1))


def _strided(seqlen: int, device: torch.device, stride: int) -> MaskMod:
    return lambda b, h, i, j: (i >= j) & ((i - j < stride) | ((i - j) % stride == 0))


def _documents(seqlen: int, device: torch.device, count: int) -> MaskMod:
    return documents_mod(document_ids(document_ends(seqlen, count, 0)).to(device), False)


def _causal_documents(seqlen: int, device: torch.device, count: int) -> MaskMod:
    return documents_mod(document_ids(document_ends(seqlen, count, 0)).to(device), True)


def documents_mod(ids: Tensor, is_causal: bool) -> MaskMod:
    """The predicate of packed documents; it reads `ids`, int32 [seqlen], when it is evaluated."""
    if is_causal:
        return lambda b, h, i, j: (ids[i] == ids[j]) & (i >= j)
    return lambda b, h, i, j: ids[i] == ids[j]


def _made_elsewhere(count: int) -> Mask | None:
    raise AssertionError("documents depend on the length: Pattern.mask makes them")


def _local_strided_mask(stride: int) -> Mask:
    return masks.Band(1 - stride, 0) | (
        masks.Band(None, 0) & masks.KeyModulo(stride, stride - 1, stride)
    )


KINDS: dict[str, Kind] = {
    "full": Kind((), lambda: None, lambda seqlen, device: None),
    "causal": Kind((), masks.causal, _causal),
    "sliding_window": Kind(("N",), masks.sliding_window, _sliding_window),
    "longformer": Kind(("WINDOW", "GLOBAL"), masks.longformer, _longformer),
    "bigbird": Kind(
        ("BLOCK", "RANDOM", "WINDOW", "GLOBAL"),
        lambda block, drawn, window, count: masks.bigbird(block, drawn, window, count, 0),
        _bigbird,
        block=64,
    ),
    "local_strided": Kind(("STRIDE",), _local_strided_mask, _local_strided),
    "sparse_transformer_strided": Kind(("STRIDE",), masks.sparse_transformer_strided, _strided),
    "random_blocks": Kind(
        ("BLOCK", "COUNT"),
        lambda block, count: masks.RandomBlocks(block, count, 0),
        _random_blocks,
    ),
    "documents": Kind(("COUNT",), _made_elsewhere, _documents),
    "causal_documents": Kind(("COUNT",), _made_elsewhere, _causal_documents),
}
