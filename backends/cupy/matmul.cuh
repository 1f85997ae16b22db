// S = Q Kᵀ and O += P V of one tile. A warp owns kRowTiles tiles of 16 rows; S and O lie in registers as
// mma.m16n8k16 accumulators: element [tile][n][2*half + e] is row Lane::row(tile, half), column 8n + 2*quad +
// e. float32 has the same layout of S, but FMAs instead of tensor cores (TF32 has 10 bits), and O's columns
// are permuted so that a lane's are neighbours (out_column).
#pragma once

#include "memory.cuh"

namespace portattn {

using Scores = float[kRowTiles][kKeyTiles][4];
using Output = float[kRowTiles][kOutTiles][4];

constexpr int kQuerySteps = kQueryInRegisters ? kHeadDim / 16 : 1;

struct QueryFragments {
    uint32 a[kRowTiles][kQuerySteps][4];
};

// First of the two neighbouring columns of O that elements 0 and 1 (or 2 and 3) of tile n hold.
PA_DEVICE int out_column(const Lane& lane, int n) {
    if constexpr (kTensorCores) return 8 * n + 2 * lane.quad;
    return 16 * (n / 2) + 4 * lane.quad + 2 * (n % 2);
}

// Offsets in Q, K and V of the chunk that this lane addresses in the first ldmatrix.
struct Places {
    uint32 query, key, value;
};

PA_DEVICE Places lane_places(const Lane& lane) {
    Places places;
    places.query =
        kept(chunk_offset<kQueryPitch>(16 * lane.warp * kRowTiles + lane.lane % 16, lane.lane / 16));
    places.key = kept(chunk_offset<kQueryPitch>(lane.lane % 8 + 8 * (lane.lane / 16), (lane.lane / 8) % 2));
    places.value = kept(chunk_offset<kValuePitch>(lane.lane % 16, lane.lane / 16));
    return places;
}

// `query`: where the lane's place is.
PA_DEVICE void load_query_fragment(uint32 (&a)[4], uint32 query, int tile, int step) {
    ldmatrix_x4(a, other_chunk<kQueryPitch>(query, 2 * step) + 16 * tile * kQueryPitch);
}

PA_DEVICE void load_query(QueryFragments& fragments, uint32 query) {
    if constexpr (kQueryInRegisters) {
        PA_UNROLL
        for (int tile = 0; tile < kRowTiles; ++tile) {
            PA_UNROLL
            for (int step = 0; step < kQuerySteps; ++step)
                load_query_fragment(fragments.a[tile][step], query, tile, step);
        }
    }
}

// `query` and `key`: where the lane's places are.
PA_DEVICE void query_key_tensor(Scores& s, const QueryFragments& fragments, uint32 query, uint32 key) {
    PA_UNROLL
    for (int step = 0; step < kHeadDim / 16; ++step) {
        uint32 a[kRowTiles][4];
        PA_UNROLL
        for (int tile = 0; tile < kRowTiles; ++tile) {
            if constexpr (kQueryInRegisters) {
                PA_UNROLL
                for (int r = 0; r < 4; ++r) a[tile][r] = fragments.a[tile][step % kQuerySteps][r];
            } else {
                load_query_fragment(a[tile], query, tile, step);
            }
        }
        PA_UNROLL
        for (int pair = 0; pair < kKeyTiles / 2; ++pair) {
            uint32 b[4];
            ldmatrix_x4(b, other_chunk<kQueryPitch>(key, 2 * step) + 16 * pair * kQueryPitch);
            PA_UNROLL
            for (int tile = 0; tile < kRowTiles; ++tile) {
                mma_m16n8k16<kDtype == kBfloat16>(s[tile][2 * pair], a[tile], b[0], b[1]);
                mma_m16n8k16<kDtype == kBfloat16>(s[tile][2 * pair + 1], a[tile], b[2], b[3]);
            }
        }
    }
}

PA_DEVICE void dot4(float& sum, const Vec4& a, const Vec4& b) {
    sum = fma_f32(a.x, b.x, sum);
    sum = fma_f32(a.y, b.y, sum);
    sum = fma_f32(a.z, b.z, sum);
    sum = fma_f32(a.w, b.w, sum);
}

PA_DEVICE void query_key_fma(Scores& s, const Lane& lane, uint32 query, uint32 key) {
#pragma unroll 1
    for (int chunk = 0; chunk < kHeadDim / 4; ++chunk) {
        Vec4 a[kRowTiles][2];
        PA_UNROLL
        for (int tile = 0; tile < kRowTiles; ++tile) {
            PA_UNROLL
            for (int half = 0; half < 2; ++half)
                a[tile][half] =
                    shared_load_vec4(query + chunk_offset<kQueryPitch>(lane.row(tile, half), chunk));
        }
        PA_UNROLL
        for (int n = 0; n < kKeyTiles; ++n) {
            PA_UNROLL
            for (int e = 0; e < 2; ++e) {
                const Vec4 b =
                    shared_load_vec4(key + chunk_offset<kQueryPitch>(8 * n + 2 * lane.quad + e, chunk));
                PA_UNROLL
                for (int tile = 0; tile < kRowTiles; ++tile) {
                    dot4(s[tile][n][e], a[tile][0], b);
                    dot4(s[tile][n][2 + e], a[tile][1], b);
                }
            }
        }
    }
}

PA_DEVICE void query_key(Scores& s, const QueryFragments& fragments, const Lane& lane, const Places& places,
                         uint32 query, uint32 key) {
    PA_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
        PA_UNROLL
        for (int n = 0; n < kKeyTiles; ++n) {
            PA_UNROLL
            for (int r = 0; r < 4; ++r) s[tile][n][r] = 0.0f;
        }
    }
    if constexpr (kTensorCores) {
        query_key_tensor(s, fragments, query + places.query, key + places.key);
    } else {
        query_key_fma(s, lane, query, key);
    }
}

PA_DEVICE void weights_value_fma(Output& o, const Scores& p, const Lane& lane, uint32 value) {
    const uint32 address = value + 16 * lane.quad;  // of row 0
    PA_UNROLL
    for (int key = 0; key < kBlockK; ++key) {
        float weight[kRowTiles][2];
        const int source = 4 * lane.group + (key % 8) / 2;  // the lane of this row that holds the key
        PA_UNROLL
        for (int tile = 0; tile < kRowTiles; ++tile) {
            weight[tile][0] = shuffle(p[tile][key / 8][key % 2], source);
            weight[tile][1] = shuffle(p[tile][key / 8][2 + key % 2], source);
        }
        PA_UNROLL
        for (int pair = 0; pair < kOutTiles / 2; ++pair) {
            const uint32 chunk = other_chunk<kValuePitch>(address, 4 * pair ^ (key & 7));
            const Vec4 v = shared_load_vec4(chunk + key * kValuePitch);
            PA_UNROLL
            for (int tile = 0; tile < kRowTiles; ++tile) {
                PA_UNROLL
                for (int half = 0; half < 2; ++half) {
                    float (&left)[4] = o[tile][2 * pair];
                    float (&right)[4] = o[tile][2 * pair + 1];
                    left[2 * half] = fma_f32(weight[tile][half], v.x, left[2 * half]);
                    left[2 * half + 1] = fma_f32(weight[tile][half], v.y, left[2 * half + 1]);
                    right[2 * half] = fma_f32(weight[tile][half], v.z, right[2 * half]);
                    right[2 * half + 1] = fma_f32(weight[tile][half], v.w, right[2 * half + 1]);
                }
            }
        }
    }
}

}  // namespace portattn
