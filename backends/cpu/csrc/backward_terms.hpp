// What happens to a block of scores s[row][lane] of the backward, keys in the lanes: which of them are kept,
// score terms and their gradients, p = exp2(s - LSE) and ds = p (dp - delta).
#pragma once
#include "backward_call.hpp"
#include "softmax.hpp"

namespace portattn {
namespace cpu {
namespace PA_ISA {

// One tile: queries q_start + q_step*r, r < count; keys k_start + k_step*lane, lane < keys.
struct Tile {
    int64_t q_start, q_step, count;
    int64_t k_start, k_step, keys;
    int32_t bits_same, bits_other;
};

// Of a tile's rows; those that do not exist have an LSE of inf.
struct RowStats {
    float *lse2, *lse2_rest, *delta;
};

enum Keep { KEEP_NONE, KEEP_ALL, KEEP_SOME };

// BLOCK_ROWS rows of a tile (or those that there are) with one panel of keys.
struct Block {
    int64_t first, count, p;
    int slot;  // 0 or 1 by turns of blocks
    int turn;  // 0 or 1 by turns of panels that keep something
    Keep keep;
    float *s, *dp;               // [row][lane]
    uint32_t words[BLOCK_ROWS];  // the kept lanes of each row
};

constexpr uint32_t ALL_LANES = W == 32 ? 0xffffffffu : (1u << (W % 32)) - 1;

PA_INLINE uint32_t first_lanes(int64_t count) { return count >= W ? ALL_LANES : (1u << count) - 1; }

// Words of a bit tile for panel p: rows first .. first + count.
static void tile_words(const pa_plan_view& v, int32_t tile, int64_t first, int64_t count, int64_t p,
                       uint32_t* words) {
    if (tile < 0) {
        for (int64_t n = 0; n < count; ++n) words[n] = tile == PA_BITS_FULL ? ALL_LANES : 0;
        return;
    }
    const uint32_t* bits = v.bits + ((int64_t)tile * v.block_q + first) * v.words_per_row + p * W / 32;
    for (int64_t n = 0; n < count; ++n) words[n] = (bits[n * v.words_per_row] >> (p * W % 32)) & ALL_LANES;
}

// Whether bit tile `tile` may keep anything of panel p in the rows first .. first + BLOCK_ROWS.
static bool may_keep(const pa_plan_view& v, int32_t tile, int64_t first, int64_t p) {
    if (tile < 0) return tile == PA_BITS_FULL;
    int64_t groups = (v.block_q + 15) / 16;
    const int32_t* range = v.bit_ranges + ((int64_t)tile * groups + first / 16) * 2;
    for (int64_t g = first / 16; g < groups && g < (first + BLOCK_ROWS) / 16; ++g, range += 2)
        if (range[0] < range[1] && range[0] < (p + 1) * W && range[1] > p * W) return true;
    return false;
}

// What the block of rows first .. first + count keeps of panel p; words are filled unless it is nothing.
// key_ids: of the panel's lanes, where the tile compares ids.
static Keep block_keeps(const pa_plan_view& v, const Tile& t, int64_t first, int64_t count, int64_t p,
                        const int32_t* q_ids, const int32_t* key_ids, uint32_t* words) {
    uint32_t lanes = first_lanes(t.keys - p * W);
    bool compares = t.bits_same != t.bits_other;
    if (!may_keep(v, t.bits_same, first, p) && !(compares && may_keep(v, t.bits_other, first, p)))
        return KEEP_NONE;
    tile_words(v, t.bits_same, first, count, p, words);
    if (compares) {
        uint32_t other[BLOCK_ROWS];
        tile_words(v, t.bits_other, first, count, p, other);
        for (int64_t n = 0; n < count; ++n) {
            int32_t id = q_ids[t.q_start + t.q_step * (first + n)];
            uint32_t equal = 0;
            for (int w = 0; w < W; ++w) equal |= (uint32_t)(key_ids[w] == id) << w;
            words[n] = (words[n] & equal) | (other[n] & ~equal);
        }
    }
    uint32_t any = 0, all = ALL_LANES;
    for (int64_t n = 0; n < count; ++n) {
        words[n] &= lanes;
        any |= words[n];
        all &= words[n];
    }
    return any == 0 ? KEEP_NONE : all == ALL_LANES ? KEEP_ALL : KEEP_SOME;
}

// a where the lanes' bits are set, else 0.
PA_INLINE vf keep_lanes(vf a, uint32_t word, int j) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_mov_ps((__mmask16)(word >> (j * VL)), (__m512)a);
#else
    vi keep = ((vi{} + (int32_t)word) & lane_bits(j * VL)) != 0;
    return (vf)((vi)a & keep);
#endif
}

// s := p = exp2(factor*s - lse2), dp := p (dp - delta).
template <bool MASKED>
static void probabilities(const Block& b, float factor, const RowStats& rows) {
    const float *lse2 = rows.lse2 + b.first, *rest = rows.lse2_rest + b.first, *delta = rows.delta + b.first;
    float* __restrict s = b.s, * __restrict dp = b.dp;
    for (int64_t n = 0; n < b.count; ++n) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
            float *x = s + n * W + j * VL, *y = dp + n * W + j * VL;
            vf p = vexp2(load(x) * factor - lse2[n] - rest[n]);
            vf ds = p * (load(y) - delta[n]);
            if (MASKED) {
                p = keep_lanes(p, b.words[n], j);
                ds = keep_lanes(ds, b.words[n], j);
            }
            store(x, p);
            store(y, ds);
        }
    }
}

