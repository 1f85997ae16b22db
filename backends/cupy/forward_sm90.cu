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
    int tile;   // tiles begun since the kernel started
    int query;  // Q tiles, likewise
    int last;   // the work's last tile
    int count;  // works begun

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

    // The next Q, for a work of so many tiles.
    PA_DEVICE void begin_query(int tiles) {
        last = tile + tiles - 1;
        mbarrier_wait(shared.query_full(group), query & 1);
        ++query;
    }
    PA_DEVICE void release_query() const {
        if (leads()) mbarrier_arrive(shared.query_empty(group));
    }
    // After the work's last scores the next Q may come, unless rows are stored over this one.
    PA_DEVICE void release_key(int stage) const {
        release(stage, false);
        if (tile == last && !stages_over_query(p)) release_query();
    }
    PA_DEVICE int index(const Item& item) const { return tile - (last + 1 - num_tiles(item)); }
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

// What a partial tile masks, and where score terms lie; read while the products run.
struct TileInfo {
    TileKeys keys;
    TileMask mask;
};

template <bool kPartial>
PA_DEVICE void begin_tile(TileInfo& tile, const Consumer& consumer) {
    // The work is read where it is needed: registers are short.
    if constexpr (kScoreTerms) {
        const Item item = consumer.work().item;
        tile.keys = tile_keys(consumer.p, item, consumer.index(item));
    }
    if constexpr (kPartial) {
        uint32 entry[4];
        shared_load_words(entry, consumer.shared.entry(consumer.tile));
        const int same = static_cast<int>(entry[2]);
        const int other = static_cast<int>(entry[3]);
        if (same == other) {
            mask_by_bit_tile(tile.mask, consumer.p, consumer.lane, same);
        } else {
            mask_by_id_tile(tile.mask, consumer.p, consumer.lane, consumer.work(),
                            TileKeys{static_cast<int>(entry[0]), static_cast<int>(entry[1])}, same, other);
        }
    }
}

// Scores to weights in place; returns whether O must be rescaled. kFirst: of new rows.
template <bool kPartial, bool kFirst>
PA_DEVICE bool scores_to_weights(Scores& s, RowState& state, RowFactors& rescale, const TileInfo& tile,
                                 const Consumer& consumer) {
    if constexpr (kScoreTerms) add_score_terms(s, consumer.p, consumer.lane, consumer.work(), tile.keys);
    if constexpr (kPartial) apply_mask(s, tile.mask);
    const float c = kScoreTerms ? 1.0f : consumer.p.scale_log2;
    bool changed = false;
    if constexpr (kFirst) {
        first_distances(s, state, c);
    } else {
        changed = scores_to_distances(s, state, rescale, c);
    }
    distances_to_weights(s, state);
    return changed;
}

template <bool kPartial>
PA_DEVICE void first_tile(Consumer& consumer, Scores& s, Weights& weights, RowState& state) {
    const int stage = consumer.stage<-1>();
    consumer.wait_key(stage);
    consumer.take_turn();
    start_scores(s, consumer.query_tile(), consumer.key_tile(stage));
    consumer.pass_turn();
    TileInfo tile;
    begin_tile<kPartial>(tile, consumer);
    wgmma_wait<0>();
    keep_registers(s);
    consumer.release_key(stage);
    RowFactors rescale;  // O is still 0
    scores_to_weights<kPartial, true>(s, state, rescale, tile, consumer);
    pack_weights(weights, s);
    ++consumer.tile;
}

