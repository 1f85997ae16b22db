"""Small device functions of the Hopper forward, in Gluon; all of them are inlined.

Conventions are those of primitives.py; a "row layout" is the slice of the scores' layout that
holds one value per query row.
"""

# Triton's types are not Python's, and a constexpr `if` is decided while compiling.
# ruff: noqa: ANN001, ANN201, SIM108
# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function

from portattn.backends.triton import primitives
from portattn.backends.triton.hopper_adapter import copy_in, gl, mbarrier

ROWS = gl.constexpr(64)  # of a consumer: what one wgmma instruction takes
TURN_BARRIER = 9  # the first; Triton counts its own up from 0, one for each partition
LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)
NEG_INF = gl.constexpr(float("-inf"))
# Fields of a schedule item (portattn.h).
ITEM_FIELDS = gl.constexpr(16)
Q_START = gl.constexpr(0)
Q_STEP = gl.constexpr(1)
NUM_ROWS = gl.constexpr(2)
TILE_BEGIN = gl.constexpr(3)
TILE_END = gl.constexpr(4)
FULL_FIRST = gl.constexpr(5)
FULL_COUNT = gl.constexpr(6)
FULL_STEP = gl.constexpr(7)
FULL_STRIDE = gl.constexpr(8)
SLOT = gl.constexpr(9)
SLOT_FIRST = gl.constexpr(10)
NUM_PIECES = gl.constexpr(11)
COUNTER = gl.constexpr(12)
MISSING = gl.constexpr(-3)  # the id of a key that does not exist

tanh = gluon.jit(primitives.tanh.fn)
merge_step = gluon.jit(primitives.merge_step.fn)
merge_end = gluon.jit(primitives.merge_end.fn)


