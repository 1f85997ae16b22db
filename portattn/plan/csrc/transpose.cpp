// The transposed plan: for every key tile the query tiles that see it.
#include <algorithm>
#include <map>
#include <memory>

#include "expr.hpp"
#include "planner.hpp"

namespace portattn {

namespace {

// Rows that see the current key tile whole, as disjoint spans of tile numbers in one class of rows.
class ActiveRows {
  public:
    void add(int32_t row) {
        auto after = spans_.upper_bound(row);
        int32_t lo = row, hi = row + 1;
        if (after != spans_.begin()) {
            auto before = std::prev(after);
            if (before->second == row) {
                lo = before->first;
                spans_.erase(before);
            }
        }
        if (after != spans_.end() && after->first == row + 1) {
            hi = after->second;
            spans_.erase(after);
        }
        spans_[lo] = hi;
    }
    void remove(int32_t row) {
        auto at = std::prev(spans_.upper_bound(row));
        const int32_t lo = at->first, hi = at->second;
        spans_.erase(at);
        if (lo < row) spans_[lo] = row;
        if (row + 1 < hi) spans_[row + 1] = hi;
    }
    const std::map<int32_t, int32_t>& spans() const { return spans_; }

  private:
    std::map<int32_t, int32_t> spans_;
};

struct Partial {
    int32_t q_start, q_step, same, other;
};
struct Event {
    int32_t tile, row;
    bool add;
};
// (step, first start): the tiles whose starts are the first plus multiples of what a tile spans. Full ones
// with neighbouring numbers in it are a run.
using TileClass = std::pair<int32_t, int32_t>;
struct Column {
    std::vector<Event> events;
    ActiveRows active;
    size_t next = 0;  // event
};
struct KeyClassTiles {
    std::map<int32_t, std::vector<Partial>> partials;  // by key tile
    std::map<TileClass, Column> columns;               // by class of query tiles
};

// All that one layout keeps, by class of key tiles.
using Collected = std::map<TileClass, KeyClassTiles>;

// The bit tile that keeps every key of the first `count` rows; made once.
int32_t first_rows(pa_plan& to, std::map<int32_t, int32_t>& known, int32_t count) {
    const pa_plan_view& v = to.view;
    const auto next = static_cast<int32_t>(to.bits.size() / static_cast<size_t>(v.block_q * v.words_per_row));
    const auto found = known.emplace(count, next);
    if (!found.second) return found.first->second;
    for (int32_t r = 0; r < v.block_q; ++r)
        for (int32_t w = 0; w < v.words_per_row; ++w) {
            const int32_t left = r < count ? v.block_k - 32 * w : 0;
            to.bits.push_back(left >= 32 ? ~0u : (1u << left) - 1);
        }
    for (int32_t panel = 0; panel < v.block_q; panel += 16)
        to.bit_ranges.insert(to.bit_ranges.end(), {0, panel < count ? v.block_k : 0});
    return next;
}

// Full tiles of rows that another query tile follows closer than their own tile is long become bit tiles:
// their queries past num_rows exist, and are not kept here.
void collect(const pa_plan& plan, int32_t layout, pa_plan& to, std::map<int32_t, int32_t>& bit_tiles,
             Collected& out) {
    const pa_plan_view& v = plan.view;
    for (int32_t pass = 0; pass < v.num_passes; ++pass) {
        const int32_t step = v.pass_steps[pass];
        const int32_t begin = v.row_ptr[pass * v.num_layouts + layout],
                      end = v.row_ptr[pass * v.num_layouts + layout + 1];
        for (int32_t n = begin; n < end; ++n) {
            const int32_t* row = v.rows + n * kRowFields;
            const bool is_cut = row[1] < v.block_q && row[0] + i64{step} * row[1] < v.seqlen_q;
            for (int32_t t = row[2]; t < row[3]; ++t) {
                const int32_t* tile = v.tiles + t * kTileFields;
                const int32_t span = tile[1] * v.block_k;
                out[{tile[1], tile[0] % span}].partials[tile[0] / span].push_back(
                    {row[0], step, tile[2], tile[3]});
            }
            for (int32_t r = row[4]; r < row[5]; ++r) {
                const int32_t* run = v.runs + r * kRunFields;
                KeyClassTiles& keys = out[{run[1], run[0] % run[3]}];
                const int32_t first = run[0] / run[3], stride = step * v.block_q, index = row[0] / stride;
                if (is_cut) {
                    const int32_t bits = first_rows(to, bit_tiles, row[1]);
                    for (int32_t n = first; n < first + run[2]; ++n)
                        keys.partials[n].push_back({row[0], step, bits, bits});
                    continue;
                }
                std::vector<Event>& events = keys.columns[{step, row[0] % stride}].events;
                events.push_back({first, index, true});
                events.push_back({first + run[2], index, false});
            }
        }
    }
}

class Transposer {
  public:
    explicit Transposer(const pa_plan& plan) : from_(plan), to_(std::make_unique<pa_plan>()) {
        to_->view = plan.view;
        to_->view.transposed = 1;
        to_->bits = plan.bits;
        to_->bit_ranges = plan.bit_ranges;
        to_->layouts = plan.layouts;
        to_->layout_ids = plan.layout_ids;
        to_->documents = plan.documents;
        to_->id_rows = plan.id_rows;
        to_->has_same_ids = plan.has_same_ids;
    }

