"""A consumer warpgroup of the Hopper forward; the algorithm is at the head of hopper_kernel.py."""

# Triton's types are not Python's, and a constexpr `if` is decided while compiling.
# ruff: noqa: ANN001, ANN201, C901, PLR0915, SIM108
# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon

from portattn.backends.triton.hopper_adapter import (
    barrier,
    copy_out_wait,
    gl,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from portattn.backends.triton.hopper_epilogue import finish, merge_pieces
from portattn.backends.triton.hopper_primitives import (
    LN2,
    LOG2E,
    NEG_INF,
    ROWS,
    after,
    has_keys,
    leave,
    load_key_ids,
    load_words,
    masked,
    next_stage,
    pack_pairs,
    rescale,
    score_terms,
    softmax_step,
    unpack_pairs,
)
from portattn.backends.triton.hopper_work import (
    ITEM_FIELDS,
    NUM_PIECES,
    receive_item,
    tile_entry,
)


@gluon.jit
def advance(
    state, q, tile, mask_args, terms, rings, OPENING: gl.constexpr, MASKED: gl.constexpr,
    FLAGS: gl.constexpr, LAYOUTS: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of a tile, beside the product P V of the tile before (not if OPENING)."""
    BLOCK_Q: gl.constexpr = FLAGS[0]
    IDS: gl.constexpr = FLAGS[4]
    SCALED: gl.constexpr = FLAGS[8]
    SOFTCAP: gl.constexpr = FLAGS[9]
    ALIBI: gl.constexpr = FLAGS[10]
    SCORES: gl.constexpr = LAYOUTS[0]
    SPLIT: gl.constexpr = LAYOUTS[1]
    PV: gl.constexpr = LAYOUTS[2]
    acc, p, m, row_sum = state
    stage, filled, before, filled_before, start, step = tile
    words, words_other, q_id, k_ids_ptr, seqlen_k = mask_args
    rows, q_offset, scale, softcap, slope, factor = terms
    k_shared, v_shared, k_full, v_full = rings
    BLOCK_K: gl.constexpr = k_shared.shape[1]
    CONSUMERS: gl.constexpr = BLOCK_Q // ROWS
    # A tile with ids does not overlap: they take the registers of P, so its product must be done.
    OVERLAPS: gl.constexpr = not (IDS and MASKED)
    # P crosses the loop's end as pairs: lone 16-bit numbers would be unpacked and packed again.
    pv = unpack_pairs(p, q.dtype, PV)
    zeros = gl.zeros([ROWS, BLOCK_K], gl.float32, SCORES)
    mbarrier.wait(k_full.index(stage), filled & 1)
    s = warpgroup_mma(
        q, k_shared.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True
    )
    if not OPENING:
        mbarrier.wait(v_full.index(before), filled_before & 1)
        acc = warpgroup_mma(pv, v_shared.index(before), acc, is_async=True)
    if OPENING:
        s = warpgroup_mma_wait(0, deps=(s,))
    else:
        s = warpgroup_mma_wait(1, deps=(s,))
    leave(stage, False, CONSUMERS)
    if not OPENING and not OVERLAPS:
        acc, pv = warpgroup_mma_wait(0, deps=(acc, pv))
        leave(before, True, CONSUMERS)
    s = score_terms(
        s, rows, start, step, q_offset, scale, softcap, slope, SCALED, SOFTCAP, ALIBI, SCORES
    )
    if MASKED:
        k_id = start
        if IDS:
            k_id = load_key_ids(k_ids_ptr, start, step, seqlen_k, BLOCK_K, SCORES)
        s = masked(s, words, words_other, q_id, k_id, IDS, SCORES, SPLIT)
    # Infinite keys may leave a row without a finite score in its first tile.
    GUARD: gl.constexpr = MASKED or OPENING
    p32, alpha, m, row_sum = softmax_step(s, m, row_sum, factor, SCALED, GUARD)
    if not OPENING:
        if OVERLAPS:
            row_sum = after(row_sum)
            acc, pv = warpgroup_mma_wait(0, deps=(acc, pv))
            leave(before, True, CONSUMERS)
        acc = rescale(acc, alpha)
    return acc, pack_pairs(p32, q.dtype), m, row_sum


@gluon.jit
def pass_over(rings, stage, filled, FLAGS: gl.constexpr):
    """Give back a tile of which no row of this consumer keeps a key."""
    BLOCK_Q: gl.constexpr = FLAGS[0]
    CONSUMERS: gl.constexpr = BLOCK_Q // ROWS
    _, _, k_full, v_full = rings
    mbarrier.wait(k_full.index(stage), filled & 1)
    mbarrier.wait(v_full.index(stage), filled & 1)
    leave(stage, False, CONSUMERS)
    leave(stage, True, CONSUMERS)


@gluon.jit
def consumer(W: gl.constexpr, args, FLAGS: gl.constexpr):
    """Attention of every item's rows W * ROWS to W * ROWS + ROWS - 1."""
    BLOCK_Q: gl.constexpr = FLAGS[0]
    NUM_STAGES: gl.constexpr = FLAGS[1]
    OUT_IN_QUERY: gl.constexpr = FLAGS[2]
    SHORT_WIDTH: gl.constexpr = FLAGS[13]
    STEPPED: gl.constexpr = FLAGS[3]
    IDS: gl.constexpr = FLAGS[4]
    PIECES: gl.constexpr = FLAGS[5]
    FIRST: gl.constexpr = FLAGS[6]
    LAST: gl.constexpr = FLAGS[7]
    ALIBI: gl.constexpr = FLAGS[10]
    SINKS: gl.constexpr = FLAGS[11]
    STORE_LSE: gl.constexpr = FLAGS[12]
    (q_shared, out_shared, q_full, q_empty, rings, work, lists, ids, score_args, out_args, pieces,
     seqlen_q, seqlen_k, mail) = args  # fmt: skip
    k_shared, v_shared, _, v_full = rings
    items_ptr, num_heads = work
    tiles_ptr, full_list_ptr, bits_ptr, ranges_ptr = lists
    layout_ids_ptr, q_ids_ptr, k_ids_ptr = ids
    q_offset, scale, softcap, slopes_ptr, slopes_stride_b, slopes_stride_h, sinks_ptr = score_args
    (out_maps, lse_ptr, lse_stride_b, lse_stride_h, lse_stride_s, running_out_ptr,
     running_lse_ptr) = out_args  # fmt: skip
    slots_out_ptr, slots_lse_ptr, counters_ptr, num_slots, num_counters = pieces
    CONSUMERS: gl.constexpr = BLOCK_Q // ROWS
    BLOCK_K: gl.constexpr = k_shared.shape[1]
    BLOCK_DV: gl.constexpr = v_shared.shape[2]
    WORDS: gl.constexpr = BLOCK_K // 32
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_K, 16]
    )
    OUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_DV, 16]
    )
    PV: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    example = gl.zeros([ROWS, BLOCK_K], gl.float32, SCORES).reshape([ROWS, WORDS, 4, 4, 2])
    SPLIT: gl.constexpr = example.type.layout
    WORD: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, SPLIT)))
    LAYOUTS: gl.constexpr = (SCORES, SPLIT, PV)
    by_lane = gl.zeros([ROWS, BLOCK_K], gl.float32, SCORES).reshape([ROWS, BLOCK_K // 8, 4, 2])
    LANE_SUM: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, by_lane.type.layout))

    q = q_shared.index(W)
    out_buffer = out_shared.index(W)
    factor = scale * LOG2E
    stage = 0
    filled = 0
    before = 0
    filled_before = 0
    items_done = 0
    (number, layout, batch, head, first_row, q_step, num_rows, tile_begin, num_partial, num_tiles,
     full_first, full_step, full_stride) = receive_item(mail, 0)  # fmt: skip
    while number >= 0:
        item = items_ptr + number * ITEM_FIELDS
        q_start = first_row + W * ROWS * q_step
        entries = (
            tiles_ptr, full_list_ptr, tile_begin, num_partial, num_tiles, full_first, full_step,
            full_stride,
        )  # fmt: skip
        rows = q_start + gl.arange(0, ROWS, ROW) * q_step
        slope = 0.0
        if ALIBI:
            slope = gl.load(slopes_ptr + batch * slopes_stride_b + head * slopes_stride_h)
        terms = (rows, q_offset, scale, softcap, slope, factor)
        q_id = rows
        k_id_head = bits_ptr  # of the right type; read only if IDS
        if IDS:
            # A layout without ids has only ordinary tiles; what it reads here changes nothing.
            id_row = gl.maximum(gl.load(layout_ids_ptr + layout), 0).to(gl.int64)
            row_ok = W * ROWS + gl.arange(0, ROWS, ROW) < num_rows
            q_id = gl.load(q_ids_ptr + id_row * seqlen_q + rows, mask=row_ok, other=-1)
            k_id_head = k_ids_ptr + id_row * seqlen_k

        # Bit tile numbers are read one entry ahead: two loads in a row would delay the product.
        # An item without tiles opens with one of nothing (-2).
        tile = tiles_ptr + tile_begin * 4
        opening_bits = gl.where(num_tiles > 0, -1, -2)
        same = gl.load(tile + 2, mask=num_partial > 0, other=opening_bits)
        words = load_words(bits_ptr, same, W * ROWS, WORDS, BLOCK_Q, WORD)
        words_other = words
        same = gl.load(tile + 6, mask=num_partial > 1, other=-2)
        other = same
        start = 0
        step = 1
        if IDS or ALIBI:
            start, step = tile_entry(entries, 0)
        if IDS:
            other = gl.load(tile + 3, mask=num_partial > 0, other=opening_bits)
            words_other = load_words(bits_ptr, other, W * ROWS, WORDS, BLOCK_Q, WORD)
            other = gl.load(tile + 7, mask=num_partial > 1, other=-2)
        acc = gl.zeros([ROWS, BLOCK_DV], gl.float32, OUT)
        p = pack_pairs(gl.zeros([ROWS, BLOCK_K], gl.float32, SCORES), q.dtype)
        m = gl.full([ROWS], NEG_INF, gl.float32, ROW)
        lane_sums = gl.zeros([ROWS, 4], gl.float32, LANE_SUM)
        mbarrier.wait(q_full.index(W), items_done & 1)
        if (num_partial > 0) | (num_tiles == 0):
            acc, p, m, lane_sums = advance(
                (acc, p, m, lane_sums), q, (stage, filled, before, filled_before, start, step),
                (words, words_other, q_id, k_id_head, seqlen_k), terms, rings, True, True,
                FLAGS, LAYOUTS,
            )  # fmt: skip
        else:
            acc, p, m, lane_sums = advance(
                (acc, p, m, lane_sums), q, (stage, filled, before, filled_before, start, step),
                (words, words_other, q_id, k_id_head, seqlen_k), terms, rings, True, False,
                FLAGS, LAYOUTS,
            )  # fmt: skip
        before, filled_before = stage, filled
        stage, filled = next_stage(stage, filled, NUM_STAGES)
        keeps = IDS or has_keys(ranges_ptr, same, W * ROWS, BLOCK_Q)
        skipped = 0
        for e in range(1, num_partial):
            words = load_words(bits_ptr, same, W * ROWS, WORDS, BLOCK_Q, WORD)
            words_other = words
            same = gl.load(tile + e * 4 + 6, mask=e + 1 < num_partial, other=-2)
            if IDS or ALIBI:
                start = gl.load(tile + e * 4)
                step = gl.load(tile + e * 4 + 1)
            if IDS:
                words_other = load_words(bits_ptr, other, W * ROWS, WORDS, BLOCK_Q, WORD)
                other = gl.load(tile + e * 4 + 7, mask=e + 1 < num_partial, other=-2)
            # V of the last tile taken is still needed: the ring must not come round to it.
            if keeps | (skipped == NUM_STAGES - 1):
                acc, p, m, lane_sums = advance(
                    (acc, p, m, lane_sums), q,
                    (stage, filled, before, filled_before, start, step),
                    (words, words_other, q_id, k_id_head, seqlen_k), terms, rings, False, True,
                    FLAGS, LAYOUTS,
                )  # fmt: skip
                before, filled_before = stage, filled
                skipped = 0
            else:
                pass_over(rings, stage, filled, FLAGS)
                skipped += 1
            keeps = IDS or has_keys(ranges_ptr, same, W * ROWS, BLOCK_Q)
            stage, filled = next_stage(stage, filled, NUM_STAGES)
        for e in range(gl.maximum(num_partial, 1), num_tiles):
            if ALIBI:
                start, step = tile_entry(entries, e)
            acc, p, m, lane_sums = advance(
                (acc, p, m, lane_sums), q, (stage, filled, before, filled_before, start, step),
                (words, words_other, q_id, k_id_head, seqlen_k), terms, rings, False, False,
                FLAGS, LAYOUTS,
            )  # fmt: skip
            before, filled_before = stage, filled
            stage, filled = next_stage(stage, filled, NUM_STAGES)
        if not OUT_IN_QUERY:
            mbarrier.arrive(q_empty.index(W))
        pv = unpack_pairs(p, q.dtype, PV)
        mbarrier.wait(v_full.index(before), filled_before & 1)
        acc = warpgroup_mma(pv, v_shared.index(before), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        leave(before, True, CONSUMERS)

        next_item = receive_item(mail, items_done + 1)
        row_sum = gl.convert_layout(gl.sum(lane_sums, 1), ROW)
        empty = row_sum == 0.0
        divisor = gl.where(empty, 1.0, row_sum)
        lse = gl.where(empty, NEG_INF, (m + gl.log2(divisor)) * LN2)
        lse = gl.convert_layout(lse, OUT_ROW)
        # A row that kept nothing is 0 even where the values that it visited are not finite.
        inverse = gl.convert_layout(gl.where(empty, 0.0, 1.0 / divisor), OUT_ROW)[:, None]
        out = gl.where(inverse == 0.0, 0.0, acc * inverse)
        out_rows = gl.arange(0, ROWS, OUT_ROW)
        row_ok = W * ROWS + out_rows < num_rows
        out_rows = q_start + out_rows * q_step
        # A padding item (NUM_ROWS = 0) is nobody's row, whatever its other fields.
        writes = num_rows > W * ROWS
        whole = True
        if SHORT_WIDTH:
            whole = (num_rows >= (W + 1) * ROWS) | (first_row + num_rows * q_step >= seqlen_q)
        if PIECES:
            num_pieces = gl.load(item + NUM_PIECES)
            if writes & (num_pieces > 1):
                out, lse, writes = merge_pieces(
                    out, lse, batch * num_heads + head, item, slots_out_ptr, slots_lse_ptr,
                    counters_ptr, num_slots, num_counters, num_pieces, W, BLOCK_Q, OUT,
                )  # fmt: skip
        if not OUT_IN_QUERY:
            # The last item's rows have left the buffer, by the thread that sent them.
            copy_out_wait(0)
            barrier()
        if writes:
            finish(
                out, lse, out_buffer, out_rows, row_ok, whole, batch, head, num_heads, q_start,
                q_step, seqlen_q, sinks_ptr, out_maps, lse_ptr, lse_stride_b, lse_stride_h,
                lse_stride_s, running_out_ptr, running_lse_ptr, OUT, SHORT_WIDTH, STEPPED, FIRST,
                LAST, SINKS, STORE_LSE,
            )  # fmt: skip
        if OUT_IN_QUERY:
            copy_out_wait(0)
            mbarrier.arrive(q_empty.index(W))
        items_done += 1
        (number, layout, batch, head, first_row, q_step, num_rows, tile_begin, num_partial,
         num_tiles, full_first, full_step, full_stride) = next_item  # fmt: skip
    # Shared memory must outlive the copies that read it.
    copy_out_wait(0)
