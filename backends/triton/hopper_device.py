"""Where the Gluon kernels for Hopper can run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from portattn.backends.triton.limits import device_limits

if TYPE_CHECKING:
    from portattn.problem import AttentionProblem

_TRITON_VERSIONS = ((3, 6), (3, 9))  # first and last whose Gluon compiled and was tested


def device_reasons(problem: AttentionProblem) -> list[str]:
    """Why they cannot run on the problem's device or with this Triton; empty if they can."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    first, last = _TRITON_VERSIONS
    if not first <= version <= last:
        return [f"it needs triton 3.6 to 3.9; {triton.__version__} is installed"]
    if problem.device_type != "cuda":
        return [f"needs sm_90 (Hopper); the device is {problem.device_type}"]
    if not torch.cuda.is_available():
        return ["needs sm_90 (Hopper); torch sees no GPU"]
    arch = device_limits(problem.device).arch
    return [] if arch == "sm_90" else [f"needs sm_90 (Hopper); the device is {arch}"]
