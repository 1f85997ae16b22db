"""How the Triton decode runs: its config, the defaults, what is feasible."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from portattn.backends.base import Config
from portattn.backends.triton.limits import (
    REGISTERS_PER_SM,
    SHARED_RESERVED_BYTES,
    DeviceLimits,
    forward_footprint,
    next_power_of_2,
)

if TYPE_CHECKING:
    from portattn.backends.triton.limits import Footprint
    from portattn.problem import AttentionProblem

_MAX_ACCUMULATORS = 192
_REGISTERS = 168  # a thread's, in tiles of 16 rows
# float32 products are unrolled to scalar FMAs; more of them than this a thread spill.
_MAX_SCALAR_FMAS = 512
# Two slots for each piece, of 128 rows of 256 floats: offsets fit int32 on 500 multiprocessors.
_MAX_PIECES_PER_SM = 64
# More packed rows than this are no decode: tiles of the forward kernels are faster.
MAX_ROWS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class TritonDecodeConfig(Config):
    """How one decode runs.

    Attributes:
        block_q: rows of a tile, (query row, head of the group) pairs; a power of two.
        block_k: keys of a tile; a power of two.
        num_warps: warps of a program.
        num_stages: key and value tiles in flight.
        pieces_per_sm: pieces that the whole call is cut into, for each multiprocessor. As many as
            run there at once are enough for one sequence; several times that balance many.
        min_piece: no piece has fewer tiles, unless its sequence has.
        precision: of float32 products: ``"ieee"``, or ``"tf32x3"`` (three tensor-core products).
    """

    block_q: int = 16
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 3
    pieces_per_sm: int = 2
    min_piece: int = 2
    precision: str = "ieee"


def rows_of(problem: AttentionProblem) -> int:
    """Rows that share a KV head's keys."""
    return problem.seqlen_q * problem.group_size


def decode_footprint(
    problem: AttentionProblem, config: TritonDecodeConfig, limits: DeviceLimits
) -> Footprint:
    """What one program takes; a model, slightly above what the compiler allocates."""
    bias = "bias" in problem.features
    element_bytes = 4 if problem.dtype == "float32" else 2
    forward = forward_footprint(
        block_q=config.block_q,
        block_k=config.block_k,
        head_dim=problem.head_dim,
        head_dim_v=problem.head_dim_v,
        element_bytes=element_bytes,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        partial_stages=config.num_stages,
        bias=bias,
        split_float32=config.precision == "tf32x3",
        limits=limits,
    )
    if limits.is_amd or (limits.has_wgmma and config.block_q >= 64 and element_bytes == 2):
        return forward
    # mma.sync and scalar products: a tile is in registers before its buffer is needed again, so
    # that there is one buffer less than stages. The query and the weights change their layout
    # through shared memory.
    width = _padded(problem.head_dim) + _padded(problem.head_dim_v)
    shared = max(config.num_stages - 1, 1) * config.block_k * width * element_bytes
    shared += config.block_q * (_padded(problem.head_dim) + config.block_k) * element_bytes + 1024
    if bias:
        shared += config.block_q * config.block_k * 4 + 1536
    if config.precision == "tf32x3":
        shared = max(shared, forward.shared_bytes)
    shared = max(shared, config.block_q * _padded(problem.head_dim_v) * 5 + 1024)
    return dataclasses.replace(forward, shared_bytes=shared)


def _padded(head_dim: int) -> int:
    return max(16, next_power_of_2(head_dim))


