"""Attention forward for Hopper in Gluon: any plan, a producer warp, 2 or 3 consumer warpgroups.

The shape of FlashAttention-3 (Shah et al. 2024, algorithms 1 and 2) over schedule items
(docs/formats.md). One warp issues TMA copies of the item's key and value tiles into a ring of
`NUM_STAGES` buffers; each consumer warpgroup owns 64 of the item's rows and runs, per key tile,

    S  = Q K^T                     (asynchronous; behind it the previous tile's O += P V)
    m' = max(m, rowmax(S))
    P  = exp2(S - m')
    l  = l * exp2(m - m') + rowsum(P)
    O  = O * exp2(m - m')          (once the previous P V is done)

so that the softmax of one tile runs under the matrix product of the one before. m' is m while
rowmax(S) exceeds it by less than 8, so that O is rarely rescaled. A consumer none of whose rows
keeps a key of a tile passes over it.

There are as many programs as multiprocessors; the producer takes work from a counter once it has
asked for the last tile of an item, and tells the consumers. Barriers keep their phases across
items.

Mbarriers, each with the parity its waiter expects:
    q_full[w]   TMA -> consumer w: its rows of Q are there     items & 1
    q_empty[w]  consumer w -> producer: Q may be overwritten   (items & 1) ^ 1: the first is free
    k_full[s], v_full[s]    TMA -> consumers                   (tiles // NUM_STAGES) & 1
    mail_full[b]   producer -> consumers: an item's numbers    (items // 2) & 1
    mail_empty[b]  all consumers -> producer: they have them   the same ^ 1
Named barriers: 6 + s, all consumers -> producer: keys s may be overwritten; 9 + s, values s; 12,
which nobody takes (`after`).

An item without tiles takes one of nothing, so that the phases need no exception.

Rows are read and written by TMA, whose per-head, per-residue maps (hopper_maps.py) fill and clip
the rows that do not exist; threads write the rows of a tile that other rows follow. What it does
not do: float32, bias, kv_lengths, gradients.
"""

# Triton's types are not Python's, and a constexpr `if` is decided while compiling.
# ruff: noqa: ANN001, ANN201, PLR0915
# mypy: ignore-errors
from __future__ import annotations

import triton.language as tl  # noqa: TC002 - names the parameters' types
from triton.experimental import gluon

from portattn.backends.triton.hopper_adapter import gl, mbarrier
from portattn.backends.triton.hopper_consumer import consumer
from portattn.backends.triton.hopper_primitives import (
    ROWS,
    copy_keys,
    copy_queries,
    next_stage,
    wait_empty,
)
from portattn.backends.triton.hopper_work import (
    FULL_COUNT,
    FULL_FIRST,
    FULL_STEP,
    FULL_STRIDE,
    ITEM_FIELDS,
    MAIL_FIELDS,
    NUM_ROWS,
    Q_START,
    Q_STEP,
    TILE_BEGIN,
    TILE_END,
    locate,
    send_item,
    take_work,
    tile_entry,
)


