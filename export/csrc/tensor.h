// A tensor of ONNX Runtime as a pointer with a shape, and one owner for statuses on the way.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "ort_abi.h"

namespace portattn {
namespace ort {

#define PA_ORT_TRY(expression)                              \
    do {                                                    \
        if (Status* status_ = (expression)) return status_; \
    } while (0)

struct Tensor {
    void* data = nullptr;  // null: the input is absent
    int32_t type = kUndefined;
    std::vector<int64_t> shape;

    explicit operator bool() const { return type != kUndefined; }
    int64_t count() const {
        int64_t product = 1;
        for (int64_t size : shape) product *= size;
        return product;
    }
};

inline Status* read_tensor(Api api, const Value* value, Tensor* out) {
    TensorInfo* info = nullptr;
    size_t rank = 0;
    PA_ORT_TRY((call<Status*>(api, kGetTensorTypeAndShape, value, &info)));
    Status* status =
        call<Status*>(api, kGetTensorElementType, static_cast<const TensorInfo*>(info), &out->type);
    if (!status)
        status = call<Status*>(api, kGetDimensionsCount, static_cast<const TensorInfo*>(info), &rank);
    if (!status) {
        out->shape.resize(rank);
        status =
            call<Status*>(api, kGetDimensions, static_cast<const TensorInfo*>(info), out->shape.data(), rank);
    }
    call<void>(api, kReleaseTensorInfo, info);
    if (status) return status;
    return call<Status*>(api, kGetTensorMutableData, const_cast<Value*>(value), &out->data);
}

// An input of the node; absent if it is left out.
inline Status* read_input(Api api, const KernelContext* context, size_t index, Tensor* out) {
    const Value* value = nullptr;
    PA_ORT_TRY((call<Status*>(api, kKernelContextGetInput, context, index, &value)));
    return value ? read_tensor(api, value, out) : nullptr;
}

inline float half_to_float(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, fraction = half & 1023u,
             bits;
    if (exponent == 0) {
        float value = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24: zero and subnormals
        return sign ? -value : value;
    }
    if (exponent == 31)
        bits = sign | 0x7F800000u | (fraction << 13);
    else
        bits = sign | ((exponent + 112) << 23) | (fraction << 13);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// A float or float16 tensor as float32.
inline std::vector<float> to_floats(const Tensor& tensor) {
    std::vector<float> values(static_cast<size_t>(tensor.count()));
    for (size_t i = 0; i < values.size(); ++i)
        values[i] = tensor.type == kFloat ? static_cast<const float*>(tensor.data)[i]
                                          : half_to_float(static_cast<const uint16_t*>(tensor.data)[i]);
    return values;
}

}  // namespace ort
}  // namespace portattn
