// Attention forward over any plan, for sm_90a: copy engine, warpgroup matrix products, a producer warp.
//
// FlashAttention-3 (Shah et al. 2024, section 3) on the tile lists of docs/formats.md. A block has kConsumers
// warpgroups of 64 query rows each, a scheduler warp that finds the work, and a producer warp that reads its
// tile list and starts the copies of Q, K and V. A consumer computes S of one tile while O takes the weights
// of the tile before (its algorithm 2), and consumers may take turns at the tensor cores (its section 3.1).
// Blocks stay and take work after work, so that a block's first copies run during the stores of its last
// item. What follows the tiles is the sm_80 kernel's: registers hold S and O in the same layout. It does not
// do: float32, kv_lengths, gradients.
#include "softmax_sm90.cuh"

namespace portattn {

PA_DEVICE void start_scores(Scores& s, uint64 query, uint64 key) {
    keep_registers(s);
    wgmma_fence();
    PA_UNROLL
    for (int step = 0; step < kHeadDim / 16; ++step) {
        const int within = 32 * (step % 4);
        wgmma_from_shared<kDtype == kBfloat16>(
            s[0], descriptor_plus(query, (step / 4) * kQueryPanelBytes + within),
            descriptor_plus(key, (step / 4) * kTilePanelBytes + within), step > 0);
    }
    wgmma_commit();
}

template <typename Function>
PA_DEVICE void start_output(Output& o, Weights& weights, uint64 value, Function near_end) {
    keep_registers(o);
    keep_registers(weights);
    wgmma_fence();
    PA_UNROLL
    for (int step = 0; step < kBlockK / 16; ++step) {
        if (step == kBlockK / 16 - kEarlySteps) near_end();
        wgmma_from_registers<kDtype == kBfloat16>(o[0], weights.a[step], descriptor_plus(value, 2048 * step));
    }
    wgmma_commit();
}

// One consumer warpgroup: its buffers, its place in the pipelines, its rows.
struct Consumer {
    const Params& p;
    const Shared& shared;
    const Lane lane;
    const int group;
    int tile;        // tiles begun since the kernel started
    int query;       // Q tiles, likewise
    int count;       // works, likewise
    int tile_begin;  // of the work's item

    PA_DEVICE Work work() const { return read_work(shared, count); }
    PA_DEVICE bool leads() const { return thread_index() % 128 == 0; }

    // The stage of this tile, and of the one before: known at compile time where kStage is not -1, so that
    // the addresses are not worked out while the tensor cores wait.
    template <int kStage>
    PA_DEVICE int stage() const {
        return kStage < 0 ? tile % kNumStages : kStage;
    }
    template <int kStage>
    PA_DEVICE int stage_before() const {
        return kStage < 0 ? (tile - 1) % kNumStages : (kStage + kNumStages - 1) % kNumStages;
    }

    PA_DEVICE void wait_key(int stage) const {
        mbarrier_wait(shared.key_full(stage), (tile / kNumStages) & 1);
    }
    PA_DEVICE void wait_value(int stage) const {  // of the tile before
        mbarrier_wait(shared.value_full(stage), ((tile - 1) / kNumStages) & 1);
    }
    PA_DEVICE void release(int stage, bool is_value) const {
        if constexpr (kNamedRelease) {
            named_barrier_arrive(free_barrier(stage, is_value), kReleaseThreads);
        } else if (leads()) {
            mbarrier_arrive(is_value ? shared.value_empty(stage) : shared.key_empty(stage));
        }
    }
    PA_DEVICE uint64 query_tile() const { return panel_descriptor(shared.query(group), 16); }
    PA_DEVICE uint64 key_tile(int stage) const { return panel_descriptor(shared.key(stage), 16); }
    PA_DEVICE uint64 value_tile(int stage) const {
        return panel_descriptor(shared.value(stage), kTilePanelBytes);
    }

