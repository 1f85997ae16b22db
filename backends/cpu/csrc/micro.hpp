// The two micro-kernels, with query rows in the vector lanes. Both are the same loop:
//     acc[r][lane] += a[step][lane] * b(r, step)
// with `a` a panel ([steps][W], aligned) and `b` scalars broadcast from user memory with any strides, so that
// keys and values need no packing and any head_dim and tile length works without padding.
//   scores:  S^T[n][lane]  = sum over d of Q^T[d][lane] * K[n][d]          (r = key,      step = d)
//   values:  O^T[d][lane] := alpha[lane] * O^T[d][lane] + sum over n of P^T[n][lane] * V[n][d]  (r = d, step
//   = key)
#pragma once
#include "simd.hpp"

namespace portattn {
namespace cpu {
namespace PA_ISA {

template <int R>
__attribute__((noinline)) static void scores_tile(const float* __restrict q, const float* __restrict k,
                                                  int64_t ldk, int64_t head_dim, float* __restrict s) {
    vf acc[R][NV];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[r][j] = vf{};
#pragma GCC unroll 2
    for (int64_t d = 0; d < head_dim; ++d) {
        vf a[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) a[j] = load(q + d * W + j * VL);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            float b = k[r * ldk + d];
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) acc[r][j] += a[j] * b;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) store(s + r * W + j * VL, acc[r][j]);
}

template <int R>
__attribute__((noinline)) static void values_tile(const float* __restrict p, const float* __restrict v,
                                                  int64_t ldv, int64_t keys, float* __restrict o,
                                                  const float* __restrict alpha) {
    vf acc[R][NV];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[r][j] = vf{};
#pragma GCC unroll 2
    for (int64_t n = 0; n < keys; ++n) {
        vf a[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) a[j] = load(p + n * W + j * VL);
        const float* row = v + n * ldv;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            float b = row[r];
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) acc[r][j] += a[j] * b;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
            // Not started from alpha * O: a sum of sums over tiles rounds less than one long sum.
            float* at = o + r * W + j * VL;
            store(at, load(at) * load(alpha + j * VL) + acc[r][j]);
        }
}

typedef void (*scores_fn)(const float*, const float*, int64_t, int64_t, float*);
typedef void (*values_fn)(const float*, const float*, int64_t, int64_t, float*, const float*);

// Filled at compile time: this file must not run anything when the library is loaded.
template <int R>
struct Tables {
    static constexpr void fill(scores_fn* s, values_fn* v) {
        s[R] = scores_tile<R>;
        v[R] = values_tile<R>;
        Tables<R - 1>::fill(s, v);
    }
};
template <>
struct Tables<0> {
    static constexpr void fill(scores_fn*, values_fn*) {}
};

struct MicroKernels {
    scores_fn scores[MR + 1];
    values_fn values[MR + 1];
    constexpr MicroKernels() : scores(), values() { Tables<MR>::fill(scores, values); }
};
static constexpr MicroKernels micro;

// Cache lines to bring into the level-2 cache, some at each call of a micro-kernel: tiles that are not
// neighbours would else come from level 3 with the latency of every line.
struct Prefetch {
    const char* data;                        // null: nothing
    int64_t stride, rows, bytes, row, each;  // each: rows at one call

    void step() {
        if (!data) return;
        for (int64_t end = row + each < rows ? row + each : rows; row < end; ++row)
            for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(data + row * stride + at, 0, 2);
    }
};

// Rows of a remainder are spread evenly over the calls: 64 = 4*11 + 2*10, not 5*12 + 4, because few
// accumulators do not hide the latency of a multiply-add.
PA_INLINE void scores_panel(const float* q, const float* k, int64_t ldk, int64_t keys, int64_t head_dim,
                            float* s, Prefetch& ahead) {
    int64_t calls = (keys + MR - 1) / MR;
    for (int64_t n = 0; calls > 0; --calls) {
        int64_t rows = (keys - n + calls - 1) / calls;
        ahead.step();
        micro.scores[rows](q, k + n * ldk, ldk, head_dim, s + n * W);
        n += rows;
    }
}

PA_INLINE void values_panel(const float* p, const float* v, int64_t ldv, int64_t keys, int64_t head_dim_v,
                            float* o, const float* alpha, Prefetch& ahead) {
    int64_t calls = (head_dim_v + MR - 1) / MR;
    for (int64_t d = 0; calls > 0; --calls) {
        int64_t columns = (head_dim_v - d + calls - 1) / calls;
        ahead.step();
        micro.values[columns](p, v + d, ldv, keys, o + d * W, alpha);
        d += columns;
    }
}

}  // namespace PA_ISA
}  // namespace cpu
}  // namespace portattn
