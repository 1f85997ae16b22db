// From accumulators to memory: whole rows, pieces of cut rows and their merge, and rows that passes hand on.
#pragma once

#include "scores.cuh"

namespace portattn {

// How a finished row of this pass becomes the row that is stored:
// stored = own * output + running * running_output, and its LSE.
struct RowEnd {
    float own, running, lse;
};

PA_DEVICE float log_add_exp(float a, float b) {
    if (a == -infinity() && b == -infinity()) return a;  // else -inf - -inf would be NaN
    const float top = max_f32(a, b);
    return top + log_exact(exp_exact(a - top) + exp_exact(b - top));
}

// exp(part - whole), and 0 for an empty part: -inf - -inf would be NaN.
PA_DEVICE float share(float part, float whole) {
    return part == -infinity() ? 0.0f : exp_exact(part - whole);
}

PA_DEVICE int64 row_position(const Work& work, int row) {
    return work.item.q_start + static_cast<int64>(work.item.q_step) * row;
}

PA_DEVICE int64 running_row(const Params& p, const Work& work, int row) {
    return static_cast<int64>(work.batch_head) * p.seqlen_q + row_position(work, row);
}

PA_DEVICE RowEnd end_row(const Params& p, const Work& work, int row, float lse) {
    RowEnd end{1.0f, 0.0f, lse};
    if (p.continues) {
        const float before = p.running_lse[running_row(p, work, row)];
        const float merged = log_add_exp(lse, before);
        end = RowEnd{share(lse, merged), share(before, merged), merged};
    }
    if (p.last_pass && p.sinks != nullptr) {
        const float with_sink = log_add_exp(end.lse, load_float(p.sinks + work.head * p.sinks_stride_head));
        const float kept = share(end.lse, with_sink);
        end = RowEnd{end.own * kept, end.running * kept, with_sink};
    }
    return end;
}

PA_DEVICE void store_lse(const Params& p, const Work& work, int row, float lse) {
    if (!p.last_pass) {
        p.running_lse[running_row(p, work, row)] = lse;
    } else if (p.lse != nullptr) {
        p.lse[work.batch * p.lse_stride_batch + work.head * p.lse_stride_head +
              row_position(work, row) * p.lse_stride_row] = lse;
    }
}

// Four columns from `column`, a multiple of 4; those past head_dim_v do not exist.
PA_DEVICE void store_floats(float* target, const Vec4& v, int count) {
    target[0] = v.x;
    if (count > 1) target[1] = v.y;
    if (count > 2) target[2] = v.z;
    if (count > 3) target[3] = v.w;
}

PA_DEVICE void store_output(const Params& p, const Work& work, int row, int column, const Vec4& v,
                            int count) {
    const int64 index = work.batch * p.output_stride_batch + work.head * p.output_stride_head +
                        row_position(work, row) * p.output_stride_row + column;
    if constexpr (kTensorCores) {
        const uint32 low = pack_pair<kDtype == kBfloat16>(v.x, v.y);
        const uint32 high = pack_pair<kDtype == kBfloat16>(v.z, v.w);
        uint16* output = static_cast<uint16*>(p.output) + index;
        if (kAligned && count >= 4) {
            global_store_words(output, low, high);
            return;
        }
        output[0] = static_cast<uint16>(low & 0xffffu);
        if (count > 1) output[1] = static_cast<uint16>(low >> 16);
        if (count > 2) output[2] = static_cast<uint16>(high & 0xffffu);
        if (count > 3) output[3] = static_cast<uint16>(high >> 16);
    } else {
        float* output = static_cast<float*>(p.output) + index;
        if (kAligned && count >= 4) {
            global_store_vec4(output, v);
        } else {
            store_floats(output, v, count);
        }
    }
}

// Adds `share_before` of the running row, and stores the row of the last pass, or the new running row.
PA_DEVICE void store_columns(const Params& p, const Work& work, int row, int column, Vec4 v,
                             float share_before) {
    const int count = p.head_dim_v - column;
    float* running = p.running_output + running_row(p, work, row) * p.head_dim_v + column;
    // An empty running row is skipped, not multiplied by 0: x + 0 * NaN would spread what it does not hold.
    if (p.continues && share_before != 0.0f) {
        v.x += share_before * running[0];
        if (count > 1) v.y += share_before * running[1];
        if (count > 2) v.z += share_before * running[2];
        if (count > 3) v.w += share_before * running[3];
    }
    if (p.last_pass) {
        store_output(p, work, row, column, v, count);
    } else {
        store_floats(running, v, count);
    }
}

// The row's normaliser and LSE from the four lanes' sums; returns 1 / sum, 0 for an empty row.
PA_DEVICE float finish_row(float sum, float top, float scale_log2, float& lse) {
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const float c = kScoreTerms ? 1.0f : scale_log2;
    lse = sum == 0.0f ? -infinity() : top * c * kLn2 + log_exact(sum);
    return sum == 0.0f ? 0.0f : 1.0f / sum;
}

PA_DEVICE int64 piece_row(const Params& p, const Work& work, int slot, int row) {
    return (static_cast<int64>(work.batch_head) * p.num_slots + slot) * kBlockQ + row;
}

// 16 rows of 32 columns of O go through shared memory, 2 KB a warp: a lane then has four neighbouring columns
// to store, and the loop over rows need not be unrolled. Swizzled like the tiles.
PA_DEVICE void stage_columns(uint32 stage, const Lane& lane, const float (&o)[kOutTiles][4], int round,
                             const float (&factor)[2]) {
    PA_UNROLL
    for (int n = 0; n < 4; ++n) {
        const int column = out_column(lane, 4 * round + n) - 32 * round;
        PA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const uint32 chunk = chunk_offset<128>(lane.group + 8 * half, column / 4);
            shared_store_pair(stage + chunk + 4 * (column % 4), o[4 * round + n][2 * half] * factor[half],
                              o[4 * round + n][2 * half + 1] * factor[half]);
        }
    }
}

