// The backward's products by float32 multiply-adds; what BackwardRun (backward.hpp) asks of an Engine.
#pragma once
#include "backward_terms.hpp"
#include "forward.hpp"
#include "layout.hpp"
#include "micro.hpp"

namespace portattn {
namespace cpu {
namespace PA_ISA {

// Scratch memory, taken piece by piece; base null: only counted.
struct Carver {
    char* base;
    int64_t bytes = 0;

    template <class X>
    X* take(int64_t count) {
        X* at = reinterpret_cast<X*>(base + bytes);
        bytes += round_up(count * (int64_t)sizeof(X), 64);
        return at;
    }
};

// out[r][lane of chunk c] += sum over key of ds[r][key] * k[key][lane], rows `ld` floats apart.
template <int R>
__attribute__((noinline)) static void queries_tile(const float* __restrict k, const float* __restrict ds,
                                                   int64_t keys, float* __restrict out, int64_t ld) {
    vf acc[R][NV];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[r][j] = vf{};
#pragma GCC unroll 2
    for (int64_t n = 0; n < keys; ++n) {
        vf a[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) a[j] = load(k + n * W + j * VL);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            float b = ds[r * W + n];
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) acc[r][j] += a[j] * b;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
            float* at = out + r * ld + j * VL;
            storeu(at, loadu(at) + acc[r][j]);
        }
}

typedef void (*queries_fn)(const float*, const float*, int64_t, float*, int64_t);
template <int R>
struct QueryTables {
    static constexpr void fill(queries_fn* f) {
        f[R] = queries_tile<R>;
        QueryTables<R - 1>::fill(f);
    }
};
template <>
struct QueryTables<0> {
    static constexpr void fill(queries_fn*) {}
};
struct QueryKernels {
    queries_fn rows[MR + 1];
    constexpr QueryKernels() : rows() { QueryTables<MR>::fill(rows); }
};
static constexpr QueryKernels query_kernels;

// The products by float32 multiply-adds. Panels of keys are [dim][W]; P and dS are [row][W] in place.
template <class T>
class FmaEngine {
  public:
    typedef typename T::type type;

    FmaEngine(const BackwardCall& call, Carver& memory) : a_(call.args), rows_(call.max_tile_rows) {
        panels_ = call.plan->block_k / W;
        columns_ = call.query_ld / W;
        key_ = memory.take<float>(panels_ * a_.head_dim * W);
        value_ = memory.take<float>(panels_ * a_.head_dim_v * W);
        key_rows_ = memory.take<float>(panels_ * columns_ * W * W);
        grad_key_ = memory.take<float>(panels_ * a_.head_dim * W);
        grad_value_ = memory.take<float>(panels_ * a_.head_dim_v * W);
        p_ = memory.take<float>(2 * rows_ * W);
        ds_ = memory.take<float>(panels_ * rows_ * W);
        q_copy_ = memory.take<float>(sizeof(type) == 4 ? 0 : rows_ * padded(a_.head_dim));
        o_copy_ = memory.take<float>(sizeof(type) == 4 ? 0 : rows_ * padded(a_.head_dim_v));
        ones_ = memory.take<float>(W);
    }

    void begin_keys(const type* key, int64_t key_stride, const type* value, int64_t value_stride,
                    int64_t keys) {
        for (int j = 0; j < NV; ++j) store(ones_ + j * VL, splat(1.0f));
        for (int64_t p = 0; p * W < keys; ++p) {
            int64_t count = keys - p * W < W ? keys - p * W : W;
            pack_panel<T>(key + p * W * key_stride, key_stride, count, a_.head_dim, 1.0f,
                          key_ + p * a_.head_dim * W);
            pack_panel<T>(value + p * W * value_stride, value_stride, count, a_.head_dim_v, 1.0f,
                          value_ + p * a_.head_dim_v * W);
            for (int64_t c = 0; c < columns_; ++c)
                copy_columns(key + p * W * key_stride + c * W, key_stride, count, a_.head_dim - c * W,
                             key_rows_ + (p * columns_ + c) * W * W);
        }
        int64_t used = (keys + W - 1) / W * W;
        memset(grad_key_, 0, sizeof(float) * (size_t)(used * a_.head_dim));
        memset(grad_value_, 0, sizeof(float) * (size_t)(used * a_.head_dim_v));
    }

    void begin_rows(const type* query, int64_t q_stride, const type* grad, int64_t o_stride, int64_t count) {
        if (sizeof(type) == 4) {
            q_ = (const float*)query, q_stride_ = q_stride;
            o_ = (const float*)grad, o_stride_ = o_stride;
            return;
        }
        q_ = q_copy_, q_stride_ = padded(a_.head_dim);
        o_ = o_copy_, o_stride_ = padded(a_.head_dim_v);
        copy_rows<T>(query, q_stride, count, a_.head_dim, q_copy_, q_stride_);
        copy_rows<T>(grad, o_stride, count, a_.head_dim_v, o_copy_, o_stride_);
    }

