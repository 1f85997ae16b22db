// The order in which a schedule's items are taken.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <vector>

#include "portattn.h"

namespace portattn {

using Item = std::array<int32_t, PA_ITEM_FIELDS>;

// The items' numbers, those of equal cost in order, by falling cost. Small costs are counted, not compared.
inline void longest_first(const std::vector<Item>& items, std::vector<int32_t>& order) {
    const auto cost = [&items](int32_t n) { return items[static_cast<size_t>(n)][PA_ITEM_COST]; };
    const auto count = static_cast<int32_t>(items.size());
    int32_t most = 0;
    for (int32_t n = 0; n < count; ++n) most = std::max(most, cost(n));
    order.resize(items.size());
    if (most > 4 * count + 1024) {
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(),
                         [&cost](int32_t x, int32_t y) { return cost(x) > cost(y); });
        return;
    }
    std::vector<int32_t> starts(static_cast<size_t>(most) + 2, 0);
    const auto start = [&](int32_t n) -> int32_t* { return starts.data() + (most - cost(n)); };
    for (int32_t n = 0; n < count; ++n) ++start(n)[1];
    for (size_t n = 1; n < starts.size(); ++n) starts[n] += starts[n - 1];
    for (int32_t n = 0; n < count; ++n) order[static_cast<size_t>((*start(n))++)] = n;
}

}  // namespace portattn
