// Rows of documents that follow from a row before them, without looking at the mask again.
#pragma once
#include <algorithm>
#include <numeric>

#include "expr.hpp"
#include "leaves.hpp"
#include "planner.hpp"

namespace portattn {

// Of one layout whose tiles begin with its documents. Where the rest of the mask does not depend on the
// query, the rows of a document have the same tiles; where it is an upper bound on j - i, a row has the tiles
// of one before it, the full ones extended to the diagonal and those at the diagonal moved along.
class RowRepeat {
  public:
    // rest: the mask inside a document; null where no row follows from another.
    RowRepeat(pa_plan& plan, const Expr* rest)
        : plan_(plan), block_q_(plan.view.block_q), block_k_(plan.view.block_k) {
        if (!rest) return;
        if (!rest->depends_on_query()) {
            kind_ = Kind::kSame;
        } else if (rest->op == Op::kBand && !rest->negated && rest->a <= kNoLower && rest->b < kNoUpper) {
            kind_ = Kind::kDiagonal;
            upper_ = rest->b;
            period_ = static_cast<size_t>(block_k_ / std::gcd(block_q_, block_k_));
        }
    }

    // A document begins; `keys` is where its keys are, empty if that is not one place.
    void begin(const Segments::Run& keys) {
        keys_ = keys;
        first_row_ = plan_.rows.size() / kRowFields;
    }

    // Adds the document's next query tile, which starts at row `start`, if it follows from one before.
    bool repeat(const QueryTile& rows, i64 start) {
        const size_t next = plan_.rows.size() / kRowFields;
        if (kind_ == Kind::kNone || rows.count != block_q_ || next - first_row_ < period_) return false;
        int32_t row[kRowFields];
        std::copy_n(plan_.rows.data() + (next - period_) * kRowFields, +kRowFields, row);
        row[0] = static_cast<int32_t>(start);
        if (kind_ == Kind::kDiagonal && !extend(rows, row)) return false;
        plan_.rows.insert(plan_.rows.end(), row, row + kRowFields);
        return true;
    }

  private:
    enum class Kind { kNone, kSame, kDiagonal };

    // Puts the tiles of `rows` behind the others, where they follow from those of `row`, which is then
    // theirs.
    bool extend(const QueryTile& rows, int32_t* row) {
        if (row[5] != row[4] + 1) return false;
        int32_t run[kRunFields];
        std::copy_n(plan_.runs.data() + static_cast<size_t>(row[4]) * kRunFields, +kRunFields, run);
        // The row before saw the document's first keys, and the tiles at the diagonal end inside it.
        const i64 end = ceil_div(rows.last() + upper_ + 1 - keys_.begin, block_k_) * block_k_;
        if (run[0] != keys_.begin || end > keys_.end - keys_.begin) return false;
        const auto shift = static_cast<int32_t>(static_cast<i64>(period_) * block_q_);
        const auto tile_begin = static_cast<int32_t>(plan_.tiles.size() / kTileFields);
        for (int32_t n = row[2]; n < row[3]; ++n) {
            int32_t tile[kTileFields];
            std::copy_n(plan_.tiles.data() + static_cast<size_t>(n) * kTileFields, +kTileFields, tile);
            tile[0] += shift;
            plan_.tiles.insert(plan_.tiles.end(), tile, tile + kTileFields);
        }
        row[3] = tile_begin + row[3] - row[2];
        row[2] = tile_begin;
        run[2] += static_cast<int32_t>(shift / block_k_);
        row[4] = static_cast<int32_t>(plan_.runs.size() / kRunFields);
        row[5] = row[4] + 1;
        plan_.runs.insert(plan_.runs.end(), run, run + kRunFields);
        return true;
    }

    pa_plan& plan_;
    const i64 block_q_, block_k_;
    Kind kind_ = Kind::kNone;
    i64 upper_ = 0;      // of j - i
    size_t period_ = 1;  // rows after which the diagonal stands in its tiles as before
    Segments::Run keys_{};
    size_t first_row_ = 0;  // of the document
};

}  // namespace portattn
