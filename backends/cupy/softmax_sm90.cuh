// The online softmax of the sm_90a kernel: scores to weights in few instructions, none of them in a row of
// dependent ones that the tensor cores would wait for.
//
// A row's ceiling (RowState::max, in units of the scores) is what its weights are taken relative to:
// w = 2^(c s - c ceiling), c = scale * log2(e) > 0. It is set kHeadroom powers of two above the row's maximum
// and moves only when a score passes it. So most tiles need no maximum at all: whether any score of the warp
// passes its ceiling is the sign of the OR of all c ceiling - c s, half an instruction for each, and one
// vote.
#pragma once

#include "hopper.cuh"

namespace portattn {

// Weights of float16 have their precision only down to 2^-14.
constexpr float kHeadroom = kDtype == kBfloat16 ? 8.0f : 4.0f;

template <int kSign>
PA_DEVICE float signed_by(float v) {
    return kSign < 0 ? -v : v;  // a product with -1 would be an instruction
}

// For two rows: the largest of kSign times their numbers in this lane, then in the rows' four lanes.
template <int kSign>
PA_DEVICE void row_maxima(const Scores& s, float (&top)[2]) {
    // Two chains for each row, the rows' in turn: one chain alone waits for its own latency.
    float tops[2][2];
    PA_UNROLL
    for (int r = 0; r < 4; ++r) tops[r / 2][r % 2] = signed_by<kSign>(s[0][0][r]);
    PA_UNROLL
    for (int n = 1; n < kKeyTiles; ++n) {
        PA_UNROLL
        for (int r = 0; r < 4; ++r)
            tops[r / 2][r % 2] = max_f32(tops[r / 2][r % 2], signed_by<kSign>(s[0][n][r]));
    }
    PA_UNROLL
    for (int half = 0; half < 2; ++half) top[half] = max_f32(tops[half][0], tops[half][1]);
    PA_UNROLL
    for (int mask = 1; mask < 4; mask *= 2) {
        PA_UNROLL
        for (int half = 0; half < 2; ++half) top[half] = max_f32(top[half], shuffle_xor(top[half], mask));
    }
}

// A row's ceiling in units of log2; 0 while it has none.
PA_DEVICE float ceiling_log2(const RowState& state, int half, float c) {
    const float ceiling = state.max[0][half];
    return ceiling == -infinity() ? 0.0f : ceiling * c;
}

// New ceilings for rows of which a score has passed the old one, or that have none yet, and the distances
// from them.
PA_DEVICE void raise_ceilings(Scores& distances, RowState& state, RowFactors& rescale, float c) {
    float top[2];
    row_maxima<-1>(distances, top);
    PA_UNROLL
    for (int half = 0; half < 2; ++half) {
        const bool is_new = state.max[0][half] == -infinity();
        const float before = is_new ? 0.0f : state.max[0][half];
        float& ceiling = state.max[0][half];
        // A row that has kept nothing yet still has no ceiling: its scores are all -inf.
        if (is_new ? top[half] > -infinity() : top[half] > 0.0f)
            ceiling = before + (top[half] + kHeadroom) / c;
        const float raised = ceiling_log2(state, half, c) - before * c;
        const float factor = is_new ? 0.0f : exp2_fast(-raised);
        rescale.of[0][half] = factor;
        state.sum[0][half] *= factor;
        PA_UNROLL
        for (int n = 0; n < kKeyTiles; ++n) {
            PA_UNROLL
            for (int e = 0; e < 2; ++e) distances[0][n][2 * half + e] += raised;
        }
    }
}

// Scores to distances below their ceilings, in units of log2 and in place; returns whether one of the warp's
// ceilings was raised.
PA_DEVICE bool scores_to_distances(Scores& s, RowState& state, RowFactors& rescale, float c) {
    uint32 signs[2];
    float ceiling[2];
    PA_UNROLL
    for (int half = 0; half < 2; ++half) {
        signs[half] = state.max[0][half] == -infinity() ? 0x80000000u : 0u;
        ceiling[half] = ceiling_log2(state, half, c);
    }
    PA_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) {
        PA_UNROLL
        for (int r = 0; r < 4; ++r) s[0][n][r] = fma_f32(s[0][n][r], -c, ceiling[r / 2]);
        PA_UNROLL
        for (int half = 0; half < 2; ++half)
            signs[half] |= float_bits(s[0][n][2 * half]) | float_bits(s[0][n][2 * half + 1]);
    }
    if (!warp_any((signs[0] | signs[1]) >= 0x80000000u)) return false;
    raise_ceilings(s, state, rescale, c);
    return true;
}

// The same for rows of which no tile came before.
PA_DEVICE void first_distances(Scores& s, RowState& state, float c) {
    float top[2];
    row_maxima<1>(s, top);
    float ceiling[2];
    PA_UNROLL
    for (int half = 0; half < 2; ++half) {
        state.max[0][half] = top[half] + kHeadroom / c;  // -inf stays -inf
        ceiling[half] = ceiling_log2(state, half, c);
    }
    PA_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) {
        PA_UNROLL
        for (int r = 0; r < 4; ++r) s[0][n][r] = fma_f32(s[0][n][r], -c, ceiling[r / 2]);
    }
}

