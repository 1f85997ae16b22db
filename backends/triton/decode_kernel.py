"""Attention for few query rows and for KV lengths that only the device knows, in plain Triton.

Flash-decoding (Dao, Haziza, Massa and Sizov, 2023): reading keys and values once is the whole
cost, so the query heads of one KV head share a tile (rows are (query row, head of the group)) and
a sequence's keys are cut into *pieces* that run at once. Each piece is an online softmax over its
tiles (Milakov and Gimelshein, 2018); the last piece to arrive at an acquire-release counter merges
them by their LSE, always in the same order, so that the result does not depend on timing.

Pieces are planned here, from the lengths: with T the visible tiles of all sequences, a piece is
about T / target_pieces tiles of one sequence, whatever its length and whatever the cache's
capacity. Program u finds its piece by a prefix sum over the sequences; the host starts as many
programs as there can be pieces, and those without one leave at once.

What it does not do: masks other than portattn.backends.scalar_mask's, and gradients.
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
    load_rows,
    softmax_step,
    tanh,
)


@triton.jit
def visible(length, position, row_first, row_last, lo, hi, key_begin, key_end, seqlen_k):
    """The keys [begin, end) that rows row_first to row_last may attend to; int64.

    `length` keys exist, row 0 stands at `position`. All may be tensors. Sums are clamped in int64:
    positions and bounds together may leave int32.
    """
    exist = tl.minimum(tl.maximum(length, 0), seqlen_k)
    begin = tl.maximum(position + row_first + lo, key_begin)
    end = tl.minimum(position + row_last + hi + 1, key_end)
    return tl.minimum(tl.maximum(begin, 0), exist), tl.minimum(tl.maximum(end, 0), exist)


@triton.jit
def count_tiles(begin, end, first_keys, BLOCK_K: tl.constexpr):
    """(tiles of the first keys, number of the next tile, tiles in all); int32.

    Tiles start at multiples of BLOCK_K; those of the first keys end where [begin, end) starts.
    """
    next_tile = begin // BLOCK_K
    first_tiles = (tl.minimum(end, first_keys) + BLOCK_K - 1) // BLOCK_K
    first_tiles = tl.minimum(first_tiles, next_tile)
    rest = tl.where(end > begin, (end + BLOCK_K - 1) // BLOCK_K - next_tile, 0)
    return first_tiles.to(tl.int32), next_tile.to(tl.int32), (first_tiles + rest).to(tl.int32)


@triton.jit
def count_pieces(tiles, piece_tiles):
    """How many pieces a sequence is cut into; one if it has no keys.

    A little more than a piece stays whole: two halves would cost a merge and balance nothing.
    """
    is_whole = tiles <= piece_tiles + piece_tiles // 8
    return tl.where(is_whole, 1, tl.cdiv(tiles, piece_tiles))


@triton.jit
def packed_rows(first_row, kv_head, group_size, num_rows, BLOCK: tl.constexpr):
    """Rows of a tile: (query row, query head, whether it exists), each [BLOCK]."""
    packed = first_row + tl.arange(0, BLOCK)
    return packed // group_size, kv_head * group_size + packed % group_size, packed < num_rows


@triton.jit
def scores(
    q, k, keys, exists, row_ok, position, scale, softcap, slope, bias_rows, bias_stride_k,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores q k^T; if SCALED (softcap(scale * q k^T) - slope * |i - j| + bias) in log2 units.

    position, slope: [rows], the rows' positions i and slopes; bias_rows: pointers to the rows.
    """
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if SCALED:
        s = s * scale
        if SOFTCAP:
            s = softcap * tanh(s / softcap)
        if ALIBI:
            distance = tl.abs(position[:, None] - keys[None, :])
            s = s - slope[:, None] * distance.to(tl.float32)
        if BIAS:
            pointers = bias_rows[:, None] + (keys.to(tl.int64) * bias_stride_k)[None, :]
            pairs = row_ok[:, None] & exists[None, :]
            s = s + tl.load(pointers, mask=pairs, other=0.0).to(tl.float32)
        s = s * LOG2E
    return s


