// The transposed plan: for every key tile the query tiles that see it.
#include <algorithm>
#include <map>
#include <memory>

#include "expr.hpp"
#include "planner.hpp"

namespace portattn {

namespace {

// Rows that see the current key tile whole, as disjoint spans of tile indices in one class of rows.
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
// (row step, row residue): the class of rows that runs of query tiles live in.
using RowClass = std::pair<int32_t, int32_t>;
struct Column {
    std::vector<Event> events;
    ActiveRows active;
};
struct KeyResidue {
    std::map<int32_t, std::vector<Partial>> partials;  // by key tile
    std::map<RowClass, Column> columns;
};

// All that one layout keeps, by key step and key residue.
using Collected = std::map<int32_t, std::map<int32_t, KeyResidue>>;

void collect(const pa_plan& plan, int32_t layout, Collected& out) {
    const pa_plan_view& v = plan.view;
    for (int32_t pass = 0; pass < v.num_passes; ++pass) {
        const int32_t step = v.pass_steps[pass];
        const int32_t begin = v.row_ptr[pass * v.num_layouts + layout],
                      end = v.row_ptr[pass * v.num_layouts + layout + 1];
        for (int32_t n = begin; n < end; ++n) {
            const int32_t* row = v.rows + n * kRowFields;
            for (int32_t t = row[2]; t < row[3]; ++t) {
                const int32_t* tile = v.tiles + t * kTileFields;
                const int32_t residue = tile[0] % tile[1];
                out[tile[1]][residue].partials[(tile[0] - residue) / (tile[1] * v.block_k)].push_back(
                    {row[0], step, tile[2], tile[3]});
            }
            for (int32_t r = row[4]; r < row[5]; ++r) {
                const int32_t* run = v.runs + r * kRunFields;
                const int32_t residue = run[0] % run[1], first = (run[0] - residue) / run[3];
                const RowClass rows{step, row[0] % step};
                const int32_t index = (row[0] - rows.second) / (step * v.block_q);
                std::vector<Event>& events = out[run[1]][residue].columns[rows].events;
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
        to_->id_rows = plan.id_rows;
        to_->has_same_ids = plan.has_same_ids;
    }

    pa_plan* run() {
        const pa_plan_view& v = from_.view;
        std::vector<Collected> layouts(static_cast<size_t>(v.num_layouts));
        std::map<int32_t, bool> steps;
        for (int32_t n = 0; n < v.num_layouts; ++n) {
            collect(from_, n, layouts[static_cast<size_t>(n)]);
            for (auto& by_step : layouts[static_cast<size_t>(n)]) steps[by_step.first] = true;
        }
        if (steps.empty()) steps[1] = true;
        to_->row_ptr.push_back(0);
        for (auto& step : steps) {
            to_->pass_steps.push_back(step.first);
            for (Collected& layout : layouts) {
                emit_pass(step.first, layout[step.first]);
                to_->row_ptr.push_back(static_cast<int32_t>(to_->rows.size() / kRowFields));
            }
        }
        to_->seal();
        return to_.release();
    }

  private:
    void emit_pass(int32_t step, std::map<int32_t, KeyResidue>& residues) {
        const pa_plan_view& v = from_.view;
        for (int32_t residue = 0; residue < std::min<i64>(step, v.seqlen_k); ++residue) {
            KeyResidue& from = residues[residue];
            for (auto& column : from.columns)
                std::sort(column.second.events.begin(), column.second.events.end(),
                          [](const Event& x, const Event& y) { return x.tile < y.tile; });
            std::map<RowClass, size_t> at;
            int32_t tile = 0;
            for (i64 start = residue; start < v.seqlen_k; start += i64{step} * v.block_k, ++tile)
                emit_row(step, static_cast<int32_t>(start), tile, from, at);
        }
    }

    void emit_row(int32_t step, int32_t start, int32_t tile, KeyResidue& from,
                  std::map<RowClass, size_t>& at) {
        const pa_plan_view& v = from_.view;
        const auto tile_begin = to_->tiles.size() / kTileFields, run_begin = to_->runs.size() / kRunFields;
        auto partials = from.partials.find(tile);
        if (partials != from.partials.end())
            for (const Partial& p : partials->second)
                to_->tiles.insert(to_->tiles.end(), {p.q_start, p.q_step, p.same, p.other});
        for (auto& entry : from.columns) {
            Column& column = entry.second;
            size_t& next = at[entry.first];
            for (; next < column.events.size() && column.events[next].tile <= tile; ++next) {
                const Event& event = column.events[next];
                if (event.add)
                    column.active.add(event.row);
                else
                    column.active.remove(event.row);
            }
            const int32_t row_step = entry.first.first, stride = row_step * v.block_q;
            for (const auto& span : column.active.spans())
                to_->runs.insert(to_->runs.end(), {entry.first.second + span.first * stride, row_step,
                                                   span.second - span.first, stride});
        }
        const i64 count = std::min<i64>(v.block_k, ceil_div(v.seqlen_k - start, step));
        to_->rows.insert(
            to_->rows.end(),
            {start, static_cast<int32_t>(count), static_cast<int32_t>(tile_begin),
             static_cast<int32_t>(to_->tiles.size() / kTileFields), static_cast<int32_t>(run_begin),
             static_cast<int32_t>(to_->runs.size() / kRunFields)});
    }

    const pa_plan& from_;
    std::unique_ptr<pa_plan> to_;
};

}  // namespace

pa_plan* transpose_plan(const pa_plan& plan) {
    if (plan.view.transposed) throw PlanError{"plan is transposed already; transpose the forward plan"};
    return Transposer(plan).run();
}

}  // namespace portattn
