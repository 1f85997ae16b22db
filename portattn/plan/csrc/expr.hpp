// Mask expressions: the program of docs/formats.md as a tree, and its resolution for one (batch, head).
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "portattn.h"

namespace portattn {

using i64 = int64_t;

constexpr i64 kNoLower = -(i64{1} << 62);
constexpr i64 kNoUpper = i64{1} << 62;

// Thrown anywhere in the planner; the ABI boundary turns it into a message.
struct PlanError {
    std::string message;
};

// Most divisors are steps of 1, and a division costs tens of cycles.
inline i64 floor_div(i64 a, i64 b) { return b == 1 ? a : a / b - ((a % b != 0) && ((a < 0) != (b < 0))); }
inline i64 floor_mod(i64 a, i64 b) { return a - floor_div(a, b) * b; }
inline i64 ceil_div(i64 a, i64 b) { return -floor_div(-a, b); }

enum class Op : int {
    kAll = 0,
    kBand = 1,
    kKeyRange = 2,
    kQueryRange = 3,
    kKeyModulo = 4,
    kDiffModulo = 5,
    kBlockBand = 6,
    kKeySet = 7,
    kQuerySet = 8,
    kRandomBlocks = 9,
    kBlockTable = 10,
    kSegments = 11,
    kKeyLengths = 12,
    kAnd = 13,
    kOr = 14,
    kNot = 15,
    kPerHead = 16,
    kPerBatch = 17,
    kDocuments = 18,
};

// A half-open interval.
struct Span {
    i64 lo, hi;
};
using Spans = std::vector<Span>;

// Maximal runs of equal ids along the rows and keys of one Segments leaf, renumbered.
// An id that the other side lacks is -1 (queries) or -2 (keys).
struct Segments {
    struct Run {
        i64 begin, end;
        int32_t id;
    };
    i64 q_first = 0;              // position of q_runs.front().begin
    std::vector<Run> q_runs;      // over query positions [q_offset, q_offset + seqlen_q)
    std::vector<Run> k_runs;      // over keys [0, seqlen_k)
    std::vector<int32_t> id_ptr;  // CSR: key runs of each id
    std::vector<int32_t> id_runs;

    // The numbers of the key runs of an id >= 0, in order.
    std::pair<const int32_t*, const int32_t*> runs_of(int32_t id) const {
        const auto at = static_cast<size_t>(id);
        return {id_runs.data() + id_ptr[at], id_runs.data() + id_ptr[at + 1]};
    }
    const Run& k_run(int32_t number) const { return k_runs[static_cast<size_t>(number)]; }
};

// One node. Leaves carry their operands; And/Or carry children. Not is pushed into `negated` when resolved.
struct Expr {
    Op op = Op::kAll;
    bool negated = false;
    i64 a = 0, b = 0, c = 0;             // operands in the program's order
    const int64_t* positions = nullptr;  // KeySet, QuerySet: sorted
    i64 num_positions = 0;
    const uint8_t* table = nullptr;  // BlockTable: [table_rows, table_cols] of this batch and head
    i64 table_rows = 0, table_cols = 0;
    std::shared_ptr<const Segments> segments;
    std::vector<Expr> children;
    // Scratch of the span evaluation, reused from row to row.
    mutable Spans outer, inner;

    bool is_leaf() const { return op != Op::kAnd && op != Op::kOr; }
    bool depends_on_query() const;
};

// What the sizes of the call are, as the leaves need them.
struct Sizes {
    i64 batch, num_heads, seqlen_q, seqlen_k, q_offset;
};

// A parsed program: the tree with PER_HEAD, PER_BATCH and NOT still in it.
class Program {
  public:
    Program(const int64_t* code, i64 length, const pa_array* arrays, i64 num_arrays, const Sizes& sizes);

    bool depends_on_batch() const { return depends_on_batch_; }
    bool depends_on_head() const { return depends_on_head_; }
    // The tree of (batch, head) in negation normal form, with data bound.
    Expr resolve(i64 batch, i64 head) const;
    // Two (batch, head) with equal fingerprints have the same tree.
    std::vector<i64> fingerprint(i64 batch, i64 head) const;

  private:
    Expr parse(i64& at, int depth);
    void check_data(const Expr& node);
    void check_set(const Expr& node) const;
    void check_table(const Expr& node);
    void check_segments(const Expr& node);
    void check_documents(const Expr& node) const;
    void check_lengths(const Expr& node);
    Expr bind(const Expr& node, i64 batch, i64 head, bool negate) const;
    Expr bind_leaf(const Expr& node, i64 batch, i64 head) const;
    void fingerprint_node(const Expr& node, i64 batch, i64 head, std::vector<i64>& out) const;
    const pa_array& array(i64 slot, const char* what) const;

    const int64_t* code_;
    i64 length_;
    const pa_array* arrays_;
    i64 num_arrays_;
    Sizes sizes_;
    Expr root_;
    i64 num_nodes_ = 0;
    bool depends_on_batch_ = false, depends_on_head_ = false;
    // Segments are analysed once per (slots, batch) and shared between heads.
    struct SegmentsEntry {
        i64 slot_q, slot_k, batch;
        std::shared_ptr<const Segments> segments;
    };
    mutable std::vector<SegmentsEntry> segments_;
};

Expr negate(const Expr& node);

// The first Segments of an expression, or null.
inline std::shared_ptr<const Segments> find_segments(const Expr& node) {
    if (node.op == Op::kSegments) return node.segments;
    for (const Expr& child : node.children)
        if (auto found = find_segments(child)) return found;
    return nullptr;
}

// segments.cpp
std::shared_ptr<const Segments> make_segments(const int32_t* q_ids, const int32_t* k_ids, i64 q_offset,
                                              i64 seqlen_q, i64 seqlen_k);
// Ids that are the documents between rising bounds, from 0.
std::shared_ptr<const Segments> make_documents(const int64_t* bounds, i64 num_bounds, i64 q_offset,
                                               i64 seqlen_q, i64 seqlen_k);
// Both must be equal: the Segments of the pairs of ids.
std::shared_ptr<const Segments> intersect_segments(const Segments& x, const Segments& y);
// Index of the run that holds `position`.
inline size_t find_run(const std::vector<Segments::Run>& runs, i64 position) {
    size_t found = 0;
    for (size_t count = runs.size(); count > 1;) {
        const size_t half = count / 2;
        found += runs[found + half].begin <= position ? half : 0;
        count -= half;
    }
    return found;
}
// Adds the ids and layout_ids of a plan whose tiles are there; `layouts` has each layout's Segments or null.
// Ids are only read by id tiles: without those, no layout has any.
void add_ids(pa_plan& plan, const std::vector<std::shared_ptr<const Segments>>& layouts);

}  // namespace portattn
