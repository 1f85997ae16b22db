"""Config of the decode kernel, the variants it compiles to, and what fits on a device."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from portattn.backends.base import Config
from portattn.backends.cupy.config import padded, shared_limit
from portattn.backends.cupy.loader import Program

if TYPE_CHECKING:
    from portattn.problem import AttentionProblem

BLOCKS_K = (16, 32, 64)
WARPS = (2, 4, 8)
STAGES = (2, 3, 4, 5, 6)
BLOCKS_PER_SM = (1, 2, 3)
MIN_ROUNDS = (1, 2, 4, 8)

DTYPES = ("float16", "bfloat16")
HEADERS = (
    "decode_config.cuh",
    "decode_merge.cuh",
    "decode_params.cuh",
    "decode_ptx.cuh",
    "decode_strip.cuh",
    "decode_work.cuh",
    "ptx.cuh",
)

_RESERVED_SHARED_BYTES = 1024  # per block, by the runtime
_REGISTERS_PER_SM = 65536
# Registers beside O, S and the query without which ptxas spills (its reports of the variants).
_OTHER_REGISTERS = 80


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeConfig(Config):
    """How the kernel runs.

    Attributes:
        block_k: keys of a strip, which the warps of a key group take at a time: 16, 32 or 64.
        num_warps: 2, 4 or 8; the more, the more strips a block has under way.
        num_stages: strips of a key group in shared memory, 2 to 6; one is computed while the
            others come.
        blocks_per_sm: blocks that share an SM.
        min_rounds: strips of each key group that a block takes at least: short sequences are not
            cut finer.
    """

    block_k: int = 32
    num_warps: int = 4
    num_stages: int = 2
    blocks_per_sm: int = 1
    min_rounds: int = 2


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeVariant:
    """What is compiled: a closed list; lengths and masks are not in it.

    Attributes:
        dtype: float16 or bfloat16.
        head_dim, head_dim_v: padded to a multiple of 32.
        block_q: 16, 32 or 64 rows.
        aligned: every row of the tensors starts at a multiple of 16 bytes, and the query's have
            an even number of elements.
        softcap, alibi, bias: score terms.
        config: its compile-time fields matter only.
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    block_q: int
    aligned: bool
    softcap: bool
    alibi: bool
    bias: bool
    config: DecodeConfig

    def program(self, arch: str) -> Program:
        """What NVRTC compiles for an architecture."""
        return Program("decode.cu", "portattn_decode", self.defines(), arch, HEADERS)

    def defines(self) -> tuple[tuple[str, int], ...]:
        """The macros of decode_config.cuh."""
        config = self.config
        return (
            ("PA_ALIBI", int(self.alibi)),
            ("PA_ALIGNED", int(self.aligned)),
            ("PA_BFLOAT16", int(self.dtype == "bfloat16")),
            ("PA_BIAS", int(self.bias)),
            ("PA_BLOCKS_PER_SM", config.blocks_per_sm),
            ("PA_BLOCK_K", config.block_k),
            ("PA_BLOCK_Q", self.block_q),
            ("PA_HEAD_DIM", self.head_dim),
            ("PA_HEAD_DIM_V", self.head_dim_v),
            ("PA_NUM_STAGES", config.num_stages),
            ("PA_NUM_WARPS", config.num_warps),
            ("PA_SOFTCAP", int(self.softcap)),
        )

    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return shared_bytes(self.head_dim, self.head_dim_v, self.block_q, self.config)


@functools.lru_cache(maxsize=1024)
def variant(
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    rows: int,
    aligned: bool,
    terms: tuple[bool, bool, bool],
    config: DecodeConfig,
) -> DecodeVariant:
    """The variant that serves these head dims, not padded yet.

    Args:
        dtype, aligned: see `DecodeVariant`.
        head_dim, head_dim_v: of the call.
        rows: query heads of a KV head times queries.
        terms: whether there are softcap, alibi and bias.
        config: the call's.
    """
    compiled = dataclasses.replace(config, min_rounds=1)  # no compile-time matter
    return DecodeVariant(
        dtype, padded(head_dim), padded(head_dim_v), block_q(rows), aligned, *terms, compiled
    )


def block_q(rows: int) -> int:
    """Rows of a block, for query heads of a KV head times queries."""
    return 16 if rows <= 16 else 32 if rows <= 32 else 64


