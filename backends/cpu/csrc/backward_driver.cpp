// The backward call: checks the arguments, divides the key tiles into chunks, runs the steps.
//   1. rows:  delta, and what does not depend on single keys (gradients of sinks, of a bias without keys)
//   2. passes of the transposed plan: dK and dV by key tile, dQ as sums, one for each chunk
//   3. store: dQ (and dK, dV where several passes add to them) in their own dtype
// Sums are in the order of the chunks, so that the result never depends on timing.
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "backward_call.hpp"
#include "isa.hpp"
#include "memory.hpp"
#include "no_denormals.hpp"
#include "threads.hpp"

namespace portattn {
namespace cpu {
namespace {

constexpr int64_t MAX_SUM_BYTES = 256ll << 20;  // of dQ, before fewer chunks are made
constexpr double SERIAL_FLOPS = 1e7;            // below it a second thread costs more than it gives

struct Backward {
    BackwardCall call{};
    std::vector<Chunk> chunks;
    std::vector<int32_t> chunk_rows;
    std::vector<void*> memory;
    int64_t scratch_bytes = 0;

    ~Backward() {
        for (void* block : memory) give_memory(block);
    }

    template <class X>
    bool take(X** out, int64_t count) {
        if (count <= 0) return true;
        void* block = take_memory((size_t)count * sizeof(X));
        if (!block) return false;
        memory.push_back(block);
        *out = static_cast<X*>(block);
        return true;
    }
};

int32_t layout_row(const pa_plan_view& v, int32_t pass, int32_t layout) {
    return v.row_ptr[pass * v.num_layouts + layout];
}

int64_t rows_in(const pa_plan_view& v, int32_t pass, int32_t layout) {
    return v.row_ptr[pass * v.num_layouts + layout + 1] - layout_row(v, pass, layout);
}

bool has_same_rows(const pa_plan_view& v) {
    for (int32_t pass = 0; pass < v.num_passes; ++pass)
        for (int32_t layout = 1; layout < v.num_layouts; ++layout) {
            if (rows_in(v, pass, layout) != rows_in(v, pass, 0)) return false;
            const int32_t *a = v.rows + layout_row(v, pass, 0) * 6,
                          *b = v.rows + layout_row(v, pass, layout) * 6;
            for (int64_t r = 0; r < rows_in(v, pass, 0); ++r)
                if (a[r * 6] != b[r * 6] || a[r * 6 + 1] != b[r * 6 + 1]) return false;
        }
    return true;
}

// Calls f(first query row, last + 1) for each query tile or run of key tile `row`.
template <class F>
void spans_of(const pa_plan_view& v, const int32_t* row, F f) {
    for (int32_t t = row[2]; t < row[3]; ++t) {
        const int32_t* tile = v.tiles + (int64_t)t * 4;
        f(tile[0], tile[0] + (int64_t)tile[1] * (v.block_q - 1) + 1, 1);
    }
    for (int32_t r = row[4]; r < row[5]; ++r) {
        const int32_t* run = v.runs + (int64_t)r * 4;
        int64_t last = run[0] + (int64_t)(run[2] - 1) * run[3];
        f(run[0], last + (int64_t)run[1] * (v.block_q - 1) + 1, run[2]);
    }
}

// Query tiles of each key tile of a pass, over all layouts; they have the same key tiles.
std::vector<int64_t> costs_of(const pa_plan_view& v, int32_t pass) {
    std::vector<int64_t> costs((size_t)rows_in(v, pass, 0), 0);
    for (int32_t layout = 0; layout < v.num_layouts; ++layout)
        for (size_t r = 0; r < costs.size(); ++r)
            spans_of(v, v.rows + (layout_row(v, pass, layout) + (int64_t)r) * 6,
                     [&](int64_t, int64_t, int64_t tiles) { costs[r] += tiles; });
    return costs;
}

// The most tasks that a call has without dividing its key tiles.
int64_t whole_tasks(const BackwardCall& call) {
    return (call.share_b ? 1 : call.args.batch) * (call.share_h ? 1 : call.args.num_kv_heads);
}

int64_t wanted_chunks(const BackwardCall& call) {
    int64_t tasks = whole_tasks(call), threads = call.args.threads;
    if (!call.same_rows || tasks >= 4 * threads || tasks % threads == 0) return 1;
    return (2 * threads + tasks - 1) / tasks;
}

// Divides each pass's key tiles into neighbouring ones of about equal cost.
void divide(Backward& work, int64_t count) {
    BackwardCall& call = work.call;
    const pa_plan_view& v = *call.plan;
    call.num_chunks = count;
    work.chunk_rows.assign((size_t)(v.num_passes * (count + 1)), 0);
    work.chunks.assign((size_t)count, Chunk{call.args.seqlen_q, 0, 0});
    for (int32_t pass = 0; call.same_rows && pass < v.num_passes; ++pass) {
        int32_t* rows = work.chunk_rows.data() + pass * (count + 1);
        std::vector<int64_t> costs = costs_of(v, pass);
        int64_t total = 0, done = 0;
        for (int64_t cost : costs) total += cost;
        int64_t chunk = 0;
        for (size_t r = 0; r < costs.size(); ++r) {
            while (chunk + 1 < count && done >= total * (chunk + 1) / count) rows[++chunk] = (int32_t)r;
            done += costs[r];
        }
        while (chunk < count) rows[++chunk] = (int32_t)costs.size();
    }
    for (int32_t pass = 0; pass < v.num_passes; ++pass)
        for (int32_t layout = 0; layout < v.num_layouts; ++layout)
            for (int64_t c = 0; c < count; ++c) {
                Chunk& chunk = work.chunks[(size_t)c];
                const int32_t* rows = work.chunk_rows.data() + pass * (count + 1) + c;
                int64_t begin = rows[0], end = rows[1];
                if (!call.same_rows) begin = 0, end = rows_in(v, pass, layout);
                for (int64_t r = begin; r < end; ++r)
                    spans_of(v, v.rows + (layout_row(v, pass, layout) + r) * 6,
                             [&](int64_t first, int64_t last, int64_t) {
                                 chunk.q_begin = std::min(chunk.q_begin, first);
                                 chunk.q_end = std::max(chunk.q_end, std::min(last, call.args.seqlen_q));
                             });
            }
    call.query_rows = 0;
    for (Chunk& chunk : work.chunks) {
        chunk.q_end = std::max(chunk.q_end, chunk.q_begin);
        chunk.offset = call.query_rows;
        call.query_rows += chunk.q_end - chunk.q_begin;
    }
}

int32_t check(const pa_cpu_backward_args& a, char* err, size_t n) {
    if (a.struct_size != sizeof(a) || a.abi_version != PA_ABI_VERSION)
        return snprintf(err, n,
                        "pa_cpu_backward_args has size %u and ABI version %u; this library needs %u and %u",
                        a.struct_size, a.abi_version, (unsigned)sizeof(a), (unsigned)PA_ABI_VERSION);
    if (a.dtype < PA_FLOAT32 || a.dtype > PA_BFLOAT16 ||
        (a.bias && a.bias_dtype != a.dtype && a.bias_dtype != PA_FLOAT32))
        return snprintf(err, n,
                        "dtype is %d and bias_dtype %d; allowed are 0, 1, 2, and for the bias that or 0",
                        a.dtype, a.bias_dtype);
    if (a.head_dim < 1 || a.head_dim > 256 || a.head_dim_v < 1 || a.head_dim_v > 256)
        return snprintf(err, n, "head_dim is %lld and head_dim_v %lld; both must be in 1..256",
                        (long long)a.head_dim, (long long)a.head_dim_v);
    if (a.batch < 1 || a.seqlen_q < 1 || a.seqlen_k < 1 || a.num_kv_heads < 1 || a.threads < 1 ||
        a.num_heads < 1 || a.num_heads % a.num_kv_heads != 0)
        return snprintf(
            err, n, "batch, lengths, heads and threads must be >= 1, num_heads a multiple of num_kv_heads");
    return 0;
}

int32_t check_plan(const BackwardCall& call, char* err, size_t n) {
    const pa_plan_view& v = *call.plan;
    const pa_cpu_backward_args& a = call.args;
    if (!v.transposed || v.seqlen_q != a.seqlen_q || v.seqlen_k != a.seqlen_k)
        return snprintf(err, n, "the plan must be transposed and for lengths %lld and %lld",
                        (long long)a.seqlen_q, (long long)a.seqlen_k);
    if (v.block_q % BLOCK_ROWS != 0 || v.block_k % call.kernels->panel != 0)
        return snprintf(err, n, "block_q is %d and block_k %d; on %s they must be multiples of %d and %d",
                        v.block_q, v.block_k, call.kernels->name, (int)BLOCK_ROWS, call.kernels->panel);
    if ((v.layout_batch != 1 && v.layout_batch < a.batch + a.plan_batch) ||
        (v.layout_heads != 1 && v.layout_heads != a.num_heads))
        return snprintf(err, n,
                        "the plan has layouts for %d batches and %d heads, the tensors have %lld and %lld",
                        v.layout_batch, v.layout_heads, (long long)a.batch, (long long)a.num_heads);
    return 0;
}

bool prepare(Backward& work) {
    BackwardCall& call = work.call;
    const pa_cpu_backward_args& a = call.args;
    const pa_plan_view& v = *call.plan;
    // A bias gradient that several heads or batches add to belongs to one task, where keys are told apart.
    bool by_key = a.grad_bias && a.grad_bias_strides[3] != 0;
    call.share_b = by_key && a.grad_bias_strides[0] == 0 && a.batch > 1;
    call.share_h = by_key && a.grad_bias_strides[1] == 0 && a.num_kv_heads > 1;
    call.same_rows = has_same_rows(v);
    call.query_ld = (a.head_dim + 31) / 32 * 32;
    int64_t heads = a.batch * a.num_heads, kv_heads = a.batch * a.num_kv_heads;
    int64_t count = wanted_chunks(call);
    for (;; count = (count + 1) / 2) {
        divide(work, count);
        if (count == 1 || heads * call.query_rows * call.query_ld * 4 <= MAX_SUM_BYTES) break;
    }
    call.chunks = work.chunks.data();
    call.chunk_rows = work.chunk_rows.data();
    call.stat_tasks = (a.seqlen_q + STAT_ROWS - 1) / STAT_ROWS;
    call.max_tile_rows = (v.block_q + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS;
    bool sums = v.num_passes > 1 || !call.same_rows;
    if (!work.take(&call.lse2, heads * a.seqlen_q) || !work.take(&call.lse2_rest, heads * a.seqlen_q) ||
        !work.take(&call.delta, heads * a.seqlen_q) ||
        !work.take(&call.grad_query, heads * call.query_rows * call.query_ld) ||
        !work.take(&call.grad_key, sums ? kv_heads * a.seqlen_k * a.head_dim : 0) ||
        !work.take(&call.grad_value, sums ? kv_heads * a.seqlen_k * a.head_dim_v : 0) ||
        !work.take(&call.slope_sums, heads * call.num_chunks) ||
        !work.take(&call.sink_sums, heads * call.stat_tasks))
        return false;
    if (sums) {
        memset(call.grad_key, 0, sizeof(float) * (size_t)(kv_heads * a.seqlen_k * a.head_dim));
        memset(call.grad_value, 0, sizeof(float) * (size_t)(kv_heads * a.seqlen_k * a.head_dim_v));
    }
    memset(call.slope_sums, 0, sizeof(double) * (size_t)(heads * call.num_chunks));
    work.scratch_bytes = call.kernels->backward_scratch(call);
    return true;
}

void add_scalars(const BackwardCall& call) {
    const pa_cpu_backward_args& a = call.args;
    for (int64_t b = 0; b < a.batch; ++b)
        for (int64_t h = 0; h < a.num_heads; ++h) {
            int64_t head = b * a.num_heads + h;
            double slopes = 0.0, sinks = 0.0;
            for (int64_t c = 0; c < call.num_chunks; ++c)
                slopes += call.slope_sums[head * call.num_chunks + c];
            for (int64_t t = 0; t < call.stat_tasks; ++t) sinks += call.sink_sums[head * call.stat_tasks + t];
            if (a.grad_alibi_slopes)
                a.grad_alibi_slopes[b * a.grad_alibi_strides[0] + h * a.grad_alibi_strides[1]] +=
                    (float)slopes;
            if (a.grad_sinks) a.grad_sinks[h] += (float)sinks;
        }
}

// Runs fn(call, index) over several threads, denormals off.
template <class F>
void over_threads(int64_t count, int32_t threads, const F& fn) {
    parallel_for(
        count, threads,
        [](void* p, int64_t index) {
            NoDenormals off;
            (*static_cast<const F*>(p))(index);
        },
        const_cast<F*>(&fn));
}

}  // namespace
}  // namespace cpu
}  // namespace portattn

extern "C" int32_t portattn_cpu_backward(const pa_cpu_backward_args* args, char* err, int64_t err_len) {
    using namespace portattn::cpu;
    if (check(*args, err, (size_t)err_len)) return 1;
    Backward work;
    BackwardCall& call = work.call;
    call.args = *args;
    call.kernels = kernels_in_use(err, err_len);
    if (!call.kernels) return 1;
    call.plan = portattn_plan_view(args->plan);
    if (check_plan(call, err, (size_t)err_len)) return 1;
    if (!prepare(work)) {
        snprintf(err, (size_t)err_len, "out of memory for the workspace of the backward");
        return 1;
    }
    const pa_cpu_backward_args& a = call.args;
    double flops = 2.0 * (double)(a.batch * a.num_heads * a.seqlen_q) * (double)(a.seqlen_k * a.head_dim);
    int32_t threads = flops < SERIAL_FLOPS ? 1 : a.threads;
    // Rows that share their bias gradient are one task.
    bool serial_rows = a.grad_bias && a.grad_bias_strides[3] == 0;
    over_threads(a.batch * a.num_heads * call.stat_tasks, serial_rows ? 1 : threads,
                 [&](int64_t index) { call.kernels->backward_rows(call, index); });
    for (int32_t pass = 0; pass < call.plan->num_passes; ++pass)
        over_threads(whole_tasks(call) * call.num_chunks, threads, [&](int64_t index) {
            call.kernels->backward_task(call, pass, index, thread_scratch((size_t)work.scratch_bytes));
        });
    int64_t row_tasks = (a.seqlen_q + STORE_ROWS - 1) / STORE_ROWS,
            key_tasks = call.grad_key ? (a.seqlen_k + STORE_ROWS - 1) / STORE_ROWS : 0;
    over_threads(a.batch * (a.num_heads * row_tasks + a.num_kv_heads * key_tasks), threads,
                 [&](int64_t index) { call.kernels->backward_store(call, index); });
    add_scalars(call);
    return 0;
}
