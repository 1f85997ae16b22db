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
# Named barriers, the first of each kind; Triton counts its own up from 0, one for each partition.
EMPTY = gl.constexpr(6)
MAX_STAGES = gl.constexpr(3)
LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)
NEG_INF = gl.constexpr(float("-inf"))
MAX_GROWTH = gl.constexpr(8.0)
MISSING = gl.constexpr(-3)  # the id of a key that does not exist

tanh = gluon.jit(primitives.tanh.fn)
merge_step = gluon.jit(primitives.merge_step.fn)
merge_end = gluon.jit(primitives.merge_end.fn)


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
def has_keys(ranges_ptr, index, first_row, BLOCK_Q: gl.constexpr):
    """Whether a consumer's rows keep a key of a bit tile: -1 is all of them, -2 none."""
    GROUPS: gl.constexpr = (BLOCK_Q + 15) // 16
    ends = ranges_ptr + (gl.maximum(index, 0) * GROUPS + first_row // 16) * 2 + 1
    most = gl.where(index == -1, 1, 0)
    for group in gl.static_range(ROWS // 16):
        most = gl.maximum(most, gl.load(ends + group * 2, mask=index >= 0, other=0))
    return most > 0


@gluon.jit
def load_key_ids(k_ids_ptr, start, step, seqlen_k, BLOCK_K: gl.constexpr, SCORES: gl.constexpr):
    """The ids of a tile's keys, int32 [BLOCK_K]; MISSING where the key does not exist."""
    c = gl.arange(0, BLOCK_K, gl.SliceLayout(0, SCORES))
    # Compared as counts: start + c * step may wrap around for keys that do not exist.
    exists = c < (seqlen_k - start - 1) // step + 1
    return gl.load(k_ids_ptr + (start + c * step), mask=exists, other=MISSING)


@constexpr_function
def empty_assembly(kind, consumers):
    """PTX of a named barrier of all consumers and the producer's warp."""
    return f"bar.{kind} $1, {128 * consumers + 32}; mov.u32 $0, 0;"


@gluon.jit
def wait_empty(stage, VALUES: gl.constexpr, CONSUMERS: gl.constexpr):
    """The producer's wait until all consumers are done with a buffer of keys, or of VALUES."""
    ASM: gl.constexpr = empty_assembly("sync", CONSUMERS)
    FIRST: gl.constexpr = EMPTY + MAX_STAGES if VALUES else EMPTY
    gl.inline_asm_elementwise(ASM, "=r,r", [stage + FIRST], gl.int32, is_pure=False, pack=1)


@gluon.jit
def leave(stage, VALUES: gl.constexpr, CONSUMERS: gl.constexpr):
    """A consumer is done with a buffer.

    A named barrier, for an mbarrier's arrival would wait for all warps of the consumer first.
    """
    ASM: gl.constexpr = empty_assembly("arrive", CONSUMERS)
    FIRST: gl.constexpr = EMPTY + MAX_STAGES if VALUES else EMPTY
    gl.inline_asm_elementwise(ASM, "=r,r", [stage + FIRST], gl.int32, is_pure=False, pack=1)


@gluon.jit
def next_stage(stage, filled, NUM_STAGES: gl.constexpr):
    """The buffer after this one, and how often it has been filled before."""
    wraps = stage == NUM_STAGES - 1
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, filled + 1, filled)


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
    # The base follows the maximum only once that has grown by 2^8: few tiles rescale O.
    m_new = gl.where(m_new > m + MAX_GROWTH, m_new, m)
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


@constexpr_function
def rescale_assembly(count):
    """PTX: numbers times their factors, skipped where all of a warp's factors are 1.

    The first four numbers of a thread are two of each of its two rows.
    """
    lines = ["{", ".reg .pred some, skip;", f"setp.neu.f32 some, ${2 * count}, 0f3F800000;"]
    lines += [f"setp.neu.or.f32 some, ${2 * count + i}, 0f3F800000, some;" for i in range(1, 4)]
    lines += ["vote.sync.all.pred skip, !some, 0xffffffff;"]
    lines += [f"mov.b32 ${i}, ${count + i};" for i in range(count)]
    lines += ["@skip bra kept;"]
    lines += [f"mul.f32 ${i}, ${count + i}, ${2 * count + i};" for i in range(count)]
    return " ".join([*lines, "kept:", "}"])


@constexpr_function
def rescale_constraints(count):
    """Of count results, numbers and factors."""
    return ",".join(["=f"] * count + ["f"] * (2 * count))


@gluon.jit
def rescale(acc, alpha):
    """O * alpha, by row; skipped where a warp's rows all have 1, as most have."""
    factors = gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    # Registers that one piece of assembly takes: a thread has 32, 64 or 128 numbers of O.
    COUNT: gl.constexpr = 32
    ASM: gl.constexpr = rescale_assembly(COUNT)
    CONSTRAINTS: gl.constexpr = rescale_constraints(COUNT)
    operands = [acc, factors.broadcast_to(acc.shape)]
    return gl.inline_asm_elementwise(
        ASM, CONSTRAINTS, operands, gl.float32, is_pure=True, pack=COUNT
    )


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
def spread(words, SCORES: gl.constexpr, SPLIT: gl.constexpr):
    """Int32 [rows, words] -> [rows, 32 * words] in the scores' layout; no data moves.

    SPLIT is that layout seen as [rows, words, 4 groups, 4 lanes, 2]. A column's bit is number
    8 * group + its place in the pair: the lane is shifted out, so that compilers know the number.
    """
    LANE: gl.constexpr = gl.SliceLayout(
        0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, SPLIT)))
    )
    lane = gl.arange(0, 4, LANE)[None, None, None, :, None]
    own = words[:, :, None, None, None] >> (lane * 2)
    COLUMNS: gl.constexpr = words.shape[1] * 32
    own = own.broadcast_to([ROWS, words.shape[1], 4, 4, 2]).reshape([ROWS, COLUMNS])
    return gl.convert_layout(own, SCORES, assert_trivial=True)


