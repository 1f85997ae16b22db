"""Small device functions of the plain Triton backward; all of them are inlined."""

# Triton's types are not Python's, and a constexpr `if` is decided while compiling.
# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from portattn.backends.triton.forward_kernel import COUNTER, NUM_PIECES, SLOT, SLOT_FIRST
from portattn.backends.triton.primitives import LOG2E, NEG_INF, tanh

# Parameters of both main kernels, in order: none specialises.
POINTERS = [
    "q_ptr", "k_ptr", "v_ptr", "do_ptr", "stats_ptr", "slopes_ptr", "bias_ptr", "sums_ptr",
    "running_ptr", "slots_ptr", "counters_ptr", "items_ptr", "full_list_ptr", "tiles_ptr",
    "bits_ptr", "layouts_ptr", "layout_ids_ptr", "q_ids_ptr", "k_ids_ptr",
]  # fmt: skip
STRIDES = [
    "q_stride_b", "q_stride_h", "q_stride_s", "k_stride_b", "k_stride_h", "k_stride_s",
    "v_stride_b", "v_stride_h", "v_stride_s", "do_stride_b", "do_stride_h", "do_stride_s",
]  # fmt: skip
OTHERS = [
    "slopes_stride_b", "slopes_stride_h", "bias_stride_b", "bias_stride_h", "bias_stride_s",
    "bias_stride_k", "layout_stride_b", "layout_stride_h", "num_layouts", "first_item",
    "num_items", "num_bh", "num_heads", "group_size", "head_group", "seqlen_q", "seqlen_k",
    "q_offset", "num_slots", "num_counters", "first", "count", "first_batch",
]  # fmt: skip


@triton.jit
def load_stats(stats, seqlen_q, rows, row_ok):
    """(LSE in log2 units, delta) of rows; those that do not exist have P = 0."""
    lse = tl.load(stats + rows, mask=row_ok, other=-NEG_INF)
    delta = tl.load(stats + seqlen_q + rows, mask=row_ok, other=0.0)
    return lse, delta


@triton.jit
def load_columns(bits_ptr, index, BLOCK_Q: tl.constexpr, WORDS: tl.constexpr):
    """One bit tile as int32 [WORDS, BLOCK_Q]; index -1 keeps all, -2 nothing."""
    offsets = tl.arange(0, WORDS)[:, None] + tl.arange(0, BLOCK_Q)[None, :] * WORDS
    pointers = bits_ptr + index.to(tl.int64) * (BLOCK_Q * WORDS) + offsets
    # A tensor compared, as in primitives.load_words.
    words = tl.load(pointers, mask=index + offsets * 0 >= 0, other=0)
    return words | tl.where(index == -1, -1, 0)


