"""How far a result is from the truth, and how far it may be."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch


def tolerance(eager_error: float, largest: float, dtype: torch.dtype) -> float:
    """The largest error allowed, by the rule of the conformance suite."""
    return 2 * eager_error + 2 * torch.finfo(dtype).eps * largest


def _numbers(tensor: torch.Tensor) -> npt.NDArray[np.float64]:
    """On the host and out of torch, whose threads cost more than this work on a busy machine."""
    numbers: npt.NDArray[np.float64] = tensor.double().numpy()
    return numbers


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest absolute difference; equal infinities differ by nothing, NaN differs by inf."""
    if not truth.numel():
        return 0.0
    if truth.is_cuda:
        apart = torch.where(found == truth, 0.0, (found.double() - truth.double()).abs())
        return float(apart.nan_to_num(nan=math.inf, posinf=math.inf).max())
    mine, right = _numbers(found), _numbers(truth)
    with np.errstate(invalid="ignore"):
        difference = np.where(mine == right, 0.0, np.abs(mine - right))
    return float(np.nan_to_num(difference, nan=math.inf, posinf=math.inf).max())


def largest(truth: torch.Tensor) -> float:
    """The largest absolute value that is finite; 0 if there is none."""
    if truth.is_cuda:
        finite = torch.where(truth.isfinite(), truth.abs(), 0.0)
        return float(finite.max()) if finite.numel() else 0.0
    numbers = np.abs(_numbers(truth))
    return float(numbers.max(initial=0.0, where=np.isfinite(numbers)))
