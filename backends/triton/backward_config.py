"""Configs of the plain Triton backward, and what they take."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

from portattn.backends.base import Config
from portattn.backends.triton.limits import (
    REGISTERS_PER_SM,
    SHARED_RESERVED_BYTES,
    DeviceLimits,
    next_power_of_2,
)

if TYPE_CHECKING:
    from portattn.problem import AttentionProblem

_MAX_GROUP_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class TritonBackwardConfig(Config):
    """How one backward runs: the kernel of dK and dV, then that of dQ.

    Attributes:
        column_block_q, column_block_k: rows and keys of a tile for dK and dV; powers of two.
        column_warps, column_stages: warps of a program; query tiles in flight among full ones.
        row_block_q, row_block_k, row_warps, row_stages: the same for dQ, with key tiles.
        head_group: heads whose items run next to each other and share the L2 cache.
        min_piece: a row or column is never cut into pieces of fewer tiles.
        precision: of float32 products: ``"ieee"``, or ``"tf32x3"`` (three tensor-core products).
    """

    column_block_q: int = 64
    column_block_k: int = 128
    column_warps: int = 8
    column_stages: int = 2
    row_block_q: int = 128
    row_block_k: int = 64
    row_warps: int = 8
    row_stages: int = 2
    head_group: int = 4
    min_piece: int = 8
    precision: str = "ieee"


_Shape = tuple[int, int, int, int]
# By width, largest first: (column's block_q, block_k, warps, stages), (row's ...).
_WIDE: dict[int, tuple[tuple[_Shape, _Shape], ...]] = {
    64: (
        ((64, 128, 8, 3), (128, 64, 8, 3)),
        ((64, 64, 4, 2), (64, 64, 4, 2)),
        ((32, 32, 4, 1), (32, 32, 4, 1)),
    ),
    128: (
        ((64, 128, 8, 2), (128, 64, 8, 2)),
        ((64, 64, 4, 2), (64, 64, 4, 2)),
        ((32, 64, 4, 1), (64, 32, 4, 1)),
        ((16, 32, 4, 1), (16, 32, 4, 1)),
    ),
    256: (
        ((32, 64, 8, 2), (64, 32, 8, 2)),
        ((32, 64, 8, 1), (64, 32, 8, 1)),
        ((16, 32, 4, 1), (16, 32, 4, 1)),
    ),
}
# Scalar FMAs hold whole rows of their operands in registers: small tiles, many threads.
_FLOAT32: dict[int, tuple[tuple[_Shape, _Shape], ...]] = {
    64: (((32, 32, 4, 1), (32, 32, 4, 1)),),
    128: (((32, 32, 8, 1), (32, 32, 8, 1)), ((16, 32, 8, 1), (16, 32, 8, 1))),
    256: (((16, 32, 8, 1), (16, 32, 8, 1)),),
}


def shape_of(config: TritonBackwardConfig, part: str) -> tuple[int, int, int, int]:
    """(block_q, block_k, warps, stages) of the ``"column"`` or the ``"row"`` kernel."""
    if part == "column":
        return (
            config.column_block_q, config.column_block_k, config.column_warps,
            config.column_stages,
        )  # fmt: skip
    return config.row_block_q, config.row_block_k, config.row_warps, config.row_stages


def block_width(head_dim: int) -> int:
    """Columns of a tile: the power of two that holds a row."""
    return max(16, next_power_of_2(head_dim))


def default_for(problem: AttentionProblem, limits: DeviceLimits) -> TritonBackwardConfig:
    """A good config for a problem on a device with these limits, without tuning."""
    width = max(64, block_width(max(problem.head_dim, problem.head_dim_v)))
    table = (_FLOAT32 if problem.dtype == "float32" else _WIDE)[width]
    bytes_per_head = problem.seqlen_k * (problem.head_dim + problem.head_dim_v)
    bytes_per_head *= 4 if problem.dtype == "float32" else 2
    heads = max(1, _MAX_GROUP_BYTES // max(bytes_per_head, 1))
    head_group = min(next_power_of_2(heads + 1) // 2, 16)
    config = TritonBackwardConfig()
    for column, row in table:
        config = TritonBackwardConfig(*column, *row, head_group)
        if not infeasible(problem, config, limits):
            break
    return config


def _field_reasons(config: TritonBackwardConfig) -> list[str]:
    reasons = []
    allowed = {
        "block_q": (16, 32, 64, 128, 256),
        "block_k": (32, 64, 128, 256),
        "warps": (1, 2, 4, 8, 16),
        "stages": (1, 2, 3, 4, 5),
    }
    for part, (name, values) in itertools.product(("column", "row"), allowed.items()):
        value = getattr(config, f"{part}_{name}")
        if value not in values:
            reasons.append(f"{part}_{name} is {value!r}; it must be one of {values}")
    reasons += [
        f"{name} is {getattr(config, name)}; it must be at least 1"
        for name in ("head_group", "min_piece")
        if getattr(config, name) < 1
    ]
    if config.precision not in ("ieee", "tf32x3"):
        reasons.append(f"precision is {config.precision!r}; it must be 'ieee' or 'tf32x3'")
    return reasons


def infeasible(
    problem: AttentionProblem, config: TritonBackwardConfig, limits: DeviceLimits
) -> list[str]:
    """Why a config cannot run a problem on a device with these limits."""
    reasons = _field_reasons(config)
    if reasons:
        return reasons
    if config.precision != "ieee" and (limits.is_amd or problem.dtype != "float32"):
        reasons.append(
            f"precision {config.precision!r} is for float32 on NVIDIA devices; use 'ieee'"
        )
    size = 4 if problem.dtype == "float32" else 2
    has_bias = "bias" in problem.features
    for part in ("column", "row"):
        needed = shared_bytes(
            config, part, problem.head_dim, problem.head_dim_v, size, limits, bias=has_bias
        )
        if needed > limits.shared_bytes:
            reasons.append(
                f"the {part} kernel needs {needed} bytes of shared memory; {limits.arch} has "
                f"{limits.shared_bytes}"
            )
    return reasons


def shared_bytes(
    config: TritonBackwardConfig,
    part: str,
    head_dim: int,
    head_dim_v: int,
    element_bytes: int,
    limits: DeviceLimits,
    *,
    bias: bool,
) -> int:
    """A model of a program's shared memory, slightly above what the compiler allocates.

    The resident pair of tiles and the stages of the walked pair, of which mma.sync keeps one in
    registers; P on its way to another layout; a bias, which is staged and changes its layout too.
    """
    block_q, block_k, _, stages = shape_of(config, part)
    width = (block_width(head_dim) + block_width(head_dim_v)) * element_bytes
    resident, walked = (block_k, block_q) if part == "column" else (block_q, block_k)
    if not limits.has_wgmma or element_bytes == 4:
        stages = max(stages - 1, 1)
    scores = block_q * block_k * (element_bytes + (4 + 2 * stages if bias else 0))
    if limits.has_wgmma and limits.capability >= 100:
        scores += 2 * block_q * block_k * element_bytes  # both products lie there for tcgen05
    return (resident + stages * walked) * width + scores + 8192


def workers_of(
    config: TritonBackwardConfig, part: str, head_dim: int, head_dim_v: int, element_bytes: int,
    limits: DeviceLimits,
) -> int:  # fmt: skip
    """Programs that run at once: multiprocessors times the programs that fit on one."""
    needed = shared_bytes(config, part, head_dim, head_dim_v, element_bytes, limits, bias=False)
    by_shared = limits.shared_bytes_per_sm // (needed + SHARED_RESERVED_BYTES)
    by_registers = REGISTERS_PER_SM // (shape_of(config, part)[2] * 32 * 256)
    return limits.num_sms * max(1, min(by_shared, by_registers))
