// One strip of keys: from global memory, in copies that run ahead, to the running softmax and output of the
// warps that own it. A warp owns 16 rows; S and O lie in registers as mma.m16n8k16 accumulators: element
// [n][2 * half + e] is row Lane::row(half), column 8n + 2 * quad + e.
//
// Online softmax in base 2 as in scores.cuh (Milakov and Gimelshein 2018; FlashAttention-2, Dao 2023).
#pragma once

#include "decode_work.cuh"

namespace portattn {

using Scores = float[kKeyTiles][4];
using Output = float[kOutTiles][4];
using QueryFragments = uint32[kQueryInRegisters ? kHeadDim / 16 : 1][4];

struct RowState {
    float max[2];  // running maximum; -inf while nothing was kept
    float sum[2];  // of this lane's columns only; the four lanes of a row add up at the end
};

// Up to 16 bytes from an address that is only aligned to its elements.
PA_DEVICE void copy_unaligned(uint32 shared, const char* source, int bytes) {
    uint32 words[4] = {0u, 0u, 0u, 0u};
    const uint16* halves = reinterpret_cast<const uint16*>(source);
    PA_UNROLL
    for (int w = 0; w < 4; ++w) {
        if (4 * w < bytes) words[w] = load_half(halves + 2 * w);
        if (4 * w + 2 < bytes) words[w] |= static_cast<uint32>(load_half(halves + 2 * w + 1)) << 16;
    }
    shared_store_words(shared, words);
}

// kBlockK rows of K or V from row `first`; rows at or past `limit` and columns past `width_bytes` become
// zeros. A thread keeps its place in panels of 128 (or 64) bytes of a row and walks down the rows.
template <int kPitch>
PA_DEVICE void copy_rows(uint32 shared, const char* base, int64 stride_bytes, int first, int limit,
                         int width_bytes, int thread) {
    constexpr int kPanel = kPitch % 128 == 0 ? 8 : 4;  // chunks
    constexpr int kPanels = kPitch / (16 * kPanel);
    constexpr int kRowsPerRound = kGroupThreads / kPanel;
    static_assert(kRowsPerRound == 4 || kRowsPerRound % 8 == 0, "the swizzle repeats after eight rows");
    const int column = 16 * (thread % kPanel);
    const uint32 target = shared + chunk_offset<kPitch>(thread / kPanel, thread % kPanel);
    int position = first + thread / kPanel;
    const char* source = base + position * stride_bytes + column;
    PA_UNROLL
    for (int row = 0; row < kBlockK; row += kRowsPerRound) {
        if (kBlockK % kRowsPerRound != 0 && row + thread / kPanel >= kBlockK) break;
        PA_UNROLL
        for (int panel = 0; panel < kPanels; ++panel) {
            const char* chunk = source + 16 * kPanel * panel;
            // One warp takes four of eight rows of the swizzle at a time.
            const uint32 place = (target ^ ((row & 4) << 4)) + row * kPitch + 16 * kPanel * panel;
            int bytes = max_int(min_int(width_bytes - column - 16 * kPanel * panel, 16), 0);
            bytes = position < limit ? bytes : 0;
            if constexpr (kAligned) {
                cp_async_16(place, bytes > 0 ? chunk : base, bytes);
            } else {
                copy_unaligned(place, chunk, bytes);
            }
        }
        position += kRowsPerRound;
        source += kRowsPerRound * stride_bytes;
    }
}

// Query and query head of a row of the block.
struct RowPlace {
    int query, head;
    bool exists;
};

PA_DEVICE RowPlace find_row(const Params& p, const Cursor& work, int row) {
    const int packed = work.line.row_block * kBlockQ + row;
    RowPlace place;
    place.query = divide(packed, p.group_magic, p.group_shift);
    place.head = work.head * p.group_size + packed - place.query * p.group_size;
    place.exists = place.query < p.seqlen_q;
    return place;
}

// Two neighbouring elements; those past `width` are 0.
PA_DEVICE uint32 load_pair(const uint16* row, int column, int width) {
    // Aligned rows have an even number of elements (decode.py).
    if constexpr (kAligned)
        return column < width ? load_word(reinterpret_cast<const uint32*>(row + column)) : 0u;
    uint32 pair = 0u;
    if (column < width) pair = load_half(row + column);
    if (column + 1 < width) pair |= static_cast<uint32>(load_half(row + column + 1)) << 16;
    return pair;
}

struct QueryRow {
    const uint16* source;
    int width;  // elements that exist: none of a row that does not

