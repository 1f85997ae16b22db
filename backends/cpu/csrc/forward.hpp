// The main kernel: one schedule item, all of whose query rows sit in panels of W lanes.
//   for each tile of keys, for each panel: S^T = K Q^T; score terms; mask; online softmax; O^T = alpha O^T +
//   V^T P^T
// (Dao et al., FlashAttention, 2022, algorithm 1, transposed). Keys and values are read in place with their
// strides, stepped tiles too; half precision tiles are converted to float32 once per query tile.
#pragma once
#include "call.hpp"
#include "layout.hpp"
#include "micro.hpp"
#include "softmax.hpp"
#include "walk.hpp"

namespace portattn {
namespace cpu {
namespace PA_ISA {

PA_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
PA_INLINE int64_t padded(int64_t dim) {
    return round_up(dim, 16) + 16;
}  // row of a copied tile: no set conflicts

struct Scratch {
    float *q, *o, *m, *l, *s, *k, *v, *alpha, *line;
    int64_t floats;

    // Carves `base` (null: only counts).
    Scratch(const Call& call, float* base) : floats(0) {
        const pa_cpu_args& a = call.args;
        int64_t panels = (call.plan->block_q + W - 1) / W;
        bool copies = a.pack == PA_PACK_ROWS || a.dtype != PA_FLOAT32;
        auto take = [&](int64_t count) {
            float* p = base + floats;
            floats += round_up(count, 16);
            return p;
        };
        q = take(panels * a.head_dim * W);
        o = take(panels * a.head_dim_v * W);
        m = take(panels * W);
        l = take(panels * W);
        s = take(call.run_keys * W);
        k = take(copies ? call.run_keys * padded(a.head_dim) : 0);
        v = take(copies ? call.run_keys * padded(a.head_dim_v) : 0);
        alpha = take(W);
        line = take(W);
    }
};

template <class T>
class ItemRun {
  public:
    ItemRun(const Call& call, const Task& task, void* memory)
        : call_(call), a_(call.args), task_(task), item_(task.item), x_(call, (float*)memory) {
        int64_t kv_head = task.h / (a_.num_heads / a_.num_kv_heads);
        query_ = (const type*)a_.query + task.b * a_.query_strides[0] + task.h * a_.query_strides[1];
        key_ = (const type*)a_.key + task.b * a_.key_strides[0] + kv_head * a_.key_strides[1];
        value_ = (const type*)a_.value + task.b * a_.value_strides[0] + kv_head * a_.value_strides[1];
        panels_ = (item_[PA_ITEM_NUM_ROWS] + W - 1) / W;
        const pa_plan_view* plan = call.plan;
        query_factor_ = a_.softcap != 0.0f ? a_.scale : a_.scale * LOG2E;
        id_row_ = plan->layout_ids ? plan->layout_ids[item_[PA_ITEM_LAYOUT]] : -1;
    }

    void run() {
        for (int64_t p = 0; p < panels_; ++p) begin(p);
        walk_ahead(call_, item_, [this](const Keys& k, const Keys* next) { visit(k, next); });
        finish();
    }

  protected:
    typedef typename T::type type;

    PanelRows rows_of(int64_t p) const {
        int64_t left = item_[PA_ITEM_NUM_ROWS] - p * W, step = item_[PA_ITEM_Q_STEP];
        return PanelRows{item_[PA_ITEM_Q_START] + step * p * W, step, left < W ? left : W, p * W / 16};
    }

    void begin(int64_t p) {
        PanelRows rows = rows_of(p);
        pack_panel<T>(query_ + rows.q_start * a_.query_strides[2], rows.q_step * a_.query_strides[2],
                      rows.count, a_.head_dim, query_factor_, x_.q + p * a_.head_dim * W);
        float *o = x_.o + p * a_.head_dim_v * W, *m = x_.m + p * W, *l = x_.l + p * W;
        for (int w = 0; w < W; ++w) m[w] = LOWEST, l[w] = 0.0f;
        if (task_.first_pass || item_[PA_ITEM_SLOT] >= 0) {
            memset(o, 0, sizeof(float) * a_.head_dim_v * W);
            return;
        }
        const float* lse = call_.running_lse + (task_.b * a_.num_heads + task_.h) * a_.seqlen_q;
        const int64_t* strides = call_.running_strides;
        const float* running =
            call_.running + task_.b * strides[0] + task_.h * strides[1] + rows.q_start * strides[2];
        pack_panel<Float32>(running, rows.q_step * strides[2], rows.count, a_.head_dim_v, 1.0f, o);
        for (int64_t w = 0; w < rows.count; ++w) {
            float x = lse[rows.q_start + rows.q_step * w];
            if (x == -__builtin_inff()) continue;
            m[w] = x * LOG2E;
            l[w] = 1.0f;
        }
    }

