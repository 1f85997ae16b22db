// The scheduler: rows of a plan become items; long rows are cut into pieces; longest first.
#include <algorithm>
#include <memory>
#include <vector>

#include "expr.hpp"
#include "item_order.hpp"
#include "planner.hpp"

struct pa_schedule {
    pa_schedule_view view{};
    std::vector<int32_t> items_per_pass, item_ptr, items, full_list;
};

namespace portattn {

namespace {

// Full tiles of an item beyond this are walked as progressions, one item each, so that no list grows with the
// length.
constexpr i64 kMaxListed = 256;
constexpr size_t kMaxKept = 1 << 14;  // items whose memory a thread keeps

// A stretch of one run.
struct Stretch {
    int32_t start, step, count, stride;
};

// What one item does: partial tiles and stretches of full tiles.
struct Piece {
    int32_t tile_begin = 0, tile_end = 0;
    std::vector<Stretch> full;
    i64 full_count() const {
        i64 n = 0;
        for (const Stretch& s : full) n += s.count;
        return n;
    }
    i64 cost() const { return tile_end - tile_begin + full_count(); }
};

class Scheduler {
  public:
    Scheduler(const pa_plan& plan, const pa_schedule_args& args, pa_schedule& out)
        : plan_(plan.view), args_(args), out_(out) {}

    void run() {
        // Cut less until the workspace fits.
        for (i64 factor = 1;; factor *= 2) {
            reset();
            for (int32_t pass = 0; pass < plan_.num_passes; ++pass) add_pass(pass, factor);
            const i64 slots = out_.view.num_slots;
            const i64 rows = plan_.transposed ? plan_.block_k : plan_.block_q;
            const i64 bytes = args_.batch * args_.num_heads * slots * rows * (args_.head_dim_v + 1) * 4;
            out_.view.workspace_bytes = bytes;
            if (slots == 0 || bytes <= args_.max_workspace_bytes) return;
            if (factor > (i64{1} << 40)) throw PlanError{"workspace bound cannot be met"};
        }
    }

  private:
    void reset() {
        out_.items.clear();
        out_.full_list.clear();
        out_.items_per_pass.clear();
        out_.item_ptr.clear();
        out_.view.num_slots = out_.view.num_counters = 0;
    }

    const int32_t* row(int32_t n) const { return plan_.rows + n * kRowFields; }

    i64 row_cost(const int32_t* row) const {
        i64 cost = row[3] - row[2];
        for (int32_t r = row[4]; r < row[5]; ++r) cost += plan_.runs[r * kRunFields + 2];
        return cost;
    }

    i64 total_cost(int32_t pass) const {
        std::vector<i64> cost(static_cast<size_t>(plan_.num_layouts), 0);
        for (int32_t l = 0; l < plan_.num_layouts; ++l) {
            const int32_t* ptr = plan_.row_ptr + pass * plan_.num_layouts + l;
            for (int32_t n = ptr[0]; n < ptr[1]; ++n) cost[static_cast<size_t>(l)] += row_cost(row(n));
        }
        i64 total = 0;
        for (i64 b = 0; b < args_.batch; ++b)
            for (i64 h = 0; h < args_.num_heads; ++h)
                total += cost[static_cast<size_t>(
                    plan_.layouts[(b % plan_.layout_batch) * plan_.layout_heads + h % plan_.layout_heads])];
        return total;
    }

