"""Rows of the plain Triton backward: what all launches need of them, and dQ.

backward_columns.py has the equations.
"""

# Triton's types are not Python's, and a constexpr `if` is decided while compiling.
# ruff: noqa: ANN001, ANN201, C901, PLR0915, SIM102
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from portattn.backends.triton.backward_primitives import (
    OTHERS,
    POINTERS,
    STRIDES,
    add_vector,
    gradient_of_scores,
    load_stats,
    merge_pieces,
    store_matrix,
)
from portattn.backends.triton.forward_kernel import (
    FULL_COUNT,
    FULL_FIRST,
    FULL_STEP,
    FULL_STRIDE,
    ITEM_FIELDS,
    NUM_PIECES,
    NUM_ROWS,
    Q_START,
    Q_STEP,
    TILE_BEGIN,
    TILE_END,
)
from portattn.backends.triton.primitives import (
    LOG2E,
    NEG_INF,
    expand_bits,
    load_rows,
    load_words,
    locate,
    tile_keys,
)

PREPARE_PARAMETERS = [
    "out_ptr", "do_ptr", "lse_ptr", "dlse_ptr", "stats_ptr", "out_stride_b", "out_stride_h",
    "out_stride_s", "do_stride_b", "do_stride_h", "do_stride_s", "lse_stride_b", "lse_stride_h",
    "lse_stride_s", "dlse_stride_b", "dlse_stride_h", "dlse_stride_s", "num_heads", "seqlen_q",
]  # fmt: skip