@triton.jit
def expand_columns(words, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Int32 [BLOCK_K / 32, BLOCK_Q] -> bool [BLOCK_K, BLOCK_Q]; key c is bit c % 32."""
    bits = ((words[:, None, :] >> tl.arange(0, 32)[None, :, None]) & 1) != 0
    return tl.reshape(bits, (BLOCK_K, BLOCK_Q))


@triton.jit
def gradient_of_scores(
    x, dp, lse, delta, rows, keys, keep, pairs, q_offset, scale, softcap, slope, bias_ptr,
    bias_stride_s, bias_stride_k, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """(P, dY, dX / scale) of products x = q k; lse, delta, rows and keys broadcast against x.

    keep: of pairs, read if MASKED; pairs: which exist.
    """
    cap = 0.0
    if SOFTCAP or ALIBI or BIAS:
        y = x * scale
        if SOFTCAP:
            cap = tanh(y / softcap)
            y = softcap * cap
        if ALIBI:
            distance = tl.abs((rows + q_offset) - keys)
            y = y - slope * distance.to(tl.float32)
        if BIAS:
            offsets = rows.to(tl.int64) * bias_stride_s + keys.to(tl.int64) * bias_stride_k
            y = y + tl.load(bias_ptr + offsets, mask=pairs, other=0.0).to(tl.float32)
        y = y * LOG2E
    else:
        y = x * (scale * LOG2E)
    if MASKED:
        y = tl.where(keep, y, NEG_INF)
    p = tl.exp2(y - lse)
    dy = p * (dp - delta)
    dx = dy
    if SOFTCAP:
        dx = dy * (1.0 - cap * cap)
    return p, dy, dx


@triton.jit
def merge_pieces(
    first, second, sums, item, bh, slots_ptr, counters_ptr, num_slots, num_counters,
    SECOND: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Leave a piece's sums in its slot; the last piece to arrive adds all of them in slot order.

    A slot is float32: `first`, then `second` of width SECOND (0: no such), then the vector `sums`.

    Returns:
        The three sums, and whether this piece was the last.
    """
    ROWS: tl.constexpr = first.shape[0]
    WIDTH: tl.constexpr = first.shape[1]
    SIZE: tl.constexpr = ROWS * (WIDTH + SECOND + 1)
    r = tl.arange(0, ROWS)
    in_first = r[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    base = bh.to(tl.int64) * num_slots
    slot = tl.multiple_of(slots_ptr + (base + tl.load(item + SLOT)) * SIZE, 4)
    tl.store(slot + in_first, first)
    if SECOND > 0:
        in_second = ROWS * WIDTH + r[:, None] * SECOND + tl.arange(0, SECOND)[None, :]
        tl.store(slot + in_second, second)
    if SUMS:
        tl.store(slot + ROWS * (WIDTH + SECOND) + r, sums)
    counter = counters_ptr + bh.to(tl.int64) * num_counters + tl.load(item + COUNTER)
    # All threads have stored before one of them releases; the last acquires all slots.
    tl.debug_barrier()
    num_pieces = tl.load(item + NUM_PIECES)
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    is_last = arrived == num_pieces - 1
    if is_last:
        first = tl.zeros([ROWS, WIDTH], tl.float32)
        sums = tl.zeros([ROWS], tl.float32)
        if SECOND > 0:
            second = tl.zeros([ROWS, SECOND], tl.float32)
        slot = slots_ptr + (base + tl.load(item + SLOT_FIRST)) * SIZE
        for _ in range(0, num_pieces):
            slot = tl.multiple_of(slot, 4)
            # .cg: past the L1 cache, which other multiprocessors' stores do not reach.
            first += tl.load(slot + in_first, cache_modifier=".cg")
            if SECOND > 0:
                second += tl.load(slot + in_second, cache_modifier=".cg")
            if SUMS:
                sums += tl.load(slot + ROWS * (WIDTH + SECOND) + r, cache_modifier=".cg")
            slot += SIZE
        tl.store(counter, 0)
    return first, second, sums, is_last


@triton.jit
def store_matrix(
    sums, ptr, rows, row_ok, stride, running_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Continue the running sum of earlier launches, store it, or the result after the last."""
    columns = tl.arange(0, BLOCK)
    wide = rows.to(tl.int64)
    if not (FIRST and LAST):
        running = running_ptr + (wide * BLOCK)[:, None] + columns[None, :]
        if not FIRST:
            sums += tl.load(running, mask=row_ok[:, None], other=0.0)
        if not LAST:
            tl.store(running, sums, mask=row_ok[:, None])
    if LAST:
        mask = row_ok[:, None]
        if WIDTH != BLOCK:
            mask = mask & (columns < WIDTH)[None, :]
        pointers = ptr + (wide * stride)[:, None] + columns[None, :]
        tl.store(pointers, sums.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_vector(ptr, sums, rows, row_ok):
    """Add one number per row to float32 memory that no other program of the launch touches."""
    earlier = tl.load(ptr + rows, mask=row_ok, other=0.0)
    tl.store(ptr + rows, earlier + sums, mask=row_ok)
