// A plan's and a schedule's arrays one behind the other, for one copy to a device.
#include <cstring>

#include "planner.hpp"

namespace {

constexpr int64_t kAlign = 128;  // bytes, so that wide loads are aligned

class Packer {
  public:
    Packer(uint8_t* target, int64_t* starts) : target_(target), starts_(starts) {}

    void add(const void* array, int64_t count) {
        int32_t* to = reserve(count);
        if (to && count) std::memcpy(to, array, static_cast<size_t>(4 * count));
    }

    // Room for an array; null if nothing is copied.
    int32_t* reserve(int64_t count) {
        int32_t* at = target_ ? reinterpret_cast<int32_t*>(target_ + size_) : nullptr;
        starts_[next_++] = size_;
        // An empty array still gets a place, so that its pointer is valid.
        size_ += (count ? 4 * count + kAlign - 1 : kAlign) / kAlign * kAlign;
        return at;
    }

    // An array that lies where the one before does.
    void add_same() {
        starts_[next_] = starts_[next_ - 1];
        ++next_;
    }

    int64_t size() const { return size_; }

  private:
    uint8_t* target_;
    int64_t* starts_;
    int64_t next_ = 0, size_ = 0;
};

void add_plan(const pa_plan& plan, Packer& out) {
    const pa_plan_view& v = plan.view;
    out.add(v.layouts, int64_t{v.layout_batch} * v.layout_heads);
    out.add(v.layout_ids, v.num_layouts);
    out.add(v.pass_steps, v.num_passes);
    out.add(v.row_ptr, int64_t{v.num_passes} * v.num_layouts + 1);
    out.add(v.rows, int64_t{v.num_rows} * 6);
    out.add(v.tiles, int64_t{v.num_tiles} * 4);
    out.add(v.runs, int64_t{v.num_runs} * 4);
    out.add(v.bits, int64_t{v.num_bit_tiles} * v.block_q * v.words_per_row);
    out.add(v.bit_ranges, int64_t{v.num_bit_tiles} * ((v.block_q + 15) / 16) * 2);
    int32_t* q_ids = out.reserve(v.num_id_rows * v.seqlen_q);
    int32_t* k_ids = nullptr;
    if (plan.has_same_ids && v.seqlen_k == v.seqlen_q)
        out.add_same();
    else
        k_ids = out.reserve(v.num_id_rows * v.seqlen_k);
    plan.write_ids(q_ids, k_ids);
}

void add_schedule(const pa_schedule_view& v, Packer& out) {
    out.add(v.items, v.total_items * PA_ITEM_FIELDS);
    out.add(v.item_ptr, v.num_passes);
    out.add(v.items_per_pass, v.num_passes);
    out.add(v.full_list, int64_t{v.full_list_len} * 2);
}

}  // namespace

int64_t portattn_pack(const pa_plan* plan, const pa_schedule* schedule, uint8_t* target, int64_t* starts) {
    Packer out(target, starts);
    if (plan) add_plan(*plan, out);
    if (schedule) add_schedule(*portattn_schedule_view(schedule), out);
    return out.size();
}
