"""The cases of benchmarks/cpu_forward.py: what is computed, by whom else.

And the ratio to reach.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from portattn import masks
from portattn.bench import peers_cpu

if TYPE_CHECKING:
    from portattn.bench.peers_cpu import Call, MaskMod
    from portattn.masks import Mask

WINDOW, BLOCK, GLOBAL = 256, 64, 64


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention problem.

    Attributes:
        name: row name.
        seqlen_q, seqlen_k, head_dim: sizes; batch 1, 8 heads.
        dtype: of all tensors.
        mask: what may attend; None keeps everything.
        causal: compared with SDPA's own is_causal.
        goals: peer -> how many times faster portattn is to be.
        mask_mod, flex_block: the mask as FlexAttention takes it; None: not compared.
        memory_bound: compared with the read bandwidth instead of the FMA rate.
        goal_of_limit: share of that limit to reach, or 0.
    """

    name: str
    seqlen_q: int
    seqlen_k: int
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    mask: Mask | None = None
    causal: bool = False
    goals: dict[str, float] = dataclasses.field(default_factory=dict)
    mask_mod: MaskMod | None = None
    flex_block: int = 0
    memory_bound: bool = False
    goal_of_limit: float = 0.0

    @property
    def gflop(self) -> float:
        """10^9 operations that the kept pairs need, 8 heads."""
        density = (
            1.0
            if self.mask is None
            else self.mask.density(self.seqlen_q, self.seqlen_k, self.q_offset)
        )
        return 4e-9 * 8 * self.head_dim * density * self.seqlen_q * self.seqlen_k

    @property
    def gbytes(self) -> float:
        """10^9 bytes of keys and values, 8 heads."""
        return 2e-9 * 8 * self.seqlen_k * self.head_dim * self.dtype.itemsize

    @property
    def q_offset(self) -> int:
        """The queries are the newest tokens."""
        return self.seqlen_k - self.seqlen_q

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random query, key and value."""
        generator = torch.Generator().manual_seed(0)
        lengths = (self.seqlen_q, self.seqlen_k, self.seqlen_k)
        query, key, value = (
            torch.randn(1, 8, length, self.head_dim, generator=generator).to(self.dtype)
            for length in lengths
        )
        return query, key, value

    def peers(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, flex: bool
    ) -> dict[str, Call]:
        """Name -> call of everything that this case is compared with."""
        calls: dict[str, Call] = {}
        if self.mask is None or self.causal:
            calls["sdpa"] = peers_cpu.sdpa(query, key, value, causal=self.causal)
        else:
            calls["sdpa_mask"] = peers_cpu.sdpa_with_mask(query, key, value, self.mask)
        if flex and self.flex_block:
            calls["flex"] = peers_cpu.flex(query, key, value, self.mask_mod, self.flex_block)
        if "longformer_eager" in self.goals:
            calls["longformer_eager"] = peers_cpu.longformer_eager(
                seqlen=self.seqlen_q,
                num_heads=8,
                head_dim=self.head_dim,
                window=2 * WINDOW,
                global_tokens=GLOBAL,
            )
        if "bigbird_eager" in self.goals:
            calls["bigbird_eager"] = peers_cpu.bigbird_eager(
                query, key, value, block=BLOCK, random_blocks=3
            )
        return calls


def _dense_and_causal() -> list[Case]:
    cases = []
    for seqlen, causal_goals in ((1024, (1.7, 1.7)), (4096, (1.3, 1.15))):
        for head_dim, dense_goal, causal_goal in zip(
            (64, 128), (1.2, 1.08), causal_goals, strict=True
        ):
            flex = 128 if seqlen == 4096 and head_dim == 64 else 0
            cases.append(
                Case(
                    f"dense S{seqlen} D{head_dim}",
                    seqlen,
                    seqlen,
                    head_dim,
                    flex_block=flex,
                    goals={"sdpa": dense_goal},
                )
            )
            cases.append(
                Case(
                    f"causal S{seqlen} D{head_dim}",
                    seqlen,
                    seqlen,
                    head_dim,
                    flex_block=flex,
                    mask=masks.causal(),
                    causal=True,
                    goals={"sdpa": causal_goal},
                    mask_mod=lambda b, h, i, j: i >= j,
                )
            )
    for dtype, name, goal in ((torch.bfloat16, "bf16", 1.15), (torch.float16, "fp16", 1.6)):
        for head_dim in (64, 128):
            for seqlen in (1024, 4096):
                label = f"{name} dense S{seqlen} D{head_dim}"
                cases.append(Case(label, seqlen, seqlen, head_dim, dtype, goals={"sdpa": goal}))
            label = f"{name} causal S4096 D{head_dim}"
            cases.append(
                Case(
                    label, 4096, 4096, head_dim, dtype, masks.causal(), True, goals={"sdpa": goal}
                )
            )
    return cases


def _table_mod(mask: Mask, blocks: int) -> MaskMod:
    """A mask of whole blocks as FlexAttention's predicate: a look-up in a table."""
    dense = mask.to_dense(blocks * BLOCK, blocks * BLOCK, 0)
    table = dense[::BLOCK, ::BLOCK].contiguous()
    return lambda b, h, i, j: table[i // BLOCK, j // BLOCK]


def _sparse(seqlen: int) -> list[Case]:
    bigbird = masks.bigbird(BLOCK, 3, 3, 1, seed=0)
    generator = torch.Generator().manual_seed(0)
    blocks = seqlen // BLOCK
    table = torch.zeros(blocks, blocks, dtype=torch.bool)
    for row in range(blocks):
        table[row, torch.randperm(blocks, generator=generator)[:8]] = True
    return [
        Case(
            f"window {WINDOW} S{seqlen}",
            seqlen,
            seqlen,
            mask=masks.sliding_window(WINDOW),
            goals={"flex": 2.5},
            mask_mod=lambda b, h, i, j: (i >= j) & (i - j < WINDOW),
            flex_block=128,
        ),
        Case(
            f"Longformer {WINDOW}+{GLOBAL} S{seqlen}",
            seqlen,
            seqlen,
            mask=masks.longformer(2 * WINDOW, GLOBAL),
            goals={"sdpa_mask": 7.0, "longformer_eager": 7.0},
            mask_mod=lambda b, h, i, j: ((i - j).abs() <= WINDOW) | (i < GLOBAL) | (j < GLOBAL),
            flex_block=64,
        ),
        Case(
            f"BigBird {BLOCK} S{seqlen}",
            seqlen,
            seqlen,
            mask=bigbird,
            goals={"flex": 1.8, "bigbird_eager": 0.0},
            mask_mod=_table_mod(bigbird, blocks),
            flex_block=BLOCK,
        ),
        Case(
            f"8 random blocks a row S{seqlen}",
            seqlen,
            seqlen,
            mask=masks.block_sparse(table, BLOCK),
        ),
    ]


def _decode() -> list[Case]:
    cases = []
    for seqlen, goals, share in (
        (1024, {"sdpa": 1.5}, 0.0),
        (4096, {"sdpa": 1.5}, 0.0),
        (65536, {"sdpa": 0.0}, 0.85),
    ):
        cases.append(
            Case(
                f"decode Sk{seqlen} D64",
                1,
                seqlen,
                goals=goals,
                memory_bound=True,
                goal_of_limit=share,
            )
        )
    return cases


def all_cases() -> list[Case]:
    """Every case, in the order of the table."""
    return [*_dense_and_causal(), *_sparse(4096), *_decode()]
