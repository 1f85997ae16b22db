// The backward: one pass over the key tiles, keys in the vector lanes.
//   for each key tile, for each query tile that sees it:
//     S = Q K^T,  P = exp2(S - LSE),  dP = dO V^T,  dS = P (dP - delta)
//     dV^T += dO^T P,  dK^T += Q^T dS,  dQ += dS K
// (Dao et al., FlashAttention, 2022, algorithm 4; delta = sum(dO O), less the LSE's own gradient). A task
// owns a chunk of key tiles for the query heads of one KV head, so that dK and dV need no other task; its
// part of dQ is summed in float32 and added to the other chunks' by backward_store. Products are an Engine's:
// micro-kernels (backward_micro.hpp) or AMX (amx_backward.hpp).
#pragma once
#include "backward_micro.hpp"

namespace portattn {
namespace cpu {
namespace PA_ISA {

// One task: a chunk of key tiles.
template <class T, class Engine>
class BackwardRun {
  public:
    typedef typename T::type type;

    BackwardRun(const BackwardCall& call, int32_t pass, int64_t chunk, Carver& memory)
        : call_(call), a_(call.args), v_(*call.plan), pass_(pass), chunk_(chunk), engine_(call, memory) {
        int64_t rows = call.max_tile_rows;
        stats_.lse2 = memory.take<float>(rows);
        stats_.lse2_rest = memory.take<float>(rows);
        stats_.delta = memory.take<float>(rows);
        cap_ = memory.take<float>(BLOCK_ROWS * W);
        spare_ = memory.take<float>(W * 256);
        blocks_ = memory.take<uint64_t>(v_.block_k / W);
        key_ids_ = memory.take<int32_t>(v_.block_k);
    }

    void run(int64_t b, int64_t kv_head) {
        b_ = b, kv_head_ = kv_head;
        int64_t group = a_.num_heads / a_.num_kv_heads, h0 = kv_head * group;
        const Chunk& chunk = call_.chunks[chunk_];
        if (pass_ == 0 && a_.grad_query)
            for (int64_t h = h0; h < h0 + group; ++h)
                memset(query_sums(h), 0,
                       sizeof(float) * (size_t)((chunk.q_end - chunk.q_begin) * call_.query_ld));
        if (call_.same_rows) {
            const int32_t* range = call_.chunk_rows + pass_ * (call_.num_chunks + 1) + chunk_;
            for (int64_t r = range[0]; r < range[1]; ++r) {
                begin_keys(first_row(h0) + r * 6);
                for (int64_t h = h0; h < h0 + group; ++h) visit_row(h, first_row(h) + r * 6);
                finish_keys();
            }
            return;
        }
        for (int64_t h = h0; h < h0 + group; ++h) {
            int32_t at = pass_ * v_.num_layouts + layout_of(h);
            for (int32_t r = v_.row_ptr[at]; r < v_.row_ptr[at + 1]; ++r) {
                begin_keys(v_.rows + (int64_t)r * 6);
                visit_row(h, v_.rows + (int64_t)r * 6);
                finish_keys();
            }
        }
    }

  private:
    int32_t layout_of(int64_t h) const {
        return v_.layouts[(v_.layout_batch == 1 ? 0 : b_ + a_.plan_batch) * v_.layout_heads +
                          (v_.layout_heads == 1 ? 0 : h)];
    }
    const int32_t* first_row(int64_t h) const {
        return v_.rows + (int64_t)v_.row_ptr[pass_ * v_.num_layouts + layout_of(h)] * 6;
    }
    float* query_sums(int64_t h) const {
        return call_.grad_query +
               ((b_ * a_.num_heads + h) * call_.query_rows + call_.chunks[chunk_].offset) * call_.query_ld;
    }

    void begin_keys(const int32_t* row) {
        tile_.k_start = row[0], tile_.k_step = v_.pass_steps[pass_], tile_.keys = row[1];
        is_begun_ = false;
    }

    // Packs the keys when the first query tile comes; without one their gradients are 0.
    void pack_keys() {
        if (is_begun_) return;
        is_begun_ = true;
        const type* key = (const type*)a_.key + b_ * a_.key_strides[0] + kv_head_ * a_.key_strides[1];
        const type* value = (const type*)a_.value + b_ * a_.value_strides[0] + kv_head_ * a_.value_strides[1];
        engine_.begin_keys(key + tile_.k_start * a_.key_strides[2], tile_.k_step * a_.key_strides[2],
                           value + tile_.k_start * a_.value_strides[2], tile_.k_step * a_.value_strides[2],
                           tile_.keys);
    }

    void visit_row(int64_t h, const int32_t* row) {
        if (row[2] == row[3] && row[4] == row[5]) return;
        pack_keys();
        begin_head(h);
        for (int32_t t = row[2]; t < row[3]; ++t) {
            const int32_t* tile = v_.tiles + (int64_t)t * 4;
            visit(tile[0], tile[1], tile[2], tile[3]);
        }
        for (int32_t r = row[4]; r < row[5]; ++r) {
            const int32_t* run = v_.runs + (int64_t)r * 4;
            for (int32_t e = 0; e < run[2]; ++e)
                visit(run[0] + (int64_t)e * run[3], run[1], PA_BITS_FULL, PA_BITS_FULL);
        }
        if (terms_.wants_slope)
            call_.slope_sums[(b_ * a_.num_heads + h) * call_.num_chunks + chunk_] += terms_.slope_sum;
    }

