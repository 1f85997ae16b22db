// Deduplicated bit tiles of a plan.
#pragma once
#include <algorithm>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include "leaves.hpp"
#include "planner.hpp"

namespace portattn {

struct VectorHash {
    // Four chains, because a bit tile is long and a multiplication takes its time.
    size_t operator()(const std::vector<i64>& key) const {
        constexpr uint64_t kFactor = 0xBF58476D1CE4E5B9ULL;
        uint64_t h[4] = {key.size(), 1, 2, 3};
        size_t n = 0;
        for (; n + 4 <= key.size(); n += 4)
            for (size_t lane = 0; lane < 4; ++lane) {
                h[lane] = (h[lane] ^ static_cast<uint64_t>(key[n + lane])) * kFactor;
                h[lane] ^= h[lane] >> 29;
            }
        for (; n < key.size(); ++n) h[0] = (h[0] ^ static_cast<uint64_t>(key[n])) * kFactor;
        for (size_t lane = 1; lane < 4; ++lane) {
            h[0] = (h[0] ^ h[lane]) * kFactor;
            h[0] ^= h[0] >> 29;
        }
        return static_cast<size_t>(h[0]);
    }
};

// For a few numbers a call of memcmp would take longer.
inline bool equal(const std::vector<i64>& x, const std::vector<i64>& y) {
    if (x.size() != y.size()) return false;
    for (size_t n = 0; n < x.size(); ++n)
        if (x[n] != y[n]) return false;
    return true;
}

// Deduplicated bit tiles.
class BitStore {
  public:
    BitStore(pa_plan& plan, i64 max_bytes) : plan_(plan), max_bytes_(max_bytes) {}

    // The id of a tile: an index, PA_BITS_FULL or PA_BITS_EMPTY. Keys past num_keys are cleared.
    int32_t add(const BitMatrix& matrix, i64 num_keys) {
        const i64 block_q = plan_.view.block_q, words = plan_.view.words_per_row,
                  block_k = plan_.view.block_k;
        std::vector<i64> key(static_cast<size_t>((block_q * words + 1) / 2), 0);
        auto* bits = reinterpret_cast<uint32_t*>(key.data());
        uint64_t any = 0, missing = 0;
        for (i64 w = 0; w * 64 < num_keys; ++w) {
            const i64 left = num_keys - w * 64;
            const uint64_t exist = left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
            const size_t bytes = 2 * w + 1 < words ? 8 : 4;
            const uint64_t* from = matrix.data.data() + w;
            for (i64 r = 0; r < matrix.rows; ++r) {
                const uint64_t word = from[r * matrix.words] & exist;
                any |= word;
                missing |= word ^ exist;
                if (bytes == 8)
                    std::memcpy(bits + r * words + 2 * w, &word, 8);
                else
                    std::memcpy(bits + r * words + 2 * w, &word, 4);
            }
        }
        if (!any) return PA_BITS_EMPTY;
        if (!missing && num_keys == block_k) return PA_BITS_FULL;
        auto found = ids_.emplace(std::move(key), static_cast<int32_t>(ids_.size()));
        if (found.second) store(reinterpret_cast<const uint32_t*>(found.first->first.data()));
        return found.first->second;
    }

    // Makes room for so many tiles, or for as many as are worth it.
    void reserve(i64 count) {
        const i64 words = plan_.view.block_q * plan_.view.words_per_row;
        plan_.bits.reserve(plan_.bits.size() + static_cast<size_t>(std::min<i64>(count, 64) * words));
    }

  private:
    void store(const uint32_t* bits) {
        const i64 block_q = plan_.view.block_q, words = plan_.view.words_per_row;
        const i64 bytes = static_cast<i64>(ids_.size()) * block_q * words * 4;
        if (bytes > max_bytes_)
            throw PlanError{
                "mask needs more than " + std::to_string(max_bytes_) +
                " bytes of distinct partial tiles; use larger blocks in the mask, or one Segments "
                "joined by & instead of several"};
        plan_.bits.insert(plan_.bits.end(), bits, bits + block_q * words);
        for (i64 panel = 0; panel < block_q; panel += 16) {
            const i64 rows = std::min<i64>(16, block_q - panel);
            int32_t first = INT32_MAX, last = 0;
            for (i64 w = 0; w < words; ++w) {
                const uint32_t* from = bits + panel * words + w;
                uint32_t word = 0;
                for (i64 r = 0; r < rows; ++r) word |= from[r * words];
                if (word) {
                    first = std::min(first, static_cast<int32_t>(32 * w + __builtin_ctz(word)));
                    last = static_cast<int32_t>(32 * w + 32 - __builtin_clz(word));
                }
            }
            plan_.bit_ranges.push_back(last ? first : 0);
            plan_.bit_ranges.push_back(last);
        }
    }

    pa_plan& plan_;
    i64 max_bytes_;
    std::unordered_map<std::vector<i64>, int32_t, VectorHash> ids_;
};

}  // namespace portattn
