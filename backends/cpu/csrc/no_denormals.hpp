// For the life of an object, denormal numbers count as 0.
#pragma once
#include <stdint.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace portattn {
namespace cpu {

// Denormal numbers count as 0 while it lives. A key far below its row's maximum has a denormal weight, and
// one product with it costs a hundred others: on a real text whole calls took three times as long.
class NoDenormals {
  public:
#if defined(__x86_64__)
    NoDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }  // FTZ and DAZ
    ~NoDenormals() { _mm_setcsr(before_); }

  private:
    unsigned before_;
#else
    NoDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" : : "r"(before_ | (1ull << 24)));  // FZ
    }
    ~NoDenormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

  private:
    uint64_t before_;
#endif
};

}  // namespace cpu
}  // namespace portattn