@triton.jit
def finish(
    out, lse, row, head, row_ok, sinks_ptr, out_ptr, out_stride_h, out_stride_s, lse_ptr,
    lse_stride_h, lse_stride_s, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr,
    VECTOR: tl.constexpr, SINKS: tl.constexpr, STORE_LSE: tl.constexpr,
):  # fmt: skip
    """Apply the sinks to whole rows, store; out_ptr and lse_ptr are those of the sequence."""
    if SINKS:
        sink = tl.load(sinks_ptr + head, mask=row_ok, other=NEG_INF).to(tl.float32)
        top = tl.maximum(lse, sink)
        safe = tl.where(top == NEG_INF, 0.0, top)
        kept = tl.exp(lse - safe)
        total = kept + tl.exp(sink - safe)
        divisor = tl.where(total == 0.0, 1.0, total)
        out = out * (kept / divisor)[:, None]
        lse = tl.where(total == 0.0, NEG_INF, safe + tl.log(divisor))
    columns = tl.arange(0, BLOCK_DV)
    mask = row_ok[:, None]
    if HEAD_DIM_V != BLOCK_DV:
        mask = mask & (columns < HEAD_DIM_V)[None, :]
    offsets = (head * out_stride_h + row * out_stride_s) * VECTOR
    pointers = out_ptr + offsets[:, None] + columns[None, :]
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=mask)
    if STORE_LSE:
        tl.store(lse_ptr + head * lse_stride_h + row * lse_stride_s, lse, mask=row_ok)


@triton.jit
def merge(
    slots_out, slots_lse, piece_rows, num_pieces, first_row, rows, ROWS: tl.constexpr,
    BLOCK_DV: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """Merge rows first_row + [0, ROWS) of pieces whose slots lie `piece_rows` rows apart.

    BATCH pieces at a time, so that their loads are in flight together. Returns the output
    [ROWS, BLOCK_DV] and the LSE.
    """
    r = first_row + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_DV)
    out = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    top = tl.full([ROWS], NEG_INF, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, num_pieces, BATCH):
        piece = first + tl.arange(0, BATCH)
        slot_row = (piece * piece_rows)[:, None] + r[None, :]
        ok = (piece < num_pieces)[:, None] & (r < rows)[None, :]
        # .cg: past the L1 cache, which other multiprocessors' stores do not reach.
        lse = tl.load(slots_lse + slot_row, mask=ok, other=NEG_INF, cache_modifier=".cg")
        pointers = slots_out + (slot_row * BLOCK_DV)[:, :, None] + columns[None, None, :]
        part = tl.load(pointers, mask=ok[:, :, None], other=0.0, cache_modifier=".cg")
        top_new = tl.maximum(top, tl.max(lse, 0))
        safe = tl.where(top_new == NEG_INF, 0.0, top_new)
        old = tl.exp(top - safe)
        weight = tl.exp(lse - safe[None, :])
        out = out * old[:, None] + tl.sum(part * weight[:, :, None], 0)
        total = total * old + tl.sum(weight, 0)
        top = top_new
    divisor = tl.where(total == 0.0, 1.0, total)
    safe = tl.where(top == NEG_INF, 0.0, top)
    lse = tl.where(total == 0.0, NEG_INF, safe + tl.log(divisor))
    return out / divisor[:, None], lse


