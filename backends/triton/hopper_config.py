"""How the Hopper forward runs: its config, the defaults, what is feasible."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import triton

from portattn.backends.base import Config
from portattn.backends.triton.config import is_sparse
from portattn.backends.triton.limits import DeviceLimits, limits_of, next_power_of_2
from portattn.masks.opcodes import instructions, is_bound

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portattn.problem import AttentionProblem

CONSUMER_ROWS = 64  # of a consumer warpgroup: what one wgmma instruction takes
# Registers a thread of the launch by block_q: two or three consumer warpgroups and a producer's
# fill the multiprocessor's 65536; the consumers then take over what the producer does not need.
LAUNCH_REGISTERS = {128: 168, 192: 128}
_CONSUMER_REGISTERS = {128: (216, 224, 232, 240), 192: (160,)}
# Past this many registers in accumulators and operands a thread spills.
_MAX_HELD_REGISTERS = {128: 192, 192: 128}
_BARRIER_BYTES = 1024  # mbarriers, and what the two versions of Triton keep for the partitions
_MAX_GROUP_BYTES = 16 << 20
_SHORT_SEQUENCE = 2048
# Opcodes (docs/formats.md).
_BAND = 1
_RANGES = (2, 3)  # KEY_RANGE, QUERY_RANGE
_MODULI = (4, 5)  # KEY_MODULO, DIFF_MODULO
_SETS = (7, 8)  # KEY_SET, QUERY_SET
_PACKED = (11, 18)  # SEGMENTS, DOCUMENTS
_KEY_BLOCK = {6: 0, 9: 0, 10: 2}  # BLOCK_BAND, RANDOM_BLOCKS, BLOCK_TABLE: which operand is it
_WIDE = 128  # keys of the wider tiles
_WIDE_WINDOW = 512  # keys of a window that narrower tiles no longer fit clearly better


@dataclasses.dataclass(frozen=True, slots=True)
class TritonForwardHopperConfig(Config):
    """How one forward runs.

    Attributes:
        block_q: rows of a tile: 128, for two consumer warpgroups, or 192, for three.
        block_k: keys of a tile: 64 or 128.
        num_stages: key and value tiles in shared memory.
        registers: of a consumer's thread; the producer's gets what is left.
        head_group: heads whose items run next to each other and share the L2 cache.
        min_piece: a row is never cut into pieces of fewer tiles.
    """

    block_q: int = 128
    block_k: int = 128
    num_stages: int = 2
    registers: int = 232
    head_group: int = 4
    min_piece: int = 8


def block_width(head_dim: int) -> int:
    """Columns of a row in shared memory: 64, 128 or 256; those past head_dim are zeros."""
    return max(64, next_power_of_2(head_dim))


def tile_steps(program: Sequence[int]) -> frozenset[int]:
    """The steps > 1 that tiles of the mask's plan may have: the moduli in its program."""
    return frozenset(
        operands[0]
        for opcode, operands in instructions(program)
        if opcode in _MODULI and operands[0] > 1
    )


def _is_fine(program: Sequence[int]) -> bool:
    """Whether a mask's pattern leaves tiles of 64 keys clearly fewer keys to visit than of 128.

    Windows and documents do not, nor blocks of 128 keys: their tiles are as full.
    """
    found = list(instructions(program))
    narrow = any(hi - lo < _WIDE_WINDOW for lo, hi in _windows(program))
    return any(
        opcode in _SETS
        or (narrow and opcode in _RANGES)
        or (opcode in _KEY_BLOCK and operands[_KEY_BLOCK[opcode]] % _WIDE != 0)
        for opcode, operands in found
    )


def _windows(program: Sequence[int]) -> list[tuple[int, int]]:
    """The windows in a mask's program: the distances to their first and last keys."""
    return [
        (operands[0], operands[1])
        for opcode, operands in instructions(program)
        if opcode == _BAND and all(map(is_bound, operands))
    ]


def _least_heads(program: Sequence[int]) -> int:
    """Key heads that go together at least: more where rows near each other read the same few keys.

    Rows of a residue, which strided patterns have, read keys of the whole sequence.
    """
    opcodes = {opcode for opcode, _ in instructions(program)}
    if opcodes.intersection(_PACKED):
        return 2 if _BAND in opcodes else 4
    return 4 if _windows(program) and _MODULI[1] not in opcodes else 1