    void begin_head(int64_t h) {
        int64_t head = b_ * a_.num_heads + h;
        query_ = (const type*)a_.query + b_ * a_.query_strides[0] + h * a_.query_strides[1];
        grad_ = (const type*)a_.grad_output + b_ * a_.grad_output_strides[0] + h * a_.grad_output_strides[1];
        head_stats_ = RowStats{call_.lse2 + head * a_.seqlen_q, call_.lse2_rest + head * a_.seqlen_q,
                               call_.delta + head * a_.seqlen_q};
        sums_ = a_.grad_query ? query_sums(h) : nullptr;
        int32_t ids = v_.layout_ids ? v_.layout_ids[layout_of(h)] : -1;
        q_ids_ = ids < 0 ? nullptr : v_.q_ids + (int64_t)ids * a_.seqlen_q;
        const int32_t* k_ids = ids < 0 ? nullptr : v_.k_ids + (int64_t)ids * a_.seqlen_k;
        for (int64_t n = 0; k_ids && n < v_.block_k; ++n) {
            int32_t id = n < tile_.keys ? k_ids[tile_.k_start + tile_.k_step * n] : -2;
            key_ids_[n] = id < 0 ? -2 : id;
        }
        terms_ = ScoreTerms{};
        terms_.scale = a_.scale, terms_.softcap = a_.softcap, terms_.q_offset = v_.q_offset;
        terms_.has_alibi = a_.alibi_slopes != nullptr;
        terms_.wants_slope = terms_.has_alibi && a_.grad_alibi_slopes;
        if (terms_.has_alibi)
            terms_.slope = a_.alibi_slopes[b_ * a_.alibi_strides[0] + h * a_.alibi_strides[1]];
        terms_.bias_strides = a_.bias_strides, terms_.grad_bias_strides = a_.grad_bias_strides;
        terms_.bias_is_half = a_.bias_dtype != PA_FLOAT32;
        if (a_.bias)
            terms_.bias = (const char*)a_.bias +
                          (b_ * a_.bias_strides[0] + h * a_.bias_strides[1]) * (terms_.bias_is_half ? 2 : 4);
        if (a_.grad_bias && a_.grad_bias_strides[3] != 0)
            terms_.grad_bias = a_.grad_bias + b_ * a_.grad_bias_strides[0] + h * a_.grad_bias_strides[1];
    }

    void visit(int64_t q_start, int64_t q_step, int32_t same, int32_t other) {
        int64_t exist = (a_.seqlen_q - q_start + q_step - 1) / q_step;
        tile_.q_start = q_start, tile_.q_step = q_step;
        tile_.count = exist < v_.block_q ? exist : v_.block_q;
        tile_.bits_same = same, tile_.bits_other = other;
        if (tile_.count <= 0) return;
        int64_t panels = (tile_.keys + W - 1) / W, blocks = (tile_.count + BLOCK_ROWS - 1) / BLOCK_ROWS;
        for (int64_t n = 0; n < blocks * BLOCK_ROWS; ++n) {
            bool is_there = n < tile_.count;
            int64_t row = q_start + q_step * n;
            stats_.lse2[n] = is_there ? head_stats_.lse2[row] : __builtin_inff();
            stats_.lse2_rest[n] = is_there ? head_stats_.lse2_rest[row] : 0.0f;
            stats_.delta[n] = is_there ? head_stats_.delta[row] : 0.0f;
        }
        engine_.begin_rows(query_ + q_start * a_.query_strides[2], q_step * a_.query_strides[2],
                           grad_ + q_start * a_.grad_output_strides[2], q_step * a_.grad_output_strides[2],
                           tile_.count);
        // The products of a block are begun before the last one's weights are computed: on AMX both go on at
        // once.
        Block held[2];
        int64_t n = 0;
        int turn = 0;
        for (int64_t p = 0; p < panels; ++p) {
            blocks_[p] = 0;
            if (n > 0 && held[(n - 1) & 1].p == p - 1) turn ^= 1;
            for (int64_t c = 0; c < blocks; ++c) {
                Block& x = held[n & 1];
                x.first = c * BLOCK_ROWS, x.count = rows_at(x.first), x.p = p, x.slot = n & 1, x.turn = turn;
                x.keep = block_keeps(v_, tile_, x.first, x.count, p, q_ids_, key_ids_ + p * W, x.words);
                if (x.keep == KEEP_NONE) continue;
                engine_.products(x);
                if (n > 0) finish(held[(n - 1) & 1], p);
                blocks_[p] |= 1ull << c;
                ++n;
            }
        }
        if (n == 0) return;
        finish(held[(n - 1) & 1], panels);
        if (!sums_) return;
        int64_t begin = call_.chunks[chunk_].q_begin;
        for (int64_t first = 0; first < tile_.count; first += BLOCK_ROWS)
            engine_.add_queries(first, rows_at(first), tile_.keys, blocks_,
                                sums_ + (q_start + q_step * first - begin) * call_.query_ld,
                                q_step * call_.query_ld);
    }

