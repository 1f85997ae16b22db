// The backward's products on bf16 tiles (amx_tiles.hpp), 32 query rows by 32 keys at a time. Packed forms, in
// tiles of 16 rows of 64 bytes, terms side by side where not said otherwise:
//   query, grad_output   [32 rows][dim chunk of 32][term][2 row tiles]   rows: queries, columns: dim      (S,
//   dP) the same, transposed [32 rows][dim tile of 16][term]                 rows: dim, columns: queries (dK,
//   dV) keys, values         [panel][dim chunk of 32][term][2 key tiles]     rows: pairs of dim, columns:
//   keys (S, dP) keys                 [panel][dim tile of 16][term]                   rows: pairs of keys,
//   columns: dim (dQ) P, dS                [32 rows][term][2 key tiles]                    rows: pairs of
//   queries, columns: keys dS                   [panel][32 rows][term][2 row tiles]             rows:
//   queries, columns: keys      (dQ)
#pragma once
#include "amx_tiles.hpp"
#include "backward.hpp"

namespace portattn {
namespace cpu {
namespace PA_ISA {

// Accumulators 0 to 3 += a (2 tiles, a_next apart) times b (2 tiles, b_next apart), terms a_term and b_term
// apart; products of terms i + j < TERMS.
template <int TERMS>
PA_INLINE void add_terms(const uint16_t* a, int64_t a_next, int64_t a_term, const uint16_t* b, int64_t b_next,
                         int64_t b_term) {
#pragma GCC unroll 3
    for (int i = 0; i < TERMS; ++i) {
        _tile_loadd(4, a + i * a_term, 64);
        _tile_loadd(5, a + a_next + i * a_term, 64);
#pragma GCC unroll 3
        for (int j = 0; j < TERMS; ++j) {
            if (i + j >= TERMS) continue;
            _tile_loadd(6, b + j * b_term, 64);
            _tile_loadd(7, b + b_next + j * b_term, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}

PA_INLINE void zero_tiles() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// 32 by 32 floats, rows `ld` floats apart.
PA_INLINE void load_tiles(const float* from, int64_t ld) {
    _tile_loadd(0, from, ld * 4);
    _tile_loadd(1, from + 16, ld * 4);
    _tile_loadd(2, from + 16 * ld, ld * 4);
    _tile_loadd(3, from + 16 * ld + 16, ld * 4);
}

PA_INLINE void store_tiles(float* to, int64_t ld) {
    _tile_stored(0, to, ld * 4);
    _tile_stored(1, to + 16, ld * 4);
    _tile_stored(2, to + 16 * ld, ld * 4);
    _tile_stored(3, to + 16 * ld + 16, ld * 4);
}

// The next bf16 term of two vectors, side by side: lanes of x0, then of x1. What is left stays in them.
PA_INLINE __m512i next_term_in_line(vf& x0, vf& x1, bool last) {
    __m512i a = (__m512i)x0, b = (__m512i)x1;
    __m512i term = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16))),
                                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(b, 16)), 1);
    if (!last) {
        x0 -= (vf)_mm512_and_si512(a, high_half());
        x1 -= (vf)_mm512_and_si512(b, high_half());
    }
    return term;
}

template <int TERMS>
PA_INLINE __m512i term_in_line(vf& x0, vf& x1, int term) {
    if (TERMS == 1) return (__m512i)_mm512_cvtne2ps_pbh((__m512)x1, (__m512)x0);
    return next_term_in_line(x0, x1, term + 1 == TERMS);
}

template <int TERMS>
PA_INLINE __m512i term_in_pairs(vf& x0, vf& x1, int term) {
    if (TERMS == 1) return rounded_pair(x0, x1);
    return next_term(x0, x1, term + 1 == TERMS);
}

template <class T>
class AmxEngine {
  public:
    typedef typename T::type type;
    static constexpr int TERMS = Terms<T>::p;
    static constexpr float C3[] = {6.951168245e-01f, 2.276448219e-01f, 7.706719743e-02f};  // to 8.6e-5
    static constexpr float C4[] = {6.930448433e-01f, 2.412802175e-01f, 5.224244696e-02f,
                                   1.342670125e-02f};  // to 2.9e-6

