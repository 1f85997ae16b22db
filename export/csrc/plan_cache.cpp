#include "plan_cache.h"

#include <cstring>

namespace portattn {
namespace ort {
namespace {

constexpr size_t kMaxEntries = 16;
constexpr int64_t kMaxWorkspaceBytes = int64_t(256) << 20;
constexpr int64_t kErrorBytes = 1024;

size_t byte_count(const pa_array& array) {
    size_t count = array.dtype == 0 ? 4 : array.dtype == 1 ? 8 : 1;
    for (int32_t axis = 0; axis < array.ndim; ++axis) count *= static_cast<size_t>(array.shape[axis]);
    return count;
}

std::vector<int64_t> sizes_of(const PlanRequest& r) {
    return {r.batch,   r.num_heads, r.seqlen_q,     r.seqlen_k,  r.q_offset,   r.block_q,
            r.block_k, r.workers,   r.num_kv_heads, r.min_piece, r.head_dim_v, r.group_heads};
}

bool same_shape(const pa_array& a, const pa_array& b) {
    return a.dtype == b.dtype && a.ndim == b.ndim &&
           std::memcmp(a.shape, b.shape, sizeof(int64_t) * static_cast<size_t>(a.ndim)) == 0;
}

}  // namespace

PlanEntry::~PlanEntry() {
    if (schedule_) portattn_schedule_destroy(schedule_);
    if (plan_) portattn_plan_destroy(plan_);
}

bool PlanEntry::matches(const PlanRequest& request) const {
    if (sizes_ != sizes_of(request) || arrays_.size() != request.arrays.size()) return false;
    for (size_t i = 0; i < arrays_.size(); ++i) {
        if (!same_shape(arrays_[i], request.arrays[i])) return false;
        if (!bytes_[i].empty() &&
            std::memcmp(bytes_[i].data(), request.arrays[i].data, bytes_[i].size()) != 0)
            return false;
    }
    return true;
}

bool PlanEntry::make(const PlanRequest& request, std::string* error) {
    char message[kErrorBytes] = "";
    pa_plan_args args{};
    args.struct_size = sizeof(pa_plan_args);
    args.abi_version = PA_ABI_VERSION;
    args.program = request.program->data();
    args.program_len = static_cast<int64_t>(request.program->size());
    args.arrays = request.arrays.data();
    args.num_arrays = static_cast<int64_t>(request.arrays.size());
    args.batch = request.batch;
    args.num_heads = request.num_heads;
    args.seqlen_q = request.seqlen_q;
    args.seqlen_k = request.seqlen_k;
    args.q_offset = request.q_offset;
    args.block_q = request.block_q;
    args.block_k = request.block_k;
    plan_ = portattn_plan_create(&args, message, kErrorBytes);
    if (plan_) {
        grouped_ = request.group_heads && portattn_plan_view(plan_)->layout_heads == 1;
        pa_schedule_args schedule{};
        schedule.struct_size = sizeof(pa_schedule_args);
        schedule.abi_version = PA_ABI_VERSION;
        schedule.batch = request.batch;
        schedule.num_heads = grouped_ ? request.num_kv_heads : request.num_heads;
        schedule.workers = request.workers;
        schedule.min_piece = request.min_piece;
        schedule.max_workspace_bytes = kMaxWorkspaceBytes;
        schedule.head_dim_v = request.head_dim_v;
        schedule_ = portattn_schedule_create(plan_, &schedule, message, kErrorBytes);
    }
    if (!schedule_) {
        *error = message;
        return false;
    }
    sizes_ = sizes_of(request);
    arrays_ = request.arrays;
    for (pa_array& array : arrays_) {
        const uint8_t* first = static_cast<const uint8_t*>(array.data);
        bytes_.emplace_back(first, first + byte_count(array));
        array.data = nullptr;
    }
    return true;
}

std::shared_ptr<const PlanEntry> PlanCache::get(const PlanRequest& request, std::string* error) {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        for (auto it = entries_.begin(); it != entries_.end(); ++it) {
            if (!(*it)->matches(request)) continue;
            entries_.splice(entries_.begin(), entries_, it);
            return entries_.front();
        }
    }
    // Planned without the lock: two threads may make the same plan once, neither waits for the other's.
    auto entry = std::make_shared<PlanEntry>();
    if (!entry->make(request, error)) return nullptr;
    std::lock_guard<std::mutex> lock(mutex_);
    entries_.push_front(entry);
    if (entries_.size() > kMaxEntries) entries_.pop_back();
    return entry;
}

}  // namespace ort
}  // namespace portattn
