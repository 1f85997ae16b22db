// The decode kernel's one argument. decode.py packs it by reading the fields below: pointers first, then
// 8-byte fields, one per line. Strides are in elements; a pointer that a call does not need is null.
#pragma once

namespace portattn {

struct Params {
    const void* query;      // [batch, num_heads, seqlen_q, head_dim]
    const void* key;        // [batch, num_kv_heads, seqlen_k, head_dim]
    const void* value;      // [batch, num_kv_heads, seqlen_k, head_dim_v]
    void* output;           // [batch, num_heads, seqlen_q, head_dim_v]
    float* lse;             // [batch, num_heads, seqlen_q] or null; natural log
    const int* kv_lengths;  // [batch] or null: the low words, length_stride apart
    const float* alibi;     // slopes, by strides
    const void* bias;       // [batch, num_heads, seqlen_q, seqlen_k], by strides
    const float* sinks;     // by its stride, or null
    float* piece_output;    // [2 * num_workers, block_q, padded head_dim_v]
    float* piece_lse;       // [2 * num_workers, block_q]
    int* counters;          // [num_workers], zero between launches
    long long query_stride_batch;
    long long query_stride_head;
    long long query_stride_row;
    long long key_stride_batch;
    long long key_stride_head;
    long long key_stride_row;
    long long value_stride_batch;
    long long value_stride_head;
    long long value_stride_row;
    long long output_stride_batch;
    long long output_stride_head;
    long long output_stride_row;
    long long lse_stride_batch;
    long long lse_stride_head;
    long long lse_stride_row;
    long long alibi_stride_batch;
    long long alibi_stride_head;
    long long sinks_stride_head;
    long long bias_stride_batch;
    long long bias_stride_head;
    long long bias_stride_row;
    long long bias_stride_key;
    long long q_offset;  // position of query 0 without kv_lengths
    int batch;
    int num_kv_heads;
    int group_size;  // query heads per KV head
    int seqlen_q;
    int seqlen_k;
    int head_dim;
    int head_dim_v;
    int row_blocks;     // blocks of block_q rows that group_size * seqlen_q rows fill
    int length_stride;  // 1 for int32 lengths, 2 for int64
    int mask_lo;        // the mask keeps max(mask_begin, i + mask_lo) <= j < min(mask_end, i + mask_hi + 1)
    int mask_hi;
    int mask_begin;
    int mask_end;
    int min_piece;    // strips that a block takes at least
    int num_workers;  // blocks of the grid
    int group_magic;  // n / group_size, see divide()
    int group_shift;
    int row_blocks_magic;  // n / row_blocks
    int row_blocks_shift;
    int query_factor;  // 1, -1 or 0: what products are multiplied by, so that the scale below is positive
    float scale_log2;  // |softmax scale| * log2(e); 1 * log2(e) where the scale is 0
    float softcap;
    float softcap_inverse;  // |scale| / softcap
};

}  // namespace portattn
