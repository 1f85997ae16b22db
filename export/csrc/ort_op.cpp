// Registers com.portattn::Attention with ONNX Runtime: one custom op for each element type, CPU provider.
#include <mutex>
#include <new>

#include "attention_node.h"
#include "portattn.h"
#include "tensor.h"

namespace portattn {
namespace ort {
namespace {

Api g_api;  // of the version asked for; one ONNX Runtime in a process

struct AttentionOp : CustomOp {
    int32_t element_type;
};

int32_t input_type(const CustomOp* op, size_t index) {
    switch (index) {
        case kQuery:
        case kKey:
        case kValue:
            return static_cast<const AttentionOp*>(op)->element_type;
        case kQOffset:
            return kInt64;
        default:
            return kUndefined;  // any; checked at run time
    }
}

Status* create_kernel(const CustomOp* op, Api api, const KernelInfo* info, void** out) try {
    AttentionNode* node = nullptr;
    PA_ORT_TRY(AttentionNode::create(api, info, static_cast<const AttentionOp*>(op)->element_type, &node));
    *out = node;
    return nullptr;
} catch (const std::bad_alloc&) {
    return call<Status*>(api, kCreateStatus, static_cast<int32_t>(kFail),
                         "com.portattn::Attention: out of memory");
}

AttentionOp make_op(int32_t element_type) {
    AttentionOp op{};
    op.element_type = element_type;
    op.version = kApiVersion;
    op.get_name = [](const CustomOp*) { return "Attention"; };
    op.get_execution_provider = [](const CustomOp*) -> const char* { return nullptr; };  // CPU
    op.get_input_type = input_type;
    op.get_input_count = [](const CustomOp*) -> size_t { return kFirstMaskData + kMaxMaskData; };
    op.get_input_characteristic = [](const CustomOp*, size_t index) -> int32_t {
        return index < kQOffset ? kRequired : kOptional;
    };
    op.get_input_memory_type = [](const CustomOp*, size_t) -> int32_t { return 0; };
    op.get_output_type = [](const CustomOp* self, size_t index) -> int32_t {
        return index == 0 ? static_cast<const AttentionOp*>(self)->element_type : kFloat;
    };
    op.get_output_count = [](const CustomOp*) -> size_t { return 2; };
    op.get_output_characteristic = [](const CustomOp*, size_t index) -> int32_t {
        return index == 0 ? kRequired : kOptional;
    };
    op.get_variadic_input_min = [](const CustomOp*) -> int32_t { return 0; };
    op.get_variadic_input_homogeneous = [](const CustomOp*) -> int32_t { return 0; };
    op.get_variadic_output_min = [](const CustomOp*) -> int32_t { return 0; };
    op.get_variadic_output_homogeneous = [](const CustomOp*) -> int32_t { return 0; };
    op.create_kernel_v2 = create_kernel;
    op.compute_v2 = [](void* node, KernelContext* context) {
        return static_cast<AttentionNode*>(node)->compute(context);
    };
    op.destroy = [](void* node) { delete static_cast<AttentionNode*>(node); };
    // No infer_shapes: before 1.24 ONNX Runtime reads the type of absent optional inputs for it and crashes.
    // Exported files carry the shapes.
    op.get_start_version = [](const CustomOp*) -> int32_t { return 1; };
    op.get_end_version = [](const CustomOp*) -> int32_t { return 0x7FFFFFFF; };
    return op;
}

// The ops and the domain must outlive every session: made once, never released.
Status* domain(Domain** out) {
    static std::mutex mutex;
    static Domain* made = nullptr;
    static const AttentionOp ops[] = {make_op(kFloat), make_op(kFloat16)};
    std::lock_guard<std::mutex> lock(mutex);
    if (!made) {
        Domain* fresh = nullptr;
        PA_ORT_TRY((call<Status*>(g_api, kCreateCustomOpDomain, "com.portattn", &fresh)));
        for (const AttentionOp& op : ops)
            PA_ORT_TRY((call<Status*>(g_api, kCustomOpDomainAdd, fresh, static_cast<const CustomOp*>(&op))));
        made = fresh;
    }
    *out = made;
    return nullptr;
}

}  // namespace
}  // namespace ort
}  // namespace portattn

// What ONNX Runtime looks for in a custom-op library.
extern "C" PA_EXPORT portattn::ort::Status* RegisterCustomOps(portattn::ort::SessionOptions* options,
                                                              const portattn::ort::ApiBase* base) {
    using namespace portattn::ort;
    g_api = base->get_api(kApiVersion);
    if (!g_api)
        return call<Status*>(base->get_api(1), kCreateStatus, static_cast<int32_t>(kFail),
                             "portattn needs ONNX Runtime 1.17 or newer");
    Domain* made = nullptr;
    PA_ORT_TRY(domain(&made));
    return call<Status*>(g_api, kAddCustomOpDomain, options, made);
}