    PA_DEVICE QueryRow(const Params& p, const Cursor& work, int row) {
        const RowPlace place = find_row(p, work, row);
        source = static_cast<const uint16*>(p.query) + work.line.batch * p.query_stride_batch +
                 place.head * p.query_stride_head + place.query * p.query_stride_row;
        width = place.exists ? p.head_dim : 0;
    }
    PA_DEVICE uint32 pair(int column) const { return load_pair(source, column, width); }
};

// Loads the strips of one key group in the order in which they are computed, across rows of work: the copies
// do not pause where a row ends.
struct Loader {
    const Params& p;
    Cursor cursor;
    uint32 strips;  // of this key group, in shared memory
    int key_group, thread;
    int round, stage;
    const char* key;  // of the row of work; found with its first strip
    const char* value;

    PA_DEVICE Loader(const Params& params, const Share& share, const Lane& lane, uint32 shared)
        : p(params),
          cursor(share),
          strips(shared + lane.key_group * kNumStages * kStripBytes),
          key_group(lane.key_group),
          thread(lane.thread % kGroupThreads),
          round(0),
          stage(0),
          key(nullptr),
          value(nullptr) {}

    PA_DEVICE void find_head() {
        key = static_cast<const char*>(p.key) +
              2 * (cursor.line.batch * p.key_stride_batch + cursor.head * p.key_stride_head);
        value = static_cast<const char*>(p.value) +
                2 * (cursor.line.batch * p.value_stride_batch + cursor.head * p.value_stride_head);
    }

    // The query of the row is needed some rounds from now, at once.
    PA_DEVICE void prefetch_query() const {
        constexpr int kLines = kKeyPitch > 128 ? kKeyPitch / 128 : 1;
        const int rows = min_int(rows_left(p, cursor.line), kBlockQ);
#pragma unroll 1
        for (int item = thread; item < rows * kLines; item += kGroupThreads) {
            const QueryRow row(p, cursor, item / kLines);
            const int column = 64 * (item % kLines);
            if (column < row.width) prefetch_line(row.source + column);
        }
    }

    // Commits a group, an empty one where there is nothing to load, so that waiting can count groups.
    PA_DEVICE void load_next() {
        if (cursor.left > 0) {
            if (round == 0) cursor.enter(p);
            if (round == 0 || kFewRegisters) find_head();
            if (round == 0 && key_group == 0) prefetch_query();  // before keys: it would come after them
            const int strip = round * kKeyGroups + key_group;
            if (strip < cursor.count) {
                const int first = cursor.line.keys.begin + (cursor.first + strip) * kBlockK;
                const uint32 target = strips + stage * kStripBytes;
                copy_rows<kKeyPitch>(target, key, 2 * p.key_stride_row, first, cursor.line.keys.end,
                                     2 * p.head_dim, thread);
                copy_rows<kValuePitch>(target + kBlockK * kKeyPitch, value, 2 * p.value_stride_row, first,
                                       cursor.line.keys.end, 2 * p.head_dim_v, thread);
            }
            if (++round == rounds_of(cursor.count)) {
                round = 0;
                cursor.next(p);
            }
        }
        cp_async_commit();
        stage = stage + 1 == kNumStages ? 0 : stage + 1;
    }
};

PA_DEVICE void stage_query(const Params& p, const Lane& lane, const Cursor& work, uint32 query) {
    for (int item = lane.thread; item < kBlockQ * kHeadDim / 8; item += kThreads) {
        const int row = item / (kHeadDim / 8);
        const int chunk = item % (kHeadDim / 8);
        const QueryRow source(p, work, row);
        uint32 words[4];
        PA_UNROLL
        for (int w = 0; w < 4; ++w) words[w] = source.pair(8 * chunk + 2 * w);
        shared_store_words(query + chunk_offset<kKeyPitch>(row, chunk), words);
    }
    block_barrier();
}

PA_DEVICE void load_fragment(uint32 (&a)[4], const Lane& lane, uint32 query, int step) {
    const int row = 16 * lane.row_group + lane.lane % 16;
    ldmatrix_x4(a, other_chunk<kKeyPitch>(query + chunk_offset<kKeyPitch>(row, lane.lane / 16), 2 * step));
}

// Straight to registers where it stays there: nobody waits for another warp.
PA_DEVICE void load_query(QueryFragments& a, const Params& p, const Lane& lane, const Cursor& work,
                          uint32 query) {
    if constexpr (kQueryInRegisters) {
        PA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const QueryRow source(p, work, lane.row(half));
            PA_UNROLL
            for (int step = 0; step < kHeadDim / 16; ++step) {
                a[step][half] = source.pair(16 * step + 2 * lane.quad);
                a[step][2 + half] = source.pair(16 * step + 8 + 2 * lane.quad);
            }
        }
    } else {
        stage_query(p, lane, work, query);
    }
}

