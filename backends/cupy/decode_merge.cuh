// From the key groups of a block, and the blocks of a row of work, to stored rows.
#pragma once

#include "decode_strip.cuh"

namespace portattn {

PA_DEVICE float log_add_exp(float a, float b) {
    if (a == -infinity() && b == -infinity()) return a;  // else -inf - -inf would be NaN
    const float top = max_f32(a, b);
    return top + log_exact(exp_exact(a - top) + exp_exact(b - top));
}

// How a merged row becomes the row that is stored: O is multiplied by `kept`.
struct RowEnd {
    float kept, lse;
};

PA_DEVICE RowEnd add_sink(const Params& p, int head, float lse) {
    if (p.sinks == nullptr) return RowEnd{1.0f, lse};
    const float with_sink = log_add_exp(lse, load_float(p.sinks + head * p.sinks_stride_head));
    return RowEnd{lse == -infinity() ? 0.0f : exp_exact(lse - with_sink), with_sink};
}

PA_DEVICE void store_lse(const Params& p, const Cursor& work, const RowPlace& place, float lse) {
    if (p.lse == nullptr) return;
    p.lse[work.line.batch * p.lse_stride_batch + place.head * p.lse_stride_head +
          place.query * p.lse_stride_row] = lse;
}

PA_DEVICE uint16* output_row(const Params& p, const Cursor& work, const RowPlace& place) {
    return static_cast<uint16*>(p.output) + work.line.batch * p.output_stride_batch +
           place.head * p.output_stride_head + place.query * p.output_stride_row;
}

// Four columns from `column`, a multiple of 4; those past head_dim_v do not exist.
PA_DEVICE void store_output(uint16* row, int column, int head_dim_v, const Vec4& v) {
    const int count = head_dim_v - column;
    if (count <= 0) return;
    const uint32 low = pack_pair<kBfloat16>(v.x, v.y);
    const uint32 high = pack_pair<kBfloat16>(v.z, v.w);
    uint16* output = row + column;
    if (kAligned && count >= 4) {
        global_store_words(output, low, high);
        return;
    }
    output[0] = static_cast<uint16>(low & 0xffffu);
    if (count > 1) output[1] = static_cast<uint16>(low >> 16);
    if (count > 2) output[2] = static_cast<uint16>(high & 0xffffu);
    if (count > 3) output[3] = static_cast<uint16>(high >> 16);
}

PA_DEVICE int64 piece_row(int slot, int row) { return static_cast<int64>(slot) * kBlockQ + row; }

// A row of the key groups together: what this warp's O is multiplied by, and the row's LSE.
struct Merged {
    float factor[2], lse[2];
};

PA_DEVICE Merged merge_statistics(const Params& p, const Lane& lane, const RowState& state, uint32 stats) {
    const int warp = lane.thread / 32;
    PA_UNROLL
    for (int half = 0; half < 2; ++half) {
        float sum = state.sum[half];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        const int row = lane.group + 8 * half;
        if (lane.quad == 0) shared_store_pair(stats + 16 * (16 * warp + row), state.max[half], sum);
    }
    block_barrier();
    const float c = kScoreTerms ? 1.0f : p.scale_log2;
    Merged merged;
    PA_UNROLL
    for (int half = 0; half < 2; ++half) {
        const uint32 row = stats + 16 * (16 * lane.row_group + lane.group + 8 * half);
        float top = -infinity();
        PA_UNROLL
        for (int g = 0; g < kKeyGroups; ++g)
            top = max_f32(top, shared_load_vec4(row + 256 * kRowGroups * g).x);
        const float base = top == -infinity() ? 0.0f : top;
        float sum = 0.0f;
        PA_UNROLL
        for (int g = 0; g < kKeyGroups; ++g) {
            const Vec4 part = shared_load_vec4(row + 256 * kRowGroups * g);
            sum += part.y * exp2_fast((part.x - base) * c);
        }
        merged.lse[half] = sum == 0.0f ? -infinity() : top * c * kLn2 + log_exact(sum);
        merged.factor[half] = sum == 0.0f ? 0.0f : exp2_fast((state.max[half] - base) * c) / sum;
    }
    return merged;
}

// 16 rows of 32 columns of each warp's O, swizzled like the strips.
PA_DEVICE void stage_columns(uint32 stage, const Lane& lane, const Output& o, int round,
                             const float (&factor)[2]) {
    PA_UNROLL
    for (int n = 0; n < 4; ++n) {
        const int column = 8 * n + 2 * lane.quad;
        PA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const uint32 chunk = chunk_offset<128>(lane.group + 8 * half, column / 4);
            shared_store_pair(stage + chunk + 4 * (column % 4), o[4 * round + n][2 * half] * factor[half],
                              o[4 * round + n][2 * half + 1] * factor[half]);
        }
    }
}

