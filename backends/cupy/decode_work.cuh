// Which strips of keys a block works on. The host knows capacities only; lengths and masks become strips
// here, and every block takes an equal share of all strips that exist, whatever the lengths are.
//
// A line is one batch element and one block of rows; a row of work is a line of one KV head. All strips lie
// on one axis: line after line, in a line head after head. Block w of n takes the strips [T w / n, T (w + 1)
// / n) of T, so that it has at most two rows of work that it shares with other blocks: its first and its
// last.
#pragma once

#include "decode_config.cuh"
#include "decode_params.cuh"

namespace portattn {

struct Keys {
    int begin, end;
};

// Keys that the query at a position may attend to, of `count` keys that exist.
PA_DEVICE Keys visible_keys(const Params& p, int64 position, int count) {
    int64 begin = position + p.mask_lo;
    int64 end = position + p.mask_hi + 1;
    begin = begin < p.mask_begin ? p.mask_begin : begin;
    end = end > p.mask_end ? p.mask_end : end;
    end = end > count ? count : end;
    begin = begin < 0 ? 0 : begin > count ? count : begin;
    return Keys{static_cast<int>(begin), static_cast<int>(end < begin ? begin : end)};
}

struct Line {
    int batch, row_block;
    int count;       // keys that exist
    int64 position;  // of query 0
    Keys keys;       // that any of its rows attends to
    int strips;      // at least 1, so that each row of work has a block, which stores its output
};

PA_DEVICE int first_query(const Params& p, const Line& line) {
    return line.row_block * kBlockQ / p.group_size;
}

PA_DEVICE int last_query(const Params& p, const Line& line) {
    return (min_int((line.row_block + 1) * kBlockQ, p.group_size * p.seqlen_q) - 1) / p.group_size;
}

PA_DEVICE Line find_line(const Params& p, int index) {
    Line line;
    line.batch = index / p.row_blocks;
    line.row_block = index - line.batch * p.row_blocks;
    line.count = p.seqlen_k;
    line.position = p.q_offset;
    if (p.kv_lengths != nullptr) {
        const int length = load_int(p.kv_lengths + static_cast<int64>(line.batch) * p.length_stride);
        line.position = static_cast<int64>(length) - p.seqlen_q;
        line.count = min_int(max_int(length, 0), p.seqlen_k);
    }
    // Both bounds grow with the position.
    line.keys.begin = visible_keys(p, line.position + first_query(p, line), line.count).begin;
    line.keys.end = visible_keys(p, line.position + last_query(p, line), line.count).end;
    line.keys.end = max_int(line.keys.begin, line.keys.end);
    line.strips = max_int(divide_up(line.keys.end - line.keys.begin, kBlockK), 1);
    return line;
}

struct Share {
    int total, workers;  // strips, and blocks that have some
    int begin, end;      // of this block
    int line;            // where it begins
    int line_first;      // first strip of that line

    // First strip of a block, and the block that a strip belongs to.
    PA_DEVICE int first_strip(int worker) const {
        return static_cast<int>(static_cast<int64>(total) * worker / workers);
    }
    PA_DEVICE int owner(int strip) const {
        return static_cast<int>((static_cast<int64>(strip + 1) * workers - 1) / total);
    }
};

// Sums of lines: one a thread, then sixteen of those, which every thread adds up.
PA_DEVICE Share find_share(const Params& p, int worker, uint32 scratch) {
    constexpr int kPerGroup = kThreads / 16;
    const uint32 group_sums = scratch + 4 * kThreads;
    const int lines = p.batch * p.row_blocks;
    const int chunk = divide_up(lines, kThreads);
    const int thread = thread_index();
    int sum = 0;
    for (int n = thread * chunk; n < min_int((thread + 1) * chunk, lines); ++n) sum += find_line(p, n).strips;
    shared_store_int(scratch + 4 * thread, sum);
    block_barrier();
    if (thread < 16) {
        sum = 0;
        PA_UNROLL
        for (int n = 0; n < kPerGroup; ++n) sum += shared_load_int(scratch + 4 * (thread * kPerGroup + n));
        shared_store_int(group_sums + 4 * thread, sum);
    }
    block_barrier();
    Share share;
    share.total = 0;
    PA_UNROLL
    for (int n = 0; n < 16; ++n) share.total += shared_load_int(group_sums + 4 * n);
    share.total *= p.num_kv_heads;
    share.workers = max_int(min_int(divide_up(share.total, p.min_piece), p.num_workers), 1);
    share.begin = share.end = 0;
    share.line = share.line_first = 0;
    if (worker >= share.workers) return share;
    share.begin = share.first_strip(worker);
    share.end = share.first_strip(worker + 1);
    const int target = share.begin / p.num_kv_heads;  // in strips of one head
    int before = 0;
    int group = 0;
    for (int n; before + (n = shared_load_int(group_sums + 4 * group)) <= target; ++group) before += n;
    int slot = group * kPerGroup;
    for (int n; before + (n = shared_load_int(scratch + 4 * slot)) <= target; ++slot) before += n;
    int line = slot * chunk;
    for (int n; before + (n = find_line(p, line).strips) <= target; ++line) before += n;
    share.line = line;
    share.line_first = before * p.num_kv_heads;
    return share;
}

// Walks the rows of work of a share.
struct Cursor {
    Line line;
    int index, head;  // line and KV head
    int first;        // strip of the row where this block's part begins
    int count;        // strips of the part; 0 past the end of the share
    int left;         // strips of the share from `first` on

    PA_DEVICE Cursor(const Params& p, const Share& share) : line{}, index(share.line), head(0), first(0) {
        left = share.end - share.begin;
        count = 0;
        if (left == 0) return;
        line = find_line(p, index);
        const int rest = share.begin - share.line_first;
        head = rest / line.strips;
        first = rest - head * line.strips;
        count = min_int(line.strips - first, left);
    }

    PA_DEVICE void next(const Params& p) {
        left -= count;
        first = 0;
        count = 0;
        if (left == 0) return;
        if (++head == p.num_kv_heads) {
            head = 0;
            line = find_line(p, ++index);
        }
        count = min_int(line.strips, left);
    }
};

PA_DEVICE int rounds_of(int strips) { return divide_up(strips, kKeyGroups); }

}  // namespace portattn
