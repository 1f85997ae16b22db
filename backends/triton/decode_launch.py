"""Launches of the decode kernel: what a call's sizes and strides fix is worked out once."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from portattn.backends.repeated import (
    BIAS,
    COUNTERS,
    KEY,
    KV_LENGTHS,
    LSE,
    OUTPUT,
    QUERY,
    SCRATCH,
    SINKS,
    SLOPES,
    VALUE,
    RepeatedCall,
    call_key,
    current_device,
)
from portattn.backends.scalar_mask import streaming_mask
from portattn.backends.stream_memory import arrival_counters
from portattn.backends.triton import decode_kernel
from portattn.backends.triton.fast_launch import KeptCall, RepeatedLaunch, repeated_call
from portattn.backends.triton.geometry import slope_strides, strides_of, vector_elements
from portattn.backends.triton.limits import device_limits, next_power_of_2

if TYPE_CHECKING:
    from collections.abc import Hashable

    from portattn.backends.base import AttentionInputs, Kernel
    from portattn.backends.scalar_mask import ScalarMask
    from portattn.backends.triton.decode_config import TritonDecodeConfig

_MAX_CALLS = 1024
# Sequences that are planned together, by lanes of one warp or of all. Of more sequences each group
# has its share of the pieces.
PLAN_BATCHES = (32, 256)
_MAX_MERGE_ROWS = 16
_MERGE_REGISTERS = 32  # a thread's share of the slots that are read at once


@dataclasses.dataclass(frozen=True, slots=True)
class Constants:
    """The compile-time side of a launch, in the order of the kernel's last parameters."""

    block_q: int
    block_k: int
    head_dim: int
    head_dim_v: int
    block_d: int
    block_dv: int
    vector: int
    lengths: bool
    scaled: bool
    softcap: bool
    alibi: bool
    bias: bool
    sinks: bool
    store_lse: bool
    merge_rows: int
    merge_batch: int
    plan_batch: int
    precision: str

    def values(self) -> tuple[int | bool | str, ...]:
        """The fields, in order."""
        return tuple(getattr(self, name) for name in self.__slots__)

    def by_name(self) -> dict[str, int | bool | str]:
        """By the kernel's parameter names."""
        return {name.upper(): getattr(self, name) for name in self.__slots__}


def plan_batch(batch: int) -> int:
    """Sequences that are planned together in a call of `batch`."""
    return PLAN_BATCHES[0] if batch <= PLAN_BATCHES[0] else PLAN_BATCHES[1]