// Adds up the key groups' staged columns, in their order, and stores them.
PA_DEVICE void store_columns(const Params& p, const Lane& lane, const Cursor& work, int slot, int round,
                             uint32 stage) {
    for (int item = lane.thread; item < 8 * kBlockQ; item += kThreads) {
        const int row = item / 8;
        const RowPlace place = find_row(p, work, row);
        if (!place.exists) continue;
        const uint32 source = stage + 2048 * (row / 16) + chunk_offset<128>(row % 16, item % 8);
        Vec4 v = shared_load_vec4(source);
        PA_UNROLL
        for (int g = 1; g < kKeyGroups; ++g) {
            const Vec4 other = shared_load_vec4(source + 2048 * kRowGroups * g);
            v.x += other.x;
            v.y += other.y;
            v.z += other.z;
            v.w += other.w;
        }
        const int column = 32 * round + 4 * (item % 8);
        if (slot >= 0) {
            global_store_vec4(p.piece_output + piece_row(slot, row) * kHeadDimV + column, v);
        } else {
            store_output(output_row(p, work, place), column, p.head_dim_v, v);
        }
    }
}

// Merges the key groups and stores the rows: to the output, or this block's piece of them to a slot >= 0.
PA_DEVICE void store_rows(const Params& p, const Lane& lane, const Cursor& work, const Output& o,
                          const RowState& state, uint32 shared, int slot) {
    Merged merged = merge_statistics(p, lane, state, shared + kStatsOffset);
    PA_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int row = lane.row(half);
        const RowPlace place = find_row(p, work, row);
        if (!place.exists) continue;
        const bool stores = lane.key_group == 0 && lane.quad == 0;
        if (slot >= 0) {
            if (stores) p.piece_lse[piece_row(slot, row)] = merged.lse[half];
            continue;
        }
        const RowEnd end = add_sink(p, place.head, merged.lse[half]);
        merged.factor[half] *= end.kept;
        if (stores) store_lse(p, work, place, end.lse);
    }
    const uint32 stage = shared + kStageOffset;
    PA_UNROLL
    for (int round = 0; round < kHeadDimV / 32; ++round) {
        stage_columns(stage + 2048 * (lane.thread / 32), lane, o, round, merged.factor);
        block_barrier();
        store_columns(p, lane, work, slot, round, stage);
        block_barrier();
    }
}

// True in the block that stored the last of the row's pieces; it then sees the other pieces.
PA_DEVICE bool is_last_piece(const Params& p, int first_worker, int num_pieces, uint32 flag) {
    device_fence();
    block_barrier();
    if (thread_index() == 0) {
        // A block begins at most one row of work that others go on with.
        int* counter = p.counters + first_worker;
        const bool last = atomic_increment(counter) == num_pieces - 1;
        if (last) *counter = 0;
        shared_store_int(flag, last ? 1 : 0);
    }
    block_barrier();
    const bool last = shared_load_int(flag) != 0;
    device_fence();
    return last;
}

// The slot of a block's piece of a row of work: the row began in `first_worker`.
PA_DEVICE int piece_slot(int worker, int first_worker) {
    return 2 * worker + (worker == first_worker ? 1 : 0);
}

// Merges the pieces in the order of the keys, so that the result does not depend on which came last: one warp
// a row.
PA_DEVICE void merge_pieces(const Params& p, const Lane& lane, const Cursor& work, int first_worker,
                            int num_pieces) {
    for (int row = lane.thread / 32; row < kBlockQ; row += kNumWarps) {
        const RowPlace place = find_row(p, work, row);
        if (!place.exists) continue;
        float top = -infinity();
        for (int n = lane.lane; n < num_pieces; n += 32)
            top = max_f32(
                top, load_fresh(p.piece_lse + piece_row(piece_slot(first_worker + n, first_worker), row)));
        PA_UNROLL
        for (int mask = 16; mask > 0; mask /= 2) top = max_f32(top, shuffle_xor(top, mask));
        const float base = top == -infinity() ? 0.0f : top;
        float sum = 0.0f;
        float v[kHeadDimV / 32] = {};
#pragma unroll 8  // so many loads are under way: a load takes longer than all else here
        for (int n = 0; n < num_pieces; ++n) {
            const int64 source = piece_row(piece_slot(first_worker + n, first_worker), row);
            const float weight = exp_exact(load_fresh(p.piece_lse + source) - base);
            sum += weight;
            PA_UNROLL
            for (int i = 0; i < kHeadDimV / 32; ++i)
                v[i] = fma_f32(weight, load_fresh(p.piece_output + source * kHeadDimV + 32 * i + lane.lane),
                               v[i]);
        }
        const RowEnd end = add_sink(p, place.head, sum == 0.0f ? -infinity() : base + log_exact(sum));
        const float factor = sum == 0.0f ? 0.0f : end.kept / sum;
        uint16* output = output_row(p, work, place);
        PA_UNROLL
        for (int i = 0; i < kHeadDimV / 32; ++i) {
            const int column = 32 * i + lane.lane;
            if (column < p.head_dim_v)
                output[column] = static_cast<uint16>(pack_pair<kBfloat16>(v[i] * factor, 0.0f) & 0xffffu);
        }
        if (lane.lane == 0) store_lse(p, work, place, end.lse);
    }
}

}  // namespace portattn
