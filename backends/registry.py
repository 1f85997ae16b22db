"""The table of kernels, in order of preference. Modules load on first use."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from portattn.backends.base import Kernel

# kernel name -> (backend, module, class, packages that must be installed). First is preferred.
KERNELS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "triton_decode": ("triton", "portattn.backends.triton.decode", "TritonDecode", ("triton",)),
    "cupy_decode": ("cupy", "portattn.backends.cupy.decode", "CupyDecode", ("cupy",)),
    "cupy_forward_sm90": (
        "cupy",
        "portattn.backends.cupy.forward_sm90",
        "CupyForwardSm90",
        ("cupy",),
    ),
    "triton_forward_hopper": (
        "triton",
        "portattn.backends.triton.forward_hopper",
        "TritonForwardHopper",
        ("triton",),
    ),
    "triton_forward": ("triton", "portattn.backends.triton.forward", "TritonForward", ("triton",)),
    "triton_backward_hopper": (
        "triton",
        "portattn.backends.triton.hopper_backward",
        "TritonBackwardHopper",
        ("triton",),
    ),
    "triton_backward": (
        "triton",
        "portattn.backends.triton.backward",
        "TritonBackward",
        ("triton",),
    ),
    "cupy_forward_sm80": (
        "cupy",
        "portattn.backends.cupy.forward_sm80",
        "CupyForwardSm80",
        ("cupy",),
    ),
    "cpu_decode": ("cpu", "portattn.backends.cpu.decode", "CpuDecode", ()),
    "cpu_forward": ("cpu", "portattn.backends.cpu.forward", "CpuForward", ()),
    "reference": ("reference", "portattn.backends.reference.forward", "ReferenceForward", ()),
}
BACKENDS = ("reference", "cpu", "triton", "cupy")


def missing_packages(name: str) -> list[str]:
    """The packages that the kernel needs and that are not installed."""
    return [package for package in KERNELS[name][3] if importlib.util.find_spec(package) is None]


@functools.cache
def kernel(name: str) -> Kernel:
    """The kernel's one instance; imports its module."""
    _, module, class_name, _ = KERNELS[name]
    instance: Kernel = getattr(importlib.import_module(module), class_name)()
    return instance