    // Consumers issue their products in turns: the others' softmax then runs beside them.
    PA_DEVICE void take_turn() const {
        if constexpr (kPingPong) named_barrier_sync(kTurnBarrier + group, 256);
    }
    PA_DEVICE void pass_turn() const {
        if constexpr (kPingPong) named_barrier_arrive(kTurnBarrier + (group + 1) % kConsumers, 256);
    }
};

// What a partial tile masks, and where score terms lie; read before the products, so that they hide it.
struct TileInfo {
    TileKeys keys;
    TileMask mask;
};

template <bool kPartial>
PA_DEVICE void begin_tile(TileInfo& tile, const Consumer& consumer, int index) {
    // The work is read where it is needed: registers are short.
    if constexpr (kScoreTerms) tile.keys = tile_keys(consumer.p, consumer.work().item, index);
    if constexpr (kPartial) {
        const int* entry = consumer.p.tiles + 4 * static_cast<int64>(consumer.tile_begin + index);
        const int same = load_int(entry + 2);
        const int other = load_int(entry + 3);
        if (same == other) {
            mask_by_bits(tile.mask, consumer.p, consumer.lane, same);
        } else {
            mask_by_ids(tile.mask, consumer.p, consumer.lane, consumer.work(),
                        TileKeys{load_int(entry), load_int(entry + 1)}, same, other);
        }
    }
}

// Scores to weights in place; returns whether O must be rescaled.
template <bool kPartial>
PA_DEVICE bool scores_to_weights(Scores& s, RowState& state, RowFactors& rescale, const TileInfo& tile,
                                 const Consumer& consumer) {
    if constexpr (kScoreTerms) add_score_terms(s, consumer.p, consumer.lane, consumer.work(), tile.keys);
    if constexpr (kPartial) apply_mask(s, tile.mask);
    const bool changed = scores_to_distances(s, state, rescale, kScoreTerms ? 1.0f : consumer.p.scale_log2);
    distances_to_weights(s, state);
    return changed;
}

template <bool kPartial>
PA_DEVICE void first_tile(Consumer& consumer, Scores& s, Weights& weights, RowState& state) {
    const int stage = consumer.stage<-1>();
    TileInfo tile;
    begin_tile<kPartial>(tile, consumer, 0);
    consumer.wait_key(stage);
    consumer.take_turn();
    start_scores(s, consumer.query_tile(), consumer.key_tile(stage));
    consumer.pass_turn();
    wgmma_wait<0>();
    keep_registers(s);
    consumer.release(stage, false);
    RowFactors rescale;  // O is still 0
    scores_to_weights<kPartial>(s, state, rescale, tile, consumer);
    pack_weights(weights, s);
    ++consumer.tile;
}

// One tile. kStage: as in Consumer::stage; where it is known, weights and next_weights are two buffers if
// there are two, else the same.
template <bool kPartial, int kStage>
PA_DEVICE void next_tile(Consumer& consumer, Scores& s, Output& o, Weights& weights, Weights& next_weights,
                         RowState& state, int index) {
    constexpr bool kPacksEarly = kStage >= 0 && kWeightBuffers > 1;
    const int stage = consumer.stage<kStage>();
    const int before = consumer.stage_before<kStage>();
    TileInfo tile;
    begin_tile<kPartial>(tile, consumer, index);
    consumer.wait_key(stage);
    consumer.take_turn();
    start_scores(s, consumer.query_tile(), consumer.key_tile(stage));
    consumer.wait_value(before);
    // The turn passes before the last products are issued: the next consumer's follow without a gap.
    start_output(o, weights, consumer.value_tile(before), [&] { consumer.pass_turn(); });
    wgmma_wait<1>();
    keep_registers(s);
    consumer.release(stage, false);
    RowFactors rescale;
    const bool changed = scores_to_weights<kPartial>(s, state, rescale, tile, consumer);
    if constexpr (kPacksEarly) pack_weights(next_weights, s);
    keep_registers(s);
    // Otherwise ptxas moves the wait before the exponentials, which then overlap nothing.
    order_after(state.sum[0][0] + state.sum[0][1], consumer.shared.flag());
    wgmma_wait<0>();
    keep_registers(o);
    keep_registers(weights);
    consumer.release(before, true);
    if constexpr (!kPacksEarly) pack_weights(next_weights, s);
    if (changed) rescale_output(o, rescale);
    ++consumer.tile;
}

template <int kStage = 0>
PA_DEVICE void next_full_tile(Consumer& consumer, Scores& s, Output& o, Weights (&buffers)[kWeightBuffers],
                              RowState& state, int index) {
    if constexpr (kWeightBuffers == 1) {
        next_tile<false, -1>(consumer, s, o, buffers[0], buffers[0], state, index);
    } else if (kStage + 1 < kNumStages && consumer.tile % kNumStages != kStage) {
        next_full_tile<kStage + 1 < kNumStages ? kStage + 1 : 0>(consumer, s, o, buffers, state, index);
    } else {
        next_tile<false, kStage>(consumer, s, o, buffers[(kStage + 1) % 2], buffers[kStage % 2], state,
                                 index);
    }
}

PA_DEVICE void run_tiles(Consumer& consumer, Output& o, RowState& state) {
    const Work work = consumer.work();
    const int partial = warp_uniform(work.item.tile_end - work.item.tile_begin);
    const int total = warp_uniform(num_tiles(work.item));
    const bool keeps_query = stages_over_query(consumer.p);
    if (total == 0 && !keeps_query) return;
    consumer.tile_begin = work.item.tile_begin;
    mbarrier_wait(consumer.shared.query_full(consumer.group), consumer.query & 1);
    ++consumer.query;
    if (total == 0) return;  // its rows are stored over the Q buffer all the same
    Scores s;
    Weights buffers[kWeightBuffers];
    if (partial > 0) {
        first_tile<true>(consumer, s, buffers[0], state);
    } else {
        first_tile<false>(consumer, s, buffers[0], state);
    }
#pragma unroll 1
    for (int index = 1; index < partial; ++index)
        next_tile<true, -1>(consumer, s, o, buffers[0], buffers[0], state, index);
    place_weights(buffers, consumer.tile - 1);
#pragma unroll 1
    for (int index = partial > 1 ? partial : 1; index < total; ++index)
        next_full_tile(consumer, s, o, buffers, state, index);
    if (!keeps_query && consumer.leads()) mbarrier_arrive(consumer.shared.query_empty(consumer.group));
    const int before = consumer.stage_before<-1>();
    consumer.wait_value(before);
    fetch_weights(buffers, consumer.tile - 1);
    start_output(o, buffers[0], consumer.value_tile(before), [] {});
    wgmma_wait<0>();
    keep_registers(o);
    consumer.release(before, true);
}

PA_DEVICE void stage_rows(const Consumer& consumer, const Work& work, const Output& o,
                          const RowState& state) {
    uint32 stage = consumer.shared.stage();
    if constexpr (!kStageApart) {
        // Over this warpgroup's Q, once its four warps are done with it; store_rows adds the warp's place.
        named_barrier_sync(kGroupBarrier + consumer.group, 128);
        stage = consumer.shared.query(consumer.group) - 4 * kStageBytes * consumer.group;
    }
    store_rows(consumer.p, work, consumer.lane, o, state, stage);
    if constexpr (!kStageApart) {
        async_proxy_fence();  // before the next Q is copied here
        named_barrier_sync(kGroupBarrier + consumer.group, 128);
        if (consumer.leads()) mbarrier_arrive(consumer.shared.query_empty(consumer.group));
    }
}

PA_DEVICE void finish_work(const Consumer& consumer, const Work& work, Output& o, const RowState& state) {
    if (stores_directly(consumer.p)) {
        store_rows_directly(consumer.p, work, consumer.lane, o, state);
    } else {
        stage_rows(consumer, work, o, state);
    }
    if (work.item.slot < 0) return;
    const auto barrier = [] { named_barrier_sync(kConsumersBarrier, 128 * kConsumers); };
    if (is_last_piece(consumer.p, work, consumer.shared.flag(), barrier))
        merge_pieces(consumer.p, work, consumer.lane);
}

PA_DEVICE void consume(const Params& p, const Shared& shared, int group) {
    Consumer consumer{p, shared, this_lane(), group, 0, 0, 0, 0};
    if (kPingPong && group == kConsumers - 1) consumer.pass_turn();  // the first turn is consumer 0's
#pragma unroll 1
    for (;; ++consumer.count) {
        wait_for_work(shared, consumer.count);
        if (warp_uniform(consumer.work().batch_head) < 0) return;
        Output o;
        RowState state;
        PA_UNROLL
        for (int n = 0; n < kOutTiles; ++n) {
            PA_UNROLL
            for (int r = 0; r < 4; ++r) o[0][n][r] = 0.0f;
        }
        PA_UNROLL
        for (int half = 0; half < 2; ++half) {
            state.max[0][half] = -infinity();
            state.sum[0][half] = 0.0f;
        }
        run_tiles(consumer, o, state);
        finish_work(consumer, consumer.work(), o, state);
        release_work(shared, consumer.count, consumer.lane.lane);
    }
}

}  // namespace portattn

PA_KERNEL void PA_LAUNCH_BOUNDS(portattn::kBlockThreads, portattn::kBlocksPerSm)
    portattn_forward_sm90(PA_GRID_CONSTANT portattn::Params params,
                          PA_GRID_CONSTANT portattn::Hopper hopper) {
    using namespace portattn;
    const Shared shared = this_shared();
    const int group = warp_uniform(thread_index() / 128);
    if (thread_index() == 0) shared.init_barriers();
    block_barrier();
    if (group == kConsumers) {
        lower_registers<kProducerRegisters>();
        const int warp = warp_uniform(thread_index() / 32) - 4 * kConsumers;
        if (warp == 0) produce(params, hopper, shared);
        if (warp == 1) schedule(params, hopper, shared);
    } else {
        raise_registers<kConsumerRegisters>();
        consume(params, shared, group);
    }
}
