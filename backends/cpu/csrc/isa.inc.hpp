// The body of every isa_*.cpp: all kernels in namespace PA_ISA, and their table.
#include "backward_rows.hpp"
#include "decode.hpp"
#include "forward.hpp"
#if defined(PA_ISA_AMX)
#include "amx_backward.hpp"
#include "amx_forward.hpp"
#endif

namespace portattn {
namespace cpu {
namespace PA_ISA {

// Independent multiply-adds, enough to hide their latency. Named variables, because an array would live in
// memory; the empty asm keeps the compiler from folding steps.
#if defined(__x86_64__)
#define PA_KEEP(x) asm volatile("" : "+v"(x))
#else
#define PA_KEEP(x) asm volatile("" : "+w"(x))
#endif
#define PA_STEP(a) \
    a = a * x + y; \
    PA_KEEP(a)
static double fma_flops(int64_t steps) {
    vf x = splat(0.999f), y = splat(1e-3f);
    vf a = x, b = x, c = x, d = x, e = x, f = x, g = x, h = x, i = x, j = x, k = x, l = x;
    for (int64_t n = 0; n < steps; ++n) {
        PA_STEP(a);
        PA_STEP(b);
        PA_STEP(c);
        PA_STEP(d);
        PA_STEP(e);
        PA_STEP(f);
        PA_STEP(g);
        PA_STEP(h);
        PA_STEP(i);
        PA_STEP(j);
        PA_STEP(k);
        PA_STEP(l);
    }
    return 2.0 * 12 * VL * (double)steps;
}
#undef PA_STEP
#undef PA_KEEP

static float read_sum(const float* data, int64_t count) {
    vf sum[8];
    for (int i = 0; i < 8; ++i) sum[i] = vf{};
    for (int64_t n = 0; n + 8 * VL <= count; n += 8 * VL)
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) sum[i] += loadu(data + n + i * VL);
    for (int i = 1; i < 8; ++i) sum[0] += sum[i];
    return sum_of(sum[0]);
}

#if !defined(PA_ISA_AMX)
static int64_t pack_bytes(const Call&) { return 0; }
static int64_t pack_tasks(const Call&) { return 0; }
static void pack_task(const Call&, int64_t) {}
constexpr auto main_scratch = forward_scratch;
constexpr auto main_item = forward_item;
constexpr auto any_backward = fma_backward;
constexpr bool packs_tiles = false;
#else
constexpr auto main_scratch = amx_scratch;
constexpr auto main_item = amx_item;
constexpr auto any_backward = amx_backward;
constexpr bool packs_tiles = true;
#endif

static int64_t backward_scratch(const BackwardCall& call) { return any_backward(call, 0, 0, nullptr); }
static void backward_task(const BackwardCall& call, int32_t pass, int64_t index, void* scratch) {
    any_backward(call, pass, index, scratch);
}

extern const Kernels kernels;
const Kernels kernels = {PA_ISA_NAME,   W,         main_scratch,  main_item,        decode_scratch,
                         decode_item,   fma_flops, read_sum,      packs_tiles,      pack_bytes,
                         pack_tasks,    pack_task, backward_rows, backward_scratch, backward_task,
                         backward_store};

}  // namespace PA_ISA
}  // namespace cpu
}  // namespace portattn
