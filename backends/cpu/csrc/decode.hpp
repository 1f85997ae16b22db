// The decode kernel: few query rows, so the lanes run over head_dim (dot products) and over keys (softmax).
// The rows of a whole GQA group are done together, so that keys and values are read once
// (call.args.group_heads).
#pragma once
#include "call.hpp"
#include "simd.hpp"
#include "walk.hpp"

namespace portattn {
namespace cpu {
namespace PA_ISA {

constexpr int MAX_RB = VL >= 16 ? 4 : VL >= 8 ? 2 : 1;  // query rows per micro-kernel call
constexpr int64_t CHUNK = 256;                          // keys between two softmax steps: 64 KiB of K at D 64

PA_INLINE int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Lane k of the result is the sum of v[k]'s lanes.
template <int H>
PA_INLINE void sum_round(vf* v) {
    vi low, high;
    for (int i = 0; i < VL; ++i) {
        low[i] = (i & H) ? (i ^ H) + VL : i;
        high[i] = (i & H) ? i + VL : (i ^ H);
    }
#pragma GCC unroll 16
    for (int i = 0; i < H; ++i) {
        vf a = v[i], b = v[i + H];
        v[i] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
    }
}

PA_INLINE vf sum_lanes(vf* v) {
#if defined(__AVX512F__)
    sum_round<8>(v);
#endif
#if defined(__AVX512F__) || defined(__AVX2__)
    sum_round<4>(v);
#endif
    sum_round<2>(v);
    sum_round<1>(v);
    return v[0];
}

// Rows to bring into the level-2 cache while others are worked on: with keys and values read as two streams
// at once, memory keeps more requests in flight than one stream does (they stop at page ends).
struct Ahead {
    const char* data;  // null: nothing
    int64_t stride, rows, bytes;
    void fetch(int64_t n, int64_t count) const {
        if (!data) return;
        for (int64_t i = n; i < n + count && i < rows; ++i)
            for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(data + i * stride + at, 0, 2);
    }
};

// s[r][n] = q[r] . k[n] for RB rows and VL/RB keys; only `keys` of them exist and are read.
template <class T, int RB>
PA_INLINE void dots(const float* q, int64_t ldq, const typename T::type* k, int64_t ldk, int64_t keys,
                    int64_t dim, float* s, int64_t lds) {
    constexpr int KB = VL / RB;
    const typename T::type* row[KB];
    vf acc[VL];
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) acc[i] = vf{};
#pragma GCC unroll 16
    for (int i = 0; i < KB; ++i) row[i] = k + (i < keys ? i : 0) * ldk;
    int64_t d = 0;
    for (; d + VL <= dim; d += VL) {
#pragma GCC unroll 16
        for (int i = 0; i < KB; ++i) {
            vf x = T::loadv(row[i] + d);
#pragma GCC unroll 4
            for (int r = 0; r < RB; ++r) acc[r * KB + i] += x * load(q + r * ldq + d);
        }
    }
    if (d < dim) {
#pragma GCC unroll 16
        for (int i = 0; i < KB; ++i) {
            vf x = load_part<T>(row[i] + d, (int)(dim - d));
#pragma GCC unroll 4
            for (int r = 0; r < RB; ++r) acc[r * KB + i] += x * load(q + r * ldq + d);
        }
    }
    vf sums = sum_lanes(acc);
    float t[VL] __attribute__((aligned(64)));
    store(t, sums);
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) memcpy(s + r * lds, t + r * KB, sizeof(float) * KB);
}

// o[r][d : d + DB*VL] = alpha[r] * o + sum over n of p[r][n] * v[n][d : ...]. part > 0: DB is 1 and only
// `part` elements exist.
template <class T, int RB, int DB>
PA_INLINE void accumulate(const float* p, int64_t ldp, const typename T::type* v, int64_t ldv, int64_t keys,
                          float* o, int64_t ldo, const float* alpha, int part, const Ahead& ahead) {
    vf acc[RB][DB];
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < DB; ++i) acc[r][i] = load(o + r * ldo + i * VL) * alpha[r];
    for (int64_t n = 0; n < keys; ++n) {
        ahead.fetch(n, 1);
#pragma GCC unroll 8
        for (int i = 0; i < DB; ++i) {
            vf x = part ? load_part<T>(v + n * ldv, part) : T::loadv(v + n * ldv + i * VL);
#pragma GCC unroll 4
            for (int r = 0; r < RB; ++r) acc[r][i] += x * p[r * ldp + n];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < DB; ++i) store(o + r * ldo + i * VL, acc[r][i]);
}

template <class T, int RB>
static void dots_rows(const float* q, int64_t ldq, const typename T::type* k, int64_t ldk, int64_t keys,
                      int64_t dim, float* s, int64_t lds, const Ahead& ahead) {
    constexpr int KB = VL / RB;
    for (int64_t n = 0; n < keys; n += KB) {
        ahead.fetch(n, KB);
        dots<T, RB>(q, ldq, k + n * ldk, ldk, keys - n, dim, s + n, lds);
    }
}

template <class T, int RB>
static void accumulate_rows(const float* p, int64_t ldp, const typename T::type* v, int64_t ldv, int64_t keys,
                            int64_t dim, float* o, int64_t ldo, const float* alpha, Ahead ahead) {
    constexpr int DB = VL >= 16 ? (RB <= 2 ? 8 : 4) : (RB == 1 ? 8 : 4);
    int64_t d = 0;
    auto next = [&](int64_t width) {
        d += width;
        ahead.data = nullptr;  // the first sweep over the keys fetches, once
    };
    for (; d + DB * VL <= dim; next(DB * VL))
        accumulate<T, RB, DB>(p, ldp, v + d, ldv, keys, o + d, ldo, alpha, 0, ahead);
    for (; d + 4 * VL <= dim; next(4 * VL))
        accumulate<T, RB, 4>(p, ldp, v + d, ldv, keys, o + d, ldo, alpha, 0, ahead);
    for (; d + VL <= dim; next(VL))
        accumulate<T, RB, 1>(p, ldp, v + d, ldv, keys, o + d, ldo, alpha, 0, ahead);
    if (d < dim) accumulate<T, RB, 1>(p, ldp, v + d, ldv, keys, o + d, ldo, alpha, (int)(dim - d), ahead);
}

struct DecodeScratch {
    float *q, *o, *m, *l, *alpha, *s;
    int64_t ldq, ldo, rows, floats;

