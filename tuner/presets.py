"""Named sets of problems: the same cells as `portattn bench`, those that share code in a row."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING

from portattn import masks
from portattn.errors import TuningError
from portattn.tuner import cases

if TYPE_CHECKING:
    from collections.abc import Callable

    from portattn.tuner.cases import Case

_TOKENS, _WIDTH = 16384, 2048  # batch * seqlen and heads * head_dim of the forward cells
_DOCUMENTS, _PACKED = 16, 65536


def _forward(device: str) -> list[Case]:
    return [
        cases.parse(
            f"b{_TOKENS // seqlen} h{_WIDTH // dim} s{seqlen} d{dim} bfloat16 {mask}", device
        )
        for dim, seqlen, mask in itertools.product(
            (128, 64, 256), (16384, 4096, 1024), ("causal", "")
        )
    ]


def _sparse(device: str) -> list[Case]:
    patterns = (
        "sliding_window:1024",
        "longformer:512:64",
        "bigbird:64:3:3:2",
        "local_strided:128",
        "sparse_transformer_strided:128",
        "random_blocks:128:16",
    )
    return [cases.parse(f"b1 h16 s16384 d128 bfloat16 {mask}", device) for mask in patterns]


def _decode(device: str) -> list[Case]:
    sizes = ((16, 8192), (1, 131072), (64, 8192), (128, 4096))
    return [
        cases.parse(f"b{batch} h32 kv8 sq1 sk{seqlen} d128 bfloat16 kv_lengths", device)
        for batch, seqlen in sizes
    ]


def _documents(device: str) -> list[Case]:
    """Packed sequences of unlike lengths, causal and not."""
    ends = sorted(random.Random(0).sample(range(1, _PACKED), _DOCUMENTS - 1))
    packed = masks.documents([0, *ends, _PACKED])
    plain = cases.parse(f"b1 h16 s{_PACKED} d128 bfloat16", device)
    return [cases.with_mask(plain, mask) for mask in (packed & masks.causal(), packed)]


_PRESETS: dict[str, Callable[[str], list[Case]]] = {
    "forward": _forward,
    "sparse": _sparse,
    "documents": _documents,
    "decode": _decode,
}
PRESETS = tuple(_PRESETS)


def preset(name: str, device: str) -> list[Case]:
    """The problems of a named set.

    Args:
        name: one of `PRESETS`.
        device: torch device to tune on.

    Raises:
        TuningError: there is no such set.
    """
    if name not in _PRESETS:
        raise TuningError(f"preset is {name!r}; it must be one of {', '.join(PRESETS)}")
    return _PRESETS[name](device)
