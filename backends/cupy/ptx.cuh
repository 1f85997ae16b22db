// Every instruction of the kernels that is not plain C++, one small function each. Tests replace this header
// by one with the same functions in C++ (its include guard below), so that the kernels run on a CPU. Fragment
// layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
#ifndef PORTATTN_PTX_CUH
#define PORTATTN_PTX_CUH

#define PA_DEVICE __device__ __forceinline__
#define PA_KERNEL extern "C" __global__
#define PA_GRID_CONSTANT const __grid_constant__
#define PA_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define PA_UNROLL _Pragma("unroll")

namespace portattn {

typedef unsigned int uint32;
typedef unsigned short uint16;
typedef long long int64;

struct Vec4 {
    float x, y, z, w;
};

PA_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
PA_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
PA_DEVICE void block_barrier() { __syncthreads(); }
PA_DEVICE void warp_barrier() { __syncwarp(); }
PA_DEVICE float infinity() { return __int_as_float(0x7f800000); }

// Shared memory is addressed by its 32-bit window address.
PA_DEVICE uint32 shared_base() {
    extern __shared__ __align__(128) unsigned char memory[];
    return static_cast<uint32>(__cvta_generic_to_shared(memory));
}

PA_DEVICE Vec4 shared_load_vec4(uint32 address) {
    Vec4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

PA_DEVICE void shared_load_words(uint32 (&r)[4], uint32 address) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

PA_DEVICE void shared_store_words(uint32 address, const uint32 (&r)[4]) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]),
                 "r"(r[3])
                 : "memory");
}

PA_DEVICE void shared_store_pair(uint32 address, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

PA_DEVICE int shared_load_int(uint32 address) {
    int v;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}

PA_DEVICE void shared_store_int(uint32 address, int value) {
    asm volatile("st.shared.s32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// Copies `bytes` (0 to 16) and fills the rest of the 16 with zeros; nothing is read when bytes is 0.
PA_DEVICE void cp_async_16(uint32 shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(bytes)
                 : "memory");
}

PA_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
PA_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
PA_DEVICE void ldmatrix_x4(uint32 (&r)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

PA_DEVICE void ldmatrix_x4_trans(uint32 (&r)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// d += a * b, float32 accumulation; a [16, 16], b [16, 8], d [16, 8].
template <bool kBfloat16>
PA_DEVICE void mma_m16n8k16(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    if constexpr (kBfloat16) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
            "%9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// Two floats rounded to nearest even, `low` in the lower half.
template <bool kBfloat16>
PA_DEVICE uint32 pack_pair(float low, float high) {
    uint32 r;
    if constexpr (kBfloat16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    }
    return r;
}

PA_DEVICE float half_to_float(uint16 bits) {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
    return v;
}

PA_DEVICE float bfloat16_to_float(uint16 bits) { return __uint_as_float(static_cast<uint32>(bits) << 16); }

PA_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

PA_DEVICE float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

PA_DEVICE float exp2_exact(float x) { return exp2f(x); }
PA_DEVICE float exp_exact(float x) { return expf(x); }
PA_DEVICE float log_exact(float x) { return logf(x); }
PA_DEVICE float tanh_exact(float x) { return tanhf(x); }
PA_DEVICE float fma_f32(float a, float b, float c) { return fmaf(a, b, c); }
PA_DEVICE float max_f32(float a, float b) { return fmaxf(a, b); }

PA_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
PA_DEVICE float shuffle(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
PA_DEVICE bool warp_any(bool v) { return __any_sync(0xffffffffu, v) != 0; }

// Read-only data through the non-coherent cache.
PA_DEVICE int load_int(const int* p) { return __ldg(p); }
PA_DEVICE uint32 load_word(const uint32* p) { return __ldg(p); }
PA_DEVICE float load_float(const float* p) { return __ldg(p); }
PA_DEVICE uint16 load_half(const uint16* p) { return __ldg(p); }

// Written by another block of this launch: past the first-level cache.
PA_DEVICE float load_fresh(const float* p) { return __ldcg(p); }

PA_DEVICE Vec4 load_fresh_vec4(const float* p) {
    const float4 v = __ldcg(reinterpret_cast<const float4*>(p));
    return Vec4{v.x, v.y, v.z, v.w};
}

PA_DEVICE void global_store_words(void* p, uint32 low, uint32 high) {
    *static_cast<uint2*>(p) = make_uint2(low, high);
}

PA_DEVICE void global_store_vec4(float* p, const Vec4& v) {
    *reinterpret_cast<float4*>(p) = make_float4(v.x, v.y, v.z, v.w);
}

PA_DEVICE void device_fence() { __threadfence(); }

// The same number, from where it cannot be computed again: short of registers, ptxas would do so at each use.
// All lanes of the warp.
PA_DEVICE uint32 kept(uint32 v) { return __shfl_sync(0xffffffffu, v, threadIdx.x % 32); }

PA_DEVICE int atomic_increment(int* p) { return atomicAdd(p, 1); }

}  // namespace portattn

#endif  // PORTATTN_PTX_CUH