    AmxEngine(const BackwardCall& call, Carver& memory) : a_(call.args) {
        panels_ = call.plan->block_k / W;
        blocks_ = call.max_tile_rows / BLOCK_ROWS;
        dims_ = chunks_of(a_.head_dim, 32), dims_v_ = chunks_of(a_.head_dim_v, 32);
        q_ = memory.take<uint16_t>(blocks_ * line_size(dims_));
        q_turned_ = memory.take<uint16_t>(blocks_ * line_size(dims_));
        o_ = memory.take<uint16_t>(blocks_ * line_size(dims_v_));
        o_turned_ = memory.take<uint16_t>(blocks_ * line_size(dims_v_));
        key_ = memory.take<uint16_t>(panels_ * line_size(dims_));
        value_ = memory.take<uint16_t>(panels_ * line_size(dims_v_));
        key_rows_ = memory.take<uint16_t>(panels_ * line_size(dims_));
        p_ = memory.take<uint16_t>(blocks_ * line_size(1));
        ds_ = memory.take<uint16_t>(blocks_ * line_size(1));
        ds_rows_ = memory.take<uint16_t>(panels_ * blocks_ * line_size(1));
        grad_key_ = memory.take<float>(panels_ * dims_ * 32 * W);
        grad_value_ = memory.take<float>(panels_ * dims_v_ * 32 * W);
        s_ = memory.take<float>(2 * BLOCK_ROWS * W);
        dp_ = memory.take<float>(2 * BLOCK_ROWS * W);
        spare_ = memory.take<float>(BLOCK_ROWS * 32);
    }

    void begin_keys(const type* key, int64_t key_stride, const type* value, int64_t value_stride,
                    int64_t keys) {
        int64_t used = chunks_of(keys, W);
        for (int64_t p = 0; p < used; ++p) {
            int64_t count = keys - p * W < W ? keys - p * W : W;
            const type *k = key + p * W * key_stride, *v = value + p * W * value_stride;
            turn_pairs(k, key_stride, count, a_.head_dim, dims_, key_ + p * line_size(dims_));
            turn_pairs(v, value_stride, count, a_.head_dim_v, dims_v_, value_ + p * line_size(dims_v_));
            pair_rows(k, key_stride, count, a_.head_dim, dims_, key_rows_ + p * line_size(dims_));
        }
        memset(grad_key_, 0, sizeof(float) * (size_t)(used * dims_ * 32 * W));
        memset(grad_value_, 0, sizeof(float) * (size_t)(used * dims_v_ * 32 * W));
    }

    void begin_rows(const type* query, int64_t q_stride, const type* grad, int64_t o_stride, int64_t count) {
        for (int64_t c = 0; c * BLOCK_ROWS < count; ++c) {
            int64_t rows = count - c * BLOCK_ROWS < BLOCK_ROWS ? count - c * BLOCK_ROWS : BLOCK_ROWS;
            pack_lines(query + c * BLOCK_ROWS * q_stride, q_stride, rows, a_.head_dim, dims_,
                       q_ + c * line_size(dims_), q_turned_ + c * line_size(dims_));
            pack_lines(grad + c * BLOCK_ROWS * o_stride, o_stride, rows, a_.head_dim_v, dims_v_,
                       o_ + c * line_size(dims_v_), o_turned_ + c * line_size(dims_v_));
        }
    }

    void products(Block& x) {
        int64_t c = x.first / BLOCK_ROWS;
        x.s = s_ + x.slot * BLOCK_ROWS * W, x.dp = dp_ + x.slot * BLOCK_ROWS * W;
        product(q_ + c * line_size(dims_), key_ + x.p * line_size(dims_), dims_, x.s);
        product(o_ + c * line_size(dims_v_), value_ + x.p * line_size(dims_v_), dims_v_, x.dp);
    }

