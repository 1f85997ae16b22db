// The C ABI of repeated GPU launches. The driver's functions come as pointers: nothing is linked.
#pragma once
#include "portattn.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    PA_LAUNCH_MAX_BYTES = 8192,  // of a kernel's arguments
    PA_LAUNCH_MAX_ARGUMENTS = 256
};

// 8 bytes of the arguments, or the address in a tensor map, that change from call to call.
typedef struct {
    int32_t at;      // where in the arguments, in bytes
    int32_t source;  // which of the call's addresses
    int64_t offset;  // added to it
    int32_t is_map;  // a tensor map begins there
    int32_t reserved;
} pa_patch;

// One launch as it was the last time; blocks and grid are one-dimensional.
typedef struct {
    uint32_t struct_size;
    uint32_t abi_version;
    void* function;            // CUfunction
    const uint8_t* arguments;  // all of them; never written
    const int32_t* starts;     // where each begins, in bytes; a tensor map at a multiple of 128
    const pa_patch* patches;
    int32_t num_bytes, num_arguments, num_patches;
    uint32_t grid, threads, shared_bytes;
} pa_launch;

// cuLaunchKernel and cuTensorMapReplaceAddress.
typedef int (*pa_launch_kernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                                void* stream, void** arguments, void** extra);
typedef int (*pa_replace_address)(void* map, void* address);

// Launches one after the other with the addresses of a call. Thread-safe: arguments are copied.
// Returns 0, or the driver's status in the low 32 bits and the index of the launch that failed above them;
// -1 for a struct of another version or size.
PA_EXPORT int64_t portattn_launch(const pa_launch* launches, int64_t count, pa_launch_kernel launch_kernel,
                                  pa_replace_address replace_address, const uint64_t* addresses,
                                  void* stream);

#ifdef __cplusplus
}
#endif
