"""Reading a plan back: decoding, counting and checking. Never on the call path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from portattn.errors import MaskError
from portattn.plan.abi import BITS_EMPTY, BITS_FULL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from portattn.plan.plan import Plan

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]
IntArray = np.ndarray[Any, np.dtype[np.integer[Any]]]


def _rows(plan: Plan, layout: int) -> Iterator[tuple[int, IntArray]]:
    """(step, row) of every tile row of the layout, all passes."""
    for index, step in enumerate(plan.pass_steps):
        at = index * plan.num_layouts + layout
        for row in plan.rows[plan.row_ptr[at] : plan.row_ptr[at + 1]]:
            yield int(step), row


def _tile_kept(
    plan: Plan, layout: int, tile: IntArray, query: IntArray, key: IntArray
) -> BoolArray:
    """What a partial tile keeps, bool [block_q, block_k]; query, key: its rows and keys."""

    def bits(index: int) -> BoolArray:
        if index in (BITS_FULL, BITS_EMPTY):
            return np.full((plan.block_q, plan.block_k), index == BITS_FULL)
        return plan.tile_bits(index)

    same, other = int(tile[2]), int(tile[3])
    if same == other:
        return bits(same)
    ids = plan.layout_ids[layout]
    equal = plan.q_ids[ids][query][:, None] == plan.k_ids[ids][key][None, :]
    return np.where(equal, bits(same), bits(other))


def decode(plan: Plan, layout: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """How often the plan keeps each pair, int32 [seqlen_q, seqlen_k]: 0 or 1 in a right plan."""
    count = np.zeros((plan.seqlen_q, plan.seqlen_k), np.int32)
    if count.size == 0:
        return count
    block_row, block_col = np.arange(plan.block_q), np.arange(plan.block_k)
    for step, row in _rows(plan, layout):
        own = row[0] + step * (block_col if plan.transposed else block_row)
        for tile in plan.tiles[row[2] : row[3]]:
            other = tile[0] + tile[1] * (block_row if plan.transposed else block_col)
            _add(plan, layout, count, own, int(row[1]), other, tile)
        for start, tile_step, number, stride in plan.runs[row[4] : row[5]]:
            for n in range(number):
                other = (
                    start + n * stride + tile_step * (block_row if plan.transposed else block_col)
                )
                _add(plan, layout, count, own, int(row[1]), other, None)
    return count


def _add(
    plan: Plan,
    layout: int,
    count: IntArray,
    own: IntArray,
    num_own: int,
    other: IntArray,
    tile: IntArray | None,
) -> None:
    """Count a tile: its row's own queries (or keys), of which the first `num_own` exist."""
    query, key = (other, own) if plan.transposed else (own, other)
    rows, cols = query < plan.seqlen_q, key < plan.seqlen_k
    own_exist = np.arange(len(own)) < num_own
    if plan.transposed:
        cols = own_exist
    else:
        rows = own_exist
    if tile is None:
        kept = np.ones((plan.block_q, plan.block_k), bool)
    else:
        kept = _tile_kept(
            plan,
            layout,
            tile,
            np.minimum(query, plan.seqlen_q - 1),
            np.minimum(key, plan.seqlen_k - 1),
        )
    if tile is not None and tile[2] == tile[3] and (kept[~rows].any() or kept[:, ~cols].any()):
        raise MaskError("plan keeps a row or key that does not exist")
    if tile is None and not cols.all():
        raise MaskError("plan has a full tile with a key that does not exist")
    count[np.ix_(query[rows], key[cols])] += kept[np.ix_(rows, cols)]


def count_pairs(plan: Plan, layout: int) -> int:
    """Pairs that a forward plan keeps in one layout, without decoding full tiles."""
    popcount = (
        np.bitwise_count(plan.bits).sum(axis=(1, 2), dtype=np.int64)
        if plan.num_bit_tiles
        else np.zeros(0)
    )
    pairs = 0
    for step, row in _rows(plan, layout):
        pairs += int(row[1]) * plan.block_k * int(plan.runs[row[4] : row[5], 2].sum())
        tiles = plan.tiles[row[2] : row[3]]
        plain = tiles[:, 2] == tiles[:, 3]
        pairs += int(popcount[tiles[plain, 2]].sum())
        query = np.minimum(row[0] + step * np.arange(plan.block_q), plan.seqlen_q - 1)
        for tile in tiles[~plain]:
            key = tile[0] + tile[1] * np.arange(plan.block_k)
            kept = _tile_kept(plan, layout, tile, query, np.minimum(key, plan.seqlen_k - 1))
            pairs += int(kept[: row[1], key < plan.seqlen_k].sum())
    return pairs


def validate(plan: Plan) -> None:
    """Raise MaskError unless every invariant of docs/formats.md holds."""
    _validate_entries(plan)
    for layout in range(plan.num_layouts):
        if plan.layout_ids[layout] >= plan.num_id_rows:
            raise MaskError(
                f"plan.layout_ids names id row {plan.layout_ids[layout]} of {plan.num_id_rows}"
            )
        for index, step in enumerate(plan.pass_steps):
            _validate_rows(plan, layout, index, int(step))


def _validate_entries(plan: Plan) -> None:
    for name in ("tiles", "runs"):
        array = getattr(plan, name)
        bad = (array[:, 0] < 0) | (array[:, 1] < 1)
        if bad.any():
            raise MaskError(f"plan.{name} has an entry {array[bad][0].tolist()}")
    named = plan.tiles[:, 2:]
    if named.size and not (named.min() >= BITS_EMPTY and named.max() < plan.num_bit_tiles):
        raise MaskError(f"plan.tiles names a bit tile outside 0..{plan.num_bit_tiles - 1}")
    plain = plan.tiles[plan.tiles[:, 2] == plan.tiles[:, 3]]
    if (plain[:, 2] < 0).any():
        raise MaskError("plan.tiles holds a full or empty tile that is no id tile")


def _validate_rows(plan: Plan, layout: int, index: int, step: int) -> None:
    length = plan.seqlen_k if plan.transposed else plan.seqlen_q
    block = plan.block_k if plan.transposed else plan.block_q
    at = index * plan.num_layouts + layout
    seen = np.zeros(length, np.int64)
    for row in plan.rows[plan.row_ptr[at] : plan.row_ptr[at + 1]]:
        numbers = row[0] + step * np.arange(row[1])
        if not 1 <= row[1] <= block or not 0 <= row[0] <= numbers[-1] < length:
            raise MaskError(f"plan row {row.tolist()} has rows that do not exist")
        seen[numbers] += 1
    if not (seen == 1).all():
        raise MaskError(f"pass {index} of layout {layout} does not cover every row once")
