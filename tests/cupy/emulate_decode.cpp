// backends/cupy/decode.cu as a C function that runs on a CPU; compiled with the macros of one variant.
// First: it stands in for ptx.cuh and decode_ptx.cuh.
// clang-format off
#include "emulator_decode.hpp"
#include "decode.cu"
// clang-format on

// order: see emulator_core.hpp. Returns what went wrong, or nullptr.
extern "C" __attribute__((visibility("default"))) const char* emulate(const void* bytes, int64_t size,
                                                                      int grid, int threads, int shared_bytes,
                                                                      int order) {
    portattn::Params params;
    if (size != static_cast<int64_t>(sizeof(params))) return "the params have another size";
    std::memcpy(&params, bytes, sizeof(params));
    return portattn::emulator::run_grid([&params] { portattn_decode(params); }, grid, threads, shared_bytes,
                                        order);
}
