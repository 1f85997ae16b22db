// The plain C ABI of libportattn: planner and scheduler. docs/formats.md describes every array.
// ctypes (portattn/native.py), the CPU kernels and the ONNX Runtime op all use these structs.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PA_EXPORT __attribute__((visibility("default")))
#define PA_ABI_VERSION 1

// Fields of one schedule item; PA_ITEM_FIELDS int32 per item.
enum {
    PA_ITEM_Q_START = 0,     // row index of the tile's first query row
    PA_ITEM_Q_STEP = 1,      // distance between its rows (the pass's step)
    PA_ITEM_NUM_ROWS = 2,    // rows that exist, <= block_q; 0: a padding item, nothing to do
    PA_ITEM_TILE_BEGIN = 3,  // partial tiles: indices into plan.tiles
    PA_ITEM_TILE_END = 4,
    PA_ITEM_FULL_FIRST = 5,  // progression: start of the first full tile; list: index into schedule.full_list
    PA_ITEM_FULL_COUNT = 6,  // number of full tiles
    PA_ITEM_FULL_STEP = 7,   // progression: step between the keys of a tile; 0: list mode
    PA_ITEM_FULL_STRIDE = 8,  // progression: distance between the starts of neighbouring tiles
    PA_ITEM_SLOT = 9,         // workspace slot of this piece; -1: the row is whole
    PA_ITEM_SLOT_FIRST = 10,  // first slot of the row's pieces
    PA_ITEM_NUM_PIECES = 11,  // pieces of the row (1: whole)
    PA_ITEM_COUNTER = 12,     // arrival counter of the row; -1: whole
    PA_ITEM_COST = 13,        // tiles in the item, as ordered by
    PA_ITEM_LAYOUT = 14,
    PA_ITEM_RESERVED = 15,
    PA_ITEM_FIELDS = 16
};

// A tile's bits_same / bits_other when not an index into plan.bits.
enum { PA_BITS_FULL = -1, PA_BITS_EMPTY = -2 };

// One mask-data tensor. dtype: 0 int32, 1 int64, 2 bool (one byte). Contiguous.
typedef struct {
    const void* data;
    int32_t dtype;
    int32_t ndim;
    int64_t shape[4];
} pa_array;

typedef struct {
    uint32_t struct_size;
    uint32_t abi_version;
    const int64_t* program;
    int64_t program_len;
    const pa_array* arrays;
    int64_t num_arrays;
    int64_t batch;
    int64_t num_heads;
    int64_t seqlen_q;
    int64_t seqlen_k;
    int64_t q_offset;
    int32_t block_q;
    int32_t block_k;
    int64_t max_bits_bytes;  // budget for bit tiles; 0: the default
} pa_plan_args;

// A read-only view of a plan; lives as long as the plan.
typedef struct {
    int64_t seqlen_q, seqlen_k, q_offset;
    int32_t block_q, block_k;
    int32_t num_layouts, num_passes, num_rows, num_tiles, num_runs, num_bit_tiles, words_per_row;
    int32_t layout_batch, layout_heads;  // shape of layouts: each 1 or the call's
    int32_t num_id_rows;
    int32_t has_steps;          // 1 if any k_step or pass step is not 1
    const int32_t* layouts;     // [layout_batch, layout_heads]
    const int32_t* layout_ids;  // [num_layouts]: row of q_ids / k_ids, or -1
    const int32_t* pass_steps;  // [num_passes]
    const int32_t* row_ptr;     // [num_passes * num_layouts + 1], pass-major
    const int32_t* rows;        // [num_rows, 6]: q_start, num_rows, tile_begin, tile_end, run_begin, run_end
    const int32_t* tiles;       // [num_tiles, 4]: k_start, k_step, bits_same, bits_other
    const int32_t* runs;        // [num_runs, 4]: k_start, k_step, count, k_stride
    const uint32_t* bits;       // [num_bit_tiles, block_q, words_per_row]
    const int32_t* bit_ranges;  // [num_bit_tiles, ceil(block_q / 16), 2]: first, last + 1 kept key
    const int32_t* q_ids;       // [num_id_rows, seqlen_q]
    const int32_t* k_ids;       // [num_id_rows, seqlen_k]
    int32_t transposed;         // 1: rows are key tiles and tiles are query tiles
} pa_plan_view;

