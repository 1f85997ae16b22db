"""Config of the sm_80 forward kernel, the variants it compiles to, and what fits on a device."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from portattn.backends.base import Config
from portattn.backends.cupy.loader import Program
from portattn.masks.opcodes import BAND, instructions, is_bound

if TYPE_CHECKING:
    from portattn.problem import AttentionProblem

BLOCKS_Q = (64, 128)
BLOCKS_K = (16, 32, 64, 128)
WARPS = (4, 8)
STAGES = (1, 2, 3)
BLOCKS_PER_SM = (1, 2, 3, 4)
HEAD_GROUPS = (1, 2, 4, 8, 16)

DTYPE_CODES = {"float16": 0, "bfloat16": 1, "float32": 2}

# Most shared memory of one block, KB (CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability"); other capabilities from 8.0 on have 99.
_SHARED_KB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
_RESERVED_SHARED_BYTES = 1024  # per block, by the runtime
_REGISTERS_PER_SM = 65536
# Registers beside the accumulators without which the loop spills badly (ptxas reports of the
# variants).
_OTHER_REGISTERS = 48


@dataclasses.dataclass(frozen=True, slots=True)
class ForwardSm80Config(Config):
    """How the kernel runs.

    Attributes:
        block_q: query rows of a block, 64 or 128.
        block_k: keys of a tile, 16 (for float32 with large head dims), 32, 64 or 128.
        num_warps: 4 or 8; each takes block_q / num_warps rows, 16 or 32.
        num_stages: buffers of K and of V, 1 to 3; with 1, the next K comes during the softmax and
            P V, and V during Q K.
        blocks_per_sm: blocks that registers are limited for; more hide latency, fewer spill less.
        head_group: heads whose items run at the same time; decides what stays in the L2 cache.
    """

    block_q: int = 64
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 2
    blocks_per_sm: int = 2
    head_group: int = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """What is compiled: a closed list; lengths and masks are not in it.

    Attributes:
        dtype: a key of DTYPE_CODES.
        head_dim, head_dim_v: padded to a multiple of 32.
        aligned: every row of the tensors starts at a multiple of 16 bytes.
        softcap, alibi, bias: score terms.
        config: its compile-time fields matter only.
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    aligned: bool
    softcap: bool
    alibi: bool
    bias: bool
    config: ForwardSm80Config

    def program(self, arch: str) -> Program:
        """What NVRTC compiles for an architecture."""
        return Program("forward_sm80.cu", "portattn_forward_sm80", self.defines(), arch)

    def defines(self) -> tuple[tuple[str, int], ...]:
        """The macros of config.cuh."""
        config = self.config
        return (
            ("PA_ALIBI", int(self.alibi)),
            ("PA_ALIGNED", int(self.aligned)),
            ("PA_BIAS", int(self.bias)),
            ("PA_BLOCKS_PER_SM", config.blocks_per_sm),
            ("PA_BLOCK_K", config.block_k),
            ("PA_BLOCK_Q", config.block_q),
            ("PA_DTYPE", DTYPE_CODES[self.dtype]),
            ("PA_HEAD_DIM", self.head_dim),
            ("PA_HEAD_DIM_V", self.head_dim_v),
            ("PA_NUM_STAGES", config.num_stages),
            ("PA_NUM_WARPS", config.num_warps),
            ("PA_SOFTCAP", int(self.softcap)),
        )

    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return shared_bytes(self.dtype, self.head_dim, self.head_dim_v, self.config)


@functools.lru_cache(maxsize=1024)
def variant(
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    aligned: bool,
    terms: tuple[bool, bool, bool],
    config: ForwardSm80Config,
) -> Variant:
    """The variant that serves these head dims, not padded yet.

    Args:
        dtype, aligned: see `Variant`.
        head_dim, head_dim_v: of the call.
        terms: whether there are softcap, alibi and bias.
        config: the call's.
    """
    # The order of heads is no compile-time matter.
    compiled = dataclasses.replace(config, head_group=1)
    return Variant(dtype, padded(head_dim), padded(head_dim_v), aligned, *terms, compiled)