    DecodeScratch(const Call& call, float* base) : floats(0) {
        const pa_cpu_args& a = call.args;
        rows = up(call.slot_rows, MAX_RB);
        ldq = up(a.head_dim, VL);
        ldo = up(a.head_dim_v, VL);
        auto take = [&](int64_t count) {
            float* p = base + floats;
            floats += up(count, 16);
            return p;
        };
        q = take(rows * ldq);
        o = take(rows * ldo);
        m = take(rows);
        l = take(rows);
        alpha = take(rows);
        s = take(rows * (CHUNK + VL));
    }
};

template <class T>
class DecodeRun {
  public:
    DecodeRun(const Call& call, const Task& task, void* memory)
        : call_(call), a_(call.args), task_(task), x_(call, (float*)memory) {
        int64_t group = a_.num_heads / a_.num_kv_heads, kv_head = task.h / group;
        key_ = (const type*)a_.key + task.b * a_.key_strides[0] + kv_head * a_.key_strides[1];
        value_ = (const type*)a_.value + task.b * a_.value_strides[0] + kv_head * a_.value_strides[1];
        item_rows_ = task.item[PA_ITEM_NUM_ROWS];
        rows_ = item_rows_ * (a_.group_heads ? group : 1);
        int32_t layout = task.item[PA_ITEM_LAYOUT];
        id_row_ = call.plan->layout_ids ? call.plan->layout_ids[layout] : -1;
    }

    void run() {
        begin();
        walk_item(call_, task_.item, [this](const Keys& k) {
            for (int64_t n = 0; n < k.count; n += CHUNK)
                chunk(k, n, k.count - n < CHUNK ? k.count - n : CHUNK);
        });
        finish();
    }

  private:
    typedef typename T::type type;
    static constexpr int64_t LDS = CHUNK + VL;
    static constexpr int PAIR = MAX_RB >= 2 ? 2 : 1;

    void begin() {
        memset(x_.q, 0, sizeof(float) * x_.rows * x_.ldq);
        memset(x_.o, 0, sizeof(float) * x_.rows * x_.ldo);
        float factor = a_.softcap != 0.0f ? a_.scale : a_.scale * LOG2E;
        for (int64_t r = 0; r < x_.rows; ++r) {
            x_.m[r] = LOWEST;
            x_.l[r] = 0.0f;
            if (r >= rows_) continue;
            RowPlace place = row_place(call_, task_, r);
            const type* src = (const type*)a_.query + task_.b * a_.query_strides[0] +
                              place.h * a_.query_strides[1] + place.row * a_.query_strides[2];
            for (int64_t d = 0; d < a_.head_dim; ++d) x_.q[r * x_.ldq + d] = T::load1(src + d) * factor;
            if (task_.first_pass || task_.item[PA_ITEM_SLOT] >= 0) continue;
            float lse = call_.running_lse[(task_.b * a_.num_heads + place.h) * a_.seqlen_q + place.row];
            if (lse == -__builtin_inff()) continue;
            x_.m[r] = lse * LOG2E;
            x_.l[r] = 1.0f;
            const int64_t* strides = call_.running_strides;
            memcpy(x_.o + r * x_.ldo,
                   call_.running + task_.b * strides[0] + place.h * strides[1] + place.row * strides[2],
                   sizeof(float) * a_.head_dim_v);
        }
    }

