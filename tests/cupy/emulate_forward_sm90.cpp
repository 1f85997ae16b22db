// backends/cupy/forward_sm90.cu as a C function that runs on a CPU; compiled with the macros of one variant.
#include "emulator_sm90.hpp"
#include "forward_sm90.cu"

// order: see emulator_core.hpp. Returns what went wrong, or nullptr.
extern "C" __attribute__((visibility("default"))) const char* emulate(
    const void* params_bytes, int64_t params_size, const void* hopper_bytes, int64_t hopper_size, int grid,
    int threads, int shared_bytes, int order) {
    portattn::Params params;
    portattn::Hopper hopper;
    if (params_size != static_cast<int64_t>(sizeof(params))) return "Params has another size";
    if (hopper_size != static_cast<int64_t>(sizeof(hopper))) return "Hopper has another size";
    std::memcpy(&params, params_bytes, sizeof(params));
    std::memcpy(&hopper, hopper_bytes, sizeof(hopper));
    return portattn::emulator::run_grid([&params, &hopper] { portattn_forward_sm90(params, hopper); }, grid,
                                        threads, shared_bytes, order);
}
