"""Bounds the memory of a process that runs or compiles candidates, so that one cannot take all."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

# What a candidate may take beside its inputs: scratch memory is far smaller.
MORE_BYTES = 4 << 30


def lift(device: str) -> None:
    """No bound, for what the tuner itself allocates."""
    if device.startswith("cuda"):
        torch.cuda.set_per_process_memory_fraction(1.0, _index(device))
    elif sys.platform == "linux":
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def bound(device: str, more_bytes: int = MORE_BYTES) -> None:
    """From here on so much more and no more.

    Args:
        device: whose memory; of a GPU, what PyTorch allocates.
        more_bytes: beside what is in use.
    """
    if device.startswith("cuda"):
        index = _index(device)
        total = torch.cuda.get_device_properties(index).total_memory
        held = torch.cuda.memory_reserved(index)
        torch.cuda.set_per_process_memory_fraction(min((held + more_bytes) / total, 1.0), index)
    elif sys.platform == "linux":
        text = Path("/proc/self/status").read_text(encoding="ascii")
        data = next(line for line in text.splitlines() if line.startswith("VmData:"))
        held = int(data.split()[1]) << 10
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        most = held + more_bytes
        resource.setrlimit(
            resource.RLIMIT_DATA,
            (most if hard == resource.RLIM_INFINITY else min(most, hard), hard),
        )


def _index(device: str) -> int:
    index = torch.device(device).index
    return torch.cuda.current_device() if index is None else index
