// Repeats GPU launches with other addresses: what Python would do for each argument is done here.
#include "launch.h"

#include <cstring>

namespace {

struct alignas(128) Block {
    uint8_t bytes[PA_LAUNCH_MAX_BYTES];
};

int launch_one(const pa_launch& launch, pa_launch_kernel launch_kernel, pa_replace_address replace_address,
               const uint64_t* addresses, void* stream) {
    Block block;
    void* arguments[PA_LAUNCH_MAX_ARGUMENTS];
    std::memcpy(block.bytes, launch.arguments, static_cast<size_t>(launch.num_bytes));
    for (int32_t n = 0; n < launch.num_patches; ++n) {
        const pa_patch& patch = launch.patches[n];
        const uint64_t address = addresses[patch.source] + static_cast<uint64_t>(patch.offset);
        if (!patch.is_map) {
            std::memcpy(block.bytes + patch.at, &address, sizeof address);
        } else {
            const int status = replace_address(block.bytes + patch.at, reinterpret_cast<void*>(address));
            if (status) return status;
        }
    }
    for (int32_t n = 0; n < launch.num_arguments; ++n) arguments[n] = block.bytes + launch.starts[n];
    return launch_kernel(launch.function, launch.grid, 1, 1, launch.threads, 1, 1, launch.shared_bytes,
                         stream, arguments, nullptr);
}

}  // namespace

int64_t portattn_launch(const pa_launch* launches, int64_t count, pa_launch_kernel launch_kernel,
                        pa_replace_address replace_address, const uint64_t* addresses, void* stream) {
    for (int64_t n = 0; n < count; ++n) {
        const pa_launch& launch = launches[n];
        if (launch.struct_size != sizeof(pa_launch) || launch.abi_version != PA_ABI_VERSION ||
            launch.num_bytes > PA_LAUNCH_MAX_BYTES || launch.num_arguments > PA_LAUNCH_MAX_ARGUMENTS)
            return -1;
        if (!launch.grid) continue;
        const int status = launch_one(launch, launch_kernel, replace_address, addresses, stream);
        if (status) return (n << 32) | static_cast<uint32_t>(status);
    }
    return 0;
}
