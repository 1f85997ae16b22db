"""The rows of h100_forward.py, and the float64 reference that checks them."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch

from portattn import masks

if TYPE_CHECKING:
    from collections.abc import Callable

    from portattn.masks import Mask

TOKENS, WIDTH = 16384, 2048  # B * S and H * D of the dense rows
# block_q, block_k, num_warps, num_stages, tma
DENSE_CONFIGS = {
    64: [
        (64, 128, 4, 3, True),
        (128, 128, 8, 3, True),
        (128, 64, 4, 3, True),
        (128, 128, 8, 2, True),
    ],
    128: [
        (128, 128, 8, 3, True),
        (128, 128, 8, 2, True),
        (128, 64, 4, 3, False),
        (64, 128, 4, 3, True),
    ],
    256: [(128, 64, 8, 2, True), (64, 64, 4, 2, True), (64, 64, 4, 3, True)],
}
SPARSE_CONFIGS = [
    (64, 64, 4, 3, True),
    (64, 64, 4, 2, True),
    (64, 64, 4, 3, False),
    (64, 128, 4, 2, True),
    (128, 64, 8, 3, True),
    (128, 64, 8, 2, False),
    (64, 64, 4, 2, False),
    (64, 32, 4, 3, False),
]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    seqlen: int
    head_dim: int
    mask: Mask | None
    mask_mod: Callable[..., torch.Tensor] | None
    configs: list[tuple[int, int, int, int, bool]]
    operations: float | None  # None: sparse, no count
    batch: int
    num_heads: int


def dense_row(name: str, seqlen: int, head_dim: int) -> Row:
    """A dense or causal row at B * S = 16384, H * D = 2048."""
    batch, num_heads = TOKENS // seqlen, WIDTH // head_dim
    causal = name == "causal"
    operations = 4.0 * batch * num_heads * seqlen * seqlen * head_dim * (0.5 if causal else 1.0)
    return Row(
        name,
        seqlen,
        head_dim,
        masks.causal() if causal else None,
        (lambda b, h, i, j: i >= j) if causal else None,
        DENSE_CONFIGS[head_dim],
        operations,
        batch,
        num_heads,
    )


def sparse_rows() -> list[Row]:
    """Longformer, BigBird and local + strided at S = 16384, B1 H16 D128."""
    seqlen, block = 16384, 64
    bigbird = masks.bigbird(block, 3, 3, 2, 0)
    starts = torch.arange(0, seqlen, block).numpy()
    kept = bigbird.keeps(starts[:, None], starts[None, :], seqlen_k=seqlen)
    table = torch.from_numpy(kept.copy()).cuda()
    strided = masks.Band(-127, 0) | (masks.Band(None, 0) & masks.KeyModulo(128, 127, 128))
    rows = {
        "longformer 256+64": (
            masks.longformer(512, 64),
            lambda b, h, i, j: ((i - j).abs() <= 256) | (i < 64) | (j < 64),
        ),
        "bigbird 64": (bigbird, lambda b, h, i, j: table[i // block, j // block]),
        "local 128 + every 128th": (
            strided,
            lambda b, h, i, j: (i >= j) & ((i - j < 128) | (j % 128 == 127)),
        ),
    }
    return [
        Row(name, seqlen, 128, mask, mod, SPARSE_CONFIGS, None, 1, 16)
        for name, (mask, mod) in rows.items()
    ]


class Reference:
    """Sampled rows of one call in float64, and the error that bfloat16 eager makes there."""

    def __init__(
        self, row: Row, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        sampled = torch.randint(row.seqlen, (46,), generator=generator)
        self.rows = torch.cat((torch.tensor([0, row.seqlen - 1]), sampled)).cuda()
        self.heads = sorted({0, row.num_heads // 2, row.num_heads - 1})
        q, k, v = query[-1, self.heads][:, self.rows], key[-1, self.heads], value[-1, self.heads]
        keep = None
        if row.mask is not None:
            i = self.rows.cpu().numpy()[:, None]
            j = torch.arange(row.seqlen).numpy()[None, :]
            keep = torch.from_numpy(row.mask.keeps(i, j, seqlen_k=row.seqlen).copy()).cuda()
        self.exact, self.lse = self._eager(q.double(), k.double(), v.double(), keep)
        eager, _ = self._eager(q, k, v, keep)
        error = (eager.double() - self.exact).abs().max()
        self.allowed = float(2 * error + 2 * torch.finfo(q.dtype).eps * self.exact.abs().max())

    @staticmethod
    def _eager(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if keep is not None:
            s = s.masked_fill(~keep, -math.inf)
        return torch.softmax(s, -1) @ v, torch.logsumexp(s, -1)

    def check(self, name: str, output: torch.Tensor, lse: torch.Tensor | None = None) -> None:
        """Stop the benchmark at a wrong result."""
        found = output[-1, self.heads][:, self.rows].double()
        error = float((found - self.exact).abs().max())
        if not error <= self.allowed:
            raise SystemExit(f"{name}: error {error:.3e} is above the allowed {self.allowed:.3e}")
        if lse is not None:
            error = float((lse[-1, self.heads][:, self.rows].double() - self.lse).abs().max())
            if not error <= 1e-3:
                raise SystemExit(f"{name}: LSE error {error:.3e}")