def output_in_query(problem_widths: tuple[int, int], config: TritonForwardHopperConfig) -> bool:
    """Whether the output leaves through the query's buffer, for want of one of its own.

    Its own lets a persistent program load the next item's query during the epilogue.
    """
    block_d, block_dv = problem_widths
    own = shared_bytes(block_d, block_dv, config, in_query=False)
    return block_d == block_dv and own > limits_of("sm_90").shared_bytes


def shared_bytes(
    block_d: int, block_dv: int, config: TritonForwardHopperConfig, *, in_query: bool
) -> int:
    """Shared memory of a program, slightly above what the compiler allocates."""
    ring = config.num_stages * config.block_k * (block_d + block_dv)
    rows = config.block_q * (block_d + (0 if in_query else block_dv))
    return 2 * (ring + rows) + _BARRIER_BYTES


def widths(problem: AttentionProblem) -> tuple[int, int]:
    """Columns of a query or key row and of a value row in shared memory."""
    return block_width(problem.head_dim), block_width(problem.head_dim_v)


def default_for(problem: AttentionProblem) -> TritonForwardHopperConfig:
    """A good config without tuning; figures behind it: docs/benchmarks.md."""
    width = max(widths(problem))
    sparse = is_sparse(problem.program)
    kv_bytes = 2 * problem.seqlen_k * (problem.head_dim + problem.head_dim_v)
    # As many KV heads as the L2 cache holds beside everything else, with all their query heads.
    kv_heads = max(1, _MAX_GROUP_BYTES // max(kv_bytes, 1))
    # Uneven rows balance better the more of them there are to give out, longest first.
    most = 16 if problem.program else 4
    least = _least_heads(problem.program)
    head_group = max(min(next_power_of_2(kv_heads + 1) // 2, most), least) * problem.group_size
    # Where a mask's blocks are smaller than 128 keys, narrower tiles visit fewer keys.
    narrow = width > 128 or _is_fine(problem.program)
    stages = 2 if width > 64 and not (narrow and width == 128) else 3
    # Three consumers have registers for plain scores alone, and only with this assembler.
    tall = width == 64 and not sparse and "alibi" not in problem.features and _fits_three()
    # Of short causal rows, tiles of 192 rows visit too many keys in vain.
    tall = tall and not (problem.program and problem.seqlen_q <= _SHORT_SEQUENCE)
    return TritonForwardHopperConfig(
        block_q=192 if tall else 128,
        block_k=64 if narrow else 128,
        num_stages=stages,
        registers=160 if tall else 240 if width > 128 else 232,
        head_group=head_group,
    )


def _fits_three() -> bool:
    """Whether three consumers compile without spills in their loops.

    They do with the ptxas of Triton 3.6 (CUDA 12.8); with that of 3.9 they spill 19 times a tile.
    """
    return str(triton.__version__).startswith("3.6.")


def _field_reasons(config: TritonForwardHopperConfig) -> list[str]:
    reasons = []
    for name, allowed in (
        ("block_q", tuple(LAUNCH_REGISTERS)),
        ("block_k", (64, 128)),
        ("num_stages", (2, 3)),
        # Multiples of 8; the producer must be left 24 at least.
        ("registers", _CONSUMER_REGISTERS.get(config.block_q, ())),
    ):
        value = getattr(config, name)
        if value not in allowed:
            reasons.append(f"{name} is {value!r}; it must be one of {allowed}")
    counts = {"head_group": config.head_group, "min_piece": config.min_piece}
    return reasons + [
        f"{name} is {value}; it must be at least 1" for name, value in counts.items() if value < 1
    ]


def infeasible(
    problem: AttentionProblem, config: TritonForwardHopperConfig, limits: DeviceLimits
) -> list[str]:
    """Why a config cannot run a problem on a device with these limits."""
    reasons = _field_reasons(config)
    if reasons:
        return reasons
    block_d, block_dv = widths(problem)
    in_query = output_in_query((block_d, block_dv), config)
    needed = shared_bytes(block_d, block_dv, config, in_query=in_query)
    if needed > limits.shared_bytes:
        reasons.append(
            f"needs {needed} bytes of shared memory; {limits.arch} has {limits.shared_bytes}"
        )
    # Scores in float32, weights in 16 bits and the output of one warpgroup.
    held = config.block_k // 2 + config.block_k // 4 + block_dv // 2
    most = _MAX_HELD_REGISTERS[config.block_q]
    if held > most:
        reasons.append(
            f"holds {held} registers a thread in scores and output; with block_q "
            f"{config.block_q}, more than {most} spill"
        )
    return reasons
