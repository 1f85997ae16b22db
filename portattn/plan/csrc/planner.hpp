// The plan's arrays as they are built; docs/formats.md says what they hold.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "portattn.h"

namespace portattn {
struct Segments;
}

struct pa_plan {
    mutable pa_plan_view view{};
    std::vector<int32_t> layouts, layout_ids, pass_steps, row_ptr, rows, tiles, runs, bit_ranges;
    std::vector<uint32_t> bits;
    // Of each layout: the ids in whose runs its tiles of step 1 begin; null: tiles lie on the grid.
    std::vector<std::shared_ptr<const portattn::Segments>> documents;
    // The rows of q_ids and k_ids as runs; whether the two are the same.
    std::vector<std::shared_ptr<const portattn::Segments>> id_rows;
    bool has_same_ids = true;
    mutable std::once_flag ids_once;
    mutable std::vector<int32_t> ids;
    mutable std::once_flag by_key_once;
    mutable std::vector<uint16_t> bits_by_key;

    // Points the view at the vectors; call once they are complete. Ids are not yet there.
    void seal();
    // Makes the view's ids, once: what goes to a GPU is written out of the runs straight away.
    void make_ids() const;
    // Writes q_ids, and k_ids unless they are the same; null is left out.
    void write_ids(int32_t* q_ids, int32_t* k_ids) const;
};

namespace portattn {

// Starts and counts are int32, with room for a tile past the end.
constexpr int64_t kMaxLength = int64_t{1} << 30;

enum { kRowFields = 6, kTileFields = 4, kRunFields = 4 };

pa_plan* make_plan(const pa_plan_args& args);
pa_plan* transpose_plan(const pa_plan& plan);
pa_schedule* make_schedule(const pa_plan& plan, const pa_schedule_args& args);

}  // namespace portattn
