"""Small device functions of the Hopper backward, in Gluon; all of them are inlined."""

# Triton's types are not Python's, and a constexpr `if` is decided while compiling.
# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function

from portattn.backends.triton.hopper_adapter import add_out, gl
from portattn.backends.triton.hopper_primitives import ROWS

# Named barriers of the two consumers, beside those of hopper_primitives: two for each buffer of
# dX, for one consumer may be ahead of the other by nearly a tile.
HALVES = gl.constexpr(9)
UNUSED = 14  # what `hold` has
NEVER = 0x80000001


@gluon.jit
def arrive_other(W: gl.constexpr, buffer):
    """Tell the other consumer that this one's half of dX is written."""
    barrier = HALVES + 2 * buffer + (1 - W)
    gl.inline_asm_elementwise(
        "bar.arrive $1, 256; mov.u32 $0, 0;", "=r,r", [barrier], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_other(W: gl.constexpr, buffer):
    """Wait for the other consumer's half of dX, and for all threads of this one."""
    barrier = HALVES + 2 * buffer + W
    gl.inline_asm_elementwise(
        "bar.sync $1, 256; mov.u32 $0, 0;", "=r,r", [barrier], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def column_words(bits_ptr, index, W: gl.constexpr, SCORES: gl.constexpr):
    """The words of a bit tile that hold a consumer's keys, [2, queries]; -1 keeps all, -2 none.

    In the layout of the scores seen as [word, key in it, query], without the keys.
    """
    example = gl.zeros([ROWS, ROWS], gl.int32, SCORES).reshape([2, 32, ROWS])
    WORD: gl.constexpr = gl.SliceLayout(1, example.type.layout)
    w = gl.arange(0, 2, gl.SliceLayout(1, WORD))
    r = gl.arange(0, ROWS, gl.SliceLayout(0, WORD))
    offsets = (w + W * 2)[:, None] + (r * 4)[None, :]
    tile = bits_ptr + gl.maximum(index, 0).to(gl.int64) * (ROWS * 4)
    # No load for -1 and -2: a plan without partial tiles has no bits to read.
    words = gl.load(tile + offsets, mask=offsets * 0 + index >= 0, other=0)
    return words | gl.where(index == -1, -1, 0)


@gluon.jit
def expand_columns(words, SCORES: gl.constexpr):
    """Int32 [2, queries] -> [keys, queries], the key's own bit; no data moves."""
    example = gl.zeros([ROWS, ROWS], gl.int32, SCORES).reshape([2, 32, ROWS])
    KEY: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, example.type.layout))
    bit = gl.arange(0, 32, KEY)[None, :, None]
    own = ((words[:, None, :] >> bit) & 1).reshape([ROWS, ROWS])
    return gl.convert_layout(own, SCORES, assert_trivial=True)


@constexpr_function
def hold_assembly(count):
    """PTX: numbers passed on, behind a barrier that is taken if their bits together are NEVER."""
    lines = ["{", ".reg .pred never;", ".reg .b32 all;", f"mov.b32 all, ${count};"]
    for i in range(1, count - 1, 2):
        lines += [f"lop3.b32 all, all, ${count + i}, ${count + i + 1}, 0xFE;"]
    lines += [f"or.b32 all, all, ${2 * count - 1};", f"setp.eq.b32 never, all, {NEVER};"]
    lines += [f"@never bar.sync {UNUSED}, 128;"]
    lines += [f"mov.b32 ${i}, ${count + i};" for i in range(count)]
    return " ".join([*lines, "}"])


@constexpr_function
def hold_constraints(count):
    """Of count results and numbers."""
    return ",".join(["=f"] * count + ["f"] * count)


@gluon.jit
def hold(p):
    """P unchanged, such that what follows cannot be scheduled before it.

    The assembler moves the wait for a matrix product ahead of all instructions that do not need
    its result: the exponentials would run after the products and not beside them. It moves
    nothing across a barrier, not even one that nobody takes: no P is negative.
    """
    ASM: gl.constexpr = hold_assembly(32)
    CONSTRAINTS: gl.constexpr = hold_constraints(32)
    return gl.inline_asm_elementwise(ASM, CONSTRAINTS, [p], gl.float32, is_pure=False, pack=32)


@gluon.jit
def add_queries(maps, batch, head, start, step, column, shared, STEPPED: gl.constexpr):
    """TMA: add [64, columns] to the rows start + step * r of one head, from a column on.

    Rows past the end are not written. Maps as in hopper_primitives.copy_keys.
    """
    desc, long_desc, short_desc, long_residues = maps
    if STEPPED:
        residue = start % step
        if step == 1:
            add_out(desc, [batch, head, 0, start, column], shared)
        else:
            if residue < long_residues:
                add_out(long_desc, [batch, head, residue, start // step, column], shared)
            else:
                add_out(short_desc, [batch, head, residue, start // step, column], shared)
    else:
        add_out(desc, [batch, head, 0, start, column], shared)


@gluon.jit
def sum_rows(part, head_ptr, start, step, length, WIDTH: gl.constexpr):
    """Add [64, columns] to the float32 rows start + step * r of a head, each WIDTH long.

    Rows past the end have nothing to add; their zeros go to the last row.
    """
    COLUMNS: gl.constexpr = part.shape[1]
    low, high = part.reshape([ROWS, COLUMNS // 2, 2]).split()
    LAYOUT: gl.constexpr = low.type.layout
    rows = gl.minimum(start + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)) * step, length - 1)
    pairs = gl.arange(0, COLUMNS // 2, gl.SliceLayout(0, LAYOUT))
    pointers = head_ptr + (rows.to(gl.int64) * WIDTH)[:, None] + (pairs * 2)[None, :]
    gl.inline_asm_elementwise(
        "red.global.add.v2.f32 [$1], {$2, $3}; mov.u32 $0, 0;", "=r,l,f,f",
        [pointers.to(gl.int64, bitcast=True), low, high], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def store_rows(part, head_ptr, start, step, num_rows, stride, width):
    """Write [64, columns] to rows start + step * r < num_rows of a tensor, `width` columns.

    As the columns lie in registers: a detour through shared memory would take a buffer's place.
    """
    LAYOUT: gl.constexpr = part.type.layout
    r = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    c = gl.arange(0, part.shape[1], gl.SliceLayout(0, LAYOUT))
    rows = (start + r * step).to(gl.int64)
    mask = (r < num_rows)[:, None] & (c < width)[None, :]
    pointers = head_ptr + (rows * stride)[:, None] + c[None, :]
    gl.store(pointers, part.to(head_ptr.dtype.element_ty), mask=mask)
