"""Every preset beside an independent definition, written from its source as sets of keys.

The definitions use plain integers and sets, none of the library's primitives.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable

import numpy as np
import torch

from portattn import masks
from portattn.masks import Mask

MAX_LEN = 700  # what masks with data cover
_GENERATOR = np.random.default_rng(7)
CU_SEQLENS = [0, 5, 5, 70, 199, 200, 450, MAX_LEN]
LENGTHS = [0, 37, 10_000]
TABLE = _GENERATOR.random((50, 44)) < 0.3
HEAD_TABLE = _GENERATOR.random((2, 22, 22)) < 0.3
DENSE = _GENERATOR.random((MAX_LEN, MAX_LEN)) < 0.4
GLOBAL_POSITIONS = [3, 64, 65, 300]


@dataclasses.dataclass(frozen=True)
class PresetCase:
    """A preset and the keys that the query at position i attends to, out of range(seqlen).

    ``attended(i, seqlen, b, h)`` may name keys outside [0, seqlen); `expected` drops them.
    """

    name: str
    mask: Mask
    attended: Callable[[int, int, int, int], Iterable[int]]
    batch: int = 1
    num_heads: int = 1


def expected(
    case: PresetCase, seqlen_q: int, seqlen_k: int, q_offset: int = 0, b: int = 0, h: int = 0
) -> np.ndarray:
    """The case's definition as a bool array [seqlen_q, seqlen_k]."""
    kept = np.zeros((seqlen_q, seqlen_k), bool)
    for row in range(seqlen_q):
        keys = [j for j in case.attended(q_offset + row, seqlen_k, b, h) if 0 <= j < seqlen_k]
        kept[row, keys] = True
    return kept


def _window(i, half, step=1):
    """Half a window's keys on each side of i, ``step`` apart, and i."""
    return {i + step * n for n in range(-half, half + 1)}


