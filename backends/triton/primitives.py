"""Small device functions that let a kernel body read as the algorithm.

All of them are inlined. Conventions: `lse` is the natural logarithm in float32, -inf where nothing
was kept; `m` is the running row maximum in log2 units; offsets that grow with the tensors are
int64.
"""

# Triton's types are not Python's, and a constexpr `if` is decided while compiling.
# ruff: noqa: ANN001, ANN201, SIM108
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))
# Cephes tanhf (S. L. Moshier): tanh(x) = x + x * z * P(z), z = x * x, for |x| < 0.625.
TANH_P0 = tl.constexpr(-5.70498872745e-3)
TANH_P1 = tl.constexpr(2.06390887954e-2)
TANH_P2 = tl.constexpr(-5.37397155531e-2)
TANH_P3 = tl.constexpr(1.33314422036e-1)
TANH_P4 = tl.constexpr(-3.33332819422e-1)


@triton.jit
def tanh(x):
    """The tanh to 2 units in the last place of float32; exp alone would cancel near 0."""
    z = x * x
    p = (((TANH_P0 * z + TANH_P1) * z + TANH_P2) * z + TANH_P3) * z + TANH_P4
    small = x + x * z * p
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    large = (1.0 - t) / (1.0 + t)
    large = tl.where(x < 0.0, -large, large)
    return tl.where(tl.abs(x) < 0.625, small, large)


@triton.jit
def locate(num_items, num_bh, head_group):
    """Program index -> (item, batch * num_heads + head).

    Groups of heads, inside them items, innermost the heads of the group.

    The heads of a group share the L2 cache; inside it the items keep their order, longest first.
    """
    pid = tl.program_id(0)
    group_programs = head_group * num_items
    first = pid // group_programs * head_group
    rest = pid % group_programs
    heads = tl.minimum(head_group, num_bh - first)
    return rest // heads, first + rest % heads


@triton.jit
def load_rows(
    ptr, offsets, row_ok, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASK_ROWS: tl.constexpr
):
    """Rows at `ptr + offsets`, [rows, BLOCK]; columns past WIDTH and masked rows read 0."""
    columns = tl.arange(0, BLOCK)
    pointers = ptr + offsets[:, None] + columns[None, :]
    if WIDTH == BLOCK:
        if MASK_ROWS:
            return tl.load(pointers, mask=row_ok[:, None], other=0.0)
        else:
            return tl.load(pointers)
    else:
        if MASK_ROWS:
            return tl.load(pointers, mask=row_ok[:, None] & (columns < WIDTH)[None, :], other=0.0)
        else:
            return tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)


@triton.jit
def tile_keys(start, step, seqlen_k, BLOCK_K: tl.constexpr, STEPPED: tl.constexpr):
    """Positions of a tile's keys, and which of them exist; int32 [BLOCK_K] and bool [BLOCK_K]."""
    c = tl.arange(0, BLOCK_K)
    if STEPPED:
        # Compared as counts: start + c * step may wrap around for keys that do not exist.
        return start + c * step, c < (seqlen_k - start - 1) // step + 1
    else:
        return start + c, start + c < seqlen_k


@triton.jit
def load_tile(
    ptr, desc, batch, head, start, keys, exists, stride,
    BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """Rows `keys` of one head, [BLOCK_K, BLOCK]; keys that do not exist read 0.

    TMA reads start + [0, BLOCK_K) through the per-head descriptor, which zero-fills; else through
    `ptr`, the head's first element. RAGGED says that keys that do not exist may occur.
    """
    if TMA:
        return tl.reshape(desc.load([batch, head, start, 0]), (BLOCK_K, BLOCK))
    else:
        # Not (start * stride) + (c * stride): the second part would be hoisted out of the loop,
        # and take registers all along.
        return load_rows(ptr, keys.to(tl.int64) * stride, exists, WIDTH, BLOCK, RAGGED)


@triton.jit
def load_words(bits_ptr, index, BLOCK_Q: tl.constexpr, WORDS: tl.constexpr):
    """One bit tile as int32 [BLOCK_Q, WORDS]; index -1 keeps all, -2 nothing."""
    offsets = tl.arange(0, BLOCK_Q)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    pointers = bits_ptr + index.to(tl.int64) * (BLOCK_Q * WORDS) + offsets
    # A tensor compared, not a scalar spread: the interpreter takes only masks that are bool from
    # the start.
    words = tl.load(pointers, mask=index + offsets * 0 >= 0, other=0)
    return words | tl.where(index == -1, -1, 0)


@triton.jit
def expand_bits(words, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Int32 [BLOCK_Q, BLOCK_K / 32] -> bool [BLOCK_Q, BLOCK_K]; key c is bit c % 32."""
    bits = ((words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1) != 0
    return tl.reshape(bits, (BLOCK_Q, BLOCK_K))


@triton.jit
def softmax_step(
    s,
    v,
    acc,
    m,
    row_sum,
    factor,
    SCALED: tl.constexpr,
    GUARD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One online-softmax step (Milakov and Gimelshein 2018): scores s [q, k], values v [k, d].

    SCALED: s is in log2 units already; else s * factor is, factor > 0. GUARD: a row may have kept
    nothing so far (m = -inf), and exp2(-inf - -inf) must read 0.
    """
    if SCALED:
        m_new = tl.maximum(m, tl.max(s, 1))
    else:
        m_new = tl.maximum(m, tl.max(s, 1) * factor)
    if GUARD:
        m_safe = tl.where(m_new == NEG_INF, 0.0, m_new)
    else:
        m_safe = m_new
    if SCALED:
        p = tl.exp2(s - m_safe[:, None])
    else:
        p = tl.exp2(s * factor - m_safe[:, None])
    alpha = tl.exp2(m - m_safe)
    row_sum = row_sum * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, m_new, row_sum


@triton.jit
def merge_step(out, top, total, other_out, other_lse):
    """Add a normalised part to the sum out / total, whose running maximum is `top`."""
    top_new = tl.maximum(top, other_lse)
    safe = tl.where(top_new == NEG_INF, 0.0, top_new)
    a = tl.exp(top - safe)
    c = tl.exp(other_lse - safe)
    return out * a[:, None] + other_out * c[:, None], top_new, total * a + c


@triton.jit
def merge_end(out, top, total):
    """(out, top, total) -> (normalised output, lse); rows that kept nothing give 0 and -inf."""
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    safe = tl.where(top == NEG_INF, 0.0, top)
    return out / divisor[:, None], tl.where(empty, NEG_INF, safe + tl.log(divisor))