PA_DEVICE void query_key(Scores& s, const QueryFragments& fragments, const Params& p, const Lane& lane,
                         uint32 query, uint32 key) {
    PA_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) {
        PA_UNROLL
        for (int r = 0; r < 4; ++r) s[n][r] = 0.0f;
    }
    const int key_row = lane.lane % 8 + 8 * (lane.lane / 16);
    const uint32 address = key + chunk_offset<kKeyPitch>(key_row, (lane.lane / 8) % 2);
    PA_UNROLL
    for (int step = 0; step < kHeadDim / 16; ++step) {
        uint32 a[4];
        if constexpr (kQueryInRegisters) {
            PA_UNROLL
            for (int r = 0; r < 4; ++r) a[r] = fragments[step][r];
        } else {
            load_fragment(a, lane, query, step);
        }
        PA_UNROLL
        for (int pair = 0; pair < kKeyTiles / 2; ++pair) {
            uint32 b[4];
            ldmatrix_x4(b, other_chunk<kKeyPitch>(address, 2 * step) + 16 * pair * kKeyPitch);
            mma_m16n8k16<kBfloat16>(s[2 * pair], a, b[0], b[1]);
            mma_m16n8k16<kBfloat16>(s[2 * pair + 1], a, b[2], b[3]);
        }
    }
    // The scale's sign, or that it is 0: the softmax takes the maximum of unscaled scores. The query itself
    // is as loaded, so that nothing waits for it before the first product.
    if (p.query_factor != 1) {
        PA_UNROLL
        for (int n = 0; n < kKeyTiles; ++n) {
            PA_UNROLL
            for (int r = 0; r < 4; ++r) s[n][r] *= static_cast<float>(p.query_factor);
        }
    }
}

// P's accumulator layout is the A operand's: no shuffle is needed.
PA_DEVICE void weights_value(Output& o, const Scores& s, const Lane& lane, uint32 value) {
    const uint32 address = value + chunk_offset<kValuePitch>(lane.lane % 16, lane.lane / 16);
    PA_UNROLL
    for (int step = 0; step < kBlockK / 16; ++step) {
        uint32 a[4];
        PA_UNROLL
        for (int r = 0; r < 4; ++r) {
            const float* pair = &s[2 * step + r / 2][2 * (r % 2)];
            a[r] = pack_pair<kBfloat16>(pair[0], pair[1]);
        }
        PA_UNROLL
        for (int pair = 0; pair < kOutTiles / 2; ++pair) {
            uint32 b[4];
            ldmatrix_x4_trans(b, other_chunk<kValuePitch>(address, 2 * pair) + 16 * step * kValuePitch);
            mma_m16n8k16<kBfloat16>(o[2 * pair], a, b[0], b[1]);
            mma_m16n8k16<kBfloat16>(o[2 * pair + 1], a, b[2], b[3]);
        }
    }
}

PA_DEVICE float softcap_score(const Params& p, float dot) {
    // tanh(y) = 1 - 2/(exp(2y) + 1), within 2e-7; tanh.approx has 11 bits, too few once multiplied by the
    // cap.
    const float y = dot * p.softcap_inverse;
    return p.softcap * (1.0f - 2.0f * reciprocal_fast(1.0f + exp2_fast(y * (2.0f * kLog2e))));
}

