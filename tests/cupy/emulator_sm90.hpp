// The functions of backends/cupy/ptx_sm90.cuh in C++: mbarriers, named barriers and the copy engine here,
// wgmma in emulator_wgmma.hpp.
//
// What a device would leave undefined ends the launch with a message: too many arrivals, barriers without
// init, data over barriers, ordinary stores without a proxy fence before TMA or wgmma, and deadlocks.
#ifndef PORTATTN_PTX_SM90_CUH
#define PORTATTN_PTX_SM90_CUH

#include "emulator.hpp"

namespace portattn {

// As emulated_maps.py makes it: an emulator::Tensor.
struct alignas(64) TensorMap {
    uint64 words[16];
};

namespace emulator {

inline TransactionBarrier& transaction_barrier(uint32 address) {
    const auto found = block->transaction_barriers.find(address);
    if (found == block->transaction_barriers.end()) fail("no mbarrier at " + std::to_string(address));
    TransactionBarrier& barrier = found->second;
    if (!barrier.fenced) fail("mbarrier used before mbarrier_init_fence()");
    if (barrier.init_thread != block->current && barrier.init_generation == block->barrier.generation)
        fail("mbarrier used before a block barrier after its init");
    return barrier;
}

inline void complete(TransactionBarrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    barrier.phase ^= 1;
    barrier.pending = barrier.count;
}

inline void arrive(uint32 address, int bytes) {
    TransactionBarrier& barrier = transaction_barrier(address);
    barrier.bytes += bytes;
    if (--barrier.pending < 0) fail("more arrivals than the mbarrier counts, at " + std::to_string(address));
    complete(barrier);
    preempt();
}

inline void perform(const Box& box) {
    const Tensor& tensor = box.tensor;
    for (uint32 row = 0; row < tensor.box_rows; ++row) {
        bool inside = true;
        uint64 source = tensor.address;
        for (int n = 1; n < 5; ++n) {
            const int64 at = static_cast<int64>(box.coordinates[n]) + (n == 1 ? row : 0);
            inside = inside && at >= 0 && at < static_cast<int64>(tensor.dims[n]);
            source += static_cast<uint64>(at) * tensor.strides[n - 1];
        }
        for (uint32 column = 0; column < 64; ++column) {
            const int64 at = static_cast<int64>(box.coordinates[0]) + column;
            uint16 element = 0;
            if (inside && at >= 0 && at < static_cast<int64>(tensor.dims[0]))
                std::memcpy(&element, reinterpret_cast<const char*>(source) + 2 * at, 2);
            const uint32 offset = 128 * row + ((column / 8 ^ row % 8) * 16) + 2 * (column % 8);
            std::memcpy(shared_async(box.shared + offset, 2), &element, 2);
        }
    }
}

inline void deliver(TransactionBarrier& barrier) {
    while (!barrier.boxes.empty()) {
        const Box box = barrier.boxes.front();
        barrier.boxes.erase(barrier.boxes.begin());
        perform(box);
        barrier.bytes -= 128 * static_cast<int>(box.tensor.box_rows);
        complete(barrier);
    }
}

inline void check_box(const Box& box) {
    const Tensor& tensor = box.tensor;
    if (tensor.address == 0) fail("copy_box through an empty tensor map");
    if (tensor.address % 16 != 0) fail("misaligned tensor");
    for (const uint64 stride : tensor.strides)
        if (stride % 16 != 0) fail("tensor map stride " + std::to_string(stride));
    if (tensor.box_rows == 0 || tensor.box_rows > 256) fail("tensor map box rows");
    if (box.shared % 1024 != 0) fail("copy_box to a panel that is not 1024-byte aligned");
    if (box.coordinates[0] % 8 != 0) fail("copy_box from a column that is no multiple of 8");
}

inline void named_barrier_arrive(int id, int threads) {
    if (id < 1 || id > 15) fail("named barrier " + std::to_string(id));
    if (threads % 32 != 0 || threads > block->threads) fail("named barrier of " + std::to_string(threads));
    Barrier& barrier = block->named[id];
    if (barrier.arrived != 0 && barrier.count != threads) fail("named barrier with two thread counts");
    barrier.count = threads;
    arrive(barrier, threads);
}

inline void set_registers(int registers) {
    if (registers < 24 || registers > 256 || registers % 8 != 0)
        fail("setmaxnreg " + std::to_string(registers));
    fiber().registers = registers;
}

}  // namespace emulator

PA_DEVICE void mbarrier_init(uint32 barrier, int count) {
    using namespace emulator;
    if (count < 1) fail("mbarrier count");
    if (block->transaction_barriers.count(barrier) != 0) fail("mbarrier initialised twice");
    shared_at(barrier, 8, 8);
    block->transaction_barriers[barrier] = {count, count, 0, 0, block->current, block->barrier.generation,
                                            false, {}};
}

PA_DEVICE void mbarrier_init_fence() {
    for (auto& [address, barrier] : emulator::block->transaction_barriers)
        if (barrier.init_thread == emulator::block->current) barrier.fenced = true;
    ++emulator::fiber().proxy_fences;
}

PA_DEVICE void mbarrier_arrive(uint32 barrier) { emulator::arrive(barrier, 0); }
PA_DEVICE void mbarrier_arrive_expect(uint32 barrier, int bytes) { emulator::arrive(barrier, bytes); }

PA_DEVICE void mbarrier_wait(uint32 barrier, uint32 parity) {
    emulator::TransactionBarrier& state = emulator::transaction_barrier(barrier);
    if (parity > 1) emulator::fail("mbarrier parity " + std::to_string(parity));
    const auto ready = [&state, parity] {
        if (state.phase == parity) emulator::deliver(state);
        return state.phase != parity;
    };
    emulator::wait_until(ready, parity == 0 ? "mbarrier, parity 0," : "mbarrier, parity 1,", barrier);
}

PA_DEVICE bool mbarrier_test(uint32 barrier, uint32 parity) {
    emulator::TransactionBarrier& state = emulator::transaction_barrier(barrier);
    if (state.phase == parity) emulator::deliver(state);
    emulator::preempt();
    return state.phase != parity;
}

PA_DEVICE void named_barrier_sync(int id, int threads) {
    emulator::Barrier& barrier = emulator::block->named[id & 15];
    const int generation = barrier.generation;
    emulator::named_barrier_arrive(id, threads);
    emulator::wait_until([&barrier, generation] { return barrier.generation != generation; }, "named barrier",
                         static_cast<uint32>(id));
}

PA_DEVICE void named_barrier_arrive(int id, int threads) {
    emulator::named_barrier_arrive(id, threads);
    emulator::preempt();
}

PA_DEVICE uint32 float_bits(float v) { return emulator::as_bits(v); }

PA_DEVICE void prefetch_tensor_map(const TensorMap*) {}

PA_DEVICE void copy_box(uint32 shared, const TensorMap* map, uint32 barrier, int column, int row, int residue,
                        int head, int batch) {
    if (reinterpret_cast<uintptr_t>(map) % 64 != 0) emulator::fail("misaligned tensor map");
    emulator::Box box{shared, {}, {column, row, residue, head, batch}};
    std::memcpy(&box.tensor, map, sizeof(box.tensor));
    emulator::check_box(box);
    emulator::TransactionBarrier& state = emulator::transaction_barrier(barrier);
    state.boxes.push_back(box);
    if (!emulator::is_late(emulator::kLateCopies)) emulator::deliver(state);
    emulator::preempt();
}

PA_DEVICE void prefetch_box(const TensorMap* map, int column, int row, int residue, int head, int batch) {
    emulator::Box box{0, {}, {column, row, residue, head, batch}};
    std::memcpy(&box.tensor, map, sizeof(box.tensor));
    emulator::check_box(box);
}

PA_DEVICE void async_proxy_fence() { ++emulator::fiber().proxy_fences; }

template <int kRegisters>
PA_DEVICE void raise_registers() {
    emulator::set_registers(kRegisters);
}

template <int kRegisters>
PA_DEVICE void lower_registers() {
    emulator::set_registers(kRegisters);
}

PA_DEVICE int shuffle_int(int v, int lane) {
    const uint32 word = static_cast<uint32>(v);
    emulator::publish(&word, 1);
    const int result = static_cast<int>(emulator::published(lane)[0]);
    emulator::warp_wait();
    return result;
}

PA_DEVICE bool elect_one() { return emulator::lane() == 0; }
PA_DEVICE int max_int(int a, int b) { return a > b ? a : b; }

PA_DEVICE uint32 warp_ballot(bool v) {
    const uint32 word = v ? 1u : 0u;
    emulator::publish(&word, 1);
    uint32 ballot = 0u;
    for (int lane = 0; lane < 32; ++lane) ballot |= emulator::published(lane)[0] << lane;
    emulator::warp_wait();
    return ballot;
}

PA_DEVICE int first_bit(uint32 v) { return __builtin_ffs(static_cast<int>(v)) - 1; }

PA_DEVICE int grid_blocks() { return emulator::block->grid; }
PA_DEVICE int warp_uniform(int v) { return shuffle_int(v, 0); }

PA_DEVICE void global_store_chunk(void* p, const uint32 (&words)[4]) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) emulator::fail("misaligned 16-byte store");
    std::memcpy(p, words, 16);
}

PA_DEVICE void global_store_pair(float* p, float x, float y) {
    if (reinterpret_cast<uintptr_t>(p) % 8 != 0) emulator::fail("misaligned 8-byte store");
    p[0] = x;
    p[1] = y;
}

PA_DEVICE void global_load_pair(const float* p, float& x, float& y) {
    if (reinterpret_cast<uintptr_t>(p) % 8 != 0) emulator::fail("misaligned 8-byte load");
    x = p[0];
    y = p[1];
}

PA_DEVICE int atomic_add(int* p, int v) {
    const int before = *p;
    *p += v;
    return before;
}

template <typename T>
PA_DEVICE void keep_register(T&) {}

PA_DEVICE void order_after(float sum, uint32) {
    if (emulator::as_bits(sum) == 0x80000000u) emulator::fail("order_after() of -0 stores");
}

}  // namespace portattn

#include "emulator_wgmma.hpp"

#endif  // PORTATTN_PTX_SM90_CUH
