// One com.portattn::Attention node in a session: its attributes, and how it computes.
#pragma once
#include <string>
#include <vector>

#include "cpu.h"
#include "ort_abi.h"
#include "plan_cache.h"

namespace portattn {
namespace ort {

// Inputs as in export/schema.py; mask data follows.
enum Input : size_t {
    kQuery = 0,
    kKey = 1,
    kValue = 2,
    kQOffset = 3,
    kKvLengths = 4,
    kAlibiSlopes = 5,
    kBias = 6,
    kSinks = 7,
    kFirstMaskData = 8,
};
constexpr size_t kMaxMaskData = 64;

class AttentionNode {
  public:
    // Reads the attributes; null with a status on error.
    static Status* create(Api api, const KernelInfo* info, int32_t element_type, AttentionNode** out);

    Status* compute(KernelContext* context);

  private:
    struct Call;

    AttentionNode(Api api, int32_t element_type) : api_(api), element_type_(element_type) {}

    Status* fail(const std::string& message, ErrorCode code = kInvalidArgument) const;
    Status* read_inputs(const KernelContext* context, Call* call) const;
    Status* read_terms(Call* call) const;
    Status* make_outputs(KernelContext* context, Call* call) const;
    Status* read_q_offset(const Call& call, int64_t* q_offset) const;
    Status* run_by_length(const KernelContext* context, const Call& call);
    Status* run(const KernelContext* context, const Call& call, int64_t seqlen_k, int64_t q_offset,
                const std::vector<int64_t>& batches);
    void fill_arguments(const Call& call, pa_cpu_args* args) const;
    Status* launch(const KernelContext* context, const pa_cpu_args& args,
                   const std::vector<int64_t>& batches) const;

    Api api_;
    int32_t element_type_;
    std::vector<int64_t> program_;
    std::string q_offset_mode_ = "unset";
    int64_t q_offset_ = 0;
    float scale_ = 0.0f;
    bool has_scale_ = false;
    float softcap_ = 0.0f;
    PlanCache plans_;
};

}  // namespace ort
}  // namespace portattn