    void add_pass(int32_t pass, i64 factor) {
        const i64 workers = std::max<i64>(args_.workers, 1);
        limit_ = std::max(args_.min_piece, ceil_div(total_cost(pass), 4 * workers));
        may_cut_ = factor < (i64{1} << 30);
        limit_ = may_cut_ ? std::max<i64>(limit_, 1) * factor : INT64_MAX;
        // Kept from call to call: memory that is new to the process costs more than the work in it.
        thread_local std::vector<std::vector<Item>> layouts;
        std::vector<int32_t> order;
        layouts.resize(std::max(layouts.size(), static_cast<size_t>(plan_.num_layouts)));
        size_t longest = 0;
        for (int32_t l = 0; l < plan_.num_layouts; ++l) {
            std::vector<Item>& items = layouts[static_cast<size_t>(l)];
            items.clear();
            slots_ = counters_ = 0;
            items.reserve(static_cast<size_t>(plan_.row_ptr[pass * plan_.num_layouts + l + 1] -
                                              plan_.row_ptr[pass * plan_.num_layouts + l]));
            const int32_t* ptr = plan_.row_ptr + pass * plan_.num_layouts + l;
            for (int32_t n = ptr[0]; n < ptr[1]; ++n) add_row(pass, l, row(n), items);
            longest = std::max(longest, items.size());
            out_.view.num_slots = std::max(out_.view.num_slots, slots_);
            out_.view.num_counters = std::max(out_.view.num_counters, counters_);
        }
        out_.item_ptr.push_back(static_cast<int32_t>(out_.items.size() / PA_ITEM_FIELDS));
        out_.items_per_pass.push_back(static_cast<int32_t>(longest));
        for (int32_t l = 0; l < plan_.num_layouts; ++l) {
            const std::vector<Item>& items = layouts[static_cast<size_t>(l)];
            out_.items.reserve(out_.items.size() + longest * PA_ITEM_FIELDS);
            longest_first(items, order);
            for (const int32_t n : order) {
                const Item& item = items[static_cast<size_t>(n)];
                out_.items.insert(out_.items.end(), item.begin(), item.end());
            }
            Item padding{};
            padding[PA_ITEM_Q_STEP] = 1;
            padding[PA_ITEM_SLOT] = padding[PA_ITEM_COUNTER] = -1;
            padding[PA_ITEM_NUM_PIECES] = 1;
            for (size_t n = items.size(); n < longest; ++n)
                out_.items.insert(out_.items.end(), padding.begin(), padding.end());
        }
        if (longest * layouts.size() > kMaxKept) layouts.clear();
    }

    std::vector<Piece> cut(const int32_t* row) const {
        const i64 cost = row_cost(row);
        const i64 count = cost > limit_ ? ceil_div(cost, limit_) : 1;
        std::vector<Piece> pieces(static_cast<size_t>(count));
        i64 at = row[2];  // position in the row's sequence of tiles: partial ones, then runs
        int32_t run = row[4];
        i64 in_run = 0;
        for (i64 n = 0; n < count; ++n) {
            Piece& piece = pieces[static_cast<size_t>(n)];
            i64 left = (n + 1) * cost / count - n * cost / count;
            const i64 partial = std::min<i64>(left, row[3] - at);
            piece.tile_begin = static_cast<int32_t>(at);
            piece.tile_end = static_cast<int32_t>(at + partial);
            at += partial;
            left -= partial;
            while (left > 0) {
                const int32_t* from = plan_.runs + run * kRunFields;
                const i64 take = std::min<i64>(left, from[2] - in_run);
                piece.full.push_back({static_cast<int32_t>(from[0] + in_run * from[3]), from[1],
                                      static_cast<int32_t>(take), from[3]});
                left -= take;
                in_run += take;
                if (in_run == from[2]) {
                    ++run;
                    in_run = 0;
                }
            }
        }
        return pieces;
    }

    // Long stretches become pieces of their own, so that each item is one list or one progression.
    std::vector<Piece> separate(std::vector<Piece> pieces) const {
        std::vector<Piece> out;
        for (Piece& piece : pieces) {
            if (piece.full.size() <= 1 || piece.full_count() <= kMaxListed || !may_cut_) {
                out.push_back(std::move(piece));
                continue;
            }
            Piece rest;
            rest.tile_begin = piece.tile_begin;
            rest.tile_end = piece.tile_end;
            for (const Stretch& stretch : piece.full) {
                if (stretch.count > kMaxListed / 4 || rest.full_count() + stretch.count > kMaxListed) {
                    out.push_back({});
                    out.back().full.push_back(stretch);
                } else {
                    rest.full.push_back(stretch);
                }
            }
            if (rest.cost() > 0) out.push_back(std::move(rest));
        }
        return out;
    }

    Item new_item(int32_t pass, int32_t layout, const int32_t* row) const {
        Item item{};
        item[PA_ITEM_Q_START] = row[0];
        item[PA_ITEM_Q_STEP] = plan_.pass_steps[pass];
        item[PA_ITEM_NUM_ROWS] = row[1];
        item[PA_ITEM_LAYOUT] = layout;
        item[PA_ITEM_NUM_PIECES] = 1;
        item[PA_ITEM_SLOT] = item[PA_ITEM_SLOT_FIRST] = item[PA_ITEM_COUNTER] = -1;
        return item;
    }

