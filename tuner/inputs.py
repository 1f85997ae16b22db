"""Tensors for a case: what is verified and timed."""

from __future__ import annotations

import dataclasses

import torch

from portattn.backends.base import AttentionInputs
from portattn.tuner.cases import Case


def make(case: Case, seed: int) -> AttentionInputs:
    """Random inputs for a case.

    The output and LSE hold NaN, so that what a kernel leaves out is seen.

    Args:
        case: the problem; every feature in it gets a tensor or a value.
        seed: of the random numbers.
    """
    problem, device = case.problem, torch.device(case.problem.device)
    dtype = problem.torch_dtype
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=kind)

    b, h, kv = problem.batch, problem.num_heads, problem.num_kv_heads
    sq, sk = problem.seqlen_q, problem.seqlen_k
    has = problem.features.__contains__
    return AttentionInputs(
        query=normal(b, h, sq, problem.head_dim),
        key=normal(b, kv, sk, problem.head_dim),
        value=normal(b, kv, sk, problem.head_dim_v),
        output=torch.full((b, h, sq, problem.head_dim_v), torch.nan, dtype=dtype, device=device),
        lse=torch.full((b, h, sq), torch.nan, device=device) if has("lse") else None,
        mask=case.mask,
        q_offset=problem.q_offset,
        kv_lengths=_kv_lengths(b, sq, sk, generator).to(device) if has("kv_lengths") else None,
        scale=problem.head_dim**-0.5,
        softcap=30.0 if has("softcap") else 0.0,
        alibi_slopes=(2.0 ** -torch.linspace(1, 8, h)).to(device) if has("alibi") else None,
        bias=normal(1, 1, sq, sk).expand(b, h, sq, sk) if has("bias") else None,
        sinks=normal(h, kind=torch.float32) if has("sinks") else None,
        deterministic=has("deterministic"),
    )


def _kv_lengths(
    batch: int, seqlen_q: int, seqlen_k: int, generator: torch.Generator
) -> torch.Tensor:
    """From half of the keys to all of them; the first batch element has all."""
    low = min(max(seqlen_k // 2, seqlen_q), seqlen_k)
    lengths = torch.randint(low, seqlen_k + 1, (batch,), generator=generator, dtype=torch.int32)
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


def _odd(size: int, most: int) -> int:
    """The largest odd number that is at most both."""
    size = min(size, most)
    return max(size - 1 + size % 2, 1)


def ragged(case: Case) -> Case:
    """A small case of the same kind whose lengths are no multiple of any tile.

    Positions stay where data reaches.
    """
    problem = case.problem
    at_end = problem.q_offset == problem.seqlen_k - problem.seqlen_q
    seqlen_q = _odd(problem.seqlen_q, 197)
    seqlen_k = seqlen_q if problem.seqlen_q == problem.seqlen_k else _odd(problem.seqlen_k, 333)
    seqlen_q = min(seqlen_q, seqlen_k) if at_end else seqlen_q
    q_offset = seqlen_k - seqlen_q if at_end else problem.q_offset
    small = dataclasses.replace(problem, seqlen_q=seqlen_q, seqlen_k=seqlen_k, q_offset=q_offset)
    return Case(small, case.mask)
