// Spans of keys per leaf, in closed form, for one query tile.
#include "leaves.hpp"

#include <algorithm>
#include <iterator>

#include "spans.hpp"

namespace portattn {

namespace {

void set_spans(const Expr& node, const KeyClass& keys, Span clip, Spans& out) {
    const i64* end = node.positions + node.num_positions;
    const i64 last = keys.key(clip.hi - 1);
    for (const i64* at = std::lower_bound(node.positions, end, keys.key(clip.lo)); at < end && *at <= last;
         ++at)
        if (keys.step == 1 || floor_mod(*at - keys.residue, keys.step) == 0)
            push(out, keys, clip, *at, *at + 1);
}

void count_rows(const Expr& node, const QueryTile& rows, bool& some, bool& all) {
    const i64* end = node.positions + node.num_positions;
    i64 found = 0;
    for (const i64* at = std::lower_bound(node.positions, end, rows.first); at < end && *at <= rows.last();
         ++at)
        found += rows.step == 1 || (*at - rows.first) % rows.step == 0;
    some = found > 0;
    all = found == rows.count;
}

void range_rows(const Expr& node, const QueryTile& rows, bool& some, bool& all) {
    const i64 lo = std::max<i64>(0, ceil_div(std::max(node.a, rows.first) - rows.first, rows.step));
    const i64 hi = std::min(rows.count, ceil_div(std::min(node.b, rows.last() + 1) - rows.first, rows.step));
    some = lo < hi;
    all = lo == 0 && hi == rows.count;
}

void random_spans(const Expr& node, const QueryTile& rows, const KeyClass& keys, const Sizing& sizing,
                  Span clip) {
    const i64 n = node.a, num_blocks = ceil_div(sizing.seqlen_k, n);
    thread_local std::vector<i64> drawn, any, every, merged;
    any.clear();
    bool first = true;
    i64 before = 0;
    for (i64 r = 0; r < rows.count; ++r) {
        const i64 block = floor_div(rows.first + rows.step * r, n);
        if (!first && block == before) continue;
        before = block;
        draw_blocks(node.c, block, node.b, num_blocks, drawn);
        merged.clear();
        std::set_union(any.begin(), any.end(), drawn.begin(), drawn.end(), std::back_inserter(merged));
        any.swap(merged);
        if (first) {
            every = drawn;
        } else {
            merged.clear();
            std::set_intersection(every.begin(), every.end(), drawn.begin(), drawn.end(),
                                  std::back_inserter(merged));
            every.swap(merged);
        }
        first = false;
    }
    for (i64 block : any) push(node.outer, keys, clip, block * n, (block + 1) * n);
    for (i64 block : every) push(node.inner, keys, clip, block * n, (block + 1) * n);
}

void table_spans(const Expr& node, const QueryTile& rows, const KeyClass& keys, Span clip) {
    const i64 col0 = keys.key(clip.lo) / node.c, col1 = keys.key(clip.hi - 1) / node.c + 1;
    thread_local std::vector<uint8_t> any, every;
    any.assign(static_cast<size_t>(col1 - col0), 0);
    every.assign(static_cast<size_t>(col1 - col0), 1);
    i64 before = -1;
    for (i64 r = 0; r < rows.count; ++r) {
        const i64 row = (rows.first + rows.step * r) / node.b;
        if (row == before) continue;
        before = row;
        const uint8_t* line = node.table + row * node.table_cols + col0;
        for (i64 n = 0; n < col1 - col0; ++n) {
            const uint8_t bit = line[n] != 0;
            any[static_cast<size_t>(n)] |= bit;
            every[static_cast<size_t>(n)] &= bit;
        }
    }
    for (i64 n = 0; n < col1 - col0; ++n) {
        const i64 lo = (col0 + n) * node.c;
        if (any[static_cast<size_t>(n)]) push(node.outer, keys, clip, lo, lo + node.c);
        if (every[static_cast<size_t>(n)]) push(node.inner, keys, clip, lo, lo + node.c);
    }
}

void segment_spans(const Expr& node, const QueryTile& rows, const KeyClass& keys, Span clip) {
    const Segments& s = *node.segments;
    bool unmatched = false;
    size_t run = find_run(s.q_runs, rows.first);
    if (rows.last() < s.q_runs[run].end) {
        if (s.q_runs[run].id < 0) return;
        for (auto [n, end] = s.runs_of(s.q_runs[run].id); n != end; ++n)
            push(node.outer, keys, clip, s.k_run(*n).begin, s.k_run(*n).end);
        node.inner = node.outer;
        return;
    }
    thread_local std::vector<int32_t> ids;
    ids.clear();
    for (i64 at = rows.first; at <= rows.last();) {
        while (s.q_runs[run].end <= at) ++run;
        const int32_t id = s.q_runs[run].id;
        if (id < 0)
            unmatched = true;
        else if (ids.empty() || ids.back() != id)
            ids.push_back(id);
        at += ceil_div(s.q_runs[run].end - at, rows.step) * rows.step;
    }
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
    thread_local std::vector<int32_t> runs;
    runs.clear();
    for (int32_t id : ids)
        runs.insert(runs.end(), s.id_runs.begin() + s.id_ptr[static_cast<size_t>(id)],
                    s.id_runs.begin() + s.id_ptr[static_cast<size_t>(id) + 1]);
    std::sort(runs.begin(), runs.end());
    for (int32_t n : runs)
        push(node.outer, keys, clip, s.k_runs[static_cast<size_t>(n)].begin,
             s.k_runs[static_cast<size_t>(n)].end);
    if (ids.size() == 1 && !unmatched) node.inner = node.outer;
}

void leaf_spans(const Expr& node, const QueryTile& rows, const KeyClass& keys, const Sizing& sizing,
                Span clip) {
    const i64 first = rows.first, last = rows.last();
    bool some = false, all = false;
    switch (node.op) {
        case Op::kAll:
            some = all = true;
            break;
        case Op::kBand:
            push(node.outer, keys, clip, bounded(first, node.a), bounded(last + 1, node.b));
            push(node.inner, keys, clip, bounded(last, node.a), bounded(first + 1, node.b));
            return;
        case Op::kKeyRange:
            push(node.outer, keys, clip, node.a, node.b);
            node.inner = node.outer;
            return;
        case Op::kQueryRange:
            range_rows(node, rows, some, all);
            break;
        case Op::kKeyModulo:
            push_periodic(node.outer, keys, clip, node.a, node.b, node.c, true);
            push_periodic(node.inner, keys, clip, node.a, node.b, node.c, false);
            return;
        case Op::kDiffModulo: {
            // (i - j) mod m in [a, b): j in (i - b, i - a]. Rows that step by the modulus act as one row.
            const i64 spread = rows.step % node.a == 0 ? 0 : last - first;
            push_periodic(node.outer, keys, clip, node.a, first - node.c + 1, first + spread - node.b + 1,
                          true);
            push_periodic(node.inner, keys, clip, node.a, first + spread - node.c + 1, first - node.b + 1,
                          false);
            return;
        }
        case Op::kBlockBand: {
            const i64 n = node.a, block0 = floor_div(first, n), block1 = floor_div(last, n);
            auto edge = [n](i64 block, i64 bound, i64 extra) {
                return bound <= kNoLower   ? kNoLower
                       : bound >= kNoUpper ? kNoUpper
                                           : (block + bound + extra) * n;
            };
            push(node.outer, keys, clip, edge(block0, node.b, 0), edge(block1, node.c, 1));
            push(node.inner, keys, clip, edge(block1, node.b, 0), edge(block0, node.c, 1));
            return;
        }
        case Op::kKeySet:
            set_spans(node, keys, clip, node.outer);
            node.inner = node.outer;
            return;
        case Op::kQuerySet:
            count_rows(node, rows, some, all);
            break;
        case Op::kRandomBlocks:
            random_spans(node, rows, keys, sizing, clip);
            return;
        case Op::kBlockTable:
            table_spans(node, rows, keys, clip);
            return;
        case Op::kSegments:
            segment_spans(node, rows, keys, clip);
            return;
        default:
            return;
    }
    if (some) node.outer.push_back(clip);
    if (all) node.inner.push_back(clip);
}

}  // namespace

void eval_spans(const Expr& node, const QueryTile& rows, const KeyClass& keys, const Sizing& sizing,
                Span clip) {
    node.outer.clear();
    node.inner.clear();
    if (clip.lo >= clip.hi) return;
    thread_local Spans scratch;
    if (node.is_leaf()) {
        leaf_spans(node, rows, keys, sizing, clip);
        if (node.negated) {
            Spans outer;
            complement(node.inner, clip, outer);
            complement(node.outer, clip, scratch);
            node.inner.swap(scratch);
            node.outer.swap(outer);
        }
        return;
    }
    const bool is_and = node.op == Op::kAnd;
    bool first = true;
    for (const Expr& child : node.children) {
        eval_spans(child, rows, keys, sizing, clip);
        if (first) {
            node.outer = child.outer;
            node.inner = child.inner;
        } else {
            (is_and ? intersect : unite)(node.outer, child.outer, scratch);
            node.outer.swap(scratch);
            (is_and ? intersect : unite)(node.inner, child.inner, scratch);
            node.inner.swap(scratch);
        }
        first = false;
        if (is_and) {
            if (node.outer.empty()) {
                node.inner.clear();
                return;
            }
            // The next children only matter inside what is left.
            clip = {node.outer.front().lo, node.outer.back().hi};
        }
    }
}

void draw_blocks(i64 seed, i64 block, i64 count, i64 num_blocks, std::vector<i64>& out) {
    auto mix = [](uint64_t x) {
        x ^= x >> 30;
        x *= 0xBF58476D1CE4E5B9ULL;
        x ^= x >> 27;
        x *= 0x94D049BB133111EBULL;
        return x ^ (x >> 31);
    };
    out.clear();
    const uint64_t state =
        mix(mix(static_cast<uint64_t>(seed) + 0x9E3779B97F4A7C15ULL) + static_cast<uint64_t>(block));
    for (i64 t = std::max<i64>(0, num_blocks - count); t < num_blocks; ++t) {
        const i64 r = static_cast<i64>(mix(state + static_cast<uint64_t>(t)) % static_cast<uint64_t>(t + 1));
        const auto at = std::lower_bound(out.begin(), out.end(), r);
        if (at != out.end() && *at == r)
            out.push_back(t);  // t is larger than all drawn before it
        else
            out.insert(at, r);
    }
}

}  // namespace portattn
