// From scores to weights: score terms, the mask of a partial tile, and the online softmax.
//
// Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), and FlashAttention-2 (Dao
// 2023), algorithm 1, in base 2: p = exp2(c*s - c*m), c = scale * log2(e) > 0, one FMA and one ex2 per
// element. With score terms the scores are first brought to units of log2 and c is 1.
#pragma once

#include "matmul.cuh"
#include "schedule.cuh"

namespace portattn {

// Which of a lane's scores a partial tile keeps: bit 8*(n % 4) + 2*quad + e of word n / 4 of a row is the key
// of element [n][e]; the words are shifted right by 2*quad already.
struct TileMask {
    uint32 words[kRowTiles][2][kWords];
};

struct RowState {
    float max[kRowTiles][2];  // running maximum; -inf while nothing was kept
    float sum[kRowTiles][2];  // of this lane's columns only; the four lanes of a row add up at the end
};

PA_DEVICE bool tile_reaches_warp(const Params& p, const Lane& lane, int same, int other) {
    if (same != other) return true;
    constexpr int kRanges = (kBlockQ + 15) / 16;
    bool any = false;
    PA_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
        const int64 range = static_cast<int64>(same) * kRanges + lane.warp * kRowTiles + tile;
        any |= load_int(p.bit_ranges + 2 * range + 1) > 0;
    }
    return any;
}

PA_DEVICE uint32 bit_word(const Params& p, int tile, int row, int word) {
    if (tile == -1) return 0xffffffffu;
    if (tile == -2) return 0u;
    return load_word(p.bits + (static_cast<int64>(tile) * kBlockQ + row) * kWords + word);
}

// An id tile: per key and row, the bits of the tile that equality of the ids names.
PA_DEVICE void mask_by_ids(TileMask& mask, const Params& p, const Lane& lane, const Work& work, TileKeys keys,
                           int same, int other) {
    const int64 ids = load_int(p.layout_ids + work.layout);
    const int* k_ids = p.k_ids + ids * p.seqlen_k;
    const int* q_ids = p.q_ids + ids * p.seqlen_q;
    int row_id[kRowTiles][2];
    PA_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
        PA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = lane.row(tile, half);
            const bool exists = row < work.item.num_rows;
            row_id[tile][half] =
                exists ? load_int(q_ids + work.item.q_start + static_cast<int64>(work.item.q_step) * row)
                       : -1;
        }
    }
    PA_UNROLL
    for (int word = 0; word < kWords; ++word) {
        uint32 exist = 0u;
        uint32 equal[kRowTiles][2] = {};
#pragma unroll 2  // unrolled in full it takes the registers that the accumulators need
        for (int bit = 0; bit < 8; ++bit) {
            const int column = 8 * (bit / 2) + bit % 2;  // of this lane's shifted word
            const int64 key =
                keys.start + static_cast<int64>(keys.step) * (32 * word + column + 2 * lane.quad);
            if (key >= p.seqlen_k) continue;
            const int id = load_int(k_ids + key);
            exist |= 1u << column;
            PA_UNROLL
            for (int tile = 0; tile < kRowTiles; ++tile) {
                PA_UNROLL
                for (int half = 0; half < 2; ++half) {
                    // -1 is an id that the other side does not have: it equals nothing, itself included.
                    if (id >= 0 && id == row_id[tile][half]) equal[tile][half] |= 1u << column;
                }
            }
        }
        PA_UNROLL
        for (int tile = 0; tile < kRowTiles; ++tile) {
            PA_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int row = lane.row(tile, half);
                const uint32 if_same = bit_word(p, same, row, word) >> (2 * lane.quad);
                const uint32 if_other = bit_word(p, other, row, word) >> (2 * lane.quad);
                const uint32 select = equal[tile][half];
                mask.words[tile][half][word] = ((select & if_same) | (~select & if_other)) & exist;
            }
        }
    }
}

PA_DEVICE void mask_by_bits(TileMask& mask, const Params& p, const Lane& lane, int bit_tile) {
    PA_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
        PA_UNROLL
        for (int half = 0; half < 2; ++half) {
            PA_UNROLL
            for (int word = 0; word < kWords; ++word)
                mask.words[tile][half][word] =
                    bit_word(p, bit_tile, lane.row(tile, half), word) >> (2 * lane.quad);
        }
    }
}

PA_DEVICE void load_mask(TileMask& mask, const Params& p, const Lane& lane, const Work& work, TileKeys keys,
                         int same, int other) {
    if (same == other) {
        mask_by_bits(mask, p, lane, same);
    } else {
        mask_by_ids(mask, p, lane, work, keys, same, other);
    }
}

PA_DEVICE void apply_mask(Scores& s, const TileMask& mask) {
    PA_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
        PA_UNROLL
        for (int n = 0; n < kKeyTiles; ++n) {
            PA_UNROLL
            for (int r = 0; r < 4; ++r) {
                const uint32 bit = 1u << (8 * (n % 4) + r % 2);
                if ((mask.words[tile][r / 2][n / 4] & bit) == 0u) s[tile][n][r] = -infinity();
            }
        }
    }
}

