// Instructions of the decode kernel beside those of ptx.cuh. Tests replace this header too.
#ifndef PORTATTN_DECODE_PTX_CUH
#define PORTATTN_DECODE_PTX_CUH

#include "ptx.cuh"

namespace portattn {

PA_DEVICE int shuffle_int(int v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
PA_DEVICE uint32 warp_ballot(bool v) { return __ballot_sync(0xffffffffu, v); }
PA_DEVICE int count_bits(uint32 v) { return __popc(v); }

// Within 2**-22 of the logarithm, or relative to it.
PA_DEVICE float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The line of 128 bytes of an address that exists, into the second-level cache.
PA_DEVICE void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Adds 1 and returns the value before. What this thread, and those that it shared a barrier with, wrote
// before is there for who sees the sum; what others wrote before they added is there for this thread.
PA_DEVICE int atomic_increment_ordered(int* p) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(p) : "memory");
    return before;
}

}  // namespace portattn

#endif  // PORTATTN_DECODE_PTX_CUH
