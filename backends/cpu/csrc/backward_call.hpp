// What the backward's driver hands to the kernels of one instruction set. Plain data, as call.hpp.
#pragma once
#include "call.hpp"

namespace portattn {
namespace cpu {

constexpr int64_t BLOCK_ROWS = 32;   // query rows that are masked, skipped and multiplied together
constexpr int64_t STAT_ROWS = 512;   // rows of one backward_rows task
constexpr int64_t STORE_ROWS = 256;  // rows or keys of one backward_store task

// Key tiles are divided into chunks; a task does one chunk for the query heads of one KV head, and sums dQ
// for the query rows [q_begin, q_end) that the chunk's tiles see.
struct Chunk {
    int64_t q_begin, q_end;
    int64_t offset;  // rows before it in a head's part of grad_query
};

struct BackwardCall {
    pa_cpu_backward_args args;
    const pa_plan_view* plan;
    const Kernels* kernels;
    bool amx;
    // [batch, num_heads, seqlen_q]: the LSE in units of log2 (inf where a row keeps nothing) as a sum of two,
    // as its rounding would be a factor of all the row's weights; and sum(grad_output * output) - grad_lse.
    float *lse2, *lse2_rest, *delta;
    // Sums of dQ without the scale, [batch * num_heads][query_rows][query_ld].
    float* grad_query;
    int64_t query_rows, query_ld;
    // Sums of dK without the scale, and of dV, [batch * num_kv_heads][seqlen_k][dim]; null where each key
    // tile is finished at once.
    float *grad_key, *grad_value;
    double* slope_sums;  // [batch * num_heads][num_chunks]
    double* sink_sums;   // [batch * num_heads][stat_tasks]
    const Chunk* chunks;
    const int32_t* chunk_rows;  // [num_passes][num_chunks + 1]: key tiles of a layout, from the pass's first
    int64_t num_chunks, stat_tasks;
    bool same_rows;         // all layouts have the same key tiles
    bool share_b, share_h;  // one task does all batches, all heads: they add to the same bias gradient
    int64_t max_tile_rows;  // block_q rounded up to BLOCK_ROWS
};

}  // namespace cpu
}  // namespace portattn