def make_constants(
    inputs: AttentionInputs, config: TritonDecodeConfig, vector: int, rows: int
) -> Constants:
    """The variant of the kernel that computes a call; `rows` share a KV head."""
    head_dim, head_dim_v = inputs.query.shape[3], inputs.value.shape[3]
    features = (
        inputs.softcap != 0.0,
        inputs.alibi_slopes is not None,
        inputs.bias is not None,
    )
    block_dv = max(16, next_power_of_2(head_dim_v))
    merge_rows = next_power_of_2(min(rows, config.block_q, _MAX_MERGE_ROWS))
    merge_elements = _MERGE_REGISTERS * 32 * config.num_warps
    return Constants(
        config.block_q,
        config.block_k,
        head_dim,
        head_dim_v,
        max(16, next_power_of_2(head_dim)),
        block_dv,
        vector,
        inputs.kv_lengths is not None,
        # max(S) * scale is the maximum of S * scale only for scale > 0.
        any(features) or inputs.scale <= 0.0,
        *features,
        inputs.sinks is not None,
        inputs.lse is not None,
        merge_rows,
        max(1, min(64, merge_elements // (merge_rows * block_dv))),
        plan_batch(inputs.query.shape[0]),
        config.precision if inputs.query.dtype == torch.float32 else "ieee",
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """What a call's sizes fix.

    Attributes:
        programs: of the grid.
        workspace: float32 elements of the slots.
        counters: arrival counters.
        integers: the kernel's integer arguments, in order.
        constants: its compile-time arguments.
    """

    programs: int
    workspace: int
    counters: int
    integers: tuple[int, ...]
    constants: Constants


def geometry_of(inputs: AttentionInputs, config: TritonDecodeConfig) -> Geometry:
    """Sizes, strides and the number of programs of a call.

    The host never reads kv_lengths: it starts as many programs as there can be pieces.
    """
    query, key, value, output = inputs.query, inputs.key, inputs.value, inputs.output
    batch, num_heads, seqlen_q, _ = query.shape
    num_kv_heads, seqlen_k = key.shape[1:3]
    group_size = num_heads // num_kv_heads
    rows = seqlen_q * group_size
    planned = streaming_mask(() if inputs.mask is None else inputs.mask.program)
    if planned is None:
        raise AssertionError("unsupported_reasons lets no such mask pass")
    scalars, first_keys = planned
    vector = vector_elements((query, key, value, output))
    constants = make_constants(inputs, config, vector, rows)
    row_blocks = -(-rows // config.block_q)
    heads = num_kv_heads * row_blocks
    num_sms = device_limits(str(query.device)).num_sms if query.is_cuda else 1
    groups = -(-batch // constants.plan_batch)
    group = min(batch, constants.plan_batch)
    target = max(1, num_sms * config.pieces_per_sm // (heads * groups))
    tiles = _most_tiles(scalars, first_keys, seqlen_k, seqlen_q, config.block_k)
    # Rounding up to whole pieces adds less than one for each sequence; a sequence that is cut has
    # more keys than a piece, so that rounding up less than doubles its pieces.
    max_pieces = min(target + group - 1, group * max(1, -(-tiles // config.min_piece)))
    group_slots = min(2 * target, max_pieces) if max_pieces > group else 0
    num_slots = groups * group_slots * heads
    slot_rows = min(rows, config.block_q)
    integers = (
        *strides_of(query, 3, vector),
        *strides_of(key, 3, vector),
        *strides_of(value, 3, vector),
        *strides_of(output, 3, vector),
        *strides_of(inputs.lse, 3),
        *slope_strides(inputs.alibi_slopes),
        *strides_of(inputs.bias, 4),
        inputs.q_offset,
        scalars.lo,
        scalars.hi,
        scalars.key_begin,
        scalars.key_end,
        first_keys,
        batch,
        num_kv_heads,
        group_size,
        rows,
        seqlen_q,
        seqlen_k,
        row_blocks,
        max_pieces,
        target,
        config.min_piece,
        slot_rows,
        group_slots,
        num_slots,
    )
    constants = make_constants(inputs, config, vector, rows)
    workspace = num_slots * slot_rows * (constants.block_dv + 1)
    return Geometry(groups * max_pieces * heads, workspace, batch * heads, integers, constants)


def _most_tiles(
    scalars: ScalarMask, first_keys: int, seqlen_k: int, seqlen_q: int, block_k: int
) -> int:
    """Most tiles that a block of rows can visit: an interval may start and end inside a tile."""
    width = max(0, scalars.hi - scalars.lo + seqlen_q)
    first = -(-first_keys // block_k)
    return min(-(-seqlen_k // block_k), -(-width // block_k) + 1 + first)


# What `DecodeCall._pointers` are, in order.
_SOURCES = (
    QUERY, KEY, VALUE, OUTPUT, LSE, SCRATCH, COUNTERS, KV_LENGTHS, SLOPES, BIAS, SINKS,
)  # fmt: skip


class DecodeCall(KeptCall):
    """One kind of call, ready to be repeated. Thread-safe."""

    def __init__(self, inputs: AttentionInputs, config: TritonDecodeConfig) -> None:
        """Work out the launch; nothing is launched yet.

        The tensors may be on the CPU where Triton's interpreter runs the kernel.
        """
        self.geometry = geometry = geometry_of(inputs, config)
        present = [tensor is not None for tensor in self._pointers(inputs, inputs.query)]
        arguments = [
            *[None] * len(present),
            *geometry.integers,
            inputs.scale,
            inputs.softcap,
            *geometry.constants.values(),
        ]
        self._launch = RepeatedLaunch(
            decode_kernel.decode_kernel,
            geometry.programs,
            arguments,
            {position: None for position, is_there in enumerate(present) if is_there},
            {
                "num_warps": config.num_warps,
                "num_stages": config.num_stages,
                "enable_fp_fusion": True,
            },
            inputs.query.device,
        )

    def run(self, inputs: AttentionInputs) -> None:
        """Launch on the inputs' device, which is the current one, and current stream."""
        if self.repeat(inputs) is not None:
            return
        slots = torch.empty(
            self.geometry.workspace, dtype=torch.float32, device=inputs.query.device
        )
        tensors = self._pointers(inputs, slots)
        self._launch([tensor for tensor in tensors if tensor is not None])
        sources = [
            (source, 0)
            for tensor, source in zip(tensors, _SOURCES, strict=True)
            if tensor is not None
        ]
        self.repeated = repeated_call(
            [(self._launch, sources)],
            inputs.query.device,
            scratch_floats=self.geometry.workspace,
            num_counters=self.geometry.counters,
        )

    def _pointers(
        self, inputs: AttentionInputs, slots: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """The kernel's first parameters."""
        return (
            inputs.query, inputs.key, inputs.value, inputs.output, inputs.lse, slots,
            arrival_counters(slots.device, self.geometry.counters), inputs.kv_lengths,
            inputs.alibi_slopes, inputs.bias, inputs.sinks,
        )  # fmt: skip


_calls: dict[Hashable, DecodeCall] = {}


def run_decode(
    kernel: Kernel, inputs: AttentionInputs, config: TritonDecodeConfig
) -> RepeatedCall | None:
    """Launch on the tensors' device and torch's current stream; see `Kernel.run`."""
    lengths = inputs.kv_lengths
    key = (
        call_key(kernel, inputs, config),
        inputs.mask,
        None if lengths is None else lengths.dtype,
    )
    call = _calls.get(key)
    if call is None:
        call = DecodeCall(inputs, config)
        if len(_calls) >= _MAX_CALLS:
            _calls.clear()
        _calls[key] = call
    with current_device(inputs.query.device):
        call.run(inputs)
    return call.repeated
