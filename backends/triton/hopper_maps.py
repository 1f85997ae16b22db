"""Tensor maps of the Hopper forward: [batch, heads, residues, rows, width].

The kernel reads and writes rows by TMA alone, one head's at a time: rows past the end read 0 and
are not written, so that nothing leaks from the head behind. In a pass whose tiles have a step
m > 1, row residue + m * t of a head is element (residue, t) of a map; where m does not divide the
length, a second map holds the residues that have a row less. A tensor that TMA cannot read (rows
that are not 16-byte aligned, strides of 0) is copied once per call into one that it can, O(S D);
an output that it cannot write is copied out of one.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from portattn.backends.triton.hopper_adapter import TensorDescriptor, gl
from portattn.backends.triton.hopper_config import CONSUMER_ROWS, block_width

if TYPE_CHECKING:
    import torch

    from portattn.backends.base import AttentionInputs
    from portattn.backends.triton.fast_launch import Describe
    from portattn.backends.triton.hopper_config import TritonForwardHopperConfig
    from portattn.backends.triton.hopper_variant import HopperPass

_ALIGN_ELEMENTS = 8  # 16 bytes of a 16-bit type
_MAP_LAYOUT = gl.NVMMASharedLayout(128, 16, rank=5)


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether TMA reads and writes the tensor: 16-byte aligned rows, and no strides of 0."""
    if tensor.data_ptr() % 16 or (tensor.shape[3] > 1 and tensor.stride(3) != 1):
        return False
    return all(
        tensor.shape[dim] == 1
        or (tensor.stride(dim) > 0 and tensor.stride(dim) % _ALIGN_ELEMENTS == 0)
        for dim in (0, 1, 2)
    )


def aligned_like(tensor: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor of the same shape that TMA reads and writes."""
    *sizes, width = tensor.shape
    padded = -(-width // _ALIGN_ELEMENTS) * _ALIGN_ELEMENTS
    return tensor.new_empty((*sizes, padded))[..., :width]


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy that TMA reads."""
    return tensor if is_readable(tensor) else aligned_like(tensor).copy_(tensor)


def long_residues(length: int, step: int) -> int:
    """How many residues, the first ones, have as many rows as residue 0."""
    return length % step or step


def describe(
    step: int, short: bool, rows: int, width: int, tensor: torch.Tensor
) -> TensorDescriptor:
    """The map of a tensor [batch, heads, length, dim] for rows of one step.

    Args:
        step: of the rows.
        short: of the residues that have a row less than residue 0; if there are none, the others'.
        rows, width: of the box that one copy moves.
        tensor: readable.
    """
    batch, heads, length, dim = tensor.shape
    strides = [tensor.stride(i) if tensor.shape[i] > 1 else 0 for i in (0, 1, 2)]
    # The stride of a dimension of one element is never used, but the driver must take it.
    row = strides[2] or -(-dim // _ALIGN_ELEMENTS) * _ALIGN_ELEMENTS
    head = strides[1] or row * length
    batch_stride = strides[0] or head * heads
    residues = long_residues(length, step)
    count = -(-length // step)
    if short and residues != step and count > 1:
        residues, count = step, count - 1
    return TensorDescriptor(
        tensor,
        [batch, heads, residues, count, dim],
        [batch_stride, head, row, row * step, 1],
        [1, 1, 1, rows, width],
        _MAP_LAYOUT,
    )


def pass_maps(
    inputs: AttentionInputs, config: TritonForwardHopperConfig, shape: HopperPass
) -> dict[str, Describe]:
    """What makes each descriptor, by parameter; its first letter says of which tensor."""
    width_d, width_dv = block_width(inputs.query.shape[3]), block_width(inputs.value.shape[3])
    boxes = {
        "q": (CONSUMER_ROWS, width_d),
        "k": (config.block_k, width_d),
        "v": (config.block_k, width_dv),
        "out": (CONSUMER_ROWS, width_dv),
    }
    make = functools.partial
    maps: dict[str, Describe] = {}
    for name, box in boxes.items():
        if name in ("q", "out"):
            maps[f"{name}_desc"] = make(describe, shape.q_step, False, *box)
            if shape.stepped:
                maps[f"{name}_short"] = make(describe, shape.q_step, True, *box)
        else:
            maps[f"{name}_desc"] = make(describe, 1, False, *box)
            if shape.stepped:
                maps[f"{name}_long"] = make(describe, shape.k_step, False, *box)
                maps[f"{name}_short"] = make(describe, shape.k_step, True, *box)
    return maps
