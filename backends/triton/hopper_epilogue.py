"""How an item of the Hopper forward ends: pieces, passes, sinks, stores."""

# Triton's types are not Python's, and a constexpr `if` is decided while compiling.
# ruff: noqa: ANN001, ANN201, PLR0915
# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon

from portattn.backends.triton.hopper_adapter import barrier, copy_out, fence_async_shared, gl
from portattn.backends.triton.hopper_primitives import (
    NEG_INF,
    ROWS,
    merge_end,
    merge_step,
)
from portattn.backends.triton.hopper_work import (
    COUNTER,
    SLOT,
    SLOT_FIRST,
)


@gluon.jit
def merge_pieces(
    out, lse, bh, item, slots_out_ptr, slots_lse_ptr, counters_ptr, num_slots, num_counters,
    num_pieces, W: gl.constexpr, BLOCK_Q: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Store a piece's half of rows; the last to arrive returns the merged rows and True."""
    BLOCK_DV: gl.constexpr = out.shape[1]
    CONSUMERS: gl.constexpr = BLOCK_Q // ROWS
    r = W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
    columns = gl.arange(0, BLOCK_DV, gl.SliceLayout(0, OUT))
    in_slot = r[:, None] * BLOCK_DV + columns[None, :]
    slot_base = bh.to(gl.int64) * num_slots
    slot = slot_base + gl.load(item + SLOT)
    slot_out = gl.multiple_of(slots_out_ptr + slot * (BLOCK_Q * BLOCK_DV), 16)
    gl.store(slot_out + in_slot, out)
    gl.store(slots_lse_ptr + slot * BLOCK_Q + r, lse)
    # One counter per consumer, after the one of work: its rows depend on nobody else's.
    counter = (
        counters_ptr
        + 1
        + (bh.to(gl.int64) * num_counters + gl.load(item + COUNTER)) * CONSUMERS
        + W
    )
    # All threads have stored before one of them releases; the last to arrive acquires all slots.
    barrier()
    arrived = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    is_last = arrived == num_pieces - 1
    if is_last:
        slot = slot_base + gl.load(item + SLOT_FIRST)
        out = gl.zeros([ROWS, BLOCK_DV], gl.float32, OUT)
        top = gl.full([ROWS], NEG_INF, gl.float32, gl.SliceLayout(1, OUT))
        total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, OUT))
        for piece in range(0, num_pieces):
            # .cg: past the L1 cache, which other multiprocessors' stores do not reach.
            part_ptr = slots_out_ptr + (slot + piece) * (BLOCK_Q * BLOCK_DV)
            part = gl.load(gl.multiple_of(part_ptr, 16) + in_slot, cache_modifier=".cg")
            part_lse = gl.load(slots_lse_ptr + (slot + piece) * BLOCK_Q + r, cache_modifier=".cg")
            out, top, total = merge_step(out, top, total, part, part_lse)
        out, lse = merge_end(out, top, total)
        gl.store(counter, 0)
    return out, lse, is_last


@gluon.jit
def store_some(first_ptr, shared, stride, row_ok, WIDTH: gl.constexpr):
    """Store the rows of `shared` that are `row_ok`, `stride` elements apart, and no others.

    WIDTH: columns that exist. The rows that follow are another item's: TMA, which moves all 64,
    would overwrite them.
    """
    BLOCK_DV: gl.constexpr = shared.shape[1]
    VECTOR: gl.constexpr = 8  # 16 bytes, to which rows are aligned
    LANES: gl.constexpr = min(BLOCK_DV // VECTOR, 32)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // LANES, LANES], [4, 1], [1, 0])
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)).to(gl.int64)
    columns = gl.arange(0, BLOCK_DV, gl.SliceLayout(0, LAYOUT))
    kept = gl.convert_layout(row_ok.to(gl.int32), gl.SliceLayout(1, LAYOUT)) != 0
    offsets = gl.multiple_of(rows * stride, VECTOR)[:, None] + columns[None, :]
    kept = kept[:, None] & (columns < WIDTH)[None, :]
    gl.store(gl.multiple_of(first_ptr, 16) + offsets, shared.load(LAYOUT), mask=kept)


