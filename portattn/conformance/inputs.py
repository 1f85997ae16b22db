"""The tensors of a case, rounded to the dtype under test; the reference gets the same values."""

from __future__ import annotations

import dataclasses
import zlib
from typing import TYPE_CHECKING

import torch

from portattn import api
from portattn.preparation import Options, Terms

if TYPE_CHECKING:
    from portattn.conformance.cases import Case


@dataclasses.dataclass(frozen=True, slots=True)
class Inputs:
    """One call's tensors, bhsd; see `portattn.call`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    terms: Terms
    options: Options

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype; slopes and sinks stay float32."""
        bias = self.terms.bias
        terms = self.terms._replace(bias=None if bias is None else bias.to(dtype))
        return Inputs(
            self.query.to(dtype), self.key.to(dtype), self.value.to(dtype), terms, self.options
        )


def draw(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    """The case's inputs on the device; equal in every process."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    key_shape = (case.batch, case.num_kv_heads, case.seqlen_k)
    query = normal(case.batch, case.num_heads, case.seqlen_q, case.head_dim)
    key = normal(*key_shape, case.head_dim)
    value = normal(*key_shape, case.head_dim_v)
    for b, length in enumerate(case.kv_lengths):
        key[b, :, length:] = torch.nan
        value[b, :, length:] = torch.nan
    _poison(case, key, value)
    terms = _terms(case, generator, dtype)
    tensors = [_lay_out(tensor.to(dtype), case.memory, device) for tensor in (query, key, value)]
    terms = Terms(*(None if term is None else term.to(device) for term in terms))
    mask = None if case.mask is None else case.mask()
    options = Options(
        mask=api.and_causal(mask) if case.is_causal else mask,
        q_offset=case.q_offset,
        scale=case.scale,
        softcap=case.softcap,
        enable_gqa=True,
        return_lse=True,
    )
    return Inputs(tensors[0], tensors[1], tensors[2], terms, options)


def _poison(case: Case, key: torch.Tensor, value: torch.Tensor) -> None:
    """Put a NaN or inf at key 7 of the first batch and head."""
    if case.poison == "nan_key":
        key[0, 0, 7, 0] = torch.nan
    elif case.poison == "nan_value":
        value[0, 0, 7, 0] = torch.nan
    elif case.poison == "inf_value":
        value[0, 0, 7, 0] = torch.inf


def _terms(case: Case, generator: torch.Generator, dtype: torch.dtype) -> Terms:
    slopes = bias = sinks = lengths = None
    if case.alibi:
        heads = (case.num_heads,) if case.alibi == "h" else (case.batch, case.num_heads)
        slopes = torch.rand(heads, generator=generator) * 0.2
    if case.bias is not None:
        sizes = {"b": case.batch, "h": case.num_heads, "q": case.seqlen_q, "k": case.seqlen_k}
        shape = tuple(size if axis in case.bias else 1 for axis, size in sizes.items())
        bias = torch.randn(shape, generator=generator)
        if case.bias_cut == "some":
            bias = bias.masked_fill(torch.rand(shape, generator=generator) < 0.3, -torch.inf)
        elif case.bias_cut == "row":
            bias[..., 50, :] = -torch.inf
        bias = bias.to(dtype)
    if case.sinks:
        sinks = torch.randn(case.num_heads, generator=generator)
    if case.kv_lengths:
        lengths = torch.tensor(case.kv_lengths, dtype=torch.int32)
    return Terms(lengths, slopes, bias, sinks)


def _lay_out(tensor: torch.Tensor, memory: str, device: str) -> torch.Tensor:
    """The tensor on the device, its memory laid out as the case says."""
    if memory == "bshd":
        return tensor.transpose(1, 2).contiguous().to(device).transpose(1, 2)
    if memory == "padded":
        batch, heads, length, dim = tensor.shape
        # 8 elements keep rows aligned to 16 bytes; what lies between holds NaN and must never be
        # used.
        outer = torch.full((batch, heads + 1, length + 5, dim + 8), torch.nan, dtype=tensor.dtype)
        outer[:, :heads, :length, :dim] = tensor
        return outer.to(device)[:, :heads, :length, :dim]
    return tensor.to(device)