    int64_t rows_at(int64_t first) const {
        return tile_.count - first < BLOCK_ROWS ? tile_.count - first : BLOCK_ROWS;
    }

    // P and dS of a block; then dK and dV of its panel, if the next block is another's.
    void finish(const Block& x, int64_t next_panel) {
        float factor = a_.scale * LOG2E;
        if (terms_.any()) {
            apply_terms<T>(terms_, tile_, x, cap_);
            probabilities<true>(x, 1.0f, stats_);
            term_gradients(terms_, tile_, x, cap_);
            engine_.keep(x);
        } else if (x.keep == KEEP_ALL) {
            engine_.template weights<false>(x, factor, stats_);
        } else {
            engine_.template weights<true>(x, factor, stats_);
        }
        if (x.p != next_panel) engine_.add_keys(x, tile_.count, blocks_[x.p]);
    }

    // Stores the tile's dK and dV, or adds them to the sums.
    void finish_keys() {
        for (int64_t p = 0; p * W < tile_.keys; ++p) {
            int64_t count = tile_.keys - p * W < W ? tile_.keys - p * W : W;
            int64_t first = tile_.k_start + tile_.k_step * p * W;
            store_keys(is_begun_ ? engine_.grad_key(p) : nullptr, a_.scale, a_.head_dim, first, count,
                       a_.grad_key, a_.grad_key_strides, call_.grad_key);
            store_keys(is_begun_ ? engine_.grad_value(p) : nullptr, 1.0f, a_.head_dim_v, first, count,
                       a_.grad_value, a_.grad_value_strides, call_.grad_value);
        }
    }

    void store_keys(const float* panel, float scale, int64_t dim, int64_t first, int64_t count, void* out,
                    const int64_t* strides, float* sums) {
        if (!out) return;
        float factor[W] __attribute__((aligned(64)));
        for (int j = 0; j < NV; ++j) store(factor + j * VL, splat(sums ? 1.0f : scale));
        if (sums) {
            if (!panel) return;
            unpack_panel<Float32>(panel, factor, count, dim, spare_, dim);
            float* to = sums + ((b_ * a_.num_kv_heads + kv_head_) * a_.seqlen_k + first) * dim;
            for (int64_t w = 0; w < count; ++w)
                for (int64_t d = 0; d < dim; ++d) to[tile_.k_step * w * dim + d] += spare_[w * dim + d];
            return;
        }
        type* to = (type*)out + b_ * strides[0] + kv_head_ * strides[1] + first * strides[2];
        if (panel) {
            unpack_panel<T>(panel, factor, count, dim, to, tile_.k_step * strides[2]);
            return;
        }
        for (int64_t w = 0; w < count; ++w)
            memset(to + w * tile_.k_step * strides[2], 0, sizeof(type) * (size_t)dim);
    }

    const BackwardCall& call_;
    const pa_cpu_backward_args& a_;
    const pa_plan_view& v_;
    int32_t pass_;
    int64_t chunk_, b_ = 0, kv_head_ = 0;
    Engine engine_;
    RowStats stats_{}, head_stats_{};
    float *cap_, *spare_;
    uint64_t* blocks_;
    int32_t* key_ids_;
    Tile tile_{};
    bool is_begun_ = false;
    const type *query_ = nullptr, *grad_ = nullptr;
    const int32_t* q_ids_ = nullptr;
    float* sums_ = nullptr;
    ScoreTerms terms_{};
};

template <class F>
static auto by_storage(int32_t dtype, F f) -> decltype(f(Float32())) {
    return dtype == PA_FLOAT32 ? f(Float32()) : dtype == PA_FLOAT16 ? f(Half()) : f(BFloat16());
}

template <class T, class Engine>
static int64_t run_task(const BackwardCall& call, int32_t pass, int64_t index, void* scratch) {
    const pa_cpu_backward_args& a = call.args;
    Carver memory{(char*)scratch};
    int64_t chunk = index % call.num_chunks, group = index / call.num_chunks;
    BackwardRun<T, Engine> run(call, pass, chunk, memory);
    if (!scratch) return memory.bytes;
    int64_t kv_heads = call.share_h ? 1 : a.num_kv_heads, b = group / kv_heads, h = group % kv_heads;
    for (int64_t x = call.share_b ? 0 : b; x < (call.share_b ? a.batch : b + 1); ++x)
        for (int64_t y = call.share_h ? 0 : h; y < (call.share_h ? a.num_kv_heads : h + 1); ++y)
            run.run(x, y);
    return 0;
}

static int64_t fma_backward(const BackwardCall& call, int32_t pass, int64_t index, void* scratch) {
    return by_storage(call.args.dtype, [&](auto t) {
        typedef decltype(t) T;
        return run_task<T, FmaEngine<T>>(call, pass, index, scratch);
    });
}

}  // namespace PA_ISA
}  // namespace cpu
}  // namespace portattn
