"""A cover holds every kept pair, and stands where a mask has structure."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from portattn import masks
from portattn.errors import ExportError
from portattn.export.cover import LONG_SEQLEN, Positions, choose_cover
from portattn.export.expression import NO_LOWER, NO_UPPER, parse_program
from portattn.export.facts import DataFacts, data_facts
from portattn.masks import Band, BlockBand, KeyModulo, KeyRange, QueryRange, RandomBlocks
from portattn.masks.mask import All

GATHERED = {
    "sliding_window": (masks.sliding_window(256), 64),
    "local": (masks.local(100, 100), 64),
    "longformer": (masks.longformer(512, 16), 128),
    "bigbird": (masks.bigbird(64, 3, 3, 2, seed=1), 64),
    "strided": (masks.sparse_transformer_strided(128), 128),
    "fixed": (masks.sparse_transformer_fixed(128, 4), 128),
    "dilated": (masks.dilated(65, 4), 64),
    "streaming_llm": (masks.streaming_llm(4, 256), 64),
    "window and padding": (masks.sliding_window(64) & masks.padding([70, 20]), 32),
    "per head": (masks.per_head([masks.local(3, 3), masks.sliding_window(40)]), 32),
    "documents": (masks.documents(list(range(0, 2001, 100))), 64),
    "block table": (masks.block_sparse(np.eye(40, dtype=bool), 16), 16),
    "far band": (masks.causal() & Band(-700, -600), 64),
}
DENSE = {
    "all": All(),
    "causal": masks.causal(),
    "prefix_lm": masks.prefix_lm(10),
    "not a window": ~masks.sliding_window(16),
    "documents": masks.documents([0, 5, 10]),
    "one dense head": masks.per_head([masks.causal(), masks.sliding_window(40)]),
}


def facts_of(mask):
    shapes = [tuple(tensor.shape) for tensor in mask.data]
    return data_facts(parse_program(mask.program), shapes, [t.numpy() for t in mask.data])


@pytest.mark.parametrize("name", GATHERED)
def test_structure_is_found(name):
    mask, block = GATHERED[name]
    cover = choose_cover(parse_program(mask.program), facts_of(mask), None)
    assert cover is not None
    assert cover.block == block
    assert cover.cost(LONG_SEQLEN) < LONG_SEQLEN / 10


@pytest.mark.parametrize("name", DENSE)
def test_masks_without_structure_stay_dense(name):
    shapes = [tuple(tensor.shape) for tensor in DENSE[name].data]
    program = parse_program(DENSE[name].program)
    facts = data_facts(program, shapes, [None] * len(shapes))
    assert choose_cover(program, facts, None) is None


def test_short_fixed_lengths_are_dense():
    program = parse_program(masks.sliding_window(256).program)
    assert choose_cover(program, DataFacts(), 300) is None
    assert choose_cover(program, DataFacts(), 4096) is not None


small = st.integers(-40, 40)
leaves = st.one_of(
    st.tuples(small, small).map(lambda ab: Band(min(ab), max(ab))),
    small.map(lambda a: Band(a, None)),
    small.map(lambda a: Band(None, a)),
    st.tuples(st.integers(1, 40), st.integers(-2, 0), st.integers(0, 2)).map(
        lambda nab: BlockBand(*nab)
    ),
    st.tuples(st.integers(0, 20), st.integers(0, 20)).map(
        lambda ab: KeyRange(min(ab), max(ab) + 1)
    ),
    st.tuples(st.integers(0, 20), st.integers(0, 20)).map(
        lambda ab: QueryRange(min(ab), max(ab) + 1)
    ),
    st.integers(5, 40).map(lambda m: KeyModulo(m, m - 2, m)),
    st.sampled_from([32, 64]).map(lambda n: RandomBlocks(n, 1, 5)),
    st.integers(2, 50).map(masks.sparse_transformer_strided),
)
expressions = st.recursive(
    leaves,
    lambda inner: st.one_of(
        inner.map(lambda a: ~a),
        st.tuples(inner, inner).map(lambda ab: ab[0] & ab[1]),
        st.tuples(inner, inner).map(lambda ab: ab[0] | ab[1]),
    ),
    max_leaves=4,
)


def covered(cover, i, j, seqlen):
    """bool [rows, keys]: the pairs inside a cover, from what its fields say."""
    blocks = j // cover.block - i // cover.block
    inside = (blocks >= cover.low) & (blocks <= cover.high)
    for names, positions in ((cover.keys, j), (cover.queries, i)):
        for named in names:
            inside = inside | among(named, positions)
    for operands in cover.random:
        inside = inside | RandomBlocks(*operands).keeps(i, j, seqlen_k=seqlen)
    if cover.residue:
        inside = inside | ((i - j) % cover.block == 0)
    return np.broadcast_to(inside, np.broadcast_shapes(i.shape, j.shape))


def among(named: Positions, positions):
    if named.kind == "range":
        return (positions >= named.operands[0]) & (positions < named.operands[1])
    period, low, high = named.operands
    return (positions % period >= low) & (positions % period < high)


@hypothesis.settings(max_examples=300)
@hypothesis.given(expressions)
def test_covers_hold_every_kept_pair(mask):
    cover = choose_cover(parse_program(mask.program), DataFacts(), None)
    if cover is None:
        return
    seqlen = 260
    i, j = np.arange(seqlen)[:, None], np.arange(seqlen)[None, :]
    kept = mask.keeps(i, j, seqlen_k=seqlen)
    assert not (kept & ~covered(cover, i, j, seqlen)).any()
    assert cover.low > NO_LOWER
    assert cover.high < NO_UPPER


def test_programs_that_cannot_be_read():
    for program, message in (
        ([2, 0], "has version 2"),
        ([1, 99], "position 1 of 2"),
        ([1, 1, 0], "position 1 of 3"),
        ([1, 13, 2, 0], "position 4 of 4"),
        ([1, 0, 0], "1 values past"),
    ):
        with pytest.raises(ExportError, match=message):
            parse_program(program)
