"""Rows of packed documents that the planner takes from rows before them."""

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


def test_rows_of_a_document_share_their_tiles():
    plan = plan_of(masks.documents([0, 1000, 2048]), 2048, 2048, 0, (16, 16))
    assert len({tuple(row[2:]) for row in plan.rows.tolist()}) == 3
