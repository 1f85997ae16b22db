"""Gradients for Hopper in Gluon: dK, dV and dQ at once, a producer warp, 2 consumer warpgroups.

One program per item of the transposed plan's schedule (docs/formats.md): 128 keys, of which each
consumer owns 64, against a list of query tiles. The shape is that of FlashAttention-3's backward
(Shah et al. 2024, algorithm 3); per query tile j a consumer runs

    S^T  = K Q_j^T - LSE / factor        beside it, of the tile before:
                                         dK += dX^T Q,  dQ = dX K  (of all 128 keys; a half each)
    P^T  = exp2(factor S^T)              (while those two products run)
    dQ   to shared memory, from where TMA adds it to float32 memory
    dP^T = V dO_j^T - delta,  dV += P^T dO_j
    dX^T = P^T * dP^T                    (while dV's product runs); to shared memory

so that both pieces of scalar work run under matrix products. The first tile has a tile of nothing
before it, and so has an item without tiles.

Mbarriers: full[s], TMA and the producer's own stores -> consumers: Q, dO, LSE and delta of a tile
are in buffer s; its phase is the number of times that the buffer was filled before. Named
barriers: 6 + s, consumers -> producer: buffer s may be overwritten; 9 + 2 b + w, consumer 1 - w to
w: its half of dX is in buffer b. Who writes that buffer again has seen the other finish with it.

dQ is summed over the items in the order of their arrival: results may differ in their last bits.
So are dK and dV in `ACCUMULATE`, where items share keys (columns cut into pieces, plans of several
passes).
"""

# Triton's types are not Python's, and a constexpr `if` is decided while compiling.
# ruff: noqa: ANN001, ANN201, PLR0915
# mypy: ignore-errors
from __future__ import annotations

import triton.language as tl  # noqa: TC002 - names the parameters' types
from triton.experimental import gluon