    // Scores and dP of a block.
    void products(Block& x) {
        Prefetch none{nullptr, 0, 0, 0, 0, 0};
        x.s = panel_weights(x.turn) + x.first * W;
        x.dp = ds_ + (x.p * rows_ + x.first) * W;
        scores_panel(key_ + x.p * a_.head_dim * W, q_ + x.first * q_stride_, q_stride_, x.count, a_.head_dim,
                     x.s, none);
        scores_panel(value_ + x.p * a_.head_dim_v * W, o_ + x.first * o_stride_, o_stride_, x.count,
                     a_.head_dim_v, x.dp, none);
    }

    // P and dS of a block without score terms, as the sums below want them.
    template <bool MASKED>
    void weights(const Block& x, float factor, const RowStats& rows) {
        probabilities<MASKED>(x, factor, rows);
    }

    // The same where P and dS stand in x.s and x.dp.
    void keep(const Block&) {}

    // dK and dV of the panel of x, from the blocks that the bits of `blocks` name.
    void add_keys(const Block& x, int64_t count, uint64_t blocks) {
        Prefetch none{nullptr, 0, 0, 0, 0, 0};
        const int64_t p = x.p;
        for (int64_t begin = 0; begin * BLOCK_ROWS < count;) {
            if (!(blocks >> begin & 1)) {
                ++begin;
                continue;
            }
            int64_t end = begin;
            while (end * BLOCK_ROWS < count && (blocks >> end & 1)) ++end;
            int64_t first = begin * BLOCK_ROWS, last = end * BLOCK_ROWS < count ? end * BLOCK_ROWS : count;
            values_panel(panel_weights(x.turn) + first * W, o_ + first * o_stride_, o_stride_, last - first,
                         a_.head_dim_v, grad_value_ + p * a_.head_dim_v * W, ones_, none);
            values_panel(ds_ + (p * rows_ + first) * W, q_ + first * q_stride_, q_stride_, last - first,
                         a_.head_dim, grad_key_ + p * a_.head_dim * W, ones_, none);
            begin = end;
        }
    }

    // out[row][0 : query_ld] += dS K for the rows first .. first + count; blocks: of each panel.
    void add_queries(int64_t first, int64_t count, int64_t keys, const uint64_t* blocks, float* out,
                     int64_t ld) {
        for (int64_t p = 0; p * W < keys; ++p) {
            if (!(blocks[p] >> (first / BLOCK_ROWS) & 1)) continue;
            int64_t lanes = keys - p * W < W ? keys - p * W : W;
            const float* ds = ds_ + (p * rows_ + first) * W;
            for (int64_t c = 0; c < columns_; ++c) {
                const float* k = key_rows_ + (p * columns_ + c) * W * W;
                int64_t calls = (count + MR - 1) / MR;
                for (int64_t n = 0; calls > 0; --calls) {
                    int64_t rows = (count - n + calls - 1) / calls;
                    query_kernels.rows[rows](k, ds + n * W, lanes, out + n * ld + c * W, ld);
                    n += rows;
                }
            }
        }
    }

    // Panels [dim][W] of panel p.
    const float* grad_key(int64_t p) const { return grad_key_ + p * a_.head_dim * W; }
    const float* grad_value(int64_t p) const { return grad_value_ + p * a_.head_dim_v * W; }

  private:
    // Blocks of two panels are worked on at once.
    float* panel_weights(int turn) const { return p_ + turn * rows_ * W; }

    // to[n][0:W] = W elements of row n, 0 behind `dims`.
    static void copy_columns(const type* from, int64_t stride, int64_t rows, int64_t dims, float* to) {
        for (int64_t n = 0; n < rows; ++n)
            for (int j = 0; j < NV; ++j) {
                int64_t left = dims - j * VL;
                const type* p = from + n * stride + j * VL;
                store(to + n * W + j * VL, left >= VL ? T::loadv(p)
                                           : left > 0 ? load_part<T>(p, (int)left)
                                                      : vf{});
            }
    }

    const pa_cpu_backward_args& a_;
    int64_t rows_, panels_, columns_, q_stride_, o_stride_;
    float *key_, *value_, *key_rows_, *grad_key_, *grad_value_, *p_, *ds_, *q_copy_, *o_copy_, *ones_;
    const float *q_, *o_;
};

}  // namespace PA_ISA
}  // namespace cpu
}  // namespace portattn