    // probabilities() and keep() in one go. Rows past the block's have an LSE of inf: weights of 0.
    template <bool MASKED>
    __attribute__((noinline)) void weights(const Block& x, float factor, const RowStats& rows) {
        const Places to = places(x);
        for (int64_t n = 0; n < BLOCK_ROWS; n += 2) {
            vf e[2][2], g[2][2];
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
                int64_t row = x.first + n + i;
                vf lse2 = splat(rows.lse2[row]), delta = splat(rows.delta[row]);
#pragma GCC unroll 2
                for (int j = 0; j < 2; ++j) {
                    int64_t at = (n + i) * W + j * VL;
                    vf y = load(x.s + at) * factor - lse2;
                    if (TERMS == 3) y -= rows.lse2_rest[row];
                    vf p = exp2_of(y);
                    if (MASKED) p = keep_lanes(p, n + i < x.count ? x.words[n + i] : 0, j);
                    e[i][j] = p;
                    g[i][j] = p * (load(x.dp + at) - delta);
                }
            }
            store_rows(to, n, e, g);
        }
    }

    void keep(const Block& x) {
        const Places to = places(x);
        for (int64_t n = 0; n < BLOCK_ROWS; n += 2) {
            vf e[2][2], g[2][2];
            for (int i = 0; i < 2; ++i)
                for (int j = 0; j < 2; ++j) {
                    int64_t at = (n + i) * W + j * VL;
                    e[i][j] = n + i < x.count ? load(x.s + at) : vf{};
                    g[i][j] = n + i < x.count ? load(x.dp + at) : vf{};
                }
            store_rows(to, n, e, g);
        }
    }

    void add_keys(const Block& x, int64_t, uint64_t blocks) {
        add_turned(o_turned_, p_, blocks, dims_v_, grad_value_ + x.p * dims_v_ * 32 * W);
        add_turned(q_turned_, ds_, blocks, dims_, grad_key_ + x.p * dims_ * 32 * W);
    }

    void add_queries(int64_t first, int64_t count, int64_t keys, const uint64_t* blocks, float* out,
                     int64_t ld) {
        int64_t c = first / BLOCK_ROWS, used = chunks_of(keys, W);
        bool whole = count == BLOCK_ROWS;
        for (int64_t d = 0; d < dims_; ++d) {
            if (whole)
                load_tiles(out + d * 32, ld);
            else
                zero_tiles();
            for (int64_t p = 0; p < used; ++p)
                if (blocks[p] >> c & 1)
                    add_terms<TERMS>(ds_rows_ + (p * blocks_ + c) * line_size(1), TILE, 2 * TILE,
                                     key_rows_ + p * line_size(dims_) + d * 2 * TERMS * TILE, TERMS * TILE,
                                     TILE);
            if (whole) {
                store_tiles(out + d * 32, ld);
                continue;
            }
            store_tiles(spare_, 32);
            for (int64_t n = 0; n < count; ++n)
                for (int j = 0; j < 2; ++j) {
                    float* at = out + n * ld + d * 32 + j * VL;
                    storeu(at, loadu(at) + load(spare_ + n * 32 + j * VL));
                }
        }
    }

    const float* grad_key(int64_t p) const { return grad_key_ + p * dims_ * 32 * W; }
    const float* grad_value(int64_t p) const { return grad_value_ + p * dims_v_ * 32 * W; }

  private:
    // uint16 of 32 rows (or keys) with `chunks` chunks of 32 dims.
    static int64_t line_size(int64_t chunks) { return chunks * TERMS * 2 * TILE; }

    // Where a block's P and dS go.
    struct Places {
        uint16_t *p, *ds, *rows;
    };

    Places places(const Block& x) const {
        int64_t c = x.first / BLOCK_ROWS;
        return Places{p_ + c * line_size(1), ds_ + c * line_size(1),
                      ds_rows_ + (x.p * blocks_ + c) * line_size(1)};
    }

