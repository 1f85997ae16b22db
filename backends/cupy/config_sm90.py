"""Config of the sm_90a forward kernel, the variants it compiles to, and what fits."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from portattn.backends.base import Config
from portattn.backends.cupy import wgmma
from portattn.backends.cupy.config import DTYPE_CODES, padded
from portattn.backends.cupy.loader import HEADERS, Program
from portattn.masks.opcodes import (
    BAND,
    BLOCK_TABLE,
    DIFF_MODULO,
    DOCUMENTS,
    KEY_MODULO,
    KEY_RANGE,
    KEY_SET,
    QUERY_RANGE,
    QUERY_SET,
    RANDOM_BLOCKS,
    SEGMENTS,
    block_sizes,
    instructions,
    is_bound,
)

if TYPE_CHECKING:
    from portattn.problem import AttentionProblem

CONSUMERS = (1, 2, 3)
BLOCKS_K = (64, 80, 96, 112, 128, 144, 160, 176, 192)
STAGES = (2, 3, 4)
HEAD_GROUPS = (1, 2, 4, 8, 16)
MAX_STEPS = 4  # distinct key steps above 1 that one pass may have

SHARED_LIMIT = 227 * 1024
_SHARED_PER_SM = 228 * 1024
_RESERVED_SHARED_BYTES = 1024  # per block, by the runtime
_STAGE_BYTES = 2048  # of a warp, for storing O
_WORK_SLOTS = 2
_WORK_BYTES = _WORK_SLOTS * 80 + 16
_ENTRY_BYTES = 2 * 16  # of a stage: what partial tiles mask
# Beside S, P and O, without which the loop spills (ptxas reports of the variants).
_OTHER_REGISTERS = 32


@dataclasses.dataclass(frozen=True, slots=True)
class ForwardSm90Config(Config):
    """How the kernel runs.

    Attributes:
        consumers: warpgroups of 64 query rows in a block, 1 to 3.
        block_k: keys of a tile, a multiple of 16 up to 192.
        num_stages: tiles of K and of V under way, 2 to 4.
        ping_pong: consumers issue their matrix products in turns.
        persistent: blocks stay and take work after work; else one block for each.
        blocks_per_sm: blocks that registers and shared memory are divided for.
        head_group: heads whose items run at the same time; decides what stays in the L2 cache.
        min_piece: a row is never cut into pieces of fewer tiles.
    """

    consumers: int = 2
    block_k: int = 128
    num_stages: int = 2
    ping_pong: bool = False
    persistent: bool = True
    blocks_per_sm: int = 1
    head_group: int = 4
    min_piece: int = 8

    @property
    def block_q(self) -> int:
        """Query rows of a block."""
        return 64 * self.consumers

    @property
    def threads(self) -> int:
        """Of a block: the consumers, and a warpgroup for the producer's sake."""
        return 128 * (self.consumers + 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """What is compiled: a closed list; lengths and masks are not in it.

    Attributes:
        dtype: ``"float16"`` or ``"bfloat16"``.
        head_dim, head_dim_v: padded to a multiple of 32.
        aligned: every row of the output starts at a multiple of 16 bytes.
        softcap, alibi, bias: score terms.
        scaled: the softmax scale goes to the scores: it is not positive, or next to 0.
        stepped: tiles may have steps above 1.
        config: its compile-time fields matter only.
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    aligned: bool
    softcap: bool
    alibi: bool
    bias: bool
    scaled: bool
    stepped: bool
    config: ForwardSm90Config

    @property
    def max_steps(self) -> int:
        """Key steps above 1 that the kernel has maps for."""
        return MAX_STEPS if self.stepped else 0

    def program(self) -> Program:
        """What NVRTC compiles; the only architecture is sm_90a."""
        text = wgmma.header(self.config.block_k, self.head_dim_v, self.dtype)
        return Program(
            "forward_sm90.cu",
            "portattn_forward_sm90",
            self.defines(),
            "sm_90a",
            (*HEADERS, "direct_store.cuh", "hopper.cuh", "ptx_sm90.cuh", "softmax_sm90.cuh"),
            (("wgmma.cuh", text),),
        )

    def defines(self) -> tuple[tuple[str, int], ...]:
        """The macros of config.cuh and hopper.cuh."""
        config = self.config
        apart = stage_apart(self.head_dim, self.head_dim_v, config)
        return (
            ("PA_ALIBI", int(self.alibi)),
            ("PA_ALIGNED", int(self.aligned)),
            ("PA_BIAS", int(self.bias)),
            ("PA_BLOCKS_PER_SM", config.blocks_per_sm),
            ("PA_BLOCK_K", config.block_k),
            ("PA_BLOCK_Q", config.block_q),
            ("PA_CONSUMERS", config.consumers),
            ("PA_CONSUMER_REGISTERS", consumer_registers(config)),
            ("PA_DTYPE", DTYPE_CODES[self.dtype]),
            ("PA_HEAD_DIM", self.head_dim),
            ("PA_HEAD_DIM_V", self.head_dim_v),
            ("PA_MAX_STEPS", self.max_steps),
            ("PA_NUM_STAGES", config.num_stages),
            ("PA_NUM_WARPS", 4 * config.consumers),
            ("PA_PING_PONG", int(config.ping_pong)),
            ("PA_PRODUCER_REGISTERS", producer_registers(config)),
            ("PA_SCALED", int(self.scaled)),
            ("PA_SOFTCAP", int(self.softcap)),
            ("PA_STAGE_APART", int(apart)),
            ("PA_WEIGHT_BUFFERS", weight_buffers(self.head_dim_v, config)),
        )

    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return shared_bytes(self.head_dim, self.head_dim_v, self.config)


@functools.lru_cache(maxsize=1024)
def variant(
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    aligned: bool,
    terms: tuple[bool, bool, bool],
    scaled: bool,
    stepped: bool,
    config: ForwardSm90Config,
) -> Variant:
    """The variant that serves these head dims, not padded yet; see `Variant`.

    Args:
        dtype, aligned, scaled, stepped: see `Variant`.
        head_dim, head_dim_v: of the call.
        terms: whether there are softcap, alibi and bias.
        config: the call's.
    """
    # What decides about order and number of blocks is no compile-time matter.
    compiled = dataclasses.replace(config, head_group=1, min_piece=1, persistent=False)
    return Variant(
        dtype, padded(head_dim), padded(head_dim_v), aligned, *terms, scaled, stepped, compiled
    )


def producer_registers(config: ForwardSm90Config) -> int:
    """Registers of a producer's thread; three consumers leave no more than 32."""
    return 40 if config.consumers < 3 else 32


def consumer_registers(config: ForwardSm90Config) -> int:
    """Registers of a consumer's thread: what the producer's warpgroup leaves of the block's."""
    each = min(255, 65536 // (config.blocks_per_sm * config.threads)) // 8 * 8
    left = each * (config.consumers + 1) - producer_registers(config)
    return min(240, left // config.consumers // 8 * 8)


def weight_buffers(head_dim_v: int, config: ForwardSm90Config) -> int:
    """Registers for the weights of how many tiles: 2 where they are there, by number of stage."""
    used = _registers_used(head_dim_v, config) + config.block_k // 4
    fits = used <= consumer_registers(config) and head_dim_v <= 128  # above, the loop spills
    return 2 if fits and config.num_stages % 2 == 0 else 1


def _registers_used(head_dim_v: int, config: ForwardSm90Config) -> int:
    # S and P of a row's quarter of block_k keys for two rows, and O.
    return config.block_k // 2 + config.block_k // 4 + head_dim_v // 2 + _OTHER_REGISTERS


def _panels(width: int) -> int:
    return -(-width // 64)


def _tiles_bytes(head_dim: int, head_dim_v: int, config: ForwardSm90Config) -> int:
    """Q of every consumer, and the stages of K and V."""
    query = config.block_q * _panels(head_dim) * 128
    both = _panels(head_dim) + _panels(head_dim_v)
    return query + config.num_stages * config.block_k * both * 128


def _rest_bytes(config: ForwardSm90Config) -> int:
    """Work slots, entries, barriers, and what aligning the start to 1024 takes."""
    return (
        _WORK_BYTES
        + _ENTRY_BYTES * config.num_stages
        + 8 * (2 * _WORK_SLOTS + 1 + 2 * config.consumers + 4 * config.num_stages)
        + 1024
    )


def _budget(config: ForwardSm90Config) -> int:
    return min(SHARED_LIMIT, _SHARED_PER_SM // config.blocks_per_sm - _RESERVED_SHARED_BYTES)


def stage_apart(head_dim: int, head_dim_v: int, config: ForwardSm90Config) -> bool:
    """Whether O gets shared memory of its own to be stored through: where it fits."""
    stage = 4 * config.consumers * _STAGE_BYTES
    tiles = _tiles_bytes(head_dim, head_dim_v, config)
    return tiles + stage + _rest_bytes(config) <= _budget(config)


def shared_bytes(head_dim: int, head_dim_v: int, config: ForwardSm90Config) -> int:
    """Dynamic shared memory of a block, for padded head dims, as hopper.cuh lays it out."""
    apart = stage_apart(head_dim, head_dim_v, config)
    stage = 4 * config.consumers * _STAGE_BYTES if apart else 0
    return _tiles_bytes(head_dim, head_dim_v, config) + stage + _rest_bytes(config)


def infeasible_reasons(problem: AttentionProblem, config: ForwardSm90Config) -> list[str]:
    """Why the config cannot run the problem; empty if it can."""
    reasons = []
    for name, allowed in (("consumers", CONSUMERS), ("num_stages", STAGES)):
        if getattr(config, name) not in allowed:
            reasons.append(f"{name} is {getattr(config, name)}; it must be one of {allowed}")
    if config.block_k % 16 or not 64 <= config.block_k <= 256:
        reasons.append(f"block_k is {config.block_k}; it must be a multiple of 16 in 64..256")
    reasons += [
        f"{name} is {getattr(config, name)}; it must be at least 1"
        for name in ("head_group", "min_piece", "blocks_per_sm")
        if getattr(config, name) < 1
    ]
    if config.ping_pong and config.consumers == 1:
        reasons.append("ping_pong needs at least 2 consumers")
    if reasons:
        return reasons
    head_dim, head_dim_v = padded(problem.head_dim), padded(problem.head_dim_v)
    need, limit = shared_bytes(head_dim, head_dim_v, config), _budget(config)
    if need > limit:
        reasons.append(f"needs {need} bytes of shared memory a block; there are {limit}")
    there, used = consumer_registers(config), _registers_used(head_dim_v, config)
    if used > there:
        reasons.append(f"about {used} registers a thread are needed and {there} are there")
    return reasons


# Measured on an H100 in bfloat16 (benchmarks/results/): by the wider of the head dims, rounded up
# to 64, for masks that keep long stretches of keys (dense, causal, windows) and for those that do
# not; best first, the first that fits is the default.
_Shape = tuple[
    int, int, int, bool, int
]  # consumers, block_k, num_stages, ping_pong, blocks_per_sm
_LONG: dict[int, tuple[_Shape, ...]] = {
    64: ((3, 128, 2, True, 1), (2, 128, 2, True, 1)),
    128: ((2, 128, 2, True, 1), (2, 96, 2, True, 1)),
    192: ((2, 96, 2, False, 1), (2, 64, 2, False, 1)),
    256: ((2, 64, 2, True, 1), (1, 64, 2, False, 1)),
}
# Two or three blocks on a multiprocessor: one computes while another waits for its first tiles.
_SHORT: dict[int, tuple[_Shape, ...]] = {
    64: ((1, 64, 2, False, 3), (1, 64, 2, False, 2)),
    128: ((1, 64, 2, False, 2),),
    192: ((1, 64, 2, False, 1),),
    256: ((1, 64, 2, False, 1),),
}
# Score terms take registers that the scores of 128 keys do not leave.
_WITH_TERMS: tuple[_Shape, ...] = ((2, 64, 2, False, 1), (1, 64, 2, False, 1))
_TERMS = frozenset({"softcap", "alibi", "bias"})
_SHORT_KEYS = 8192
_SHORT_CAUSAL = 2048  # keys; at head_dim 64, causal rows up to this are short work too
_L2_BYTES = 32 << 20  # of an H100's 50 MB, for keys and values that are read in no order
_MODULI = frozenset({KEY_MODULO, DIFF_MODULO})
_SETS = frozenset({KEY_SET, QUERY_SET, KEY_RANGE, QUERY_RANGE})
_RANDOM = frozenset({RANDOM_BLOCKS, BLOCK_TABLE})
# The longest rows go first, and theirs are the keys of many documents: few heads' stay in L2.
_PACKED = frozenset({SEGMENTS, DOCUMENTS})


def _is_short(problem: AttentionProblem) -> bool:
    """Whether rows visit few or scattered tiles."""
    found = list(instructions(problem.program))
    opcodes = {opcode for opcode, _ in found}
    bands = [operands for opcode, operands in found if opcode == BAND]
    has_window = any(all(map(is_bound, operands)) for operands in bands)
    blocks = block_sizes(problem.program)
    if opcodes & _MODULI or (has_window and opcodes & _SETS) or (blocks and min(blocks) < 128):
        return True
    narrow = max(problem.head_dim, problem.head_dim_v) <= 64
    return narrow and bool(bands) and problem.seqlen_k <= _SHORT_CAUSAL


def _head_group(problem: AttentionProblem) -> int:
    """Heads that run together; where tiles are drawn at random, those that L2 holds."""
    opcodes = {opcode for opcode, _ in instructions(problem.program)}
    heads = 4 if problem.seqlen_k <= _SHORT_KEYS or opcodes & _PACKED else 16
    if opcodes & _RANDOM:
        kv_bytes = 2 * problem.seqlen_k * (problem.head_dim + problem.head_dim_v)
        kv_heads = max(1, _L2_BYTES // max(kv_bytes, 1))
        heads = min(heads, 1 << (kv_heads.bit_length() - 1))
        heads *= problem.group_size
    return max(heads, problem.group_size)


@functools.lru_cache(maxsize=256)
def default_config(problem: AttentionProblem) -> ForwardSm90Config:
    """A good config without tuning."""
    width = padded(max(problem.head_dim, problem.head_dim_v))
    key = -(-width // 64) * 64
    shapes = (*_SHORT[key], *_LONG[key]) if _is_short(problem) else _LONG[key]
    if problem.features & _TERMS:
        shapes = (*_WITH_TERMS, *shapes)
    config = ForwardSm90Config()
    for consumers, block_k, num_stages, ping_pong, blocks_per_sm in shapes:
        config = ForwardSm90Config(
            consumers,
            block_k,
            num_stages,
            ping_pong,
            blocks_per_sm=blocks_per_sm,
            head_group=_head_group(problem),
        )
        if not infeasible_reasons(problem, config):
            break
    return config