    // All panels over one tile or run of keys.
    void visit(const Keys& k, const Keys* next = nullptr) {
        look_ahead(next);
        int64_t ldk = k.step * a_.key_strides[2], ldv = k.step * a_.value_strides[2];
        const type* key = key_ + k.start * a_.key_strides[2];
        const type* value = value_ + k.start * a_.value_strides[2];
        if (sizeof(type) != 4 || a_.pack == PA_PACK_ROWS) {
            copy_rows<T>(key, ldk, k.count, a_.head_dim, x_.k, padded(a_.head_dim));
            copy_rows<T>(value, ldv, k.count, a_.head_dim_v, x_.v, padded(a_.head_dim_v));
            panels(k, x_.k, padded(a_.head_dim), x_.v, padded(a_.head_dim_v));
        } else {
            panels(k, (const float*)key, ldk, (const float*)value, ldv);
        }
    }

    // Spreads the next tile's rows over the micro-kernel calls of this one: keys in the first product, values
    // in the second.
    void look_ahead(const Keys* next) {
        next_keys_ = next_values_ = Prefetch{nullptr, 0, 0, 0, 0, 0};
        if (!next) return;
        int64_t size = sizeof(type), calls = panels_ * 4;
        int64_t each = (next->count + calls - 1) / calls;
        const type* key = key_ + next->start * a_.key_strides[2];
        const type* value = value_ + next->start * a_.value_strides[2];
        next_keys_ = Prefetch{(const char*)key,
                              next->step * a_.key_strides[2] * size,
                              next->count,
                              a_.head_dim * size,
                              0,
                              each};
        next_values_ = Prefetch{(const char*)value,
                                next->step * a_.value_strides[2] * size,
                                next->count,
                                a_.head_dim_v * size,
                                0,
                                each};
    }

    void panels(const Keys& k, const float* key, int64_t ldk, const float* value, int64_t ldv) {
        bool full = k.full();
        for (int64_t p = 0; p < panels_; ++p) {
            int64_t n0 = 0, n1 = k.count;
            PanelRows rows = rows_of(p);
            Ids ids{};
            if (!full && !narrow(k, rows, &ids, &n0, &n1)) continue;
            int64_t count = n1 - n0;
            scores_panel(x_.q + p * a_.head_dim * W, key + n0 * ldk, ldk, count, a_.head_dim, x_.s,
                         next_keys_);
            if (score_factor_ != 1.0f) scale_scores(x_.s, count, score_factor_);
            terms(x_.s, k, n0, count, rows);
            if (!full) mask(x_.s, k, n0, count, rows, ids);
            softmax_panel(x_.s, count, x_.m + p * W, x_.l + p * W, x_.alpha);
            values_panel(x_.s, value + n0 * ldv, ldv, count, a_.head_dim_v, x_.o + p * a_.head_dim_v * W,
                         x_.alpha, next_values_);
        }
    }

    // Ids of a panel's rows and of all keys, where a tile compares them.
    struct Ids {
        int32_t rows[W];
        const int32_t* keys;
    };

    // The keys [*n0, *n1) of a partial tile that the panel may keep; false if there are none.
    bool narrow(const Keys& k, const PanelRows& rows, Ids* ids, int64_t* n0, int64_t* n1) const {
        kept_range(call_, k, rows.group, n0, n1);
        if (k.bits_same != k.bits_other) {
            ids->keys = call_.plan->k_ids + (int64_t)id_row_ * a_.seqlen_k;
            load_ids(call_, rows, id_row_, ids->rows);
            if (k.bits_other == PA_BITS_EMPTY) id_range(k, ids->rows, ids->keys, n0, n1);
        }
        return *n0 < *n1;
    }

    void mask(float* s, const Keys& k, int64_t n0, int64_t count, const PanelRows& rows,
              const Ids& ids) const {
        if (ids.keys)
            apply_ids(s, count, call_, k, n0, rows.group, ids.rows, ids.keys);
        else
            apply_bits(s, count, call_, k, n0, rows.group);
    }