typedef struct pa_plan pa_plan;
typedef struct pa_schedule pa_schedule;

// Returns NULL on error and writes a message into err (NUL-terminated, cut at err_len).
PA_EXPORT pa_plan* portattn_plan_create(const pa_plan_args* args, char* err, int64_t err_len);
PA_EXPORT void portattn_plan_destroy(pa_plan* plan);
PA_EXPORT const pa_plan_view* portattn_plan_view(const pa_plan* plan);
// The same, with q_ids and k_ids NULL before the first portattn_plan_view, which makes them.
PA_EXPORT const pa_plan_view* portattn_plan_view_without_ids(const pa_plan* plan);
// The plan's bits with the query rows in the bits: uint16 [num_bit_tiles, ceil(block_q / 16), block_k].
// Made on first use, thread-safe, lives as long as the plan.
PA_EXPORT const uint16_t* portattn_plan_bits_by_key(const pa_plan* plan);
// The transposed plan: query and key tiles swapped (rows are key tiles, tiles are query tiles);
// bit tiles keep their [block_q, block_k] layout. For dK and dV.
PA_EXPORT pa_plan* portattn_plan_transpose(const pa_plan* plan, char* err, int64_t err_len);

typedef struct {
    uint32_t struct_size;
    uint32_t abi_version;
    int64_t batch;
    int64_t num_heads;
    int64_t workers;              // things that run at once: threads, or SMs times CTAs a SM
    int64_t min_piece;            // a row is cut only above this many tiles (and the formula's)
    int64_t max_workspace_bytes;  // over all heads; the scheduler cuts less to stay below it
    int64_t head_dim_v;
} pa_schedule_args;

typedef struct {
    int32_t num_passes, num_layouts;
    int32_t num_slots;     // workspace slots per (batch, head), reused by each pass
    int32_t num_counters;  // arrival counters per (batch, head), reused by each pass
    int32_t full_list_len;
    const int32_t* items_per_pass;  // [num_passes]: items of one layout (padded to the longest)
    const int32_t* item_ptr;  // [num_passes]: first item of the pass; layout l starts at + l * items_per_pass
    const int32_t* items;     // [total, PA_ITEM_FIELDS]; longest first in each layout
    const int32_t* full_list;  // [full_list_len, 2]: k_start, k_step
    int64_t total_items;
    int64_t workspace_bytes;  // batch * num_heads * num_slots * block_q * (head_dim_v + 1) * 4
} pa_schedule_view;

PA_EXPORT pa_schedule* portattn_schedule_create(const pa_plan* plan, const pa_schedule_args* args, char* err,
                                                int64_t err_len);
PA_EXPORT void portattn_schedule_destroy(pa_schedule* schedule);
PA_EXPORT const pa_schedule_view* portattn_schedule_view(const pa_schedule* schedule);

// The arrays of a plan and of a schedule (either may be NULL) one behind the other, each at a multiple of 128
// bytes: those of pa_plan_view from layouts to k_ids, then items, item_ptr, items_per_pass and full_list. Ids
// that rows and keys share lie there once. starts gets where each begins, in bytes (11 + 4 entries); target
// NULL: nothing is copied. Returns the bytes in all.
PA_EXPORT int64_t portattn_pack(const pa_plan* plan, const pa_schedule* schedule, uint8_t* target,
                                int64_t* starts);

PA_EXPORT uint32_t portattn_abi_version(void);

#ifdef __cplusplus
}
#endif
