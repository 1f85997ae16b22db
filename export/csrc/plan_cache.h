// Plans and schedules of one kernel instance, by lengths and mask data; the least recently used one goes
// first.
#pragma once
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "portattn.h"

namespace portattn {
namespace ort {

// What a plan and its schedule are made for. The arrays are borrowed for the call that looks them up.
struct PlanRequest {
    const std::vector<int64_t>* program;
    std::vector<pa_array> arrays;
    int64_t batch, num_heads, seqlen_q, seqlen_k, q_offset;
    int32_t block_q, block_k;
    // Of the schedule. group_heads: one task for all query heads of a KV head, if the mask allows.
    int64_t num_kv_heads, workers, min_piece, head_dim_v;
    bool group_heads;
};

class PlanEntry {
  public:
    PlanEntry() = default;
    ~PlanEntry();
    PlanEntry(const PlanEntry&) = delete;
    PlanEntry& operator=(const PlanEntry&) = delete;

    const pa_plan* plan() const { return plan_; }
    const pa_schedule* schedule() const { return schedule_; }
    bool grouped() const { return grouped_; }

  private:
    friend class PlanCache;
    bool make(const PlanRequest& request, std::string* error);
    bool matches(const PlanRequest& request) const;

    std::vector<int64_t> sizes_;
    std::vector<pa_array> arrays_;             // without their data
    std::vector<std::vector<uint8_t>> bytes_;  // the data
    pa_plan* plan_ = nullptr;
    pa_schedule* schedule_ = nullptr;
    bool grouped_ = false;
};

// Thread-safe: ONNX Runtime may run one session from several threads.
class PlanCache {
  public:
    // The entry for a request, made if need be; null with a message on error. An entry in use outlives its
    // place in the cache.
    std::shared_ptr<const PlanEntry> get(const PlanRequest& request, std::string* error);

  private:
    std::mutex mutex_;
    std::list<std::shared_ptr<const PlanEntry>> entries_;  // most recently used first
};

}  // namespace ort
}  // namespace portattn
