"""Gradients of attention in plain Triton: any plan, any GPU.

With P = exp(S - LSE) recomputed tile by tile, delta = rowsum(dO * O) - dLSE and scores
y = softcap(scale * x) - slope * |i - j| + bias, x = Q K^T (Dao 2023, algorithm 2):

    dV = P^T dO,   dP = dO V^T,   dY = P * (dP - delta),   dX = dY * scale * (1 - tanh^2)
    dQ = dX K,     dK = dX^T Q,   dbias = dY,   dslope = -sum(dY * |i - j|)

`prepare_rows` makes LSE and delta ready. `column_kernel` computes dK and dV: one program per item
of the transposed plan's schedule (docs/formats.md), whose rows are keys and whose tiles are query
tiles. `row_kernel` computes dQ: one program per item of the plan's schedule. Nothing is added
atomically, so that results never depend on timing: the pieces of a cut row are summed in slot
order by the last to arrive, and launches that follow each other (passes, query heads of a group
with masks of their own) continue from a running sum in float32.

A row that keeps nothing has LSE = -inf, read as +inf here: its P is 0.
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
    expand_columns,
    gradient_of_scores,
    load_columns,
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
from portattn.backends.triton.primitives import load_rows, locate, tile_keys

COLUMN_PARAMETERS = [
    *POINTERS, "dk_ptr", "dv_ptr", *STRIDES, "dk_stride_b", "dk_stride_h", "dk_stride_s",
    "dv_stride_b", "dv_stride_h", "dv_stride_s", *OTHERS,
]  # fmt: skip


@triton.jit(do_not_specialize=COLUMN_PARAMETERS)
def column_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, stats_ptr, slopes_ptr, bias_ptr, sums_ptr, running_ptr,
    slots_ptr, counters_ptr, items_ptr, full_list_ptr, tiles_ptr, bits_ptr, layouts_ptr,
    layout_ids_ptr, q_ids_ptr, k_ids_ptr, dk_ptr, dv_ptr,
    q_stride_b: tl.int64, q_stride_h: tl.int64, q_stride_s: tl.int64, k_stride_b: tl.int64,
    k_stride_h: tl.int64, k_stride_s: tl.int64, v_stride_b: tl.int64, v_stride_h: tl.int64,
    v_stride_s: tl.int64, do_stride_b: tl.int64, do_stride_h: tl.int64, do_stride_s: tl.int64,
    dk_stride_b: tl.int64, dk_stride_h: tl.int64, dk_stride_s: tl.int64,
    dv_stride_b: tl.int64, dv_stride_h: tl.int64, dv_stride_s: tl.int64,
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
    PARTIAL_STAGES: tl.constexpr,
):  # fmt: skip
    """DK and dV of an item's keys, over `count` query heads of the KV head from `first` on.

    SUMS: add the column sums of dY to sums_ptr, float32 [batch, num_heads, seqlen_k].
    """
    item_index, bh = locate(num_items, num_bh, head_group)
    kv_heads = num_heads // group_size
    batch = bh // kv_heads
    kv_head = bh % kv_heads
    first_head = kv_head * group_size + first
    layout = tl.load(
        layouts_ptr + batch * layout_stride_b + first_head * layout_stride_h,
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
    c = tl.arange(0, BLOCK_K)
    keys = tl.load(item + Q_START) + c * tl.load(item + Q_STEP)
    key_ok = c < num_rows
    wide = keys.to(tl.int64)
    k_head = tl.multiple_of(k_ptr + (batch * k_stride_b + kv_head * k_stride_h) * VECTOR, ALIGN)
    v_head = tl.multiple_of(v_ptr + (batch * v_stride_b + kv_head * v_stride_h) * VECTOR, ALIGN)
    k = load_rows(k_head, wide * (k_stride_s * VECTOR), key_ok, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_head, wide * (v_stride_s * VECTOR), key_ok, HEAD_DIM_V, BLOCK_DV, True)
    id_row = tl.zeros([1], tl.int64)
    k_id = keys
    if IDS:
        # A layout without ids has only ordinary tiles; whatever it reads here changes nothing.
        id_row = tl.maximum(tl.load(layout_ids_ptr + layout), 0).to(tl.int64)
        k_id = tl.load(k_ids_ptr + id_row * seqlen_k + keys, mask=key_ok, other=-2)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    sums = tl.zeros([BLOCK_K], tl.float32)
    for g in range(0, count):
        head = first_head + g
        q_head = tl.multiple_of(q_ptr + (batch * q_stride_b + head * q_stride_h) * VECTOR, ALIGN)
        do_head = tl.multiple_of(
            do_ptr + (batch * do_stride_b + head * do_stride_h) * VECTOR, ALIGN
        )
        stats = stats_ptr + (batch * num_heads + head).to(tl.int64) * 2 * seqlen_q
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes_ptr + batch * slopes_stride_b + head * slopes_stride_h)
        bias_head = bias_ptr
        if BIAS:
            bias_head = bias_ptr + batch * bias_stride_b + head * bias_stride_h

        # Partial tiles. Their list is read one entry ahead, as loop state, so that the loads can
        # be pipelined.
        has_tile = tile_begin < tile_end
        tile = tiles_ptr + tile_begin * 4
        start = tl.load(tile, mask=has_tile, other=0)
        step = tl.load(tile + 1, mask=has_tile, other=1)
        words = load_columns(bits_ptr, tl.load(tile + 2, mask=has_tile, other=-2), BLOCK_Q, WORDS)
        words_other = words
        if IDS:
            words_other = load_columns(
                bits_ptr, tl.load(tile + 3, mask=has_tile, other=-2), BLOCK_Q, WORDS
            )
        for e in tl.range(tile_begin, tile_end, num_stages=PARTIAL_STAGES):
            more = e + 1 < tile_end
            next_start = tl.load(tiles_ptr + e * 4 + 4, mask=more, other=0)
            next_step = tl.load(tiles_ptr + e * 4 + 5, mask=more, other=1)
            next_words = load_columns(
                bits_ptr, tl.load(tiles_ptr + e * 4 + 6, mask=more, other=-2), BLOCK_Q, WORDS
            )
            next_other = next_words
            if IDS:
                next_other = load_columns(
                    bits_ptr, tl.load(tiles_ptr + e * 4 + 7, mask=more, other=-2), BLOCK_Q, WORDS
                )
            rows, exists = tile_keys(start, step, seqlen_q, BLOCK_Q, STEPPED)
            keep = expand_columns(words, BLOCK_Q, BLOCK_K)
            if IDS:
                other = expand_columns(words_other, BLOCK_Q, BLOCK_K)
                q_id = tl.load(q_ids_ptr + id_row * seqlen_q + rows, mask=exists, other=-1)
                same = (k_id[:, None] == q_id[None, :]) & (q_id >= 0)[None, :]
                keep = tl.where(same, keep, other) & key_ok[:, None]
            q_rows = rows.to(tl.int64)
            q = load_rows(q_head, q_rows * (q_stride_s * VECTOR), exists, HEAD_DIM, BLOCK_D, True)
            do = load_rows(
                do_head, q_rows * (do_stride_s * VECTOR), exists, HEAD_DIM_V, BLOCK_DV, True
            )
            lse, delta = load_stats(stats, seqlen_q, rows, exists)
            x = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            p, dy, dx = gradient_of_scores(
                x, dp, lse[None, :], delta[None, :], rows[None, :], keys[:, None], keep,
                key_ok[:, None] & exists[None, :], q_offset, scale, softcap, slope, bias_head,
                bias_stride_s, bias_stride_k, SOFTCAP, ALIBI, BIAS, True,
            )  # fmt: skip
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            dk = tl.dot(dx.to(q.dtype), q, dk, input_precision=PRECISION)
            if SUMS:
                sums += tl.sum(dy, 1)
            start = next_start
            step = next_step
            words = next_words
            words_other = next_other

        # Full tiles: a progression, or a list read one entry ahead.
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
            rows, exists = tile_keys(start, step, seqlen_q, BLOCK_Q, STEPPED)
            q_rows = rows.to(tl.int64)
            q = load_rows(q_head, q_rows * (q_stride_s * VECTOR), exists, HEAD_DIM, BLOCK_D, True)
            do = load_rows(
                do_head, q_rows * (do_stride_s * VECTOR), exists, HEAD_DIM_V, BLOCK_DV, True
            )
            lse, delta = load_stats(stats, seqlen_q, rows, exists)
            x = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            p, dy, dx = gradient_of_scores(
                x, dp, lse[None, :], delta[None, :], rows[None, :], keys[:, None], x,
                key_ok[:, None] & exists[None, :], q_offset, scale, softcap, slope, bias_head,
                bias_stride_s, bias_stride_k, SOFTCAP, ALIBI, BIAS, False,
            )  # fmt: skip
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            dk = tl.dot(dx.to(q.dtype), q, dk, input_precision=PRECISION)
            if SUMS:
                sums += tl.sum(dy, 1)
            start = next_start
            step = next_step

    dk = dk * scale
    writes = num_rows > 0
    if PIECES:
        # A padding item (NUM_ROWS = 0) is no piece, whatever its other fields.
        if writes & (tl.load(item + NUM_PIECES) > 1):
            dk, dv, sums, writes = merge_pieces(
                dk, dv, sums, item, bh, slots_ptr, counters_ptr, num_slots, num_counters,
                BLOCK_DV, SUMS,
            )  # fmt: skip
    if writes:
        running = running_ptr
        if not (FIRST and LAST):
            running = running_ptr + bh.to(tl.int64) * seqlen_k * (BLOCK_D + BLOCK_DV)
        dk_head = dk_ptr + (batch * dk_stride_b + kv_head * dk_stride_h) * VECTOR
        dv_head = dv_ptr + (batch * dv_stride_b + kv_head * dv_stride_h) * VECTOR
        store_matrix(
            dk, tl.multiple_of(dk_head, ALIGN), keys, key_ok, dk_stride_s * VECTOR, running,
            HEAD_DIM, BLOCK_D, FIRST, LAST,
        )  # fmt: skip
        if not (FIRST and LAST):
            running += seqlen_k.to(tl.int64) * BLOCK_D
        store_matrix(
            dv, tl.multiple_of(dv_head, ALIGN), keys, key_ok, dv_stride_s * VECTOR, running,
            HEAD_DIM_V, BLOCK_DV, FIRST, LAST,
        )  # fmt: skip
        if SUMS:
            sums_head = (batch * num_heads + first_head).to(tl.int64) * seqlen_k
            add_vector(sums_ptr + sums_head, sums, keys, key_ok)
