// The main kernel on AMX: forward.hpp with both products on bf16 tiles (amx_tiles.hpp). Keys and values are
// packed once a call, in a pass of its own before the first; stepped tiles are packed where they are visited.
// Tiles with a value that is not finite go through the float32 kernel, because splitting inf gives NaN.
#pragma once
#include "amx_tiles.hpp"
#include "forward.hpp"

namespace portattn {
namespace cpu {
namespace PA_ISA {

constexpr int64_t PACK_CHUNKS = 8;  // chunks of 32 keys in one packing task

template <class F>
static inline auto by_dtype(int32_t dtype, F f) -> decltype(f(Float32())) {
    return dtype == PA_FLOAT32 ? f(Float32()) : dtype == PA_FLOAT16 ? f(Half()) : f(BFloat16());
}

constexpr int64_t L2_BYTES = 2 << 20;  // of the CPUs that have AMX

// Automatic: with one panel of rows, packing costs more than it saves; so it does for float32, with its six
// products, where a query tile visits few keys, or where dims of 32 are half empty or too few beside the
// softmax. Measured on 2 cores against FMA: 0.9 times as fast at 640 keys of many, 1.1 at 2048 (head_dim 64
// and 128), 1.2 to 1.3 dense and for keys that stay in the L2 cache.
static bool uses_amx(const Call& call) {
    const pa_cpu_args& a = call.args;
    if (a.kernel != PA_CPU_MAIN || a.pack == PA_PACK_NONE || a.pack == PA_PACK_ROWS) return false;
    if (a.pack == PA_PACK_TILES) return true;
    if (a.seqlen_q <= W || a.dtype != PA_FLOAT32) return a.seqlen_q > W;
    const int64_t dims = a.head_dim + a.head_dim_v,
                  packed = 32 * (chunks_of(a.head_dim, 32) + chunks_of(a.head_dim_v, 32));
    const bool in_l2 = a.seqlen_k * packed * 6 <= L2_BYTES;
    return dims >= 128 && dims * 8 >= packed * 7 && call.mean_keys >= (in_l2 ? 512.0 : 1024.0);
}

// The packed keys and values of a call, and for each chunk whether all its values are finite.
struct Packed {
    int64_t chunks, heads, key_size, value_size;  // sizes of a chunk in uint16
    int terms;