    void chunk(const Keys& k, int64_t n0, int64_t keys) {
        int64_t ldk = k.step * a_.key_strides[2], ldv = k.step * a_.value_strides[2];
        const type* key = key_ + (k.start + k.step * n0) * a_.key_strides[2];
        const type* value = value_ + (k.start + k.step * n0) * a_.value_strides[2];
        Ahead values = rows_ahead(value, ldv, keys, a_.head_dim_v), none{nullptr, 0, 0, 0};
        for (int64_t r = 0; r < rows_;) {
            int64_t left = rows_ - r;
            const float* q = x_.q + r * x_.ldq;
            float* s = x_.s + r * LDS;
            const Ahead& ahead = r == 0 ? values : none;
            if (left >= 3 && MAX_RB >= 4)
                dots_rows<T, MAX_RB>(q, x_.ldq, key, ldk, keys, a_.head_dim, s, LDS, ahead), r += MAX_RB;
            else if (left >= 2 && MAX_RB >= 2)
                dots_rows<T, PAIR>(q, x_.ldq, key, ldk, keys, a_.head_dim, s, LDS, ahead), r += 2;
            else
                dots_rows<T, 1>(q, x_.ldq, key, ldk, keys, a_.head_dim, s, LDS, ahead), r += 1;
        }
        for (int64_t r = 0; r < rows_; ++r) softmax_row(k, n0, keys, r);
        int64_t left_keys = k.count - n0 - keys;
        Ahead keys_ahead =
            rows_ahead(key + keys * ldk, ldk, left_keys < CHUNK ? left_keys : CHUNK, a_.head_dim);
        for (int64_t r = 0; r < rows_;) {
            int64_t left = rows_ - r;
            const float *p = x_.s + r * LDS, *alpha = x_.alpha + r;
            float* o = x_.o + r * x_.ldo;
            const Ahead& ahead = r == 0 ? keys_ahead : none;
            if (left >= 3 && MAX_RB >= 4)
                accumulate_rows<T, MAX_RB>(p, LDS, value, ldv, keys, a_.head_dim_v, o, x_.ldo, alpha, ahead),
                    r += MAX_RB;
            else if (left >= 2 && MAX_RB >= 2)
                accumulate_rows<T, PAIR>(p, LDS, value, ldv, keys, a_.head_dim_v, o, x_.ldo, alpha, ahead),
                    r += 2;
            else
                accumulate_rows<T, 1>(p, LDS, value, ldv, keys, a_.head_dim_v, o, x_.ldo, alpha, ahead),
                    r += 1;
        }
    }

    static Ahead rows_ahead(const type* data, int64_t stride, int64_t rows, int64_t dim) {
        int64_t size = sizeof(type);
        return Ahead{rows > 0 ? (const char*)data : nullptr, stride * size, rows, dim * size};
    }

    void softmax_row(const Keys& k, int64_t n0, int64_t keys, int64_t r) {
        float* s = x_.s + r * LDS;
        RowPlace place = row_place(call_, task_, r);
        terms(k, n0, keys, place, s);
        mask(k, n0, keys, r % item_rows_, place.row, s);
        for (int64_t n = keys; n < up(keys, VL); ++n) s[n] = -__builtin_inff();
        vf top = splat(x_.m[r]);
        for (int64_t n = 0; n < keys; n += VL) top = vmax(loadu(s + n), top);
        float m = x_.m[r];
        for (int i = 0; i < VL; ++i) m = top[i] > m ? top[i] : m;
        vf sum = vf{};
        for (int64_t n = 0; n < keys; n += VL) {
            vf e = vexp2(loadu(s + n) - m);
            storeu(s + n, e);
            sum += e;
        }
        float alpha = vexp2(splat(x_.m[r] - m))[0];
        x_.alpha[r] = alpha;
        x_.l[r] = x_.l[r] * alpha + sum_of(sum);
        x_.m[r] = m;
    }

