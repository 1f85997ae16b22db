// The tiles and runs of keys of one schedule item, in the order that docs/formats.md gives.
#pragma once
#include "call.hpp"

namespace portattn {
namespace cpu {
namespace PA_ISA {

// The keys start + step*n, n in [0, count), that a tile or a run of tiles visits.
struct Keys {
    int64_t start, step, count;
    int32_t bits_same, bits_other;  // PA_BITS_FULL for a full run
    bool full() const { return bits_same == PA_BITS_FULL && bits_other == PA_BITS_FULL; }
};

// Calls visit(Keys, const Keys* next) for each partial tile and for each run of at most call.run_keys keys of
// full tiles; `next` is what comes after it, null at the end.
template <class Visit>
static inline void walk_ahead(const Call& call, const int32_t* item, Visit visit) {
    int64_t block_k = call.plan->block_k, seqlen_k = call.args.seqlen_k;
    Keys pending{0, 1, 0, 0, 0};
    auto send = [&](int64_t start, int64_t step, int64_t count, int32_t same, int32_t other) {
        int64_t exist = (seqlen_k - start + step - 1) / step;
        if (exist <= 0) return;
        Keys keys{start, step, count < exist ? count : exist, same, other};
        if (pending.count > 0) visit(pending, &keys);
        pending = keys;
    };
    for (int64_t t = item[PA_ITEM_TILE_BEGIN]; t < item[PA_ITEM_TILE_END]; ++t) {
        const int32_t* tile = call.plan->tiles + t * 4;
        send(tile[0], tile[1], block_k, tile[2], tile[3]);
    }
    int64_t first = item[PA_ITEM_FULL_FIRST], count = item[PA_ITEM_FULL_COUNT];
    int64_t step = item[PA_ITEM_FULL_STEP], stride = item[PA_ITEM_FULL_STRIDE];
    if (step == 0) {
        for (int64_t e = 0; e < count; ++e) {
            const int32_t* tile = call.schedule->full_list + (first + e) * 2;
            int64_t start = tile[0], keys = block_k;
            // Neighbours in the list are one run.
            for (; e + 1 < count && keys + block_k <= call.run_keys; ++e, tile += 2, keys += block_k)
                if (tile[3] != tile[1] || tile[2] != tile[0] + tile[1] * block_k) break;
            send(start, tile[1], keys, PA_BITS_FULL, PA_BITS_FULL);
        }
    } else if (stride == step * block_k) {
        int64_t total = count * block_k;
        for (int64_t n = 0; n < total; n += call.run_keys)
            send(first + step * n, step, total - n < call.run_keys ? total - n : call.run_keys, PA_BITS_FULL,
                 PA_BITS_FULL);
    } else {
        for (int64_t e = 0; e < count; ++e)
            send(first + e * stride, step, block_k, PA_BITS_FULL, PA_BITS_FULL);
    }
    if (pending.count > 0) visit(pending, static_cast<const Keys*>(nullptr));
}

// The same without looking ahead: visit(Keys).
template <class Visit>
static inline void walk_item(const Call& call, const int32_t* item, Visit visit) {
    walk_ahead(call, item, [&](const Keys& keys, const Keys*) { visit(keys); });
}

}  // namespace PA_ISA
}  // namespace cpu
}  // namespace portattn