# Every parameter that must not specialise: new lengths, strides and addresses reuse the variant.
RUNTIME_PARAMETERS = [
    "q_ptr", "k_ptr", "v_ptr", "out_ptr", "lse_ptr", "slots_ptr", "counters_ptr", "lengths_ptr",
    "slopes_ptr", "bias_ptr", "sinks_ptr", "q_stride_b", "q_stride_h", "q_stride_s",
    "k_stride_b", "k_stride_h", "k_stride_s", "v_stride_b", "v_stride_h", "v_stride_s",
    "out_stride_b", "out_stride_h", "out_stride_s", "lse_stride_b", "lse_stride_h",
    "lse_stride_s", "slopes_stride_b", "slopes_stride_h", "bias_stride_b", "bias_stride_h",
    "bias_stride_s", "bias_stride_k", "q_offset", "lo", "hi", "key_begin", "key_end",
    "first_keys", "batch", "num_kv_heads", "group_size", "num_rows", "seqlen_q", "seqlen_k",
    "row_blocks", "max_pieces", "target_pieces", "min_piece", "slot_rows", "group_slots",
    "num_slots",
]  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME_PARAMETERS)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, slots_ptr, counters_ptr, lengths_ptr, slopes_ptr,
    bias_ptr, sinks_ptr,
    q_stride_b: tl.int64, q_stride_h: tl.int64, q_stride_s: tl.int64, k_stride_b: tl.int64,
    k_stride_h: tl.int64, k_stride_s: tl.int64, v_stride_b: tl.int64, v_stride_h: tl.int64,
    v_stride_s: tl.int64, out_stride_b: tl.int64, out_stride_h: tl.int64,
    out_stride_s: tl.int64, lse_stride_b: tl.int64, lse_stride_h: tl.int64,
    lse_stride_s: tl.int64, slopes_stride_b: tl.int64, slopes_stride_h: tl.int64,
    bias_stride_b: tl.int64, bias_stride_h: tl.int64, bias_stride_s: tl.int64,
    bias_stride_k: tl.int64,
    q_offset: tl.int64, lo: tl.int64, hi: tl.int64, key_begin: tl.int64, key_end: tl.int64,
    first_keys: tl.int64,
    batch: tl.int32, num_kv_heads: tl.int32, group_size: tl.int32, num_rows: tl.int32,
    seqlen_q: tl.int32, seqlen_k: tl.int32, row_blocks: tl.int32, max_pieces: tl.int32,
    target_pieces: tl.int32, min_piece: tl.int32, slot_rows: tl.int32,
    group_slots: tl.int32, num_slots: tl.int32,
    scale: tl.float32, softcap: tl.float32,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    VECTOR: tl.constexpr, LENGTHS: tl.constexpr, SCALED: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, BIAS: tl.constexpr, SINKS: tl.constexpr, STORE_LSE: tl.constexpr,
    MERGE_ROWS: tl.constexpr, MERGE_BATCH: tl.constexpr, PLAN_BATCH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One piece of one KV head. Strides of q, k, v and out count VECTOR elements (16 bytes, or 1).

    num_rows is seqlen_q * group_size. max_pieces, target_pieces and group_slots (of cut sequences)
    are those of a group of PLAN_BATCH sequences, per KV head and block of rows. Programs run block
    of rows fastest, then head, then piece: what runs together reads keys that lie together.
    """
    pid = tl.program_id(0)
    row_block = pid % row_blocks
    kv_head = pid // row_blocks % num_kv_heads
    slot_stride = row_blocks * num_kv_heads
    program = pid // slot_stride
    unit = program % max_pieces
    batch_first = program // max_pieces * PLAN_BATCH
    row_first = row_block * BLOCK_Q // group_size
    row_last = (tl.minimum((row_block + 1) * BLOCK_Q, num_rows) - 1) // group_size

    # Plan the pieces of all sequences, and find this program's.
    sequence = batch_first + tl.arange(0, PLAN_BATCH)
    in_batch = sequence < batch
    if LENGTHS:
        length = tl.load(lengths_ptr + sequence, mask=in_batch, other=0).to(tl.int64)
        position = length - seqlen_q
    else:
        length = (sequence * 0 + seqlen_k).to(tl.int64)
        position = q_offset.to(tl.int64)  # the interpreter passes int32
    begin, end = visible(
        length, position, row_first, row_last, lo, hi, key_begin, key_end, seqlen_k
    )
    _, _, tiles = count_tiles(begin, end, first_keys, BLOCK_K)
    tiles = tl.where(in_batch, tiles, 0)
    piece_tiles = tl.maximum(tl.cdiv(tl.sum(tiles, 0), target_pieces), min_piece)
    # A sequence without visible keys has one piece, which writes zeros.
    pieces = tl.where(in_batch, count_pieces(tiles, piece_tiles), 0)
    passed = tl.cumsum(pieces, 0) <= unit
    local = tl.sum(passed.to(tl.int32), 0)
    if local == PLAN_BATCH:  # more programs than pieces
        return
    b = batch_first + local
    piece = unit - tl.sum(tl.where(passed, pieces, 0), 0)
    # Only cut sequences have slots.
    slot_first = tl.sum(tl.where(passed & (pieces > 1), pieces, 0), 0)

    if LENGTHS:
        length = tl.load(lengths_ptr + b).to(tl.int64)
        position = length - seqlen_q
    else:
        length = seqlen_k.to(tl.int64)
        position = q_offset.to(tl.int64)
    begin, end = visible(
        length, position, row_first, row_last, lo, hi, key_begin, key_end, seqlen_k
    )
    first_tiles, next_tile, num_tiles = count_tiles(begin, end, first_keys, BLOCK_K)
    num_pieces = count_pieces(num_tiles, piece_tiles)
    each, more = num_tiles // num_pieces, num_tiles % num_pieces
    tile_begin = piece * each + tl.minimum(piece, more)
    tile_end = tile_begin + each + (piece < more).to(tl.int32)
    key_first, key_last, first_end = begin.to(tl.int32), end.to(tl.int32), first_keys.to(tl.int32)

    # Bases; the hint lets loads and stores take 16 bytes at a time where the host checked
    # alignment.
    ALIGN: tl.constexpr = VECTOR * q_ptr.dtype.element_ty.primitive_bitwidth // 8
    k_head = tl.multiple_of(k_ptr + (b * k_stride_b + kv_head * k_stride_h) * VECTOR, ALIGN)
    v_head = tl.multiple_of(v_ptr + (b * v_stride_b + kv_head * v_stride_h) * VECTOR, ALIGN)
    q_sequence = tl.multiple_of(q_ptr + b * q_stride_b * VECTOR, ALIGN)
    out_sequence = tl.multiple_of(out_ptr + b * out_stride_b * VECTOR, ALIGN)
    k_stride = k_stride_s * VECTOR
    v_stride = v_stride_s * VECTOR

    row, head, row_ok = packed_rows(row_block * BLOCK_Q, kv_head, group_size, num_rows, BLOCK_Q)
    q_offsets = (head * q_stride_h + row * q_stride_s) * VECTOR
    q = load_rows(q_sequence, q_offsets, row_ok, HEAD_DIM, BLOCK_D, True)
    # Each row's own keys: [row_begin, row_end), and of the first keys those below row_end.
    row_begin, row_end = visible(length, position, row, row, lo, hi, key_begin, key_end, seqlen_k)
    row_begin, row_end = row_begin.to(tl.int32), row_end.to(tl.int32)
    row_position = (position + row).to(tl.int32)
    slope = 0.0
    if ALIBI:
        slope_offsets = b * slopes_stride_b + head * slopes_stride_h
        slope = tl.load(slopes_ptr + slope_offsets, mask=row_ok, other=0.0)
    bias_rows = bias_ptr
    if BIAS:
        bias_rows = bias_ptr + b * bias_stride_b + head * bias_stride_h + row * bias_stride_s

    factor = scale * LOG2E
    acc = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    m = tl.full([BLOCK_Q], NEG_INF, tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    for tile in range(tile_begin, tile_end):
        start = tl.where(tile < first_tiles, tile, tile - first_tiles + next_tile) * BLOCK_K
        keys = start + tl.arange(0, BLOCK_K)
        is_first = keys < first_end
        exists = (keys < key_last) & ((keys >= key_first) | is_first)
        key_rows = keys.to(tl.int64)
        k = load_rows(k_head, key_rows * k_stride, exists, HEAD_DIM, BLOCK_D, True)
        s = scores(
            q, k, keys, exists, row_ok, row_position, scale, softcap, slope, bias_rows,
            bias_stride_k, SCALED, SOFTCAP, ALIBI, BIAS, PRECISION,
        )  # fmt: skip
        after_begin = (keys[None, :] >= row_begin[:, None]) | is_first[None, :]
        s = tl.where((keys[None, :] < row_end[:, None]) & after_begin, s, NEG_INF)
        v = load_rows(v_head, key_rows * v_stride, exists, HEAD_DIM_V, BLOCK_DV, True)
        acc, m, row_sum = softmax_step(s, v, acc, m, row_sum, factor, SCALED, True, PRECISION)

    empty = row_sum == 0.0
    divisor = tl.where(empty, 1.0, row_sum)
    lse = tl.where(empty, NEG_INF, (m + tl.log2(divisor)) * LN2)
    out = acc / divisor[:, None]
    lse_sequence = lse_ptr
    if STORE_LSE:
        lse_sequence = lse_ptr + b * lse_stride_b
    if num_pieces == 1:
        finish(
            out, lse, row, head, row_ok, sinks_ptr, out_sequence, out_stride_h, out_stride_s,
            lse_sequence, lse_stride_h, lse_stride_s, HEAD_DIM_V, BLOCK_DV, VECTOR, SINKS,
            STORE_LSE,
        )  # fmt: skip
    else:
        r = tl.arange(0, BLOCK_Q)
        # The workspace is small (decode_config.py): its offsets fit int32.
        first_slot = program // max_pieces * group_slots + slot_first
        first_row = (first_slot * slot_stride + pid % slot_stride) * slot_rows
        slots_out = tl.multiple_of(slots_ptr + first_row * BLOCK_DV, 16)
        slots_lse = slots_ptr + num_slots * slot_rows * BLOCK_DV + first_row
        piece_rows = slot_stride * slot_rows
        slot_row = piece * piece_rows + r
        slot_out = slots_out + slot_row * BLOCK_DV
        columns = tl.arange(0, BLOCK_DV)
        tl.store(slot_out[:, None] + columns[None, :], out, mask=row_ok[:, None])
        tl.store(slots_lse + slot_row, lse, mask=row_ok)
        counter = counters_ptr + (b.to(tl.int64) * slot_stride + pid % slot_stride)
        # All threads have stored before one of them releases; the last to arrive acquires all
        # slots.
        tl.debug_barrier()
        arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if arrived == num_pieces - 1:
            rows = tl.minimum(num_rows - row_block * BLOCK_Q, BLOCK_Q)
            for first in range(0, rows, MERGE_ROWS):
                merged, merged_lse = merge(
                    slots_out, slots_lse, piece_rows, num_pieces, first, rows, MERGE_ROWS,
                    BLOCK_DV, MERGE_BATCH,
                )  # fmt: skip
                merged_row, merged_head, merged_ok = packed_rows(
                    row_block * BLOCK_Q + first, kv_head, group_size, num_rows, MERGE_ROWS
                )
                finish(
                    merged, merged_lse, merged_row, merged_head, merged_ok, sinks_ptr,
                    out_sequence, out_stride_h, out_stride_s, lse_sequence, lse_stride_h,
                    lse_stride_s, HEAD_DIM_V, BLOCK_DV, VECTOR, SINKS, STORE_LSE,
                )  # fmt: skip
            tl.store(counter, 0)
