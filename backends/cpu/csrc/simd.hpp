// Vectors of float32 for one instruction set. Included by the isa_*.cpp files only; PA_ISA is their
// namespace. Nothing of the C++ standard library may be used here: an inline function of it, compiled for
// AVX-512 and merged by the linker, would crash older CPUs.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace portattn {
namespace cpu {
namespace PA_ISA {

// VL floats in a vector, NV vectors in a panel, MR rows in a micro-kernel: MR*NV accumulators, NV operands
// and a broadcast must fit the register file (32 for AVX-512 and NEON, else 16).
#if defined(__AVX512F__)
constexpr int VL = 16, NV = 2, MR = 12;
#elif defined(__AVX2__)
constexpr int VL = 8, NV = 2, MR = 6;
#elif defined(__aarch64__)
constexpr int VL = 4, NV = 4, MR = 6;
#else
constexpr int VL = 4, NV = 4, MR = 2;
#endif
constexpr int W = VL * NV;  // query rows in a panel

#define PA_INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(VL * 4), may_alias));
typedef int32_t vi __attribute__((vector_size(VL * 4), may_alias));
typedef float vfu __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint16_t vhu __attribute__((vector_size(VL * 2), aligned(2), may_alias));
typedef uint32_t vu __attribute__((vector_size(VL * 4), may_alias));

constexpr float LOG2E = 1.44269504088896341f;
constexpr float LN2 = 0.693147180559945309f;
// Running maximum of a row that has seen nothing: finite, so that -inf scores become exact zeros, and the
// lowest, so that rows whose scores are all finfo.min still get their uniform weights.
constexpr float LOWEST = -3.40282347e+38f;

PA_INLINE vf load(const float* p) { return *(const vf*)p; }
PA_INLINE vf loadu(const float* p) { return *(const vfu*)p; }
PA_INLINE void store(float* p, vf v) { *(vf*)p = v; }
PA_INLINE void storeu(float* p, vf v) { *(vfu*)p = v; }
PA_INLINE vf splat(float x) { return vf{} + x; }

PA_INLINE float sum_of(vf v) {
    float s = 0.0f;
    for (int i = 0; i < VL; ++i) s += v[i];
    return s;
}

// max(a, b); b if either is NaN.
PA_INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
    return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
    return a > b ? a : b;
#endif
}

// 2^x for x <= 127: relative error 1.5e-7; exact 0 at -inf; NaN stays NaN. Minimax polynomials of degree 5 on
// [0, 1) and [-0.5, 0.5] with the constant term 1.
PA_INLINE vf vexp2(vf x) {
#if defined(__AVX512DQ__)
    vf f = (vf)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x); 0 at -inf
    vf p = splat(1.867130399e-03f);
    p = p * f + 9.017029777e-03f;
    p = p * f + 5.579991266e-02f;
    p = p * f + 2.401644439e-01f;
    p = p * f + 6.931512952e-01f;
    p = p * f + 1.0f;
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    x = vmax(splat(-127.0f), x);
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    vf t = x + magic;
    vf f = x - (t - magic);
    vi n = ((vi)t) << 23;
    vf e = (vf)(n + 0x3f800000);  // 2^n; 0 at n == -127
    vf p = splat(1.326472731e-03f);
    p = p * f + 9.671512991e-03f;
    p = p * f + 5.550733581e-02f;
    p = p * f + 2.402224243e-01f;
    p = p * f + 6.931470037e-01f;
    p = p * f + 1.0f;
    return p * e;
#endif
}

// tanh(x): x + x^3 P(x^2) near 0 (minimax, 1.5e-9), else 1 - 2/(e^2x + 1).
PA_INLINE vf vtanh(vf x) {
    vf a = (vf)((vi)x & 0x7fffffff);
    vf z = x * x;
    vf p = splat(2.299441956e-03f);
    p = p * z - 8.350543678e-03f;
    p = p * z + 2.177120373e-02f;
    p = p * z - 5.395958573e-02f;
    p = p * z + 1.333330572e-01f;
    p = p * z - 3.333333433e-01f;
    vf near = x + x * z * p;
    vf far = 1.0f - 2.0f / (vexp2(vmax(splat(-40.0f), -a) * (-2.0f * LOG2E)) + 1.0f);
    far = (vf)((vi)far | ((vi)x & (int32_t)0x80000000));
    vi small = a < 0.625f;
    vf y = (vf)(((vi)near & small) | ((vi)far & ~small));
    return (vf)(((vi)y & (vi)(x == x)) | ((vi)x & (vi)(x != x)));
}

