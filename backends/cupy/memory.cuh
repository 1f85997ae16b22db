// Rows of Q, K and V: from global memory, in steps, to swizzled shared memory.
#pragma once

#include "config.cuh"

namespace portattn {

// Offset of a 16-byte chunk. Eight rows of one chunk fall into eight different bank groups, so that ldmatrix
// and the copies have no bank conflicts; the pattern only mixes chunks within one row.
template <int kPitch>
PA_DEVICE uint32 chunk_offset(int row, int chunk) {
    static_assert(kPitch % 64 == 0, "a row is a multiple of four chunks");
    const int mixed = kPitch % 128 == 0 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
    return static_cast<uint32>(row * kPitch + (mixed << 4));
}

// From the address of chunk c of a row to that of chunk c ^ chunk. Where `chunk` is known at compile time
// this is one XOR and an immediate offset: without it the compiler keeps an address per chunk in registers.
template <int kPitch>
PA_DEVICE uint32 other_chunk(uint32 address, int chunk) {
    constexpr int kMixed = kPitch % 128 == 0 ? 7 : 3;
    return (address ^ static_cast<uint32>((chunk & kMixed) << 4)) +
           static_cast<uint32>((chunk & ~kMixed) << 4);
}

PA_DEVICE float load_element(const void* base, int64 index) {
    if constexpr (kDtype == kFloat32) {
        return load_float(static_cast<const float*>(base) + index);
    } else {
        const uint16 bits = load_half(static_cast<const uint16*>(base) + index);
        return kDtype == kBfloat16 ? bfloat16_to_float(bits) : half_to_float(bits);
    }
}

// Up to 16 bytes from an address that is only aligned to its elements.
PA_DEVICE void copy_unaligned(uint32 shared, const char* source, int bytes) {
    uint32 words[4] = {0u, 0u, 0u, 0u};
    PA_UNROLL
    for (int w = 0; w < 4; ++w) {
        if constexpr (kElementBytes == 4) {
            if (4 * w < bytes) words[w] = load_word(reinterpret_cast<const uint32*>(source) + w);
        } else {
            const uint16* halves = reinterpret_cast<const uint16*>(source) + 2 * w;
            if (4 * w < bytes) words[w] = load_half(halves);
            if (4 * w + 2 < bytes) words[w] |= static_cast<uint32>(load_half(halves + 1)) << 16;
        }
    }
    shared_store_words(shared, words);
}

// Rows first + step * r, r in [0, kRows), of one head; rows at or past `limit` and columns past `width_bytes`
// become zeros. Asynchronous: the caller commits and waits.
//
// Threads fill panels of 128 (or 64) bytes of a row: a thread keeps its place in the panel and walks down the
// rows by a constant, so that addresses are sums and the swizzle is that of its first row. Most tiles are
// whole, and then nothing but the address is computed per copy.
template <int kRows, int kPitch>
PA_DEVICE void load_rows(uint32 shared, const char* base, int64 stride_bytes, int first, int step, int limit,
                         int width_bytes) {
    constexpr int kPanel = kPitch % 128 == 0 ? 8 : 4;  // chunks
    constexpr int kPanels = kPitch / (16 * kPanel);
    constexpr int kRowsPerRound = kThreads / kPanel;
    const int thread = thread_index();
    const int column = 16 * (thread % kPanel);
    const uint32 target = shared + chunk_offset<kPitch>(thread / kPanel, thread % kPanel);
    // 64 bits: a stepped tile may reach past 2^31 before it is cut at `limit`.
    int64 position = first + static_cast<int64>(step) * (thread / kPanel);
    const char* source = base + position * stride_bytes + column;
    const int64 source_step = static_cast<int64>(kRowsPerRound) * step * stride_bytes;
    if (kAligned && kRows % kRowsPerRound == 0 && width_bytes == kPitch &&
        first + static_cast<int64>(kRows - 1) * step < limit) {
        PA_UNROLL
        for (int row = 0; row < kRows; row += kRowsPerRound) {
            PA_UNROLL
            for (int panel = 0; panel < kPanels; ++panel)
                cp_async_16(target + row * kPitch + 16 * kPanel * panel, source + 16 * kPanel * panel, 16);
            source += source_step;
        }
        return;
    }
    PA_UNROLL
    for (int row = 0; row < kRows; row += kRowsPerRound) {
        if (kRows % kRowsPerRound != 0 && row + thread / kPanel >= kRows) break;
        PA_UNROLL
        for (int panel = 0; panel < kPanels; ++panel) {
            int bytes = width_bytes - column - 16 * kPanel * panel;
            bytes = bytes > 16 ? 16 : bytes;
            if (position >= limit || bytes < 0) bytes = 0;
            const char* chunk = source + 16 * kPanel * panel;
            const uint32 place = target + row * kPitch + 16 * kPanel * panel;
            if constexpr (kAligned) {
                cp_async_16(place, bytes > 0 ? chunk : base, bytes);
            } else {
                copy_unaligned(place, chunk, bytes);
            }
        }
        position += static_cast<int64>(kRowsPerRound) * step;
        source += source_step;
    }
}

// Multiplies the query tile by -1 or 0. The scale's sign goes into the query, so that the softmax may take
// the maximum of unscaled scores.
PA_DEVICE void scale_query(uint32 shared, int factor) {
    const uint32 sign = kElementBytes == 4 ? 0x80000000u : 0x80008000u;
    for (int chunk = thread_index(); chunk < kQueryBytes / 16; chunk += kThreads) {
        uint32 words[4];
        shared_load_words(words, shared + 16 * chunk);
        PA_UNROLL
        for (int w = 0; w < 4; ++w) words[w] = factor == 0 ? 0u : words[w] ^ sign;
        shared_store_words(shared + 16 * chunk, words);
    }
}

}  // namespace portattn
