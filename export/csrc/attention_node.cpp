// Plans for the actual lengths, and runs the CPU kernels on ONNX Runtime's threads.
#include "attention_node.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <map>
#include <new>
#include <thread>
#include <utility>

#include "attention_call.h"
#include "cpu.h"
#include "tensor.h"

namespace portattn {
namespace ort {
namespace {

constexpr int64_t kErrorBytes = 1024;
constexpr double kSerialUs = 200.0;  // below this much work a second thread costs more than it gives
constexpr int64_t kDecodeRows = 8;   // query rows of a KV head up to which the decode kernel is faster

int64_t hardware_threads() {
    static const int64_t count = std::max<int64_t>(1, std::thread::hardware_concurrency());
    return count;
}

// Tasks handed to ONNX Runtime's pool. It splits an index range into equal parts; items are ordered longest
// first and differ much, so its indices are only lanes, which take tasks until none is left.
struct Lanes {
    const cpu::Forward* forward;
    int32_t pass;
    const std::vector<int64_t>* batches;
    int64_t tasks_per_batch, num_tasks;
    size_t scratch_bytes;
    std::atomic<int64_t> next{0};

    void work() {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
            int64_t task =
                (*batches)[static_cast<size_t>(i / tasks_per_batch)] * tasks_per_batch + i % tasks_per_batch;
            forward->run_task(pass, task, cpu::thread_scratch(scratch_bytes));
        }
    }
};

// Batch, head and row strides of a contiguous tensor with these heads, rows and columns.
void contiguous_strides(const std::array<int64_t, 3>& sizes, int64_t strides[3]) {
    strides[2] = sizes[2];
    strides[1] = sizes[1] * strides[2];
    strides[0] = sizes[0] * strides[1];
}

}  // namespace

Status* AttentionNode::compute(KernelContext* context) try {
    Call c;
    PA_ORT_TRY(read_inputs(context, &c));
    PA_ORT_TRY(make_outputs(context, &c));
    const int64_t rows = c.batch * c.num_heads * c.seqlen_q;
    if (rows == 0) return nullptr;
    int64_t q_offset = 0;
    if (!c.kv_lengths) PA_ORT_TRY(read_q_offset(c, &q_offset));
    if (c.seqlen_k == 0 || c.head_dim_v == 0) {
        const size_t element_bytes = element_type_ == kFloat ? 4 : 2;
        std::memset(c.output, 0, static_cast<size_t>(rows * c.head_dim_v) * element_bytes);
        for (int64_t i = 0; c.lse && i < rows; ++i)
            c.lse[i] = c.sinks ? c.sink_values[static_cast<size_t>(i / c.seqlen_q % c.num_heads)]
                               : -std::numeric_limits<float>::infinity();
        return nullptr;
    }
    if (c.kv_lengths) return run_by_length(context, c);
    std::vector<int64_t> batches(static_cast<size_t>(c.batch));
    for (size_t b = 0; b < batches.size(); ++b) batches[b] = static_cast<int64_t>(b);
    return run(context, c, c.seqlen_k, q_offset, batches);
} catch (const std::bad_alloc&) {
    return fail("out of memory", kFail);
}

// Batch elements of one length run together: a length is the number of their keys, and places their queries.
Status* AttentionNode::run_by_length(const KernelContext* context, const Call& c) {
    std::map<int64_t, std::vector<int64_t>> by_length;
    for (int64_t b = 0; b < c.batch; ++b)
        by_length[c.kv_lengths.type == kInt32 ? static_cast<const int32_t*>(c.kv_lengths.data)[b]
                                              : static_cast<const int64_t*>(c.kv_lengths.data)[b]]
            .push_back(b);
    for (const auto& [length, batches] : by_length) {
        const int64_t keys = std::min(std::max<int64_t>(length, 0), c.seqlen_k);
        PA_ORT_TRY(run(context, c, keys, length - c.seqlen_q, batches));
    }
    return nullptr;
}

Status* AttentionNode::run(const KernelContext* context, const Call& c, int64_t seqlen_k, int64_t q_offset,
                           const std::vector<int64_t>& batches) {
    const bool decode = c.seqlen_q * (c.num_heads / c.num_kv_heads) <= kDecodeRows;
    const int64_t panel = portattn_cpu_panel();
    PlanRequest request{};
    request.program = &program_;
    for (const Tensor& data : c.mask_data) {
        pa_array array{};
        array.data = data.data;
        array.dtype = data.type == kInt32 ? 0 : data.type == kInt64 ? 1 : 2;
        array.ndim = static_cast<int32_t>(data.shape.size());
        std::copy(data.shape.begin(), data.shape.end(), array.shape);
        request.arrays.push_back(array);
    }
    request.batch = c.batch;
    request.num_heads = c.num_heads;
    request.seqlen_q = c.seqlen_q;
    request.seqlen_k = seqlen_k;
    request.q_offset = q_offset;
    // As the defaults of portattn.backends.cpu.
    request.block_q =
        static_cast<int32_t>(decode ? 16 : (std::min<int64_t>(c.seqlen_q, 128) + panel - 1) / panel * panel);
    request.block_k = decode ? 256 : 64;
    request.min_piece = decode ? 2 : 8;
    request.num_kv_heads = c.num_kv_heads;
    request.workers = hardware_threads();
    request.head_dim_v = c.head_dim_v;
    request.group_heads = decode;
    std::string error;
    std::shared_ptr<const PlanEntry> entry = plans_.get(request, &error);
    if (!entry) return fail(error);

    pa_cpu_args args{};
    fill_arguments(c, &args);
    args.seqlen_k = seqlen_k;
    args.plan = entry->plan();
    args.schedule = entry->schedule();
    args.kernel = decode ? PA_CPU_DECODE : PA_CPU_MAIN;
    args.group_heads = entry->grouped();
    return launch(context, args, batches);
}

void AttentionNode::fill_arguments(const Call& c, pa_cpu_args* args) const {
    args->struct_size = sizeof *args;
    args->abi_version = PA_ABI_VERSION;
    args->query = c.query.data;
    args->key = c.key.data;
    args->value = c.value.data;
    args->output = c.output;
    args->lse = c.lse;
    contiguous_strides({c.num_heads, c.seqlen_q, c.head_dim}, args->query_strides);
    contiguous_strides({c.num_kv_heads, c.seqlen_k, c.head_dim}, args->key_strides);
    contiguous_strides({c.num_kv_heads, c.seqlen_k, c.head_dim_v}, args->value_strides);
    contiguous_strides({c.num_heads, c.seqlen_q, c.head_dim_v}, args->output_strides);
    contiguous_strides({c.num_heads, c.seqlen_q, 1}, args->lse_strides);
    if (c.bias) {
        args->bias = c.bias.data;
        args->bias_dtype = c.bias.type == kFloat ? PA_FLOAT32 : PA_FLOAT16;
        int64_t stride = 1;
        for (size_t axis = 4; axis-- > 0;) {
            args->bias_strides[axis] = c.bias.shape[axis] == 1 ? 0 : stride;
            stride *= c.bias.shape[axis];
        }
    }
    if (c.alibi) {
        args->alibi_slopes = c.alibi_values.data();
        args->alibi_strides[0] = c.alibi.shape.size() == 2 ? c.num_heads : 0;
        args->alibi_strides[1] = 1;
    }
    args->sinks = c.sinks ? c.sink_values.data() : nullptr;
    args->batch = c.batch;
    args->num_heads = c.num_heads;
    args->num_kv_heads = c.num_kv_heads;
    args->seqlen_q = c.seqlen_q;
    args->head_dim = c.head_dim;
    args->head_dim_v = c.head_dim_v;
    args->dtype = element_type_ == kFloat ? PA_FLOAT32 : PA_FLOAT16;
    args->scale = has_scale_ ? scale_ : static_cast<float>(1.0 / std::sqrt(static_cast<double>(c.head_dim)));
    args->softcap = softcap_;
    args->threads = static_cast<int32_t>(hardware_threads());
    args->head_group = 1;  // a batch element's tasks stay together: `Lanes` relies on it
}

Status* AttentionNode::launch(const KernelContext* context, const pa_cpu_args& args,
                              const std::vector<int64_t>& batches) const {
    char message[kErrorBytes] = "";
    cpu::Forward forward;
    if (forward.init(args, message, kErrorBytes) != 0) return fail(message);
    for (int32_t pass = 0; pass < forward.num_passes(); ++pass) {
        Lanes lanes;
        lanes.forward = &forward;
        lanes.pass = pass;
        lanes.batches = &batches;
        lanes.tasks_per_batch = forward.num_tasks(pass) / args.batch;
        lanes.num_tasks = lanes.tasks_per_batch * static_cast<int64_t>(batches.size());
        lanes.scratch_bytes = forward.scratch_bytes();
        const int64_t count = std::min<int64_t>(lanes.num_tasks, args.threads);
        if (count <= 1 || forward.work_us() < kSerialUs) {
            lanes.work();
            continue;
        }
        void (*work)(void*, size_t) = [](void* user, size_t) { static_cast<Lanes*>(user)->work(); };
        PA_ORT_TRY((call<Status*>(api_, kParallelFor, context, work, static_cast<size_t>(count), size_t(0),
                                  static_cast<void*>(&lanes))));
    }
    return nullptr;
}

}  // namespace ort
}  // namespace portattn