from portattn.backends.triton.hopper_adapter import (
    barrier,
    copy_out_wait,
    fence_async_shared,
    gl,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from portattn.backends.triton.hopper_backward_primitives import (
    add_queries,
    arrive_other,
    column_words,
    expand_columns,
    hold,
    store_rows,
    sum_rows,
    wait_other,
)
from portattn.backends.triton.hopper_primitives import (
    LOG2E,
    NEG_INF,
    ROWS,
    copy_keys,
    copy_queries,
    leave,
    next_stage,
    wait_empty,
)
from portattn.backends.triton.hopper_work import (
    FULL_COUNT,
    FULL_FIRST,
    FULL_STEP,
    FULL_STRIDE,
    ITEM_FIELDS,
    NUM_ROWS,
    Q_START,
    Q_STEP,
    TILE_BEGIN,
    TILE_END,
    locate,
    tile_entry,
)


@gluon.jit
def read_item(item):
    """(k_start, k_step, num_keys, partial tiles, all tiles, first partial, full tiles' form)."""
    tile_begin = gl.load(item + TILE_BEGIN)
    num_partial = gl.load(item + TILE_END) - tile_begin
    return (
        gl.load(item + Q_START), gl.maximum(gl.load(item + Q_STEP), 1), gl.load(item + NUM_ROWS),
        tile_begin, num_partial, num_partial + gl.load(item + FULL_COUNT),
        gl.load(item + FULL_FIRST), gl.load(item + FULL_STEP), gl.load(item + FULL_STRIDE),
    )  # fmt: skip


@gluon.jit
def producer(args, NUM_STAGES: gl.constexpr, STEPPED: gl.constexpr):
    """Copy the item's keys and values, then its query tiles, as their buffers fall free."""
    (maps, shared, full, kv_full, lists, place, sizes, stats_ptr, factor) = args
    q_maps, do_maps, k_maps, v_maps = maps
    q_shared, do_shared, stats_shared, k_shared, v_shared = shared
    item, batch, kv_head, first_head, count = place
    num_heads, seqlen_q = sizes
    tiles_ptr, full_list_ptr, _ = lists
    (k_start, k_step, _, tile_begin, num_partial, num_tiles, full_first, full_step,
     full_stride) = read_item(item)  # fmt: skip
    entries = (
        tiles_ptr, full_list_ptr, tile_begin, num_partial, num_tiles, full_first, full_step,
        full_stride,
    )  # fmt: skip
    copy_queries(k_maps, batch, kv_head, k_start, k_step, kv_full.index(0), k_shared, STEPPED)
    copy_queries(v_maps, batch, kv_head, k_start, k_step, kv_full.index(1), v_shared, STEPPED)
    LANES: gl.constexpr = gl.BlockedLayout([ROWS // 32], [32], [1], [0])
    r = gl.arange(0, ROWS, LANES)
    stage = 0
    filled = 0  # of every buffer: how often
    for g in range(0, count):
        head = first_head + g
        stats = stats_ptr + (batch * num_heads + head).to(gl.int64) * 2 * seqlen_q
        start, step = tile_entry(entries, 0)
        for e in range(0, gl.maximum(num_tiles, 1)):
            # One entry ahead: its load must not stand between two copies.
            next_start, next_step = tile_entry(entries, e + 1)
            if filled > 0:
                wait_empty(stage, False, 2)
            ready = full.index(stage)
            copy_keys(q_maps, batch, head, start, step, ready, q_shared.index(stage), STEPPED)
            copy_keys(do_maps, batch, head, start, step, ready, do_shared.index(stage), STEPPED)
            # Compared as counts: start + r * step may wrap around for rows that do not exist.
            exists = r < (seqlen_q - start - 1) // step + 1
            rows = start + r * step
            lse = gl.load(stats + rows, mask=exists, other=-NEG_INF)
            delta = gl.load(stats + seqlen_q + rows, mask=exists, other=0.0)
            stats_shared.index(stage * 2).store(-lse / factor)
            stats_shared.index(stage * 2 + 1).store(-delta)
            mbarrier.arrive(ready)
            stage, filled = next_stage(stage, filled, NUM_STAGES)
            start = next_start
            step = next_step


@gluon.jit
def gradient_products(W: gl.constexpr, dk, before, dx_stage, buffers, LAYOUTS: gl.constexpr):
    """Issue dK += dX^T Q and dQ = dX K of the tile before, whose Q is in buffer `before`."""
    DQ: gl.constexpr = LAYOUTS[2]
    q_shared, _, _, k_shared, _, dx_shared = buffers
    HALF: gl.constexpr = LAYOUTS[3]
    wait_other(W, dx_stage)
    dx = dx_shared.index(dx_stage)
    dk = warpgroup_mma(dx.slice(W * ROWS, ROWS, 0), q_shared.index(before), dk, is_async=True)
    zeros = gl.zeros([ROWS, HALF], gl.float32, DQ)
    dq = warpgroup_mma(
        dx.permute((1, 0)), k_shared.slice(W * HALF, HALF, 1), zeros, use_acc=False, is_async=True
    )
    return dk, dq


@gluon.jit
def tile_step(
    W: gl.constexpr, state, tile, mask_args, terms, full, buffers, dq_args, MASKED: gl.constexpr,
    IDS: gl.constexpr, STEPPED: gl.constexpr, LAYOUTS: gl.constexpr,
):  # fmt: skip
    """One query tile; dK and dQ are those of the tile before."""
    SCORES: gl.constexpr = LAYOUTS[0]
    PAIRS: gl.constexpr = LAYOUTS[1]
    HALF: gl.constexpr = LAYOUTS[3]
    dk, dv = state
    stage, filled, before, done, batch, head_before, start_before, step_before = tile
    dx_stage = done & 1
    dq_maps, dq_shared = dq_args
    factor, seqlen_q = terms
    q_shared, do_shared, stats_shared, k_shared, v_shared, dx_shared = buffers
    DTYPE: gl.constexpr = q_shared.dtype
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    bits_ptr, index, other, k_id, q_ids_ptr, start, step = mask_args
    words = index
    words_other = index
    q_id = k_id
    if MASKED:
        words = column_words(bits_ptr, index, W, SCORES)
    if MASKED and IDS:
        words_other = column_words(bits_ptr, other, W, SCORES)
        r = gl.arange(0, ROWS, COLUMN)
        exists = r < (seqlen_q - start - 1) // step + 1
        q_id = gl.load(q_ids_ptr + (start + r * step), mask=exists, other=-1)
    mbarrier.wait(full.index(stage), filled & 1)
    minus_lse = stats_shared.index(stage * 2).load(COLUMN)[None, :].broadcast_to([ROWS, ROWS])
    s = warpgroup_mma(
        k_shared.slice(W * ROWS, ROWS, 0), q_shared.index(stage).permute((1, 0)), minus_lse,
        is_async=True,
    )  # fmt: skip
    dk, dq = gradient_products(W, dk, before, dx_stage ^ 1, buffers, LAYOUTS)
    s = warpgroup_mma_wait(2, deps=(s,))
    s = s * factor
    if MASKED:
        own = expand_columns(words, SCORES)
        if IDS:
            same = (k_id[:, None] == q_id[None, :]) & (q_id >= 0)[None, :]
            own = gl.where(same, own, expand_columns(words_other, SCORES))
        s = gl.where(own != 0, s, NEG_INF)
    p = gl.exp2(s)
    p = hold(p)
    dk, dq = warpgroup_mma_wait(0, deps=(dk, dq))
    if done > 0:
        leave(before, False, 2)
    # The tile before's has left the buffer, by the thread that sent it.
    copy_out_wait(0)
    barrier()
    dq_shared.index(W).store(dq)
    minus_delta = stats_shared.index(stage * 2 + 1).load(COLUMN)[None, :]
    dp = warpgroup_mma(
        v_shared.slice(W * ROWS, ROWS, 0), do_shared.index(stage).permute((1, 0)),
        minus_delta.broadcast_to([ROWS, ROWS]), is_async=True,
    )  # fmt: skip
    pairs = gl.convert_layout(p.to(DTYPE), PAIRS)
    dv = warpgroup_mma(pairs, do_shared.index(stage), dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    dx = (p * dp).to(DTYPE)
    dx_shared.index(dx_stage).slice(W * ROWS, ROWS, 0).store(dx)
    fence_async_shared()
    arrive_other(W, dx_stage)
    add_queries(
        dq_maps, batch, head_before, start_before, step_before, W * HALF, dq_shared.index(W),
        STEPPED,
    )  # fmt: skip
    dv, pairs = warpgroup_mma_wait(0, deps=(dv, pairs))
    return dk, dv


@gluon.jit
def consumer(W: gl.constexpr, args, FLAGS: gl.constexpr):
    """DK and dV of the item's keys W * ROWS to W * ROWS + ROWS - 1, and a half of dQ."""
    NUM_STAGES: gl.constexpr = FLAGS[0]
    ACCUMULATE: gl.constexpr = FLAGS[1]
    IDS: gl.constexpr = FLAGS[2]
    STEPPED: gl.constexpr = FLAGS[3]
    buffers, full, kv_full, lists, place, sizes, terms, outputs, ids = args
    layout, layout_ids_ptr, q_ids_ptr, k_ids_ptr = ids
    q_shared, _, _, _, _, dx_shared = buffers
    item, batch, kv_head, first_head, count = place
    num_heads, seqlen_q, seqlen_k = sizes
    tiles_ptr, full_list_ptr, bits_ptr = lists
    dq_args, dk_ptr, dv_ptr, dk_strides, dv_strides, head_dim, head_dim_v, scale = outputs
    dq_maps, dq_shared = dq_args
    WIDTH: gl.constexpr = q_shared.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16]
    )
    OUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16]
    )
    HALF: gl.constexpr = WIDTH // 2  # of dQ's columns
    DQ: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16]
    )
    PAIRS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    LAYOUTS: gl.constexpr = (SCORES, PAIRS, DQ, HALF)
    (k_start, k_step, num_keys, tile_begin, num_partial, num_tiles, full_first, full_step,
     full_stride) = read_item(item)  # fmt: skip
    entries = (
        tiles_ptr, full_list_ptr, tile_begin, num_partial, num_tiles, full_first, full_step,
        full_stride,
    )  # fmt: skip
    dk = gl.zeros([ROWS, WIDTH], gl.float32, OUT)
    dv = gl.zeros([ROWS, WIDTH], gl.float32, OUT)
    k_id = gl.zeros([ROWS], gl.int32, gl.SliceLayout(1, SCORES))
    q_ids_head = bits_ptr  # of the right type; read only if IDS
    if IDS:
        # A layout without ids has only ordinary tiles; what it reads here changes nothing.
        id_row = gl.maximum(gl.load(layout_ids_ptr + layout), 0).to(gl.int64)
        c = W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        k_ids_head = k_ids_ptr + id_row * seqlen_k
        k_id = gl.load(k_ids_head + (k_start + c * k_step), mask=c < num_keys, other=-2)
        q_ids_head = q_ids_ptr + id_row * seqlen_q
    # The tile of nothing before the first.
    nothing = gl.zeros([ROWS, ROWS], q_shared.dtype, SCORES)
    dx_shared.index(1).slice(W * ROWS, ROWS, 0).store(nothing)
    fence_async_shared()
    arrive_other(W, 1)
    stage = 0
    filled = 0
    before = 0
    done = 0
    start_before = 0
    step_before = 1
    head_before = first_head
    step_terms = (terms, seqlen_q)
    mbarrier.wait(kv_full.index(0), 0)
    mbarrier.wait(kv_full.index(1), 0)
    for g in range(0, count):
        head = first_head + g
        # Bit tile numbers are read one entry ahead: two loads in a row would delay the product.
        # An item without tiles has one of nothing (-2).
        tile = tiles_ptr + tile_begin * 4
        index = gl.load(tile + 2, mask=num_partial > 0, other=-2)
        other = index
        if IDS:
            other = gl.load(tile + 3, mask=num_partial > 0, other=-2)
        num_masked = gl.where(num_tiles > 0, num_partial, 1)
        for e in range(0, num_masked):
            start, step = tile_entry(entries, e)
            next_index = gl.load(tile + e * 4 + 6, mask=e + 1 < num_partial, other=-2)
            next_other = next_index
            if IDS:
                next_other = gl.load(tile + e * 4 + 7, mask=e + 1 < num_partial, other=-2)
            dk, dv = tile_step(
                W, (dk, dv),
                (stage, filled, before, done, batch, head_before, start_before, step_before),
                (bits_ptr, index, other, k_id, q_ids_head, start, step), step_terms, full, buffers,
                dq_args, True, IDS, STEPPED, LAYOUTS,
            )  # fmt: skip
            index = next_index
            other = next_other
            before, start_before, step_before, head_before = stage, start, step, head
            stage, filled = next_stage(stage, filled, NUM_STAGES)
            done += 1
        for e in range(num_partial, num_tiles):
            start, step = tile_entry(entries, e)
            dk, dv = tile_step(
                W, (dk, dv),
                (stage, filled, before, done, batch, head_before, start_before, step_before),
                (bits_ptr, index, other, k_id, q_ids_head, start, step), step_terms, full, buffers,
                dq_args, False, IDS, STEPPED, LAYOUTS,
            )  # fmt: skip
            before, start_before, step_before, head_before = stage, start, step, head
            stage, filled = next_stage(stage, filled, NUM_STAGES)
            done += 1
    dk, dq = gradient_products(W, dk, before, (done & 1) ^ 1, buffers, LAYOUTS)
    dk, dq = warpgroup_mma_wait(0, deps=(dk, dq))
    copy_out_wait(0)
    barrier()
    dq_shared.index(W).store(dq)
    fence_async_shared()
    barrier()
    add_queries(
        dq_maps, batch, head_before, start_before, step_before, W * HALF, dq_shared.index(W),
        STEPPED,
    )  # fmt: skip
    own_keys = num_keys - W * ROWS
    first_key = k_start + W * ROWS * k_step
    if ACCUMULATE:
        kv_base = (batch * (num_heads // gl.maximum(count, 1)) + kv_head).to(gl.int64)
        kv_size = seqlen_k.to(gl.int64) * WIDTH
        sum_rows(dk, dk_ptr + kv_base * kv_size, first_key, k_step, seqlen_k, WIDTH)
        sum_rows(dv, dv_ptr + kv_base * kv_size, first_key, k_step, seqlen_k, WIDTH)
    else:
        store_rows(
            dk * scale, dk_ptr + batch * dk_strides[0] + kv_head * dk_strides[1], first_key,
            k_step, own_keys, dk_strides[2], head_dim,
        )  # fmt: skip
        store_rows(
            dv, dv_ptr + batch * dv_strides[0] + kv_head * dv_strides[1], first_key, k_step,
            own_keys, dv_strides[2], head_dim_v,
        )  # fmt: skip
    # Shared memory must outlive the copies that read it.
    copy_out_wait(0)


LAUNCH_REGISTERS = 168  # of a thread, for 12 warps
# Descriptors, and the tensors that they are of; the first parameters.
MAPS = {
    "q_desc": "query", "q_long": "query", "q_short": "query", "do_desc": "seed",
    "do_long": "seed", "do_short": "seed", "k_desc": "key", "k_short": "key", "v_desc": "value",
    "v_short": "value", "dq_desc": "dq_sums", "dq_long": "dq_sums", "dq_short": "dq_sums",
}  # fmt: skip
# Every parameter that must not specialise: new lengths, strides and addresses reuse the variant.
RUNTIME_PARAMETERS = [
    "stats_ptr", "dk_ptr", "dv_ptr", "items_ptr", "full_list_ptr", "tiles_ptr",
    "bits_ptr", "layouts_ptr", "layout_ids_ptr", "q_ids_ptr", "k_ids_ptr", "dk_stride_b",
    "dk_stride_h", "dk_stride_s", "dv_stride_b", "dv_stride_h", "dv_stride_s",
    "layout_stride_b", "layout_stride_h", "num_layouts",
    "first_item", "num_items", "num_bh", "num_heads", "group_size", "head_group", "seqlen_q",
    "seqlen_k", "q_residues", "k_residues", "head_dim", "head_dim_v",
]  # fmt: skip


@gluon.jit(do_not_specialize=RUNTIME_PARAMETERS)
def hopper_backward(
    q_desc, q_long, q_short, do_desc, do_long, do_short, k_desc, k_short, v_desc, v_short,
    dq_desc, dq_long, dq_short, stats_ptr, dk_ptr, dv_ptr, items_ptr, full_list_ptr, tiles_ptr,
    bits_ptr, layouts_ptr, layout_ids_ptr, q_ids_ptr, k_ids_ptr,
    dk_stride_b: tl.int64, dk_stride_h: tl.int64, dk_stride_s: tl.int64, dv_stride_b: tl.int64,
    dv_stride_h: tl.int64, dv_stride_s: tl.int64, layout_stride_b: tl.int32,
    layout_stride_h: tl.int32, num_layouts: tl.int32, first_item: tl.int32, num_items: tl.int32,
    num_bh: tl.int32, num_heads: tl.int32, group_size: tl.int32, head_group: tl.int32,
    seqlen_q: tl.int32, seqlen_k: tl.int32, q_residues: tl.int32, k_residues: tl.int32,
    head_dim: tl.int32, head_dim_v: tl.int32, scale: tl.float32,
    NUM_STAGES: gl.constexpr, REGISTERS: gl.constexpr, STEPPED: gl.constexpr,
    IDS: gl.constexpr, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """Maps are [batch, heads, residues, rows, width]; *_residues count those of the long map.

    dQ, and in ACCUMULATE dK and dV, are float32 [batch, heads, rows, WIDTH], zero before.
    """
    DTYPE: gl.constexpr = q_desc.dtype
    BLOCK_K: gl.constexpr = k_desc.block_shape[3]
    WIDTH: gl.constexpr = q_desc.block_shape[4]
    ROW_MAJOR: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_shared = gl.allocate_shared_memory(DTYPE, [NUM_STAGES, ROWS, WIDTH], ROW_MAJOR)
    do_shared = gl.allocate_shared_memory(DTYPE, [NUM_STAGES, ROWS, WIDTH], ROW_MAJOR)
    k_shared = gl.allocate_shared_memory(DTYPE, [BLOCK_K, WIDTH], ROW_MAJOR)
    v_shared = gl.allocate_shared_memory(DTYPE, [BLOCK_K, WIDTH], ROW_MAJOR)
    dx_shared = gl.allocate_shared_memory(DTYPE, [2, BLOCK_K, ROWS], ROW_MAJOR)
    HALF: gl.constexpr = WIDTH // 2
    dq_shared = gl.allocate_shared_memory(
        gl.float32, [2, ROWS, HALF], gl.NVMMASharedLayout(128, 32, rank=2)
    )
    stats_shared = gl.allocate_shared_memory(gl.float32, [2 * NUM_STAGES, ROWS], PLAIN)
    full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], BARRIER)
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for stage in gl.static_range(NUM_STAGES):
        # Both copies' expectations and the producer's own stores.
        mbarrier.init(full.index(stage), count=3)
    for which in gl.static_range(2):
        mbarrier.init(kv_full.index(which), count=1)
    number, layout, batch, kv_head = locate(
        gl.program_id(0), layouts_ptr, layout_stride_b, layout_stride_h, num_layouts, first_item,
        num_items, num_bh, num_heads // group_size, head_group,
    )  # fmt: skip
    place = (items_ptr + number * ITEM_FIELDS, batch, kv_head, kv_head * group_size, group_size)
    maps = (
        (q_desc, q_long, q_short, q_residues), (do_desc, do_long, do_short, q_residues),
        (k_desc, k_short, k_residues), (v_desc, v_short, k_residues),
    )  # fmt: skip
    lists = (tiles_ptr, full_list_ptr, bits_ptr)
    # Scores start from -LSE / factor; a scale of 0 is one so small that P does not show it.
    factor = gl.where(scale == 0.0, 1e-6, scale) * LOG2E
    producer_args = (
        maps, (q_shared, do_shared, stats_shared, k_shared, v_shared), full, kv_full, lists,
        place, (num_heads, seqlen_q), stats_ptr, factor,
    )  # fmt: skip
    outputs = (
        ((dq_desc, dq_long, dq_short, q_residues), dq_shared), dk_ptr, dv_ptr,
        (dk_stride_b, dk_stride_h, dk_stride_s),
        (dv_stride_b, dv_stride_h, dv_stride_s), head_dim, head_dim_v, scale,
    )  # fmt: skip
    consumer_args = (
        (q_shared, do_shared, stats_shared, k_shared, v_shared, dx_shared), full, kv_full, lists,
        place, (num_heads, seqlen_q, seqlen_k), factor, outputs,
        (layout, layout_ids_ptr, q_ids_ptr, k_ids_ptr),
    )  # fmt: skip
    FLAGS: gl.constexpr = (NUM_STAGES, ACCUMULATE, IDS, STEPPED)
    gl.warp_specialize(
        [
            (consumer, (0, consumer_args, FLAGS)),
            (consumer, (1, consumer_args, FLAGS)),
            (producer, (producer_args, NUM_STAGES, STEPPED)),
        ],
        [4, 1],
        [REGISTERS, 504 - 2 * REGISTERS],
    )
