// Which fiber of a block runs when, and the launch of a grid; see emulator_core.hpp.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>

#include "emulator_core.hpp"

namespace portattn {

namespace emulator {

inline std::function<void()> body;

inline void fiber_main() {
    body();
    Fiber& self = fiber();
    if (!self.open.empty()) fail("cp.async without commit at exit");
    for (const std::vector<Copy>& group : self.groups)
        if (!group.empty()) fail("cp.async not waited for at exit");
    if (self.products_committed != self.products_issued) fail("wgmma without commit at exit");
    if (self.products_waited != self.products_issued) fail("wgmma not waited for at exit");
    self.done = true;
    _longjmp(block->scheduler, 1);
}

// Kept for the next block: memory that was touched once is cheap.
inline std::vector<std::unique_ptr<char[]>> stacks;

inline void start_fiber(int index) {
    constexpr size_t kStack = 256 * 1024;
    static ucontext_t back, entry;
    while (static_cast<int>(stacks.size()) <= index) stacks.emplace_back(new char[kStack]);
    block->fibers[index].started = true;
    getcontext(&entry);
    entry.uc_stack.ss_sp = stacks[index].get();
    entry.uc_stack.ss_size = kStack;
    entry.uc_link = nullptr;
    makecontext(&entry, fiber_main, 0);
    if (_setjmp(block->scheduler) == 0) swapcontext(&back, &entry);
}

inline void resume_fiber(int index) {
    if (_setjmp(block->scheduler) == 0) _longjmp(block->fibers[index].context, 1);
}

// Runs each thread of a warp until it waits for another. False: none could run.
inline bool step_warp(int warp) {
    bool any = false;
    for (int n = 0; n < 32; ++n) {
        const int thread = 32 * warp + (is_late(kReverseThreads) ? 31 - n : n);
        Fiber& fiber = block->fibers[thread];
        if (fiber.done) continue;
        block->current = thread;
        if (fiber.wait.ready != nullptr && !fiber.wait.ready(fiber.wait.state)) continue;
        any = true;
        if (fiber.started)
            resume_fiber(thread);
        else
            start_fiber(thread);
    }
    return any;
}

// Each warp in turn until all its threads wait for other warps or are done, so that warps are as far apart as
// the barriers let them be.
inline void run_in_turns() {
    const int warps = block->threads / 32;
    for (bool any = true; any;) {
        any = false;
        for (int n = 0; n < warps; ++n)
            while (step_warp(is_late(kReverseThreads) ? warps - 1 - n : n)) any = true;
    }
}

// Always the first that can run, of an order drawn anew now and then: some warps fall far behind (Burckhardt
// et al., "A Randomized Scheduler with Probabilistic Guarantees of Finding Bugs", ASPLOS 2010).
inline void run_at_random() {
    std::vector<int> warps(block->threads / 32);
    for (size_t n = 0; n < warps.size(); ++n) warps[n] = static_cast<int>(n);
    for (int step = 0;; ++step) {
        if (step % 64 == 0) std::shuffle(warps.begin(), warps.end(), block->random);
        if (std::none_of(warps.begin(), warps.end(), step_warp)) return;
    }
}

// Who waits for what, threads with the same answer together.
[[noreturn]] inline void fail_deadlock() {
    std::string text = "deadlock:";
    for (int thread = 0; thread < block->threads;) {
        const Fiber& first = block->fibers[thread];
        int end = thread + 1;
        const auto same = [&first](const Fiber& other) {
            return other.done == first.done && other.wait.what == first.wait.what &&
                   other.wait.which == first.wait.which;
        };
        while (end < block->threads && same(block->fibers[end])) ++end;
        text += " threads " + std::to_string(thread) + "-" + std::to_string(end - 1);
        text += first.done ? " are done;" : std::string(" wait for ") + first.wait.what;
        if (!first.done) text += " [" + std::to_string(first.wait.which) + "];";
        thread = end;
    }
    for (const auto& [address, barrier] : block->transaction_barriers)
        text += " mbarrier " + std::to_string(address) + ": phase " + std::to_string(barrier.phase) +
                ", lacks " + std::to_string(barrier.pending) + " of " + std::to_string(barrier.count) +
                " arrivals and " + std::to_string(barrier.bytes) + " bytes;";
    fail(text);
}

// Checks that the four warps of a warpgroup did the same.
inline void check_warpgroups() {
    int registers = 0;
    for (int thread = 0; thread < block->threads; ++thread) {
        const Fiber& fiber = block->fibers[thread];
        const Fiber& first = block->fibers[thread / 128 * 128];
        block->current = thread;
        if (fiber.products_issued != first.products_issued) fail("wgmma not issued by all four warps");
        if (fiber.registers != first.registers) fail("setmaxnreg not the same in all four warps");
        registers += fiber.registers;
    }
    if (registers > 65536) fail("setmaxnreg asks for " + std::to_string(registers) + " of 65536 registers");
}

inline void run_block(int index, int grid, int threads, int shared_bytes, int order) {
    Block state;
    block = &state;
    state.index = index;
    state.grid = grid;
    state.threads = threads;
    state.order = order;
    state.fibers.resize(threads);
    state.shared.assign(shared_bytes, 0xff);  // NaNs
    state.writers.assign(shared_bytes / 16 + 1, 0);
    state.writer_fences.assign(shared_bytes / 16 + 1, 0);
    state.warp_barriers.resize(threads / 32);
    state.random.seed(order / kSeed + 1000 * index);
    if (order >= kSeed)
        run_at_random();
    else
        run_in_turns();
    for (int thread = 0; thread < threads; ++thread)
        if (!state.fibers[thread].done) fail_deadlock();
    check_warpgroups();
    block = nullptr;
}

// Runs `kernel` in every block, one after the other. Returns what went wrong, or nullptr.
inline const char* run_grid(std::function<void()> kernel, int grid, int threads, int shared_bytes,
                            int order) {
    body = std::move(kernel);
    if (_setjmp(failed) != 0) return failure.c_str();
    for (int n = 0; n < grid; ++n)
        run_block((order & kReverseBlocks) != 0 ? grid - 1 - n : n, grid, threads, shared_bytes, order);
    return nullptr;
}

}  // namespace emulator

}  // namespace portattn