// One tile. kStage: as in Consumer::stage; where it is known, weights and next_weights are two buffers if
// there are two, else the same.
template <bool kPartial, int kStage>
PA_DEVICE void next_tile(Consumer& consumer, Scores& s, Output& o, Weights& weights, Weights& next_weights,
                         RowState& state) {
    constexpr bool kPacksEarly = kStage >= 0 && kWeightBuffers > 1;
    const int stage = consumer.stage<kStage>();
    const int before = consumer.stage_before<kStage>();
    consumer.wait_key(stage);
    consumer.take_turn();
    start_scores(s, consumer.query_tile(), consumer.key_tile(stage));
    consumer.wait_value(before);
    // The turn passes before the last products are issued: the next consumer's follow without a gap.
    start_output(o, weights, consumer.value_tile(before), [&] { consumer.pass_turn(); });
    TileInfo tile;
    begin_tile<kPartial>(tile, consumer);
    wgmma_wait<1>();
    keep_registers(s);
    consumer.release_key(stage);
    RowFactors rescale;
    const bool changed = scores_to_weights<kPartial, false>(s, state, rescale, tile, consumer);
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
                              RowState& state) {
    if constexpr (kWeightBuffers == 1) {
        next_tile<false, -1>(consumer, s, o, buffers[0], buffers[0], state);
    } else if (kStage + 1 < kNumStages && consumer.tile % kNumStages != kStage) {
        next_full_tile<kStage + 1 < kNumStages ? kStage + 1 : 0>(consumer, s, o, buffers, state);
    } else {
        next_tile<false, kStage>(consumer, s, o, buffers[(kStage + 1) % 2], buffers[kStage % 2], state);
    }
}

// Full tiles keep the weights of tile n in buffer n % kWeightBuffers: the next tile's are packed while the
// product with the last's runs.
PA_DEVICE void run_tiles(Consumer& consumer, Output& o, RowState& state, int total) {
    consumer.tile = warp_uniform(consumer.tile);
    const int partial = total - warp_uniform(consumer.work().item.full_count);
    Scores s;
    Weights buffers[kWeightBuffers];
    if (partial > 0) {
        first_tile<true>(consumer, s, buffers[0], state);
    } else {
        first_tile<false>(consumer, s, buffers[0], state);
    }
#pragma unroll 1
    for (int index = 1; index < partial; ++index)
        next_tile<true, -1>(consumer, s, o, buffers[0], buffers[0], state);
    place_weights(buffers, consumer.tile - 1);
#pragma unroll 1
    for (int index = partial > 1 ? partial : 1; index < total; ++index)
        next_full_tile(consumer, s, o, buffers, state);
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
        consumer.release_query();
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

PA_DEVICE void clear(Output& o) {
    PA_UNROLL
    for (int n = 0; n < kOutTiles; ++n) {
        PA_UNROLL
        for (int r = 0; r < 4; ++r) o[0][n][r] = 0.0f;
    }
}

PA_DEVICE RowState empty_rows() {
    RowState state;
    PA_UNROLL
    for (int half = 0; half < 2; ++half) {
        state.max[0][half] = -infinity();
        state.sum[0][half] = 0.0f;
    }
    return state;
}

PA_DEVICE void consume(const Params& p, const Shared& shared, int group) {
    Consumer consumer{p, shared, this_lane(), group, 0, 0, -1, 0};
    if (kPingPong && group == kConsumers - 1) consumer.pass_turn();  // the first turn is consumer 0's
    wait_for_work(shared, 0);
    // ptxas keeps matrix descriptors in uniform registers where it knows that all lanes go the same way: from
    // a vote, from counts. Else they are each lane's, and products wait until they are moved: a tenth slower.
#pragma unroll 1
    while (warp_any(consumer.work().batch_head >= 0)) {
        const int total = warp_uniform(num_tiles(consumer.work().item));
        Output o;
        RowState state = empty_rows();
        clear(o);
        // A work without tiles waits for the Q buffer all the same if its rows are stored over it.
        if (total > 0 || stages_over_query(p)) consumer.begin_query(total);
        if (total > 0) run_tiles(consumer, o, state, total);
        finish_work(consumer, consumer.work(), o, state);
        release_work(shared, consumer.count, consumer.lane.lane);
        wait_for_work(shared, ++consumer.count);
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