    explicit Packed(const Call& call) {
        const pa_cpu_args& a = call.args;
        terms = by_dtype(a.dtype, [](auto t) { return Terms<decltype(t)>::key; });
        chunks = chunks_of(a.seqlen_k, CHUNK_KEYS);
        heads = a.batch * a.num_kv_heads;
        key_size = key_chunk_size(a.head_dim, terms);
        value_size = value_chunk_size(a.head_dim_v, terms);
    }
    int64_t bytes() const { return heads * chunks * ((key_size + value_size) * 2 + 1); }
    uint16_t* keys(void* base, int64_t head) const { return (uint16_t*)base + head * chunks * key_size; }
    uint16_t* values(void* base, int64_t head) const {
        return (uint16_t*)base + heads * chunks * key_size + head * chunks * value_size;
    }
    uint8_t* bad(void* base, int64_t head) const {
        return (uint8_t*)((uint16_t*)base + heads * chunks * (key_size + value_size)) + head * chunks;
    }
};

static int64_t pack_bytes(const Call& call) { return uses_amx(call) ? Packed(call).bytes() : 0; }

static int64_t pack_tasks(const Call& call) {
    return call.args.batch * call.args.num_kv_heads * chunks_of(call.args.seqlen_k, CHUNK_KEYS * PACK_CHUNKS);
}

static void pack_task(const Call& call, int64_t index) {
    const pa_cpu_args& a = call.args;
    Packed packed(call);
    int64_t groups = chunks_of(packed.chunks, PACK_CHUNKS), head = index / groups,
            first = index % groups * PACK_CHUNKS;
    int64_t last = first + PACK_CHUNKS < packed.chunks ? first + PACK_CHUNKS : packed.chunks;
    int64_t b = head / a.num_kv_heads, h = head % a.num_kv_heads;
    by_dtype(a.dtype, [&](auto t) {
        typedef decltype(t) T;
        typedef typename T::type type;
        const type* key = (const type*)a.key + b * a.key_strides[0] + h * a.key_strides[1];
        const type* value = (const type*)a.value + b * a.value_strides[0] + h * a.value_strides[1];
        for (int64_t c = first; c < last; ++c) {
            int64_t n = c * CHUNK_KEYS, count = a.seqlen_k - n < CHUNK_KEYS ? a.seqlen_k - n : CHUNK_KEYS;
            bool bad = pack_key_chunk<T>(key + n * a.key_strides[2], a.key_strides[2], count, a.head_dim,
                                         packed.keys(call.packed, head) + c * packed.key_size);
            bad |=
                pack_value_chunk<T>(value + n * a.value_strides[2], a.value_strides[2], count, a.head_dim_v,
                                    packed.values(call.packed, head) + c * packed.value_size);
            packed.bad(call.packed, head)[c] = bad;
        }
        return 0;
    });
}

// Online softmax of factor*s as softmax_panel, with P as bf16 terms in pairs of keys; keys up to the chunk's
// end get 0.
template <class T>
__attribute__((noinline)) static void softmax_terms(const float* __restrict s, int64_t keys, float factor,
                                                    float* __restrict m, float* __restrict l,
                                                    float* __restrict alpha, uint16_t* __restrict p) {
    constexpr int terms = Terms<T>::p;
    vf max0[NV], max1[NV], sum[NV];
    // The factor is positive or 1, so the maximum may be taken before it.
    for (int j = 0; j < NV; ++j) max0[j] = max1[j] = splat(-__builtin_inff());
    int64_t n = 0;
    for (; n + 2 <= keys; n += 2) {
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) {
            max0[j] = vmax(load(s + n * W + j * VL), max0[j]);
            max1[j] = vmax(load(s + (n + 1) * W + j * VL), max1[j]);
        }
    }
    for (int j = 0; j < NV; ++j) {
        if (n < keys) max0[j] = vmax(load(s + n * W + j * VL), max0[j]);
        max0[j] = vmax(vmax(max0[j], max1[j]) * factor, load(m + j * VL));
        store(alpha + j * VL, vexp2(load(m + j * VL) - max0[j]));
        store(m + j * VL, max0[j]);
        sum[j] = vf{};
    }
    int64_t end = (keys + CHUNK_KEYS - 1) / CHUNK_KEYS * CHUNK_KEYS;
    for (n = 0; n < end; n += 2) {
        uint16_t* row = p + n / CHUNK_KEYS * (terms * 2 * TILE) + n % CHUNK_KEYS / 2 * 32;
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) {
            vf x0 = n < keys ? vexp2(load(s + n * W + j * VL) * factor - max0[j]) : vf{};
            vf x1 = n + 1 < keys ? vexp2(load(s + (n + 1) * W + j * VL) * factor - max0[j]) : vf{};
            sum[j] += x0 + x1;
            if (terms == 1) {
                _mm512_store_si512(row + j * TILE, rounded_pair(x0, x1));
                continue;
            }
#pragma GCC unroll 3
            for (int t = 0; t < terms; ++t)
                _mm512_store_si512(row + (t * 2 + j) * TILE, next_term(x0, x1, t + 1 == terms));
        }
    }
    for (int j = 0; j < NV; ++j) store(l + j * VL, load(l + j * VL) * load(alpha + j * VL) + sum[j]);
}

// Multiplies a panel o[dim][W] by alpha, unless that is 1 everywhere.
__attribute__((noinline)) static void rescale(float* o, int64_t dim, const float* alpha) {
    vf a0 = load(alpha), a1 = load(alpha + VL);
    __m512 one = _mm512_set1_ps(1.0f);
    if ((_mm512_cmp_ps_mask((__m512)a0, one, _CMP_NEQ_UQ) |
         _mm512_cmp_ps_mask((__m512)a1, one, _CMP_NEQ_UQ)) == 0)
        return;
    for (int64_t d = 0; d < dim; ++d) {
        store(o + d * W, load(o + d * W) * a0);
        store(o + d * W + VL, load(o + d * W + VL) * a1);
    }
}

// Scratch of the AMX kernel behind forward.hpp's.
struct AmxScratch {
    uint16_t *q, *p, *k, *v;
    float *s, *spare;
    const uint16_t **run_keys, **run_values, **tile_keys, **tile_values;  // one for each chunk
    int64_t q_size, run_chunks, bytes;