def key_groups(rows: int, config: DecodeConfig) -> int:
    """Groups of warps that walk strips of their own; a warp takes 16 rows."""
    return config.num_warps // (block_q(rows) // 16)


def shared_bytes(head_dim: int, head_dim_v: int, rows: int, config: DecodeConfig) -> int:
    """Dynamic shared memory of a block, for padded head dims, as decode_config.cuh lays it out."""
    strips = key_groups(rows, config) * config.num_stages
    merging = config.num_warps * (16 * head_dim_v + 16 * 16)
    query = 2 * block_q(rows) * head_dim
    return strips * config.block_k * 2 * (head_dim + head_dim_v) + merging + query + 16


def infeasible_reasons(
    problem: AttentionProblem, config: DecodeConfig, capability: tuple[int, int]
) -> list[str]:
    """Why the config cannot run the problem on a device; empty if it can."""
    allowed = {
        "block_k": BLOCKS_K,
        "num_warps": WARPS,
        "num_stages": STAGES,
        "blocks_per_sm": BLOCKS_PER_SM,
    }
    reasons = [
        f"{name} is {getattr(config, name)}; it must be one of {values}"
        for name, values in allowed.items()
        if getattr(config, name) not in values
    ]
    if config.min_rounds < 1:
        reasons.append(f"min_rounds is {config.min_rounds}; it must be at least 1")
    row_groups = block_q(num_rows(problem)) // 16
    if config.num_warps < row_groups:
        reasons.append(
            f"num_warps is {config.num_warps}; a warp takes 16 of {16 * row_groups} rows"
        )
    return reasons or _resource_reasons(problem, config, capability)


def _resource_reasons(
    problem: AttentionProblem, config: DecodeConfig, capability: tuple[int, int]
) -> list[str]:
    reasons = []
    head_dim, head_dim_v = padded(problem.head_dim), padded(problem.head_dim_v)
    need = shared_bytes(head_dim, head_dim_v, num_rows(problem), config)
    limit = shared_limit(capability)
    # An SM has 1 KB more than one block may take (sm_90: 228 and 227), and each block pays 1 KB.
    blocks = config.blocks_per_sm
    if blocks * (need + _RESERVED_SHARED_BYTES) > limit + _RESERVED_SHARED_BYTES:
        reasons.append(
            f"{blocks} block(s) of {need} bytes of shared memory do not fit an SM of compute "
            f"capability {capability[0]}.{capability[1]}, which has {limit} for one"
        )
    registers = min(255, _REGISTERS_PER_SM // (32 * config.num_warps * blocks) // 8 * 8)
    query = head_dim // 4 if head_dim <= 128 else 0
    used = query + head_dim_v // 2 + config.block_k // 2 + _OTHER_REGISTERS
    if used > registers:
        reasons.append(f"about {used} registers a thread are needed and {registers} are there")
    return reasons


def num_rows(problem: AttentionProblem) -> int:
    """Rows that a KV head's query heads and the queries make."""
    return problem.group_size * problem.seqlen_q


# Little's law asks for 19 KB under way on each SM of an H100 (3.1 TB/s times 0.8 us over 132 SMs).
# Measured there, 64 KB are enough; twice that was up to 3 % slower with random lengths.
_ENOUGH_BYTES = 65536
_CANDIDATES = (
    *(
        DecodeConfig(block_k, num_warps, num_stages)
        for block_k in (32, 16)
        for num_warps in (8, 4)
        for num_stages in (2, 3, 4, 5, 6)
    ),
    DecodeConfig(16, 2, 3),
    DecodeConfig(16, 2, 2),
)


def bytes_under_way(problem: AttentionProblem, config: DecodeConfig) -> int:
    """What a block has asked memory for while it computes."""
    strips = key_groups(num_rows(problem), config) * (config.num_stages - 1)
    return strips * config.block_k * 2 * (padded(problem.head_dim) + padded(problem.head_dim_v))


@functools.lru_cache(maxsize=256)
def default_config(problem: AttentionProblem, capability: tuple[int, int]) -> DecodeConfig:
    """The first candidate that fits the device and loads enough, or the one that loads most."""
    fitting = [
        config for config in _CANDIDATES if not infeasible_reasons(problem, config, capability)
    ]
    for config in fitting:
        if bytes_under_way(problem, config) >= _ENOUGH_BYTES:
            return config
    return max(
        fitting, key=lambda config: bytes_under_way(problem, config), default=_CANDIDATES[-1]
    )
