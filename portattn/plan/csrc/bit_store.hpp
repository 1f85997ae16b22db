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

// Of 8-byte words. Four chains, because a bit tile is long and a multiplication takes its time.
inline uint64_t hash_words(const void* words, size_t count) {
    constexpr uint64_t kFactor = 0xBF58476D1CE4E5B9ULL;
    const auto mix = [words](uint64_t h, size_t n) {
        uint64_t word;
        std::memcpy(&word, static_cast<const char*>(words) + 8 * n, 8);
        h = (h ^ word) * kFactor;
        return h ^ (h >> 29);
    };
    uint64_t h[4] = {count, 1, 2, 3};
    size_t n = 0;
    for (; n + 4 <= count; n += 4)
        for (size_t lane = 0; lane < 4; ++lane) h[lane] = mix(h[lane], n + lane);
    for (; n < count; ++n) h[0] = mix(h[0], n);
    for (size_t lane = 1; lane < 4; ++lane) {
        h[0] = (h[0] ^ h[lane]) * kFactor;
        h[0] ^= h[0] >> 29;
    }
    return h[0];
}

struct VectorHash {
    size_t operator()(const std::vector<i64>& key) const {
        return static_cast<size_t>(hash_words(key.data(), key.size()));
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
        // Made where it is going to stay: memory that is new to the process costs more than the work in it.
        const size_t at = plan_.bits.size(), size = static_cast<size_t>(block_q * words);
        plan_.bits.resize(at + size);
        uint32_t* bits = plan_.bits.data() + at;
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
        int32_t found = PA_BITS_EMPTY;
        const auto next = static_cast<int32_t>(at / size);
        if (!missing && num_keys == block_k)
            found = PA_BITS_FULL;
        else if (any)
            found = find_or_keep(bits, size, next);
        if (found != next) plan_.bits.resize(at);
        return found;
    }

    // Makes room for so many tiles, or for as many as are worth it.
    void reserve(i64 count) {
        const i64 words = plan_.view.block_q * plan_.view.words_per_row;
        plan_.bits.reserve(plan_.bits.size() + static_cast<size_t>(std::min<i64>(count, 64) * words));
    }

  private:
    // The number of an equal tile, or `next`, which it is from now on.
    int32_t find_or_keep(const uint32_t* bits, size_t size, int32_t next) {
        const uint64_t hash = hash_words(bits, size / 2);
        const auto range = ids_.equal_range(hash);
        for (auto at = range.first; at != range.second; ++at)
            if (!std::memcmp(plan_.bits.data() + static_cast<size_t>(at->second) * size, bits, 4 * size))
                return at->second;
        if (static_cast<i64>(4 * size) * (next + 1) > max_bytes_)
            throw PlanError{
                "mask needs more than " + std::to_string(max_bytes_) +
                " bytes of distinct partial tiles; use larger blocks in the mask, or one Segments "
                "joined by & instead of several"};
        ids_.emplace(hash, next);
        add_ranges(bits);
        return next;
    }

    void add_ranges(const uint32_t* bits) {
        const i64 block_q = plan_.view.block_q, words = plan_.view.words_per_row;
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
    std::unordered_multimap<uint64_t, int32_t> ids_;  // by the hash of their bits
};

}  // namespace portattn
