// Reads and checks what a node is given: attributes once, inputs at every call.
#include <string>
#include <utility>

#include "attention_call.h"
#include "attention_node.h"
#include "tensor.h"

namespace portattn {
namespace ort {
namespace {

std::string shape_text(const Tensor& tensor) {
    std::string text = "[";
    for (size_t i = 0; i < tensor.shape.size(); ++i)
        text += (i ? ", " : "") + std::to_string(tensor.shape[i]);
    return text + "]";
}

}  // namespace

Status* AttentionNode::fail(const std::string& message, ErrorCode code) const {
    return call<Status*>(api_, kCreateStatus, static_cast<int32_t>(code),
                         ("com.portattn::Attention: " + message).c_str());
}

Status* AttentionNode::create(Api api, const KernelInfo* info, int32_t element_type, AttentionNode** out) {
    auto* node = new AttentionNode(api, element_type);
    // An absent attribute keeps its default; its status is ours to release.
    auto found = [api](Status* status) {
        if (status) call<void>(api, kReleaseStatus, status);
        return status == nullptr;
    };
    size_t size = 0;
    if (found(
            call<Status*>(api, kKernelInfoGetInts, info, "program", static_cast<int64_t*>(nullptr), &size))) {
        node->program_.resize(size);
        if (size)
            found(call<Status*>(api, kKernelInfoGetInts, info, "program", node->program_.data(), &size));
    }
    if (node->program_.empty()) node->program_ = {1, 0};  // keeps everything
    size = 0;
    found(
        call<Status*>(api, kKernelInfoGetString, info, "q_offset_mode", static_cast<char*>(nullptr), &size));
    if (size) {
        std::vector<char> text(size);
        if (found(call<Status*>(api, kKernelInfoGetString, info, "q_offset_mode", text.data(), &size)))
            node->q_offset_mode_.assign(text.data());
    }
    found(call<Status*>(api, kKernelInfoGetInt, info, "q_offset", &node->q_offset_));
    found(call<Status*>(api, kKernelInfoGetFloat, info, "softcap", &node->softcap_));
    node->has_scale_ = found(call<Status*>(api, kKernelInfoGetFloat, info, "scale", &node->scale_));
    for (const char* mode : {"value", "end", "start", "unset"})
        if (node->q_offset_mode_ == mode) {
            *out = node;
            return nullptr;
        }
    Status* status = node->fail("q_offset_mode is \"" + node->q_offset_mode_ +
                                "\"; it must be \"value\", \"end\", \"start\" or \"unset\"");
    delete node;
    return status;
}

Status* AttentionNode::read_inputs(const KernelContext* context, Call* call_) const {
    Call& c = *call_;
    Tensor* const tensors[] = {&c.query,      &c.key,   &c.value, &c.q_offset,
                               &c.kv_lengths, &c.alibi, &c.bias,  &c.sinks};
    size_t count = 0;
    PA_ORT_TRY((call<Status*>(api_, kKernelContextGetInputCount, context, &count)));
    for (size_t i = 0; i < count; ++i) {
        Tensor data;
        PA_ORT_TRY(read_input(api_, context, i, i < kFirstMaskData ? tensors[i] : &data));
        if (data) c.mask_data.push_back(std::move(data));
    }
    for (const Tensor* tensor : {&c.query, &c.key, &c.value})
        if (tensor->type != element_type_ || tensor->shape.size() != 4)
            return fail(
                "Q, K and V must be 4-D tensors [batch, heads, seqlen, head_dim] of one type; got shape " +
                shape_text(*tensor));
    c.batch = c.query.shape[0];
    c.num_heads = c.query.shape[1];
    c.seqlen_q = c.query.shape[2];
    c.head_dim = c.query.shape[3];
    c.num_kv_heads = c.key.shape[1];
    c.seqlen_k = c.key.shape[2];
    c.head_dim_v = c.value.shape[3];
    bool fits = c.key.shape[0] == c.batch && c.value.shape[0] == c.batch &&
                c.value.shape[1] == c.num_kv_heads && c.value.shape[2] == c.seqlen_k &&
                c.key.shape[3] == c.head_dim;
    if (!fits || (c.num_heads && (!c.num_kv_heads || c.num_heads % c.num_kv_heads)))
        return fail("the shapes of Q " + shape_text(c.query) + ", K " + shape_text(c.key) + " and V " +
                    shape_text(c.value) + " do not go together");
    return read_terms(call_);
}

Status* AttentionNode::read_terms(Call* call_) const {
    Call& c = *call_;
    auto is_real = [](const Tensor& t) { return t.type == kFloat || t.type == kFloat16; };
    if (c.alibi) {
        const auto& shape = c.alibi.shape;
        bool fits = is_real(c.alibi) && (shape == std::vector<int64_t>{c.num_heads} ||
                                         shape == std::vector<int64_t>{c.batch, c.num_heads});
        if (!fits)
            return fail("alibi_slopes has shape " + shape_text(c.alibi) +
                        "; it must be [heads] or [batch, heads]");
        c.alibi_values = to_floats(c.alibi);
    }
    if (c.sinks) {
        if (!is_real(c.sinks) || c.sinks.shape != std::vector<int64_t>{c.num_heads})
            return fail("sinks has shape " + shape_text(c.sinks) + "; it must be [heads]");
        c.sink_values = to_floats(c.sinks);
    }
    if (c.bias) {
        const int64_t sizes[4] = {c.batch, c.num_heads, c.seqlen_q, c.seqlen_k};
        bool fits = c.bias.shape.size() == 4 && (c.bias.type == element_type_ || c.bias.type == kFloat);
        for (size_t axis = 0; fits && axis < 4; ++axis)
            fits = c.bias.shape[axis] == sizes[axis] || c.bias.shape[axis] == 1;
        if (!fits)
            return fail(
                "bias has shape " + shape_text(c.bias) +
                "; it must be of Q's type or float and broadcast to [batch, heads, seqlen_q, seqlen_k]");
    }
    if (c.kv_lengths && ((c.kv_lengths.type != kInt32 && c.kv_lengths.type != kInt64) ||
                         c.kv_lengths.shape != std::vector<int64_t>{c.batch}))
        return fail("kv_lengths has shape " + shape_text(c.kv_lengths) +
                    "; it must be int32 or int64 [batch]");
    for (const Tensor& data : c.mask_data)
        if ((data.type != kInt32 && data.type != kInt64 && data.type != kBool) || data.shape.size() > 4)
            return fail("mask data of shape " + shape_text(data) +
                        "; it must be int32, int64 or bool of rank <= 4");
    return nullptr;
}

Status* AttentionNode::make_outputs(KernelContext* context, Call* call_) const {
    const int64_t shape[4] = {call_->batch, call_->num_heads, call_->seqlen_q, call_->head_dim_v};
    size_t count = 0;
    Value* value = nullptr;
    PA_ORT_TRY((call<Status*>(api_, kKernelContextGetOutputCount, static_cast<const KernelContext*>(context),
                              &count)));
    PA_ORT_TRY(
        (call<Status*>(api_, kKernelContextGetOutput, context, size_t(0), &shape[0], size_t(4), &value)));
    PA_ORT_TRY((call<Status*>(api_, kGetTensorMutableData, value, &call_->output)));
    if (count < 2) return nullptr;
    value = nullptr;
    PA_ORT_TRY(
        (call<Status*>(api_, kKernelContextGetOutput, context, size_t(1), &shape[0], size_t(3), &value)));
    if (!value) return nullptr;
    return call<Status*>(api_, kGetTensorMutableData, value, reinterpret_cast<void**>(&call_->lse));
}

Status* AttentionNode::read_q_offset(const Call& call, int64_t* q_offset) const {
    *q_offset = 0;
    if (q_offset_mode_ == "end") {
        *q_offset = call.seqlen_k - call.seqlen_q;
    } else if (q_offset_mode_ == "value") {
        *q_offset = q_offset_;
        if (!call.q_offset) return nullptr;
        if (call.q_offset.type != kInt64 || call.q_offset.count() != 1)
            return fail("q_offset has shape " + shape_text(call.q_offset) + "; it must be one int64");
        *q_offset = *static_cast<const int64_t*>(call.q_offset.data);
    } else if (q_offset_mode_ == "unset" && call.seqlen_q != call.seqlen_k) {
        return fail("seqlen_q is " + std::to_string(call.seqlen_q) + " and seqlen_k " +
                    std::to_string(call.seqlen_k) +
                    "; the mask or ALiBi depends on positions, so the model must be exported with q_offset "
                    "\"end\", \"start\" or a number");
    }
    return nullptr;
}

}  // namespace ort
}  // namespace portattn