// softcap(scale * q.k) - slope * |i - j| + bias, in units of log2.
PA_DEVICE void add_score_terms(Scores& s, const Params& p, const Lane& lane, const Cursor& work,
                               int first_key) {
    PA_UNROLL
    for (int half = 0; half < 2; ++half) {
        const RowPlace place = find_row(p, work, lane.row(half));
        float slope = 0.0f;
        if (kAlibi && place.exists)
            slope = kLog2e * load_float(p.alibi + work.line.batch * p.alibi_stride_batch +
                                        place.head * p.alibi_stride_head);
        const int64 bias_row = work.line.batch * p.bias_stride_batch + place.head * p.bias_stride_head +
                               place.query * p.bias_stride_row;
        PA_UNROLL
        for (int n = 0; n < kKeyTiles; ++n) {
            PA_UNROLL
            for (int e = 0; e < 2; ++e) {
                float& score = s[n][2 * half + e];
                const int key = first_key + 8 * n + 2 * lane.quad + e;
                score = kSoftcap ? kLog2e * softcap_score(p, score) : p.scale_log2 * score;
                if constexpr (kAlibi) {
                    const int64 gap = work.line.position + place.query - key;
                    score -= slope * static_cast<float>(gap < 0 ? -gap : gap);
                }
                if constexpr (kBias) {
                    if (place.exists && key < work.line.keys.end)
                        score += kLog2e * load_element(p.bias, bias_row + key * p.bias_stride_key);
                }
            }
        }
    }
}

PA_DEVICE void apply_mask(Scores& s, const Params& p, const Lane& lane, const Cursor& work, int first_key) {
    PA_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int query = find_row(p, work, lane.row(half)).query;
        const Keys keys = visible_keys(p, work.line.position + query, work.line.count);
        PA_UNROLL
        for (int n = 0; n < kKeyTiles; ++n) {
            PA_UNROLL
            for (int e = 0; e < 2; ++e) {
                const int key = first_key + 8 * n + 2 * lane.quad + e;
                if (key < keys.begin || key >= keys.end) s[n][2 * half + e] = -infinity();
            }
        }
    }
}

// Scores to weights in place; rescales O. Some rows may have kept nothing yet.
PA_DEVICE void softmax_step(Scores& s, Output& o, RowState& state, float scale_log2) {
    const float c = kScoreTerms ? 1.0f : scale_log2;
    float rescale[2];
    PA_UNROLL
    for (int half = 0; half < 2; ++half) {
        float top = state.max[half];
        PA_UNROLL
        for (int n = 0; n < kKeyTiles; ++n) top = max_f32(top, max_f32(s[n][2 * half], s[n][2 * half + 1]));
        top = max_f32(top, shuffle_xor(top, 1));
        top = max_f32(top, shuffle_xor(top, 2));
        const float base = top == -infinity() ? 0.0f : top;
        rescale[half] = exp2_fast((state.max[half] - base) * c);
        const float shift = -base * c;
        float sum = 0.0f;
        PA_UNROLL
        for (int n = 0; n < kKeyTiles; ++n) {
            PA_UNROLL
            for (int e = 0; e < 2; ++e) {
                float& score = s[n][2 * half + e];
                score = exp2_fast(fma_f32(score, c, shift));
                sum += score;
            }
        }
        state.sum[half] = state.sum[half] * rescale[half] + sum;
        state.max[half] = top;
    }
    // The maximum settles after a few strips; then no row of the warp needs its O rescaled.
    if (!warp_any(rescale[0] != 1.0f || rescale[1] != 1.0f)) return;
    PA_UNROLL
    for (int n = 0; n < kOutTiles; ++n) {
        PA_UNROLL
        for (int r = 0; r < 4; ++r) o[n][r] *= rescale[r / 2];
    }
}

PA_DEVICE void compute_strip(Output& o, RowState& state, const QueryFragments& fragments, uint32 query,
                             const Params& p, const Lane& lane, const Cursor& work, int first_key,
                             uint32 strip) {
    Scores s;
    query_key(s, fragments, p, lane, query, strip);
    if constexpr (kScoreTerms) add_score_terms(s, p, lane, work, first_key);
    if (kFewRegisters || first_key < work.line.full.begin || first_key + kBlockK > work.line.full.end)
        apply_mask(s, p, lane, work, first_key);
    softmax_step(s, o, state, p.scale_log2);
    weights_value(o, s, lane, strip + kBlockK * kKeyPitch);
}

}  // namespace portattn
