// The functions of backends/cupy/ptx.cuh in C++, so that a kernel runs on a CPU, thread for thread.
//
// One block at a time; each CUDA thread is a fiber that runs until it meets a barrier or a warp-wide
// instruction. The order of fibers and blocks can be reversed, and cp.async copies either at once or as late
// as allowed: a missing wait or barrier then shows as a wrong result in one of the two. Fragment layouts
// after the PTX ISA: "Matrix Fragments for mma.m16n8k16", "Warp-level matrix load: ldmatrix".
#ifndef PORTATTN_PTX_CUH
#define PORTATTN_PTX_CUH

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define PA_DEVICE inline
#define PA_KERNEL static
#define PA_GRID_CONSTANT const
#define PA_LAUNCH_BOUNDS(threads, blocks)
#define PA_UNROLL

namespace portattn {

typedef uint32_t uint32;
typedef uint16_t uint16;
typedef long long int64;

struct Vec4 {
    float x, y, z, w;
};

namespace emulator {

struct Copy {
    uint32 shared;
    const void* global;
    int bytes;
};

struct Fiber {
    jmp_buf context;
    std::unique_ptr<char[]> stack;
    bool started = false;
    bool done = false;
    int waits_for = -1;                     // generation of the block barrier; -1: it can run
    std::vector<std::vector<Copy>> groups;  // committed, oldest first
    std::vector<Copy> open;
};

struct Barrier {
    int arrived = 0;
    int generation = 0;
};

struct Block {
    int index = 0;
    int threads = 0;
    int current = 0;
    bool late_copies = false;
    jmp_buf scheduler;
    std::vector<Fiber> fibers;
    std::vector<unsigned char> shared;
    Barrier barrier;
    std::vector<Barrier> warp_barriers;
    uint32 exchange[64][32][8];  // per warp and lane: what a warp-wide instruction publishes
};

inline Block* block = nullptr;
inline std::function<void()> body;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulator: %s (block %d, thread %d)\n", what, block->index, block->current);
    std::abort();
}

inline void yield_fiber() {
    if (_setjmp(block->fibers[block->current].context) == 0) _longjmp(block->scheduler, 1);
}

// Returns the generation to wait for, or -1 if all have come.
inline int arrive(Barrier& barrier, int count) {
    if (++barrier.arrived < count) return barrier.generation;
    barrier.arrived = 0;
    ++barrier.generation;
    return -1;
}

inline int warp() { return block->current / 32; }
inline int lane() { return block->current % 32; }

inline void warp_wait() {
    Barrier& barrier = block->warp_barriers[warp()];
    const int generation = arrive(barrier, 32);
    while (barrier.generation == generation) yield_fiber();
}

inline void block_wait() {
    const int generation = arrive(block->barrier, block->threads);
    if (generation < 0) return;
    block->fibers[block->current].waits_for = generation;
    while (block->barrier.generation == generation) yield_fiber();
    block->fibers[block->current].waits_for = -1;
}

inline unsigned char* shared_at(uint32 address, int bytes, int alignment) {
    if (address % alignment != 0) fail("misaligned shared memory access");
    if (address + bytes > block->shared.size()) fail("shared memory access out of bounds");
    return block->shared.data() + address;
}

inline void perform(const Copy& copy) {
    unsigned char* target = shared_at(copy.shared, 16, 16);
    std::memset(target, 0, 16);
    std::memcpy(target, copy.global, copy.bytes);
}

// Publishes up to 8 words per lane and returns when all 32 have.
inline void publish(const uint32* words, int count) {
    std::memcpy(block->exchange[warp()][lane()], words, 4 * count);
    warp_wait();
}

inline const uint32* published(int of_lane) { return block->exchange[warp()][of_lane]; }

inline float as_float(uint32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32 as_bits(float value) {
    uint32 bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline void fiber_main() {
    body();
    Fiber& fiber = block->fibers[block->current];
    if (!fiber.open.empty()) fail("cp.async without commit at exit");
    for (const std::vector<Copy>& group : fiber.groups)
        if (!group.empty()) fail("cp.async not waited for at exit");
    fiber.done = true;
    _longjmp(block->scheduler, 1);
}

inline void start_fiber(int index) {
    constexpr size_t kStack = 256 * 1024;
    static ucontext_t back, entry;
    block->current = index;
    Fiber& fiber = block->fibers[index];
    fiber.started = true;
    fiber.stack = std::make_unique<char[]>(kStack);
    getcontext(&entry);
    entry.uc_stack.ss_sp = fiber.stack.get();
    entry.uc_stack.ss_size = kStack;
    entry.uc_link = nullptr;
    makecontext(&entry, fiber_main, 0);
    if (_setjmp(block->scheduler) == 0) swapcontext(&back, &entry);
}

inline void resume_fiber(int index) {
    block->current = index;
    if (_setjmp(block->scheduler) == 0) _longjmp(block->fibers[index].context, 1);
}

// Runs a warp until all its threads wait for other warps or are done, so that warps are as far apart as the
// barriers let them be. False: all were done already.
inline bool run_warp(int warp, bool reverse) {
    bool alive = false;
    for (bool progress = true; progress;) {
        progress = false;
        for (int n = 0; n < 32; ++n) {
            const int thread = 32 * warp + (reverse ? 31 - n : n);
            Fiber& fiber = block->fibers[thread];
            if (fiber.done) continue;
            alive = true;
            if (fiber.waits_for == block->barrier.generation) continue;
            progress = true;
            if (fiber.started)
                resume_fiber(thread);
            else
                start_fiber(thread);
        }
    }
    return alive;
}

inline void run_block(int index, int threads, int shared_bytes, bool reverse, bool late_copies) {
    Block state;
    block = &state;
    state.index = index;
    state.threads = threads;
    state.late_copies = late_copies;
    state.fibers.resize(threads);
    state.shared.assign(shared_bytes, 0xff);  // NaNs
    state.warp_barriers.resize(threads / 32);
    const int warps = threads / 32;
    for (bool alive = true; alive;) {
        alive = false;
        for (int n = 0; n < warps; ++n) alive |= run_warp(reverse ? warps - 1 - n : n, reverse);
    }
    block = nullptr;
}

}  // namespace emulator

PA_DEVICE int thread_index() { return emulator::block->current; }
PA_DEVICE int block_index() { return emulator::block->index; }
PA_DEVICE void block_barrier() { emulator::block_wait(); }
PA_DEVICE void warp_barrier() { emulator::warp_wait(); }
PA_DEVICE float infinity() { return INFINITY; }
PA_DEVICE uint32 shared_base() { return 0; }

PA_DEVICE Vec4 shared_load_vec4(uint32 address) {
    Vec4 v;
    std::memcpy(&v, emulator::shared_at(address, 16, 16), 16);
    return v;
}

PA_DEVICE void shared_load_words(uint32 (&r)[4], uint32 address) {
    std::memcpy(r, emulator::shared_at(address, 16, 16), 16);
}

PA_DEVICE void shared_store_words(uint32 address, const uint32 (&r)[4]) {
    std::memcpy(emulator::shared_at(address, 16, 16), r, 16);
}

PA_DEVICE void shared_store_pair(uint32 address, float x, float y) {
    const float pair[2] = {x, y};
    std::memcpy(emulator::shared_at(address, 8, 8), pair, 8);
}

PA_DEVICE int shared_load_int(uint32 address) {
    int value;
    std::memcpy(&value, emulator::shared_at(address, 4, 4), 4);
    return value;
}

PA_DEVICE void shared_store_int(uint32 address, int value) {
    std::memcpy(emulator::shared_at(address, 4, 4), &value, 4);
}

PA_DEVICE void cp_async_16(uint32 shared, const void* global, int bytes) {
    if (bytes < 0 || bytes > 16) emulator::fail("cp.async size");
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) emulator::fail("misaligned cp.async source");
    const emulator::Copy copy{shared, global, bytes};
    emulator::block->fibers[emulator::block->current].open.push_back(copy);
    if (!emulator::block->late_copies) emulator::perform(copy);
}

PA_DEVICE void cp_async_commit() {
    emulator::Fiber& fiber = emulator::block->fibers[emulator::block->current];
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}

template <int kPending>
PA_DEVICE void cp_async_wait() {
    emulator::Fiber& fiber = emulator::block->fibers[emulator::block->current];
    while (static_cast<int>(fiber.groups.size()) > kPending) {
        if (emulator::block->late_copies)
            for (const emulator::Copy& copy : fiber.groups.front()) emulator::perform(copy);
        fiber.groups.erase(fiber.groups.begin());
    }
}

inline void emulate_ldmatrix(uint32 (&r)[4], uint32 address, bool transpose) {
    emulator::publish(&address, 1);
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint16 pair[2];
        for (int e = 0; e < 2; ++e) {
            const int major = emulator::lane() / 4;
            const int minor = 2 * (emulator::lane() % 4) + e;
            const int row = transpose ? minor : major;
            const int column = transpose ? major : minor;
            const uint32 row_address = emulator::published(8 * matrix + row)[0];
            std::memcpy(&pair[e], emulator::shared_at(row_address, 16, 16) + 2 * column, 2);
        }
        r[matrix] = pair[0] | static_cast<uint32>(pair[1]) << 16;
    }
    emulator::warp_wait();
}

