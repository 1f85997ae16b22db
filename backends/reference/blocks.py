"""Cuts a call into blocks of query rows, so that the reference's memory stays bounded."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from portattn.backends.base import AttentionInputs

# Most elements of one block's score matrix; a block has at least one row of every head.
MAX_SCORES = 1 << 23


@dataclasses.dataclass(frozen=True, slots=True)
class RowBlock:
    """Some query rows of one batch element, all heads.

    Attributes:
        batch: index of the batch element.
        rows: the query rows.
        keep: bool [1 or num_heads, rows, seqlen_k] on the inputs' device; None keeps all.
        distance: |i - j|, int64 [rows, seqlen_k].
        num_keys: keys >= num_keys do not exist (kv_lengths).
    """

    batch: int
    rows: slice
    keep: torch.Tensor | None
    distance: torch.Tensor
    num_keys: int


def row_blocks(inputs: AttentionInputs) -> Iterator[RowBlock]:
    """The blocks of a call, in order. Only the reference reads kv_lengths on the host."""
    batch, num_heads, seqlen_q, _ = inputs.query.shape
    seqlen_k = inputs.key.shape[2]
    size = max(1, MAX_SCORES // (num_heads * seqlen_k))
    lengths = None if inputs.kv_lengths is None else inputs.kv_lengths.tolist()
    for b in range(batch):
        num_keys = seqlen_k if lengths is None else min(max(lengths[b], 0), seqlen_k)
        first = inputs.q_offset if lengths is None else lengths[b] - seqlen_q
        for start in range(0, seqlen_q, size):
            rows = slice(start, min(start + size, seqlen_q))
            yield _block(inputs, b, rows, first, num_keys)


def _block(inputs: AttentionInputs, b: int, rows: slice, first: int, num_keys: int) -> RowBlock:
    seqlen_k, device = inputs.key.shape[2], inputs.query.device
    i = np.arange(first + rows.start, first + rows.stop)[:, None]
    j = np.arange(seqlen_k)[None, :]
    keep = None
    if inputs.mask is not None:
        heads = 1 if inputs.mask.num_heads is None else inputs.query.shape[1]
        kept = [inputs.mask.keeps(i, j, seqlen_k=seqlen_k, b=b, h=h) for h in range(heads)]
        keep = torch.from_numpy(np.stack(kept)).to(device)
    if num_keys < seqlen_k:
        exists = torch.arange(seqlen_k, device=device) < num_keys
        keep = exists.expand(1, rows.stop - rows.start, -1) if keep is None else keep & exists
    return RowBlock(b, rows, keep, torch.from_numpy(np.abs(i - j)).to(device), num_keys)


def bias_as_given(bias: torch.Tensor) -> torch.Tensor:
    """The 4-D bias with size 1 wherever it was expanded by strides."""
    for dim in range(bias.ndim):
        if bias.stride(dim) == 0:
            bias = bias.narrow(dim, 0, 1)
    return bias


def bias_index(bias: torch.Tensor, block: RowBlock) -> tuple[int, slice, slice]:
    """The index of the block's part of `bias_as_given`: [1 or num_heads, 1 or rows, 1 or keys]."""
    return (
        block.batch if bias.shape[0] > 1 else 0,
        slice(None),
        block.rows if bias.shape[2] > 1 else slice(None),
    )


def per_head(terms: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    """The [num_heads] part of a term given as [num_heads] or [batch, num_heads]."""
    return terms if terms is None or terms.ndim == 1 else terms[batch]


def existing(tensor: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Keys or values [num_kv_heads, seqlen_k, ...] with 0 in place of those that do not exist."""
    if num_keys == tensor.shape[1]:
        return tensor
    exists = torch.arange(tensor.shape[1], device=tensor.device) < num_keys
    return tensor.masked_fill(~exists[:, None], 0.0)
