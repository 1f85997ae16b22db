"""Calls of the forward on CPU tensors, and what they must give."""

import dataclasses
import math

import torch

from portattn.backends.base import AttentionInputs
from portattn.backends.triton.config import TritonForwardConfig
from portattn.backends.triton.launch import launch_forward
from portattn.backends.triton.limits import next_power_of_2
from portattn.plan import plan_mask


@dataclasses.dataclass
class Call:
    """Tensors and options of one call; `None` lengths and heads follow the query's."""

    mask: object = None
    batch: int = 1
    num_heads: int = 2
    num_kv_heads: int | None = None
    seqlen_q: int = 100
    seqlen_k: int | None = None
    head_dim: int = 16
    head_dim_v: int | None = None
    q_offset: int = 0
    dtype: torch.dtype = torch.float32
    scale: float | None = None
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    block_q: int = 32
    block_k: int = 32
    workers: int = 64
    min_piece: int = 8
    tma: bool = False
    head_group: int = 2
    store_lse: bool = True

    def __post_init__(self):
        self.num_kv_heads = self.num_kv_heads or self.num_heads
        self.seqlen_k = self.seqlen_q if self.seqlen_k is None else self.seqlen_k
        self.head_dim_v = self.head_dim_v or self.head_dim
        self.scale = self.head_dim**-0.5 if self.scale is None else self.scale
        generator = torch.Generator().manual_seed(11)
        sizes_k = (self.batch, self.num_kv_heads, self.seqlen_k)

        def normal(*sizes):
            return torch.randn(sizes, generator=generator).to(self.dtype)

        self.query = normal(self.batch, self.num_heads, self.seqlen_q, self.head_dim)
        self.key = normal(*sizes_k, self.head_dim)
        self.value = normal(*sizes_k, self.head_dim_v)

    def plan(self):
        return plan_mask(
            self.mask,
            batch=self.batch,
            num_heads=self.num_heads,
            seqlen_q=self.seqlen_q,
            seqlen_k=self.seqlen_k,
            q_offset=self.q_offset,
            block_q=self.block_q,
            block_k=self.block_k,
        )

    def schedule(self):
        return self.plan().schedule(
            batch=self.batch,
            num_heads=self.num_heads,
            workers=self.workers,
            head_dim_v=max(16, next_power_of_2(self.head_dim_v)),
            min_piece=self.min_piece,
        )

    def run(self):
        """(output, lse) of the kernel."""
        sizes = (self.batch, self.num_heads, self.seqlen_q)
        output = torch.full((*sizes, self.head_dim_v), math.nan, dtype=self.dtype)
        lse = torch.full(sizes, math.nan) if self.store_lse else None
        inputs = AttentionInputs(
            self.query, self.key, self.value, output, lse, self.mask, self.q_offset, None,
            self.scale, self.softcap, self.alibi_slopes, self.bias, self.sinks, False,
        )  # fmt: skip
        config = TritonForwardConfig(
            self.block_q,
            self.block_k,
            num_stages=2,
            partial_stages=2,
            tma=self.tma,
            head_group=self.head_group,
            min_piece=self.min_piece,
        )
        launch_forward(inputs, self.plan(), self.schedule(), config)
        return output, lse

    def keeps(self):
        """The mask as bool [batch, num_heads, seqlen_q, seqlen_k], from its predicate."""
        sizes = (self.batch, self.num_heads, self.seqlen_q, self.seqlen_k)
        if self.mask is None:
            return torch.ones(sizes, dtype=torch.bool)
        dense = [
            self.mask.to_dense(self.seqlen_q, self.seqlen_k, q_offset=self.q_offset, b=b, h=h)
            for b in range(self.batch)
            for h in range(self.num_heads)
        ]
        return torch.stack(dense).reshape(sizes)

    def eager(self, dtype):
        """(output, lse) by the definition, computed in `dtype`."""
        group = self.num_heads // self.num_kv_heads
        query = self.query.to(dtype)
        key, value = (x.to(dtype).repeat_interleave(group, 1) for x in (self.key, self.value))
        s = query @ key.transpose(-1, -2) * self.scale
        if self.softcap:
            s = self.softcap * torch.tanh(s / self.softcap)
        if self.alibi_slopes is not None:
            i = self.q_offset + torch.arange(self.seqlen_q)
            distance = (i[:, None] - torch.arange(self.seqlen_k)).abs().to(dtype)
            s = s - self.alibi_slopes.to(dtype)[..., None, None] * distance
        if self.bias is not None:
            s = s + self.bias.to(dtype)
        s = s.masked_fill(~self.keeps(), -math.inf)
        if dtype == torch.float16:
            s = (
                s.float()
            )  # softmax and logsumexp of the same-dtype eager computation accumulate in float32
        lse = torch.logsumexp(s, -1)
        p = torch.exp(s - torch.where(lse == -math.inf, 0.0, lse)[..., None]).to(dtype)
        out = p @ value
        if self.sinks is not None:
            sinks = self.sinks.to(lse.dtype)[None, :, None]
            out = out * torch.sigmoid(lse - sinks)[..., None].to(dtype)
            lse = torch.logaddexp(lse, sinks.expand_as(lse))
        return out, lse


def assert_close(actual, eager, exact, dtype):
    """The tolerance rule: twice the error of eager in the same dtype, and two roundings."""
    exact = exact.double()
    assert torch.equal(actual == -math.inf, exact == -math.inf)
    finite = exact.isfinite()
    actual, eager, exact = (x.double()[finite] for x in (actual, eager, exact))
    assert actual.isfinite().all()
    if exact.numel() == 0:
        return
    allowed = 2 * (eager - exact).abs().max() + 2 * torch.finfo(dtype).eps * exact.abs().max()
    assert (actual - exact).abs().max() <= allowed


def check(call):
    """Run a call and compare output and lse; returns both."""
    output, lse = call.run()
    exact, exact_lse = call.eager(torch.float64)
    eager, eager_lse = call.eager(call.dtype)
    assert_close(output, eager, exact, call.dtype)
    if lse is not None:
        assert_close(lse, eager_lse, exact_lse, torch.float32)
    return output, lse
