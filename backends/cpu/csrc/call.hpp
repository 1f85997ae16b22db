// What the driver hands to the kernels of one instruction set. Plain data, no standard library (see
// simd.hpp).
#pragma once
#include "cpu.h"

namespace portattn {
namespace cpu {

struct BackwardCall;
struct Kernels;

struct Call {
    pa_cpu_args args;
    const pa_plan_view* plan;
    const pa_schedule_view* schedule;
    const uint16_t* bits_by_key;
    const Kernels* kernels;
    int64_t run_keys;  // keys of a full run done at once
    // Cut rows: normalised pieces, their LSE, arrival counters; slot s of head x (query head, or KV head when
    // group_heads) is [slot_rows, head_dim_v] at (x * num_slots + s) * slot_rows * head_dim_v.
    float* slots;
    float* slot_lse;
    int32_t* counters;
    int64_t slot_rows;
    // Rows between passes: float32, normalised, and their LSE. Null with one pass.
    float* running;
    int64_t running_strides[3];
    float* running_lse;  // [batch, num_heads, seqlen_q] contiguous
    double mean_keys;    // visited by a query tile, on average
    // Keys and values in the form that the kernels want, made by a pass before the first; null without.
    void* packed;
};

struct Task {
    const int32_t* item;
    int64_t b, h, head_index;  // head_index: for slots and counters
    bool first_pass, last_pass;
};

// One set per instruction set.
struct Kernels {
    const char* name;
    int32_t panel;
    int64_t (*forward_scratch)(const Call&);
    void (*forward_item)(const Call&, const Task&, void* scratch);
    int64_t (*decode_scratch)(const Call&);
    void (*decode_item)(const Call&, const Task&, void* scratch);
    double (*fma_flops)(int64_t steps);  // runs, returns the number of operations
    float (*read_sum)(const float* data, int64_t count);
    bool packs_tiles;  // PA_PACK_TILES exists
    // A pass before the first that fills call.packed; pack_bytes is 0 where the call needs none.
    int64_t (*pack_bytes)(const Call&);
    int64_t (*pack_tasks)(const Call&);
    void (*pack_task)(const Call&, int64_t index);
    // The backward (backward_call.hpp): statistics of rows, one pass over key tiles, gradients from sums.
    void (*backward_rows)(const BackwardCall&, int64_t index);
    int64_t (*backward_scratch)(const BackwardCall&);
    void (*backward_task)(const BackwardCall&, int32_t pass, int64_t index, void* scratch);
    void (*backward_store)(const BackwardCall&, int64_t index);
};

// Baseline code (rows.cpp). Adds 1 to the row's counter; true for the piece that arrives last.
bool arrive_last(const Call& call, const Task& task);
// Merges the pieces of `rows` rows in slot order with what earlier passes left, and stores them. row_of(r) is
// the query row and head of slot row r.
void merge_pieces(const Call& call, const Task& task, int64_t rows);
// Where slot row r of the task belongs.
struct RowPlace {
    int64_t h, row;
};
RowPlace row_place(const Call& call, const Task& task, int64_t r);
// Stores one finished row (normalised, natural log LSE): into the running buffers, or with sinks into the
// output.
void store_row(const Call& call, const Task& task, RowPlace place, const float* o, float lse);
// LSE and output factor of a row with its head's sink: o *= factor.
float apply_sink(const Call& call, int64_t h, float lse, float* factor);

}  // namespace cpu
}  // namespace portattn
