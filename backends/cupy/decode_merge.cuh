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

PA_DEVICE Vec4 add_weighted(const Vec4& sum, float weight, const Vec4& v) {
    return Vec4{fma_f32(weight, v.x, sum.x), fma_f32(weight, v.y, sum.y), fma_f32(weight, v.z, sum.z),
                fma_f32(weight, v.w, sum.w)};
}

PA_DEVICE Vec4 scaled(const Vec4& v, float factor) {
    return Vec4{v.x * factor, v.y * factor, v.z * factor, v.w * factor};
}

PA_DEVICE int64 piece_row(int slot, int row) { return static_cast<int64>(slot) * kBlockQ + row; }

// What one warp knows of a row: the maximum of its keys' scores, and the sum of their exponentials.
PA_DEVICE void stage_statistics(uint32 stats, const Lane& lane, const RowState& state) {
    PA_UNROLL
    for (int half = 0; half < 2; ++half) {
        float sum = state.sum[half];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        const int row = 16 * (lane.thread / 32) + lane.group + 8 * half;
        if (lane.quad == 0) shared_store_pair(stats + 16 * row, state.max[half], sum);
    }
}

// Four rows of a warp's O; neighbouring rows are shifted by 32 bytes, so that there are no bank conflicts.
PA_DEVICE uint32 stage_offset(int row, int chunk) {
    return static_cast<uint32>(row * 4 * kHeadDimV + ((chunk ^ (2 * (row % 4))) << 4));
}

// Rows [4 * round, 4 * round + 4) of the warp's 16.
PA_DEVICE void stage_rows(uint32 stage, const Lane& lane, const Output& o, int round) {
    if (lane.group / 4 != round % 2) return;
    const int row = 4 * (lane.thread / 32) + lane.group % 4;
    const bool upper = round >= 2;
    PA_UNROLL
    for (int n = 0; n < kOutTiles; ++n)
        shared_store_pair(stage + stage_offset(row, 2 * n + lane.quad / 2) + 8 * (lane.quad % 2),
                          upper ? o[n][2] : o[n][0], upper ? o[n][3] : o[n][1]);
}

// Merges the staged rows of the key groups, in their order, and stores them.
PA_DEVICE void store_staged(const Params& p, const Lane& lane, const Cursor& work, int slot, int round,
                            uint32 stage, uint32 stats) {
    constexpr int kChunks = kHeadDimV / 4;
    const float c = kScoreTerms ? 1.0f : p.scale_log2;
#pragma unroll 1
    for (int item = lane.thread; item < 4 * kRowGroups * kChunks; item += kThreads) {
        const int chunk = item % kChunks;
        const int staged = item / kChunks;  // row group by row group, four rows each
        const int row = 16 * (staged / 4) + 4 * round + staged % 4;
        const RowPlace place = find_row(p, work, row);
        if (!place.exists) continue;
        float top = -infinity();
        Vec4 part[kKeyGroups];  // x: maximum, y: sum
        PA_UNROLL
        for (int g = 0; g < kKeyGroups; ++g) {
            part[g] = shared_load_vec4(stats + 16 * (16 * kRowGroups * g + row));
            top = max_f32(top, part[g].x);
        }
        const float base = top == -infinity() ? 0.0f : top;
        float sum = 0.0f;
        Vec4 v{0.0f, 0.0f, 0.0f, 0.0f};
        PA_UNROLL
        for (int g = 0; g < kKeyGroups; ++g) {
            const float weight = exp2_fast((part[g].x - base) * c);
            sum = fma_f32(weight, part[g].y, sum);
            const Vec4 o = shared_load_vec4(stage + stage_offset(4 * kRowGroups * g + staged, chunk));
            v = add_weighted(v, weight, o);
        }
        const float lse = sum == 0.0f ? -infinity() : kLn2 * fma_f32(top, c, log2_fast(sum));
        const float factor = sum == 0.0f ? 0.0f : reciprocal_fast(sum);
        if (slot >= 0) {
            global_store_vec4(p.piece_output + piece_row(slot, row) * kHeadDimV + 4 * chunk,
                              scaled(v, factor));
            if (chunk == 0) p.piece_lse[piece_row(slot, row)] = lse;
        } else {
            const RowEnd end = add_sink(p, place.head, lse);
            store_output(output_row(p, work, place), 4 * chunk, p.head_dim_v, scaled(v, factor * end.kept));
            if (chunk == 0) store_lse(p, work, place, end.lse);
        }
    }
}

// Merges the key groups and stores the rows: to the output, or this block's piece of them to a slot >= 0.
PA_DEVICE void store_rows(const Params& p, const Lane& lane, const Cursor& work, const Output& o,
                          const RowState& state, uint32 shared, int slot) {
    const int rounds = divide_up(min_int(rows_left(p, work.line), 16), 4);
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
        block_barrier();  // every warp has computed the row, and read what was staged before
        if (round == 0) stage_statistics(shared + kStatsOffset, lane, state);
        stage_rows(shared + kStageOffset, lane, o, round);
        block_barrier();
        store_staged(p, lane, work, slot, round, shared + kStageOffset, shared + kStatsOffset);
    }
}

