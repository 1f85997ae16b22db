"""Which variant of the forward kernel a pass of a call runs: its compile-time constants."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from portattn.backends.triton.limits import next_power_of_2

if TYPE_CHECKING:
    from portattn.backends.base import AttentionInputs
    from portattn.backends.triton.config import TritonForwardConfig

TCGEN05 = ("sm_100", "sm_103", "sm_110")


@dataclasses.dataclass(frozen=True, slots=True)
class PassShape:
    """What one pass needs of the kernel: its items, and which tiles occur in it."""

    first_item: int
    num_items: int
    stepped: bool
    ids: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """The compile-time side of one launch, in the order of the kernel's last parameters."""

    block_q: int
    block_k: int
    head_dim: int
    head_dim_v: int
    block_d: int
    block_dv: int
    vector: int
    tma: bool
    stepped: bool
    ids: bool
    pieces: bool
    first: bool
    last: bool
    scaled: bool
    softcap: bool
    alibi: bool
    bias: bool
    bias_wide: bool
    sinks: bool
    store_lse: bool
    precision: str
    partial_stages: int

    def values(self) -> tuple[int | bool | str, ...]:
        """The fields, in order."""
        return tuple(getattr(self, name) for name in self.__slots__)

    def constants(self) -> dict[str, int | bool | str]:
        """By the kernel's parameter names."""
        return {name.upper(): getattr(self, name) for name in self.__slots__}


def make_variant(
    inputs: AttentionInputs,
    config: TritonForwardConfig,
    shape: PassShape,
    *,
    arch: str,
    vector: int,
    tma: bool,
    pieces: bool,
    first: bool,
    last: bool,
) -> Variant:
    """The variant of the kernel that computes one pass of a call."""
    head_dim, head_dim_v = inputs.query.shape[3], inputs.value.shape[3]
    features = (
        inputs.softcap != 0.0,
        inputs.alibi_slopes is not None,
        inputs.bias is not None,
    )
    # max(S) * scale is the maximum of S * scale only for scale > 0.
    scaled = any(features) or inputs.scale <= 0.0
    return Variant(
        config.block_q,
        config.block_k,
        head_dim,
        head_dim_v,
        max(16, next_power_of_2(head_dim)),
        max(16, next_power_of_2(head_dim_v)),
        vector,
        tma,
        shape.stepped,
        shape.ids,
        pieces,
        first,
        last,
        scaled,
        *features,
        inputs.bias is not None and _is_wide(inputs.bias),
        inputs.sinks is not None,
        inputs.lse is not None,
        config.precision if inputs.query.dtype == torch.float32 else "ieee",
        # Triton 3.6 and 3.9 fail an assertion when they pipeline such a loop for tcgen05.
        1 if arch in TCGEN05 and (scaled or shape.ids) else config.partial_stages,
    )


def _is_wide(bias: torch.Tensor) -> bool:
    """Whether an offset inside one head of the bias needs int64."""
    last = (bias.shape[2] - 1) * bias.stride(2) + (bias.shape[3] - 1) * bias.stride(3)
    return last >= 1 << 31