def padded(head_dim: int) -> int:
    """The head dim that is compiled for."""
    return -(-head_dim // 32) * 32


def shared_bytes(dtype: str, head_dim: int, head_dim_v: int, config: ForwardSm80Config) -> int:
    """Dynamic shared memory of a block, for padded head dims, as forward_sm80.cu lays it out.

    Q, and the stages of K and V; at least what storing O takes.
    """
    element = 4 if dtype == "float32" else 2
    stages = config.num_stages * config.block_k * (head_dim + head_dim_v)
    return max(element * (config.block_q * head_dim + stages), config.num_warps * 16 * 32 * 4)


def shared_limit(capability: tuple[int, int]) -> int:
    """Most bytes of shared memory that a block may have."""
    return _SHARED_KB.get(capability, 99) * 1024


def accumulators(head_dim_v: int, config: ForwardSm80Config) -> int:
    """Registers per thread of O and S."""
    row_tiles = config.block_q // (16 * config.num_warps)
    return row_tiles * (head_dim_v + config.block_k) // 2


def infeasible_reasons(
    problem: AttentionProblem, config: ForwardSm80Config, capability: tuple[int, int]
) -> list[str]:
    """Why the config cannot run the problem on a device; empty if it can."""
    allowed = {
        "block_q": BLOCKS_Q,
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
    if config.head_group < 1:
        reasons.append(f"head_group is {config.head_group}; it must be at least 1")
    if reasons:
        return reasons
    rows_per_warp = config.block_q / config.num_warps
    if rows_per_warp not in (16, 32):
        return [f"block_q / num_warps is {rows_per_warp:g}; a warp takes 16 or 32 rows"]
    return _resource_reasons(problem, config, capability)


def _resource_reasons(
    problem: AttentionProblem, config: ForwardSm80Config, capability: tuple[int, int]
) -> list[str]:
    reasons = []
    head_dim, head_dim_v = padded(problem.head_dim), padded(problem.head_dim_v)
    need, limit = (
        shared_bytes(problem.dtype, head_dim, head_dim_v, config),
        shared_limit(capability),
    )
    # An SM has 1 KB more than one block may take (sm_90: 228 and 227), and each block pays 1 KB.
    blocks = config.blocks_per_sm
    if blocks * (need + _RESERVED_SHARED_BYTES) > limit + _RESERVED_SHARED_BYTES:
        reasons.append(
            f"{blocks} block(s) of {need} bytes of shared memory do not fit an SM of compute "
            f"capability {capability[0]}.{capability[1]}, which has {limit} for one"
        )
    registers = min(255, _REGISTERS_PER_SM // (32 * config.num_warps * blocks) // 8 * 8)
    used = accumulators(head_dim_v, config) + _OTHER_REGISTERS
    if used > registers:
        reasons.append(f"about {used} registers a thread are needed and {registers} are there")
    return reasons


# Tried in this order; the first that fits is the default. For 16-bit inputs they were chosen to
# need no spills (at most one pointer); tests/cupy/test_compile.py holds head dims 64, 128 and 256
# to it.
_HALF_DEFAULTS = (
    ForwardSm80Config(64, 64, 4, 2, 2),
    ForwardSm80Config(64, 64, 4, 1, 2),
    ForwardSm80Config(64, 32, 4, 1, 2),
    ForwardSm80Config(64, 32, 4, 1, 1),
)
# By head dim, before the above for long rows without score terms: 32 rows a warp halve what it
# reads of K and V from shared memory, and the largest tiles spare barriers and copies. The first
# of each is the best of a sweep on an H100 (benchmarks/results/h100_sm80_sweep.json) of an earlier
# state of the kernel, where many heads at a time, the longest items of all of them first, were 2
# to 5 % faster on causal rows and no slower on dense ones.
_DENSE_DEFAULTS = {
    64: (
        ForwardSm80Config(128, 128, 4, 1, 2, 16),
        ForwardSm80Config(128, 64, 4, 2, 2, 16),
    ),
    128: (
        ForwardSm80Config(128, 64, 4, 2, 2, 16),
        ForwardSm80Config(128, 64, 4, 1, 2, 16),
    ),
    256: (
        ForwardSm80Config(128, 64, 8, 2, 1, 16),
        ForwardSm80Config(64, 64, 4, 1, 2, 16),
        ForwardSm80Config(128, 64, 8, 1, 1, 16),
        ForwardSm80Config(128, 32, 8, 1, 1, 16),
    ),
}
_FLOAT_DEFAULTS = (  # FMAs are unrolled over block_k
    ForwardSm80Config(64, 32, 4, 2, 2),
    ForwardSm80Config(64, 32, 4, 1, 2),
    ForwardSm80Config(64, 32, 4, 1, 1),
    ForwardSm80Config(64, 16, 4, 1, 1),
)
# O and S with more registers than this leave too few for the score terms.
_MOST_ACCUMULATORS = 144
_TERMS = frozenset({"softcap", "alibi", "bias"})


def _is_dense(program: tuple[int, ...]) -> bool:
    """No mask, or one band that is open on a side, as causal is: large tiles waste little."""
    found = list(instructions(program))
    return not found or (
        len(found) == 1 and found[0][0] == BAND and not all(map(is_bound, found[0][1]))
    )


def _wide_candidates(problem: AttentionProblem) -> tuple[ForwardSm80Config, ...]:
    if problem.dtype == "float32" or problem.seqlen_q <= 64 or problem.features & _TERMS:
        return ()
    if not _is_dense(problem.program):
        return ()
    width = max(problem.head_dim, problem.head_dim_v)
    return _DENSE_DEFAULTS[min(w for w in _DENSE_DEFAULTS if width <= w)]


@functools.lru_cache(maxsize=256)
def default_config(problem: AttentionProblem, capability: tuple[int, int]) -> ForwardSm80Config:
    """The first of the defaults that fits the device."""
    for config in _wide_candidates(problem):
        if not infeasible_reasons(problem, config, capability):
            return config
    candidates = _FLOAT_DEFAULTS if problem.dtype == "float32" else _HALF_DEFAULTS
    for config in candidates:
        fits = not infeasible_reasons(problem, config, capability)
        if fits and accumulators(padded(problem.head_dim_v), config) <= _MOST_ACCUMULATORS:
            return config
    return candidates[-1]
