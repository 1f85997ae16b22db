// Signatures and bits of single tiles.
#include <algorithm>

#include "spans.hpp"

namespace portattn {

namespace {

void append_bits(std::vector<i64>& out, const std::vector<bool>& bits) {
    i64 word = 0;
    for (size_t n = 0; n < bits.size(); ++n) {
        word |= static_cast<i64>(bits[n]) << (n % 62);
        if (n % 62 == 61) {
            out.push_back(word);
            word = 0;
        }
    }
    out.push_back(word);
}

// Membership of first + step*n, n in [0, count), in a sorted set.
std::vector<bool> members(const Expr& node, i64 first, i64 step, i64 count) {
    std::vector<bool> bits(static_cast<size_t>(count), false);
    const i64* end = node.positions + node.num_positions;
    const i64 last = first + step * (count - 1);
    for (const i64* at = std::lower_bound(node.positions, end, first); at < end && *at <= last; ++at)
        if ((*at - first) % step == 0) bits[static_cast<size_t>((*at - first) / step)] = true;
    return bits;
}

void random_signature(const Expr& node, const QueryTile& rows, const KeyTile& keys, const Sizing& sizing,
                      std::vector<i64>& out) {
    const i64 n = node.a, num_blocks = ceil_div(sizing.seqlen_k, n);
    const i64 block0 = floor_div(rows.first, n), block1 = floor_div(rows.last(), n);
    const i64 col0 = keys.first / n, col1 = keys.last() / n;
    out.push_back(floor_mod(rows.first, n));
    out.push_back(keys.first % n);
    std::vector<bool> bits;
    std::vector<i64> drawn;
    for (i64 block = block0; block <= block1; ++block) {
        draw_blocks(node.c, block, node.b, num_blocks, drawn);
        for (i64 col = col0; col <= col1; ++col)
            bits.push_back(std::binary_search(drawn.begin(), drawn.end(), col));
    }
    append_bits(out, bits);
}

void table_signature(const Expr& node, const QueryTile& rows, const KeyTile& keys, std::vector<i64>& out) {
    out.push_back(rows.first % node.b);
    out.push_back(keys.first % node.c);
    std::vector<bool> bits;
    for (i64 row = rows.first / node.b; row <= rows.last() / node.b; ++row)
        for (i64 col = keys.first / node.c; col <= keys.last() / node.c; ++col)
            bits.push_back(node.table[row * node.table_cols + col] != 0);
    append_bits(out, bits);
}

// The pattern of ids along rows, then keys, numbered by first appearance.
void segment_signature(const Segments& s, const QueryTile& rows, const KeyTile& keys, std::vector<i64>& out) {
    std::vector<int32_t> seen;
    auto number = [&seen](int32_t id) -> i64 {
        if (id < 0) return id;
        const auto at = std::find(seen.begin(), seen.end(), id);
        if (at != seen.end()) return at - seen.begin();
        seen.push_back(id);
        return static_cast<i64>(seen.size()) - 1;
    };
    auto walk = [&](const std::vector<Segments::Run>& runs, i64 first, i64 step, i64 last) {
        size_t run = find_run(runs, first);
        for (i64 at = first; at <= last;) {
            while (runs[run].end <= at) ++run;
            out.push_back(number(runs[run].id));
            at += ceil_div(runs[run].end - at, step) * step;
            out.push_back(std::min((at - first) / step, (last - first) / step + 1));
        }
    };
    walk(s.q_runs, rows.first, rows.step, rows.last());
    walk(s.k_runs, keys.first, keys.step, keys.last());
}

void set_range(uint64_t* row, i64 lo, i64 hi) {
    for (i64 word = lo >> 6; lo < hi; ++word) {
        const i64 end = std::min(hi, (word + 1) << 6), bits = end - lo;
        row[word] |= (bits == 64 ? ~uint64_t{0} : ((uint64_t{1} << bits) - 1)) << (lo & 63);
        lo = end;
    }
}

// Sets the bits of the keys [lo, hi) (positions).
void set_keys(uint64_t* row, const KeyTile& keys, i64 lo, i64 hi) {
    const i64 last = keys.last();
    lo = std::max(lo, keys.first);
    hi = std::min(hi, last + 1);
    if (lo >= hi) return;
    if (keys.step == 1)
        set_range(row, lo - keys.first, hi - keys.first);
    else
        set_range(row, ceil_div(lo - keys.first, keys.step), ceil_div(hi - keys.first, keys.step));
}

// One row of a leaf, at query position i.
void leaf_row(const Expr& node, i64 i, const KeyTile& keys, const Sizing& sizing, uint64_t* row) {
    switch (node.op) {
        case Op::kAll:
            set_range(row, 0, keys.count);
            return;
        case Op::kBand:
            set_keys(row, keys, bounded(i, node.a), bounded(i + 1, node.b));
            return;
        case Op::kKeyRange:
            set_keys(row, keys, node.a, node.b);
            return;
        case Op::kQueryRange:
            if (node.a <= i && i < node.b) set_range(row, 0, keys.count);
            return;
        case Op::kKeyModulo:
        case Op::kDiffModulo: {
            const i64 m = node.a, sign = node.op == Op::kKeyModulo ? 1 : -1;
            const i64 step = floor_mod(sign * keys.step, m);
            i64 value = floor_mod(node.op == Op::kKeyModulo ? keys.first : i - keys.first, m);
            for (i64 c = 0; c < keys.count; ++c) {
                if (node.b <= value && value < node.c) row[c >> 6] |= uint64_t{1} << (c & 63);
                value += step;
                if (value >= m) value -= m;
            }
            return;
        }
        case Op::kBlockBand: {
            const i64 n = node.a, block = floor_div(i, n);
            const i64 lo = node.b <= kNoLower   ? kNoLower
                           : node.b >= kNoUpper ? kNoUpper
                                                : (block + node.b) * n;
            const i64 hi = node.c <= kNoLower   ? kNoLower
                           : node.c >= kNoUpper ? kNoUpper
                                                : (block + node.c + 1) * n;
            set_keys(row, keys, lo, hi);
            return;
        }
        case Op::kKeySet: {
            const std::vector<bool> in = members(node, keys.first, keys.step, keys.count);
            for (i64 c = 0; c < keys.count; ++c)
                if (in[static_cast<size_t>(c)]) row[c >> 6] |= uint64_t{1} << (c & 63);
            return;
        }
        case Op::kQuerySet:
            if (std::binary_search(node.positions, node.positions + node.num_positions, i))
                set_range(row, 0, keys.count);
            return;
        case Op::kRandomBlocks: {
            thread_local std::vector<i64> drawn;
            draw_blocks(node.c, floor_div(i, node.a), node.b, ceil_div(sizing.seqlen_k, node.a), drawn);
            for (i64 block : drawn) set_keys(row, keys, block * node.a, (block + 1) * node.a);
            return;
        }
        case Op::kBlockTable: {
            const uint8_t* line = node.table + (i / node.b) * node.table_cols;
            for (i64 col = keys.first / node.c; col <= keys.last() / node.c; ++col)
                if (line[col]) set_keys(row, keys, col * node.c, (col + 1) * node.c);
            return;
        }
        case Op::kSegments: {
            const Segments& s = *node.segments;
            const int32_t id = s.q_runs[find_run(s.q_runs, i)].id;
            for (size_t run = find_run(s.k_runs, keys.first);
                 run < s.k_runs.size() && s.k_runs[run].begin <= keys.last(); ++run)
                if (s.k_runs[run].id == id) set_keys(row, keys, s.k_runs[run].begin, s.k_runs[run].end);
            return;
        }
        default:
            return;
    }
}

// Leaves whose rows are equal while block_of(i) is; others change with each row.
bool same_as_before(const Expr& node, i64 i, i64 before) {
    switch (node.op) {
        case Op::kAll:
        case Op::kKeyRange:
        case Op::kKeyModulo:
        case Op::kKeySet:
            return true;
        case Op::kBlockBand:
        case Op::kRandomBlocks:
            return floor_div(i, node.a) == floor_div(before, node.a);
        case Op::kBlockTable:
            return i / node.b == before / node.b;
        case Op::kDiffModulo:
            return (i - before) % node.a == 0;
        default:
            return false;
    }
}

}  // namespace

void append_signature(const Expr& node, const QueryTile& rows, const KeyTile& keys, const Sizing& sizing,
                      const Segments* id, std::vector<i64>& out) {
    const i64 span_q = rows.step * (sizing.block_q - 1), span_k = keys.step * (sizing.block_k - 1);
    const i64 delta = keys.first - rows.first;
    switch (node.op) {
        case Op::kAll:
            return;
        case Op::kBand:
            out.push_back(relative(node.a, delta, -span_q, span_k + 1));
            out.push_back(relative(node.b, delta, -span_q - 1, span_k));
            return;
        case Op::kKeyRange:
            out.push_back(relative(node.a, keys.first, 0, span_k + 1));
            out.push_back(relative(node.b, keys.first, 0, span_k + 1));
            return;
        case Op::kQueryRange:
            out.push_back(relative(node.a, rows.first, 0, span_q + 1));
            out.push_back(relative(node.b, rows.first, 0, span_q + 1));
            return;
        case Op::kKeyModulo:
            out.push_back(keys.first % node.a);
            return;
        case Op::kDiffModulo:
            out.push_back(floor_mod(-delta, node.a));
            return;
        case Op::kBlockBand: {
            const i64 n = node.a, reach = (span_q + span_k) / n + 2;
            const i64 blocks = floor_div(keys.first, n) - floor_div(rows.first, n);
            out.push_back(floor_mod(rows.first, n));
            out.push_back(keys.first % n);
            out.push_back(relative(node.b, blocks, -reach, reach));
            out.push_back(relative(node.c, blocks, -reach, reach));
            return;
        }
        case Op::kKeySet:
            append_bits(out, members(node, keys.first, keys.step, keys.count));
            return;
        case Op::kQuerySet:
            append_bits(out, members(node, rows.first, rows.step, rows.count));
            return;
        case Op::kRandomBlocks:
            random_signature(node, rows, keys, sizing, out);
            return;
        case Op::kBlockTable:
            table_signature(node, rows, keys, out);
            return;
        case Op::kSegments:
            if (node.segments.get() != id) segment_signature(*node.segments, rows, keys, out);
            return;
        default:
            for (const Expr& child : node.children) append_signature(child, rows, keys, sizing, id, out);
    }
}

void eval_tile(const Expr& node, const QueryTile& rows, const KeyTile& keys, const Sizing& sizing,
               const Segments* id, bool id_equal, BitMatrix& out) {
    const i64 words = (keys.count + 63) / 64;
    if (node.is_leaf()) {
        if (node.op == Op::kSegments && node.segments.get() == id) {
            out.reset(rows.count, words, id_equal != node.negated ? ~uint64_t{0} : 0);
            return;
        }
        out.reset(rows.count, words, 0);
        const bool is_same = !node.depends_on_query();
        for (i64 r = 0; r < (is_same ? 1 : rows.count); ++r) {
            const i64 i = rows.first + rows.step * r;
            if (r > 0 && same_as_before(node, i, i - rows.step))
                std::copy_n(out.row(r - 1), words, out.row(r));
            else
                leaf_row(node, i, keys, sizing, out.row(r));
        }
        if (is_same)  // ever more rows at once
            for (i64 r = 1; r < rows.count; r *= 2)
                std::copy_n(out.row(0), words * std::min(r, rows.count - r), out.row(r));
        if (node.negated)
            for (uint64_t& word : out.data) word = ~word;
        return;
    }
    BitMatrix other;
    bool first = true;
    for (const Expr& child : node.children) {
        if (first) {
            eval_tile(child, rows, keys, sizing, id, id_equal, out);
            first = false;
            continue;
        }
        eval_tile(child, rows, keys, sizing, id, id_equal, other);
        for (size_t n = 0; n < out.data.size(); ++n)
            out.data[n] = node.op == Op::kAnd ? out.data[n] & other.data[n] : out.data[n] | other.data[n];
    }
}

IdRelation relate_ids(const Segments& s, const QueryTile& rows, const KeyTile& keys) {
    const size_t q0 = find_run(s.q_runs, rows.first), k0 = find_run(s.k_runs, keys.first);
    if (s.q_runs[q0].end > rows.last() && s.k_runs[k0].end > keys.last())
        return s.q_runs[q0].id == s.k_runs[k0].id ? IdRelation::kSame : IdRelation::kDifferent;
    for (size_t k = k0; k < s.k_runs.size() && s.k_runs[k].begin <= keys.last(); ++k)
        for (size_t q = q0; q < s.q_runs.size() && s.q_runs[q].begin <= rows.last(); ++q)
            if (s.q_runs[q].id == s.k_runs[k].id) return IdRelation::kMixed;
    return IdRelation::kDifferent;
}

}  // namespace portattn