@gluon.jit
def locate(
    index, items_ptr, layouts_ptr, layout_stride_b, layout_stride_h, num_layouts, first_item,
    num_items, num_bh, num_heads, head_group,
):  # fmt: skip
    """Work index -> (item pointer, layout, batch, head), ordered as primitives.locate has it."""
    group_programs = head_group * num_items
    first = index // group_programs * head_group
    rest = index % group_programs
    heads = gl.minimum(head_group, num_bh - first)
    bh = first + rest % heads
    batch = bh // num_heads
    head = bh % num_heads
    layout = gl.load(
        layouts_ptr + batch * layout_stride_b + head * layout_stride_h,
        mask=num_layouts > 1,
        other=0,
    )
    item = items_ptr + (first_item + layout * num_items + rest // heads) * ITEM_FIELDS
    return item, layout, batch, head


@gluon.jit
def tile_entry(entries, e):
    """(start, step) of an item's tile e: partial tiles, then full ones; past the end (0, 1)."""
    (tiles_ptr, full_list_ptr, tile_begin, num_partial, num_tiles, full_first, full_step,
     full_stride) = entries  # fmt: skip
    partial = e < num_partial
    exists = e < num_tiles
    listed = exists & (e >= num_partial) & (full_step == 0)
    tile = tiles_ptr + (tile_begin + e) * 4
    entry = full_list_ptr + (full_first + e - num_partial) * 2
    start = gl.load(tile, mask=partial, other=0) + gl.load(entry, mask=listed, other=0)
    step = gl.load(tile + 1, mask=partial, other=0) + gl.load(entry + 1, mask=listed, other=0)
    if exists & (e >= num_partial) & (full_step != 0):
        start = full_first + (e - num_partial) * full_stride
        step = full_step
    return start, gl.maximum(step, 1)


@gluon.jit
def copy_queries(maps, batch, head, start, step, ready, shared, STEPPED: gl.constexpr):
    """TMA of the rows start + step * r of one head; rows that do not exist are filled with 0.

    Maps are [batch, heads, residues, rows, width]; the second holds the residues that have a row
    less than the others.
    """
    desc, short_desc, long_residues = maps
    mbarrier.expect(ready, desc.block_type.nbytes)
    if STEPPED:
        residue = start % step
        row = start // step
        if residue < long_residues:
            copy_in(desc, [batch, head, residue, row, 0], ready, shared)
        else:
            copy_in(short_desc, [batch, head, residue, row, 0], ready, shared)
    else:
        copy_in(desc, [batch, head, 0, start, 0], ready, shared)


@gluon.jit
def copy_keys(maps, batch, head, start, step, ready, shared, STEPPED: gl.constexpr):
    """The same for keys or values, whose tiles have step 1 (the first map) or the pass's own."""
    desc, long_desc, short_desc, long_residues = maps
    if STEPPED:
        if step == 1:
            mbarrier.expect(ready, desc.block_type.nbytes)
            copy_in(desc, [batch, head, 0, start, 0], ready, shared)
        else:
            stepped_maps = (long_desc, short_desc, long_residues)
            copy_queries(stepped_maps, batch, head, start, step, ready, shared, True)
    else:
        mbarrier.expect(ready, desc.block_type.nbytes)
        copy_in(desc, [batch, head, 0, start, 0], ready, shared)


@gluon.jit
def load_words(bits_ptr, index, first_row, WORDS: gl.constexpr, BLOCK_Q: gl.constexpr,
               LAYOUT: gl.constexpr):  # fmt: skip
    """Rows of one bit tile, int32 [ROWS, WORDS]; index -1 keeps all, -2 nothing."""
    r = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    w = gl.arange(0, WORDS, gl.SliceLayout(0, LAYOUT))
    offsets = (r + first_row)[:, None] * WORDS + w[None, :]
    tile = gl.multiple_of(bits_ptr + gl.maximum(index, 0).to(gl.int64) * (BLOCK_Q * WORDS), 16)
    # No load for -1 and -2: a plan without partial tiles has no bits to read.
    words = gl.load(tile + offsets, mask=offsets * 0 + index >= 0, other=0)
    return words | gl.where(index == -1, -1, 0)


@gluon.jit
def load_key_ids(k_ids_ptr, start, step, seqlen_k, BLOCK_K: gl.constexpr, SCORES: gl.constexpr):
    """The ids of a tile's keys, int32 [BLOCK_K]; MISSING where the key does not exist."""
    c = gl.arange(0, BLOCK_K, gl.SliceLayout(0, SCORES))
    # Compared as counts: start + c * step may wrap around for keys that do not exist.
    exists = c < (seqlen_k - start - 1) // step + 1
    return gl.load(k_ids_ptr + (start + c * step), mask=exists, other=MISSING)


@constexpr_function
def turn_assembly(kind, consumer):
    """PTX of a named barrier of two warpgroups; the output is there because there must be one."""
    return f"bar.{kind} {TURN_BARRIER + consumer}, 256; mov.u32 $0, 0;"


@gluon.jit
def take_turn(W: gl.constexpr):
    """Wait until the consumer before W has passed the turn on.

    Named barriers, as FlashAttention-3 has it: an mbarrier would cost each turn a barrier of the
    warpgroup more.
    """
    ASM: gl.constexpr = turn_assembly("sync", W)
    gl.inline_asm_elementwise(ASM, "=r,r", [W], gl.int32, is_pure=False, pack=1)


@gluon.jit
def pass_turn(W: gl.constexpr, CONSUMERS: gl.constexpr):
    """Let the consumer after W go on."""
    ASM: gl.constexpr = turn_assembly("arrive", (W + 1) % CONSUMERS)
    gl.inline_asm_elementwise(ASM, "=r,r", [W], gl.int32, is_pure=False, pack=1)


@gluon.jit
def pack_pairs(p, DTYPE: gl.constexpr):
    """Float32 [rows, keys] -> int32 [rows, keys / 2], each a pair of 16-bit numbers."""
    PAIRS: gl.constexpr = p.shape[1] // 2
    low, high = p.reshape([ROWS, PAIRS, 2]).split()
    ASM: gl.constexpr = (
        "cvt.rn.f16x2.f32 $0, $2, $1;" if DTYPE.is_fp16() else "cvt.rn.bf16x2.f32 $0, $2, $1;"
    )
    return gl.inline_asm_elementwise(ASM, "=r,f,f", [low, high], gl.int32, is_pure=False, pack=1)


@gluon.jit
def unpack_pairs(pairs, DTYPE: gl.constexpr, PV: gl.constexpr):
    """The way back, to an operand of a matrix product."""
    KEYS: gl.constexpr = pairs.shape[1] * 2
    low = pairs.to(gl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    return gl.convert_layout(gl.join(low, high).reshape([ROWS, KEYS]), PV)


@gluon.jit
def softmax_step(s, m, row_sum, factor, SCALED: gl.constexpr, GUARD: gl.constexpr):
    """(P, rescale of the sums so far, new m, new row sum) of scores s; see the kernel's equations.

    SCALED: s is in log2 units already; else s * factor is, factor > 0. GUARD: a row may have kept
    nothing so far (m = -inf), and exp2(-inf - -inf) must read 0.
    """
    if SCALED:
        m_new = gl.maximum(m, gl.max(s, 1))
    else:
        m_new = gl.maximum(m, gl.max(s, 1) * factor)
    if GUARD:
        m_safe = gl.where(m_new == NEG_INF, 0.0, m_new)
    else:
        m_safe = m_new
    if SCALED:
        p = gl.exp2(s - m_safe[:, None])
    else:
        p = gl.exp2(s * factor - m_safe[:, None])
    alpha = gl.exp2(m - m_safe)
    # Each lane of a row's four keeps a sum of its own: they meet once, at the item's end.
    COLUMNS: gl.constexpr = s.shape[1]
    sums = gl.sum(gl.sum(p.reshape([ROWS, COLUMNS // 8, 4, 2]), 3), 1)
    by_lane = gl.convert_layout(alpha, gl.SliceLayout(1, row_sum.type.layout))
    row_sum = row_sum * by_lane[:, None] + gl.convert_layout(sums, row_sum.type.layout)
    return p, alpha, m_new, row_sum


@gluon.jit
def after(row_sum):
    """The row sums, unchanged, such that what follows cannot be scheduled before them.

    The assembler moves the wait for a matrix product ahead of all instructions that do not need
    its result: the exponentials would run after the product and not beside it. It moves nothing
    across a barrier, not even one that no sum, being positive, ever takes.
    """
    ASM: gl.constexpr = """{
        .reg .pred never;
        .reg .f32 both;
        add.f32 both, $2, $3;
        setp.lt.f32 never, both, 0fBF800000;
        @never bar.sync 12, 128;
        mov.b32 $0, $2;
        mov.b32 $1, $3;
    }"""
    return gl.inline_asm_elementwise(
        ASM, "=f,=f,f,f", [row_sum], gl.float32, is_pure=False, pack=2
    )


@gluon.jit
def expand_bits(words, SCORES: gl.constexpr, SPLIT: gl.constexpr):
    """Int32 [rows, words] -> bool [rows, 32 * words] in the scores' layout; no data moves.

    SPLIT is that layout seen as [rows, words, 32].
    """
    c = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, SPLIT)))[None, None, :]
    bits = ((words[:, :, None] >> c) & 1) != 0
    COLUMNS: gl.constexpr = words.shape[1] * 32
    return gl.convert_layout(bits.reshape([ROWS, COLUMNS]), SCORES, assert_trivial=True)


@gluon.jit
def masked(s, words, words_other, q_id, k_id, IDS: gl.constexpr, SCORES: gl.constexpr,
           SPLIT: gl.constexpr):  # fmt: skip
    """Scores with -inf where a bit tile (or an id tile's pair of them) does not keep."""
    keep = expand_bits(words, SCORES, SPLIT)
    if IDS:
        other = expand_bits(words_other, SCORES, SPLIT)
        same = (q_id[:, None] == k_id[None, :]) & (q_id >= 0)[:, None]
        keep = gl.where(same, keep, other) & (k_id != MISSING)[None, :]
    return gl.where(keep, s, NEG_INF)


@gluon.jit
def score_terms(s, rows, start, step, q_offset, scale, softcap, slope, SCALED: gl.constexpr,
                SOFTCAP: gl.constexpr, ALIBI: gl.constexpr, SCORES: gl.constexpr):  # fmt: skip
    """If SCALED (softcap(scale * s) - slope * |i - j|) in log2 units, else s."""
    if SCALED:
        s = s * scale
        if SOFTCAP:
            s = softcap * tanh(s / softcap)
        if ALIBI:
            columns: gl.constexpr = s.shape[1]
            keys = start + gl.arange(0, columns, gl.SliceLayout(0, SCORES)) * step
            distance = gl.abs((rows + q_offset)[:, None] - keys[None, :])
            s = s - slope * distance.to(gl.float32)
        s = s * LOG2E
    return s
