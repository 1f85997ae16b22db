// The planner of one layout: for every query tile, its full and partial key tiles. Work is O(runs + border
// tiles): interior tiles are found as spans in closed form, border tiles are evaluated once per class of
// equal signature.
#pragma once
#include <algorithm>
#include <array>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bit_store.hpp"
#include "documents.hpp"
#include "parts.hpp"
#include "row_repeat.hpp"

namespace portattn {

inline int logarithm(i64 n) {
    int shift = 0;
    while ((i64{1} << shift) < n) ++shift;
    return (i64{1} << shift) == n ? shift : -1;
}

// Plans one layout.
class LayoutPlanner {
  public:
    // id: the Segments whose tiles name ids; documents: those in whose runs tiles begin. Either may be null.
    LayoutPlanner(pa_plan& plan, BitStore& bits, const Sizes& sizes, std::vector<Group> groups,
                  const Segments* id, const Segments* documents)
        : plan_(plan),
          bits_(bits),
          sizes_(sizes),
          groups_(std::move(groups)),
          id_(id),
          documents_(documents),
          sizing_{sizes.seqlen_k, plan.view.block_q, plan.view.block_k},
          block_k_(plan.view.block_k),
          block_shift_(logarithm(plan.view.block_k)),
          repeat_(plan, documents ? &groups_[0].mask : nullptr) {
        classes_.resize(groups_.size());
        last_.resize(groups_.size());
    }

    void plan_pass(i64 row_step) {
        if (documents_ && row_step == 1) return plan_documents();
        const i64 block_q = plan_.view.block_q;
        for (i64 residue = 0; residue < std::min(row_step, sizes_.seqlen_q); ++residue)
            for (i64 start = residue; start < sizes_.seqlen_q; start += row_step * block_q)
                plan_row({sizes_.q_offset + start, row_step,
                          std::min(block_q, ceil_div(sizes_.seqlen_q - start, row_step))});
    }

  private:
    // A tile's pair of bit ids, per signature; one table per group (and so per step).
    struct Bits {
        int32_t same, other;
    };
    struct Last {
        std::vector<i64> signature;
        Bits bits{};
    };
    struct LastFew {
        std::array<Last, 4> entries;
        size_t next = 0;
    };
    using Classes = std::unordered_map<std::vector<i64>, Bits, VectorHash>;

    void plan_documents() {
        const i64 block_q = plan_.view.block_q;
        const size_t rows = documents_->q_runs.size() + static_cast<size_t>(sizes_.seqlen_q / block_q);
        plan_.rows.reserve(plan_.rows.size() + kRowFields * rows);
        plan_.tiles.reserve(plan_.tiles.size() + kTileFields * rows);
        plan_.runs.reserve(plan_.runs.size() + kRunFields * rows);
        bits_.reserve(2 * static_cast<i64>(documents_->q_runs.size()));
        for (const Segments::Run& run : documents_->q_runs) {
            const int32_t *keys = nullptr, *keys_end = nullptr;
            if (run.id >= 0) std::tie(keys, keys_end) = documents_->runs_of(run.id);
            repeat_.begin(keys_end - keys == 1 ? documents_->k_run(*keys) : Segments::Run{});
            for (i64 at = run.begin; at < run.end; at += block_q) {
                const QueryTile rows{at, 1, std::min(block_q, run.end - at)};
                if (repeat_.repeat(rows, at - sizes_.q_offset)) continue;
                begin_row();
                for (const int32_t* n = keys; n != keys_end; ++n) {
                    const Segments::Run& found = documents_->k_run(*n);
                    plan_class(0, rows, {1, found.begin, found.end - found.begin, block_k_});
                }
                end_row(rows);
            }
        }
    }

    void plan_row(const QueryTile& rows) {
        begin_row();
        for (size_t g = 0; g < groups_.size(); ++g) {
            const Group& group = groups_[g];
            if (group.row_step != rows.step) continue;
            for (i64 residue : group.residues) {
                if (group.kind == Group::Kind::kDiffModulo)
                    residue = floor_mod(rows.first - residue, group.modulus);
                if (residue >= sizes_.seqlen_k) continue;
                plan_class(g, rows,
                           {group.modulus, residue, ceil_div(sizes_.seqlen_k - residue, group.modulus),
                            plan_.view.block_k});
            }
        }
        end_row(rows);
    }

    void begin_row() {
        tile_begin_ = plan_.tiles.size() / kTileFields;
        run_begin_ = plan_.runs.size() / kRunFields;
    }

    void end_row(const QueryTile& rows) {
        const int32_t row[kRowFields] = {static_cast<int32_t>(rows.first - sizes_.q_offset),
                                         static_cast<int32_t>(rows.count),
                                         static_cast<int32_t>(tile_begin_),
                                         static_cast<int32_t>(plan_.tiles.size() / kTileFields),
                                         static_cast<int32_t>(run_begin_),
                                         static_cast<int32_t>(plan_.runs.size() / kRunFields)};
        plan_.rows.insert(plan_.rows.end(), row, row + kRowFields);
    }

