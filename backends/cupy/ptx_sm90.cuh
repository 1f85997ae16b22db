// What sm_90a adds to ptx.cuh: mbarriers, the copy engine (TMA), warpgroup matrix products. Tests replace
// this header too. PTX ISA: "Parallel Synchronization and Communication Instructions: mbarrier", "Tensor
// Operations with bulk copy", "Asynchronous warpgroup level matrix instructions".
#ifndef PORTATTN_PTX_SM90_CUH
#define PORTATTN_PTX_SM90_CUH

#include "ptx.cuh"

namespace portattn {

typedef unsigned long long uint64;

// As cuTensorMapEncodeTiled makes it; a kernel argument.
struct alignas(64) TensorMap {
    uint64 words[16];
};

// mbarriers: 8 bytes of shared memory each. A phase ends when `count` arrivals and all expected bytes have
// come; waiting for the phase before the first returns at once.
PA_DEVICE void mbarrier_init(uint32 barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// After the inits, by their thread; then a block barrier.
PA_DEVICE void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

PA_DEVICE void mbarrier_arrive(uint32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

PA_DEVICE void mbarrier_arrive_expect(uint32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

PA_DEVICE void mbarrier_wait(uint32 barrier, uint32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, 0x989680;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Whether a wait would return at once.
PA_DEVICE bool mbarrier_test(uint32 barrier, uint32 parity) {
    uint32 done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0u;
}

// Hardware barriers 1 to 15 among `threads` threads, whole warps; 0 is the block barrier.
PA_DEVICE void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

PA_DEVICE void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

PA_DEVICE void prefetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// One box of a rank 5 map into shared memory; its bytes, zeros outside the tensor included, count on the
// barrier.
PA_DEVICE void copy_box(uint32 shared, const TensorMap* map, uint32 barrier, int column, int row, int residue,
                        int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared),
        "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(residue), "r"(head), "r"(batch)
        : "memory");
}

// The same box into the L2 cache only.
PA_DEVICE void prefetch_box(const TensorMap* map, int column, int row, int residue, int head, int batch) {
    asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global [%0, {%1, %2, %3, %4, %5}];" ::"l"(map),
                 "r"(column), "r"(row), "r"(residue), "r"(head), "r"(batch)
                 : "memory");
}

// Orders this thread's ordinary shared memory accesses before later ones by the copy engine and wgmma.
PA_DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Registers of each thread of this warpgroup from here on.
template <int kRegisters>
PA_DEVICE void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
PA_DEVICE void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// True in one lane of a converged warp, which ptxas knows to be one.
PA_DEVICE bool elect_one() {
    uint32 elected;
    asm volatile(
        "{\n"
        ".reg .pred elected;\n"
        "elect.sync _|elected, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, elected;\n"
        "}"
        : "=r"(elected));
    return elected != 0u;
}

// The same value in all lanes, known as such to the compiler.
PA_DEVICE int warp_uniform(int v) { return __shfl_sync(0xffffffffu, v, 0); }
PA_DEVICE int max_int(int a, int b) { return max(a, b); }
PA_DEVICE uint32 warp_ballot(bool v) { return __ballot_sync(0xffffffffu, v); }
PA_DEVICE int first_bit(uint32 v) { return __ffs(static_cast<int>(v)) - 1; }
PA_DEVICE int shuffle_int(int v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
PA_DEVICE int atomic_add(int* p, int v) { return atomicAdd(p, v); }
PA_DEVICE int grid_blocks() { return static_cast<int>(gridDim.x); }

PA_DEVICE void global_store_chunk(void* p, const uint32 (&words)[4]) {
    *static_cast<uint4*>(p) = make_uint4(words[0], words[1], words[2], words[3]);
}

PA_DEVICE void global_store_pair(float* p, float x, float y) {
    *reinterpret_cast<float2*>(p) = make_float2(x, y);
}

PA_DEVICE void global_load_pair(const float* p, float& x, float& y) {
    const float2 v = *reinterpret_cast<const float2*>(p);
    x = v.x;
    y = v.y;
}

// Matrix descriptors for 128-byte swizzled panels of 64 16-bit columns (PTX ISA, "Matrix descriptor
// format"): eight rows are 1024 bytes. `panel_bytes` is the distance between panels, which matters where the
// columns are not the contracted dimension.
PA_DEVICE uint64 panel_descriptor(uint32 shared, uint32 panel_bytes) {
    const uint64 address = (shared & 0x3ffffu) >> 4;
    return address | static_cast<uint64>(panel_bytes >> 4) << 16 | static_cast<uint64>(1024u >> 4) << 32 |
           static_cast<uint64>(1) << 62;
}

PA_DEVICE uint64 descriptor_plus(uint64 descriptor, int bytes) { return descriptor + (bytes >> 4); }

PA_DEVICE uint32 float_bits(float v) { return __float_as_uint(v); }

// A store that never happens, for a sum of weights is never -0: what orders waits behind `sum`.
PA_DEVICE void order_after(float sum, uint32 shared) {
    asm volatile(
        "{\n"
        ".reg .pred never;\n"
        "setp.eq.u32 never, %0, 0x80000000;\n"
        "@never st.shared.u32 [%1], %0;\n"
        "}" ::"r"(__float_as_uint(sum)),
        "r"(shared)
        : "memory");
}

PA_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
PA_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler may not move accesses to a register of a running product across these.
PA_DEVICE void keep_register(float& v) { asm volatile("" : "+f"(v)::"memory"); }
PA_DEVICE void keep_register(uint32& v) { asm volatile("" : "+r"(v)::"memory"); }

// d[n][2*half + e] is row 16*warp + lane/4 + 8*half, column 8n + 2*(lane%4) + e, of a 64 x 8*kTiles product.
// wgmma.py writes the specialisations that a variant needs: an asm statement lists its registers one by one.
//
// d = a b, or d += a b; a: 64 x 16, b: (8*kTiles) x 16, both with the contracted dimension contiguous.
template <bool kBfloat16, int kTiles>
PA_DEVICE void wgmma_from_shared(float (&d)[kTiles][4], uint64 a, uint64 b, bool accumulate);

// d += a b; a in registers as in mma.m16n8k16; b: 16 x (8*kTiles), its columns contiguous.
template <bool kBfloat16, int kTiles>
PA_DEVICE void wgmma_from_registers(float (&d)[kTiles][4], const uint32 (&a)[4], uint64 b);

}  // namespace portattn

#include "wgmma.cuh"

#endif  // PORTATTN_PTX_SM90_CUH
