"""Calls of the decode kernel on CPU tensors, and what they must give."""

import dataclasses
import math

import torch

from portattn.backends.base import AttentionInputs
from portattn.backends.triton.decode_config import TritonDecodeConfig
from portattn.backends.triton.decode_kernel import RUNTIME_PARAMETERS
from portattn.backends.triton.decode_launch import DecodeCall, geometry_of
from tests.triton.interpreter.calls import assert_close


@dataclasses.dataclass
class Call:
    """Tensors and options of one call. `pieces` is what the call's pieces_per_sm is on 1 SM."""

    mask: object = None
    lengths: tuple[int, ...] | None = None
    batch: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    seqlen_q: int = 1
    seqlen_k: int = 100
    head_dim: int = 16
    head_dim_v: int = 16
    q_offset: int | None = None
    dtype: torch.dtype = torch.float32
    scale: float | None = None
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    block_q: int = 16
    block_k: int = 16
    pieces: int = 12
    min_piece: int = 1
    lengths_dtype: torch.dtype = torch.int32
    store_lse: bool = True

    def __post_init__(self):
        if self.lengths is not None:
            self.batch = len(self.lengths)
        if self.q_offset is None:
            self.q_offset = self.seqlen_k - self.seqlen_q
        self.scale = self.head_dim**-0.5 if self.scale is None else self.scale
        generator = torch.Generator().manual_seed(11)
        sizes_k = (self.batch, self.num_kv_heads, self.seqlen_k)

        def normal(*sizes):
            return torch.randn(sizes, generator=generator).to(self.dtype)

        self.query = normal(self.batch, self.num_heads, self.seqlen_q, self.head_dim)
        self.key = normal(*sizes_k, self.head_dim)
        self.value = normal(*sizes_k, self.head_dim_v)
        for b, length in enumerate(self.lengths or ()):
            # What does not exist must not be used.
            self.key[b, :, length:] = math.nan
            self.value[b, :, length:] = math.nan

    def inputs(self):
        sizes = (self.batch, self.num_heads, self.seqlen_q)
        output = torch.full((*sizes, self.head_dim_v), math.nan, dtype=self.dtype)
        lse = torch.full(sizes, math.nan) if self.store_lse else None
        lengths = None
        if self.lengths is not None:
            lengths = torch.tensor(self.lengths, dtype=self.lengths_dtype)
        return AttentionInputs(
            self.query, self.key, self.value, output, lse, self.mask, self.q_offset, lengths,
            self.scale, self.softcap, self.alibi_slopes, self.bias, self.sinks, False,
        )  # fmt: skip

    def config(self):
        return TritonDecodeConfig(
            self.block_q, self.block_k, pieces_per_sm=self.pieces, min_piece=self.min_piece
        )

    def run(self):
        """(output, lse) of the kernel."""
        inputs = self.inputs()
        DecodeCall(inputs, self.config()).run(inputs)
        return inputs.output, inputs.lse

    def positions(self, b):
        """Position of query row 0, and the keys that exist."""
        if self.lengths is None:
            return self.q_offset, self.seqlen_k
        return self.lengths[b] - self.seqlen_q, min(max(self.lengths[b], 0), self.seqlen_k)

    def eager(self, dtype):
        """(output, lse) by the definition, computed in `dtype`."""
        group = self.num_heads // self.num_kv_heads
        outputs, lses = [], []
        for b in range(self.batch):
            offset, length = self.positions(b)
            query = self.query[b].to(dtype)
            key, value = (
                x[b, :, :length].to(dtype).repeat_interleave(group, 0)
                for x in (self.key, self.value)
            )
            s = query @ key.transpose(-1, -2) * self.scale
            if self.softcap:
                s = self.softcap * torch.tanh(s / self.softcap)
            if self.alibi_slopes is not None:
                i = offset + torch.arange(self.seqlen_q)
                distance = (i[:, None] - torch.arange(length)).abs().to(dtype)
                slopes = self.alibi_slopes
                slopes = slopes if slopes.ndim == 1 else slopes[b]
                s = s - slopes.to(dtype)[:, None, None] * distance
            if self.bias is not None:
                s = s + self.bias[b, :, :, :length].to(dtype)
            if self.mask is not None and length:
                keeps = self.mask.to_dense(self.seqlen_q, length, q_offset=offset)
                s = s.masked_fill(~keeps, -math.inf)
            if dtype == torch.float16:
                s = s.float()  # softmax of eager attention accumulates in float32
            lse = torch.logsumexp(s, -1)
            p = torch.exp(s - torch.where(lse == -math.inf, 0.0, lse)[..., None]).to(dtype)
            out = p @ value
            if self.sinks is not None:
                sinks = self.sinks.to(lse.dtype)[:, None]
                out = out * torch.sigmoid(lse - sinks)[..., None].to(dtype)
                lse = torch.logaddexp(lse, sinks.expand_as(lse))
            outputs.append(out)
            lses.append(lse)
        return torch.stack(outputs), torch.stack(lses)


def integers(call):
    """The launch's integer arguments by name."""
    values = geometry_of(call.inputs(), call.config()).integers
    return dict(zip(RUNTIME_PARAMETERS[-len(values) :], values, strict=True))


def check(call):
    """Run a call and compare output and lse; returns both."""
    output, lse = call.run()
    exact, exact_lse = call.eager(torch.float64)
    eager, eager_lse = call.eager(call.dtype)
    assert_close(output, eager, exact, call.dtype)
    if lse is not None:
        assert_close(lse, eager_lse, exact_lse, torch.float32)
    return output, lse
