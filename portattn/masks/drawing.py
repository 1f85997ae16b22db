"""RandomBlocks' draw: a counter-based hash, the same bit for bit as in C++ (docs/formats.md)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GOLDEN = 0x9E3779B97F4A7C15
_WRAP = 2**64 - 1


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def drawn_blocks(
    query_blocks: npt.NDArray[np.int64], num_key_blocks: int, count: int, seed: int
) -> npt.NDArray[np.bool_]:
    """Which key blocks are drawn for each query block.

    Floyd's sampling without repetition (Bentley and Floyd, CACM 30(9), 1987), vectorised over the
    query blocks.

    Args:
        query_blocks: block indices [rows]; negative ones too.
        num_key_blocks: blocks to draw from.
        count: blocks to draw for each row; all of them if there are no more.
        seed: 0 <= seed < 2**63.

    Returns:
        bool [rows, num_key_blocks].
    """
    rows = np.arange(query_blocks.size)
    drawn = np.zeros((query_blocks.size, num_key_blocks), np.bool_)
    # Scalars would warn on overflow where arrays wrap.
    start = _mix(np.array([(seed + _GOLDEN) & _WRAP], np.uint64))
    state = _mix(start + query_blocks.astype(np.uint64))
    for last in range(max(num_key_blocks - count, 0), num_key_blocks):
        choice = (_mix(state + np.uint64(last)) % np.uint64(last + 1)).astype(np.int64)
        drawn[rows, np.where(drawn[rows, choice], last, choice)] = True
    return drawn