def _resident(problem: AttentionProblem, config: TritonDecodeConfig, limits: DeviceLimits) -> int:
    """Programs that fit on a multiprocessor."""
    shared = decode_footprint(problem, config, limits).shared_bytes + SHARED_RESERVED_BYTES
    by_registers = REGISTERS_PER_SM // (config.num_warps * 32 * _REGISTERS)
    return max(1, min(limits.shared_bytes_per_sm // shared, by_registers))


# (block_k, num_warps, num_stages), best first: a kernel that waits for memory wants bytes in
# flight. On an H100 a program of 64 keys and 3 stages holds up to two tiles of 32 KB at head_dim
# 128, and three programs fit: ten times what the memory's bandwidth times its latency asks for,
# and two load while the third computes.
_Shape = tuple[int, int, int]
_SHAPES: tuple[_Shape, ...] = (
    (64, 4, 2), (64, 4, 3), (32, 4, 4), (32, 4, 3), (32, 4, 2), (32, 8, 2), (32, 4, 1),
)  # fmt: skip
# Accumulators of many rows or wide heads need more threads.
_WIDE: tuple[_Shape, ...] = ((32, 8, 3), (32, 8, 2), (32, 8, 1))
_FLOAT32: tuple[_Shape, ...] = ((32, 8, 2), (16, 8, 2), (16, 4, 1))


def default_for(problem: AttentionProblem, limits: DeviceLimits) -> TritonDecodeConfig:
    """A good config for a problem on a device with these limits, without tuning."""
    is_float32 = problem.dtype == "float32"
    width = _padded(max(problem.head_dim, problem.head_dim_v))
    rows = max(16, next_power_of_2(rows_of(problem)))
    block_q = min(rows, 16 if is_float32 else 64)
    shapes = _SHAPES
    if is_float32:
        shapes = _FLOAT32
    elif block_q * width > 64 * 64:
        shapes = _WIDE
    config = TritonDecodeConfig(block_q)
    for block_k, num_warps, num_stages in shapes:
        config = TritonDecodeConfig(block_q, block_k, num_warps, num_stages)
        if not infeasible(problem, config, limits) and (
            num_warps == 8 or _resident(problem, config, limits) >= 2
        ):
            break
    # Measured on an H100: few sequences want no more pieces than keep the memory busy; many, of
    # unlike lengths, more and smaller ones, which fill the gaps.
    pieces_per_sm = 2 if problem.batch <= 16 else 8
    return dataclasses.replace(config, pieces_per_sm=pieces_per_sm)


def _field_reasons(config: TritonDecodeConfig) -> list[str]:
    reasons = []
    for name, allowed in (
        ("block_q", (16, 32, 64, 128)),
        ("block_k", (16, 32, 64, 128, 256)),
        ("num_warps", (1, 2, 4, 8)),
        ("num_stages", (1, 2, 3, 4, 5, 6)),
        ("precision", ("ieee", "tf32x3")),
    ):
        value = getattr(config, name)
        if value not in allowed:
            reasons.append(f"{name} is {value!r}; it must be one of {allowed}")
    if not 1 <= config.pieces_per_sm <= _MAX_PIECES_PER_SM:
        reasons.append(
            f"pieces_per_sm is {config.pieces_per_sm}; it must be 1 to {_MAX_PIECES_PER_SM}"
        )
    if config.min_piece < 1:
        reasons.append(f"min_piece is {config.min_piece}; it must be at least 1")
    return reasons


def infeasible(
    problem: AttentionProblem, config: TritonDecodeConfig, limits: DeviceLimits
) -> list[str]:
    """Why a config cannot run a problem on a device with these limits."""
    reasons = _field_reasons(config)
    if reasons:
        return reasons
    is_float32 = problem.dtype == "float32"
    if config.precision != "ieee" and (limits.is_amd or not is_float32):
        reasons.append(
            f"precision {config.precision!r} is for float32 on NVIDIA devices; use 'ieee'"
        )
    footprint = decode_footprint(problem, config, limits)
    if footprint.shared_bytes > limits.shared_bytes:
        reasons.append(
            f"needs {footprint.shared_bytes} bytes of shared memory; {limits.arch} has "
            f"{limits.shared_bytes}"
        )
    if footprint.accumulators > _MAX_ACCUMULATORS:
        reasons.append(
            f"needs {footprint.accumulators} accumulators a thread; above {_MAX_ACCUMULATORS} "
            "they spill"
        )
    width = next_power_of_2(max(problem.head_dim, problem.head_dim_v))
    fmas = config.block_q * config.block_k * width // (config.num_warps * 32)
    if is_float32 and config.precision == "ieee" and fmas > _MAX_SCALAR_FMAS:
        reasons.append(
            f"unrolls {fmas} scalar FMAs a thread; at most {_MAX_SCALAR_FMAS} compile in reason"
        )
    return reasons