    AmxScratch(const Call& call, void* base) {
        const pa_cpu_args& a = call.args;
        Packed packed(call);
        int64_t panels = (call.plan->block_q + W - 1) / W, chunks = chunks_of(call.run_keys, CHUNK_KEYS) + 1;
        int query_terms = by_dtype(a.dtype, [](auto t) { return Terms<decltype(t)>::query; });
        int p_terms = by_dtype(a.dtype, [](auto t) { return Terms<decltype(t)>::p; });
        char* at = (char*)base;
        bytes = 0;
        auto take = [&](int64_t size) {
            char* from = at + bytes;
            bytes += round_up(size, 64);
            return from;
        };
        q_size = chunks_of(a.head_dim, 32) * query_terms * 2 * TILE;
        q = (uint16_t*)take(panels * q_size * 2);
        p = (uint16_t*)take(chunks * p_terms * 2 * TILE * 2);
        k = (uint16_t*)take(chunks * packed.key_size * 2);
        v = (uint16_t*)take(chunks * packed.value_size * 2);
        s = (float*)take(chunks * CHUNK_KEYS * W * 4);
        spare = (float*)take(32 * W * 4);
        run_chunks = chunks_of(call.run_keys, CHUNK_KEYS);
        const int64_t pointers = chunks * (int64_t)sizeof(void*);
        run_keys = (const uint16_t**)take(pointers);
        run_values = (const uint16_t**)take(pointers);
        tile_keys = (const uint16_t**)take(pointers);
        tile_values = (const uint16_t**)take(pointers);
    }
};

template <class T>
class AmxRun : public ItemRun<T> {
  public:
    AmxRun(const Call& call, const Task& task, void* memory)
        : ItemRun<T>(call, task, memory), packed_(call), y_(call, (char*)memory + forward_scratch(call)) {
        if (Terms<T>::query == 1) {  // scaling would cost the query bits that one term does not have
            this->score_factor_ = this->query_factor_;
            this->query_factor_ = 1.0f;
        }
        head_ = task.b * call.args.num_kv_heads + task.h / (call.args.num_heads / call.args.num_kv_heads);
    }

    void run() {
        bad_query_ = false;
        for (int64_t p = 0; p < this->panels_; ++p) {
            this->begin(p);
            bad_query_ |= pack_query<T>(this->x_.q + p * this->a_.head_dim * W, this->a_.head_dim,
                                        y_.q + p * y_.q_size);
        }
        load_tile_config();
        walk_item(this->call_, this->item_, [this](const Keys& k) { visit(k); });
        flush();
        _tile_release();
        this->finish();
    }

  private:
    typedef typename T::type type;

    // Full tiles are gathered until a run is full, so that scattered blocks go as fast as neighbouring ones.
    void visit(const Keys& k) {
        int64_t chunks = chunks_of(k.count, CHUNK_KEYS), first = k.start / CHUNK_KEYS;
        bool bad = bad_query_, in_place = k.step == 1 && k.start % CHUNK_KEYS == 0;
        if (in_place) {
            for (int64_t c = 0; c < chunks; ++c)
                bad |= packed_.bad(this->call_.packed, head_)[first + c] != 0;
        } else if (!bad) {
            bad = pack_here(k, chunks);
        }
        if (bad) return ItemRun<T>::visit(k);
        const uint16_t *keys = y_.k, *values = y_.v;
        if (in_place) {
            keys = packed_.keys(this->call_.packed, head_) + first * packed_.key_size;
            values = packed_.values(this->call_.packed, head_) + first * packed_.value_size;
        }
        if (in_place && k.full() && !has_terms() && k.count % CHUNK_KEYS == 0) {
            for (int64_t c = 0; c < chunks; ++c) {
                y_.run_keys[gathered_] = keys + c * packed_.key_size;
                y_.run_values[gathered_] = values + c * packed_.value_size;
                if (++gathered_ == y_.run_chunks) flush();
            }
            return;
        }
        for (int64_t c = 0; c < chunks; ++c) {
            y_.tile_keys[c] = keys + c * packed_.key_size;
            y_.tile_values[c] = values + c * packed_.value_size;
        }
        tile(k);
    }