    void terms(const Keys& k, int64_t n0, int64_t keys, RowPlace place, float* s) {
        if (a_.softcap != 0.0f)
            for (int64_t n = 0; n < keys; n += VL)
                storeu(s + n, vtanh(loadu(s + n) * (1.0f / a_.softcap)) * (a_.softcap * LOG2E));
        if (a_.alibi_slopes) {
            float slope =
                a_.alibi_slopes[task_.b * a_.alibi_strides[0] + place.h * a_.alibi_strides[1]] * LOG2E;
            for (int64_t n = 0; n < keys; ++n) {
                int64_t distance = call_.plan->q_offset + place.row - (k.start + k.step * (n0 + n));
                s[n] -= slope * (float)(distance < 0 ? -distance : distance);
            }
        }
        if (!a_.bias) return;
        const int64_t* strides = a_.bias_strides;
        int64_t offset = task_.b * strides[0] + place.h * strides[1] + place.row * strides[2];
        for (int64_t n = 0; n < keys; ++n) {
            int64_t at = offset + (k.start + k.step * (n0 + n)) * strides[3];
            float x = a_.bias_dtype == PA_FLOAT32 ? ((const float*)a_.bias)[at]
                                                  : T::load1((const type*)a_.bias + at);
            float y = s[n] + x * LOG2E;
            s[n] = y < LOWEST && x >= LOWEST ? LOWEST : y;
        }
    }

    // Lanes of keys n0 + n .. that the row keeps, from its bits in a tile.
    void mask(const Keys& k, int64_t n0, int64_t keys, int64_t tile_row, int64_t row, float* s) {
        if (k.full()) return;
        const pa_plan_view* plan = call_.plan;
        bool by_id = k.bits_same != k.bits_other;
        int32_t q_id = by_id ? plan->q_ids[(int64_t)id_row_ * plan->seqlen_q + row] : 0;
        const int32_t* k_ids = by_id ? plan->k_ids + (int64_t)id_row_ * plan->seqlen_k : nullptr;
        for (int64_t n = 0; n < keys; ++n) {
            bool same = !by_id || (q_id >= 0 && k_ids[k.start + k.step * (n0 + n)] == q_id);
            int32_t tile = same ? k.bits_same : k.bits_other;
            bool keep = tile == PA_BITS_FULL;
            if (tile >= 0) {
                const uint32_t* words =
                    plan->bits + ((int64_t)tile * plan->block_q + tile_row) * plan->words_per_row;
                keep = (words[(n0 + n) / 32] >> ((n0 + n) % 32)) & 1;
            }
            if (!keep) s[n] = -__builtin_inff();
        }
    }

    void finish() {
        bool piece = task_.item[PA_ITEM_SLOT] >= 0;
        int64_t slot = piece ? task_.head_index * call_.schedule->num_slots + task_.item[PA_ITEM_SLOT] : 0;
        for (int64_t r = 0; r < rows_; ++r) {
            float l = x_.l[r], factor = l == 0.0f ? 0.0f : 1.0f / l;
            float lse = l == 0.0f ? -__builtin_inff() : x_.m[r] * LN2 + __builtin_logf(l);
            float* o = x_.o + r * x_.ldo;
            for (int64_t d = 0; d < a_.head_dim_v; ++d) o[d] *= factor;
            if (piece) {
                memcpy(call_.slots + (slot * call_.slot_rows + r) * a_.head_dim_v, o,
                       sizeof(float) * a_.head_dim_v);
                call_.slot_lse[slot * call_.slot_rows + r] = lse;
            } else {
                store_row(call_, task_, row_place(call_, task_, r), o, lse);
            }
        }
        if (piece && arrive_last(call_, task_)) merge_pieces(call_, task_, rows_);
    }

    const Call& call_;
    const pa_cpu_args& a_;
    const Task& task_;
    DecodeScratch x_;
    const type *key_, *value_;
    int64_t item_rows_, rows_;
    int32_t id_row_;
};

static int64_t decode_scratch(const Call& call) {
    return DecodeScratch(call, nullptr).floats * (int64_t)sizeof(float);
}

static void decode_item(const Call& call, const Task& task, void* scratch) {
    if (call.args.dtype == PA_FLOAT32)
        DecodeRun<Float32>(call, task, scratch).run();
    else if (call.args.dtype == PA_FLOAT16)
        DecodeRun<Half>(call, task, scratch).run();
    else
        DecodeRun<BFloat16>(call, task, scratch).run();
}

}  // namespace PA_ISA
}  // namespace cpu
}  // namespace portattn
