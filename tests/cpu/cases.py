"""What the CPU kernel tests share: calls with references.

A call, its float64 reference, and the error that is allowed.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from portattn.backends.base import AttentionInputs
from portattn.backends.cpu import abi
from portattn.backends.cpu.decode import CpuDecodeConfig
from portattn.backends.cpu.forward import CpuForward, CpuForwardConfig

INF = float("inf")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ISAS = ["x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4+amx", "neon"]  # best last


def available_isas():
    """The instruction sets of this machine and build."""
    lib = abi.functions()
    found = [name for name in ISAS if lib.portattn_cpu_select_isa(name.encode()) == 0]
    lib.portattn_cpu_select_isa(None)
    return found


@dataclasses.dataclass
class Case:
    """One call; tensors in the bhsd layout."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: object = None
    q_offset: int = 0
    kv_lengths: torch.Tensor | None = None
    scale: float | None = None
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    sinks: torch.Tensor | None = None

    @classmethod
    def random(
        cls,
        batch=1,
        heads=2,
        kv_heads=None,
        seqlen_q=64,
        seqlen_k=None,
        head_dim=32,
        head_dim_v=None,
        dtype=torch.float32,
        **more,
    ):
        """A call on normal random numbers.

        Queries are the newest tokens unless q_offset is given.
        """
        seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
        more.setdefault("q_offset", seqlen_k - seqlen_q)
        shapes = [(heads, seqlen_q, head_dim), (kv_heads or heads, seqlen_k, head_dim)]
        shapes.append((kv_heads or heads, seqlen_k, head_dim_v or head_dim))
        query, key, value = (torch.randn(batch, *shape).to(dtype) for shape in shapes)
        return cls(query, key, value, **more)

    def scaled(self) -> float:
        """The softmax scale."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    def run(self, kernel=None, config=None):
        """Output and LSE of a CPU kernel.

        Buffers start as NaN so that nothing may be left unwritten.
        """
        kernel = kernel or CpuForward()
        shape = (*self.query.shape[:3], self.value.shape[3])
        output = torch.full(shape, float("nan"), dtype=self.query.dtype)
        lse = torch.full(shape[:3], float("nan"))
        expanded = None if self.bias is None else self.bias.expand(*shape[:3], self.key.shape[2])
        inputs = AttentionInputs(
            query=self.query,
            key=self.key,
            value=self.value,
            output=output,
            lse=lse,
            mask=self.mask,
            q_offset=self.q_offset,
            kv_lengths=self.kv_lengths,
            scale=self.scaled(),
            softcap=self.softcap,
            alibi_slopes=self.alibi_slopes,
            bias=expanded,
            sinks=self.sinks,
            deterministic=False,
        )
        kernel.run(inputs, config or default_config(kernel))
        return output, lse

    def kept(self, b: int, h: int):
        """Query positions [Sq, 1], key positions [1, Sk] and the pairs that may attend.

        Of one head.
        """
        seqlen_q, seqlen_k = self.query.shape[2], self.key.shape[2]
        length = seqlen_k if self.kv_lengths is None else int(self.kv_lengths[b])
        offset = self.q_offset if self.kv_lengths is None else length - seqlen_q
        i, j = np.arange(seqlen_q)[:, None] + offset, np.arange(seqlen_k)[None, :]
        kept = np.broadcast_to(j < length, (seqlen_q, seqlen_k)).copy()
        if self.mask is not None and length > 0:
            kept[:, :length] &= self.mask.keeps(i, j[:, :length], seqlen_k=length, b=b, h=h)
        return torch.from_numpy(i), torch.from_numpy(j), torch.from_numpy(kept)

    def reference(self, dtype=torch.float64):
        """Output and LSE by dense masked softmax in the given dtype."""
        batch, heads = self.query.shape[:2]
        group = heads // self.key.shape[1]
        outputs, lses = [], []
        for b in range(batch):
            for h in range(heads):
                q, k, v = (
                    x.to(dtype)
                    for x in (self.query[b, h], self.key[b, h // group], self.value[b, h // group])
                )
                i, j, kept = self.kept(b, h)
                used = kept.any(0)
                k, v = torch.where(used[:, None], k, 0.0), torch.where(used[:, None], v, 0.0)
                s = (q @ k.T) * self.scaled()
                if self.softcap:
                    s = self.softcap * torch.tanh(s / self.softcap)
                if self.alibi_slopes is not None:
                    slope = (
                        self.alibi_slopes[h]
                        if self.alibi_slopes.ndim == 1
                        else self.alibi_slopes[b, h]
                    )
                    s = s - slope.to(dtype) * (i - j).abs().to(dtype)
                if self.bias is not None:
                    full = self.bias.expand(batch, heads, *s.shape)
                    s = s + full[b, h].to(dtype)
                s = s.masked_fill(~kept, -INF)
                sink = None if self.sinks is None else self.sinks[h].to(dtype)
                output, lse = softmax_rows(s, v, sink)
                outputs.append(output)
                lses.append(lse)
        shape = self.query.shape[:3]
        return torch.stack(outputs).view(*shape, -1), torch.stack(lses).view(shape)

    def check(self, kernel=None, config=None):
        """The kernel's error is at most twice that of the same computation in the inputs' dtype.

        Plus rounding.
        """
        output, lse = self.run(kernel, config)
        expected, expected_lse = self.reference()
        eager, eager_lse = self.reference(self.query.dtype)
        assert_close(output, expected, eager, self.query.dtype)
        # Scores are sums of terms near 1: a small LSE of few keys has their rounding, not its own.
        assert_close(lse, expected_lse, eager_lse, torch.float32, at_least=1.0)
        return output, lse


def softmax_rows(s, v, sink):
    """Softmax over the keys and its log-sum-exp.

    A row with nothing kept gives 0 and -inf (or the sink).
    """
    top = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_full((s.shape[0], 1), -INF)
    top = torch.where(top == -INF, 0.0, top)
    p = torch.exp(s - top)
    total = p.sum(-1, keepdim=True)
    lse = (top + torch.log(total))[:, 0]
    output = torch.where(total == 0, 0.0, (p @ v) / torch.where(total == 0, 1.0, total))
    if sink is not None:
        merged = torch.logaddexp(lse, sink)
        output, lse = output * torch.exp(lse - merged)[:, None], merged
    return output, lse


def assert_close(actual, expected, eager, dtype, at_least=0.0):
    """DESIGN 8: max|out - ref| <= 2 max|eager - ref| + 2 eps(dtype) max|ref|.

    Infinities in the same places.
    """
    actual, eager = actual.double(), eager.double()
    infinite = torch.isinf(expected)
    assert torch.equal(torch.where(infinite, actual, 0.0), torch.where(infinite, expected, 0.0))
    actual, expected, eager = (torch.where(infinite, 0.0, x) for x in (actual, expected, eager))
    assert not torch.isnan(actual).any()
    if actual.numel() == 0:
        return
    magnitude = max(float(expected.abs().max()), at_least)
    allowed = 2 * (eager - expected).abs().max() + 2 * torch.finfo(dtype).eps * magnitude
    error = (actual - expected).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def default_config(kernel):
    """A small config, so that short test sequences have several tiles."""
    if kernel.name == "cpu_decode":
        return CpuDecodeConfig(block_k=64, min_piece=1)
    return CpuForwardConfig(block_q=64, block_k=48)
