// Segments: runs of equal ids, renumbered so that a kernel compares small integers.
#include <algorithm>
#include <unordered_map>

#include "expr.hpp"
#include "planner.hpp"

namespace portattn {

namespace {

using Run = Segments::Run;

// End of the run of equal ids that starts at `at`.
i64 run_end(const int32_t* ids, i64 at, i64 end) {
    constexpr i64 kBlock = 64;  // compared at once, in vectors
    const int32_t id = ids[at];
    for (; at + kBlock <= end; at += kBlock) {
        int32_t differs = 0;
        for (i64 n = 0; n < kBlock; ++n) differs |= ids[at + n] ^ id;
        if (differs) break;
    }
    while (at < end && ids[at] == id) ++at;
    return at;
}

std::vector<Run> find_runs(const int32_t* ids, i64 begin, i64 end) {
    std::vector<Run> runs;
    for (i64 at = begin; at < end;) {
        const i64 stop = run_end(ids, at, end);
        runs.push_back({at, stop, ids[at]});
        at = stop;
    }
    return runs;
}

// Gives ids that both sides have the numbers 0, 1, ... and indexes the key runs by id.
template <class Key>
void renumber(Segments& out, const std::vector<Key>& q_keys, const std::vector<Key>& k_keys) {
    std::unordered_map<Key, int32_t> numbers;
    for (const Key& key : k_keys) numbers.emplace(key, -1);
    int32_t next = 0;
    for (size_t n = 0; n < q_keys.size(); ++n) {
        auto found = numbers.find(q_keys[n]);
        if (found != numbers.end() && found->second < 0) found->second = next++;
        out.q_runs[n].id = found == numbers.end() ? -1 : found->second;
    }
    out.id_ptr.assign(static_cast<size_t>(next) + 1, 0);
    for (size_t n = 0; n < k_keys.size(); ++n) {
        const int32_t id = numbers.at(k_keys[n]);
        out.k_runs[n].id = id < 0 ? -2 : id;
        if (id >= 0) ++out.id_ptr[static_cast<size_t>(id) + 1];
    }
    for (size_t n = 1; n < out.id_ptr.size(); ++n) out.id_ptr[n] += out.id_ptr[n - 1];
    out.id_runs.resize(static_cast<size_t>(out.id_ptr.back()));
    std::vector<int32_t> fill(out.id_ptr.begin(), out.id_ptr.end() - 1);
    for (size_t n = 0; n < out.k_runs.size(); ++n) {
        const int32_t id = out.k_runs[n].id;
        if (id >= 0)
            out.id_runs[static_cast<size_t>(fill[static_cast<size_t>(id)]++)] = static_cast<int32_t>(n);
    }
}

// Cuts two run lists over the same range at each other's borders; keys become pairs of ids.
std::vector<Run> cut(const std::vector<Run>& x, const std::vector<Run>& y, std::vector<i64>& keys) {
    std::vector<Run> out;
    for (size_t a = 0, b = 0; a < x.size() && b < y.size();) {
        const i64 begin = std::max(x[a].begin, y[b].begin), end = std::min(x[a].end, y[b].end);
        out.push_back({begin, end, 0});
        // An id without a partner stays without one: -1 and -2 never meet their like on the other side.
        keys.push_back((static_cast<i64>(x[a].id) << 32) | static_cast<uint32_t>(y[b].id));
        if (x[a].end == end && y[b].end == end) {
            ++a;
            ++b;
        } else if (x[a].end == end)
            ++a;
        else
            ++b;
    }
    return out;
}

}  // namespace

std::shared_ptr<const Segments> make_segments(const int32_t* q_ids, const int32_t* k_ids, i64 q_offset,
                                              i64 seqlen_q, i64 seqlen_k) {
    auto out = std::make_shared<Segments>();
    out->q_first = q_offset;
    out->k_runs = find_runs(k_ids, 0, seqlen_k);
    if (q_ids == k_ids && q_offset == 0 && seqlen_q == seqlen_k)
        out->q_runs = out->k_runs;
    else
        out->q_runs = find_runs(q_ids, q_offset, q_offset + seqlen_q);
    std::vector<int32_t> q_keys, k_keys;
    for (const Run& run : out->q_runs) q_keys.push_back(run.id);
    for (const Run& run : out->k_runs) k_keys.push_back(run.id);
    renumber(*out, q_keys, k_keys);
    return out;
}

std::shared_ptr<const Segments> make_documents(const int64_t* bounds, i64 num_bounds, i64 q_offset,
                                               i64 seqlen_q, i64 seqlen_k) {
    auto out = std::make_shared<Segments>();
    out->q_first = q_offset;
    const auto clip = [&](i64 begin, i64 end, std::vector<Run>& runs) {
        const int64_t* at = std::upper_bound(bounds, bounds + num_bounds, begin) - 1;
        for (; begin < end; ++at) {
            if (at[1] <= begin) continue;  // an empty document
            const i64 stop = std::min<i64>(at[1], end);
            runs.push_back({begin, stop, static_cast<int32_t>(at - bounds)});
            begin = stop;
        }
    };
    clip(q_offset, q_offset + seqlen_q, out->q_runs);
    clip(0, seqlen_k, out->k_runs);
    // Documents that both sides have are neighbours in both.
    int32_t next = 0;
    size_t k = 0;
    for (Run& run : out->q_runs) {
        while (k < out->k_runs.size() && out->k_runs[k].id < run.id) out->k_runs[k++].id = -2;
        if (k < out->k_runs.size() && out->k_runs[k].id == run.id) {
            out->id_runs.push_back(static_cast<int32_t>(k));
            out->k_runs[k++].id = next;
            run.id = next++;
        } else {
            run.id = -1;
        }
    }
    while (k < out->k_runs.size()) out->k_runs[k++].id = -2;
    for (int32_t n = 0; n <= next; ++n) out->id_ptr.push_back(n);
    return out;
}

std::shared_ptr<const Segments> intersect_segments(const Segments& x, const Segments& y) {
    auto out = std::make_shared<Segments>();
    out->q_first = x.q_first;
    std::vector<i64> q_keys, k_keys;
    out->q_runs = cut(x.q_runs, y.q_runs, q_keys);
    out->k_runs = cut(x.k_runs, y.k_runs, k_keys);
    renumber(*out, q_keys, k_keys);
    return out;
}

namespace {

void write_runs(int32_t*& to, const std::vector<Segments::Run>& runs) {
    for (const Segments::Run& run : runs) to = std::fill_n(to, run.end - run.begin, run.id);
}

// Whether rows and keys have the same ids at the same places.
bool is_symmetric(const Segments& s) {
    return s.q_runs.size() == s.k_runs.size() &&
           std::equal(s.q_runs.begin(), s.q_runs.end(), s.k_runs.begin(),
                      [](const Segments::Run& x, const Segments::Run& y) {
                          return x.begin == y.begin && x.end == y.end && x.id == y.id;
                      });
}

bool has_id_tiles(const pa_plan& plan) {
    for (size_t n = 0; n < plan.tiles.size(); n += kTileFields)
        if (plan.tiles[n + 2] != plan.tiles[n + 3]) return true;
    return false;
}

}  // namespace

void add_ids(pa_plan& plan, const std::vector<std::shared_ptr<const Segments>>& layouts) {
    if (!has_id_tiles(plan)) {
        plan.layout_ids.assign(layouts.size(), -1);
        return;
    }
    for (const auto& layout : layouts) {
        if (!layout) {
            plan.layout_ids.push_back(-1);
            continue;
        }
        auto at = std::find(plan.id_rows.begin(), plan.id_rows.end(), layout);
        if (at == plan.id_rows.end()) at = plan.id_rows.insert(at, layout);
        plan.layout_ids.push_back(static_cast<int32_t>(at - plan.id_rows.begin()));
    }
    plan.view.num_id_rows = static_cast<int32_t>(plan.id_rows.size());
    plan.has_same_ids = std::all_of(plan.id_rows.begin(), plan.id_rows.end(),
                                    [](const auto& row) { return is_symmetric(*row); });
}

}  // namespace portattn

void pa_plan::write_ids(int32_t* q_ids, int32_t* k_ids) const {
    for (const auto& row : id_rows) {
        if (q_ids) portattn::write_runs(q_ids, row->q_runs);
        if (k_ids && !has_same_ids) portattn::write_runs(k_ids, row->k_runs);
    }
}

void pa_plan::make_ids() const {
    std::call_once(ids_once, [this] {
        const auto rows = static_cast<int64_t>(id_rows.size()), q_count = rows * view.seqlen_q;
        ids.resize(static_cast<size_t>(q_count + (has_same_ids ? 0 : rows * view.seqlen_k)));
        view.q_ids = ids.data();
        view.k_ids = has_same_ids ? ids.data() : ids.data() + q_count;
        write_ids(ids.data(), ids.data() + q_count);
    });
}