PA_DEVICE float softcap_score(const Params& p, float dot) {
    const float y = dot * p.softcap_inverse;
    if constexpr (kDtype == kFloat32) return p.softcap * tanh_exact(y);
    // tanh(y) = 1 - 2/(exp(2y) + 1), within 2e-7; tanh.approx has 11 bits, too few once multiplied by the
    // cap.
    return p.softcap * (1.0f - 2.0f * reciprocal_fast(1.0f + exp2_fast(y * (2.0f * kLog2e))));
}

// softcap(scale * q.k) - slope * |i - j| + bias, in units of log2.
PA_DEVICE void add_score_terms(Scores& s, const Params& p, const Lane& lane, const Work& work,
                               TileKeys keys) {
    float slope = 0.0f;
    if constexpr (kAlibi)
        slope = kLog2e *
                load_float(p.alibi + work.batch * p.alibi_stride_batch + work.head * p.alibi_stride_head);
    const int64 bias_head = work.batch * p.bias_stride_batch + work.head * p.bias_stride_head;
    PA_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
        PA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row_in_tile = lane.row(tile, half);
            const int64 row = work.item.q_start + static_cast<int64>(work.item.q_step) * row_in_tile;
            PA_UNROLL
            for (int n = 0; n < kKeyTiles; ++n) {
                PA_UNROLL
                for (int e = 0; e < 2; ++e) {
                    float& score = s[tile][n][2 * half + e];
                    const int64 key =
                        keys.start + static_cast<int64>(keys.step) * (8 * n + 2 * lane.quad + e);
                    score = kSoftcap ? kLog2e * softcap_score(p, score) : p.scale_log2 * score;
                    if constexpr (kAlibi) {
                        const int64 gap = p.q_offset + row - key;
                        score -= slope * static_cast<float>(gap < 0 ? -gap : gap);
                    }
                    if constexpr (kBias) {
                        if (row_in_tile < work.item.num_rows && key < p.seqlen_k)
                            score += kLog2e * load_element(p.bias, bias_head + row * p.bias_stride_row +
                                                                       key * p.bias_stride_key);
                    }
                }
            }
        }
    }
}

PA_DEVICE float weight_exp2(float x) {
    if constexpr (kDtype == kFloat32) return exp2_exact(x);
    return exp2_fast(x);
}

// What the rows of O are multiplied by when their base rises.
struct RowFactors {
    float of[kRowTiles][2];
};

// A row's base, the number that its scores are taken relative to, follows its maximum only when that has
// outgrown it by this much, in units of log2: weights then stay below 2^8, and O is rarely rescaled.
constexpr float kMostGrowth = 8.0f;

// For each row: what its O and sum are multiplied by, and -c times its base.
struct RowShifts {
    RowFactors factors;
    float shift[kRowTiles][2];
};

// The rows' bases (in state.max) for a tile's scores; returns whether one of the warp's has changed, so that
// O must be rescaled. kGuarded: some rows may have kept nothing yet.
template <bool kGuarded>
PA_DEVICE bool raise_bases(const Scores& s, RowState& state, RowShifts& shifts, float c) {
    bool changed = false;
    PA_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
        // Two chains for each row, the rows' in turn: one chain alone waits for its own latency.
        float tops[2][2];
        PA_UNROLL
        for (int half = 0; half < 2; ++half) {
            PA_UNROLL
            for (int e = 0; e < 2; ++e)
                tops[half][e] = max_f32(s[tile][0][2 * half + e], s[tile][1][2 * half + e]);
        }
        PA_UNROLL
        for (int n = 2; n < kKeyTiles; ++n) {
            PA_UNROLL
            for (int r = 0; r < 4; ++r) tops[r / 2][r % 2] = max_f32(tops[r / 2][r % 2], s[tile][n][r]);
        }
        float top[2];
        PA_UNROLL
        for (int half = 0; half < 2; ++half) top[half] = max_f32(tops[half][0], tops[half][1]);
        PA_UNROLL
        for (int mask = 1; mask < 4; mask *= 2) {
            PA_UNROLL
            for (int half = 0; half < 2; ++half) top[half] = max_f32(top[half], shuffle_xor(top[half], mask));
        }
        PA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const float before = state.max[tile][half];
            const float after = (top[half] - before) * c > kMostGrowth ? top[half] : before;
            const float base = kGuarded && after == -infinity() ? 0.0f : after;
            const float factor = weight_exp2((before - base) * c);
            shifts.factors.of[tile][half] = factor;
            shifts.shift[tile][half] = -base * c;
            state.sum[tile][half] *= factor;
            state.max[tile][half] = after;
            changed |= factor != 1.0f;
        }
    }
    return warp_any(changed);
}

PA_DEVICE void rescale_output(Output& o, const RowFactors& rescale) {
    PA_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
        PA_UNROLL
        for (int n = 0; n < kOutTiles; ++n) {
            PA_UNROLL
            for (int r = 0; r < 4; ++r) o[tile][n][r] *= rescale.of[tile][r / 2];
        }
    }
}

}  // namespace portattn