@gluon.jit
def bit_of_column(WORDS: gl.constexpr, SCORES: gl.constexpr, SPLIT: gl.constexpr):
    """The bits that belong to the columns in `spread`'s words."""
    GROUP: gl.constexpr = gl.SliceLayout(
        0, gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, SPLIT)))
    )
    PLACE: gl.constexpr = gl.SliceLayout(
        0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, SPLIT)))
    )
    group = gl.arange(0, 4, GROUP)[None, None, :, None, None]
    place = gl.arange(0, 2, PLACE)[None, None, None, None, :]
    bit = (1 << (group * 8 + place)).broadcast_to([ROWS, WORDS, 4, 4, 2])
    return gl.convert_layout(bit.reshape([ROWS, WORDS * 32]), SCORES, assert_trivial=True)


@gluon.jit
def masked(s, words, words_other, q_id, k_id, IDS: gl.constexpr, SCORES: gl.constexpr,
           SPLIT: gl.constexpr):  # fmt: skip
    """Scores with -inf where a bit tile (or an id tile's pair of them) does not keep."""
    own = spread(words, SCORES, SPLIT)
    if IDS:
        same = (q_id[:, None] == k_id[None, :]) & (q_id >= 0)[:, None]
        own = gl.where(same, own, spread(words_other, SCORES, SPLIT))
        own = gl.where((k_id != MISSING)[None, :], own, 0)
    # In assembly, for the compiler would test all bits before it waits for the scores, and store
    # what it found.
    ASM: gl.constexpr = """{
        .reg .pred keeps;
        .reg .b32 bit;
        and.b32 bit, $2, $3;
        setp.ne.b32 keeps, bit, 0;
        selp.f32 $0, $1, 0fFF800000, keeps;
    }"""
    bit = bit_of_column(words.shape[1], SCORES, SPLIT)
    return gl.inline_asm_elementwise(
        ASM, "=f,f,r,r", [s, own, bit], gl.float32, is_pure=True, pack=1
    )


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
