"""The tolerance rule: an error may be twice that of the same-dtype eager computation."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """One tensor of a result against the reference, where the reference is finite.

    Attributes:
        error: max|result - reference|.
        eager_error: max|eager - reference|.
        allowed: 2 * eager_error + 2 * eps(dtype) * max|reference|.
        fault: what is wrong beside the error, or "".
    """

    error: float
    eager_error: float
    allowed: float
    fault: str = ""

    @property
    def passes(self) -> bool:
        """The error is within what is allowed, and nothing else is wrong."""
        return not self.fault and self.error <= self.allowed

    @property
    def share(self) -> float:
        """The error as a share of what is allowed."""
        if self.error == 0.0:
            return 0.0
        return self.error / self.allowed if self.allowed > 0.0 else float("inf")


def compare(
    name: str,
    result: torch.Tensor,
    eager: torch.Tensor,
    reference: torch.Tensor,
    *,
    dtype: torch.dtype,
    poisoned: bool,
) -> Comparison:
    """Compare a result with the float64 reference.

    Args:
        name: ``"output"`` or ``"lse"``, for the fault's text.
        result: what the kernel wrote.
        eager: the same-dtype eager computation.
        reference: float64.
        dtype: the dtype under test.
        poisoned: an input holds a NaN or inf: entries that it reaches in the reference must not
            be finite, and nothing is asked of the others, which may lie in a tile with it.
    """
    result, eager = result.double(), eager.double()
    finite = reference.isfinite()
    fault = ""
    if poisoned and name == "output":
        if result[~finite].isfinite().any():
            fault = "a NaN or inf at a key that a row attends to did not reach it"
        return Comparison(0.0, 0.0, 0.0, fault)
    if poisoned:
        finite &= result.isfinite()
    elif not torch.equal(result[~finite], reference[~finite]):
        fault = f"{name} differs where the reference is infinite: {int((~finite).sum())} entries"
    if not finite.any():
        return Comparison(0.0, 0.0, 0.0, fault)
    result, eager, reference = result[finite], eager[finite], reference[finite]
    if not result.isfinite().all():
        count = int((~result.isfinite()).sum())
        fault = fault or f"{name} has {count} NaN or infinite entries of {result.numel()}"
    error = float((result - reference).abs().max())
    eager_error = float((eager - reference).abs().max())
    scale = float(reference.abs().max())
    allowed = 2 * eager_error + 2 * torch.finfo(dtype).eps * scale
    return Comparison(error, eager_error, allowed, fault)
