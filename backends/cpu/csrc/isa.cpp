#include "isa.hpp"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace portattn {
namespace cpu {

#if defined(__x86_64__)
namespace v2 {
extern const Kernels kernels;
}
namespace v3 {
extern const Kernels kernels;
}
namespace v4 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}
#else
namespace neon {
extern const Kernels kernels;
}
#endif

namespace {

struct Entry {
    const Kernels* kernels;
    bool (*present)();
};

#if defined(__x86_64__)
bool has_v2() { return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt"); }
bool has_v3() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
}
bool has_v4() {
    return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}
// AMX state is off until the process asks the kernel for it (Linux, arch_prctl(2): ARCH_REQ_XCOMP_PERM).
bool has_amx() {
    unsigned a, b, c, d;
    if (!has_v4() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned BF16_TILES = 1u << 22, TILES = 1u << 24;
    if ((d & BF16_TILES) == 0 || (d & TILES) == 0) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & (1u << 5)) == 0) return false;  // AVX512_BF16
#if defined(__linux__)
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}
const Entry ENTRIES[] = {
    {&amx::kernels, has_amx}, {&v4::kernels, has_v4}, {&v3::kernels, has_v3}, {&v2::kernels, has_v2}};
#else
bool always() { return true; }
const Entry ENTRIES[] = {{&neon::kernels, always}};
#endif

const Kernels* selected = nullptr;

// Best first; null: none of that name here.
const Kernels* find(const char* name) {
    for (const Entry& entry : ENTRIES)
        if ((!name || strcmp(name, entry.kernels->name) == 0) && entry.present()) return entry.kernels;
    return nullptr;
}

}  // namespace

const Kernels* kernels_in_use(char* err, int64_t err_len) {
    const Kernels* kernels = __atomic_load_n(&selected, __ATOMIC_ACQUIRE);
    if (kernels) return kernels;
    const char* name = getenv("PORTATTN_CPU_ISA");
    if (name && !*name) name = nullptr;
    kernels = find(name);
    if (!kernels) {
        snprintf(
            err, (size_t)err_len,
            "PORTATTN_CPU_ISA is '%s', which this CPU or this build does not have; allowed are x86-64-v2, "
            "x86-64-v3, x86-64-v4, x86-64-v4+amx (by CPU) or neon on aarch64. Unset it to take the best one",
            name ? name : "");
        return nullptr;
    }
    __atomic_store_n(&selected, kernels, __ATOMIC_RELEASE);
    return kernels;
}

}  // namespace cpu
}  // namespace portattn

using namespace portattn::cpu;

extern "C" const char* portattn_cpu_isa(void) {
    char err[256];
    const Kernels* kernels = kernels_in_use(err, sizeof err);
    return kernels ? kernels->name : "";
}

extern "C" int32_t portattn_cpu_panel(void) {
    char err[256];
    const Kernels* kernels = kernels_in_use(err, sizeof err);
    return kernels ? kernels->panel : 0;
}

extern "C" int32_t portattn_cpu_select_isa(const char* name) {
    const Kernels* kernels = name ? find(name) : nullptr;
    if (name && !kernels) return -1;
    __atomic_store_n(&selected, kernels, __ATOMIC_RELEASE);
    return 0;
}
