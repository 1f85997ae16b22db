// What the emulators of ptx.cuh and ptx_sm90.cuh stand on: one block at a time, each CUDA thread a fiber that
// runs until it waits for another thread. Shared memory is addressed from kSharedBase.
#pragma once

#include <setjmp.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <string>
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
typedef unsigned long long uint64;

struct Vec4 {
    float x, y, z, w;
};

namespace emulator {

// As on a device, where the first kilobyte is the system's.
constexpr uint32 kSharedBase = 1024;

// Bits of `order`: blocks, or threads, from last to first; cp.async and TMA copies, or wgmma products, as
// late as the waits allow instead of at once. From kSeed on: the seed of random scheduling, if not 0.
enum { kReverseBlocks = 1, kReverseThreads = 2, kLateCopies = 4, kLateProducts = 8, kSeed = 16 };

struct Copy {
    uint32 shared;
    const void* global;
    int bytes;
};

// What a fiber waits for. `ready` is called with `state`, which is on the fiber's own stack.
struct Wait {
    bool (*ready)(const void*) = nullptr;
    const void* state = nullptr;
    const char* what = "";
    uint32 which = 0;
};

// A thread's part of a wgmma under way; `run` does the whole, given the parts of the 128 threads.
struct Product {
    void (*run)(const Product* const* parts);
    float* accumulator;
    const uint32* a_registers;  // nullptr: A is in shared memory
    uint32 a_at_issue[4];
    uint64 a, b;
    bool accumulate;
};

struct Fiber {
    jmp_buf context;
    bool started = false;
    bool done = false;
    Wait wait;
    std::vector<std::vector<Copy>> groups;  // committed, oldest first
    std::vector<Copy> open;
    std::deque<Product> products;  // under way, oldest first
    int products_issued = 0;       // since the kernel started
    std::deque<int> commits;       // products_issued at each wgmma_commit not waited for
    int products_committed = 0;
    int products_waited = 0;
    bool products_fenced = false;
    int proxy_fences = 0;
    int registers = 0;
};

struct Barrier {
    int arrived = 0;
    int generation = 0;
    int count = 0;  // named barriers: threads of the current phase
};

// A tensor map, and one copy through it.
struct Tensor {
    uint64 address;
    uint32 dims[5];
    uint32 box_rows;
    uint64 strides[4];  // bytes, of dimensions 1 to 4
};

struct Box {
    uint32 shared;
    Tensor tensor;
    int coordinates[5];
};

struct TransactionBarrier {
    int count, pending, bytes;
    uint32 phase;
    int init_thread, init_generation;
    bool fenced;
    std::vector<Box> boxes;  // on their way
};

struct Block {
    int index = 0;
    int grid = 0;
    int threads = 0;
    int current = 0;
    int order = 0;
    std::mt19937 random;
    jmp_buf scheduler;
    std::vector<Fiber> fibers;
    std::vector<unsigned char> shared;
    std::vector<int>
        writers;  // per 16 bytes: 1 + the thread that last wrote them by ordinary stores; 0: none
    std::vector<int> writer_fences;  // its proxy_fences then
    Barrier barrier;
    Barrier named[16];
    std::vector<Barrier> warp_barriers;
    std::map<uint32, TransactionBarrier> transaction_barriers;
    uint32 exchange[64][32][8];  // per warp and lane: what a warp-wide instruction publishes
};

inline Block* block = nullptr;
inline jmp_buf failed;
inline std::string failure;

// Ends the launch; `run_grid` (emulator_scheduler.hpp) returns the message.
[[noreturn]] inline void fail(const std::string& what) {
    failure =
        what + " (block " + std::to_string(block->index) + ", thread " + std::to_string(block->current) + ")";
    _longjmp(failed, 1);
}

inline Fiber& fiber() { return block->fibers[block->current]; }
inline int warp() { return block->current / 32; }
inline int lane() { return block->current % 32; }
inline bool is_late(int which) { return (block->order & which) != 0; }

// Lets other fibers run until `ready()`.
template <typename Ready>
inline void wait_until(const Ready& ready, const char* what, uint32 which = 0) {
    if (ready()) return;
    fiber().wait = {[](const void* state) { return (*static_cast<const Ready*>(state))(); }, &ready, what,
                    which};
    if (_setjmp(fiber().context) == 0) _longjmp(block->scheduler, 1);
    fiber().wait = Wait();
}

// Where others may run before this fiber's next step, in random scheduling.
inline void preempt() {
    if (block->order < kSeed || block->random() % 2 == 0) return;
    bool asked = false;
    wait_until([&asked] { return asked || !(asked = true); }, "its turn");
}

inline void arrive(Barrier& barrier, int count) {
    if (++barrier.arrived < count) return;
    barrier.arrived = 0;
    ++barrier.generation;
}

inline void arrive_and_wait(Barrier& barrier, int count, const char* what, uint32 which = 0) {
    const int generation = barrier.generation;
    arrive(barrier, count);
    wait_until([&barrier, generation] { return barrier.generation != generation; }, what, which);
}

inline void warp_wait() { arrive_and_wait(block->warp_barriers[warp()], 32, "the other lanes"); }
inline void block_wait() { arrive_and_wait(block->barrier, block->threads, "the block barrier"); }

// The last lane of the warp to come runs `action` before any goes on.
template <typename Action>
inline void warp_action(const Action& action) {
    if (block->warp_barriers[warp()].arrived == 31) action();
    warp_wait();
}

inline unsigned char* shared_at(uint32 address, int bytes, int alignment) {
    if (address % alignment != 0) fail("misaligned shared memory access");
    const size_t size = block->shared.size();
    if (address < kSharedBase || address - kSharedBase + bytes > size)
        fail("shared memory access out of bounds");
    const auto next = block->transaction_barriers.lower_bound(address < 7 ? 0 : address - 7);
    if (next != block->transaction_barriers.end() && next->first < address + bytes)
        fail("data over the mbarrier at " + std::to_string(next->first));
    return block->shared.data() + (address - kSharedBase);
}

// For ordinary stores, of at most 16 aligned bytes.
inline unsigned char* shared_to_write(uint32 address, int bytes, int alignment) {
    unsigned char* target = shared_at(address, bytes, alignment);
    const uint32 chunk = (address - kSharedBase) / 16;
    block->writers[chunk] = block->current + 1;
    block->writer_fences[chunk] = fiber().proxy_fences;
    return target;
}

// For the copy engine and wgmma: `bytes` <= 16 within an aligned chunk.
inline unsigned char* shared_async(uint32 address, int bytes) {
    unsigned char* target = shared_at(address, bytes, bytes);
    const uint32 chunk = (address - kSharedBase) / 16;
    const int writer = block->writers[chunk];
    if (writer != 0 && block->fibers[writer - 1].proxy_fences == block->writer_fences[chunk])
        fail("no async_proxy_fence() after the store of thread " + std::to_string(writer - 1) + " to " +
             std::to_string(address));
    return target;
}

inline void perform(const Copy& copy) {
    unsigned char* target = shared_to_write(copy.shared, 16, 16);
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

}  // namespace emulator

}  // namespace portattn
