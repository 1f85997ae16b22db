"""Tensors for a case: what is verified and timed."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import TYPE_CHECKING

import torch

from portattn.backends.base import AttentionInputs
from portattn.masks.opcodes import instructions
from portattn.tuner.cases import Case

if TYPE_CHECKING:
    from portattn.problem import AttentionProblem

# Opcodes of docs/formats.md whose operands are slots of data.
WITH_DATA = frozenset({7, 8, 10, 11, 12, 18})
# Those whose meaning depends on the number of heads or sequences, or may.
BY_COUNT = frozenset({10, 11, 12, 16, 17})
_BEFORE = 5  # query rows before the first key
# Scores computed in float64 for one problem, and rows of one block.
_MAX_SCORES = 1 << 22
_BLOCK_ROWS = 64
GUARD_BYTES = 4096  # before and behind what a kernel writes
GUARD_BYTE = 0xA5


def _guarded(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor full of NaN, and all of its memory as bytes: between two guards."""
    size = math.prod(shape) * dtype.itemsize
    memory = torch.full((size + 2 * GUARD_BYTES,), GUARD_BYTE, dtype=torch.uint8, device=device)
    tensor = memory[GUARD_BYTES : GUARD_BYTES + size].view(dtype).view(shape)
    return tensor.fill_(torch.nan), memory


@dataclasses.dataclass(frozen=True, slots=True)
class Guarded:
    """Inputs whose results lie between guards.

    Attributes:
        inputs: the call.
        memories: of the output and the LSE, guards included; uint8.
    """

    inputs: AttentionInputs
    memories: tuple[torch.Tensor, ...]

    def overwritten(self) -> bool:
        """Whether somebody wrote outside of the output and the LSE."""
        ends = [end for one in self.memories for end in (one[:GUARD_BYTES], one[-GUARD_BYTES:])]
        return bool((torch.stack(ends) != GUARD_BYTE).any())


def make(case: Case, seed: int, *, shortest: int | None = None) -> Guarded:
    """Random inputs for a case.

    The output and LSE hold NaN, so that what a kernel leaves out is seen.

    Args:
        case: the problem; every feature in it gets a tensor or a value.
        seed: of the random numbers.
        shortest: of kv_lengths; None for half of the keys.
    """
    problem, device = case.problem, torch.device(case.problem.device)
    dtype = problem.torch_dtype
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=kind)

    b, h, kv = problem.batch, problem.num_heads, problem.num_kv_heads
    sq, sk = problem.seqlen_q, problem.seqlen_k
    has = problem.features.__contains__
    output, memory = _guarded((b, h, sq, problem.head_dim_v), dtype, device)
    lse, lse_memory = _guarded((b, h, sq), torch.float32, device) if has("lse") else (None, None)
    inputs = AttentionInputs(
        query=normal(b, h, sq, problem.head_dim),
        key=normal(b, kv, sk, problem.head_dim),
        value=normal(b, kv, sk, problem.head_dim_v),
        output=output,
        lse=lse,
        mask=case.mask,
        q_offset=problem.q_offset,
        kv_lengths=_kv_lengths(b, sq, sk, shortest, generator) if has("kv_lengths") else None,
        scale=problem.head_dim**-0.5,
        softcap=30.0 if has("softcap") else 0.0,
        alibi_slopes=(2.0 ** -torch.linspace(1, 8, h)).to(device) if has("alibi") else None,
        bias=normal(1, 1, sq, sk).expand(b, h, sq, sk) if has("bias") else None,
        sinks=normal(h, kind=torch.float32) if has("sinks") else None,
        deterministic=has("deterministic"),
    )
    return Guarded(inputs, (memory,) if lse_memory is None else (memory, lse_memory))