    bool has_terms() const {
        const pa_cpu_args& a = this->a_;
        return a.softcap != 0.0f || a.alibi_slopes || a.bias;
    }

    void flush() {
        for (int64_t p = 0; gathered_ > 0 && p < this->panels_; ++p) {
            amx_scores<T>(y_.run_keys, y_.q + p * y_.q_size, gathered_, this->a_.head_dim, y_.s);
            float factor = this->score_factor_;
            if (factor <= 0.0f) {
                scale_scores(y_.s, gathered_ * CHUNK_KEYS, factor);
                factor = 1.0f;
            }
            accumulate_panel(p, y_.run_values, gathered_ * CHUNK_KEYS, factor);
        }
        gathered_ = 0;
    }

    void accumulate_panel(int64_t p, const uint16_t* const* values, int64_t count, float factor) {
        const pa_cpu_args& a = this->a_;
        float *alpha = this->x_.alpha, *o = this->x_.o + p * a.head_dim_v * W;
        softmax_terms<T>(y_.s, count, factor, this->x_.m + p * W, this->x_.l + p * W, alpha, y_.p);
        rescale(o, a.head_dim_v, alpha);
        amx_values<T>(values, y_.p, chunks_of(count, CHUNK_KEYS), a.head_dim_v, o, y_.spare);
    }

    bool pack_here(const Keys& k, int64_t chunks) {
        const pa_cpu_args& a = this->a_;
        int64_t key_step = k.step * a.key_strides[2], value_step = k.step * a.value_strides[2];
        const type* key = this->key_ + k.start * a.key_strides[2];
        const type* value = this->value_ + k.start * a.value_strides[2];
        bool bad = false;
        for (int64_t c = 0; c < chunks; ++c) {
            int64_t n = c * CHUNK_KEYS, count = k.count - n < CHUNK_KEYS ? k.count - n : CHUNK_KEYS;
            bad |= pack_key_chunk<T>(key + n * key_step, key_step, count, a.head_dim,
                                     y_.k + c * packed_.key_size);
            bad |= pack_value_chunk<T>(value + n * value_step, value_step, count, a.head_dim_v,
                                       y_.v + c * packed_.value_size);
        }
        return bad;
    }

    // A tile with masks or score terms.
    void tile(const Keys& k) {
        for (int64_t p = 0; p < this->panels_; ++p) {
            int64_t n0 = 0, n1 = k.count;
            PanelRows rows = this->rows_of(p);
            typename ItemRun<T>::Ids ids{};
            if (!k.full() && !this->narrow(k, rows, &ids, &n0, &n1)) continue;
            int64_t first = n0 / CHUNK_KEYS;
            n0 = first * CHUNK_KEYS;
            int64_t count = n1 - n0;
            amx_scores<T>(y_.tile_keys + first, y_.q + p * y_.q_size, chunks_of(count, CHUNK_KEYS),
                          this->a_.head_dim, y_.s);
            float factor = this->score_factor_;
            if (factor <= 0.0f || has_terms()) {
                if (factor != 1.0f) scale_scores(y_.s, count, factor);
                factor = 1.0f;
                this->terms(y_.s, k, n0, count, rows);
            }
            if (!k.full()) this->mask(y_.s, k, n0, count, rows, ids);
            accumulate_panel(p, y_.tile_values + first, count, factor);
        }
    }

    Packed packed_;
    AmxScratch y_;
    int64_t head_;
    bool bad_query_ = false;
    int64_t gathered_ = 0;  // chunks in y_.run_keys and y_.run_values
};

static int64_t amx_scratch(const Call& call) {
    return forward_scratch(call) + (uses_amx(call) ? AmxScratch(call, nullptr).bytes : 0);
}

static void amx_item(const Call& call, const Task& task, void* scratch) {
    if (!uses_amx(call)) return forward_item(call, task, scratch);
    by_dtype(call.args.dtype, [&](auto t) {
        AmxRun<decltype(t)>(call, task, scratch).run();
        return 0;
    });
}

}  // namespace PA_ISA
}  // namespace cpu
}  // namespace portattn
