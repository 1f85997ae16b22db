"""What is to be computed: the tuning key."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionProblem:
    """One attention call without its data.

    Attributes:
        device_type: ``"cpu"`` or ``"cuda"`` (ROCm devices are ``"cuda"`` in torch as well).
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``; the reference takes
            ``"float64"`` too.
        batch, num_heads, num_kv_heads: counts.
        seqlen_q, seqlen_k: lengths in tokens.
        head_dim, head_dim_v: elements of a query or key row, of a value row.
        program: the mask's program (docs/formats.md), ``is_causal`` folded in; () means no mask.
        q_offset: key position of query row 0.
        features: score terms and options present, among ``softcap``, ``alibi``, ``bias``,
            ``sinks``, ``kv_lengths``, ``lse``, ``deterministic``, ``grad``.
        device: the torch device index string, e.g. ``"cuda:0"``; not part of the tuning key.
    """

    device_type: str
    dtype: str
    batch: int
    num_heads: int
    num_kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    program: tuple[int, ...] = ()
    q_offset: int = 0
    features: frozenset[str] = frozenset()
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of query, key and value."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // max(self.num_kv_heads, 1)