PA_DEVICE void ldmatrix_x4(uint32 (&r)[4], uint32 address) { emulate_ldmatrix(r, address, false); }
PA_DEVICE void ldmatrix_x4_trans(uint32 (&r)[4], uint32 address) { emulate_ldmatrix(r, address, true); }

PA_DEVICE float half_to_float(uint16 bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return static_cast<float>(value);
}

PA_DEVICE float bfloat16_to_float(uint16 bits) { return emulator::as_float(static_cast<uint32>(bits) << 16); }

template <bool kBfloat16>
PA_DEVICE uint32 round_16(float value) {
    if constexpr (kBfloat16) {
        if (std::isnan(value)) return 0x7fff;
        const uint32 bits = emulator::as_bits(value);
        return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    } else {
        const _Float16 rounded = static_cast<_Float16>(value);
        uint16 bits;
        std::memcpy(&bits, &rounded, 2);
        return bits;
    }
}

template <bool kBfloat16>
PA_DEVICE uint32 pack_pair(float low, float high) {
    return round_16<kBfloat16>(low) | round_16<kBfloat16>(high) << 16;
}

template <bool kBfloat16>
PA_DEVICE void mma_m16n8k16(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    const uint32 words[6] = {a[0], a[1], a[2], a[3], b0, b1};
    emulator::publish(words, 6);
    const int group = emulator::lane() / 4;
    const int quad = emulator::lane() % 4;
    for (int r = 0; r < 4; ++r) {
        const int row = group + 8 * (r / 2);
        const int column = 2 * quad + r % 2;
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) {
            // A: register (row / 8) + 2 * (k / 8) of lane 4 * (row % 8) + (k % 8) / 2. B: register k / 8 of
            // lane 4 * column + (k % 8) / 2. The lower half is the even k.
            const uint32 a_word = emulator::published(4 * (row % 8) + (k % 8) / 2)[row / 8 + 2 * (k / 8)];
            const uint32 b_word = emulator::published(4 * column + (k % 8) / 2)[4 + k / 8];
            const uint16 a_bits = static_cast<uint16>(a_word >> (16 * (k % 2)));
            const uint16 b_bits = static_cast<uint16>(b_word >> (16 * (k % 2)));
            sum += kBfloat16 ? bfloat16_to_float(a_bits) * bfloat16_to_float(b_bits)
                             : half_to_float(a_bits) * half_to_float(b_bits);
        }
        d[r] += sum;
    }
    emulator::warp_wait();
}

