// The warpgroup matrix products of backends/cupy/ptx_sm90.cuh. A product is done for all four warps at once:
// when the last of them issues it, or, late, when the first of them waits for it. Its operands are read then:
// shared memory by the descriptors' rules (PTX ISA, "Matrix descriptor format", "Shared memory layout for
// wgmma"), registers through pointers.
#pragma once

#include <algorithm>

#include "emulator.hpp"

namespace portattn {

namespace emulator {

// What a descriptor of 128-byte swizzled rows of 64 16-bit elements says.
struct Operand {
    uint32 start;  // as the descriptor holds it: the upper bits of the shared memory window are not kept
    uint32 leading, stride;

    explicit Operand(uint64 descriptor)
        : start(static_cast<uint32>(descriptor & 0x3fff) << 4),
          leading(static_cast<uint32>(descriptor >> 16 & 0x3fff) << 4),
          stride(static_cast<uint32>(descriptor >> 32 & 0x3fff) << 4) {
        if (descriptor >> 62 != 1) fail("matrix descriptor without the 128-byte swizzle");
        if ((descriptor & 0x3fffc000c000c000ull) != 0) fail("matrix descriptor with unknown bits");
    }

    // The chunk of 8 elements at `offset`, after the swizzle.
    uint32 chunk(uint32 offset) const {
        const uint32 address = start + offset;
        return address ^ (address >> 3 & 0x70);
    }

    // Rows of 64 elements, of which the contracted dimension is 16.
    uint32 row_chunk(int row, int k) const { return chunk(row / 8 * stride + row % 8 * 128 + 2 * k); }

    // Rows are the contracted dimension; `leading` bytes between panels of 64 columns.
    uint32 column_chunk(int k, int column) const {
        return chunk(column / 64 * leading + k / 8 * stride + k % 8 * 128 + 2 * (column % 64));
    }
};

template <bool kBfloat16>
inline float decode(uint16 bits) {
    return kBfloat16 ? bfloat16_to_float(bits) : half_to_float(bits);
}

template <bool kBfloat16>
inline void read_chunk(float* target, int target_stride, uint32 address) {
    uint16 elements[8];
    std::memcpy(elements, shared_async(address, 16), 16);
    for (int n = 0; n < 8; ++n) target[n * target_stride] = decode<kBfloat16>(elements[n]);
}

// a[64][16], with row 16*warp + lane/4 + 8*(r%2), columns 8*(r/2) + 2*(lane%4) of register r.
template <bool kBfloat16>
inline void read_registers(float (&a)[64][16], const Product* const* parts) {
    for (int thread = 0; thread < 128; ++thread) {
        for (int r = 0; r < 4; ++r) {
            const uint32 word = parts[thread]->a_registers[r];
            if (word != parts[thread]->a_at_issue[r])
                fail("a register of operand A changed before wgmma_wait, thread " + std::to_string(thread) +
                     " of the warpgroup");
            const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * (r % 2);
            const int column = 8 * (r / 2) + 2 * (thread % 4);
            a[row][column] = decode<kBfloat16>(static_cast<uint16>(word & 0xffff));
            a[row][column + 1] = decode<kBfloat16>(static_cast<uint16>(word >> 16));
        }
    }
}

template <int kColumns>
__attribute__((optimize("O3"))) inline void multiply_row(float (&sums)[kColumns], const float (&a)[16],
                                                         const float (&b)[16][kColumns]) {
    for (int n = 0; n < kColumns; ++n) sums[n] = 0.0f;
    for (int k = 0; k < 16; ++k)
        for (int n = 0; n < kColumns; ++n) sums[n] += a[k] * b[k][n];
}

template <bool kBfloat16, int kTiles, bool kRegisters>
inline void run_product(const Product* const* parts) {
    constexpr int kColumns = 8 * kTiles;
    static float a[64][16], b[16][kColumns];
    const Product& first = *parts[0];
    for (int thread = 0; thread < 128; ++thread) {
        const Product& part = *parts[thread];
        if (part.run != first.run || part.a != first.a || part.b != first.b ||
            part.accumulate != first.accumulate)
            fail("wgmma whose operands differ within the warpgroup");
    }
    const Operand operand_b(first.b);
    if (operand_b.start % 1024 >= (kRegisters ? 1u : 128u)) fail("matrix descriptor within a swizzle atom");
    if constexpr (kRegisters) {
        read_registers<kBfloat16>(a, parts);
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < kColumns; n += 8)
                read_chunk<kBfloat16>(&b[k][n], 1, operand_b.column_chunk(k, n));
    } else {
        const Operand operand_a(first.a);
        if (operand_a.start % 1024 >= 128) fail("matrix descriptor within a swizzle atom");
        for (int k = 0; k < 16; k += 8) {
            for (int row = 0; row < 64; ++row)
                read_chunk<kBfloat16>(&a[row][k], 1, operand_a.row_chunk(row, k));
            for (int n = 0; n < kColumns; ++n)
                read_chunk<kBfloat16>(&b[k][n], kColumns, operand_b.row_chunk(n, k));
        }
    }
    for (int row = 0; row < 64; ++row) {
        float sums[kColumns];
        multiply_row(sums, a[row], b);
        for (int n = 0; n < kColumns; ++n) {
            const Product& part = *parts[row / 16 * 32 + row % 8 * 4 + n % 8 / 2];
            float& d = part.accumulator[n / 8 * 4 + row % 16 / 8 * 2 + n % 2];
            d = part.accumulate ? d + sums[n] : sums[n];
        }
    }
}

// Of the fibers of this warpgroup.
inline int least_issued() {
    const int first = block->current / 128 * 128;
    int least = fiber().products_issued;
    for (int thread = first; thread < first + 128; ++thread)
        least = std::min(least, block->fibers[thread].products_issued);
    return least;
}

// Does the oldest products of the warpgroup, up to number `end`.
inline void run_products(int end) {
    Fiber* fibers = &block->fibers[block->current / 128 * 128];
    const Product* parts[128];
    while (fibers[0].products_issued - static_cast<int>(fibers[0].products.size()) < end) {
        for (int thread = 0; thread < 128; ++thread) parts[thread] = &fibers[thread].products.front();
        parts[0]->run(parts);
        for (int thread = 0; thread < 128; ++thread) fibers[thread].products.pop_front();
    }
}

inline void issue(const Product& product) {
    if (block->threads % 128 != 0) fail("wgmma in a block that is not whole warpgroups");
    Fiber& self = fiber();
    if (!self.products_fenced) fail("wgmma without wgmma_fence() after registers were used");
    self.products.push_back(product);
    ++self.products_issued;
    if (!is_late(kLateProducts)) run_products(least_issued());
}

}  // namespace emulator