def _kv_lengths(
    batch: int, seqlen_q: int, seqlen_k: int, shortest: int | None, generator: torch.Generator
) -> torch.Tensor:
    """From the shortest, or half of the keys, to all of them; the first sequence has all."""
    low = min(max(seqlen_k // 2, seqlen_q), seqlen_k) if shortest is None else shortest
    lengths = torch.randint(
        low,
        seqlen_k + 1,
        (batch,),
        generator=generator,
        device=generator.device,
        dtype=torch.int32,
    )
    lengths[:1] = seqlen_k
    return lengths


def rows_of(inputs: AttentionInputs, start: int, stop: int) -> AttentionInputs:
    """The same call for query rows [start, stop) only, with its own part of the output and LSE.

    With kv_lengths the rows must be the last ones: positions count from the end there.
    """
    return dataclasses.replace(
        inputs,
        query=inputs.query[:, :, start:stop],
        output=inputs.output[:, :, start:stop],
        lse=None if inputs.lse is None else inputs.lse[:, :, start:stop],
        bias=None if inputs.bias is None else inputs.bias[:, :, start:stop],
        q_offset=inputs.q_offset + start,
    )


def row_blocks(case: Case) -> list[tuple[int, int]]:
    """Blocks of rows worth checking within the bound: the first, the last, and some between."""
    problem = case.problem
    rows = _MAX_SCORES // max(problem.batch * problem.num_heads * problem.seqlen_k, 1)
    rows = max(min(rows, problem.seqlen_q), min(8, problem.seqlen_q))
    if rows >= problem.seqlen_q:
        return [(0, problem.seqlen_q)]
    if "kv_lengths" in problem.features:
        return [(problem.seqlen_q - rows, problem.seqlen_q)]
    size = max(min(_BLOCK_ROWS, rows // 3), 1)
    last = problem.seqlen_q - size
    starts = {
        0,
        last,
        *(random.Random(0).randrange(last + 1) for _ in range(max(rows // size - 2, 1))),
    }
    return [(start, start + size) for start in sorted(starts)]


def _odd(size: int, most: int) -> int:
    """The largest odd number that is at most both."""
    size = min(size, most)
    return max(size - 1 + size % 2, 1)


def _fewer(problem: AttentionProblem) -> AttentionProblem:
    """Two sequences and two KV heads are enough, where no mask says how many there are."""
    if {opcode for opcode, _ in instructions(problem.program)} & BY_COUNT:
        return problem
    kv_heads = min(problem.num_kv_heads, 2)
    return dataclasses.replace(
        problem,
        batch=min(problem.batch, 2),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * problem.group_size,
    )


def ragged(case: Case, most_q: int = 197, most_k: int = 333) -> Case:
    """A small case of the same kind whose lengths are no multiple of any tile.

    Positions stay where data reaches.

    Args:
        case: to be made small.
        most_q, most_k: bounds on its lengths.
    """
    problem = case.problem
    at_end = problem.q_offset == problem.seqlen_k - problem.seqlen_q
    seqlen_q = _odd(problem.seqlen_q, most_q)
    seqlen_k = seqlen_q if problem.seqlen_q == problem.seqlen_k else _odd(problem.seqlen_k, most_k)
    seqlen_q = min(seqlen_q, seqlen_k) if at_end else seqlen_q
    q_offset = seqlen_k - seqlen_q if at_end else problem.q_offset
    small = dataclasses.replace(
        _fewer(problem), seqlen_q=seqlen_q, seqlen_k=seqlen_k, q_offset=q_offset
    )
    return Case(small, case.mask)


def edges(case: Case) -> Case:
    """A smaller ragged case still, in which some rows may attend to nothing, where masks do that.

    Its first queries stand before the first key: a causal row there keeps none. Masks that look
    positions up in data have no such rows.
    """
    small = ragged(case, 67, 131)
    opcodes = {opcode for opcode, _ in instructions(case.problem.program)}
    if not opcodes or opcodes & WITH_DATA or "kv_lengths" in case.problem.features:
        return small
    q_offset = min(small.problem.q_offset, 0) - _BEFORE
    return Case(dataclasses.replace(small.problem, q_offset=q_offset), small.mask)
