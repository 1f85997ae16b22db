// What one compiled variant of the decode kernel is: the macros come from config_decode.py
// (`DecodeVariant.defines`), a closed list per (dtype, padded head dims, score features, alignment, config).
#pragma once

#include "decode_ptx.cuh"

namespace portattn {

constexpr bool kBfloat16 = PA_BFLOAT16;   // else float16
constexpr int kHeadDim = PA_HEAD_DIM;     // padded to a multiple of 32
constexpr int kHeadDimV = PA_HEAD_DIM_V;  // likewise
constexpr int kBlockQ = PA_BLOCK_Q;       // rows of a block: (query, query head) pairs of one KV head
constexpr int kBlockK = PA_BLOCK_K;       // keys of a strip
constexpr int kNumWarps = PA_NUM_WARPS;
constexpr int kNumStages = PA_NUM_STAGES;  // strips of a key group under way
constexpr int kBlocksPerSm = PA_BLOCKS_PER_SM;
constexpr bool kAligned = PA_ALIGNED;  // every row of Q, K, V and O starts at a multiple of 16 bytes
constexpr bool kSoftcap = PA_SOFTCAP;
constexpr bool kAlibi = PA_ALIBI;
constexpr bool kBias = PA_BIAS;

constexpr bool kScoreTerms = kSoftcap || kAlibi || kBias;
constexpr int kThreads = 32 * kNumWarps;
constexpr int kRowGroups = kBlockQ / 16;  // warps that share a strip: each takes 16 rows
constexpr int kKeyGroups = kNumWarps / kRowGroups;
constexpr int kGroupThreads = 32 * kRowGroups;
constexpr int kKeyTiles = kBlockK / 8;
constexpr int kOutTiles = kHeadDimV / 8;

// The query's fragments stay in registers where those suffice; else they are read for each strip.
constexpr bool kQueryInRegisters = kHeadDim <= 128;

// O leaves few registers: what can be found again is not kept.
constexpr bool kFewRegisters = kHeadDimV > 128;

// Pieces of a row of work that are loaded at once when they are merged: four registers each.
constexpr int kMergeBatch = 10;

// Shared memory: the strips, then what merging the key groups takes, then the query.
constexpr int kKeyPitch = 2 * kHeadDim;  // bytes of a row
constexpr int kValuePitch = 2 * kHeadDimV;
constexpr int kStripBytes = kBlockK * (kKeyPitch + kValuePitch);
constexpr int kStageBytes = kNumWarps * 4 * kHeadDimV * 4;  // four rows of O a warp
constexpr int kStatsBytes = kNumWarps * 16 * 16;            // maximum and sum of each row of each warp
constexpr int kStageOffset = kKeyGroups * kNumStages * kStripBytes;
constexpr int kStatsOffset = kStageOffset + kStageBytes;
constexpr int kQueryOffset = kStatsOffset + kStatsBytes;
constexpr int kFlagOffset = kQueryOffset + kBlockQ * kKeyPitch;

static_assert(kBlockQ % 16 == 0 && kNumWarps % kRowGroups == 0, "a warp takes 16 rows of a strip");
static_assert(kBlockK % 16 == 0, "P V takes 16 keys at a time");
static_assert(kHeadDim % 32 == 0 && kHeadDimV % 32 == 0, "head dims are padded to 32");
static_assert(kNumStages >= 2, "a strip is loaded while another is computed");
static_assert(4 * kThreads <= kStageBytes, "find_share's sums lie where O is staged");

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct Lane {
    int thread, lane, group, quad;  // group = lane / 4: the fragment's row; quad = lane % 4: its column pair
    int row_group, key_group;

    // Row, within the block, of a fragment's element: half 0 is row `group`, half 1 is row `group` + 8.
    PA_DEVICE int row(int half) const { return 16 * row_group + group + 8 * half; }
};

PA_DEVICE Lane this_lane() {
    const int thread = thread_index();
    const int warp = thread / 32;
    return Lane{thread, thread % 32, (thread % 32) / 4, thread % 4, warp % kRowGroups, warp / kRowGroups};
}

// All threads that load and read the same strips.
PA_DEVICE void group_barrier() {
    if constexpr (kRowGroups == 1) {
        warp_barrier();
    } else {
        block_barrier();
    }
}

// Offset of a 16-byte chunk. Eight rows of one chunk fall into eight different bank groups, so that ldmatrix
// and the copies have no bank conflicts; the pattern only mixes chunks within one row.
template <int kPitch>
PA_DEVICE uint32 chunk_offset(int row, int chunk) {
    static_assert(kPitch % 64 == 0, "a row is a multiple of four chunks");
    const int mixed = kPitch % 128 == 0 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
    return static_cast<uint32>(row * kPitch + (mixed << 4));
}

// From the address of chunk c of a row to that of chunk c ^ chunk: with a `chunk` known at compile time one
// XOR and an immediate offset.
template <int kPitch>
PA_DEVICE uint32 other_chunk(uint32 address, int chunk) {
    constexpr int kMixed = kPitch % 128 == 0 ? 7 : 3;
    return (address ^ static_cast<uint32>((chunk & kMixed) << 4)) +
           static_cast<uint32>((chunk & ~kMixed) << 4);
}

PA_DEVICE float load_element(const void* base, int64 index) {
    const uint16 bits = load_half(static_cast<const uint16*>(base) + index);
    return kBfloat16 ? bfloat16_to_float(bits) : half_to_float(bits);
}

PA_DEVICE int min_int(int a, int b) { return a < b ? a : b; }
PA_DEVICE int max_int(int a, int b) { return a > b ? a : b; }
PA_DEVICE int divide_up(int a, int b) { return (a + b - 1) / b; }

}  // namespace portattn