// A row's words of a bit tile: -1 keeps all, -2 nothing.
PA_DEVICE void bits_of_row(uint32 (&words)[kWords], const Params& p, int tile, int row) {
    PA_UNROLL
    for (int word = 0; word < kWords; ++word) words[word] = tile == -1 ? 0xffffffffu : 0u;
    if (tile < 0) return;
    const uint32* bits = p.bits + (static_cast<int64>(tile) * kBlockQ + row) * kWords;
    PA_UNROLL
    for (int word = 0; word < kWords; ++word) words[word] = load_word(bits + word);
}

PA_DEVICE void mask_by_bit_tile(TileMask& mask, const Params& p, const Lane& lane, int tile) {
    PA_UNROLL
    for (int half = 0; half < 2; ++half) {
        bits_of_row(mask.words[0][half], p, tile, lane.row(0, half));
        PA_UNROLL
        for (int word = 0; word < kWords; ++word) mask.words[0][half][word] >>= 2 * lane.quad;
    }
}

// For each of a lane's two rows, which of the tile's keys have its id: a lane loads the ids of one key in 32,
// and votes say for one id at a time which keys have it. A warp's 16 rows rarely have more than two.
PA_DEVICE void equal_ids(uint32 (&equal)[2][kWords], const Params& p, const Lane& lane, const Work& work,
                         TileKeys keys) {
    const int64 ids = load_int(p.layout_ids + work.layout);
    const int* q_ids = p.q_ids + ids * p.seqlen_q;
    const int* k_ids = p.k_ids + ids * p.seqlen_k;
    int key_id[kWords];
    PA_UNROLL
    for (int word = 0; word < kWords; ++word) {
        const int64 key = keys.start + static_cast<int64>(keys.step) * (32 * word + lane.lane);
        key_id[word] = key < p.seqlen_k ? load_int(k_ids + key) : -1;
    }
    int row_id[2];  // -1: no key has it, or no longer waits
    PA_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int row = lane.row(0, half);
        row_id[half] = row < work.item.num_rows ? load_int(q_ids + row_position(work, row)) : -1;
        PA_UNROLL
        for (int word = 0; word < kWords; ++word) equal[half][word] = 0u;
    }
#pragma unroll 1
    for (;;) {
        const int waits = max_int(row_id[0], row_id[1]);
        const uint32 waiting = warp_ballot(waits >= 0);
        if (waiting == 0u) return;
        const int id = shuffle_int(waits, first_bit(waiting));
        PA_UNROLL
        for (int word = 0; word < kWords; ++word) {
            const uint32 found = warp_ballot(key_id[word] == id);
            PA_UNROLL
            for (int half = 0; half < 2; ++half)
                if (row_id[half] == id) equal[half][word] = found;
        }
        PA_UNROLL
        for (int half = 0; half < 2; ++half)
            if (row_id[half] == id) row_id[half] = -1;
    }
}

PA_DEVICE void mask_by_id_tile(TileMask& mask, const Params& p, const Lane& lane, const Work& work,
                               TileKeys keys, int same, int other) {
    uint32(&words)[2][kWords] = mask.words[0];
    equal_ids(words, p, lane, work, keys);
    uint32 exist[kWords];
    PA_UNROLL
    for (int word = 0; word < kWords; ++word)
        exist[word] =
            warp_ballot(keys.start + static_cast<int64>(keys.step) * (32 * word + lane.lane) < p.seqlen_k);
    PA_UNROLL
    for (int half = 0; half < 2; ++half) {
        uint32 bits[kWords];
        bits_of_row(bits, p, same, lane.row(0, half));
        uint32 others[kWords];
        bits_of_row(others, p, other, lane.row(0, half));
        PA_UNROLL
        for (int word = 0; word < kWords; ++word) {
            const uint32 kept = (words[half][word] & bits[word]) | (~words[half][word] & others[word]);
            words[half][word] = (kept & exist[word]) >> (2 * lane.quad);
        }
    }
}

PA_DEVICE void pack_weights(Weights& weights, const Scores& s) {
    PA_UNROLL
    for (int step = 0; step < kBlockK / 16; ++step) {
        PA_UNROLL
        for (int r = 0; r < 4; ++r) {
            const float* pair = &s[0][2 * step + r / 2][2 * (r % 2)];
            weights.a[step][r] = pack_pair<kDtype == kBfloat16>(pair[0], pair[1]);
        }
    }
}

// In full tiles the weights of tile n lie in buffer n % kWeightBuffers: those of the next tile are packed
// while the product with those of the last one runs. Elsewhere they lie in buffer 0.
PA_DEVICE void place_weights(Weights (&buffers)[kWeightBuffers], int tile) {
    if (tile % kWeightBuffers != 0) buffers[kWeightBuffers - 1] = buffers[0];
}
PA_DEVICE void fetch_weights(Weights (&buffers)[kWeightBuffers], int tile) {
    if (tile % kWeightBuffers != 0) buffers[0] = buffers[kWeightBuffers - 1];
}

// Distances to weights in place, and their sums.
PA_DEVICE void distances_to_weights(Scores& s, RowState& state) {
    // Two chains for each row's sum, as in row_maxima.
    float sums[2][2] = {{state.sum[0][0], 0.0f}, {state.sum[0][1], 0.0f}};
    PA_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) {
        PA_UNROLL
        for (int r = 0; r < 4; ++r) {
            s[0][n][r] = exp2_fast(-s[0][n][r]);
            sums[r / 2][r % 2] += s[0][n][r];
        }
    }
    PA_UNROLL
    for (int half = 0; half < 2; ++half) state.sum[0][half] = sums[half][0] + sums[half][1];
}

}  // namespace portattn
