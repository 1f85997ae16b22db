// Lists of sorted, disjoint, half-open spans in class coordinates.
#pragma once
#include <algorithm>

#include "leaves.hpp"

namespace portattn {

// Saturating "bound - base": no-bound markers stay at the ends of the clamp.
inline i64 relative(i64 bound, i64 base, i64 lo, i64 hi) {
    if (bound <= kNoLower) return lo;
    if (bound >= kNoUpper) return hi;
    return std::clamp(bound - base, lo, hi);
}

// Appends the keys [lo, hi) to spans in class coordinates, clipped; merges with the last span if they touch.
inline void push(Spans& out, const KeyClass& keys, Span clip, i64 lo, i64 hi) {
    if (lo >= hi) return;
    i64 a = keys.step == 1 ? lo - keys.residue : ceil_div(lo - keys.residue, keys.step);
    i64 b = keys.step == 1 ? hi - keys.residue : ceil_div(hi - keys.residue, keys.step);
    a = std::max(a, clip.lo);
    b = std::min(b, clip.hi);
    if (a >= b) return;
    if (!out.empty() && a <= out.back().hi)
        out.back().hi = std::max(out.back().hi, b);
    else
        out.push_back({a, b});
}

inline i64 bounded(i64 base, i64 bound) {
    if (bound <= kNoLower) return kNoLower;
    if (bound >= kNoUpper) return kNoUpper;
    return base + bound;
}

inline void intersect(const Spans& x, const Spans& y, Spans& out) {
    out.clear();
    for (size_t a = 0, b = 0; a < x.size() && b < y.size();) {
        const i64 lo = std::max(x[a].lo, y[b].lo), hi = std::min(x[a].hi, y[b].hi);
        if (lo < hi) out.push_back({lo, hi});
        if (x[a].hi < y[b].hi)
            ++a;
        else
            ++b;
    }
}

inline void unite(const Spans& x, const Spans& y, Spans& out) {
    out.clear();
    size_t a = 0, b = 0;
    while (a < x.size() || b < y.size()) {
        const Span next = b >= y.size() || (a < x.size() && x[a].lo <= y[b].lo) ? x[a++] : y[b++];
        if (!out.empty() && next.lo <= out.back().hi)
            out.back().hi = std::max(out.back().hi, next.hi);
        else
            out.push_back(next);
    }
}

inline void complement(const Spans& x, Span clip, Spans& out) {
    out.clear();
    i64 at = clip.lo;
    for (const Span& span : x) {
        if (span.lo > at) out.push_back({at, span.lo});
        at = std::max(at, span.hi);
    }
    if (at < clip.hi) out.push_back({at, clip.hi});
}

// Keys j with j mod m in [lo, hi) shifted anywhere; the period must be worth listing, else everything or
// nothing.
inline void push_periodic(Spans& out, const KeyClass& keys, Span clip, i64 m, i64 lo, i64 hi, bool some) {
    if (lo >= hi) return;
    if (hi - lo >= m) {
        out.push_back(clip);
        return;
    }
    if (keys.step % m == 0) {
        if (floor_mod(keys.residue - lo, m) < hi - lo) out.push_back(clip);
        return;
    }
    // Below one span a tile nothing would be gained by listing them.
    if (m < keys.block * keys.step) {
        if (some) out.push_back(clip);
        return;
    }
    const i64 first = keys.key(clip.lo), last = keys.key(clip.hi - 1);
    for (i64 start = lo + m * floor_div(first - hi + 1, m); start <= last; start += m)
        push(out, keys, clip, start, start + (hi - lo));
}

}  // namespace portattn
