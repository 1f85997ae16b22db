"""What the CuPy kernels ask of a device."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import torch

from portattn.backends.cupy import loader

if TYPE_CHECKING:
    from collections.abc import Callable

    from portattn.problem import AttentionProblem


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceProperties:
    """Compute capability (major, minor) and number of streaming multiprocessors."""

    capability: tuple[int, int]
    num_sms: int


@functools.cache
def device_properties(device: str) -> DeviceProperties:
    """Properties of a CUDA device, e.g. ``"cuda:0"``."""
    found = torch.cuda.get_device_properties(device)
    return DeviceProperties((found.major, found.minor), found.multi_processor_count)


def device_reasons(
    problem: AttentionProblem, capability: Callable[[AttentionProblem], tuple[int, int]]
) -> list[str]:
    """Why no CUDA source for sm_80 and later runs on the problem's device; empty if it does.

    Args:
        problem: what is to be computed.
        capability: the compute capability of a problem's CUDA device.
    """
    if problem.device_type != "cuda":
        return [f"it runs on CUDA devices; the tensors are on {problem.device_type!r}"]
    if torch.version.hip is not None:
        return ["it is CUDA source with NVIDIA's PTX; this torch is built for ROCm"]
    major, minor = capability(problem)
    if major < 8:
        return [f"it needs compute capability 8.0; {problem.device} has {major}.{minor}"]
    missing = loader.nvrtc_problem()
    return [] if missing is None else [missing]
