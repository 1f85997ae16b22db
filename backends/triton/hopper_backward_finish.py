"""From the Hopper backward's float32 sums to gradients: scaled, rounded, without padding."""

# Triton's types are not Python's, and a constexpr `if` is decided while compiling.
# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

FINISH_PARAMETERS = [
    "sums_ptr", "out_ptr", "stride_b", "stride_h", "stride_s", "num_heads", "length", "head_dim",
]  # fmt: skip


@triton.jit(do_not_specialize=FINISH_PARAMETERS)
def finish_rows(
    sums_ptr, out_ptr, stride_b: tl.int64, stride_h: tl.int64, stride_s: tl.int64,
    num_heads: tl.int32, length: tl.int32, head_dim: tl.int32, scale: tl.float32,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One block of rows of a head, from rows of WIDTH numbers to rows of head_dim."""
    blocks = tl.cdiv(length, ROWS)
    bh = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, WIDTH)
    row_ok = (rows < length)[:, None]
    wide = rows.to(tl.int64)
    head = tl.multiple_of(sums_ptr + bh.to(tl.int64) * length * WIDTH, 16)
    sums = tl.load(head + (wide * WIDTH)[:, None] + at[None, :], mask=row_ok, other=0.0)
    out = sums * scale
    out_head = out_ptr + (bh // num_heads) * stride_b + (bh % num_heads) * stride_h
    pointers = out_head + (wide * stride_s)[:, None] + at[None, :]
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=row_ok & (at < head_dim)[None, :])
