// Checks the arguments, maps task indices to (item, batch, head), runs the passes.
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <new>

#include "call.hpp"
#include "isa.hpp"
#include "memory.hpp"
#include "no_denormals.hpp"
#include "threads.hpp"

namespace portattn {
namespace cpu {
namespace {

constexpr int64_t MAX_HEAD_DIM = 256;
constexpr double SERIAL_US =
    200.0;  // below this much one-thread work a second thread costs more than it gives
constexpr double FLOPS_PER_US = 5e4;      // rough one-thread speed, for that decision only
constexpr int64_t MERGED_KEYS = 128;      // keys of neighbouring full tiles that are done at once
constexpr int64_t DECODE_KEYS = 1 << 20;  // the decode kernel goes through a run in chunks of its own

int32_t fail(char* err, int64_t err_len, const char* format, ...) {
    if (err && err_len > 0) {
        va_list list;
        va_start(list, format);
        vsnprintf(err, (size_t)err_len, format, list);
        va_end(list);
    }
    return 1;
}

int32_t check_sizes(const pa_cpu_args& a, char* err, int64_t n) {
    if (a.struct_size != sizeof(pa_cpu_args) || a.abi_version != PA_ABI_VERSION)
        return fail(err, n, "pa_cpu_args has size %u and ABI version %u; this library needs %u and %u",
                    a.struct_size, a.abi_version, (unsigned)sizeof(pa_cpu_args), (unsigned)PA_ABI_VERSION);
    if (a.dtype < PA_FLOAT32 || a.dtype > PA_BFLOAT16)
        return fail(err, n, "dtype is %d; allowed are 0, 1, 2", a.dtype);
    if (a.bias && a.bias_dtype != a.dtype && a.bias_dtype != PA_FLOAT32)
        return fail(err, n, "bias_dtype is %d; allowed are the query's %d and float32", a.bias_dtype,
                    a.dtype);
    if (a.batch < 0 || a.num_heads < 0 || a.seqlen_q < 0 || a.seqlen_k < 0)
        return fail(err, n, "batch, num_heads and lengths must be >= 0");
    if (a.head_dim < 1 || a.head_dim > MAX_HEAD_DIM || a.head_dim_v < 1 || a.head_dim_v > MAX_HEAD_DIM)
        return fail(err, n, "head_dim is %lld and head_dim_v %lld; both must be in 1..256",
                    (long long)a.head_dim, (long long)a.head_dim_v);
    if (a.num_kv_heads < 1 || a.num_heads % a.num_kv_heads != 0)
        return fail(err, n, "num_heads %lld must be a multiple of num_kv_heads %lld", (long long)a.num_heads,
                    (long long)a.num_kv_heads);
    if (a.threads < 1 || a.head_group < 1)
        return fail(err, n, "threads is %d and head_group %d; both must be >= 1", a.threads, a.head_group);
    return 0;
}

int32_t check_plan(const Call& call, char* err, int64_t n) {
    const pa_cpu_args& a = call.args;
    if (call.plan->seqlen_q != a.seqlen_q || call.plan->seqlen_k != a.seqlen_k)
        return fail(err, n, "the plan is for lengths %lld and %lld, the tensors have %lld and %lld",
                    (long long)call.plan->seqlen_q, (long long)call.plan->seqlen_k, (long long)a.seqlen_q,
                    (long long)a.seqlen_k);
    if (a.kernel == PA_CPU_MAIN && call.plan->block_q % call.kernels->panel != 0)
        return fail(err, n, "block_q is %d; on %s it must be a multiple of %d", call.plan->block_q,
                    call.kernels->name, call.kernels->panel);
    if ((call.plan->layout_batch != 1 && call.plan->layout_batch < a.batch + a.plan_batch) ||
        (call.plan->layout_heads != 1 && call.plan->layout_heads != a.num_heads))
        return fail(
            err, n, "the plan has layouts for %d batches and %d heads, the tensors have %lld and %lld",
            call.plan->layout_batch, call.plan->layout_heads, (long long)a.batch, (long long)a.num_heads);
    if (a.group_heads && (a.kernel != PA_CPU_DECODE || call.plan->layout_heads != 1))
        return fail(err, n, "group_heads needs the decode kernel and a mask that is the same for all heads");
    return 0;
}

int64_t items_heads(const Call& call) {
    return call.args.group_heads ? call.args.num_kv_heads : call.args.num_heads;
}

template <class X>
bool allocate(X** out, int64_t count) {
    if (count <= 0) return true;
    *out = static_cast<X*>(take_memory((size_t)count * sizeof(X)));
    return *out != nullptr;
}

// Slots of cut rows, and the rows that later passes continue from.
bool allocate_workspace(Call& call) {
    const pa_cpu_args& a = call.args;
    int64_t heads = a.batch * items_heads(call), slots = heads * call.schedule->num_slots;
    int64_t counters = heads * call.schedule->num_counters;
    call.slot_rows = call.plan->block_q;
    if (a.kernel == PA_CPU_DECODE) {
        int64_t rows = std::min<int64_t>(a.seqlen_q, call.plan->block_q);
        call.slot_rows = rows * (a.group_heads ? a.num_heads / a.num_kv_heads : 1);
    }
    if (!allocate(&call.slots, slots * call.slot_rows * a.head_dim_v)) return false;
    if (!allocate(&call.slot_lse, slots * call.slot_rows)) return false;
    if (!allocate(&call.counters, counters)) return false;
    if (counters > 0) memset(call.counters, 0, sizeof(int32_t) * (size_t)counters);
    if (call.schedule->num_passes <= 1) return true;
    int64_t rows = a.batch * a.num_heads * a.seqlen_q;
    if (!allocate(&call.running_lse, rows)) return false;
    if (a.dtype == PA_FLOAT32) {  // the output itself holds the running rows
        call.running = static_cast<float*>(a.output);
        memcpy(call.running_strides, a.output_strides, sizeof call.running_strides);
        return true;
    }
    call.running_strides[2] = a.head_dim_v;
    call.running_strides[1] = a.seqlen_q * a.head_dim_v;
    call.running_strides[0] = a.num_heads * call.running_strides[1];
    return allocate(&call.running, rows * a.head_dim_v);
}

// Keys that a query tile visits, cut rows counted once.
double mean_keys(const Call& call) {
    double tiles = 0.0, rows = 0.0;
    for (int64_t i = 0; i < call.schedule->total_items; ++i) {
        const int32_t* item = call.schedule->items + i * PA_ITEM_FIELDS;
        tiles += item[PA_ITEM_COST];
        rows += item[PA_ITEM_NUM_ROWS] > 0 &&
                (item[PA_ITEM_SLOT] < 0 || item[PA_ITEM_SLOT] == item[PA_ITEM_SLOT_FIRST]);
    }
    return rows > 0.0 ? tiles * call.plan->block_k / rows : 0.0;
}

// Rough: the tiles of all items times the cost of one.
double estimate_us(const Call& call) {
    const pa_cpu_args& a = call.args;
    double tiles = 0.0;
    for (int64_t i = 0; i < call.schedule->total_items; ++i)
        tiles += call.schedule->items[i * PA_ITEM_FIELDS + PA_ITEM_COST];
    double heads = (double)a.batch * (double)items_heads(call) / std::max(call.schedule->num_layouts, 1);
    double rows = (double)std::min<int64_t>(a.seqlen_q, call.plan->block_q);
    if (a.kernel == PA_CPU_DECODE) rows *= 12.0;  // memory-bound: a key costs more there
    return tiles * heads * rows * call.plan->block_k * 2.0 * (double)(a.head_dim + a.head_dim_v) /
           FLOPS_PER_US;
}

}  // namespace

Forward::~Forward() {
    if (!call_) return;
    give_memory(call_->packed);
    give_memory(call_->slots);
    give_memory(call_->slot_lse);
    give_memory(call_->counters);
    give_memory(call_->running_lse);
    if (call_->running != call_->args.output) give_memory(call_->running);
    delete call_;
}

int32_t Forward::init(const pa_cpu_args& args, char* err, int64_t err_len) {
    if (int32_t code = check_sizes(args, err, err_len)) return code;
    call_ = new (std::nothrow) Call();
    if (!call_) return fail(err, err_len, "out of memory");
    Call& call = *call_;
    call.args = args;
    call.kernels = kernels_in_use(err, err_len);
    if (!call.kernels) return 1;
    call.plan = portattn_plan_view(args.plan);
    call.schedule = portattn_schedule_view(args.schedule);
    if (int32_t code = check_plan(call, err, err_len)) return code;
    if (args.kernel == PA_CPU_MAIN) call.bits_by_key = portattn_plan_bits_by_key(args.plan);
    int64_t merged = args.kernel == PA_CPU_DECODE ? DECODE_KEYS : MERGED_KEYS;
    call.run_keys = std::max<int64_t>(merged / call.plan->block_k * call.plan->block_k, call.plan->block_k);
    if (args.pack < PA_PACK_AUTO || args.pack > PA_PACK_TILES)
        return fail(err, err_len, "pack is %d; allowed are 0 to 3", args.pack);
    if (args.pack == PA_PACK_TILES && !call.kernels->packs_tiles)
        return fail(err, err_len, "pack is PA_PACK_TILES, which %s does not have", call.kernels->name);
    call.mean_keys = mean_keys(call);
    char* packed = nullptr;
    if (!allocate(&packed, call.kernels->pack_bytes(call)))
        return fail(err, err_len, "out of memory for packed keys");
    call.packed = packed;
    if (!allocate_workspace(call)) return fail(err, err_len, "out of memory for the workspace");
    return 0;
}

int32_t Forward::num_passes() const { return call_->schedule->num_passes + (call_->packed ? 1 : 0); }

int64_t Forward::num_tasks(int32_t pass) const {
    if (call_->packed && pass-- == 0) return call_->kernels->pack_tasks(*call_);
    return (int64_t)call_->schedule->items_per_pass[pass] * call_->args.batch * items_heads(*call_);
}

size_t Forward::scratch_bytes() const {
    return (size_t)(call_->args.kernel == PA_CPU_DECODE ? call_->kernels->decode_scratch(*call_)
                                                        : call_->kernels->forward_scratch(*call_));
}

double Forward::work_us() const { return estimate_us(*call_); }

void Forward::run_task(int32_t pass, int64_t index, void* scratch) const {
    const Call& call = *call_;
    if (call.packed && pass-- == 0) return call.kernels->pack_task(call, index);
    const pa_schedule_view* schedule = call.schedule;
    // Groups of heads; within one all first items, then all second ones: longest first, keys still in the
    // cache.
    int64_t items = schedule->items_per_pass[pass], heads = items_heads(call), all = call.args.batch * heads;
    int64_t group = std::min<int64_t>(call.args.head_group, all), first = index / (items * group) * group;
    int64_t size = std::min(group, all - first), rest = index - first * items;
    Task task{};
    task.head_index = first + rest % size;
    task.b = task.head_index / heads;
    task.h =
        task.head_index % heads * (call.args.group_heads ? call.args.num_heads / call.args.num_kv_heads : 1);
    const pa_plan_view* plan = call.plan;
    int64_t layout =
        plan->layouts[(plan->layout_batch == 1 ? 0 : task.b + call.args.plan_batch) * plan->layout_heads +
                      (plan->layout_heads == 1 ? 0 : task.h)];
    task.item = schedule->items + (schedule->item_ptr[pass] + layout * items + rest / size) * PA_ITEM_FIELDS;
    task.first_pass = pass == 0;
    task.last_pass = pass == schedule->num_passes - 1;
    if (task.item[PA_ITEM_NUM_ROWS] == 0) return;
    NoDenormals off;
    (call.args.kernel == PA_CPU_DECODE ? call.kernels->decode_item : call.kernels->forward_item)(call, task,
                                                                                                 scratch);
}

}  // namespace cpu
}  // namespace portattn

extern "C" int32_t portattn_cpu_forward(const pa_cpu_args* args, char* err, int64_t err_len) {
    using namespace portattn::cpu;
    Forward forward;
    if (int32_t code = forward.init(*args, err, err_len)) return code;
    int32_t threads = args->threads > 1 && forward.work_us() < SERIAL_US ? 1 : args->threads;
    struct Pass {
        const Forward* forward;
        int32_t pass;
        size_t scratch_bytes;
    } context{&forward, 0, forward.scratch_bytes()};
    for (int32_t pass = 0; pass < forward.num_passes(); ++pass) {
        context.pass = pass;
        parallel_for(
            forward.num_tasks(pass), threads,
            [](void* p, int64_t index) {
                const Pass& c = *static_cast<Pass*>(p);
                c.forward->run_task(c.pass, index, thread_scratch(c.scratch_bytes));
            },
            &context);
    }
    return 0;
}
