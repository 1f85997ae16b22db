"""The cache is bounded and gives one plan per mask; what does not fit a call is a MaskError."""

import pytest
import torch

from portattn import masks
from portattn.errors import MaskError
from portattn.plan import Plan, plan_mask
from portattn.plan.cache import PlanCache

CALL = {
    "batch": 2,
    "num_heads": 4,
    "seqlen_q": 64,
    "seqlen_k": 64,
    "q_offset": 0,
    "block_q": 16,
    "block_k": 16,
}


def key(mask, length=64):
    return (mask, 1, 1, length, length, 0, 16, 16)


def test_equal_masks_share_a_plan():
    assert plan_mask(masks.local(3, 3), **CALL) is plan_mask(masks.local(3, 3), **CALL)
    assert plan_mask(masks.local(3, 3), **CALL) is not plan_mask(masks.local(3, 4), **CALL)


def test_equal_data_shares_a_plan_and_other_data_does_not():
    first, again, other = ([0, 10, 64], [0, 10, 64], [0, 11, 64])
    assert plan_mask(masks.documents(first), **CALL) is plan_mask(masks.documents(again), **CALL)
    assert plan_mask(masks.documents(first), **CALL) is not plan_mask(
        masks.documents(other), **CALL
    )


def test_cache_drops_the_least_recently_used():
    one = PlanCache(1 << 30).get(key(masks.causal())).nbytes
    cache = PlanCache(3 * one)
    first = cache.get(key(masks.causal()))
    for n in range(1, 10):
        cache.get(key(masks.sliding_window(n)))
        assert cache.get(key(masks.causal())) is first
        assert cache.nbytes <= 3 * one or len(cache) <= 2
    assert len(cache) < 10


def test_cache_keeps_captured_plans():
    cache = PlanCache(0)
    held = cache.get(key(masks.causal()))
    held.captured = True
    cache.get(key(masks.local(1, 1)))
    cache.clear()
    assert cache.get(key(masks.causal())) is held


def test_plan_on_a_device_has_the_same_arrays():
    plan = plan_mask(
        (masks.documents([0, 30, 64]) | masks.KeyRange(0, 1)) & masks.causal(), **CALL
    )
    on_device = plan.to("cpu")
    for name in ("rows", "tiles", "runs", "bits", "q_ids", "k_ids", "layouts"):
        expected = torch.from_numpy(getattr(plan, name).astype("int64"))
        assert torch.equal(getattr(on_device, name).long() & 0xFFFFFFFF, expected & 0xFFFFFFFF)
    empty = plan_mask(None, **CALL).to("cpu")
    assert empty.tiles.numel() > 0
    assert plan.to("cpu") is on_device


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (masks.per_head([masks.causal()] * 3), ["per_head holds 3", "4 query heads"]),
        (masks.per_batch([masks.causal()] * 3), ["per_batch holds 3", "batch 2"]),
        (
            masks.BlockTable(torch.ones(2, 2, dtype=torch.bool), 16, 16),
            ["2 x 2 blocks", "larger table"],
        ),
        (masks.BlockTable(torch.ones(3, 4, 4, dtype=torch.bool), 16, 16), ["3 heads", "4"]),
        (masks.Segments(torch.zeros(63, dtype=torch.int32)), ["63 positions", "0..63"]),
        (masks.Segments(torch.zeros(3, 64, dtype=torch.int32)), ["batch 3"]),
        (masks.documents([0, 9, 63]), ["[0, 63)", "64 keys", "cover all"]),
        (masks.padding([1, 2, 3]), ["3 entries", "batch 2"]),
    ],
)
def test_masks_that_do_not_fit(mask, words):
    with pytest.raises(MaskError) as caught:
        plan_mask(mask, **CALL)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "program",
    [
        [],
        [1],
        [2, 0],
        [1, 99],
        [1, 13, 5, 0],
        [1, 1, 0],
        [1, 0, 0],
        [1, 7, 0],
        [1, 4, 0, 0, 1],
        [1, *[15] * 100, 0],
    ],
)
def test_malformed_programs(program):
    with pytest.raises(MaskError):
        Plan.create(program, (), **CALL)


@pytest.mark.parametrize(
    ("bounds", "words"),
    [([0, 40, 30, 64], "never fall"), ([3, 64], "start at 0"), ([0], "at least 2")],
)
def test_malformed_bounds_of_documents(bounds, words):
    with pytest.raises(MaskError, match=words):
        Plan.create((1, 18, 0), (torch.tensor(bounds),), **CALL)


def test_the_bit_budget_is_a_mask_error():
    table = torch.rand(256, 256) < 0.5
    with pytest.raises(MaskError, match="distinct partial tiles"):
        Plan.create(
            masks.dense(table).program,
            masks.dense(table).data,
            batch=1,
            num_heads=1,
            seqlen_q=256,
            seqlen_k=256,
            q_offset=0,
            block_q=16,
            block_k=16,
            max_bits_bytes=1000,
        )


def test_dense_decoding_is_bounded():
    plan = Plan.create(
        [1, 0],
        (),
        batch=1,
        num_heads=1,
        seqlen_q=1 << 20,
        seqlen_k=1 << 20,
        q_offset=0,
        block_q=128,
        block_k=128,
    )
    with pytest.raises(MaskError, match="to_dense"):
        plan.to_dense()
    assert plan.density == 1