// The score terms of one head, and where their gradients go.
struct ScoreTerms {
    float scale, softcap, slope;
    bool has_alibi, wants_slope;
    const char* bias;  // of the head; null: none
    bool bias_is_half;
    const int64_t* bias_strides;
    float* grad_bias;  // of the head; null: not wanted
    const int64_t* grad_bias_strides;
    int64_t q_offset;
    double slope_sum;

    bool any() const { return softcap != 0.0f || has_alibi || bias != nullptr; }
};

// Distances |i - j| of a block's row n to the lanes of panel p.
PA_INLINE vf distances(const Tile& t, int64_t q_offset, int64_t row, int64_t p, int j) {
    int32_t base = (int32_t)(t.k_start - q_offset - t.q_start - t.q_step * row + t.k_step * (p * W + j * VL));
    vi lanes;
    for (int i = 0; i < VL; ++i) lanes[i] = (int32_t)t.k_step * i;
    vi distance = lanes + base;
    distance = distance < 0 ? -distance : distance;
    return __builtin_convertvector(distance, vf);
}

// s := the score in units of log2; slope_of_cap[n][lane] := the derivative of softcap.
template <class T>
static void apply_terms(const ScoreTerms& x, const Tile& t, const Block& block, float* cap) {
    int64_t first = block.first, count = block.count, p = block.p;
    float* s = block.s;
    int64_t lanes = t.keys - p * W < W ? t.keys - p * W : W;
    for (int64_t n = 0; n < count; ++n) {
        float line[W] __attribute__((aligned(64))) = {0};
        if (x.bias) {
            int64_t at = (t.q_start + t.q_step * (first + n)) * x.bias_strides[2] +
                         (t.k_start + t.k_step * p * W) * x.bias_strides[3];
            for (int64_t w = 0; w < lanes; ++w) {
                int64_t e = at + t.k_step * w * x.bias_strides[3];
                line[w] = x.bias_is_half ? T::load1((const typename T::type*)x.bias + e)
                                         : ((const float*)x.bias)[e];
            }
        }
        for (int j = 0; j < NV; ++j) {
            vf y = load(s + n * W + j * VL) * x.scale;
            if (x.softcap != 0.0f) {
                vf tanh = vtanh(y * (1.0f / x.softcap));
                store(cap + n * W + j * VL, 1.0f - tanh * tanh);
                y = tanh * x.softcap;
            }
            if (x.has_alibi) y -= distances(t, x.q_offset, first + n, p, j) * x.slope;
            y *= LOG2E;
            if (x.bias) {
                vf b = load(line + j * VL), sum = y + b * LOG2E;
                vi is_low = (vi)(sum < splat(LOWEST)) & (vi)(b >= splat(LOWEST));
                y = blend(is_low, splat(LOWEST), sum);
            }
            store(s + n * W + j * VL, y);
        }
    }
}

// From ds by the score: gradients of bias and slope, then ds by q.k (without the scale).
static void term_gradients(ScoreTerms& x, const Tile& t, const Block& block, const float* cap) {
    int64_t first = block.first, count = block.count, p = block.p;
    float* ds = block.dp;
    int64_t lanes = t.keys - p * W < W ? t.keys - p * W : W;
    vf slopes = vf{};
    for (int64_t n = 0; n < count; ++n) {
        if (x.grad_bias) {
            float* to = x.grad_bias + (t.q_start + t.q_step * (first + n)) * x.grad_bias_strides[2] +
                        (t.k_start + t.k_step * p * W) * x.grad_bias_strides[3];
            for (int64_t w = 0; w < lanes; ++w) to[t.k_step * w * x.grad_bias_strides[3]] += ds[n * W + w];
        }
        for (int j = 0; j < NV; ++j) {
            vf g = load(ds + n * W + j * VL);
            if (x.wants_slope) slopes += g * distances(t, x.q_offset, first + n, p, j);
            if (x.softcap != 0.0f) store(ds + n * W + j * VL, g * load(cap + n * W + j * VL));
        }
    }
    for (int i = 0; x.wants_slope && i < VL; ++i) x.slope_sum -= slopes[i];
}

}  // namespace PA_ISA
}  // namespace cpu
}  // namespace portattn
