// Rows of packed documents that follow from a row before them, without looking at the mask again.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "parts.hpp"
#include "planner.hpp"

namespace portattn {

// Of one layout. Inside a document all rows of a mask of ids have the same tiles; with an upper bound on
// j - i beside the ids, a row has the tiles of one before it, the full ones extended to the diagonal and
// those at the diagonal moved along.
class RowRepeat {
  public:
    RowRepeat(pa_plan& plan, const Segments* id, const std::vector<Group>& groups)
        : plan_(plan), id_(id), block_k_(plan.view.block_k) {
        if (!id || groups.size() != 1 || groups[0].kind != Group::Kind::kContiguous) return;
        const Expr& mask = groups[0].mask;
        if (is_ids(mask)) {
            kind_ = Kind::kIds;
        } else if (mask.op == Op::kAnd && mask.children.size() == 2) {
            const bool ids_first = is_ids(mask.children[0]);
            const Expr& band = mask.children[ids_first ? 1 : 0];
            if (!is_ids(mask.children[ids_first ? 0 : 1]) || band.op != Op::kBand || band.negated ||
                band.a > kNoLower || band.b >= kNoUpper)
                return;
            kind_ = Kind::kIdsAndBand;
            upper_ = band.b;
            period_ = static_cast<size_t>(block_k_ / std::gcd(i64{plan.view.block_q}, block_k_));
        }
    }

    // Forget the rows of another pass.
    void begin() { seen_.clear(); }

    // Adds the row of a query tile that starts at row `start`, if it follows from one before.
    bool repeat(const QueryTile& rows, i64 start) {
        if (kind_ == Kind::kNone || rows.step != 1) return false;
        const size_t at = find_run(id_->q_runs, rows.first);
        const bool inside = rows.first + rows.count <= id_->q_runs[at].end && id_->q_runs[at].id >= 0;
        seen_.push_back({inside ? static_cast<i64>(at) : -1, rows.first, rows.count});
        if (!inside || seen_.size() <= period_) return false;
        const Row& before = seen_[seen_.size() - 1 - period_];
        if (before.run != static_cast<i64>(at) || before.count != rows.count) return false;
        const int32_t* source = plan_.rows.data() + plan_.rows.size() - period_ * kRowFields;
        int32_t row[kRowFields];
        std::copy_n(source, +kRowFields, row);
        row[0] = static_cast<int32_t>(start);
        if (kind_ == Kind::kIdsAndBand && !extend(rows, before, id_->q_runs[at].id, row)) return false;
        plan_.rows.insert(plan_.rows.end(), row, row + kRowFields);
        return true;
    }

  private:
    enum class Kind { kNone, kIds, kIdsAndBand };
    struct Row {
        i64 run, first, count;
    };

    bool is_ids(const Expr& node) const {
        return node.op == Op::kSegments && !node.negated && node.segments.get() == id_;
    }

    // Puts the tiles of `rows` behind the others, where they follow from those of `row`, which is then
    // theirs.
    bool extend(const QueryTile& rows, const Row& before, int32_t id, int32_t* row) {
        const auto number = static_cast<size_t>(id);
        if (id_->id_ptr[number + 1] != id_->id_ptr[number] + 1 || row[5] != row[4] + 1) return false;
        const Segments::Run& keys =
            id_->k_runs[static_cast<size_t>(id_->id_runs[static_cast<size_t>(id_->id_ptr[number])])];
        const i64 full_begin = ceil_div(keys.begin, block_k_) * block_k_;
        // The rows before saw the document's first tile whole, and the diagonal's tiles are inside it.
        if (full_begin > before.first + upper_ + 1 ||
            ceil_div(rows.last() + upper_ + 1, block_k_) * block_k_ > keys.end ||
            plan_.runs[static_cast<size_t>(row[4]) * kRunFields] != full_begin)
            return false;
        const auto shift = static_cast<int32_t>(rows.first - before.first);
        const auto tile_begin = static_cast<int32_t>(plan_.tiles.size() / kTileFields);
        for (int32_t n = row[2]; n < row[3]; ++n) {
            int32_t tile[kTileFields];
            std::copy_n(plan_.tiles.data() + static_cast<size_t>(n) * kTileFields, +kTileFields, tile);
            tile[0] += tile[0] < full_begin ? 0 : shift;
            plan_.tiles.insert(plan_.tiles.end(), tile, tile + kTileFields);
        }
        row[3] = tile_begin + row[3] - row[2];
        row[2] = tile_begin;
        int32_t run[kRunFields];
        std::copy_n(plan_.runs.data() + static_cast<size_t>(row[4]) * kRunFields, +kRunFields, run);
        run[2] += static_cast<int32_t>(shift / block_k_);
        row[4] = static_cast<int32_t>(plan_.runs.size() / kRunFields);
        row[5] = row[4] + 1;
        plan_.runs.insert(plan_.runs.end(), run, run + kRunFields);
        return true;
    }

    pa_plan& plan_;
    const Segments* id_;
    const i64 block_k_;
    Kind kind_ = Kind::kNone;
    i64 upper_ = 0;      // of j - i
    size_t period_ = 1;  // rows after which the diagonal stands in its tiles as before
    std::vector<Row> seen_;
};

}  // namespace portattn
