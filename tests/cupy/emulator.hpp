// The functions of backends/cupy/ptx.cuh in C++, so that a kernel runs on a CPU, thread for thread.
//
// The order of fibers and blocks can be reversed, and cp.async copies either at once or as late as allowed: a
// missing wait or barrier then shows as a wrong result in one of the two. Fragment layouts after the PTX ISA:
// "Matrix Fragments for mma.m16n8k16", "Warp-level matrix load: ldmatrix".
#ifndef PORTATTN_PTX_CUH
#define PORTATTN_PTX_CUH

#include "emulator_scheduler.hpp"

namespace portattn {

PA_DEVICE int thread_index() { return emulator::block->current; }
PA_DEVICE int block_index() { return emulator::block->index; }
PA_DEVICE void block_barrier() { emulator::block_wait(); }
PA_DEVICE void warp_barrier() { emulator::warp_wait(); }
PA_DEVICE float infinity() { return INFINITY; }
PA_DEVICE uint32 shared_base() { return emulator::kSharedBase; }

PA_DEVICE Vec4 shared_load_vec4(uint32 address) {
    Vec4 v;
    std::memcpy(&v, emulator::shared_at(address, 16, 16), 16);
    return v;
}

PA_DEVICE void shared_load_words(uint32 (&r)[4], uint32 address) {
    std::memcpy(r, emulator::shared_at(address, 16, 16), 16);
}

PA_DEVICE void shared_store_words(uint32 address, const uint32 (&r)[4]) {
    std::memcpy(emulator::shared_to_write(address, 16, 16), r, 16);
}

PA_DEVICE void shared_store_pair(uint32 address, float x, float y) {
    const float pair[2] = {x, y};
    std::memcpy(emulator::shared_to_write(address, 8, 8), pair, 8);
}

PA_DEVICE int shared_load_int(uint32 address) {
    int value;
    std::memcpy(&value, emulator::shared_at(address, 4, 4), 4);
    return value;
}

PA_DEVICE uint32 kept(uint32 v) { return v; }

PA_DEVICE void shared_store_int(uint32 address, int value) {
    std::memcpy(emulator::shared_to_write(address, 4, 4), &value, 4);
}

PA_DEVICE void cp_async_16(uint32 shared, const void* global, int bytes) {
    if (bytes < 0 || bytes > 16) emulator::fail("cp.async size");
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) emulator::fail("misaligned cp.async source");
    const emulator::Copy copy{shared, global, bytes};
    emulator::fiber().open.push_back(copy);
    if (!emulator::is_late(emulator::kLateCopies)) emulator::perform(copy);
}

PA_DEVICE void cp_async_commit() {
    emulator::Fiber& fiber = emulator::fiber();
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}

template <int kPending>
PA_DEVICE void cp_async_wait() {
    emulator::Fiber& fiber = emulator::fiber();
    while (static_cast<int>(fiber.groups.size()) > kPending) {
        if (emulator::is_late(emulator::kLateCopies))
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

PA_DEVICE Vec4 load_fresh_vec4(const float* p) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) emulator::fail("misaligned 16-byte load");
    return Vec4{p[0], p[1], p[2], p[3]};
}

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
