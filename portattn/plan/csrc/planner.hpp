// The plan's arrays as they are built; docs/formats.md says what they hold.
#pragma once
#include <cstdint>
#include <mutex>
#include <vector>

#include "portattn.h"

struct pa_plan {
    pa_plan_view view{};
    // k_ids is empty where it equals q_ids; the view then shows those twice.
    std::vector<int32_t> layouts, layout_ids, pass_steps, row_ptr, rows, tiles, runs, bit_ranges, q_ids,
        k_ids;
    std::vector<uint32_t> bits;
    mutable std::once_flag by_key_once;
    mutable std::vector<uint16_t> bits_by_key;

    // Points the view at the vectors; call once they are complete.
    void seal();
};

namespace portattn {

// Starts and counts are int32, with room for a tile past the end.
constexpr int64_t kMaxLength = int64_t{1} << 30;

enum { kRowFields = 6, kTileFields = 4, kRunFields = 4 };

pa_plan* make_plan(const pa_plan_args& args);
pa_plan* transpose_plan(const pa_plan& plan);
pa_schedule* make_schedule(const pa_plan& plan, const pa_schedule_args& args);

}  // namespace portattn