@triton.jit(do_not_specialize=PREPARE_PARAMETERS)
def prepare_rows(
    out_ptr, do_ptr, lse_ptr, dlse_ptr, stats_ptr,
    out_stride_b: tl.int64, out_stride_h: tl.int64, out_stride_s: tl.int64,
    do_stride_b: tl.int64, do_stride_h: tl.int64, do_stride_s: tl.int64,
    lse_stride_b: tl.int64, lse_stride_h: tl.int64, lse_stride_s: tl.int64,
    dlse_stride_b: tl.int64, dlse_stride_h: tl.int64, dlse_stride_s: tl.int64,
    num_heads: tl.int32, seqlen_q: tl.int32,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """[heads, 2, seqlen_q] float32: LSE in log2 units (+inf for -inf), and delta."""
    blocks = tl.cdiv(seqlen_q, ROWS)
    bh = tl.program_id(0) // blocks
    batch = bh // num_heads
    head = bh % num_heads
    rows = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    row_ok = rows < seqlen_q
    wide = rows.to(tl.int64)
    out_head = out_ptr + (batch * out_stride_b + head * out_stride_h) * VECTOR
    do_head = do_ptr + (batch * do_stride_b + head * do_stride_h) * VECTOR
    out = load_rows(out_head, wide * (out_stride_s * VECTOR), row_ok, HEAD_DIM_V, BLOCK_DV, True)
    do = load_rows(do_head, wide * (do_stride_s * VECTOR), row_ok, HEAD_DIM_V, BLOCK_DV, True)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    lse_head = lse_ptr + batch * lse_stride_b + head * lse_stride_h
    lse = tl.load(lse_head + wide * lse_stride_s, mask=row_ok, other=NEG_INF)
    if HAS_DLSE:
        dlse_head = dlse_ptr + batch * dlse_stride_b + head * dlse_stride_h
        delta -= tl.load(dlse_head + wide * dlse_stride_s, mask=row_ok, other=0.0)
    stats = stats_ptr + bh.to(tl.int64) * 2 * seqlen_q + rows
    tl.store(stats, tl.where(lse == NEG_INF, -NEG_INF, lse * LOG2E), mask=row_ok)
    tl.store(stats + seqlen_q, delta, mask=row_ok)


ROW_PARAMETERS = [
    *POINTERS, "dq_ptr", "dbias_ptr", *STRIDES, "dq_stride_b", "dq_stride_h", "dq_stride_s",
    "dbias_stride_b", "dbias_stride_h", *OTHERS,
]  # fmt: skip


@triton.jit(do_not_specialize=ROW_PARAMETERS)
def row_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, stats_ptr, slopes_ptr, bias_ptr, sums_ptr, running_ptr,
    slots_ptr, counters_ptr, items_ptr, full_list_ptr, tiles_ptr, bits_ptr, layouts_ptr,
    layout_ids_ptr, q_ids_ptr, k_ids_ptr, dq_ptr, dbias_ptr,
    q_stride_b: tl.int64, q_stride_h: tl.int64, q_stride_s: tl.int64, k_stride_b: tl.int64,
    k_stride_h: tl.int64, k_stride_s: tl.int64, v_stride_b: tl.int64, v_stride_h: tl.int64,
    v_stride_s: tl.int64, do_stride_b: tl.int64, do_stride_h: tl.int64, do_stride_s: tl.int64,
    dq_stride_b: tl.int64, dq_stride_h: tl.int64, dq_stride_s: tl.int64,
    dbias_stride_b: tl.int64, dbias_stride_h: tl.int64,
    slopes_stride_b: tl.int64, slopes_stride_h: tl.int64, bias_stride_b: tl.int64,
    bias_stride_h: tl.int64, bias_stride_s: tl.int64, bias_stride_k: tl.int64,
    layout_stride_b: tl.int32, layout_stride_h: tl.int32, num_layouts: tl.int32,
    first_item: tl.int32, num_items: tl.int32, num_bh: tl.int32, num_heads: tl.int32,
    group_size: tl.int32, head_group: tl.int32, seqlen_q: tl.int32, seqlen_k: tl.int32,
    q_offset: tl.int32, num_slots: tl.int32, num_counters: tl.int32, first: tl.int32,
    count: tl.int32, first_batch: tl.int32, scale: tl.float32, softcap: tl.float32,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    VECTOR: tl.constexpr, STEPPED: tl.constexpr, IDS: tl.constexpr, PIECES: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
    PARTIAL_STAGES: tl.constexpr, DBIAS: tl.constexpr,
):  # fmt: skip
    """DQ of an item's rows, for `count` heads from `first` on, of the batches from first_batch on.

    SUMS 1 adds the row sums of -dY * |i - j| to sums_ptr, float32 [batch, num_heads, seqlen_q];
    2 those of dY. DBIAS adds dY to dbias_ptr, float32 [.., .., seqlen_q, seqlen_k].
    """
    item_index, index = locate(num_items, num_bh, head_group)
    batch = first_batch + index // count
    head = first + index % count
    bh = batch * num_heads + head
    kv_head = head // group_size
    layout = tl.load(
        layouts_ptr + batch * layout_stride_b + head * layout_stride_h,
        mask=num_layouts > 1,
        other=0,
    )
    item = items_ptr + (first_item + layout * num_items + item_index) * ITEM_FIELDS
    num_rows = tl.load(item + NUM_ROWS)
    tile_begin = tl.load(item + TILE_BEGIN)
    tile_end = tl.load(item + TILE_END)
    full_first = tl.load(item + FULL_FIRST)
    full_count = tl.load(item + FULL_COUNT)
    full_step = tl.load(item + FULL_STEP)
    full_stride = tl.load(item + FULL_STRIDE)

    ALIGN: tl.constexpr = VECTOR * q_ptr.dtype.element_ty.primitive_bitwidth // 8
    WORDS: tl.constexpr = BLOCK_K // 32
    k_head = tl.multiple_of(k_ptr + (batch * k_stride_b + kv_head * k_stride_h) * VECTOR, ALIGN)
    v_head = tl.multiple_of(v_ptr + (batch * v_stride_b + kv_head * v_stride_h) * VECTOR, ALIGN)
    q_head = tl.multiple_of(q_ptr + (batch * q_stride_b + head * q_stride_h) * VECTOR, ALIGN)
    do_head = tl.multiple_of(do_ptr + (batch * do_stride_b + head * do_stride_h) * VECTOR, ALIGN)
    r = tl.arange(0, BLOCK_Q)
    rows = tl.load(item + Q_START) + r * tl.load(item + Q_STEP)
    row_ok = r < num_rows
    wide = rows.to(tl.int64)
    q = load_rows(q_head, wide * (q_stride_s * VECTOR), row_ok, HEAD_DIM, BLOCK_D, True)
    do = load_rows(do_head, wide * (do_stride_s * VECTOR), row_ok, HEAD_DIM_V, BLOCK_DV, True)
    stats = stats_ptr + bh.to(tl.int64) * 2 * seqlen_q
    lse, delta = load_stats(stats, seqlen_q, rows, row_ok)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + batch * slopes_stride_b + head * slopes_stride_h)
    bias_head = bias_ptr
    if BIAS:
        bias_head = bias_ptr + batch * bias_stride_b + head * bias_stride_h
    dbias_rows = bias_ptr
    if DBIAS:
        dbias_rows = dbias_ptr + batch * dbias_stride_b + head * dbias_stride_h
        dbias_rows = dbias_rows + (wide * seqlen_k)[:, None]
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    sums = tl.zeros([BLOCK_Q], tl.float32)

    id_row = tl.zeros([1], tl.int64)
    q_id = rows
    if IDS:
        id_row = tl.maximum(tl.load(layout_ids_ptr + layout), 0).to(tl.int64)
        q_id = tl.load(q_ids_ptr + id_row * seqlen_q + rows, mask=row_ok, other=-1)
    has_tile = tile_begin < tile_end
    tile = tiles_ptr + tile_begin * 4
    start = tl.load(tile, mask=has_tile, other=0)
    step = tl.load(tile + 1, mask=has_tile, other=1)
    words = load_words(bits_ptr, tl.load(tile + 2, mask=has_tile, other=-2), BLOCK_Q, WORDS)
    words_other = words
    if IDS:
        words_other = load_words(
            bits_ptr, tl.load(tile + 3, mask=has_tile, other=-2), BLOCK_Q, WORDS
        )
    for e in tl.range(tile_begin, tile_end, num_stages=PARTIAL_STAGES):
        more = e + 1 < tile_end
        next_start = tl.load(tiles_ptr + e * 4 + 4, mask=more, other=0)
        next_step = tl.load(tiles_ptr + e * 4 + 5, mask=more, other=1)
        next_words = load_words(
            bits_ptr, tl.load(tiles_ptr + e * 4 + 6, mask=more, other=-2), BLOCK_Q, WORDS
        )
        next_other = next_words
        if IDS:
            next_other = load_words(
                bits_ptr, tl.load(tiles_ptr + e * 4 + 7, mask=more, other=-2), BLOCK_Q, WORDS
            )
        keys, exists = tile_keys(start, step, seqlen_k, BLOCK_K, STEPPED)
        keep = expand_bits(words, BLOCK_Q, BLOCK_K)
        if IDS:
            other = expand_bits(words_other, BLOCK_Q, BLOCK_K)
            k_id = tl.load(k_ids_ptr + id_row * seqlen_k + keys, mask=exists, other=-1)
            same = (q_id[:, None] == k_id[None, :]) & (q_id >= 0)[:, None]
            keep = tl.where(same, keep, other) & exists[None, :]
        k_rows = keys.to(tl.int64)
        k = load_rows(k_head, k_rows * (k_stride_s * VECTOR), exists, HEAD_DIM, BLOCK_D, True)
        v = load_rows(v_head, k_rows * (v_stride_s * VECTOR), exists, HEAD_DIM_V, BLOCK_DV, True)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        _, dy, dx = gradient_of_scores(
            x, dp, lse[:, None], delta[:, None], rows[:, None], keys[None, :], keep,
            row_ok[:, None] & exists[None, :], q_offset, scale, softcap, slope, bias_head,
            bias_stride_s, bias_stride_k, SOFTCAP, ALIBI, BIAS, True,
        )  # fmt: skip
        dq = tl.dot(dx.to(k.dtype), k, dq, input_precision=PRECISION)
        if SUMS == 1:
            distance = tl.abs((rows + q_offset)[:, None] - keys[None, :])
            sums -= tl.sum(dy * distance.to(tl.float32), 1)
        if SUMS == 2:
            sums += tl.sum(dy, 1)
        if DBIAS:
            pairs = row_ok[:, None] & exists[None, :]
            earlier = tl.load(dbias_rows + keys[None, :], mask=pairs, other=0.0)
            tl.store(dbias_rows + keys[None, :], earlier + dy, mask=pairs)
        start = next_start
        step = next_step
        words = next_words
        words_other = next_other

    in_list = full_step == 0
    entry = full_list_ptr + full_first * 2
    has_full = in_list & (full_count > 0)
    start = tl.where(in_list, tl.load(entry, mask=has_full, other=0), full_first)
    step = tl.where(in_list, tl.load(entry + 1, mask=has_full, other=1), full_step)
    for e in range(0, full_count):
        more = in_list & (e + 1 < full_count)
        listed = tl.load(entry + e * 2 + 2, mask=more, other=0)
        next_start = tl.where(in_list, listed, start + full_stride)
        next_step = step
        if STEPPED:
            next_step = tl.where(in_list, tl.load(entry + e * 2 + 3, mask=more, other=1), step)
        keys, exists = tile_keys(start, step, seqlen_k, BLOCK_K, STEPPED)
        k_rows = keys.to(tl.int64)
        k = load_rows(k_head, k_rows * (k_stride_s * VECTOR), exists, HEAD_DIM, BLOCK_D, False)
        v = load_rows(v_head, k_rows * (v_stride_s * VECTOR), exists, HEAD_DIM_V, BLOCK_DV, False)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        _, dy, dx = gradient_of_scores(
            x, dp, lse[:, None], delta[:, None], rows[:, None], keys[None, :], x,
            row_ok[:, None] & exists[None, :], q_offset, scale, softcap, slope, bias_head,
            bias_stride_s, bias_stride_k, SOFTCAP, ALIBI, BIAS, False,
        )  # fmt: skip
        dq = tl.dot(dx.to(k.dtype), k, dq, input_precision=PRECISION)
        if SUMS == 1:
            distance = tl.abs((rows + q_offset)[:, None] - keys[None, :])
            sums -= tl.sum(dy * distance.to(tl.float32), 1)
        if SUMS == 2:
            sums += tl.sum(dy, 1)
        if DBIAS:
            pairs = row_ok[:, None] & exists[None, :]
            earlier = tl.load(dbias_rows + keys[None, :], mask=pairs, other=0.0)
            tl.store(dbias_rows + keys[None, :], earlier + dy, mask=pairs)
        start = next_start
        step = next_step

    dq = dq * scale
    writes = num_rows > 0
    if PIECES:
        if writes & (tl.load(item + NUM_PIECES) > 1):
            dq, _, sums, writes = merge_pieces(
                dq, dq, sums, item, bh, slots_ptr, counters_ptr, num_slots, num_counters, 0, SUMS
            )
    if writes:
        running = running_ptr
        if not (FIRST and LAST):
            running = running_ptr + bh.to(tl.int64) * seqlen_q * BLOCK_D
        dq_head = dq_ptr + (batch * dq_stride_b + head * dq_stride_h) * VECTOR
        store_matrix(
            dq, tl.multiple_of(dq_head, ALIGN), rows, row_ok, dq_stride_s * VECTOR, running,
            HEAD_DIM, BLOCK_D, FIRST, LAST,
        )  # fmt: skip
        if SUMS:
            add_vector(sums_ptr + bh.to(tl.int64) * seqlen_q, sums, rows, row_ok)