PA_DEVICE uint64 panel_descriptor(uint32 shared, uint32 panel_bytes) {
    const uint64 address = (shared & 0x3ffffu) >> 4;
    return address | static_cast<uint64>(panel_bytes >> 4) << 16 | static_cast<uint64>(1024u >> 4) << 32 |
           static_cast<uint64>(1) << 62;
}

PA_DEVICE uint64 descriptor_plus(uint64 descriptor, int bytes) { return descriptor + (bytes >> 4); }

PA_DEVICE void wgmma_fence() { emulator::fiber().products_fenced = true; }

PA_DEVICE void wgmma_commit() {
    emulator::Fiber& fiber = emulator::fiber();
    fiber.products_committed = fiber.products_issued;
    fiber.commits.push_back(fiber.products_issued);
    emulator::preempt();
}

template <int kPending>
PA_DEVICE void wgmma_wait() {
    emulator::Fiber& fiber = emulator::fiber();
    fiber.products_fenced = false;
    while (static_cast<int>(fiber.commits.size()) > kPending) {
        fiber.products_waited = fiber.commits.front();
        fiber.commits.pop_front();
    }
    const int end = fiber.products_waited;
    emulator::wait_until([end] { return emulator::least_issued() >= end; }, "the warpgroup's other wgmma");
    emulator::run_products(end);
}

template <bool kBfloat16, int kTiles>
PA_DEVICE void wgmma_from_shared(float (&d)[kTiles][4], uint64 a, uint64 b, bool accumulate) {
    emulator::issue(
        {emulator::run_product<kBfloat16, kTiles, false>, &d[0][0], nullptr, {}, a, b, accumulate});
}

template <bool kBfloat16, int kTiles>
PA_DEVICE void wgmma_from_registers(float (&d)[kTiles][4], const uint32 (&a)[4], uint64 b) {
    emulator::issue(
        {emulator::run_product<kBfloat16, kTiles, true>, &d[0][0], a, {a[0], a[1], a[2], a[3]}, 0, b, true});
}

}  // namespace portattn
