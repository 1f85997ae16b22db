// backends/cupy/forward_sm80.cu as a C function that runs on a CPU; compiled with the macros of one variant.
#include "emulator.hpp"
#include "forward_sm80.cu"

// order: see emulator_core.hpp. Returns what went wrong, or nullptr.
extern "C" __attribute__((visibility("default"))) const char* emulate(const void* bytes, int64_t size,
                                                                      int grid, int threads, int shared_bytes,
                                                                      int order) {
    portattn::Params params;
    if (size != static_cast<int64_t>(sizeof(params))) return "the params have another size";
    std::memcpy(&params, bytes, sizeof(params));
    return portattn::emulator::run_grid([&params] { portattn_forward_sm80(params); }, grid, threads,
                                        shared_bytes, order);
}