PA_DEVICE void store_staged(const Params& p, const Work& work, const Lane& lane, uint32 stage, int tile,
                            int round, const float (&share_before)[2]) {
#pragma unroll 1
    for (int step = 0; step < 4; ++step) {
        const int row_in_tile = 4 * step + lane.lane / 8;
        const int source = 4 * (row_in_tile % 8);
        const float upper = shuffle(share_before[0], source);
        const float lower = shuffle(share_before[1], source);
        const int row = 16 * (lane.warp * kRowTiles + tile) + row_in_tile;
        const int column = 32 * round + 4 * (lane.lane % 8);
        if (row >= work.item.num_rows || column >= p.head_dim_v) continue;
        const Vec4 v = shared_load_vec4(stage + chunk_offset<128>(row_in_tile, lane.lane % 8));
        if (work.item.slot >= 0) {
            float* target = p.piece_output + piece_row(p, work, work.item.slot, row) * p.head_dim_v + column;
            store_floats(target, v, p.head_dim_v - column);
        } else {
            store_columns(p, work, row, column, v, row_in_tile < 8 ? upper : lower);
        }
    }
}

// Stores the item's rows; a cut row's piece goes to its slot. `shared`: kStageBytes for each warp, which no
// other warp uses any more.
PA_DEVICE void store_rows(const Params& p, const Work& work, const Lane& lane, const Output& o,
                          const RowState& state, uint32 shared) {
    const uint32 stage = shared + kStageBytes * lane.warp;
    PA_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
        float factor[2];
        float row_lse[2];
        float share_before[2] = {0.0f, 0.0f};
        PA_UNROLL
        for (int half = 0; half < 2; ++half) {
            factor[half] =
                finish_row(state.sum[tile][half], state.max[tile][half], p.scale_log2, row_lse[half]);
            const int row = lane.row(tile, half);
            if (work.item.slot >= 0 || row >= work.item.num_rows) continue;
            const RowEnd end = end_row(p, work, row, row_lse[half]);
            factor[half] *= end.own;
            share_before[half] = end.running;
            row_lse[half] = end.lse;
        }
        PA_UNROLL
        for (int round = 0; round < kHeadDimV / 32; ++round) {
            stage_columns(stage, lane, o[tile], round, factor);
            warp_barrier();
            store_staged(p, work, lane, stage, tile, round, share_before);
            warp_barrier();
        }
        // After the barriers: four lanes have read the running LSE that one of them overwrites.
        PA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = lane.row(tile, half);
            if (lane.quad != 0 || row >= work.item.num_rows) continue;
            if (work.item.slot >= 0) {
                p.piece_lse[piece_row(p, work, work.item.slot, row)] = row_lse[half];
            } else {
                store_lse(p, work, row, row_lse[half]);
            }
        }
    }
}

// True in the block that stored the last piece of its row; its memory operations then see the other pieces.
// `barrier` is one of the threads that stored them; `flag` is 4 bytes of shared memory.
template <typename Barrier>
PA_DEVICE bool is_last_piece(const Params& p, const Work& work, uint32 flag, Barrier barrier) {
    device_fence();
    barrier();
    if (thread_index() == 0) {
        int* counter = p.counters + static_cast<int64>(work.batch_head) * p.num_counters + work.item.counter;
        const bool last = atomic_increment(counter) == work.item.num_pieces - 1;
        if (last) *counter = 0;
        shared_store_int(flag, last ? 1 : 0);
    }
    barrier();
    const bool last = shared_load_int(flag) != 0;
    device_fence();
    return last;
}