    void plan_class(size_t g, const QueryTile& rows, const KeyClass& keys) {
        const Expr& mask = groups_[g].mask;
        eval_spans(mask, rows, keys, sizing_, {0, keys.size});
        full_first_ = full_end_ = 0;
        const Spans& inner = mask.inner;
        const auto down = [this](i64 key) {
            return block_shift_ >= 0 ? key >> block_shift_ : key / block_k_;
        };
        const auto up = [this, &down](i64 key) { return down(key + block_k_ - 1); };
        size_t next = 0;  // span of mask.inner
        i64 tile = 0;     // tiles below are handled
        for (const Span& outer : mask.outer) {
            tile = std::max(tile, down(outer.lo));
            const i64 end = up(outer.hi);
            while (tile < end) {
                // A tile is full only if one span covers it whole.
                while (next < inner.size() &&
                       (down(inner[next].hi) <= tile || up(inner[next].lo) >= down(inner[next].hi)))
                    ++next;
                const bool found = next < inner.size();
                const i64 full_begin = found ? std::min(end, up(inner[next].lo)) : end;
                border_tiles(g, rows, keys, tile, full_begin);
                tile = std::max(tile, full_begin);
                if (tile < end) {
                    const i64 full_end = std::min(end, down(inner[next].hi));
                    add_full(keys, tile, full_end);
                    tile = full_end;
                }
            }
        }
        flush_full(keys);
    }

    // Border tiles [tile, end) of the class.
    void border_tiles(size_t g, const QueryTile& rows, const KeyClass& keys, i64 tile, i64 end) {
        while (tile < end) {
            const KeyTile key_tile{keys.key(tile * keys.block), keys.step,
                                   std::min(keys.block, keys.size - tile * keys.block)};
            const Bits found = classify(g, rows, key_tile);
            const i64 next = std::min(end, alike_until(g, key_tile, tile));
            if (found.same == PA_BITS_FULL && found.other == PA_BITS_FULL)
                add_full(keys, tile, next);
            else if (found.same != PA_BITS_EMPTY || found.other != PA_BITS_EMPTY)
                for (i64 n = tile; n < next; ++n) add_tile(keys, n, found);
            tile = next;
        }
    }

    // The first tile after `tile` that may be of another class. Where nothing but ids matters, the tiles
    // inside one run of ids are alike: a query tile over two documents has many of those.
    i64 alike_until(size_t g, const KeyTile& keys, i64 tile) const {
        const Expr& mask = groups_[g].mask;
        if (!id_ || mask.segments.get() != id_ || keys.step != 1) return tile + 1;
        const i64 end = id_->k_runs[find_run(id_->k_runs, keys.first)].end;
        return std::max(tile + 1, (end - keys.first) / block_k_ + tile);
    }

    void add_tile(const KeyClass& keys, i64 tile, Bits bits) {
        for (const i64 field : {keys.key(tile * keys.block), keys.step, i64{bits.same}, i64{bits.other}})
            plan_.tiles.push_back(static_cast<int32_t>(field));
    }

    Bits classify(size_t g, const QueryTile& rows, const KeyTile& keys) {
        const Expr& mask = groups_[g].mask;
        const IdRelation relation = id_ ? relate_ids(*id_, rows, keys) : IdRelation::kDifferent;
        signature_.clear();
        signature_.push_back(rows.count);
        signature_.push_back(keys.count);
        signature_.push_back(static_cast<i64>(relation));
        append_signature(mask, rows, keys, sizing_, id_, signature_);
        // Mostly one of the last few classes, which are found without a look-up.
        LastFew& few = last_[g];
        for (const Last& last : few.entries)
            if (equal(signature_, last.signature)) return last.bits;
        Last& last = few.entries[few.next++ % few.entries.size()];
        last.signature = signature_;
        auto found = classes_[g].find(signature_);
        if (found == classes_[g].end())
            found = classes_[g].emplace(signature_, evaluate_class(mask, rows, keys, relation)).first;
        last.bits = found->second;
        return last.bits;
    }

    Bits evaluate_class(const Expr& mask, const QueryTile& rows, const KeyTile& keys, IdRelation relation) {
        Bits out{};
        if (relation != IdRelation::kDifferent) out.same = evaluate(mask, rows, keys, true);
        if (relation != IdRelation::kSame) out.other = evaluate(mask, rows, keys, false);
        if (relation == IdRelation::kSame) out.other = out.same;
        if (relation == IdRelation::kDifferent) out.same = out.other;
        return out;
    }

    int32_t evaluate(const Expr& mask, const QueryTile& rows, const KeyTile& keys, bool id_equal) {
        eval_tile(mask, rows, keys, sizing_, id_, id_equal, matrix_);
        return bits_.add(matrix_, keys.count);
    }

    // Full tiles [begin, end) of the class; neighbours become one run.
    void add_full(const KeyClass& keys, i64 begin, i64 end) {
        if (full_end_ > full_first_ && full_end_ == begin) {
            full_end_ = end;
            return;
        }
        flush_full(keys);
        full_first_ = begin;
        full_end_ = end;
    }

    void flush_full(const KeyClass& keys) {
        if (full_end_ <= full_first_) return;
        const int32_t run[kRunFields] = {
            static_cast<int32_t>(keys.key(full_first_ * keys.block)), static_cast<int32_t>(keys.step),
            static_cast<int32_t>(full_end_ - full_first_), static_cast<int32_t>(keys.step * keys.block)};
        plan_.runs.insert(plan_.runs.end(), run, run + kRunFields);
        full_first_ = full_end_ = 0;
    }

    pa_plan& plan_;
    BitStore& bits_;
    const Sizes sizes_;
    const std::vector<Group> groups_;
    const Segments *id_, *documents_;
    const Sizing sizing_;
    const i64 block_k_;
    const int block_shift_;  // its logarithm, -1 where it has none
    RowRepeat repeat_;
    std::vector<Classes> classes_;
    std::vector<LastFew> last_;
    std::vector<i64> signature_;
    BitMatrix matrix_;
    i64 full_first_ = 0, full_end_ = 0;
    size_t tile_begin_ = 0, run_begin_ = 0;  // of the row that is being planned
};

}  // namespace portattn