@gluon.jit
def producer(args, CONSUMERS: gl.constexpr, NUM_STAGES: gl.constexpr, STEPPED: gl.constexpr):
    """Copy every item's query rows, and its key and value tiles, as their buffers fall free."""
    (q_maps, k_maps, v_maps, buffers, q_full, q_empty, k_full, v_full, work,
     lists, group_size, mail, counters_ptr) = args  # fmt: skip
    q_shared, k_shared, v_shared = buffers
    (items_ptr, layouts_ptr, layout_stride_b, layout_stride_h, num_layouts, first_item, num_items,
     num_bh, num_heads, head_group) = work  # fmt: skip
    tiles_ptr, full_list_ptr = lists
    stage = 0
    filled = 0  # of every buffer: how often
    items_done = 0
    num_work = num_items * num_bh
    index = gl.program_id(0)
    while index < num_work:
        number, layout, batch, head = locate(
            index, layouts_ptr, layout_stride_b, layout_stride_h, num_layouts, first_item,
            num_items, num_bh, num_heads, head_group,
        )  # fmt: skip
        kv_head = head // group_size
        item = items_ptr + number * ITEM_FIELDS
        q_start = gl.load(item + Q_START)
        q_step = gl.maximum(gl.load(item + Q_STEP), 1)  # a padding item has 0
        tile_begin = gl.load(item + TILE_BEGIN)
        num_partial = gl.load(item + TILE_END) - tile_begin
        num_tiles = num_partial + gl.load(item + FULL_COUNT)
        full_first = gl.load(item + FULL_FIRST)
        full_step = gl.load(item + FULL_STEP)
        full_stride = gl.load(item + FULL_STRIDE)
        entries = (
            tiles_ptr, full_list_ptr, tile_begin, num_partial, num_tiles, full_first, full_step,
            full_stride,
        )  # fmt: skip
        send_item(
            mail, items_done,
            (number, layout, batch, head, q_start, q_step, gl.load(item + NUM_ROWS), tile_begin,
             num_partial, num_tiles, full_first, full_step, full_stride),
        )  # fmt: skip
        start, step = tile_entry(entries, 0)
        for e in range(0, gl.maximum(num_tiles, 1)):
            # One entry ahead: its load must not stand between two copies.
            next_start, next_step = tile_entry(entries, e + 1)
            if filled > 0:
                wait_empty(stage, False, CONSUMERS)
            copy_keys(
                k_maps, batch, kv_head, start, step, k_full.index(stage), k_shared.index(stage),
                STEPPED,
            )  # fmt: skip
            if e == 0:
                # After the first keys: those need not wait for the last item's epilogue.
                for w in gl.static_range(CONSUMERS):
                    mbarrier.wait(q_empty.index(w), (items_done & 1) ^ 1)
                    copy_queries(
                        q_maps, batch, head, q_start + w * ROWS * q_step, q_step,
                        q_full.index(w), q_shared.index(w), STEPPED,
                    )  # fmt: skip
            if filled > 0:
                wait_empty(stage, True, CONSUMERS)
            copy_keys(
                v_maps, batch, kv_head, start, step, v_full.index(stage), v_shared.index(stage),
                STEPPED,
            )  # fmt: skip
            stage, filled = next_stage(stage, filled, NUM_STAGES)
            start = next_start
            step = next_step
        index = num_work
        if gl.num_programs(0) < num_work:
            # Not before: what is taken early is missing where programs run out of work.
            index = take_work(counters_ptr, num_work)
        items_done += 1
    send_item(mail, items_done, (-1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0))


# Every parameter that must not specialise: new lengths, strides and addresses reuse the variant.
RUNTIME_PARAMETERS = [
    "out_ptr", "lse_ptr", "running_out_ptr", "running_lse_ptr", "slots_out_ptr", "slots_lse_ptr",
    "counters_ptr", "items_ptr", "full_list_ptr", "tiles_ptr", "bits_ptr", "ranges_ptr",
    "layouts_ptr", "layout_ids_ptr", "q_ids_ptr", "k_ids_ptr", "slopes_ptr", "sinks_ptr",
    "q_residues", "k_residues", "lse_stride_b", "lse_stride_h", "lse_stride_s", "slopes_stride_b",
    "slopes_stride_h", "layout_stride_b", "layout_stride_h", "num_layouts", "first_item",
    "num_items", "num_bh", "num_heads", "group_size", "head_group", "seqlen_q", "seqlen_k",
    "q_offset", "num_slots", "num_counters",
]  # fmt: skip


