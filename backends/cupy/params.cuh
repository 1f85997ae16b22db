// The kernel's one argument. forward_sm80.py packs it by reading the fields below: 8-byte fields first, one
// per line. Strides are in elements; a pointer that a call does not need is null.
#pragma once

namespace portattn {

struct Params {
    // Inputs and outputs.
    const void* query;   // [batch, num_heads, seqlen_q, head_dim]
    const void* key;     // [batch, num_kv_heads, seqlen_k, head_dim]
    const void* value;   // [batch, num_kv_heads, seqlen_k, head_dim_v]
    void* output;        // [batch, num_heads, seqlen_q, head_dim_v]
    float* lse;          // [batch, num_heads, seqlen_q] or null; natural log
    const float* alibi;  // slopes, by strides
    const void* bias;    // [batch, num_heads, seqlen_q, seqlen_k], by strides
    const float* sinks;  // by its stride, or null
    // Plan and schedule (docs/formats.md).
    const int* items;  // items of this pass
    const int* full_list;
    const int* tiles;
    const unsigned int* bits;
    const int* bit_ranges;
    const int* layouts;
    const int* layout_ids;
    const int* q_ids;
    const int* k_ids;
    // Pieces of cut rows, and what passes hand on.
    float* piece_output;    // [batch * num_heads, num_slots, block_q, head_dim_v]
    float* piece_lse;       // [batch * num_heads, num_slots, block_q]
    int* counters;          // [batch * num_heads, num_counters]
    float* running_output;  // [batch, num_heads, seqlen_q, head_dim_v], normalised
    float* running_lse;     // [batch, num_heads, seqlen_q]
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
    long long q_offset;
    int batch;
    int num_heads;
    int group_size;  // query heads per KV head
    int seqlen_q;
    int seqlen_k;
    int head_dim;
    int head_dim_v;
    int num_items;  // items of one layout in this pass
    int head_group;
    int layout_batch;
    int layout_heads;
    int num_slots;
    int num_counters;
    int continues;     // not the first pass: merge with the running rows
    int last_pass;     // write the output; else the running rows
    int query_factor;  // 1, -1 or 0: what the query is multiplied by, so that the scale below is positive
    float scale;       // |softmax scale|, 1 where that is 0
    float scale_log2;  // scale * log2(e)
    float softcap;
    float softcap_inverse;  // scale / softcap
};

}  // namespace portattn