    pa_plan* run() {
        const pa_plan_view& v = from_.view;
        std::vector<Collected> layouts(static_cast<size_t>(v.num_layouts));
        std::map<int32_t, bool> steps;
        for (int32_t n = 0; n < v.num_layouts; ++n) {
            Collected& layout = layouts[static_cast<size_t>(n)];
            collect(from_, n, *to_, bit_tiles_, layout);
            for (auto& keys : layout) {
                steps[keys.first.first] = true;
                for (auto& column : keys.second.columns)
                    std::sort(column.second.events.begin(), column.second.events.end(),
                              [](const Event& x, const Event& y) { return x.tile < y.tile; });
            }
        }
        if (steps.empty()) steps[1] = true;
        to_->row_ptr.push_back(0);
        for (auto& step : steps) {
            to_->pass_steps.push_back(step.first);
            for (int32_t n = 0; n < v.num_layouts; ++n) {
                emit_pass(step.first, n, layouts[static_cast<size_t>(n)]);
                to_->row_ptr.push_back(static_cast<int32_t>(to_->rows.size() / kRowFields));
            }
        }
        to_->seal();
        return to_.release();
    }

  private:
    void emit_pass(int32_t step, int32_t layout, Collected& from) {
        const pa_plan_view& v = from_.view;
        const auto& documents = from_.documents[static_cast<size_t>(layout)];
        if (documents && step == 1) {
            for (const Segments::Run& run : documents->k_runs)
                for (i64 start = run.begin; start < run.end; start += v.block_k)
                    emit_row(1, start, run.end, from);
            return;
        }
        for (i64 residue = 0; residue < std::min<i64>(step, v.seqlen_k); ++residue)
            for (i64 start = residue; start < v.seqlen_k; start += i64{step} * v.block_k)
                emit_row(step, start, v.seqlen_k, from);
    }

    // The key tile that starts at `start`, of keys below `end`.
    void emit_row(int32_t step, i64 start, i64 end, Collected& collected) {
        const pa_plan_view& v = from_.view;
        const auto tile_begin = to_->tiles.size() / kTileFields, run_begin = to_->runs.size() / kRunFields;
        const i64 span = i64{step} * v.block_k;
        const auto from = collected.find({step, static_cast<int32_t>(start % span)});
        if (from != collected.end()) add_tiles(static_cast<int32_t>(start / span), from->second);
        const i64 count = std::min<i64>(v.block_k, ceil_div(end - start, step));
        to_->rows.insert(
            to_->rows.end(),
            {static_cast<int32_t>(start), static_cast<int32_t>(count), static_cast<int32_t>(tile_begin),
             static_cast<int32_t>(to_->tiles.size() / kTileFields), static_cast<int32_t>(run_begin),
             static_cast<int32_t>(to_->runs.size() / kRunFields)});
    }

    // What sees the key tile of this number in its class; numbers never fall.
    void add_tiles(int32_t tile, KeyClassTiles& from) {
        const auto partials = from.partials.find(tile);
        if (partials != from.partials.end())
            for (const Partial& p : partials->second)
                to_->tiles.insert(to_->tiles.end(), {p.q_start, p.q_step, p.same, p.other});
        for (auto& entry : from.columns) {
            Column& column = entry.second;
            for (; column.next < column.events.size() && column.events[column.next].tile <= tile;
                 ++column.next) {
                const Event& event = column.events[column.next];
                if (event.add)
                    column.active.add(event.row);
                else
                    column.active.remove(event.row);
            }
            const int32_t row_step = entry.first.first, stride = row_step * from_.view.block_q;
            for (const auto& span : column.active.spans())
                to_->runs.insert(to_->runs.end(), {entry.first.second + span.first * stride, row_step,
                                                   span.second - span.first, stride});
        }
    }

    const pa_plan& from_;
    std::unique_ptr<pa_plan> to_;
    std::map<int32_t, int32_t> bit_tiles_;  // by the rows that they keep
};

}  // namespace

pa_plan* transpose_plan(const pa_plan& plan) {
    if (plan.view.transposed) throw PlanError{"plan is transposed already; transpose the forward plan"};
    return Transposer(plan).run();
}

}  // namespace portattn
