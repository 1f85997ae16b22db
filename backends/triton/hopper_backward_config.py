"""Configs of the Hopper backward."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from portattn.backends.base import Config

if TYPE_CHECKING:
    from portattn.backends.triton.limits import DeviceLimits
    from portattn.problem import AttentionProblem

BLOCK_Q, BLOCK_K = 64, 128  # queries and keys of a tile
MAX_STAGES = 3  # what hopper_primitives has named barriers for


@dataclasses.dataclass(frozen=True, slots=True)
class TritonBackwardHopperConfig(Config):
    """How one backward runs.

    Attributes:
        num_stages: query tiles in flight.
        registers: of a consumer's thread.
        head_group: KV heads whose items run next to each other and share the L2 cache.
        min_piece: a column is never cut into pieces of fewer tiles.
    """

    num_stages: int = 3
    registers: int = 240
    head_group: int = 4
    min_piece: int = 16


def width_of(head_dim: int, head_dim_v: int) -> int:
    """Columns of all tiles: 64 or 128."""
    return 64 if max(head_dim, head_dim_v) <= 64 else 128


def default_for(problem: AttentionProblem) -> TritonBackwardHopperConfig:
    """A good config for a problem, without tuning."""
    width = width_of(problem.head_dim, problem.head_dim_v)
    # Queries and their gradients of the heads that run next to each other, half the L2 cache.
    bytes_per_head = problem.seqlen_q * width * 4 * problem.group_size
    heads = max(1, (16 << 20) // max(bytes_per_head, 1))
    head_group = 1 << (min(heads, 16).bit_length() - 1)
    return TritonBackwardHopperConfig(3, 240, head_group)


def shared_bytes(width: int, num_stages: int) -> int:
    """Shared memory of a program, slightly above what the compiler allocates."""
    tiles = (2 * BLOCK_K + 2 * num_stages * BLOCK_Q) * width * 2 + 2 * BLOCK_K * BLOCK_Q * 2
    tiles += BLOCK_Q * width * 4  # dQ
    return tiles + 2 * num_stages * BLOCK_Q * 4 + 512  # and barriers


def infeasible(
    problem: AttentionProblem, config: TritonBackwardHopperConfig, limits: DeviceLimits
) -> list[str]:
    """Why a config cannot run a problem on a device with these limits."""
    reasons = []
    if not 1 < config.num_stages <= MAX_STAGES:
        reasons.append(f"num_stages is {config.num_stages}; it must be 2 to {MAX_STAGES}")
    if config.registers not in (216, 224, 232, 240):
        reasons.append(f"registers is {config.registers}; it must be 216, 224, 232 or 240")
    reasons += [
        f"{name} is {getattr(config, name)}; it must be at least 1"
        for name in ("head_group", "min_piece")
        if getattr(config, name) < 1
    ]
    needed = shared_bytes(width_of(problem.head_dim, problem.head_dim_v), config.num_stages)
    if needed > limits.shared_bytes:
        reasons.append(
            f"needs {needed} bytes of shared memory; {limits.arch} has {limits.shared_bytes}"
        )
    return reasons
