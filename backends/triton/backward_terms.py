"""Gradients of the score terms, from sums that the kernels of the backward leave behind."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from portattn.backends.base import AttentionGradients, AttentionInputs


class BiasKind(enum.Enum):
    """How the gradient of a bias is found."""

    NONE = enum.auto()
    FULL = enum.auto()  # it has rows and keys: dY as it is
    BY_ROW = enum.auto()  # one number for all keys of a row: row sums of dY
    BY_COLUMN = enum.auto()  # one for all rows of a key: column sums


def bias_kind(inputs: AttentionInputs, gradients: AttentionGradients) -> BiasKind:
    """By the shape of the bias as it was given."""
    if gradients.bias is None:
        return BiasKind.NONE
    seqlen_q, seqlen_k = inputs.query.shape[2], inputs.key.shape[2]
    rows, keys = gradients.bias.shape[2:]
    if keys != seqlen_k:
        return BiasKind.BY_ROW
    return BiasKind.FULL if rows == seqlen_q else BiasKind.BY_COLUMN


def fill_bias(target: torch.Tensor, kind: BiasKind, tensors: Mapping[str, Any]) -> None:
    """The gradient of a bias, of whose sizes those that broadcast are 1."""
    if kind is BiasKind.FULL:
        target.copy_(tensors["dbias"])
        return
    by_row = kind is BiasKind.BY_ROW
    found = tensors["sums2"][..., None] if by_row else tensors["column_sums"][:, :, None]
    target.copy_(found.sum_to_size(target.shape))


def fill_slopes(target: torch.Tensor, sums: torch.Tensor) -> None:
    """The gradient of ALiBi slopes, [num_heads] or [batch, num_heads], from each row's sum."""
    target.copy_(sums.sum((0, 2) if target.ndim == 1 else 2))


def fill_sinks(target: torch.Tensor, sinks: torch.Tensor, stats: torch.Tensor) -> None:
    """The gradient of sinks, -sum(exp(sink - LSE) * delta) over rows and batches.

    Args:
        target: [num_heads].
        sinks: float32 [num_heads].
        stats: float32 [batch, num_heads, 2, seqlen_q]: LSE in log2 units, delta.
    """
    # A row that is empty without its sink has LSE = sink; with a sink of -inf, +inf here.
    weights = torch.exp2(sinks[:, None] * _LOG2E - stats[:, :, 0])
    target.copy_(-(weights * stats[:, :, 1]).sum((0, 2)))


_LOG2E = 1.4426950408889634
