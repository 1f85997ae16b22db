"""The plan keeps exactly the pairs that the mask's predicate keeps, each once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portattn import masks
from portattn.plan import Plan, plan_mask
from portattn.plan.decode import count_pairs, decode
from tests.strategies import mask_expressions

BLOCKS = st.sampled_from([16, 32, 48, 64, 80, 96, 128, 144, 176])


def make_plan(case, block_q, block_k):
    return Plan.create(
        case.mask.program,
        case.mask.data,
        batch=case.batch,
        num_heads=case.num_heads,
        seqlen_q=case.seqlen_q,
        seqlen_k=case.seqlen_k,
        q_offset=case.q_offset,
        block_q=block_q,
        block_k=block_k,
    )


def kept(case, b, h):
    i = case.q_offset + np.arange(case.seqlen_q)[:, None]
    j = np.arange(case.seqlen_k)[None, :]
    return np.broadcast_to(
        case.mask.keeps(i, j, seqlen_k=case.seqlen_k, b=b, h=h), (case.seqlen_q, case.seqlen_k)
    )


@settings(max_examples=300)
@given(mask_expressions(), BLOCKS, BLOCKS)
def test_plan_keeps_each_pair_once(case, block_q, block_k):
    plan = make_plan(case, block_q, block_k)
    plan.validate()
    counts = {layout: decode(plan, layout) for layout in range(plan.num_layouts)}
    for b in range(case.batch):
        for h in range(case.num_heads):
            np.testing.assert_array_equal(counts[plan.layout_of(b, h)], kept(case, b, h))
    for layout, count in counts.items():
        assert count_pairs(plan, layout) == count.sum()


@settings(max_examples=150)
@given(mask_expressions(max_len=400), BLOCKS, BLOCKS)
def test_transposed_plan_keeps_the_same_pairs(case, block_q, block_k):
    plan = make_plan(case, block_q, block_k)
    transposed = plan.transpose()
    transposed.validate()
    for layout in range(plan.num_layouts):
        np.testing.assert_array_equal(decode(transposed, layout), decode(plan, layout))


@pytest.mark.parametrize(("block_q", "block_k"), [(1, 7), (3, 5), (16, 33), (200, 300)])
def test_odd_tiles(block_q, block_k):
    mask = masks.longformer(20, 7) & masks.padding([90, 61])
    plan = plan_mask(
        mask,
        batch=2,
        num_heads=3,
        seqlen_q=101,
        seqlen_k=101,
        q_offset=0,
        block_q=block_q,
        block_k=block_k,
    )
    i, j = np.arange(101)[:, None], np.arange(101)[None]
    for b in range(2):
        np.testing.assert_array_equal(plan.to_dense(b), mask.keeps(i, j, seqlen_k=101, b=b, h=0))


@pytest.mark.parametrize(
    ("mask", "steps"),
    [
        (masks.sparse_transformer_strided(32), [1, 32]),
        (masks.dilated(64, 4), [4]),
        (masks.longformer(64, 0, dilation=4), [4]),
        (masks.causal(), [1]),
    ],
)
def test_residue_passes_are_used_and_exact(mask, steps):
    length = 2048
    plan = plan_mask(
        mask,
        batch=1,
        num_heads=1,
        seqlen_q=length,
        seqlen_k=length,
        q_offset=0,
        block_q=32,
        block_k=32,
    )
    assert plan.pass_steps.tolist() == steps
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    np.testing.assert_array_equal(plan.to_dense(), mask.keeps(i, j, seqlen_k=length))


def test_every_mth_key_becomes_stepped_tiles():
    mask = masks.causal() & (masks.Band(-63, None) | masks.KeyModulo(64, 63, 64))
    plan = plan_mask(
        mask,
        batch=1,
        num_heads=1,
        seqlen_q=4096,
        seqlen_k=4096,
        q_offset=0,
        block_q=64,
        block_k=64,
    )
    assert plan.pass_steps.tolist() == [1]
    assert set(plan.tiles[:, 1]) | set(plan.runs[:, 1]) == {1, 64}
    visited = plan.num_tiles + int(plan.runs[:, 2].sum())
    assert (
        visited < 4 * 64
    )  # at most the local tiles and one or two stepped ones a row; dense causal has 2080


def test_documents_never_become_bit_tiles():
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(1, 8192), 200, replace=False))
    mask = masks.documents([0, *cuts.tolist(), 8192]) & masks.causal()
    plan = plan_mask(
        mask,
        batch=1,
        num_heads=1,
        seqlen_q=8192,
        seqlen_k=8192,
        q_offset=0,
        block_q=128,
        block_k=128,
    )
    assert plan.num_bit_tiles <= 2
    assert (plan.tiles[:, 2] != plan.tiles[:, 3]).any()


@pytest.mark.parametrize(
    ("mask", "limit_bytes"),
    [
        (masks.sliding_window(4096), 2_000_000),
        (masks.local(256, 256), 2_000_000),
        (masks.longformer(512, 64), 2_000_000),
        (masks.bigbird(64, 3, 3, 2, 0), 2_000_000),
        (masks.sparse_transformer_strided(1024), 2_000_000),
        (masks.causal(), 2_000_000),
    ],
    ids=["sliding_window", "local", "longformer", "bigbird", "strided", "causal"],
)
def test_a_million_tokens_stay_small(mask, limit_bytes):
    length = 1 << 20
    plan = Plan.create(
        mask.program,
        mask.data,
        batch=1,
        num_heads=1,
        seqlen_q=length,
        seqlen_k=length,
        q_offset=0,
        block_q=128,
        block_k=128,
    )
    assert plan.nbytes <= limit_bytes


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 0), (0, 5), (5, 0)])
def test_empty_lengths(seqlen_q, seqlen_k):
    plan = plan_mask(
        masks.causal(),
        batch=1,
        num_heads=1,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        q_offset=0,
        block_q=16,
        block_k=16,
    )
    plan.validate()
    assert plan.num_tiles == plan.num_runs == 0
    assert plan.density == 0
