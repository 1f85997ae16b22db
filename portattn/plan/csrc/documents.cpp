#include "documents.hpp"

namespace portattn {

namespace {

bool is_ids(const Expr& node) { return node.op == Op::kSegments && !node.negated; }

// What tiles cost: visited tiles, and about one more for each query tile.
struct Cost {
    i64 aligned = 0, on_grid = 0;
};

// Of all rows and keys that share ids. On the grid, neighbouring documents share a tile at their border.
Cost compare(const Segments& ids, i64 q_offset, i64 block_q, i64 block_k) {
    Cost cost;
    const auto touched = [](i64 begin, i64 end, i64 block) {
        return ceil_div(end, block) - floor_div(begin, block);
    };
    for (const Segments::Run& rows : ids.q_runs) {
        const i64 aligned_rows = ceil_div(rows.end - rows.begin, block_q);
        const i64 grid_rows = touched(rows.begin - q_offset, rows.end - q_offset, block_q);
        const bool shares_row = floor_mod(rows.begin - q_offset, block_q) != 0;
        cost.aligned += aligned_rows;
        cost.on_grid += grid_rows - shares_row;
        if (rows.id < 0) continue;
        for (auto [n, end] = ids.runs_of(rows.id); n != end; ++n) {
            const Segments::Run& keys = ids.k_run(*n);
            cost.aligned += aligned_rows * ceil_div(keys.end - keys.begin, block_k);
            cost.on_grid += grid_rows * touched(keys.begin, keys.end, block_k) -
                            (shares_row && keys.begin % block_k != 0);
        }
    }
    return cost;
}

}  // namespace

std::shared_ptr<const Segments> find_documents(const std::vector<Group>& groups, const Sizes& sizes,
                                               i64 block_q, i64 block_k) {
    if (groups.size() != 1 || groups[0].kind != Group::Kind::kContiguous) return nullptr;
    const Expr& mask = groups[0].mask;
    std::shared_ptr<const Segments> ids;
    if (is_ids(mask)) ids = mask.segments;
    if (mask.op == Op::kAnd)
        for (const Expr& child : mask.children)
            if (is_ids(child)) ids = child.segments;
    // The bounds keep what is compared below small where ids change all the time.
    if (!ids || static_cast<i64>(ids->q_runs.size()) > ceil_div(sizes.seqlen_q, block_q) ||
        static_cast<i64>(ids->k_runs.size()) > ceil_div(sizes.seqlen_k, block_k))
        return nullptr;
    const Cost cost = compare(*ids, sizes.q_offset, block_q, block_k);
    // A query tile of two documents compares ids in all of its tiles, which takes longer.
    return cost.aligned <= cost.on_grid + cost.on_grid / 8 ? ids : nullptr;
}

Expr inside_documents(const Expr& mask, const Segments* documents) {
    Expr out;
    if (is_ids(mask)) return out;
    out.op = Op::kAnd;
    for (const Expr& child : mask.children)
        if (!is_ids(child) || child.segments.get() != documents) out.children.push_back(child);
    return out.children.size() == 1 ? Expr(out.children[0]) : out;
}

}  // namespace portattn
