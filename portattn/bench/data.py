"""A row's tensors, and the float64 reference that every contender is checked against."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from portattn.bench.workloads import Workload
    from portattn.masks import Mask

SAMPLED_ROWS = 32


class Data:
    """Random inputs of a row.

    Attributes:
        query: [batch, num_heads, seqlen_q, head_dim].
        key, value: [batch, num_kv_heads, seqlen_k, head_dim].
        kv_lengths: int32 [batch] on the device, or None.
        mask: portattn's; None keeps everything.
    """

    def __init__(self, workload: Workload, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(heads: int, length: int) -> torch.Tensor:
            sizes = (workload.batch, heads, length, workload.head_dim)
            return torch.randn(
                sizes, device=device, dtype=workload.torch_dtype, generator=generator
            )

        self.workload = workload
        self.device = device
        self.query = draw(workload.num_heads, workload.seqlen_q)
        self.key = draw(workload.num_kv_heads, workload.seqlen_k)
        self.value = draw(workload.num_kv_heads, workload.seqlen_k)
        lengths = workload.kv_lengths()
        self.kv_lengths = None if lengths is None else lengths.to(device)
        self.mask: Mask | None = workload.pattern.mask(workload.seqlen_k)

    @functools.cached_property
    def bshd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value in memory as [batch, seqlen, heads, head_dim], made once."""
        query, key, value = (
            tensor.transpose(1, 2).contiguous() for tensor in (self.query, self.key, self.value)
        )
        return query, key, value

    @property
    def is_grouped(self) -> bool:
        """Whether several query heads share a KV head."""
        return self.workload.num_heads != self.workload.num_kv_heads


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """Some rows of one batch entry in float64."""

    batch: int
    exact: torch.Tensor
    allowed: float


class Reference:
    """Sampled rows in float64, and the error that the plain computation in the dtype makes there.

    The rule: |output - reference| <= 2 * max|plain - reference| + 2 * eps * max|reference|.
    """

    def __init__(self, data: Data) -> None:
        workload = data.workload
        draw = np.random.default_rng(0)
        drawn = draw.integers(workload.seqlen_q, size=SAMPLED_ROWS - 2)
        self.rows = np.unique(np.concatenate(([0, workload.seqlen_q - 1], drawn)))
        heads = {0, workload.num_heads // 2, workload.num_heads - 1}
        self.heads = sorted(heads)
        self.samples = [self._sample(data, b) for b in sorted({0, workload.batch - 1})]

    def _sample(self, data: Data, b: int) -> Sample:
        workload = data.workload
        group = workload.num_heads // workload.num_kv_heads
        length = workload.seqlen_k
        if data.kv_lengths is not None:
            length = int(data.kv_lengths[b])
        kv_heads = [head // group for head in self.heads]
        query = data.query[b, self.heads][:, torch.from_numpy(self.rows).to(data.device)]
        key, value = data.key[b, kv_heads, :length], data.value[b, kv_heads, :length]
        keep = None
        if data.mask is not None:
            keys = np.arange(length)[None, :]
            kept = [
                data.mask.keeps(self.rows[:, None], keys, seqlen_k=length, b=b, h=head)
                for head in self.heads
            ]
            shape = (len(self.rows), length)
            kept = [np.broadcast_to(one, shape) for one in kept]
            keep = torch.from_numpy(np.stack(kept)).to(data.device)
        exact = _attend(query.double(), key.double(), value.double(), keep)
        plain = _attend(query, key, value, keep).double()
        eps = torch.finfo(query.dtype).eps
        allowed = 2 * (plain - exact).abs().max() + 2 * eps * exact.abs().max()
        return Sample(b, exact, float(allowed))

    def wrong(self, output: torch.Tensor) -> str | None:
        """What is wrong with an output [batch, num_heads, seqlen_q, head_dim]; None: nothing."""
        rows = torch.from_numpy(self.rows).to(output.device)
        for sample in self.samples:
            found = output[sample.batch, self.heads][:, rows].double()
            error = float((found - sample.exact).abs().max())
            if not error <= sample.allowed:
                return (
                    f"wrong result: error {error:.2e} in batch {sample.batch}, allowed are "
                    f"{sample.allowed:.2e}"
                )
        return None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keep: torch.Tensor | None
) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if keep is not None:
        scores = scores.masked_fill(~keep, -math.inf)
    return torch.softmax(scores, -1) @ value
