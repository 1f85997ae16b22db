"""Each primitive against a brute force over pairs, in Python's own integers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portattn import masks
from portattn.errors import MaskError
from tests.presets import drawn
from tests.strategies import primitives

SEQLEN_K = 23
KNOWN = [[48, 76], [31, 34], [1, 19], [11, 50]]
ROWS = range(-9, 31)  # positions of queries may be negative, and past the keys


def brute(mask, keep, rows=ROWS, **where):
    """Compare every pair, and the same pairs asked one by one."""
    i, j = np.array(rows)[:, None], np.arange(SEQLEN_K)[None, :]
    wanted = np.array([[keep(int(a), int(b)) for b in j[0]] for a in i[:, 0]])
    np.testing.assert_array_equal(mask.keeps(i, j, seqlen_k=SEQLEN_K, **where), wanted)
    a, b = rows[3], 7
    assert mask.keeps(a, b, seqlen_k=SEQLEN_K, **where).shape == ()
    assert bool(mask.keeps(a, b, seqlen_k=SEQLEN_K, **where)) == keep(a, b)


@pytest.mark.parametrize(("lo", "hi"), [(-3, 4), (None, 0), (2, None), (None, None), (5, 5)])
def test_band(lo, hi):
    low, high = -(10**9) if lo is None else lo, 10**9 if hi is None else hi
    brute(masks.Band(lo, hi), lambda i, j: low <= j - i <= high)
    brute(masks.BlockBand(4, lo, hi), lambda i, j: low <= j // 4 - i // 4 <= high)


@pytest.mark.parametrize(("a", "b"), [(3, 9), (None, 4), (-2, None), (None, None), (6, 6)])
def test_ranges(a, b):
    low, high = -(10**9) if a is None else a, 10**9 if b is None else b
    brute(masks.KeyRange(a, b), lambda i, j: low <= j < high)
    brute(masks.QueryRange(a, b), lambda i, j: low <= i < high)


@pytest.mark.parametrize(
    ("m", "a", "b"), [(5, 1, 3), (1, 0, 1), (7, 6, 7), (4, 2, 2), (100, 0, 3)]
)
def test_residues(m, a, b):
    brute(masks.KeyModulo(m, a, b), lambda i, j: a <= j % m < b)
    brute(masks.DiffModulo(m, a, b), lambda i, j: a <= (i - j) % m < b)


def test_same_block():
    brute(masks.SameBlock(6), lambda i, j: i // 6 == j // 6)
    assert masks.SameBlock(6) == masks.BlockBand(6, 0, 0)


@pytest.mark.parametrize("positions", [[], [0], [4, 2, 2, 19, 500]])
def test_sets(positions):
    brute(masks.KeySet(positions), lambda i, j: j in positions)
    brute(masks.QuerySet(torch.tensor(positions, dtype=torch.int32)), lambda i, j: i in positions)


@pytest.mark.parametrize("count", [0, 1, 3, 6, 99])
@pytest.mark.parametrize("seed", [0, 12345, 2**63 - 1])
def test_random_blocks(count, seed):
    mask = masks.RandomBlocks(4, count, seed)
    brute(mask, lambda i, j: j // 4 in drawn(seed, i // 4, 6, count))


def test_random_blocks_of_a_known_seed_never_change():
    # Fixed values: another hash would change the meaning of every stored and trained mask.
    i, j = np.arange(-1, 3)[:, None], np.arange(100)[None]
    kept = masks.RandomBlocks(1, 2, 42).keeps(i, j, seqlen_k=100)
    assert [np.flatnonzero(row).tolist() for row in kept] == KNOWN


def test_block_table():
    rng = np.random.default_rng(3)
    table = rng.random((2, 3, 4, 6)) < 0.5
    inside = range(0, 20)
    for b in range(2):
        for h in range(3):
            brute(
                masks.BlockTable(table, 5, 4),
                lambda i, j, b=b, h=h: bool(table[b, h, i // 5, j // 4]),
                inside,
                b=b,
                h=h,
            )
    brute(
        masks.BlockTable(table[:, :1], 5, 4),
        lambda i, j: table[1, 0, i // 5, j // 4],
        inside,
        b=1,
        h=9,
    )
    brute(
        masks.BlockTable(table[0], 5, 4),
        lambda i, j: table[0, 2, i // 5, j // 4],
        inside,
        b=7,
        h=2,
    )
    brute(
        masks.BlockTable(table[0, 0], 5, 4),
        lambda i, j: table[0, 0, i // 5, j // 4],
        inside,
        b=7,
        h=7,
    )


def test_segments_and_lengths():
    q_ids, k_ids = np.arange(40).reshape(2, 20) // 7, np.arange(SEQLEN_K) // 5
    mask = masks.Segments(q_ids, torch.from_numpy(k_ids))
    brute(mask, lambda i, j: q_ids[1, i] == k_ids[j], range(0, 20), b=1)
    assert mask.batch == 2
    same = np.array([-1, 3, 3, -1] * 6)
    brute(masks.Segments(same), lambda i, j: same[i] == same[j], range(0, 24), b=5)
    brute(masks.KeyLengths([4, 0, 99]), lambda i, j: j < 4, b=0)
    brute(masks.KeyLengths([4, 0, 99]), lambda i, j: False, b=1)
    brute(masks.KeyLengths([4, 0, 99]), lambda i, j: True, b=2)


@settings(max_examples=150, deadline=None)
@given(case=primitives(max_len=300), data=st.data())
def test_a_single_pair_reads_like_the_dense_mask(case, data):
    dense = case.mask.to_dense(case.seqlen_q, case.seqlen_k, case.q_offset)
    row = data.draw(st.integers(0, case.seqlen_q - 1))
    key = data.draw(st.integers(0, case.seqlen_k - 1))
    one = case.mask.keeps(case.q_offset + row, key, seqlen_k=case.seqlen_k)
    assert bool(one) == bool(dense[row, key])


def test_depends_on_query():
    for mask in (masks.All(), masks.KeyRange(1, 4), masks.KeyModulo(3, 0, 1), masks.KeySet([1])):
        assert not mask.depends_on_query
        assert not (~mask & masks.KeyLengths([3])).depends_on_query
    for mask in (
        masks.Band(0, 0),
        masks.QueryRange(0, 1),
        masks.QuerySet([2]),
        masks.SameBlock(2),
    ):
        assert mask.depends_on_query
        assert masks.per_head([masks.All(), mask]).depends_on_query


TABLE = torch.ones(2, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.Band(3, 2), "lower bound 3 above upper bound 2"),
        (lambda: masks.Band(2**62, None), "must be in"),
        (lambda: masks.Band(0.0, 1), "lower bound is 0.0; it must be an integer"),
        (lambda: masks.Band(True, 1), "not a bool"),
        (lambda: masks.Band("0", 1), "must be an integer"),
        (lambda: masks.KeyRange(5, 4), "KeyRange has lower bound 5"),
        (lambda: masks.QueryRange(5, 4), "QueryRange has lower bound 5"),
        (lambda: masks.BlockBand(0, 0, 0), "block size n is 0"),
        (lambda: masks.BlockBand(2, 1, 0), "lower bound 1 above"),
        (lambda: masks.KeyModulo(0, 0, 0), "modulus m is 0"),
        (lambda: masks.KeyModulo(4, 3, 2), "upper residue b is 2"),
        (lambda: masks.DiffModulo(4, 0, 5), "upper residue b is 5"),
        (lambda: masks.DiffModulo(-4, 0, 1), "modulus m is -4"),
        (lambda: masks.RandomBlocks(0, 1, 0), "block size n is 0"),
        (lambda: masks.RandomBlocks(4, -1, 0), "count is -1"),
        (lambda: masks.RandomBlocks(4, 1, 2**63), "seed is"),
        (lambda: masks.KeySet([[1]]), "1 dimensions"),
        (lambda: masks.KeySet([-1]), "positions hold -1"),
        (lambda: masks.KeySet([True]), "an integer tensor"),
        (lambda: masks.QuerySet(torch.tensor([0.5])), "torch.float32"),
        (lambda: masks.QuerySet("abc"), "dtype"),
        (lambda: masks.KeySet(object()), "dtype object"),
        (lambda: masks.KeySet([[1], [2, 3]]), "no tensor, array or sequence"),
        (lambda: masks.KeySet(np.array([2**63], np.uint64)), "fit int64"),
        (lambda: masks.KeySet(torch.empty(3, device="meta")), "traced or meta"),
        (lambda: masks.BlockTable(TABLE.int(), 1, 1), "a bool tensor"),
        (lambda: masks.BlockTable(TABLE[0], 1, 1), "2 or 3 or 4 dimensions"),
        (lambda: masks.BlockTable(TABLE, 0, 1), "block_q is 0"),
        (lambda: masks.BlockTable(TABLE, 1, -2), "block_k is -2"),
        (lambda: masks.BlockTable(TABLE[None][:0], 1, 1), "at least one batch and head"),
        (lambda: masks.Segments([2**31]), "fit int32"),
        (lambda: masks.Segments([[1], [2]], [[1]]), "same batch"),
        (lambda: masks.Segments(np.zeros((0, 3), np.int32)), "same batch, at least 1"),
        (lambda: masks.KeyLengths([]), "one length"),
        (lambda: masks.KeyLengths([3, -4]), ">= 0"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(MaskError, match=message):
        make()


@pytest.mark.parametrize(
    ("mask", "where", "message"),
    [
        (masks.BlockTable(TABLE, 2, 9), {"i": 4}, r"covers the positions \[0, 4\), but \[4, 4\]"),
        (masks.BlockTable(TABLE, 2, 9), {"i": -1}, "choose q_offset"),
        (masks.BlockTable(TABLE, 2, 2), {"j": 4}, r"\(keys\) covers"),
        (masks.BlockTable(TABLE[None], 9, 9), {"h": 1}, "1 entries along num_heads"),
        (masks.BlockTable(TABLE[None, None], 9, 9), {"b": 1}, "1 entries along batch"),
        (masks.Segments([1, 2, 3]), {"i": 3}, "q_ids covers"),
        (masks.Segments([1, 2, 3]), {"j": 3}, "k_ids covers"),
        (masks.Segments([[1, 2, 3]]), {"b": 1}, "q_ids has 1 entries along batch"),
        (masks.KeyLengths([3]), {"b": 1}, "1 entries along batch"),
        (masks.per_head([masks.All()]), {"h": 1}, "per_head with 1 entries"),
        (masks.per_batch([masks.All()]), {"b": 2}, "batch is 2"),
        (masks.All(), {"j": 10}, r"must be in \[0, 10\)"),
        (masks.All(), {"i": 0.5}, "positions are integers"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(mask, where, message):
    with pytest.raises(MaskError, match=message):
        mask.keeps(**({"i": 0, "j": 0, "seqlen_k": 10} | where))
