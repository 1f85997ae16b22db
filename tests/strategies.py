"""Random masks with lengths that they fit, for property tests (hypothesis).

@given(case=mask_expressions())
def test_plan(case): case.mask, case.seqlen_q, case.seqlen_k, case.q_offset, case.batch,
case.num_heads
"""

import dataclasses

import numpy as np
from hypothesis import strategies as st

from portattn import masks
from portattn.masks import Mask


@dataclasses.dataclass(frozen=True)
class MaskCase:
    """A mask and a call that it fits: query positions are q_offset + [0, seqlen_q)."""

    mask: Mask
    seqlen_q: int
    seqlen_k: int
    q_offset: int
    batch: int
    num_heads: int


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What a random mask must fit, and whether it may still differ by batch and head."""

    seqlen_q: int
    seqlen_k: int
    q_offset: int
    batch: int
    num_heads: int
    by_batch: bool = True
    by_head: bool = True

    @property
    def positions(self) -> int:
        """Positions that per-position data must cover for the queries."""
        return max(self.q_offset + self.seqlen_q, 1)


def _bounds(draw, limit):
    """A lower and an upper bound, either possibly None, in [-limit, limit]."""
    edges = st.integers(-limit, limit) | st.integers(-limit // 4 - 8, limit // 4 + 8)
    first, second = sorted((draw(edges), draw(edges)))
    absent = draw(st.sampled_from(["neither", "neither", "low", "high", "neither", "both"]))
    return (
        None if absent in ("low", "both") else first,
        None if absent in ("high", "both") else second,
    )


def _positions(draw, size):
    """Some positions below size: a few, or each one with some probability."""
    if draw(st.booleans()):
        return draw(st.lists(st.integers(0, max(size - 1, 0)), max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return np.flatnonzero(rng.random(size) < draw(st.sampled_from([0.02, 0.3, 0.9])))


def _block(draw):
    return draw(st.integers(1, 48) | st.sampled_from([16, 32, 64, 128, 200]))


def _band(draw, sizes):
    return masks.Band(*_bounds(draw, sizes.positions + sizes.seqlen_k))


def _key_range(draw, sizes):
    low, high = sorted(draw(st.integers(-3, sizes.seqlen_k + 3)) for _ in range(2))
    return masks.KeyRange(draw(st.sampled_from([low, None])), draw(st.sampled_from([high, None])))


def _query_range(draw, sizes):
    first, last = sizes.q_offset - 3, sizes.q_offset + sizes.seqlen_q + 3
    low, high = sorted(draw(st.integers(first, last)) for _ in range(2))
    return masks.QueryRange(
        draw(st.sampled_from([low, None])), draw(st.sampled_from([high, None]))
    )


def _residues(draw):
    m = draw(st.integers(1, 40) | st.sampled_from([64, 100, 128, 256, 700]))
    a, b = sorted((draw(st.integers(0, m)), draw(st.integers(0, m))))
    if draw(st.booleans()):
        b = min(a + 1, m)
    return m, a, b


def _key_modulo(draw, sizes):
    return masks.KeyModulo(*_residues(draw))


def _diff_modulo(draw, sizes):
    return masks.DiffModulo(*_residues(draw))


def _block_band(draw, sizes):
    return masks.BlockBand(_block(draw), *_bounds(draw, 12))


def _same_block(draw, sizes):
    return masks.SameBlock(_block(draw))


def _key_set(draw, sizes):
    return masks.KeySet(_positions(draw, sizes.seqlen_k + 5))


def _query_set(draw, sizes):
    return masks.QuerySet(_positions(draw, sizes.positions + 5))


def _random_blocks(draw, sizes):
    seed = draw(st.integers(0, 9) | st.integers(0, 2**63 - 1))
    return masks.RandomBlocks(_block(draw), draw(st.integers(0, 6)), seed)


def _block_table(draw, sizes):
    block_q, block_k = _block(draw), _block(draw)
    shape = [
        -(-sizes.positions // block_q) + draw(st.integers(0, 1)),
        -(-sizes.seqlen_k // block_k),
    ]
    heads = sizes.by_head and draw(st.booleans())
    if sizes.by_batch and draw(st.booleans()):
        shape = [sizes.batch, sizes.num_heads if heads else 1, *shape]
    elif heads:
        shape = [sizes.num_heads, *shape]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return masks.BlockTable(
        rng.random(shape) < draw(st.sampled_from([0.1, 0.5, 0.95])), block_q, block_k
    )


def _ids(draw, sizes, size):
    shape = [sizes.batch, size] if sizes.by_batch and draw(st.booleans()) else [size]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = rng.integers(0, draw(st.integers(1, 5)), shape) - 1
    return np.sort(ids, axis=-1) if draw(st.booleans()) else ids


def _segments(draw, sizes):
    q_ids = _ids(draw, sizes, max(sizes.positions, sizes.seqlen_k))
    return masks.Segments(
        q_ids, None if draw(st.booleans()) else _ids(draw, sizes, sizes.seqlen_k)
    )


def _documents(draw, sizes):
    size = max(sizes.positions, sizes.seqlen_k)
    cuts = draw(st.lists(st.integers(0, size), max_size=6))
    return masks.Documents([0, *sorted(cuts), size + draw(st.integers(0, 3))])


def _key_lengths(draw, sizes):
    one = st.integers(0, sizes.seqlen_k + 3)
    return masks.KeyLengths(draw(st.lists(one, min_size=sizes.batch, max_size=sizes.batch)))


_ANYWHERE = (
    _band,
    _band,
    _key_range,
    _query_range,
    _key_modulo,
    _diff_modulo,
    _block_band,
    _same_block,
    _key_set,
    _query_set,
    _random_blocks,
)
_NEED_POSITIONS_INSIDE = (_block_table, _segments, _documents)


def _primitive(draw, sizes):
    kinds = _ANYWHERE + (_NEED_POSITIONS_INSIDE if sizes.q_offset >= 0 else ())
    kinds += (_key_lengths,) if sizes.by_batch else ()
    if draw(st.integers(0, 29)) == 17:
        return masks.All()
    return draw(st.sampled_from(kinds))(draw, sizes)


def _expression(draw, sizes, depth):
    """A mask of at most ``depth`` levels."""
    if depth <= 1:
        return _primitive(draw, sizes)
    kind = draw(st.sampled_from(["leaf", "and", "and", "or", "or", "not", "head", "batch"]))
    if kind == "not":
        return ~_expression(draw, sizes, depth - 1)
    if kind == "head" and sizes.by_head:
        inside = dataclasses.replace(sizes, by_head=False)
        return masks.per_head(
            [_expression(draw, inside, depth - 1) for _ in range(sizes.num_heads)]
        )
    if kind == "batch" and sizes.by_batch:
        inside = dataclasses.replace(sizes, by_batch=False)
        return masks.per_batch([_expression(draw, inside, depth - 1) for _ in range(sizes.batch)])
    if kind not in ("and", "or"):
        return _primitive(draw, sizes)
    operands = [_expression(draw, sizes, depth - 1) for _ in range(draw(st.integers(2, 3)))]
    joined = operands[0]
    for mask in operands[1:]:
        joined = joined & mask if kind == "and" else joined | mask
    return joined


@st.composite
def _sizes(draw, max_len):
    lengths = st.integers(1, max_len) | st.sampled_from([63, 64, 65, 127, 128, 129, 255, 257, 1])
    seqlen_q, seqlen_k = min(draw(lengths), max_len), min(draw(lengths), max_len)
    if draw(st.integers(0, 2)) == 0:
        seqlen_k = seqlen_q
    offsets = [
        0,
        seqlen_k - seqlen_q,
        draw(st.integers(0, max_len)),
        draw(st.integers(-max_len, -1)),
    ]
    q_offset = draw(st.sampled_from(offsets))
    return _Sizes(seqlen_q, seqlen_k, q_offset, draw(st.integers(1, 3)), draw(st.integers(1, 3)))


def _case(mask, sizes):
    names = [field.name for field in dataclasses.fields(MaskCase)[1:]]
    return MaskCase(mask, **{name: getattr(sizes, name) for name in names})


@st.composite
def primitives(draw, max_len=700):
    """One primitive (never a composed mask), with lengths that it fits."""
    sizes = draw(_sizes(max_len))
    return _case(_primitive(draw, sizes), sizes)


@st.composite
def mask_expressions(draw, depth=4, max_len=700):
    """A random mask of at most ``depth`` levels over all primitives, with lengths that it fits.

    Lengths are 1 to max_len, often odd or at a tile's edge, and often different; q_offset is 0,
    seqlen_k - seqlen_q, positive, or negative (then without tables and segments, which need their
    positions inside); batch and num_heads are 1 to 3.
    """
    sizes = draw(_sizes(max_len))
    return _case(_expression(draw, sizes, depth), sizes)