PA_DEVICE float exp2_fast(float x) { return std::exp2(x); }
PA_DEVICE float reciprocal_fast(float x) { return 1.0f / x; }
PA_DEVICE float exp2_exact(float x) { return std::exp2(x); }
PA_DEVICE float exp_exact(float x) { return std::exp(x); }
PA_DEVICE float log_exact(float x) { return std::log(x); }
PA_DEVICE float tanh_exact(float x) { return std::tanh(x); }
PA_DEVICE float fma_f32(float a, float b, float c) { return std::fma(a, b, c); }
PA_DEVICE float max_f32(float a, float b) { return std::fmax(a, b); }

PA_DEVICE float shuffle(float v, int lane) {
    const uint32 bits = emulator::as_bits(v);
    emulator::publish(&bits, 1);
    const float result = emulator::as_float(emulator::published(lane)[0]);
    emulator::warp_wait();
    return result;
}

PA_DEVICE float shuffle_xor(float v, int mask) { return shuffle(v, emulator::lane() ^ mask); }

PA_DEVICE bool warp_any(bool v) {
    const uint32 word = v ? 1u : 0u;
    emulator::publish(&word, 1);
    bool any = false;
    for (int lane = 0; lane < 32; ++lane) any |= emulator::published(lane)[0] != 0;
    emulator::warp_wait();
    return any;
}

PA_DEVICE int load_int(const int* p) { return *p; }
PA_DEVICE uint32 load_word(const uint32* p) { return *p; }
PA_DEVICE float load_float(const float* p) { return *p; }
PA_DEVICE uint16 load_half(const uint16* p) { return *p; }
PA_DEVICE float load_fresh(const float* p) { return *p; }

PA_DEVICE void global_store_words(void* p, uint32 low, uint32 high) {
    if (reinterpret_cast<uintptr_t>(p) % 8 != 0) emulator::fail("misaligned 8-byte store");
    const uint32 words[2] = {low, high};
    std::memcpy(p, words, 8);
}

PA_DEVICE void global_store_vec4(float* p, const Vec4& v) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) emulator::fail("misaligned 16-byte store");
    std::memcpy(p, &v, 16);
}

PA_DEVICE void device_fence() {}
PA_DEVICE int atomic_increment(int* p) { return (*p)++; }

}  // namespace portattn

#endif  // PORTATTN_PTX_CUH
