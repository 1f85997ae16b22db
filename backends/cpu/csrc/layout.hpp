// Between rows in memory and panels ([d][W], query rows in the lanes), and copies of key and value tiles.
#pragma once
#include "simd.hpp"

namespace portattn {
namespace cpu {
namespace PA_ISA {

// panel[d][w] = factor * row w's element d, rows at src + w*stride; lanes past `rows` get 0.
template <class T>
static void pack_panel(const typename T::type* src, int64_t stride, int64_t rows, int64_t dim, float factor,
                       float* panel) {
    for (int j = 0; j < NV; ++j) {
        int64_t first = j * VL, count = rows - first < VL ? rows - first : VL;
        int64_t d = 0;
        for (; d < dim; d += VL) {
            vf t[VL];
#pragma GCC unroll 16
            for (int i = 0; i < VL; ++i) {
                if (i < count)
                    t[i] = d + VL <= dim ? T::loadv(src + (first + i) * stride + d)
                                         : load_part<T>(src + (first + i) * stride + d, (int)(dim - d));
                else
                    t[i] = vf{};
            }
            transpose(t);
            int64_t lines = dim - d < VL ? dim - d : VL;
            if (lines == VL) {
#pragma GCC unroll 16
                for (int i = 0; i < VL; ++i) store(panel + (d + i) * W + first, t[i] * factor);
            } else {
                for (int i = 0; i < lines; ++i) store(panel + (d + i) * W + first, t[i] * factor);
            }
        }
    }
}

template <class T>
PA_INLINE void store_vector(typename T::type* p, vf v, int64_t count) {
    if (count >= VL) {
        T::storev(p, v);
        return;
    }
    float t[VL] __attribute__((aligned(64)));
    store(t, v);
    for (int64_t i = 0; i < count; ++i) T::store1(p + i, t[i]);
}

// row w's element d = panel[d][w] * factor[w]; only the first `rows` rows.
template <class T>
static void unpack_panel(const float* panel, const float* factor, int64_t rows, int64_t dim,
                         typename T::type* dst, int64_t stride) {
    for (int j = 0; j < NV; ++j) {
        int64_t first = j * VL, count = rows - first < VL ? rows - first : VL;
        if (count <= 0) return;
        vf scale = load(factor + first);
        for (int64_t d = 0; d < dim; d += VL) {
            vf t[VL];
#pragma GCC unroll 16
            for (int i = 0; i < VL; ++i)
                t[i] = d + i < dim ? load(panel + (d + i) * W + first) * scale : vf{};
            transpose(t);
            for (int64_t i = 0; i < count; ++i)
                store_vector<T>(dst + (first + i) * stride + d, t[i], dim - d);
        }
    }
}

// dst[n][0:dim] as float32, rows `ld` floats apart.
template <class T>
static void copy_rows(const typename T::type* src, int64_t stride, int64_t rows, int64_t dim, float* dst,
                      int64_t ld) {
    for (int64_t n = 0; n < rows; ++n) {
        const typename T::type* p = src + n * stride;
        float* q = dst + n * ld;
        int64_t d = 0;
        for (; d + VL <= dim; d += VL) storeu(q + d, T::loadv(p + d));
        for (; d < dim; ++d) q[d] = T::load1(p + d);
    }
}

}  // namespace PA_ISA
}  // namespace cpu
}  // namespace portattn