// True in the block that stored the last of the row's pieces; it then sees the other pieces.
PA_DEVICE bool is_last_piece(const Params& p, int first_worker, int num_pieces, uint32 flag) {
    block_barrier();
    if (thread_index() == 0) {
        // A block begins at most one row of work that others go on with.
        int* counter = p.counters + first_worker;
        const bool last = atomic_increment_ordered(counter) == num_pieces - 1;
        if (last) *counter = 0;
        shared_store_int(flag, last ? 1 : 0);
    }
    block_barrier();
    return shared_load_int(flag) != 0;
}

// The slot of a block's piece of a row of work: the row began in `first_worker`.
PA_DEVICE int piece_slot(int worker, int first_worker) {
    return 2 * worker + (worker == first_worker ? 1 : 0);
}

// The pieces of one row of a row of work; all but the first lie at equal distances.
struct Pieces {
    static constexpr int kStep = 2 * kBlockQ;  // rows
    int count;
    const float* first_output;
    const float* first_lse;
    const float* output;  // where the first would lie at that distance
    const float* lse;

    PA_DEVICE Pieces(const Params& p, int first_worker, int num_pieces, int row) : count(num_pieces) {
        const int64 begin = piece_row(piece_slot(first_worker, first_worker), row);
        const int64 regular = piece_row(2 * first_worker, row);
        first_output = p.piece_output + begin * kHeadDimV;
        first_lse = p.piece_lse + begin;
        output = p.piece_output + regular * kHeadDimV;
        lse = p.piece_lse + regular;
    }
    PA_DEVICE float load_lse(int n) const {
        return n < count ? load_fresh(n == 0 ? first_lse : lse + n * kStep) : -infinity();
    }
    PA_DEVICE void load(Vec4 (&v)[kMergeBatch], int first, int column) const {
        const int left = column < kHeadDimV ? count - first : 0;
        const float* source = output + static_cast<int64>(first) * (kStep * kHeadDimV) + column;
        PA_UNROLL
        for (int n = 0; n < kMergeBatch; ++n) {
            v[n] = Vec4{0.0f, 0.0f, 0.0f, 0.0f};
            if (n < left)
                v[n] = load_fresh_vec4(n == 0 && first == 0 ? first_output + column
                                                            : source + n * (kStep * kHeadDimV));
        }
    }
};

// Merges the pieces in the order of the keys, so that the result does not depend on which came last: a warp
// takes 128 columns of a row. A load takes longer than all else here, so that many are under way.
PA_DEVICE void merge_pieces(const Params& p, const Lane& lane, const Cursor& work, int first_worker,
                            int num_pieces) {
    constexpr int kParts = (kHeadDimV + 127) / 128;
    const int rows = min_int(rows_left(p, work.line), kBlockQ);
    for (int task = lane.thread / 32; task < rows * kParts; task += kNumWarps) {
        const int row = task / kParts;
        const int column = 128 * (task % kParts) + 4 * lane.lane;
        const Pieces pieces(p, first_worker, num_pieces, row);
        float top = -infinity();
        float sum = 0.0f;
        Vec4 v{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
        for (int first = 0; first < num_pieces; first += kMergeBatch) {
            Vec4 part[kMergeBatch];
            pieces.load(part, first, column);
            // Past the batch a piece would count twice.
            const float lse = lane.lane < kMergeBatch ? pieces.load_lse(first + lane.lane) : -infinity();
            float new_top = max_f32(top, lse);
            PA_UNROLL
            for (int mask = 16; mask > 0; mask /= 2) new_top = max_f32(new_top, shuffle_xor(new_top, mask));
            const float base = new_top == -infinity() ? 0.0f : new_top;
            const float rescale = exp2_fast(kLog2e * (top - base));
            const float weight = exp2_fast(kLog2e * (lse - base));
            top = new_top;
            sum *= rescale;
            v = scaled(v, rescale);
            PA_UNROLL
            for (int n = 0; n < kMergeBatch; ++n) {
                const float w = shuffle(weight, n);
                sum += w;
                v = add_weighted(v, w, part[n]);
            }
        }
        const RowPlace place = find_row(p, work, row);
        const RowEnd end =
            add_sink(p, place.head, sum == 0.0f ? -infinity() : fma_f32(kLn2, log2_fast(sum), top));
        const float factor = sum == 0.0f ? 0.0f : end.kept * reciprocal_fast(sum);
        if (column < kHeadDimV)
            store_output(output_row(p, work, place), column, p.head_dim_v, scaled(v, factor));
        if (lane.lane == 0 && task % kParts == 0) store_lse(p, work, place, end.lse);
    }
}

}  // namespace portattn
