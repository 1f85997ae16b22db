// The functions of backends/cupy/decode_ptx.cuh in C++, for emulator.hpp.
#ifndef PORTATTN_DECODE_PTX_CUH
#define PORTATTN_DECODE_PTX_CUH

#include "emulator.hpp"

namespace portattn {

PA_DEVICE int shuffle_int(int v, int lane) {
    const uint32 bits = static_cast<uint32>(v);
    emulator::publish(&bits, 1);
    const int result = static_cast<int>(emulator::published(lane)[0]);
    emulator::warp_wait();
    return result;
}

PA_DEVICE uint32 warp_ballot(bool v) {
    const uint32 word = v ? 1u : 0u;
    emulator::publish(&word, 1);
    uint32 result = 0u;
    for (int lane = 0; lane < 32; ++lane) result |= emulator::published(lane)[0] << lane;
    emulator::warp_wait();
    return result;
}

PA_DEVICE float log2_fast(float x) { return std::log2(x); }
PA_DEVICE int count_bits(uint32 v) { return __builtin_popcount(v); }

PA_DEVICE void prefetch_line(const void* p) {
    volatile unsigned char first = *static_cast<const unsigned char*>(p);  // a sanitizer sees a stray one
    static_cast<void>(first);
}

PA_DEVICE int atomic_increment_ordered(int* p) { return (*p)++; }

}  // namespace portattn

#endif  // PORTATTN_DECODE_PTX_CUH
