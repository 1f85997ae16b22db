#include "parts.hpp"

#include <algorithm>

namespace portattn {

namespace {

constexpr size_t kMaxParts = 16;
// A class's tiles must stay addressable in int32 and be clearly fewer than the contiguous ones.
constexpr i64 kMaxStepSpan = i64{1} << 30;
constexpr double kWorthStepping = 0.7;

bool is_modulo(const Expr& node) {
    return !node.negated && (node.op == Op::kKeyModulo || node.op == Op::kDiffModulo);
}

bool contains_modulo(const Expr& node) {
    if (node.is_leaf()) return is_modulo(node);
    return std::any_of(node.children.begin(), node.children.end(), contains_modulo);
}

Expr conjunction(const Expr& x, const Expr& y) {
    Expr out;
    out.op = Op::kAnd;
    for (const Expr* side : {&x, &y}) {
        if (side->op == Op::kAnd)
            out.children.insert(out.children.end(), side->children.begin(), side->children.end());
        else
            out.children.push_back(*side);
    }
    return out;
}

// The mask as a union of parts. Or is pulled out of And only where that frees a modulus.
std::vector<Expr> to_parts(const Expr& node) {
    if (node.op == Op::kOr) {
        std::vector<Expr> out;
        for (const Expr& child : node.children)
            for (Expr& part : to_parts(child)) out.push_back(std::move(part));
        return out.size() <= kMaxParts ? out : std::vector<Expr>{node};
    }
    if (node.op == Op::kAnd) {
        for (size_t n = 0; n < node.children.size(); ++n) {
            const Expr& child = node.children[n];
            if (child.op != Op::kOr || !contains_modulo(child)) continue;
            Expr rest;
            rest.op = Op::kAnd;
            for (size_t k = 0; k < node.children.size(); ++k)
                if (k != n) rest.children.push_back(node.children[k]);
            std::vector<Expr> out;
            for (const Expr& option : child.children)
                for (Expr& part : to_parts(conjunction(rest, option))) out.push_back(std::move(part));
            return out.size() <= kMaxParts ? out : std::vector<Expr>{node};
        }
    }
    return {node};
}

// Keys that a row may see by the part's bands alone.
i64 band_width(const Expr& part, i64 seqlen_k) {
    i64 width = seqlen_k;
    auto narrow = [&width](const Expr& leaf) {
        if (leaf.op == Op::kBand && !leaf.negated && leaf.a > kNoLower && leaf.b < kNoUpper)
            width = std::min(width, std::max<i64>(leaf.b - leaf.a + 1, 1));
    };
    if (part.op == Op::kAnd)
        for (const Expr& child : part.children) narrow(child);
    else
        narrow(part);
    return width;
}

// Tiles visited, as an estimate that compares ways to plan the same part.
double tiles(const Sizes& sizes, i64 block_q, i64 block_k, i64 width, i64 row_step, i64 key_step,
             i64 num_residues) {
    const i64 steps = std::min(row_step, sizes.seqlen_q);
    const i64 row_tiles = steps * ceil_div(ceil_div(sizes.seqlen_q, row_step), block_q);
    const i64 reach = ceil_div(width + block_q * row_step, key_step * block_k) + 1;
    const i64 row = std::min(ceil_div(ceil_div(sizes.seqlen_k, key_step), block_k), reach);
    return static_cast<double>(row_tiles) * static_cast<double>(row) * static_cast<double>(num_residues);
}

// The modulus leaf that makes the part cheapest, or null if it is best planned contiguously.
const Expr* best_modulo(const Expr& part, const Sizes& sizes, i64 block_q, i64 block_k) {
    const i64 width = band_width(part, sizes.seqlen_k);
    double best = kWorthStepping * tiles(sizes, block_q, block_k, width, 1, 1, 1);
    const Expr* found = nullptr;
    auto consider = [&](const Expr& leaf) {
        if (!is_modulo(leaf) || leaf.a * std::max(block_q, block_k) >= kMaxStepSpan) return;
        const i64 row_step = leaf.op == Op::kDiffModulo ? leaf.a : 1;
        const double cost = tiles(sizes, block_q, block_k, width, row_step, leaf.a, leaf.c - leaf.b);
        if (cost < best) {
            best = cost;
            found = &leaf;
        }
    };
    if (part.op == Op::kAnd)
        for (const Expr& child : part.children) consider(child);
    else
        consider(part);
    return found;
}

void add_part(std::vector<Group>& groups, const Expr& part, const Expr* modulo) {
    Group::Kind kind = Group::Kind::kContiguous;
    if (modulo) kind = modulo->op == Op::kKeyModulo ? Group::Kind::kKeyModulo : Group::Kind::kDiffModulo;
    const i64 modulus = modulo ? modulo->a : 1;
    Group* group = nullptr;
    for (Group& candidate : groups)
        if (candidate.kind == kind && candidate.modulus == modulus) group = &candidate;
    if (!group) {
        groups.push_back({});
        group = &groups.back();
        group->kind = kind;
        group->modulus = modulus;
        group->mask.op = Op::kOr;
    }
    group->mask.children.push_back(part);
    group->depends_on_query |= part.depends_on_query();
    if (modulo) {
        for (i64 residue = modulo->b; residue < modulo->c; ++residue) group->residues.push_back(residue);
        std::sort(group->residues.begin(), group->residues.end());
        group->residues.erase(std::unique(group->residues.begin(), group->residues.end()),
                              group->residues.end());
    } else {
        group->residues = {0};
    }
}

}  // namespace

std::vector<Group> split(const Expr& mask, const Sizes& sizes, i64 block_q, i64 block_k) {
    std::vector<Group> groups;
    for (const Expr& part : to_parts(mask))
        add_part(groups, part, best_modulo(part, sizes, block_q, block_k));
    // Contiguous tiles take pairs first: their tiles then stay full, and the stepped ones get the holes.
    std::stable_sort(groups.begin(), groups.end(),
                     [](const Group& x, const Group& y) { return x.kind < y.kind; });
    i64 own_step = 1;
    bool needs_step_one = false;
    for (Group& group : groups) {
        if (group.kind == Group::Kind::kDiffModulo) {
            group.row_step = group.modulus;
            own_step = own_step == 1 ? group.modulus : own_step;
        } else {
            needs_step_one |= group.depends_on_query;
        }
    }
    // What does not depend on the query joins a pass that is there anyway.
    if (!needs_step_one)
        for (Group& group : groups)
            if (group.kind != Group::Kind::kDiffModulo) group.row_step = own_step;
    std::vector<Expr> earlier;
    for (Group& group : groups) {
        const Expr own = group.mask.children.size() == 1 ? Expr(group.mask.children[0]) : group.mask;
        Expr exclusive = own;
        for (const Expr& before : earlier) exclusive = conjunction(exclusive, negate(before));
        earlier.push_back(own);
        group.mask = std::move(exclusive);
    }
    return groups;
}

}  // namespace portattn
