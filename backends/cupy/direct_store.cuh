// Whole rows from accumulators to the output, without shared memory.
#pragma once

#include "epilogue.cuh"
#include "ptx_sm90.cuh"

namespace portattn {

// Whether 16 bytes of output, and 8 of float32 rows, can be stored at a time; else rows are staged.
PA_DEVICE bool stores_directly(const Params& p) { return kAligned && p.head_dim_v % 8 == 0; }

// The four lanes of a row have two neighbouring columns of each of four 8-column tiles; lane q gets all eight
// of tile q. A transpose of 4 x 4 words in two steps.
PA_DEVICE void gather_columns(uint32 (&words)[4], const Lane& lane) {
    const bool odd = (lane.quad & 1) != 0;
    const bool high = (lane.quad & 2) != 0;
    const uint32 first = shuffle_int(odd ? words[0] : words[1], lane.lane ^ 1);
    const uint32 second = shuffle_int(odd ? words[2] : words[3], lane.lane ^ 1);
    words[0] = odd ? first : words[0];
    words[1] = odd ? words[1] : first;
    words[2] = odd ? second : words[2];
    words[3] = odd ? words[3] : second;
    const uint32 third = shuffle_int(high ? words[0] : words[2], lane.lane ^ 2);
    const uint32 fourth = shuffle_int(high ? words[1] : words[3], lane.lane ^ 2);
    words[0] = high ? third : words[0];
    words[1] = high ? fourth : words[1];
    words[2] = high ? words[2] : third;
    words[3] = high ? words[3] : fourth;
}

// Two neighbouring columns of a row of float32: four lanes fill 32 bytes.
PA_DEVICE void store_float_row(float* row, const Params& p, const Lane& lane, const Output& o, int half,
                               float factor) {
    PA_UNROLL
    for (int n = 0; n < kOutTiles; ++n) {
        const int column = 8 * n + 2 * lane.quad;
        if (column < p.head_dim_v)
            global_store_pair(row + column, o[0][n][2 * half] * factor, o[0][n][2 * half + 1] * factor);
    }
}

PA_DEVICE void add_running_row(Output& o, const float* row, const Params& p, const Lane& lane, int half,
                               const RowEnd& end) {
    PA_UNROLL
    for (int n = 0; n < kOutTiles; ++n) {
        const int column = 8 * n + 2 * lane.quad;
        float x = 0.0f;
        float y = 0.0f;
        if (column < p.head_dim_v) global_load_pair(row + column, x, y);
        o[0][n][2 * half] += end.running * x;
        o[0][n][2 * half + 1] += end.running * y;
    }
}

PA_DEVICE void store_output_row(uint16* row, const Params& p, const Lane& lane, const Output& o, int half,
                                float factor, bool exists) {
    PA_UNROLL
    for (int n = 0; n < kOutTiles; n += 4) {
        uint32 words[4];
        PA_UNROLL
        for (int t = 0; t < 4; ++t)
            words[t] = pack_pair<kDtype == kBfloat16>(o[0][n + t][2 * half] * factor,
                                                      o[0][n + t][2 * half + 1] * factor);
        gather_columns(words, lane);
        const int column = 8 * (n + lane.quad);
        if (exists && column < p.head_dim_v) global_store_chunk(row + column, words);
    }
}

PA_DEVICE void store_piece_row(const Params& p, const Work& work, const Lane& lane, const Output& o, int half,
                               float factor, float lse) {
    const int64 row = piece_row(p, work, work.item.slot, lane.row(0, half));
    store_float_row(p.piece_output + row * p.head_dim_v, p, lane, o, half, factor);
    if (lane.quad == 0) p.piece_lse[row] = lse;
}

// As store_rows, from registers.
PA_DEVICE void store_rows_directly(const Params& p, const Work& work, const Lane& lane, Output& o,
                                   const RowState& state) {
    uint16* output = static_cast<uint16*>(p.output) + work.batch * p.output_stride_batch +
                     work.head * p.output_stride_head;
    PA_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int row = lane.row(0, half);
        const bool exists = row < work.item.num_rows;
        float lse;
        float factor = finish_row(state.sum[0][half], state.max[0][half], p.scale_log2, lse);
        if (work.item.slot >= 0) {
            if (exists) store_piece_row(p, work, lane, o, half, factor, lse);
            continue;
        }
        RowEnd end{1.0f, 0.0f, lse};
        float* running = nullptr;
        if (exists) {
            end = end_row(p, work, row, lse);
            running = p.running_output + running_row(p, work, row) * p.head_dim_v;
        }
        factor *= end.own;
        if (p.continues) {
            PA_UNROLL
            for (int n = 0; n < kOutTiles; ++n) {
                o[0][n][2 * half] *= factor;
                o[0][n][2 * half + 1] *= factor;
            }
            factor = 1.0f;
            // An empty running row is skipped: 0 * NaN would spread what it does not hold.
            if (exists && end.running != 0.0f) add_running_row(o, running, p, lane, half, end);
        }
        if (p.last_pass) {
            store_output_row(output + row_position(work, row) * p.output_stride_row, p, lane, o, half, factor,
                             exists);
        } else if (exists) {
            store_float_row(running, p, lane, o, half, factor);
        }
        warp_barrier();  // the four lanes of a row have read the running LSE
        if (exists && lane.quad == 0) store_lse(p, work, row, end.lse);
    }
}

}  // namespace portattn