PA_DEVICE void add_columns(Vec4& v, float weight, const float* source, int count) {
    v.x = fma_f32(weight, load_fresh(source), v.x);
    if (count > 1) v.y = fma_f32(weight, load_fresh(source + 1), v.y);
    if (count > 2) v.z = fma_f32(weight, load_fresh(source + 2), v.z);
    if (count > 3) v.w = fma_f32(weight, load_fresh(source + 3), v.w);
}

PA_DEVICE float warp_max(float v) {
    PA_UNROLL
    for (int mask = 1; mask < 32; mask *= 2) v = max_f32(v, shuffle_xor(v, mask));
    return v;
}

PA_DEVICE float warp_sum(float v) {
    PA_UNROLL
    for (int mask = 1; mask < 32; mask *= 2) v += shuffle_xor(v, mask);
    return v;
}

// The LSE of piece `slot` of a row, -inf past the last.
PA_DEVICE float piece_lse(const Params& p, const Work& work, int slot, int row) {
    const bool exists = slot < work.item.slot_first + work.item.num_pieces && row < work.item.num_rows;
    return exists ? load_fresh(p.piece_lse + piece_row(p, work, slot, row)) : -infinity();
}

// A row's normaliser over all its pieces: their LSEs are relative to `base`, and the sum of exponentials.
struct PieceSum {
    float base, sum;
};

PA_DEVICE PieceSum sum_pieces(const Params& p, const Work& work, const Lane& lane, int row, float first_lse) {
    float top = warp_max(first_lse);
    for (int n = 32; n < work.item.num_pieces; n += 32)
        top = max_f32(top, warp_max(piece_lse(p, work, work.item.slot_first + n + lane.lane, row)));
    const float base = top == -infinity() ? 0.0f : top;
    float sum = warp_sum(exp_exact(first_lse - base));
    for (int n = 32; n < work.item.num_pieces; n += 32)
        sum += warp_sum(exp_exact(piece_lse(p, work, work.item.slot_first + n + lane.lane, row) - base));
    return PieceSum{base, sum};
}

// Merges the pieces in slot order, so that the result does not depend on which came last: one warp a row, its
// lanes side by side on the pieces' LSEs, then on the columns. Loads wait for nothing but each other: from
// another block's memory they take as long as a tile's products.
PA_DEVICE void merge_pieces(const Params& p, const Work& work, const Lane& lane) {
    const int first = work.item.slot_first;
    float next_lse = piece_lse(p, work, first + lane.lane, lane.warp);
    for (int row = lane.warp; row < work.item.num_rows; row += kNumWarps) {
        const float first_lse = next_lse;
        next_lse = piece_lse(p, work, first + lane.lane, row + kNumWarps);
        const PieceSum total = sum_pieces(p, work, lane, row, first_lse);
        const bool empty = total.sum == 0.0f;
        const RowEnd end = end_row(p, work, row, empty ? -infinity() : total.base + log_exact(total.sum));
        const float scale = empty ? 0.0f : end.own / total.sum;
        for (int block = 0; block < p.head_dim_v; block += 128) {
            const int column = block + 4 * lane.lane;
            const int count = p.head_dim_v - column;
            Vec4 v{0.0f, 0.0f, 0.0f, 0.0f};
            for (int n = 0; n < work.item.num_pieces; n += 32) {
                const float lse = n == 0 ? first_lse : piece_lse(p, work, first + n + lane.lane, row);
                const float weight = scale * exp_exact(lse - total.base);
                const int pieces = work.item.num_pieces - n < 32 ? work.item.num_pieces - n : 32;
                const float* source =
                    p.piece_output + piece_row(p, work, first + n, row) * p.head_dim_v + column;
                const int64 stride = static_cast<int64>(kBlockQ) * p.head_dim_v;
#pragma unroll 8
                for (int piece = 0; piece < pieces; ++piece) {
                    const float share = shuffle(weight, piece);
                    if (count >= 4 && p.head_dim_v % 4 == 0) {
                        const Vec4 part = load_fresh_vec4(source + piece * stride);
                        v.x = fma_f32(share, part.x, v.x);
                        v.y = fma_f32(share, part.y, v.y);
                        v.z = fma_f32(share, part.z, v.z);
                        v.w = fma_f32(share, part.w, v.w);
                    } else if (count > 0) {
                        add_columns(v, share, source + piece * stride, count);
                    }
                }
            }
            if (count > 0) store_columns(p, work, row, column, v, end.running);
        }
        warp_barrier();  // every lane has read the running LSE
        if (lane.lane == 0) store_lse(p, work, row, end.lse);
    }
}

}  // namespace portattn
