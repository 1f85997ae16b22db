// Runs a function for the indices [0, count) on several threads.
#pragma once
#include <stdint.h>

namespace portattn {
namespace cpu {

// fn(context, index) for every index, each once, in any order; returns when all are done. Each thread begins
// with a share of neighbouring indices. Uses the OpenMP pool that torch already has (a second pool beside a
// spinning one costs up to 4x on 2 cores), else a small pool that sleeps between calls.
void parallel_for(int64_t count, int32_t threads, void (*fn)(void*, int64_t), void* context);

}  // namespace cpu
}  // namespace portattn
