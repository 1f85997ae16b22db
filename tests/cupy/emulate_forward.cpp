// backends/cupy/forward_sm80.cu as a C function that runs on a CPU; compiled with the macros of one variant.
#include "emulator.hpp"
#include "forward_sm80.cu"

// order: bit 0 blocks, bit 1 threads from last to first, bit 2 cp.async as late as allowed.
extern "C" __attribute__((visibility("default"))) void emulate(const void* bytes, int64_t size, int grid,
                                                               int threads, int shared_bytes, int order) {
    portattn::Params params;
    if (size != static_cast<int64_t>(sizeof(params))) std::abort();
    std::memcpy(&params, bytes, sizeof(params));
    portattn::emulator::body = [&params] { portattn_forward_sm80(params); };
    for (int n = 0; n < grid; ++n)
        portattn::emulator::run_block((order & 1) != 0 ? grid - 1 - n : n, threads, shared_bytes,
                                      (order & 2) != 0, (order & 4) != 0);
}
