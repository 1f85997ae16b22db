// What happens to a panel of scores s[n][lane] between the two products: score terms, mask, online softmax.
// Scores are in units of log2: softmax is computed with exp2 (Dao et al., FlashAttention, 2022; the running
// maximum and sum are those of Milakov and Gimelshein, 2018).
#pragma once
#include "call.hpp"
#include "simd.hpp"
#include "walk.hpp"

namespace portattn {
namespace cpu {
namespace PA_ISA {

// A panel's query rows: q_start + q_step*lane.
struct PanelRows {
    int64_t q_start, q_step, count;  // count <= W rows exist
    int64_t group;                   // first group of 16 rows inside the query tile
};

PA_INLINE vf blend(vi keep, vf a, vf b) { return (vf)(((vi)a & keep) | ((vi)b & ~keep)); }

static void scale_scores(float* s, int64_t keys, float factor) {
    for (int64_t i = 0; i < keys * W; i += VL) store(s + i, load(s + i) * factor);
}

// s := softcap(s), s - slope |i - j|, + bias, in this order.
static void add_softcap(float* s, int64_t keys, float softcap) {
    float inverse = 1.0f / softcap, factor = softcap * LOG2E;
    for (int64_t i = 0; i < keys * W; i += VL) store(s + i, vtanh(load(s + i) * inverse) * factor);
}

static void add_alibi(float* s, int64_t keys, const Keys& k, int64_t n0, const PanelRows& rows,
                      int64_t q_offset, float slope) {
    vi lanes[NV];
    for (int j = 0; j < NV; ++j)
        for (int i = 0; i < VL; ++i)
            lanes[j][i] = (int32_t)(q_offset + rows.q_start + rows.q_step * (j * VL + i));
    float factor = slope * LOG2E;
    for (int64_t n = 0; n < keys; ++n) {
        int32_t key = (int32_t)(k.start + k.step * (n0 + n));
        for (int j = 0; j < NV; ++j) {
            vi distance = lanes[j] - key;
            distance = distance < 0 ? -distance : distance;
            vf x = load(s + n * W + j * VL);
            store(s + n * W + j * VL, x - __builtin_convertvector(distance, vf) * factor);
        }
    }
}

// bias: element (row 0 of the panel, key n0). Finite values are kept finite: finfo.min times log2(e) is -inf.
template <class B>
static void add_bias(float* s, int64_t keys, const typename B::type* bias, int64_t row_stride,
                     int64_t key_stride, int64_t rows, float* line) {
    for (int64_t n = 0; n < keys; ++n) {
        const typename B::type* p = bias + n * key_stride;
        for (int64_t w = 0; w < rows; ++w) line[w] = B::load1(p + w * row_stride);
        for (int j = 0; j < NV; ++j) {
            vf x = load(line + j * VL);
            vf y = load(s + n * W + j * VL) + x * LOG2E;
            vi is_low = (vi)(y < splat(LOWEST)) & (vi)(x >= splat(LOWEST));
            store(s + n * W + j * VL, blend(is_low, splat(LOWEST), y));
        }
    }
}

PA_INLINE vi lane_bits(int shift) {
    vi bits;
    for (int i = 0; i < VL; ++i) bits[i] = 1 << (shift + i);
    return bits;
}

PA_INLINE void mask_vector(float* s, uint16_t bits, int shift, vi lanes) {
#if defined(__AVX512F__)
    (void)shift;
    (void)lanes;
    __m512 low = _mm512_set1_ps(-__builtin_inff());
    _mm512_store_ps(s, _mm512_mask_mov_ps(low, (__mmask16)bits, _mm512_load_ps(s)));
#else
    (void)shift;
    vi keep = ((vi{} + (int32_t)bits) & lanes) != 0;
    store(s, blend(keep, load(s), splat(-__builtin_inff())));
#endif
}

// Bits by key of group g of a tile: bits[n] for key n, or null for all / none.
PA_INLINE const uint16_t* group_bits(const Call& call, int32_t tile, int64_t g) {
    int64_t groups = (call.plan->block_q + 15) / 16;
    return tile < 0 ? nullptr : call.bits_by_key + ((int64_t)tile * groups + g) * call.plan->block_k;
}

static void apply_bits(float* s, int64_t keys, const Call& call, const Keys& k, int64_t n0, int64_t group) {
    for (int j = 0; j < NV; ++j) {
        const uint16_t* bits = group_bits(call, k.bits_same, group + j * VL / 16) + n0;
        int shift = j * VL % 16;
        vi lanes = lane_bits(shift);
        for (int64_t n = 0; n < keys; ++n) mask_vector(s + n * W + j * VL, bits[n], shift, lanes);
    }
}

// Ids of the panel's rows; rows that do not exist get -1, which equals no key.
PA_INLINE void load_ids(const Call& call, const PanelRows& rows, int64_t id_row, int32_t* ids) {
    const int32_t* q_ids = call.plan->q_ids + id_row * call.plan->seqlen_q;
    for (int64_t w = 0; w < W; ++w) ids[w] = w < rows.count ? q_ids[rows.q_start + rows.q_step * w] : -1;
}

static void apply_ids(float* s, int64_t keys, const Call& call, const Keys& k, int64_t n0, int64_t group,
                      const int32_t* ids, const int32_t* k_ids) {
    for (int j = 0; j < NV; ++j) {
        const uint16_t* same = group_bits(call, k.bits_same, group + j * VL / 16);
        const uint16_t* other = group_bits(call, k.bits_other, group + j * VL / 16);
        int32_t same_all = k.bits_same == PA_BITS_FULL ? 0xffff : 0,
                other_all = k.bits_other == PA_BITS_FULL ? 0xffff : 0;
        vi lanes = lane_bits(j * VL % 16), rows;
        memcpy(&rows, ids + j * VL, sizeof(vi));
        for (int64_t n = 0; n < keys; ++n) {
            int32_t id = k_ids[k.start + k.step * (n0 + n)];
            vi equal = rows == (vi{} + (id < 0 ? -2 : id));
            vi keep_same = ((vi{} + (same ? same[n0 + n] : same_all)) & lanes) != 0;
            vi keep_other = ((vi{} + (other ? other[n0 + n] : other_all)) & lanes) != 0;
            vi keep = (equal & keep_same) | (~equal & keep_other);
            float* p = s + n * W + j * VL;
            store(p, blend(keep, load(p), splat(-__builtin_inff())));
        }
    }
}

// The keys [*n0, *n1) outside which the panel keeps nothing.
static void kept_range(const Call& call, const Keys& k, int64_t group, int64_t* n0, int64_t* n1) {
    int64_t groups = (call.plan->block_q + 15) / 16, first = k.count, last = 0;
    int32_t tiles[2] = {k.bits_same, k.bits_other};
    for (int t = 0; t < (tiles[0] == tiles[1] ? 1 : 2); ++t) {
        if (tiles[t] == PA_BITS_EMPTY) continue;
        if (tiles[t] == PA_BITS_FULL) {
            first = 0;
            last = k.count;
            break;
        }
        for (int64_t g = group; g < group + (W + 15) / 16 && g < groups; ++g) {
            const int32_t* range = call.plan->bit_ranges + ((int64_t)tiles[t] * groups + g) * 2;
            if (range[0] >= range[1]) continue;
            if (range[0] < first) first = range[0];
            if (range[1] > last) last = range[1];
        }
    }
    *n0 = first;
    *n1 = last < k.count ? last : k.count;
}

// Narrows [*n0, *n1) to the keys whose id is one of the panel's, when other ids keep nothing.
static void id_range(const Keys& k, const int32_t* ids, const int32_t* k_ids, int64_t* n0, int64_t* n1) {
    auto visible = [&](int64_t n) {
        int32_t id = k_ids[k.start + k.step * n];
        for (int w = 0; w < W; ++w)
            if (ids[w] == id && id >= 0) return true;
        return false;
    };
    while (*n0 < *n1 && !visible(*n0)) ++*n0;
    while (*n0 < *n1 && !visible(*n1 - 1)) --*n1;
}

// s := exp2(s - max), and the rows' running maximum m, sum l, and the factor alpha of their earlier output.
// A NaN passes by the maximum (vmax keeps its second operand) and through exp2 into the sum and the output.
static void softmax_panel(float* __restrict s, int64_t keys, float* __restrict m, float* __restrict l,
                          float* __restrict alpha) {
    vf max0[NV], max1[NV], sum[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) max0[j] = max1[j] = load(m + j * VL);
    int64_t n = 0;
    for (; n + 2 <= keys; n += 2) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
            max0[j] = vmax(load(s + n * W + j * VL), max0[j]);
            max1[j] = vmax(load(s + (n + 1) * W + j * VL), max1[j]);
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
        if (n < keys) max0[j] = vmax(load(s + n * W + j * VL), max0[j]);
        max0[j] = vmax(max0[j], max1[j]);
        store(alpha + j * VL, vexp2(load(m + j * VL) - max0[j]));
        store(m + j * VL, max0[j]);
        sum[j] = vf{};
    }
#pragma GCC unroll 2
    for (n = 0; n < keys; ++n) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
            vf e = vexp2(load(s + n * W + j * VL) - max0[j]);
            sum[j] += e;
            store(s + n * W + j * VL, e);
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(l + j * VL, load(l + j * VL) * load(alpha + j * VL) + sum[j]);
}

}  // namespace PA_ISA
}  // namespace cpu
}  // namespace portattn
