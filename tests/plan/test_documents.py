"""Tiles that begin with packed documents, and rows that follow from rows before them."""

import itertools

import numpy as np
import pytest

from portattn import masks
from portattn.plan import Plan

ENDS = [0, 7, 8, 61, 64, 200, 201, 330, 480]
BLOCKS = list(itertools.product((8, 16, 24), (8, 12, 16, 24)))


def plan_of(mask, seqlen_q, seqlen_k, q_offset, blocks):
    return Plan.create(
        mask.program, mask.data, batch=1, num_heads=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k,
        q_offset=q_offset, block_q=blocks[0], block_k=blocks[1],
    )  # fmt: skip


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("upper", [None, 0, -3, -40, 5, 40])
@pytest.mark.parametrize(("seqlen_q", "q_offset"), [(480, 0), (333, 0), (301, 150)])
def test_plans_of_documents_are_exact(blocks, upper, seqlen_q, q_offset):
    mask = masks.documents(ENDS)
    if upper is not None:
        mask = mask & masks.Band(None, upper)
    plan = plan_of(mask, seqlen_q, 480, q_offset, blocks)
    plan.validate()
    ids = np.repeat(np.arange(len(ENDS) - 1), np.diff(ENDS))
    i, j = np.arange(q_offset, q_offset + seqlen_q)[:, None], np.arange(480)[None]
    expected = ids[i] == ids[j]
    if upper is not None:
        expected &= j - i <= upper
    assert (plan.to_dense() == expected).all()


def test_ids_that_come_back_are_exact():
    ids = np.repeat([3, 1, 3, 2, 1], [100, 60, 40, 90, 10])
    for blocks in BLOCKS:
        for mask in (masks.Segments(ids), masks.Segments(ids) & masks.causal()):
            plan = plan_of(mask, 300, 300, 0, blocks)
            assert (plan.to_dense() == mask.to_dense(300, 300).numpy()).all()


def test_tiles_begin_with_documents():
    plan = plan_of(masks.documents([0, 1000, 2048]), 2048, 2048, 0, (16, 16))
    assert plan.rows[:, 0].tolist() == [*range(0, 1000, 16), *range(1000, 2048, 16)]
    assert plan.num_id_rows == 0
    # All rows of a document have the same tiles, but for the last, which is shorter.
    assert len({tuple(row[2:]) for row in plan.rows.tolist()}) == 4
    assert set(plan.runs[:, 0]) == {0, 1000}


def test_diagonal_tiles_are_alike_in_all_documents():
    mask = masks.documents([0, 100, 260, 1024]) & masks.causal()
    plan = plan_of(mask, 1024, 1024, 0, (32, 32))
    whole = plan.rows[plan.rows[:, 1] == 32]
    assert len({int(plan.tiles[row[2], 2]) for row in whole}) == 1
    assert (whole[:, 3] - whole[:, 2] == 1).all()


def test_short_documents_lie_on_the_grid():
    plan = plan_of(masks.documents(range(0, 481, 5)), 480, 480, 0, (64, 64))
    assert plan.rows[:, 0].tolist() == list(range(0, 480, 64))


@pytest.mark.parametrize("blocks", [(8, 16), (24, 12), (64, 48)])
@pytest.mark.parametrize("mask", [masks.All(), masks.causal(), masks.local(9, 30)])
def test_transposed_documents_are_exact(blocks, mask):
    mask = masks.documents(ENDS) & mask
    plan = plan_of(mask, 333, 480, 40, blocks)
    transposed = plan.transpose()
    transposed.validate()
    assert (transposed.to_dense() == mask.to_dense(333, 480, q_offset=40).numpy()).all()


def test_keys_of_documents_without_queries_have_rows():
    plan = plan_of(masks.documents(ENDS), 100, 480, 0, (16, 16)).transpose()
    plan.validate()
    assert plan.rows[:, 1].sum() == 480


def test_documents_of_one_head_leave_the_others_on_the_grid():
    mask = masks.per_head([masks.documents([0, 70, 200, 512]), masks.dilated(64, 8)])
    plan = Plan.create(
        mask.program, mask.data, batch=1, num_heads=2, seqlen_q=512, seqlen_k=512, q_offset=0,
        block_q=16, block_k=16,
    )  # fmt: skip
    assert plan.pass_steps.tolist() == [1, 8]
    for one in (plan, plan.transpose()):
        one.validate()
        for head in range(2):
            expected = mask.operands[head].to_dense(512, 512).numpy()
            assert (one.to_dense(0, head) == expected).all()
