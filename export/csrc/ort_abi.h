// The part of ONNX Runtime's C ABI that a custom-op library needs, declared by hand: no ONNX Runtime headers.
// OrtApi is an append-only table of function pointers, so a slot number never changes once released. The
// numbers were measured with offsetof against onnxruntime_c_api.h.
#pragma once
#include <cstddef>
#include <cstdint>

namespace portattn {
namespace ort {

struct Status;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorInfo;
struct ShapeContext;
struct Domain;
struct SessionOptions;

using Api = const void* const*;  // OrtApi seen as a table
struct ApiBase {
    Api (*get_api)(uint32_t version);
    const char* (*get_version)();
};

// The lowest version with all that is used here (KernelContext_ParallelFor); ONNX Runtime 1.17.
constexpr uint32_t kApiVersion = 17;

enum ElementType : int32_t { kUndefined = 0, kFloat = 1, kInt32 = 6, kInt64 = 7, kBool = 9, kFloat16 = 10 };
enum ErrorCode : int32_t { kFail = 1, kInvalidArgument = 2 };
enum Characteristic : int32_t { kRequired = 0, kOptional = 1, kVariadic = 2 };

enum Slot : size_t {
    kCreateStatus = 0,
    kCreateCustomOpDomain = 26,
    kCustomOpDomainAdd = 27,
    kAddCustomOpDomain = 28,
    kGetTensorMutableData = 51,
    kGetTensorElementType = 60,
    kGetDimensionsCount = 61,
    kGetDimensions = 62,
    kGetTensorTypeAndShape = 65,
    kKernelInfoGetFloat = 85,
    kKernelInfoGetInt = 86,
    kKernelInfoGetString = 87,
    kKernelContextGetInputCount = 88,
    kKernelContextGetOutputCount = 89,
    kKernelContextGetInput = 90,
    kKernelContextGetOutput = 91,
    kReleaseStatus = 93,
    kReleaseTensorInfo = 99,
    kKernelInfoGetInts = 163,
    kParallelFor = 274,
};

template <class R, class... Args>
inline R call(Api api, Slot slot, Args... args) {
    return reinterpret_cast<R (*)(Args...)>(const_cast<void*>(api[slot]))(args...);
}

// OrtCustomOp. `version` says how many members ONNX Runtime may read.
struct CustomOp {
    uint32_t version;
    void* (*create_kernel)(const CustomOp*, Api, const KernelInfo*);
    const char* (*get_name)(const CustomOp*);
    const char* (*get_execution_provider)(const CustomOp*);
    int32_t (*get_input_type)(const CustomOp*, size_t);
    size_t (*get_input_count)(const CustomOp*);
    int32_t (*get_output_type)(const CustomOp*, size_t);
    size_t (*get_output_count)(const CustomOp*);
    void (*compute)(void*, KernelContext*);
    void (*destroy)(void*);
    int32_t (*get_input_characteristic)(const CustomOp*, size_t);
    int32_t (*get_output_characteristic)(const CustomOp*, size_t);
    int32_t (*get_input_memory_type)(const CustomOp*, size_t);
    int32_t (*get_variadic_input_min)(const CustomOp*);
    int32_t (*get_variadic_input_homogeneous)(const CustomOp*);
    int32_t (*get_variadic_output_min)(const CustomOp*);
    int32_t (*get_variadic_output_homogeneous)(const CustomOp*);
    Status* (*create_kernel_v2)(const CustomOp*, Api, const KernelInfo*, void**);  // version >= 16
    Status* (*compute_v2)(void*, KernelContext*);
    Status* (*infer_shapes)(const CustomOp*, ShapeContext*);  // version >= 17
    int32_t (*get_start_version)(const CustomOp*);
    int32_t (*get_end_version)(const CustomOp*);
    size_t (*get_may_inplace)(int32_t**, int32_t**);  // version >= 18
    void (*release_may_inplace)(int32_t*, int32_t*);
    size_t (*get_alias_map)(int32_t**, int32_t**);
    void (*release_alias_map)(int32_t*, int32_t*);
};
static_assert(sizeof(void*) != 8 || sizeof(CustomOp) == 208, "OrtCustomOp has another layout");
static_assert(sizeof(void*) != 8 || offsetof(CustomOp, infer_shapes) == 152,
              "OrtCustomOp has another layout");

}  // namespace ort
}  // namespace portattn