    // Rows n and n + 1 of P and dS: [row][half of the lanes].
    PA_INLINE void store_rows(const Places& to, int64_t n, vf (&e)[2][2], vf (&g)[2][2]) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            vf x0 = g[0][j], x1 = g[1][j];
#pragma GCC unroll 3
            for (int t = 0; t < TERMS; ++t) {
                int64_t at = (t * 2 + j) * TILE + n / 2 * 32;
                _mm512_store_si512(to.p + at, term_in_pairs<TERMS>(e[0][j], e[1][j], t));
                _mm512_store_si512(to.ds + at, term_in_pairs<TERMS>(x0, x1, t));
            }
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i)
#pragma GCC unroll 3
            for (int t = 0; t < TERMS; ++t)
                _mm512_store_si512(to.rows + (t * 2 + n / 16) * TILE + (n + i) % 16 * 32,
                                   term_in_line<TERMS>(g[i][0], g[i][1], t));
    }

    // As exact as the terms of a weight: polynomials of lower degree, minimax on [0, 1) with the constant 1.
    PA_INLINE vf exp2_of(vf x) {
        if (TERMS == 3) return vexp2(x);
        vf f = (vf)_mm512_reduce_ps((__m512)x, 0x09), y;
        if (TERMS == 2) {
            y = splat(C4[3]) * f + C4[2];
            y = y * f + C4[1];
            y = y * f + C4[0];
        } else {
            y = splat(C3[2]) * f + C3[1];
            y = y * f + C3[0];
        }
        return (vf)_mm512_scalef_ps((__m512)(y * f + 1.0f), (__m512)x);
    }

    static vf some(const type* p, int64_t left) { return load_some<T>(p, left); }

    static void product(const uint16_t* a, const uint16_t* b, int64_t chunks, float* to) {
        zero_tiles();
        for (int64_t d = 0; d < chunks; ++d)
            add_terms<TERMS>(a + d * TERMS * 2 * TILE, TILE, 2 * TILE, b + d * TERMS * 2 * TILE, TILE,
                             2 * TILE);
        store_tiles(to, W);
    }

    // to[dim][lane] += turned^T times rows, over the blocks that the bits name.
    void add_turned(const uint16_t* turned, const uint16_t* rows, uint64_t blocks, int64_t chunks,
                    float* to) const {
        for (int64_t d = 0; d < chunks; ++d) {
            load_tiles(to + d * 32 * W, W);
            for (uint64_t left = blocks; left; left &= left - 1) {
                int64_t c = __builtin_ctzll(left);
                add_terms<TERMS>(turned + c * line_size(chunks) + d * 2 * TERMS * TILE, TERMS * TILE, TILE,
                                 rows + c * line_size(1), TILE, 2 * TILE);
            }
            store_tiles(to + d * 32 * W, W);
        }
    }

    // Up to 32 rows as tiles of rows by dims, and as tiles of dims by rows.
    static void pack_lines(const type* from, int64_t stride, int64_t count, int64_t dim, int64_t chunks,
                           uint16_t* lines, uint16_t* turned) {
        for (int64_t n = 0; n < 32; ++n)
            for (int64_t d = 0; d < chunks; ++d) {
                const type* x = from + n * stride + d * 32;
                int64_t left = n < count ? dim - d * 32 : 0;
                vf x0 = some(x, left), x1 = some(x + 16, left - 16);
                uint16_t* to = lines + d * TERMS * 2 * TILE + n / 16 * TILE + n % 16 * 32;
#pragma GCC unroll 3
                for (int t = 0; t < TERMS; ++t)
                    _mm512_store_si512(to + t * 2 * TILE, next_term_in_line(x0, x1, t + 1 == TERMS));
            }
        for (int64_t d = 0; d < chunks * 2; ++d) {
            vf x0[16], x1[16], t[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                x0[i] = some(from + 2 * i * stride + d * 16, 2 * i < count ? dim - d * 16 : 0);
                x1[i] = some(from + (2 * i + 1) * stride + d * 16, 2 * i + 1 < count ? dim - d * 16 : 0);
            }
            for (int term = 0; term < TERMS; ++term) {
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i) t[i] = (vf)next_term(x0[i], x1[i], false);
                transpose(t);
                uint16_t* to = turned + (d * TERMS + term) * TILE;
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 32, (__m512i)t[i]);
            }
        }
    }

    // Up to 32 keys as pairs of dims by keys.
    static void turn_pairs(const type* from, int64_t stride, int64_t count, int64_t dim, int64_t chunks,
                           uint16_t* to) {
        for (int64_t d = 0; d < chunks; ++d)
            for (int j = 0; j < 2; ++j) {
                vf x0[16], x1[16];  // dims 0 to 15 and 16 to 31 of the chunk, a key each; then turned
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i) {
                    const type* x = from + (j * 16 + i) * stride + d * 32;
                    int64_t left = j * 16 + i < count ? dim - d * 32 : 0;
                    x0[i] = some(x, left);
                    x1[i] = some(x + 16, left - 16);
                }
                transpose(x0);
                transpose(x1);
                for (int i = 0; i < 8; ++i) {
                    uint16_t* at = to + (d * TERMS * 2 + j) * TILE;
#pragma GCC unroll 3
                    for (int t = 0; t < TERMS; ++t) {
                        bool last = t + 1 == TERMS;
                        _mm512_store_si512(at + t * 2 * TILE + i * 32,
                                           next_term(x0[2 * i], x0[2 * i + 1], last));
                        _mm512_store_si512(at + t * 2 * TILE + (i + 8) * 32,
                                           next_term(x1[2 * i], x1[2 * i + 1], last));
                    }
                }
            }
    }

    // Up to 32 keys as pairs of keys by dims.
    static void pair_rows(const type* from, int64_t stride, int64_t count, int64_t dim, int64_t chunks,
                          uint16_t* to) {
        for (int64_t d = 0; d < chunks * 2; ++d)
            for (int i = 0; i < 16; ++i) {
                vf x0 = some(from + 2 * i * stride + d * 16, 2 * i < count ? dim - d * 16 : 0);
                vf x1 = some(from + (2 * i + 1) * stride + d * 16, 2 * i + 1 < count ? dim - d * 16 : 0);
#pragma GCC unroll 3
                for (int t = 0; t < TERMS; ++t)
                    _mm512_store_si512(to + (d * TERMS + t) * TILE + i * 32,
                                       next_term(x0, x1, t + 1 == TERMS));
            }
    }

    const pa_cpu_backward_args& a_;
    int64_t panels_, blocks_, dims_, dims_v_;
    uint16_t *q_, *q_turned_, *o_, *o_turned_, *key_, *value_, *key_rows_, *p_, *ds_, *ds_rows_;
    float *grad_key_, *grad_value_, *s_, *dp_, *spare_;
};

// float32 with half-empty chunks of dims gains nothing.
static bool uses_amx(const BackwardCall& call) {
    const pa_cpu_backward_args& a = call.args;
    if (a.pack == PA_PACK_NONE || a.pack == PA_PACK_ROWS) return false;
    return a.pack == PA_PACK_TILES || a.dtype != PA_FLOAT32 || (a.head_dim >= 24 && a.head_dim_v >= 24);
}

static int64_t amx_backward(const BackwardCall& call, int32_t pass, int64_t index, void* scratch) {
    if (!uses_amx(call)) return fma_backward(call, pass, index, scratch);
    return by_storage(call.args.dtype, [&](auto t) {
        typedef decltype(t) T;
        if (scratch) load_tile_config();
        int64_t bytes = run_task<T, AmxEngine<T>>(call, pass, index, scratch);
        if (scratch) _tile_release();
        return bytes;
    });
}

}  // namespace PA_ISA
}  // namespace cpu
}  // namespace portattn
