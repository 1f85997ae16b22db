// What one compiled variant is: the macros come from forward_sm80.py (`Variant.defines`), a closed list per
// (dtype, padded head dims, score features, alignment, config).
#pragma once

#include "ptx.cuh"

namespace portattn {

enum { kFloat16 = 0, kBfloat16 = 1, kFloat32 = 2 };

constexpr int kDtype = PA_DTYPE;
constexpr int kHeadDim = PA_HEAD_DIM;     // padded to a multiple of 32
constexpr int kHeadDimV = PA_HEAD_DIM_V;  // likewise
constexpr int kBlockQ = PA_BLOCK_Q;
constexpr int kBlockK = PA_BLOCK_K;
constexpr int kNumWarps = PA_NUM_WARPS;
constexpr int kNumStages = PA_NUM_STAGES;
constexpr int kBlocksPerSm = PA_BLOCKS_PER_SM;  // registers are limited so that as many fit
constexpr bool kAligned = PA_ALIGNED;           // every row of Q, K, V and O starts at a multiple of 16 bytes
constexpr bool kSoftcap = PA_SOFTCAP;
constexpr bool kAlibi = PA_ALIBI;
constexpr bool kBias = PA_BIAS;
#ifdef PA_SCALED
constexpr bool kScaled = PA_SCALED;  // scores take the scale, of any sign, before the softmax
#else
constexpr bool kScaled = false;
#endif

constexpr bool kTensorCores = kDtype != kFloat32;
constexpr bool kScoreTerms = kSoftcap || kAlibi || kBias || kScaled;
constexpr int kElementBytes = kTensorCores ? 2 : 4;
constexpr int kThreads = 32 * kNumWarps;
constexpr int kRowTiles = kBlockQ / (16 * kNumWarps);  // tiles of 16 rows per warp
constexpr int kKeyTiles = kBlockK / 8;
constexpr int kOutTiles = kHeadDimV / 8;
constexpr int kWords = (kBlockK + 31) / 32;  // words of a row of a bit tile

constexpr int kQueryPitch = kHeadDim * kElementBytes;  // bytes of a row in shared memory; K's too
constexpr int kValuePitch = kHeadDimV * kElementBytes;
constexpr int kQueryBytes = kBlockQ * kQueryPitch;
constexpr int kKeyBytes = kBlockK * kQueryPitch;
constexpr int kValueBytes = kBlockK * kValuePitch;
constexpr int kStageBytes = 16 * 32 * 4;  // of a warp, for storing O; over the tiles when they are done with

// Q's fragments stay in registers where ptxas then still needs no spills (bounds found by compiling); else
// they are read again from shared memory for each tile.
constexpr int kFragmentRegisters = kRowTiles * (kHeadDimV / 2 + kBlockK / 2 + kHeadDim / 4);
constexpr bool kQueryInRegisters = kTensorCores && kRowTiles * kHeadDim <= 128 && kFragmentRegisters <= 144;

static_assert(kBlockQ == 16 * kNumWarps * kRowTiles, "block_q must be a multiple of 16 rows a warp");
static_assert(kBlockK % 16 == 0, "P V takes 16 keys at a time");
static_assert(kHeadDim % 32 == 0 && kHeadDimV % 32 == 0, "head dims are padded to 32");

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct Lane {
    int warp, lane, group, quad;  // group = lane / 4: the fragment's row; quad = lane % 4: its column pair

    // Row, within the block, of a fragment's element: half 0 is row `group`, half 1 is row `group` + 8.
    PA_DEVICE int row(int tile, int half) const { return 16 * (warp * kRowTiles + tile) + group + 8 * half; }
};

PA_DEVICE Lane this_lane() {
    const int thread = thread_index();
    return Lane{thread / 32, thread % 32, (thread % 32) / 4, thread % 4};
}

}  // namespace portattn