@gluon.jit(do_not_specialize=RUNTIME_PARAMETERS)
def hopper_forward(
    q_desc, q_short, k_desc, k_long, k_short, v_desc, v_long, v_short, out_desc, out_short,
    out_ptr, lse_ptr, running_out_ptr, running_lse_ptr, slots_out_ptr, slots_lse_ptr, counters_ptr,
    items_ptr, full_list_ptr, tiles_ptr, bits_ptr, ranges_ptr, layouts_ptr, layout_ids_ptr,
    q_ids_ptr, k_ids_ptr, slopes_ptr, sinks_ptr,
    lse_stride_b: tl.int64, lse_stride_h: tl.int64, lse_stride_s: tl.int64,
    slopes_stride_b: tl.int64, slopes_stride_h: tl.int64,
    layout_stride_b: tl.int32, layout_stride_h: tl.int32, num_layouts: tl.int32,
    first_item: tl.int32, num_items: tl.int32, num_bh: tl.int32, num_heads: tl.int32,
    group_size: tl.int32, head_group: tl.int32, seqlen_q: tl.int32, seqlen_k: tl.int32,
    q_offset: tl.int32, num_slots: tl.int32, num_counters: tl.int32, q_residues: tl.int32,
    k_residues: tl.int32,
    scale: tl.float32, softcap: tl.float32,
    BLOCK_Q: gl.constexpr, NUM_STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    OUT_IN_QUERY: gl.constexpr, STEPPED: gl.constexpr,
    IDS: gl.constexpr, PIECES: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr,
    SCALED: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr, SINKS: gl.constexpr,
    STORE_LSE: gl.constexpr, SHORT_WIDTH: gl.constexpr,
):  # fmt: skip
    """Maps are [batch, heads, residues, rows, width]; *_residues count those of the long map."""
    DTYPE: gl.constexpr = q_desc.dtype
    CONSUMERS: gl.constexpr = BLOCK_Q // ROWS
    # The launch has 168 registers a thread for 12 warps, or 128 for 16.
    PRODUCER_REGISTERS: gl.constexpr = (
        504 - 2 * REGISTERS if CONSUMERS == 2 else 512 - 3 * REGISTERS
    )
    BLOCK_K: gl.constexpr = k_desc.block_shape[3]
    BLOCK_D: gl.constexpr = k_desc.block_shape[4]
    BLOCK_DV: gl.constexpr = v_desc.block_shape[4]
    ROW_MAJOR: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_shared = gl.allocate_shared_memory(DTYPE, [CONSUMERS, ROWS, BLOCK_D], ROW_MAJOR)
    k_shared = gl.allocate_shared_memory(DTYPE, [NUM_STAGES, BLOCK_K, BLOCK_D], ROW_MAJOR)
    v_shared = gl.allocate_shared_memory(DTYPE, [NUM_STAGES, BLOCK_K, BLOCK_DV], ROW_MAJOR)
    if OUT_IN_QUERY:
        out_shared = q_shared
    else:
        out_shared = gl.allocate_shared_memory(DTYPE, [CONSUMERS, ROWS, BLOCK_DV], ROW_MAJOR)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], BARRIER)
    boxes = gl.allocate_shared_memory(
        gl.int32, [2 * MAIL_FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    mail_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mail_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mail = (boxes, mail_full, mail_empty)
    for box in gl.static_range(2):
        mbarrier.init(mail_full.index(box), count=1)
        mbarrier.init(mail_empty.index(box), count=CONSUMERS)
    for w in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(w), count=1)
        mbarrier.init(q_empty.index(w), count=1)
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)

    work = (
        items_ptr, layouts_ptr, layout_stride_b, layout_stride_h, num_layouts, first_item,
        num_items, num_bh, num_heads, head_group,
    )  # fmt: skip
    rings = (k_shared, v_shared, k_full, v_full)
    score_args = (
        q_offset, scale, softcap, slopes_ptr, slopes_stride_b, slopes_stride_h, sinks_ptr
    )  # fmt: skip
    out_maps = (out_desc, out_short, q_residues, out_ptr)
    out_args = (
        out_maps, lse_ptr, lse_stride_b, lse_stride_h, lse_stride_s, running_out_ptr,
        running_lse_ptr,
    )  # fmt: skip
    pieces = (slots_out_ptr, slots_lse_ptr, counters_ptr, num_slots, num_counters)
    ids = (layout_ids_ptr, q_ids_ptr, k_ids_ptr)
    lists = (tiles_ptr, full_list_ptr, bits_ptr, ranges_ptr)
    consumer_args = (
        q_shared, out_shared, q_full, q_empty, rings, (items_ptr, num_heads), lists, ids,
        score_args, out_args, pieces, seqlen_q, seqlen_k, mail,
    )  # fmt: skip
    producer_args = (
        (q_desc, q_short, q_residues), (k_desc, k_long, k_short, k_residues),
        (v_desc, v_long, v_short, k_residues), (q_shared, k_shared, v_shared), q_full, q_empty,
        k_full, v_full, work, (tiles_ptr, full_list_ptr), group_size,
        mail, counters_ptr,
    )  # fmt: skip
    FLAGS: gl.constexpr = (
        BLOCK_Q, NUM_STAGES, OUT_IN_QUERY, STEPPED, IDS, PIECES, FIRST, LAST, SCALED,
        SOFTCAP, ALIBI, SINKS, STORE_LSE, SHORT_WIDTH,
    )  # fmt: skip
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consumer, (0, consumer_args, FLAGS)),
                (consumer, (1, consumer_args, FLAGS)),
                (producer, (producer_args, CONSUMERS, NUM_STAGES, STEPPED)),
            ],
            [4, 1],
            [REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (0, consumer_args, FLAGS)),
                (consumer, (1, consumer_args, FLAGS)),
                (consumer, (2, consumer_args, FLAGS)),
                (producer, (producer_args, CONSUMERS, NUM_STAGES, STEPPED)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )
