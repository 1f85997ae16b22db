"""Attention forward in plain Triton: any plan, any GPU.

One program computes one schedule item of one head (docs/formats.md): first its partial tiles,
whose scores are masked by bit tiles or ids, then its full tiles through one loop without masks,
with the online softmax of Milakov and Gimelshein (2018) as in FlashAttention-2 (Dao 2023,
algorithm 1): per key tile

    m' = max(m, rowmax(S))
    P  = exp2(S - m')
    l  = l * exp2(m - m') + rowsum(P)
    O  = O * exp2(m - m') + P V

A row that the schedule cut is merged by its last piece to arrive (an acquire-release counter), in
slot order, so that the result does not depend on timing. Later passes continue from the running (O
in float32, LSE).

What it does not do: kv_lengths (a plan from device scalars) and gradients.
"""

# Triton's types are not Python's, and a constexpr `if` is decided while compiling.
# ruff: noqa: ANN001, ANN201, C901, PLR0915
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from portattn.backends.triton.primitives import (
    LN2,
    LOG2E,
    NEG_INF,
    expand_bits,
    load_rows,
    load_tile,
    load_words,
    locate,
    merge_end,
    merge_step,
    softmax_step,
    tanh,
    tile_keys,
)

# Fields of a schedule item (portattn.h).
ITEM_FIELDS = tl.constexpr(16)
Q_START = tl.constexpr(0)
Q_STEP = tl.constexpr(1)
NUM_ROWS = tl.constexpr(2)
TILE_BEGIN = tl.constexpr(3)
TILE_END = tl.constexpr(4)
FULL_FIRST = tl.constexpr(5)
FULL_COUNT = tl.constexpr(6)
FULL_STEP = tl.constexpr(7)
FULL_STRIDE = tl.constexpr(8)
SLOT = tl.constexpr(9)
SLOT_FIRST = tl.constexpr(10)
NUM_PIECES = tl.constexpr(11)
COUNTER = tl.constexpr(12)


@triton.jit
def scores(
    q, k, rows, row_ok, keys, exists, q_offset, scale, softcap, slope, bias_ptr, bias_stride_s,
    bias_stride_k, SCALED: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS:
    tl.constexpr, BIAS_WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores q k^T; if SCALED (softcap(scale * q k^T) - slope * |i - j| + bias) in log2 units."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if SCALED:
        s = s * scale
        if SOFTCAP:
            s = softcap * tanh(s / softcap)
        if ALIBI:
            distance = tl.abs((rows + q_offset)[:, None] - keys[None, :])
            s = s - slope * distance.to(tl.float32)
        if BIAS:
            if BIAS_WIDE:
                row_offsets = rows.to(tl.int64) * bias_stride_s
                offsets = row_offsets[:, None] + (keys.to(tl.int64) * bias_stride_k)[None, :]
            else:
                row_offsets = rows * bias_stride_s.to(tl.int32)
                offsets = row_offsets[:, None] + (keys * bias_stride_k.to(tl.int32))[None, :]
            pairs = row_ok[:, None] & exists[None, :]
            s = s + tl.load(bias_ptr + offsets, mask=pairs, other=0.0).to(tl.float32)
        s = s * LOG2E
    return s


@triton.jit
def finish(
    out, lse, rows, row_ok, bh, seqlen_q, sink_ptr, out_ptr, out_stride_s, lse_ptr, lse_stride_s,
    running_out_ptr, running_lse_ptr, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, FIRST:
    tl.constexpr, LAST: tl.constexpr, SINKS: tl.constexpr, STORE_LSE: tl.constexpr,
):  # fmt: skip
    """Join a row's earlier passes, apply the sink after the last one, store."""
    columns = tl.arange(0, BLOCK_DV)
    if not (FIRST and LAST):
        running_rows = bh.to(tl.int64) * seqlen_q + rows
        running_head = running_out_ptr + bh.to(tl.int64) * seqlen_q * BLOCK_DV
        row_offsets = rows.to(tl.int64) * BLOCK_DV
        running = tl.multiple_of(running_head, 16) + row_offsets[:, None] + columns[None, :]
        if not FIRST:
            earlier = tl.load(running, mask=row_ok[:, None], other=0.0)
            earlier_lse = tl.load(running_lse_ptr + running_rows, mask=row_ok, other=NEG_INF)
            total = tl.where(lse == NEG_INF, 0.0, 1.0)
            out, top, total = merge_step(out, lse, total, earlier, earlier_lse)
            out, lse = merge_end(out, top, total)
        if not LAST:
            tl.store(running, out, mask=row_ok[:, None])
            tl.store(running_lse_ptr + running_rows, lse, mask=row_ok)
    if LAST:
        if SINKS:
            sink = tl.load(sink_ptr).to(tl.float32)
            top = tl.maximum(lse, sink)
            safe = tl.where(top == NEG_INF, 0.0, top)
            kept = tl.exp(lse - safe)
            total = kept + tl.exp(sink - safe)
            divisor = tl.where(total == 0.0, 1.0, total)
            out = out * (kept / divisor)[:, None]
            lse = tl.where(total == 0.0, NEG_INF, safe + tl.log(divisor))
        mask = row_ok[:, None]
        if HEAD_DIM_V != BLOCK_DV:
            mask = mask & (columns < HEAD_DIM_V)[None, :]
        pointers = out_ptr + (rows.to(tl.int64) * out_stride_s)[:, None] + columns[None, :]
        tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=mask)
        if STORE_LSE:
            tl.store(lse_ptr + rows.to(tl.int64) * lse_stride_s, lse, mask=row_ok)


# Every parameter that must not specialise: new lengths, strides and addresses reuse the variant.
RUNTIME_PARAMETERS = [
    "q_ptr", "k_ptr", "v_ptr", "out_ptr", "lse_ptr", "running_out_ptr", "running_lse_ptr",
    "slots_out_ptr", "slots_lse_ptr", "counters_ptr", "items_ptr", "full_list_ptr",
    "tiles_ptr", "bits_ptr", "layouts_ptr", "layout_ids_ptr", "q_ids_ptr", "k_ids_ptr",
    "slopes_ptr", "bias_ptr", "sinks_ptr", "q_stride_b", "q_stride_h", "q_stride_s",
    "k_stride_b", "k_stride_h", "k_stride_s", "v_stride_b", "v_stride_h", "v_stride_s",
    "out_stride_b", "out_stride_h", "out_stride_s", "lse_stride_b", "lse_stride_h",
    "lse_stride_s", "slopes_stride_b", "slopes_stride_h", "bias_stride_b", "bias_stride_h",
    "bias_stride_s", "bias_stride_k", "layout_stride_b", "layout_stride_h", "num_layouts",
    "first_item", "num_items", "num_bh", "num_heads", "group_size", "head_group", "seqlen_q",
    "seqlen_k", "q_offset", "num_slots", "num_counters",
]  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME_PARAMETERS)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, out_ptr, lse_ptr, running_out_ptr, running_lse_ptr,
    slots_out_ptr, slots_lse_ptr, counters_ptr, items_ptr, full_list_ptr, tiles_ptr, bits_ptr,
    layouts_ptr, layout_ids_ptr, q_ids_ptr, k_ids_ptr, slopes_ptr, bias_ptr, sinks_ptr,
    q_stride_b: tl.int64, q_stride_h: tl.int64, q_stride_s: tl.int64, k_stride_b: tl.int64,
    k_stride_h: tl.int64, k_stride_s: tl.int64, v_stride_b: tl.int64, v_stride_h: tl.int64,
    v_stride_s: tl.int64, out_stride_b: tl.int64, out_stride_h: tl.int64,
    out_stride_s: tl.int64, lse_stride_b: tl.int64, lse_stride_h: tl.int64,
    lse_stride_s: tl.int64, slopes_stride_b: tl.int64, slopes_stride_h: tl.int64,
    bias_stride_b: tl.int64, bias_stride_h: tl.int64, bias_stride_s: tl.int64,
    bias_stride_k: tl.int64,
    layout_stride_b: tl.int32, layout_stride_h: tl.int32, num_layouts: tl.int32,
    first_item: tl.int32, num_items: tl.int32, num_bh: tl.int32, num_heads: tl.int32,
    group_size: tl.int32, head_group: tl.int32, seqlen_q: tl.int32, seqlen_k: tl.int32,
    q_offset: tl.int32, num_slots: tl.int32, num_counters: tl.int32,
    scale: tl.float32, softcap: tl.float32,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    VECTOR: tl.constexpr, TMA: tl.constexpr, STEPPED: tl.constexpr, IDS: tl.constexpr,
    PIECES: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, SCALED: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr, BIAS_WIDE: tl.constexpr,
    SINKS: tl.constexpr, STORE_LSE: tl.constexpr, PRECISION: tl.constexpr,
    PARTIAL_STAGES: tl.constexpr,
):  # fmt: skip
    """One item of one head. Strides of q, k, v and out count VECTOR elements (16 bytes, or 1)."""
    item_index, bh = locate(num_items, num_bh, head_group)
    batch = bh // num_heads
    head = bh % num_heads
    kv_head = head // group_size
    # A mask of one layout, the usual case, skips the load: it would stand before the item's own.
    layout = tl.load(
        layouts_ptr + batch * layout_stride_b + head * layout_stride_h,
        mask=num_layouts > 1,
        other=0,
    )
    item = items_ptr + (first_item + layout * num_items + item_index) * ITEM_FIELDS
    q_start = tl.load(item + Q_START)
    q_step = tl.load(item + Q_STEP)
    num_rows = tl.load(item + NUM_ROWS)
    tile_begin = tl.load(item + TILE_BEGIN)
    tile_end = tl.load(item + TILE_END)
    full_first = tl.load(item + FULL_FIRST)
    full_count = tl.load(item + FULL_COUNT)
    full_step = tl.load(item + FULL_STEP)
    full_stride = tl.load(item + FULL_STRIDE)

    # Head bases; the hint lets loads and stores take 16 bytes at a time where the host checked
    # alignment.
    ALIGN: tl.constexpr = VECTOR * q_ptr.dtype.element_ty.primitive_bitwidth // 8
    k_head = tl.multiple_of(k_ptr + (batch * k_stride_b + kv_head * k_stride_h) * VECTOR, ALIGN)
    v_head = tl.multiple_of(v_ptr + (batch * v_stride_b + kv_head * v_stride_h) * VECTOR, ALIGN)
    q_head = tl.multiple_of(q_ptr + (batch * q_stride_b + head * q_stride_h) * VECTOR, ALIGN)
    k_stride = k_stride_s * VECTOR
    v_stride = v_stride_s * VECTOR
    r = tl.arange(0, BLOCK_Q)
    rows = q_start + r * q_step
    row_ok = r < num_rows
    q = load_rows(
        q_head, rows.to(tl.int64) * (q_stride_s * VECTOR), row_ok, HEAD_DIM, BLOCK_D, True
    )

    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + batch * slopes_stride_b + head * slopes_stride_h)
    bias_head = bias_ptr
    if BIAS:
        bias_head = bias_ptr + batch * bias_stride_b + head * bias_stride_h
    factor = scale * LOG2E
    acc = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    m = tl.full([BLOCK_Q], NEG_INF, tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)

    # Partial tiles. Their list is read one entry ahead, as loop state, so that the loads can be
    # pipelined.
    WORDS: tl.constexpr = BLOCK_K // 32
    if IDS:
        # A layout without ids has only ordinary tiles; whatever it reads here changes nothing.
        id_row = tl.maximum(tl.load(layout_ids_ptr + layout), 0).to(tl.int64)
        q_id = tl.load(q_ids_ptr + id_row * seqlen_q + rows, mask=row_ok, other=-1)
    has_tile = tile_begin < tile_end
    start = tl.load(tiles_ptr + tile_begin * 4, mask=has_tile, other=0)
    step = tl.load(tiles_ptr + tile_begin * 4 + 1, mask=has_tile, other=1)
    words = load_words(
        bits_ptr, tl.load(tiles_ptr + tile_begin * 4 + 2, mask=has_tile, other=-2), BLOCK_Q, WORDS
    )
    words_other = words
    if IDS:
        words_other = load_words(
            bits_ptr,
            tl.load(tiles_ptr + tile_begin * 4 + 3, mask=has_tile, other=-2),
            BLOCK_Q,
            WORDS,
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
        k = load_tile(
            k_head, k_desc, batch, kv_head, start, keys, exists, k_stride, BLOCK_K,
            HEAD_DIM, BLOCK_D, TMA, True,
        )  # fmt: skip
        s = scores(
            q, k, rows, row_ok, keys, exists, q_offset, scale, softcap, slope, bias_head,
            bias_stride_s, bias_stride_k, SCALED, SOFTCAP, ALIBI, BIAS, BIAS_WIDE, PRECISION,
        )  # fmt: skip
        keep = expand_bits(words, BLOCK_Q, BLOCK_K)
        if IDS:
            other = expand_bits(words_other, BLOCK_Q, BLOCK_K)
            k_id = tl.load(k_ids_ptr + id_row * seqlen_k + keys, mask=exists, other=-1)
            same = (q_id[:, None] == k_id[None, :]) & (q_id >= 0)[:, None]
            keep = tl.where(same, keep, other) & exists[None, :]
        s = tl.where(keep, s, NEG_INF)
        v = load_tile(
            v_head, v_desc, batch, kv_head, start, keys, exists, v_stride, BLOCK_K,
            HEAD_DIM_V, BLOCK_DV, TMA, True,
        )  # fmt: skip
        acc, m, row_sum = softmax_step(s, v, acc, m, row_sum, factor, SCALED, True, PRECISION)
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
        keys, exists = tile_keys(start, step, seqlen_k, BLOCK_K, STEPPED)
        k = load_tile(
            k_head, k_desc, batch, kv_head, start, keys, exists, k_stride, BLOCK_K,
            HEAD_DIM, BLOCK_D, TMA, False,
        )  # fmt: skip
        s = scores(
            q, k, rows, row_ok, keys, exists, q_offset, scale, softcap, slope, bias_head,
            bias_stride_s, bias_stride_k, SCALED, SOFTCAP, ALIBI, BIAS, BIAS_WIDE, PRECISION,
        )  # fmt: skip
        v = load_tile(
            v_head, v_desc, batch, kv_head, start, keys, exists, v_stride, BLOCK_K,
            HEAD_DIM_V, BLOCK_DV, TMA, False,
        )  # fmt: skip
        # A bias may be -inf all along a row, so that its maximum may be too.
        acc, m, row_sum = softmax_step(s, v, acc, m, row_sum, factor, SCALED, BIAS, PRECISION)
        start = next_start
        step = next_step

    empty = row_sum == 0.0
    divisor = tl.where(empty, 1.0, row_sum)
    lse = tl.where(empty, NEG_INF, (m + tl.log2(divisor)) * LN2)
    out = acc / divisor[:, None]

    out_head = tl.multiple_of(
        out_ptr + (batch * out_stride_b + head * out_stride_h) * VECTOR, ALIGN
    )
    out_stride = out_stride_s * VECTOR
    lse_head = lse_ptr
    if STORE_LSE:
        lse_head = lse_ptr + batch * lse_stride_b + head * lse_stride_h
    sink_ptr = sinks_ptr
    if SINKS:
        sink_ptr = sinks_ptr + head
    if PIECES:
        num_pieces = tl.load(item + NUM_PIECES)
        # A padding item (NUM_ROWS = 0) is no piece, whatever its other fields.
        if (num_pieces > 1) & (num_rows > 0):
            slot_base = bh.to(tl.int64) * num_slots
            slot = slot_base + tl.load(item + SLOT)
            in_slot = r[:, None] * BLOCK_DV + tl.arange(0, BLOCK_DV)[None, :]
            slot_out = tl.multiple_of(slots_out_ptr + slot * (BLOCK_Q * BLOCK_DV), 16)
            tl.store(slot_out + in_slot, out)
            tl.store(slots_lse_ptr + slot * BLOCK_Q + r, lse)
            counter = counters_ptr + bh.to(tl.int64) * num_counters + tl.load(item + COUNTER)
            # All threads have stored before one of them releases; the last to arrive acquires all
            # slots.
            tl.debug_barrier()
            arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            if arrived == num_pieces - 1:
                slot = slot_base + tl.load(item + SLOT_FIRST)
                total_out = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
                top = tl.full([BLOCK_Q], NEG_INF, tl.float32)
                total = tl.zeros([BLOCK_Q], tl.float32)
                for piece in range(0, num_pieces):
                    # .cg: past the L1 cache, which other multiprocessors' stores do not reach.
                    part_out = slots_out_ptr + (slot + piece) * (BLOCK_Q * BLOCK_DV)
                    part = tl.load(tl.multiple_of(part_out, 16) + in_slot, cache_modifier=".cg")
                    part_lse_ptr = slots_lse_ptr + (slot + piece) * BLOCK_Q + r
                    part_lse = tl.load(part_lse_ptr, cache_modifier=".cg")
                    total_out, top, total = merge_step(total_out, top, total, part, part_lse)
                merged, merged_lse = merge_end(total_out, top, total)
                finish(
                    merged, merged_lse, rows, row_ok, bh, seqlen_q, sink_ptr, out_head, out_stride,
                    lse_head, lse_stride_s, running_out_ptr, running_lse_ptr, HEAD_DIM_V, BLOCK_DV,
                    FIRST, LAST, SINKS, STORE_LSE,
                )  # fmt: skip
                tl.store(counter, 0)
        else:
            finish(
                out, lse, rows, row_ok, bh, seqlen_q, sink_ptr, out_head, out_stride, lse_head,
                lse_stride_s, running_out_ptr, running_lse_ptr, HEAD_DIM_V, BLOCK_DV, FIRST, LAST,
                SINKS, STORE_LSE,
            )  # fmt: skip
    else:
        finish(
            out, lse, rows, row_ok, bh, seqlen_q, sink_ptr, out_head, out_stride, lse_head,
            lse_stride_s, running_out_ptr, running_lse_ptr, HEAD_DIM_V, BLOCK_DV, FIRST, LAST,
            SINKS, STORE_LSE,
        )  # fmt: skip