PA_INLINE float bf16_to_float(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

PA_INLINE uint16_t float_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (f != f) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

PA_INLINE float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff, bits;
    float f;
    if (exponent == 0) {
        f = (float)mantissa * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -f : f;
    }
    bits = sign | ((exponent == 31 ? 255u : exponent + 112) << 23) | (mantissa << 13);
    memcpy(&f, &bits, 4);
    return f;
}

PA_INLINE uint16_t float_to_half(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) {  // subnormal in half: let the float adder round at 2^-24
        float a;
        memcpy(&a, &magnitude, 4);
        a += 0.5f;
        uint32_t r;
        memcpy(&r, &a, 4);
        return (uint16_t)(sign | (r - 0x3f000000));
    }
    uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    return (uint16_t)(sign | ((rounded - 0x38000000) >> 13));
}

// Storage types: Float32, Half, BFloat16; `load1` one element, `loadv` VL of them, as float.
struct Float32 {
    typedef float type;
    PA_INLINE float load1(const float* p) { return *p; }
    PA_INLINE vf loadv(const float* p) { return loadu(p); }
    PA_INLINE void store1(float* p, float x) { *p = x; }
    PA_INLINE void storev(float* p, vf v) { storeu(p, v); }
};

struct BFloat16 {
    typedef uint16_t type;
    PA_INLINE float load1(const uint16_t* p) { return bf16_to_float(*p); }
    PA_INLINE vf loadv(const uint16_t* p) { return (vf)(__builtin_convertvector(*(const vhu*)p, vu) << 16); }
    PA_INLINE void store1(uint16_t* p, float x) { *p = float_to_bf16(x); }
    PA_INLINE void storev(uint16_t* p, vf v) {
        vu bits = (vu)v;
        vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (bits >> 16) | 0x40;
        vu is_nan = (vu)(v != v);
        *(vhu*)p = __builtin_convertvector((nan & is_nan) | (rounded & ~is_nan), vhu);
    }
};

struct Half {
    typedef uint16_t type;
    PA_INLINE float load1(const uint16_t* p) { return half_to_float(*p); }
    PA_INLINE vf loadv(const uint16_t* p) {
#if defined(__AVX512F__)
        return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
        return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
        vf r;
        for (int i = 0; i < VL; ++i) r[i] = half_to_float(p[i]);
        return r;
#endif
    }
    PA_INLINE void store1(uint16_t* p, float x) { *p = float_to_half(x); }
    PA_INLINE void storev(uint16_t* p, vf v) {
#if defined(__AVX512F__)
        _mm256_storeu_si256((__m256i*)p,
                            _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
        _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
        for (int i = 0; i < VL; ++i) p[i] = float_to_half(v[i]);
#endif
    }
};

// The first `count` < VL elements, zeros behind them.
template <class T>
PA_INLINE vf load_part(const typename T::type* p, int count) {
    float t[VL] __attribute__((aligned(64))) = {0};
    for (int i = 0; i < count; ++i) t[i] = T::load1(p + i);
    return load(t);
}

// In-place transpose of VL vectors, by log2(VL) rounds of pairwise shuffles.
template <int H>
PA_INLINE void transpose_round(vf* v) {
    vi low, high;
    for (int i = 0; i < VL; ++i) {
        low[i] = (i & H) ? (i ^ H) + VL : i;
        high[i] = (i & H) ? i + VL : (i ^ H);
    }
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) {
        if (i & H) continue;
        vf a = v[i], b = v[i + H];
        v[i] = __builtin_shuffle(a, b, low);
        v[i + H] = __builtin_shuffle(a, b, high);
    }
}

PA_INLINE void transpose(vf* v) {
    transpose_round<1>(v);
    transpose_round<2>(v);
#if defined(__AVX512F__) || defined(__AVX2__)
    transpose_round<4>(v);
#endif
#if defined(__AVX512F__)
    transpose_round<8>(v);
#endif
}

}  // namespace PA_ISA
}  // namespace cpu
}  // namespace portattn
