// A small kernel on every part of emulator_sm90.hpp: O = (A B^T) V over tiles of B and V, one producer warp
// and two consumer warpgroups of 64 rows. A fault leaves out or misplaces one thing; test_emulator_sm90.py
// has the list.
#include "emulator_sm90.hpp"

namespace portattn {

constexpr bool kBfloat16 = PA_BFLOAT16;
constexpr int kKeys = PA_KEYS, kDepth = PA_DEPTH, kColumns = PA_COLUMNS;  // of a tile, of A and B, of V
constexpr int kStages = 2, kConsumers = 2;
constexpr int kDepthPanels = (kDepth + 63) / 64, kColumnPanels = (kColumns + 63) / 64;
constexpr uint32 kRowsBytes = kDepthPanels * 64 * 128;
constexpr uint32 kTileBytes = (kDepthPanels + kColumnPanels) * kKeys * 128;
constexpr uint32 kBarriers = kConsumers * kRowsBytes + kStages * kTileBytes;

inline int fault = 0;

struct MatmulParams {
    TensorMap a, b, v;
    float* output;  // [grid, 128, kColumns]
    int tiles;
};

inline uint32 rows_at(int consumer) { return shared_base() + consumer * kRowsBytes; }
inline uint32 tile_at(int stage) { return shared_base() + kConsumers * kRowsBytes + stage * kTileBytes; }
inline uint32 full(int stage) { return shared_base() + kBarriers + 8 * stage; }
inline uint32 empty(int stage) { return full(kStages + stage); }
inline uint32 rows_full() { return full(2 * kStages); }

inline void produce(const MatmulParams& p) {
    mbarrier_arrive_expect(rows_full(), kConsumers * kRowsBytes);
    for (int consumer = 0; consumer < kConsumers; ++consumer)
        for (int panel = 0; panel < kDepthPanels; ++panel)
            copy_box(rows_at(consumer) + panel * 64 * 128, &p.a, rows_full(), 64 * panel, 64 * consumer, 0, 0,
                     block_index());
    for (int tile = 0; tile < p.tiles; ++tile) {
        const int stage = tile % kStages;
        mbarrier_wait(empty(stage), (tile / kStages & 1) ^ 1);
        mbarrier_arrive_expect(full(stage), kTileBytes);
        if (fault == 11) mbarrier_arrive(full(stage));
        for (int panel = 0; panel < kDepthPanels + kColumnPanels; ++panel) {
            const bool of_v = panel >= kDepthPanels;
            copy_box(tile_at(stage) + panel * kKeys * 128, of_v ? &p.v : &p.b, full(stage),
                     64 * (of_v ? panel - kDepthPanels : panel), kKeys * tile, 0, 0, block_index());
        }
    }
}

inline void scores(float (&s)[kKeys / 8][4], int group, int stage) {
    const uint64 a = panel_descriptor(rows_at(group), 16), b = panel_descriptor(tile_at(stage), 16);
    if (fault != 10) wgmma_fence();
    for (int step = 0; step < kDepth / 16; ++step)
        wgmma_from_shared<kBfloat16>(s, descriptor_plus(a, step / 4 * 64 * 128 + step % 4 * 32),
                                     descriptor_plus(b, step / 4 * kKeys * 128 + step % 4 * 32), step > 0);
    if (fault != 3) wgmma_commit();
    if (fault != 4) wgmma_wait<0>();
}

inline void consume(const MatmulParams& p, int group) {
    const int thread = thread_index() % 128;
    float o[kColumns / 8][4] = {};
    uint32 weights[kKeys / 16][4];
    if (fault == 7 && thread == 0) shared_store_int(rows_at(group), 0);
    mbarrier_wait(rows_full(), 0);
    for (int tile = 0; tile < p.tiles; ++tile) {
        const int stage = tile % kStages;
        if (fault != 1) mbarrier_wait(full(stage), tile / kStages & 1);
        named_barrier_sync(1 + group, 128);
        float s[kKeys / 8][4];
        scores(s, group, stage);
        for (int step = 0; step < kKeys / 16; ++step)
            for (int r = 0; r < 4; ++r) {
                const float* pair = &s[2 * step + r / 2][2 * (r % 2)];
                weights[step][r] = pack_pair<kBfloat16>(pair[0], pair[1]);
            }
        wgmma_fence();
        const uint64 v = panel_descriptor(tile_at(stage) + kDepthPanels * kKeys * 128, kKeys * 128);
        for (int step = 0; step < kKeys / 16; ++step)
            wgmma_from_registers<kBfloat16>(o, weights[step], descriptor_plus(v, 2048 * step));
        wgmma_commit();
        if (fault == 2 && thread == 0) mbarrier_arrive(empty(stage));
        if (fault == 2) named_barrier_sync(3, 128 * kConsumers);  // gives the producer time
        if (fault == 5) weights[0][0] ^= 0x8000;
        if (fault != 12) wgmma_wait<0>();
        if (fault != 2 && fault != 6 && thread == 0) mbarrier_arrive(empty(stage));
    }
    if (fault == 13 && thread >= 96) return;
    named_barrier_sync(1 + group, 128);
    for (int n = 0; n < kColumns / 8; ++n)
        for (int r = 0; r < 4; ++r) {
            const int row = 64 * group + thread / 32 * 16 + thread % 32 / 4 + 8 * (r / 2);
            p.output[(128 * block_index() + row) * kColumns + 8 * n + 2 * (thread % 4) + r % 2] = o[n][r];
        }
}

inline void matmul(const MatmulParams& p) {
    if (thread_index() == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            mbarrier_init(full(stage), 1);
            mbarrier_init(empty(stage), kConsumers);
        }
        mbarrier_init(rows_full(), 1);
        if (fault == 9) mbarrier_init(rows_at(1), 1);
        if (fault != 14) mbarrier_init_fence();
    }
    if (fault != 8) block_barrier();
    const int group = warp_uniform(thread_index() / 128);
    if (group < kConsumers) {
        raise_registers<240>();
        consume(p, group);
    } else {
        lower_registers<24>();
        if (thread_index() % 128 == 0) produce(p);
    }
}

}  // namespace portattn

extern "C" __attribute__((visibility("default"))) const char* emulate(const void* bytes, int64_t size,
                                                                      int grid, int shared_bytes, int order,
                                                                      int fault) {
    portattn::fault = fault;
    portattn::MatmulParams params;
    if (size != static_cast<int64_t>(sizeof(params))) return "the params have another size";
    std::memcpy(&params, bytes, sizeof(params));
    return portattn::emulator::run_grid([&params] { matmul(params); }, grid, 384, shared_bytes, order);
}