@gluon.jit
def send_rows(
    out_desc, out_short, out_residues, shared, batch, head, q_start, q_step, STEPPED: gl.constexpr
):  # fmt: skip
    """TMA's store of all rows of `shared`; those past the sequence are clipped."""
    if STEPPED:
        residue = q_start % q_step
        row = q_start // q_step
        if residue < out_residues:
            copy_out(out_desc, [batch, head, residue, row, 0], shared)
        else:
            copy_out(out_short, [batch, head, residue, row, 0], shared)
    else:
        copy_out(out_desc, [batch, head, 0, q_start, 0], shared)


@gluon.jit
def finish(
    out, lse, shared, rows, row_ok, whole, batch, head, num_heads, q_start, q_step, seqlen_q,
    sinks_ptr, out_maps, lse_ptr, lse_stride_b, lse_stride_h, lse_stride_s, running_out_ptr,
    running_lse_ptr, OUT: gl.constexpr, SHORT_WIDTH: gl.constexpr, STEPPED: gl.constexpr,
    FIRST: gl.constexpr, LAST: gl.constexpr, SINKS: gl.constexpr, STORE_LSE: gl.constexpr,
):  # fmt: skip
    """Join a row's earlier passes, apply the sink after the last one, store.

    whole: the consumer's rows that are not the item's do not exist; read if SHORT_WIDTH is not 0.
    """
    BLOCK_DV: gl.constexpr = out.shape[1]
    if not (FIRST and LAST):
        first_row = (batch * num_heads + head).to(gl.int64) * seqlen_q
        running_rows = first_row + rows
        columns = gl.arange(0, BLOCK_DV, gl.SliceLayout(0, OUT))
        running_head = gl.multiple_of(running_out_ptr + first_row * BLOCK_DV, 16)
        row_offsets = rows.to(gl.int64) * BLOCK_DV
        running = running_head + row_offsets[:, None] + columns[None, :]
        all_ok = row_ok[:, None] & (columns >= 0)[None, :]
        if not FIRST:
            earlier = gl.load(running, mask=all_ok, other=0.0)
            earlier_lse = gl.load(running_lse_ptr + running_rows, mask=row_ok, other=NEG_INF)
            total = gl.where(lse == NEG_INF, 0.0, 1.0)
            out, top, total = merge_step(out, lse, total, earlier, earlier_lse)
            out, lse = merge_end(out, top, total)
        if not LAST:
            gl.store(running, out, mask=all_ok)
            gl.store(running_lse_ptr + running_rows, lse, mask=row_ok)
    if LAST:
        if SINKS:
            sink = gl.load(sinks_ptr + head).to(gl.float32)
            top = gl.maximum(lse, sink)
            safe = gl.where(top == NEG_INF, 0.0, top)
            kept = gl.exp(lse - safe)
            total = kept + gl.exp(sink - safe)
            divisor = gl.where(total == 0.0, 1.0, total)
            out = out * (kept / divisor)[:, None]
            lse = gl.where(total == 0.0, NEG_INF, safe + gl.log(divisor))
        shared.store(out.to(shared.dtype))
        fence_async_shared()
        if STORE_LSE:
            lse_head = lse_ptr + batch * lse_stride_b + head * lse_stride_h
            gl.store(lse_head + rows.to(gl.int64) * lse_stride_s, lse, mask=row_ok)
        out_desc, out_short, out_residues, out_ptr = out_maps
        if SHORT_WIDTH:
            if whole:
                send_rows(
                    out_desc, out_short, out_residues, shared, batch, head, q_start, q_step,
                    STEPPED,
                )  # fmt: skip
            else:
                strides = out_desc.strides
                head_ptr = out_ptr + batch * strides[0] + head * strides[1] + q_start * strides[2]
                store_some(head_ptr, shared, q_step * strides[2], row_ok, SHORT_WIDTH)
        else:
            send_rows(
                out_desc, out_short, out_residues, shared, batch, head, q_start, q_step, STEPPED
            )  # fmt: skip
