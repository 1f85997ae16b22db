// AMX: products of bf16 tiles with float32 accumulators, 18 times the FMA rate of the same core. Values that
// bf16 does not hold are split into bf16 terms, x = x0 + x1 + x2 by truncation (exact for float32), and the
// products x_i * y_j with i + j < terms are added up: 6 products for float32 (as accurate as float32
// multiply-add), 3 for float16, whose 11 bits are two terms exactly. Henry, Tang and Heinecke, "Leveraging
// the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", 2019.
//
// Tiles are 16 rows of 64 bytes. Packed forms, all in uint16 elements (512 a tile):
//   keys    [chunk of 32 keys][2 key tiles][dim chunk of 32][term]     rows: keys, columns: dim
//   values  [chunk of 32 keys][dim tile of 16][term]                   rows: dim, columns: keys
//   query   [dim chunk of 32][term][2 row tiles]                       rows: pairs of dim, columns: query
//   rows P       [chunk of 32 keys][term][2 row tiles]                      rows: pairs of keys, columns:
//   query rows
#pragma once
#include "simd.hpp"

namespace portattn {
namespace cpu {
namespace PA_ISA {

constexpr int TILE = 512;  // uint16 elements
constexpr int CHUNK_KEYS = 32;

// How a storage type is split.
template <class T>
struct Terms;
template <>
struct Terms<Float32> {
    static constexpr int query = 3, key = 3, p = 3;
};
template <>
struct Terms<Half> {
    static constexpr int query = 2, key = 2, p = 2;
};
template <>
struct Terms<BFloat16> {
    static constexpr int query = 1, key = 1, p = 1;
};

PA_INLINE int64_t chunks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
PA_INLINE int64_t key_chunk_size(int64_t head_dim, int terms) {
    return 2 * chunks_of(head_dim, 32) * terms * TILE;
}
PA_INLINE int64_t value_chunk_size(int64_t head_dim_v, int terms) {
    return chunks_of(head_dim_v, 16) * terms * TILE;
}

PA_INLINE __m512i high_half() { return _mm512_set1_epi32((int32_t)0xffff0000); }

PA_INLINE bool not_finite(vf x) { return _mm512_fpclass_ps_mask((__m512)x, 0x99) != 0; }

// The next term of x0 (low halves) and x1 (high halves), interleaved; what is left stays in x0 and x1.
PA_INLINE __m512i next_term(vf& x0, vf& x1, bool last) {
    __m512i a = (__m512i)x0, b = (__m512i)x1, mask = high_half();
    // (b & mask) | (a >> 16)
    __m512i term = _mm512_ternarylogic_epi32(b, mask, _mm512_srli_epi32(a, 16), 0xea);
    if (!last) {
        x0 -= (vf)_mm512_and_si512(a, mask);
        x1 -= (vf)_mm512_and_si512(b, mask);
    }
    return term;
}

// Both values rounded to nearest even.
PA_INLINE __m512i rounded_pair(vf x0, vf x1) {
    alignas(64) static const uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                   21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                   11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)x1, (__m512)x0);
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), both);
}

template <class T>
PA_INLINE vf load_some(const typename T::type* p, int64_t left) {
    return left >= VL ? T::loadv(p) : left > 0 ? load_part<T>(p, (int)left) : vf{};
}

// A chunk of at most 32 keys; true if a value is not finite.
template <class T>
static bool pack_key_chunk(const typename T::type* key, int64_t stride, int64_t count, int64_t dim,
                           uint16_t* out) {
    constexpr int terms = Terms<T>::key;
    int64_t dim_chunks = chunks_of(dim, 32);
    bool bad = false;
    for (int64_t n = 0; n < CHUNK_KEYS; ++n) {
        for (int64_t c = 0; c < dim_chunks; ++c) {
            vf x[2];
            for (int h = 0; h < 2; ++h) {
                int64_t d = c * 32 + h * 16;
                x[h] = n < count ? load_some<T>(key + n * stride + d, dim - d) : vf{};
                bad |= not_finite(x[h]);
            }
            uint16_t* to = out + ((n / 16) * dim_chunks + c) * terms * TILE + (n % 16) * 32;
            for (int t = 0; t < terms; ++t) {
                for (int h = 0; h < 2; ++h) {
                    __m512i bits = (__m512i)x[h];
                    _mm256_store_si256((__m256i*)(to + t * TILE + h * 16),
                                       _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
                    x[h] -= (vf)_mm512_and_si512(bits, high_half());
                }
            }
        }
    }
    return bad;
}

// A chunk of at most 32 values, transposed; true if a value is not finite.
template <class T>
static bool pack_value_chunk(const typename T::type* value, int64_t stride, int64_t count, int64_t dim,
                             uint16_t* out) {
    constexpr int terms = Terms<T>::key;
    bool bad = false;
    for (int64_t d = 0; d < dim; d += 16) {
        vf x0[16], x1[16], t[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            x0[i] = 2 * i < count ? load_some<T>(value + 2 * i * stride + d, dim - d) : vf{};
            x1[i] = 2 * i + 1 < count ? load_some<T>(value + (2 * i + 1) * stride + d, dim - d) : vf{};
            bad |= not_finite(x0[i]) || not_finite(x1[i]);
        }
        for (int term = 0; term < terms; ++term) {
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) t[i] = (vf)next_term(x0[i], x1[i], false);
            transpose(t);
            uint16_t* to = out + ((d / 16) * terms + term) * TILE;
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 32, (__m512i)t[i]);
        }
    }
    return bad;
}