    void terms(float* s, const Keys& k, int64_t n0, int64_t count, const PanelRows& rows) {
        if (a_.softcap != 0.0f) add_softcap(s, count, a_.softcap);
        if (a_.alibi_slopes)
            add_alibi(s, count, k, n0, rows, call_.plan->q_offset,
                      a_.alibi_slopes[task_.b * a_.alibi_strides[0] + task_.h * a_.alibi_strides[1]]);
        if (!a_.bias) return;
        const int64_t* strides = a_.bias_strides;
        int64_t offset = task_.b * strides[0] + task_.h * strides[1] + rows.q_start * strides[2] +
                         (k.start + k.step * n0) * strides[3];
        for (int w = 0; w < W; ++w) x_.line[w] = 0.0f;
        if (a_.bias_dtype == PA_FLOAT32)
            add_bias<Float32>(s, count, (const float*)a_.bias + offset, rows.q_step * strides[2],
                              k.step * strides[3], rows.count, x_.line);
        else
            add_bias<T>(s, count, (const type*)a_.bias + offset, rows.q_step * strides[2],
                        k.step * strides[3], rows.count, x_.line);
    }

    // Normalises and stores: whole rows go to the output (or the running rows), pieces to their slot.
    void finish() {
        bool piece = item_[PA_ITEM_SLOT] >= 0;
        int64_t slot = piece ? task_.head_index * call_.schedule->num_slots + item_[PA_ITEM_SLOT] : 0;
        for (int64_t p = 0; p < panels_; ++p) {
            PanelRows rows = rows_of(p);
            float lse[W], factor[W] __attribute__((aligned(64)));
            for (int64_t w = 0; w < W; ++w) {
                float l = x_.l[p * W + w];
                factor[w] = l == 0.0f ? 0.0f : 1.0f / l;
                lse[w] = l == 0.0f ? -__builtin_inff() : x_.m[p * W + w] * LN2 + __builtin_logf(l);
            }
            const float* o = x_.o + p * a_.head_dim_v * W;
            if (piece) {
                float* out = call_.slots + (slot * call_.slot_rows + p * W) * a_.head_dim_v;
                unpack_panel<Float32>(o, factor, rows.count, a_.head_dim_v, out, a_.head_dim_v);
                memcpy(call_.slot_lse + slot * call_.slot_rows + p * W, lse, sizeof(float) * rows.count);
            } else {
                store_panel(o, factor, lse, rows);
            }
        }
        if (piece && arrive_last(call_, task_)) merge_pieces(call_, task_, item_[PA_ITEM_NUM_ROWS]);
    }

    void store_panel(const float* o, float* factor, float* lse, const PanelRows& rows) {
        int64_t head_row = (task_.b * a_.num_heads + task_.h) * a_.seqlen_q;
        if (!task_.last_pass) {
            const int64_t* strides = call_.running_strides;
            float* out =
                call_.running + task_.b * strides[0] + task_.h * strides[1] + rows.q_start * strides[2];
            unpack_panel<Float32>(o, factor, rows.count, a_.head_dim_v, out, rows.q_step * strides[2]);
            for (int64_t w = 0; w < rows.count; ++w)
                call_.running_lse[head_row + rows.q_start + rows.q_step * w] = lse[w];
            return;
        }
        for (int64_t w = 0; a_.sinks && w < rows.count; ++w)
            lse[w] = apply_sink(call_, task_.h, lse[w], factor + w);
        const int64_t* strides = a_.output_strides;
        type* out =
            (type*)a_.output + task_.b * strides[0] + task_.h * strides[1] + rows.q_start * strides[2];
        unpack_panel<T>(o, factor, rows.count, a_.head_dim_v, out, rows.q_step * strides[2]);
        if (!a_.lse) return;
        float* dst = a_.lse + task_.b * a_.lse_strides[0] + task_.h * a_.lse_strides[1];
        for (int64_t w = 0; w < rows.count; ++w)
            dst[(rows.q_start + rows.q_step * w) * a_.lse_strides[2]] = lse[w];
    }

    const Call& call_;
    const pa_cpu_args& a_;
    const Task& task_;
    const int32_t* item_;
    Scratch x_;
    Prefetch next_keys_, next_values_;
    const type *query_, *key_, *value_;
    int64_t panels_;
    int32_t id_row_;
    // The softmax scale: multiplied into the query, or (where the query must stay exact) into the scores.
    float query_factor_, score_factor_ = 1.0f;
};

static int64_t forward_scratch(const Call& call) {
    return Scratch(call, nullptr).floats * (int64_t)sizeof(float);
}

static void forward_item(const Call& call, const Task& task, void* scratch) {
    if (call.args.dtype == PA_FLOAT32)
        ItemRun<Float32>(call, task, scratch).run();
    else if (call.args.dtype == PA_FLOAT16)
        ItemRun<Half>(call, task, scratch).run();
    else
        ItemRun<BFloat16>(call, task, scratch).run();
}

}  // namespace PA_ISA
}  // namespace cpu
}  // namespace portattn
