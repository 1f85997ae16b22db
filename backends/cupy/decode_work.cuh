// Which strips of keys a block works on. The host knows capacities only; lengths and masks become strips
// here, and every block takes an equal share of all strips that exist, whatever the lengths are.
//
// A line is one batch element and one block of rows; a row of work is a line of one KV head. All strips lie
// on one axis: line after line, in a line head after head. Each block takes an equal stretch of it, so that
// it has at most two rows of work that it shares with other blocks: its first and its last.
#pragma once

#include "decode_config.cuh"
#include "decode_params.cuh"

namespace portattn {

struct Keys {
    int begin, end;
};

// n / d for 0 <= n < 2**31 and a divisor that the host knows (decode.py): three instructions, not twenty.
PA_DEVICE int divide(int n, int magic, int shift) {
    const auto product =
        static_cast<unsigned long long>(2u * static_cast<uint32>(n)) * static_cast<uint32>(magic);
    return static_cast<int>(static_cast<uint32>(product >> 32) >> shift);
}

PA_DEVICE int clamp(int64 v, int most) { return v < 0 ? 0 : v > most ? most : static_cast<int>(v); }

// Keys that the query at a position may attend to, of `count` keys that exist.
PA_DEVICE Keys visible_keys(const Params& p, int64 position, int count) {
    const int begin = min_int(max_int(clamp(position + p.mask_lo, count), p.mask_begin), count);
    const int end = min_int(clamp(position + p.mask_hi + 1, count), p.mask_end);
    return Keys{begin, max_int(begin, end)};
}

struct Line {
    int batch, row_block;
    int count;       // keys that exist
    int64 position;  // of query 0
    Keys keys;       // that any of its rows attends to
    Keys full;       // that every row attends to: strips inside need no mask
    int strips;      // at least 1, so that each row of work has a block, which stores its output
};

PA_DEVICE int first_query(const Params& p, const Line& line) {
    return divide(line.row_block * kBlockQ, p.group_magic, p.group_shift);
}

PA_DEVICE int last_query(const Params& p, const Line& line) {
    const int last = min_int((line.row_block + 1) * kBlockQ, p.group_size * p.seqlen_q) - 1;
    return divide(last, p.group_magic, p.group_shift);
}

// Rows from the line's first on: of its block, if there are that many, and of the blocks after it.
PA_DEVICE int rows_left(const Params& p, const Line& line) {
    return p.group_size * p.seqlen_q - line.row_block * kBlockQ;
}

PA_DEVICE Line find_line(const Params& p, int index) {
    Line line;
    line.batch = divide(index, p.row_blocks_magic, p.row_blocks_shift);
    line.row_block = index - line.batch * p.row_blocks;
    line.count = p.seqlen_k;
    line.position = p.q_offset;
    if (p.kv_lengths != nullptr) {
        const int length = load_int(p.kv_lengths + static_cast<int64>(line.batch) * p.length_stride);
        line.position = static_cast<int64>(length) - p.seqlen_q;
        line.count = min_int(max_int(length, 0), p.seqlen_k);
    }
    // Both bounds grow with the position.
    const Keys first = visible_keys(p, line.position + first_query(p, line), line.count);
    const Keys last = visible_keys(p, line.position + last_query(p, line), line.count);
    line.keys = Keys{first.begin, max_int(first.begin, last.end)};
    line.full = Keys{last.begin, first.end};
    line.strips = max_int(divide_up(line.keys.end - line.keys.begin, kBlockK), 1);
    return line;
}

struct Share {
    int each;        // strips of a block; the last that has some may have fewer
    int begin, end;  // of this block
    int line;        // where it begins
    int line_first;  // first strip of that line

    // The block that a strip belongs to.
    PA_DEVICE int owner(int strip) const { return strip / each; }
};

// Sum over the lanes up to and including this one.
PA_DEVICE int sum_to_lane(int v, int lane) {
    PA_UNROLL
    for (int step = 1; step < 32; step *= 2) {
        const int other = shuffle_int(v, max_int(lane - step, 0));
        if (lane >= step) v += other;
    }
    return v;
}

// How many lanes have a sum of at most `target`: the place where the strip `target` lies.
PA_DEVICE int lanes_before(int sum, int target) { return count_bits(warp_ballot(sum <= target)); }

// Each thread sums some lines, each warp its threads. No step is longer than a warp and there is one barrier:
// until the share is found the block loads nothing.
PA_DEVICE Share find_share(const Params& p, int worker, uint32 scratch) {
    const int lines = p.batch * p.row_blocks;
    const int chunk = divide_up(lines, kThreads);
    const int thread = thread_index();
    const int lane = thread % 32;
    int sum = 0;
#pragma unroll 1
    for (int n = thread * chunk; n < min_int((thread + 1) * chunk, lines); ++n) sum += find_line(p, n).strips;
    shared_store_int(scratch + 4 * thread, sum_to_lane(sum, lane));
    block_barrier();
    const int last = 32 * min_int(lane, kNumWarps - 1) + 31;
    const int warp_sum = sum_to_lane(lane < kNumWarps ? shared_load_int(scratch + 4 * last) : 0, lane);
    const int total = shuffle_int(warp_sum, 31) * p.num_kv_heads;
    const int workers = min_int(divide_up(total, p.min_piece), p.num_workers);
    Share share{divide_up(total, workers), 0, 0, 0, 0};
    if (worker * share.each >= total) return share;
    share.begin = worker * share.each;
    share.end = min_int(share.begin + share.each, total);
    const int target = share.begin / p.num_kv_heads;  // in strips of one head
    const int warp = lanes_before(warp_sum, target);
    int before = shuffle_int(warp_sum, max_int(warp - 1, 0));
    before = warp == 0 ? 0 : before;
    const int thread_sum = shared_load_int(scratch + 4 * (32 * warp + lane));
    const int slot = lanes_before(thread_sum, target - before);
    const int lanes = shuffle_int(thread_sum, max_int(slot - 1, 0));
    before += slot == 0 ? 0 : lanes;
    int line = (32 * warp + slot) * chunk;
    if (chunk > 1) {
#pragma unroll 1
        for (int n; before + (n = find_line(p, line).strips) <= target; ++line) before += n;
    }
    share.line = line;
    share.line_first = before * p.num_kv_heads;
    return share;
}

// Walks the rows of work of a share: enter() each, then next().
struct Cursor {
    Line line;
    int index, rest;  // of the line, and strips of it before those of this block
    int head;         // KV head
    int first;        // strip of the row where this block's part begins
    int count;        // strips of the part
    int left;         // strips of the share from `first` on; 0 past its end

    PA_DEVICE explicit Cursor(const Share& share)
        : line{},
          index(share.line),
          rest(share.begin - share.line_first),
          head(0),
          first(0),
          count(0),
          left(share.end - share.begin) {}

    PA_DEVICE void enter(const Params& p) {
        line = find_line(p, index);
        head = rest / line.strips;
        first = rest - head * line.strips;
        count = min_int(line.strips - first, left);
    }

    PA_DEVICE void next(const Params& p) {
        left -= count;
        rest += count;
        if (rest < line.strips * p.num_kv_heads) return;
        rest = 0;
        ++index;
    }
};

PA_DEVICE int rounds_of(int strips) { return divide_up(strips, kKeyGroups); }

}  // namespace portattn
