"""Schedules: each tile done exactly once, long rows cut, workspace bounded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portattn import masks
from portattn.plan import abi, plan_mask
from tests.plan.test_exactness import BLOCKS, make_plan
from tests.strategies import mask_expressions


def items_of(schedule, index, layout):
    begin = schedule.item_ptr[index] + layout * schedule.items_per_pass[index]
    return schedule.items[begin : begin + schedule.items_per_pass[index]]


def item_tiles(plan, schedule, item):
    """(start, step, bits_same, bits_other) of each tile of an item; full ones as -1, -1."""
    tiles = [
        tuple(tile) for tile in plan.tiles[item[abi.TILE_BEGIN] : item[abi.TILE_END]].tolist()
    ]
    for e in range(item[abi.FULL_COUNT]):
        if item[abi.FULL_STEP]:
            start, step = item[abi.FULL_FIRST] + e * item[abi.FULL_STRIDE], item[abi.FULL_STEP]
        else:
            start, step = schedule.full_list[item[abi.FULL_FIRST] + e]
        tiles.append((int(start), int(step), -1, -1))
    return tiles


def row_tiles(plan, row):
    tiles = [tuple(tile) for tile in plan.tiles[row[2] : row[3]].tolist()]
    for start, step, count, stride in plan.runs[row[4] : row[5]].tolist():
        tiles += [(start + e * stride, step, -1, -1) for e in range(count)]
    return tiles


@settings(max_examples=200)
@given(
    mask_expressions(),
    BLOCKS,
    BLOCKS,
    st.integers(1, 200),
    st.integers(1, 8),
    st.sampled_from([0, 10_000, 1 << 28]),
)
def test_every_tile_is_done_once(case, block_q, block_k, workers, min_piece, max_workspace_bytes):
    plan = make_plan(case, block_q, block_k)
    schedule = plan.schedule(
        batch=case.batch,
        num_heads=case.num_heads,
        workers=workers,
        head_dim_v=64,
        min_piece=min_piece,
        max_workspace_bytes=max_workspace_bytes,
    )
    assert schedule.workspace_bytes <= max_workspace_bytes
    for index in range(plan.num_passes):
        for layout in range(plan.num_layouts):
            at = index * plan.num_layouts + layout
            rows = {int(row[0]): row for row in plan.rows[plan.row_ptr[at] : plan.row_ptr[at + 1]]}
            pieces = {start: [] for start in rows}
            items = items_of(schedule, index, layout)
            assert (np.diff(items[:, abi.COST]) <= 0).all()
            for item in items:
                if item[abi.NUM_ROWS]:
                    pieces[int(item[abi.Q_START])].append(item)
            slots, counters = [], []
            for start, row in rows.items():
                found = pieces[start]
                done = [tile for item in found for tile in item_tiles(plan, schedule, item)]
                assert sorted(done) == sorted(row_tiles(plan, row))
                assert {item[abi.NUM_ROWS] for item in found} == {row[1]}
                assert {item[abi.NUM_PIECES] for item in found} == {len(found)}
                assert {item[abi.Q_STEP] for item in found} == {plan.pass_steps[index]}
                if len(found) == 1:
                    assert found[0][abi.SLOT] == -1
                else:
                    first = found[0][abi.SLOT_FIRST]
                    assert sorted(item[abi.SLOT] for item in found) == list(
                        range(first, first + len(found))
                    )
                    slots += [item[abi.SLOT] for item in found]
                    counters += [found[0][abi.COUNTER]]
            assert len(set(slots)) == len(slots)
            assert len(set(counters)) == len(counters)
            assert max(slots, default=-1) < schedule.num_slots
            assert max(counters, default=-1) < schedule.num_counters


def test_global_rows_are_cut():
    plan = plan_mask(
        masks.longformer(512, 64),
        batch=1,
        num_heads=1,
        seqlen_q=16384,
        seqlen_k=16384,
        q_offset=0,
        block_q=64,
        block_k=64,
    )
    schedule = plan.schedule(batch=1, num_heads=1, workers=132, head_dim_v=64, min_piece=8)
    assert schedule.items[:, abi.NUM_PIECES].max() > 4
    assert schedule.items[:, abi.COST].max() <= 16


def test_long_rows_stay_progressions():
    """Two long runs a row must not be written out tile by tile."""
    mask = masks.causal() & ~(masks.KeyRange(100_000, 100_064) & masks.QueryRange(0, None))
    plan = plan_mask(
        mask,
        batch=1,
        num_heads=1,
        seqlen_q=1 << 18,
        seqlen_k=1 << 18,
        q_offset=0,
        block_q=128,
        block_k=128,
    )
    schedule = plan.schedule(batch=1, num_heads=1, workers=2, head_dim_v=64)
    assert schedule.nbytes < 2_000_000


@pytest.mark.parametrize("workers", [1, 2, 132])
def test_schedules_are_cached(workers):
    plan = plan_mask(
        masks.causal(),
        batch=1,
        num_heads=1,
        seqlen_q=256,
        seqlen_k=256,
        q_offset=0,
        block_q=64,
        block_k=64,
    )
    first = plan.schedule(batch=1, num_heads=1, workers=workers, head_dim_v=64)
    assert plan.schedule(batch=1, num_heads=1, workers=workers, head_dim_v=64) is first