def _longformer(window, tokens, dilation):
    def attended(i, seqlen, b, h):
        if i in tokens:
            return range(seqlen)
        return _window(i, window // 2, dilation) | set(tokens)

    return attended


def _splitmix(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def drawn(seed, query_block, num_blocks, count):
    """The blocks that docs/formats.md draws, in Python's integers."""
    chosen = set()
    for t in range(num_blocks - min(count, num_blocks), num_blocks):
        inner = _splitmix((seed + 0x9E3779B97F4A7C15) % 2**64)
        value = _splitmix((_splitmix((inner + query_block) % 2**64) + t) % 2**64)
        r = value % (t + 1)
        chosen.add(t if r in chosen else r)
    return chosen


def _bigbird(block, random_blocks, window_blocks, global_blocks, seed):
    def attended(i, seqlen, b, h):
        own, num_blocks = i // block, -(-seqlen // block)
        if own < global_blocks:
            return range(seqlen)
        blocks = _window(own, (window_blocks - 1) // 2) | set(range(global_blocks))
        blocks |= drawn(seed, own, num_blocks, random_blocks)
        return [j for one in blocks for j in range(one * block, (one + 1) * block)]

    return attended


def _strided(stride):
    def attended(i, seqlen, b, h):
        near = set(range(max(0, i - stride), i + 1))  # A(1) of section 4.3
        far = {j for j in range(i + 1) if (i - j) % stride == 0}  # A(2)
        return near | far

    return attended


def _fixed(stride, c):
    def attended(i, seqlen, b, h):
        same = {j for j in range(i + 1) if j // stride == i // stride}
        summary = {j for j in range(i + 1) if j % stride in range(stride - c, stride)}
        return same | summary

    return attended


def _document(i, seqlen, b, h):
    for first, last in itertools.pairwise(CU_SEQLENS):
        if first <= i < last:
            return range(first, last)
    raise AssertionError(f"position {i} is in no document")


def _columns(row, block):
    return [j for t in np.flatnonzero(row) for j in range(t * block, (t + 1) * block)]


PRESETS = [
    PresetCase("causal", masks.causal(), lambda i, s, b, h: range(i + 1)),
    PresetCase("local", masks.local(16, 5), lambda i, s, b, h: range(i - 16, i + 6)),
    PresetCase("local_left", masks.local(None, 0), lambda i, s, b, h: range(i + 1)),
    PresetCase("local_right", masks.local(2, None), lambda i, s, b, h: range(i - 2, s)),
    PresetCase(
        "sliding_window", masks.sliding_window(33), lambda i, s, b, h: range(i - 32, i + 1)
    ),
    PresetCase("sliding_window_1", masks.sliding_window(1), lambda i, s, b, h: [i]),
    PresetCase("longformer", masks.longformer(32, 5), _longformer(32, range(5), 1)),
    PresetCase("longformer_local", masks.longformer(7), _longformer(7, (), 1)),
    PresetCase("longformer_dilated", masks.longformer(16, 2, 3), _longformer(16, range(2), 3)),
    PresetCase(
        "longformer_positions",
        masks.longformer(10, torch.tensor(GLOBAL_POSITIONS[::-1])),
        _longformer(10, GLOBAL_POSITIONS, 1),
    ),
    PresetCase("bigbird", masks.bigbird(16, 2, 3, 1, seed=5), _bigbird(16, 2, 3, 1, 5)),
    PresetCase(
        "bigbird_even",
        masks.bigbird(13, 3, 4, 2, seed=2**63 - 1),
        _bigbird(13, 3, 3, 2, 2**63 - 1),
    ),
    PresetCase("bigbird_no_global", masks.bigbird(64, 1, 1, 0), _bigbird(64, 1, 1, 0, 0)),
    PresetCase("bigbird_no_random", masks.bigbird(32, 0, 5, 1), _bigbird(32, 0, 5, 1, 0)),
    PresetCase("strided", masks.sparse_transformer_strided(17), _strided(17)),
    PresetCase("strided_1", masks.sparse_transformer_strided(1), lambda i, s, b, h: range(i + 1)),
    PresetCase("fixed", masks.sparse_transformer_fixed(24, 3), _fixed(24, 3)),
    PresetCase("fixed_no_summary", masks.sparse_transformer_fixed(24, 0), _fixed(24, 0)),
    PresetCase("dilated", masks.dilated(9, 4), lambda i, s, b, h: _window(i, 4, 4)),
    PresetCase("dilated_1", masks.dilated(9, 1), lambda i, s, b, h: _window(i, 4)),
    PresetCase("prefix_lm", masks.prefix_lm(21), lambda i, s, b, h: range(max(i + 1, 21))),
    PresetCase("prefix_lm_0", masks.prefix_lm(0), lambda i, s, b, h: range(i + 1)),
    PresetCase(
        "streaming_llm",
        masks.streaming_llm(4, 40),
        lambda i, s, b, h: {j for j in range(4) if j <= i} | set(range(i - 39, i + 1)),
    ),
    PresetCase("documents", masks.documents(torch.tensor(CU_SEQLENS)), _document),
    PresetCase(
        "documents_causal",
        masks.documents(CU_SEQLENS) & masks.causal(),
        lambda i, s, b, h: [j for j in _document(i, s, b, h) if j <= i],
    ),
    PresetCase(
        "padding", masks.padding(LENGTHS), lambda i, s, b, h: range(min(LENGTHS[b], s)), batch=3
    ),
    PresetCase(
        "block_sparse",
        masks.block_sparse(TABLE, (14, 16)),
        lambda i, s, b, h: _columns(TABLE[i // 14], 16),
    ),
    PresetCase(
        "block_sparse_heads",
        masks.block_sparse(torch.from_numpy(HEAD_TABLE), 32),
        lambda i, s, b, h: _columns(HEAD_TABLE[h, i // 32], 32),
        num_heads=2,
    ),
    PresetCase("dense", masks.dense(DENSE), lambda i, s, b, h: np.flatnonzero(DENSE[i])),
]