    // Most rows: not to be cut, with at most one run. As cutting them into one piece, without memory.
    bool add_simple_row(int32_t pass, int32_t layout, const int32_t* row, std::vector<Item>& items) {
        const i64 cost = row_cost(row);
        if (cost > limit_ || row[5] - row[4] > 1) return false;
        Item item = new_item(pass, layout, row);
        item[PA_ITEM_TILE_BEGIN] = row[2];
        item[PA_ITEM_TILE_END] = row[3];
        item[PA_ITEM_COST] = static_cast<int32_t>(cost);
        item[PA_ITEM_FULL_FIRST] = static_cast<int32_t>(out_.full_list.size() / 2);
        if (row[5] > row[4]) {
            const int32_t* run = plan_.runs + row[4] * kRunFields;
            item[PA_ITEM_FULL_FIRST] = run[0];
            item[PA_ITEM_FULL_STEP] = run[1];
            item[PA_ITEM_FULL_COUNT] = run[2];
            item[PA_ITEM_FULL_STRIDE] = run[3];
        }
        items.push_back(item);
        return true;
    }

    void add_row(int32_t pass, int32_t layout, const int32_t* row, std::vector<Item>& items) {
        if (add_simple_row(pass, layout, row, items)) return;
        const std::vector<Piece> pieces = separate(cut(row));
        const int32_t first_slot = slots_, counter = counters_;
        if (pieces.size() > 1) {
            slots_ += static_cast<int32_t>(pieces.size());
            ++counters_;
        }
        for (size_t n = 0; n < pieces.size(); ++n) {
            const Piece& piece = pieces[n];
            Item item = new_item(pass, layout, row);
            item[PA_ITEM_TILE_BEGIN] = piece.tile_begin;
            item[PA_ITEM_TILE_END] = piece.tile_end;
            item[PA_ITEM_FULL_COUNT] = static_cast<int32_t>(piece.full_count());
            if (piece.full.size() == 1) {
                item[PA_ITEM_FULL_FIRST] = piece.full[0].start;
                item[PA_ITEM_FULL_STEP] = piece.full[0].step;
                item[PA_ITEM_FULL_STRIDE] = piece.full[0].stride;
            } else {
                item[PA_ITEM_FULL_FIRST] = static_cast<int32_t>(out_.full_list.size() / 2);
                for (const Stretch& s : piece.full)
                    for (int32_t e = 0; e < s.count; ++e)
                        out_.full_list.insert(out_.full_list.end(), {s.start + e * s.stride, s.step});
            }
            const bool whole = pieces.size() == 1;
            item[PA_ITEM_SLOT] = whole ? -1 : first_slot + static_cast<int32_t>(n);
            item[PA_ITEM_SLOT_FIRST] = whole ? -1 : first_slot;
            item[PA_ITEM_NUM_PIECES] = static_cast<int32_t>(pieces.size());
            item[PA_ITEM_COUNTER] = whole ? -1 : counter;
            item[PA_ITEM_COST] = static_cast<int32_t>(piece.cost());
            items.push_back(item);
        }
    }

    const pa_plan_view& plan_;
    const pa_schedule_args& args_;
    pa_schedule& out_;
    i64 limit_ = 0;
    bool may_cut_ = true;
    int32_t slots_ = 0, counters_ = 0;
};

}  // namespace

pa_schedule* make_schedule(const pa_plan& plan, const pa_schedule_args& args) {
    auto out = std::make_unique<pa_schedule>();
    Scheduler(plan, args, *out).run();
    pa_schedule_view& v = out->view;
    v.num_passes = plan.view.num_passes;
    v.num_layouts = plan.view.num_layouts;
    v.full_list_len = static_cast<int32_t>(out->full_list.size() / 2);
    v.total_items = static_cast<int64_t>(out->items.size() / PA_ITEM_FIELDS);
    v.items_per_pass = out->items_per_pass.data();
    v.item_ptr = out->item_ptr.data();
    v.items = out->items.data();
    v.full_list = out->full_list.data();
    return out.release();
}

}  // namespace portattn

extern "C" {

void portattn_schedule_destroy(pa_schedule* schedule) { delete schedule; }

const pa_schedule_view* portattn_schedule_view(const pa_schedule* schedule) { return &schedule->view; }
}
