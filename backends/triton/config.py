"""How the Triton forward runs: its config, the defaults, what is feasible."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from portattn.backends.base import Config
from portattn.backends.triton.limits import (
    REGISTERS_PER_SM,
    SHARED_RESERVED_BYTES,
    DeviceLimits,
    forward_footprint,
    next_power_of_2,
)
from portattn.masks.opcodes import BAND, instructions, is_bound

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portattn.problem import AttentionProblem

# Past this many accumulators a thread spills: 128x128 tiles of head_dim 256 on 8 warps hold 192
# and compile to 250 registers, 256 do not fit.
_MAX_ACCUMULATORS = 192
# float32 products are unrolled to scalar FMAs; more of them than this a thread spill, and take
# minutes.
_MAX_SCALAR_FMAS = 512
_MAX_GROUP_BYTES = 16 << 20

_SPARSE_OPCODES = frozenset({4, 5, 6, 7, 8, 9, 10, 11, 18})


@dataclasses.dataclass(frozen=True, slots=True)
class TritonForwardConfig(Config):
    """How one forward runs.

    Attributes:
        block_q, block_k: rows and keys of a tile; powers of two.
        num_warps: warps of a program.
        num_stages: key and value tiles in flight among full tiles.
        partial_stages: the same among partial tiles; at most num_stages.
        tma: read step-1 tiles through tensor descriptors (sm_90 and later).
        head_group: heads whose items run next to each other and share the L2 cache.
        min_piece: a row is never cut into pieces of fewer tiles.
        precision: of float32 products: ``"ieee"``, or ``"tf32x3"`` (three tensor-core products).
    """

    block_q: int = 128
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 2
    partial_stages: int = 2
    tma: bool = False
    head_group: int = 4
    min_piece: int = 8
    precision: str = "ieee"


def is_sparse(program: Sequence[int]) -> bool:
    """Whether a mask program holds a pattern that keeps few keys of a row (causal does not)."""
    return any(
        opcode in _SPARSE_OPCODES or (opcode == BAND and all(map(is_bound, operands)))
        for opcode, operands in instructions(program)
    )


# (block_q, block_k, num_warps, num_stages, tma), best first; the first that fits is the default.
# Measured on an H100 for sm_90 at head_dim 64 and 128; the others by the same reasoning: largest
# tiles that do not spill.
_Shape = tuple[int, int, int, int, bool]
_WGMMA_DENSE: dict[int, tuple[_Shape, ...]] = {
    64: ((64, 128, 4, 3, True),),
    128: ((128, 128, 8, 3, True), (128, 64, 8, 2, True)),
    256: ((128, 64, 8, 2, True), (64, 64, 4, 2, True)),
}
_WGMMA_SPARSE: dict[int, tuple[_Shape, ...]] = {
    64: ((64, 64, 4, 3, True),),
    128: ((64, 64, 4, 3, True),),
    256: ((64, 64, 4, 2, True),),
}
_MMA: dict[int, tuple[_Shape, ...]] = {
    64: ((128, 64, 8, 3, False), (64, 64, 4, 2, False)),
    128: ((128, 64, 8, 3, False), (64, 64, 4, 2, False), (64, 32, 4, 1, False)),
    256: (
        (64, 64, 8, 2, False),
        (64, 32, 8, 2, False),
        (64, 32, 8, 1, False),
        (32, 32, 4, 1, False),
    ),
}
# Scalar FMAs hold whole rows of their operands in registers: small tiles, many threads.
_FLOAT32: dict[int, tuple[_Shape, ...]] = {
    64: ((32, 32, 4, 2, False),),
    128: ((32, 32, 8, 1, False),),
    256: ((16, 32, 8, 1, False),),
}


def _width_class(problem: AttentionProblem) -> int:
    width = max(16, next_power_of_2(max(problem.head_dim, problem.head_dim_v)))
    return max(64, width)


def _shapes(problem: AttentionProblem, limits: DeviceLimits) -> tuple[_Shape, ...]:
    width = _width_class(problem)
    if problem.dtype == "float32":
        return _FLOAT32[width]
    if not limits.has_wgmma:
        return _MMA[width]
    table = _WGMMA_SPARSE if is_sparse(problem.program) else _WGMMA_DENSE
    return table[width] + _MMA[width]


def default_for(problem: AttentionProblem, limits: DeviceLimits) -> TritonForwardConfig:
    """A good config for a problem on a device with these limits, without tuning."""
    rows = max(16, next_power_of_2(max(problem.seqlen_q, 1)))
    kv_bytes = problem.seqlen_k * (problem.head_dim + problem.head_dim_v)
    kv_bytes *= 4 if problem.dtype == "float32" else 2
    # As many KV heads as the L2 cache holds beside everything else, with all their query heads.
    kv_heads = max(1, _MAX_GROUP_BYTES // max(kv_bytes, 1))
    head_group = min(next_power_of_2(kv_heads + 1) // 2, 16) * problem.group_size
    config = TritonForwardConfig()
    for block_q, block_k, num_warps, num_stages, tma in _shapes(problem, limits):
        block_q, num_warps = (rows, 4) if rows < block_q else (block_q, num_warps)
        config = TritonForwardConfig(
            block_q,
            block_k,
            num_warps,
            num_stages,
            # Few of a dense row's tiles are partial: their loop is not worth shared memory that
            # TMA tiles need. Among sparse ones, a third stage less lets 64x64 tiles fit twice.
            1 if tma and not is_sparse(problem.program) else min(num_stages, 2),
            tma and limits.has_tma,
            head_group,
        )
        if not infeasible(problem, config, limits):
            break
    return config


def _field_reasons(config: TritonForwardConfig) -> list[str]:
    reasons = []
    for name, allowed in (
        ("block_q", (16, 32, 64, 128, 256)),
        ("block_k", (32, 64, 128, 256)),
        ("num_warps", (1, 2, 4, 8, 16)),
        ("num_stages", (1, 2, 3, 4, 5)),
        ("precision", ("ieee", "tf32x3")),
    ):
        value = getattr(config, name)
        if value not in allowed:
            reasons.append(f"{name} is {value!r}; it must be one of {allowed}")
    if not 1 <= config.partial_stages <= config.num_stages:
        reasons.append(
            f"partial_stages is {config.partial_stages}; it must be 1 to num_stages "
            f"({config.num_stages})"
        )
    if config.head_group < 1:
        reasons.append(f"head_group is {config.head_group}; it must be at least 1")
    if config.min_piece < 1:
        reasons.append(f"min_piece is {config.min_piece}; it must be at least 1")
    return reasons


def infeasible(
    problem: AttentionProblem, config: TritonForwardConfig, limits: DeviceLimits
) -> list[str]:
    """Why a config cannot run a problem on a device with these limits."""
    reasons = _field_reasons(config)
    if reasons:
        return reasons
    if config.tma and not limits.has_tma:
        reasons.append(f"tma needs sm_90 or later; the device is {limits.arch}")
    is_float32 = problem.dtype == "float32"
    if config.precision != "ieee" and (limits.is_amd or not is_float32):
        reasons.append(
            f"precision {config.precision!r} is for float32 on NVIDIA devices; use 'ieee'"
        )
    footprint = forward_footprint(
        block_q=config.block_q,
        block_k=config.block_k,
        head_dim=problem.head_dim,
        head_dim_v=problem.head_dim_v,
        element_bytes=4 if is_float32 else 2,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        partial_stages=config.partial_stages,
        bias="bias" in problem.features,
        split_float32=config.precision == "tf32x3",
        limits=limits,
    )
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


@functools.lru_cache(maxsize=256)
def workers_of(
    head_dim: int,
    head_dim_v: int,
    element_bytes: int,
    config: TritonForwardConfig,
    limits: DeviceLimits,
) -> int:
    """Programs that run at once: multiprocessors times the programs that fit on one."""
    footprint = forward_footprint(
        block_q=config.block_q,
        block_k=config.block_k,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        element_bytes=element_bytes,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        partial_stages=config.partial_stages,
        bias=False,
        split_float32=config.precision == "tf32x3",
        limits=limits,
    )
    by_shared = limits.shared_bytes_per_sm // (footprint.shared_bytes + SHARED_RESERVED_BYTES)
    # Kernels of these tiles take nearly all of the 255 registers that a thread may have.
    by_registers = REGISTERS_PER_SM // (config.num_warps * 32 * 256)
    return limits.num_sms * max(1, min(by_shared, by_registers))
