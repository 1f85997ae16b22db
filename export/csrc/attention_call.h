// One call of an Attention node: its inputs and outputs as pointers with shapes.
#pragma once
#include <cstdint>
#include <vector>

#include "attention_node.h"
#include "tensor.h"

namespace portattn {
namespace ort {

struct AttentionNode::Call {
    Tensor query, key, value, q_offset, kv_lengths, alibi, bias, sinks;
    std::vector<Tensor> mask_data;
    std::vector<float> alibi_values, sink_values;
    void* output = nullptr;
    float* lse = nullptr;
    int64_t batch = 0, num_heads = 0, num_kv_heads = 0, seqlen_q = 0, seqlen_k = 0, head_dim = 0,
            head_dim_v = 0;
};

}  // namespace ort
}  // namespace portattn