// A query panel [dim][32], already scaled; true if a value is not finite.
template <class T>
static bool pack_query(const float* panel, int64_t dim, uint16_t* out) {
    constexpr int terms = Terms<T>::query;
    bool bad = false;
    for (int64_t d = 0; d < chunks_of(dim, 32) * 32; d += 2) {
        for (int j = 0; j < 2; ++j) {
            vf x0 = d < dim ? load(panel + d * W + j * VL) : vf{};
            vf x1 = d + 1 < dim ? load(panel + (d + 1) * W + j * VL) : vf{};
            bad |= not_finite(x0) || not_finite(x1);
            for (int term = 0; term < terms; ++term)
                _mm512_store_si512(out + (((d / 32) * terms + term) * 2 + j) * TILE + (d % 32) / 2 * 32,
                                   next_term(x0, x1, term + 1 == terms));
        }
    }
    return bad;
}

PA_INLINE void load_tile_config() {
    struct alignas(64) Config {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes_per_row[16];
        uint8_t rows[16];
    } config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.bytes_per_row[i] = 64, config.rows[i] = 16;
    // GCC's intrinsic says that it reads 8 of the 64 bytes; without this the other stores may be dropped.
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
}

// Accumulators 0..3 += a (2 tiles, `a_next` apart) times b (2 tiles, TILE apart). Terms of a are TILE apart,
// terms of b 2*TILE. AT, BT: numbers of terms.
template <int AT, int BT>
PA_INLINE void add_products(const uint16_t* a, int64_t a_next, const uint16_t* b) {
    constexpr int most = AT > BT ? AT : BT;
#pragma GCC unroll 3
    for (int i = 0; i < AT; ++i) {
        _tile_loadd(4, a + i * TILE, 64);
        _tile_loadd(5, a + a_next + i * TILE, 64);
#pragma GCC unroll 3
        for (int j = 0; j < BT; ++j) {
            if (i + j >= most) continue;
            _tile_loadd(6, b + j * 2 * TILE, 64);
            _tile_loadd(7, b + (j * 2 + 1) * TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}

// s[n][lane] for `chunks` chunks of 32 keys, wherever they lie.
template <class T>
__attribute__((noinline)) static void amx_scores(const uint16_t* const* keys, const uint16_t* query,
                                                 int64_t chunks, int64_t dim, float* s) {
    constexpr int kt = Terms<T>::key, qt = Terms<T>::query;
    int64_t dim_chunks = chunks_of(dim, 32);
    for (int64_t c = 0; c < chunks; ++c, s += CHUNK_KEYS * W) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        const uint16_t* a = keys[c];
        for (int64_t d = 0; d < dim_chunks; ++d)
            add_products<kt, qt>(a + d * kt * TILE, dim_chunks * kt * TILE, query + d * qt * 2 * TILE);
        _tile_stored(0, s, W * 4);
        _tile_stored(1, s + 16, W * 4);
        _tile_stored(2, s + 16 * W, W * 4);
        _tile_stored(3, s + 16 * W + 16, W * 4);
    }
}

// o[d][lane] += values^T P^T. `spare`: [32][W], for dims that do not fill two tiles.
template <class T>
__attribute__((noinline)) static void amx_values(const uint16_t* const* values, const uint16_t* p,
                                                 int64_t chunks, int64_t dim, float* o, float* spare) {
    constexpr int vt = Terms<T>::key, pt = Terms<T>::p;
    int64_t dim_tiles = chunks_of(dim, 16);
    for (int64_t d = 0; d < dim_tiles; d += 2) {
        int64_t left = dim - d * 16;
        float* acc = left < 32 ? spare : o + d * 16 * W;
        if (left < 32) {
            memset(spare, 0, sizeof(float) * 32 * W);
            memcpy(spare, o + d * 16 * W, sizeof(float) * (size_t)left * W);
        }
        // Without a second tile its products go to accumulators that nobody reads.
        int64_t next = d + 1 < dim_tiles ? vt * TILE : 0;
        _tile_loadd(0, acc, W * 4);
        _tile_loadd(1, acc + 16, W * 4);
        _tile_loadd(2, acc + 16 * W, W * 4);
        _tile_loadd(3, acc + 16 * W + 16, W * 4);
        for (int64_t c = 0; c < chunks; ++c)
            add_products<vt, pt>(values[c] + d * vt * TILE, next, p + c * pt * 2 * TILE);
        _tile_stored(0, acc, W * 4);
        _tile_stored(1, acc + 16, W * 4);
        _tile_stored(2, acc + 16 * W, W * 4);
        _tile_stored(3, acc + 16 * W + 16, W * 4);
        if (left < 32) memcpy(o + d * 16 * W, spare, sizeof(float) * (size_t)left * W);
    }
}

}  // namespace PA_ISA
}  // namespace cpu
}  // namespace portattn
