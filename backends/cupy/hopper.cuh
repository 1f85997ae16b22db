// The sm_90a kernel's shared memory, its barriers, and its producer warp.
#pragma once

#include "direct_store.cuh"

namespace portattn {

constexpr int kConsumers = PA_CONSUMERS;  // warpgroups of 64 query rows
constexpr bool kPingPong = PA_PING_PONG;
constexpr bool kStageApart = PA_STAGE_APART;  // O is stored through shared memory of its own, not over Q
constexpr int kProducerRegisters = PA_PRODUCER_REGISTERS;
constexpr int kConsumerRegisters = PA_CONSUMER_REGISTERS;
constexpr int kMaxSteps = PA_MAX_STEPS;  // distinct key steps above 1 in one pass

constexpr int kWeightBuffers = PA_WEIGHT_BUFFERS;
// Two consumers say by hardware barriers that a tile may be overwritten, which wakes the producer sooner than
// an mbarrier; three of them wait for each other there.
constexpr bool kNamedRelease = kConsumers == 2;
constexpr int kEarlySteps = 2;  // products of a tile that are issued after the turn has passed
constexpr int kWorkSlots = 3;   // a block may hold one, begin the next and already know the one after
// The next work is asked for so many tiles before the end of the last: finding it takes a few microseconds,
// and work that is taken too early is missing where blocks run out of it.
constexpr int kTilesAhead = 4;
// What partial tiles mask, by number of tile: one that is read late is overwritten after two rounds of
// stages.
constexpr int kEntrySlots = 2 * kNumStages;
constexpr int kBlockThreads = 128 * (kConsumers + 1);
constexpr int kPanels = (kHeadDim + 63) / 64;  // of 64 columns, 128 bytes: what a swizzled row holds
constexpr int kPanelsV = (kHeadDimV + 63) / 64;
constexpr int kQueryPanelBytes = 64 * 128;
constexpr int kTilePanelBytes = kBlockK * 128;
constexpr int kQueryTileBytes = kPanels * kQueryPanelBytes;  // of one consumer
constexpr int kKeyTileBytes = kPanels * kTilePanelBytes;
constexpr int kValueTileBytes = kPanelsV * kTilePanelBytes;

static_assert(kNumWarps == 4 * kConsumers && kRowTiles == 1, "a warp takes 16 rows");
static_assert(kBlockK % 16 == 0 && kBlockK <= 256, "the shapes of wgmma");
static_assert(kBlockK / 16 > kEarlySteps, "the turn passes within a tile");

// Hardware barriers; 0 is the whole block's.
enum { kConsumersBarrier = 1, kTurnBarrier = 2, kGroupBarrier = 5, kFreeBarrier = 8 };
constexpr int kReleaseThreads = 128 * kConsumers + 32;  // the consumers and the producer warp
static_assert(kFreeBarrier + 2 * kNumStages <= 16, "16 hardware barriers");

PA_DEVICE int free_barrier(int stage, bool is_value) { return kFreeBarrier + 2 * stage + (is_value ? 1 : 0); }

// The kernel's second argument. launch_sm90.py packs it.
struct Hopper {
    TensorMap query[2];                // rows of the pass's step: whole, ragged (below)
    TensorMap key[1 + 2 * kMaxSteps];  // step 1; then whole and ragged for each of key_steps
    TensorMap value[1 + 2 * kMaxSteps];
    int num_work;     // items of the pass times batch times heads
    int has_tickets;  // blocks take work one by one, by the two counters behind those of the pieces
    int key_steps[kMaxSteps + 1];  // above 1; 0 where unused
};

// Work taken beyond each block's first, and blocks that found none left; both zero between launches.
PA_DEVICE int* tickets(const Params& p) {
    return p.counters + static_cast<int64>(p.batch) * p.num_heads * p.num_counters;
}

// Rows of one residue modulo `step` are one dimension of a map, the residues another. A tensor is a
// rectangle: where the length is no multiple of the step, the residues below the remainder have one row more
// and a map of their own. So no row that does not exist is ever read.
PA_DEVICE bool is_ragged(int residue, int step, int length) { return residue < length % step; }

struct Weights {
    uint32 a[kBlockK / 16][4];  // P in 16 bits, as wgmma's operand A
};

template <int kTiles>
PA_DEVICE void keep_registers(float (&tiles)[1][kTiles][4]) {
    PA_UNROLL
    for (int n = 0; n < kTiles; ++n) {
        PA_UNROLL
        for (int r = 0; r < 4; ++r) keep_register(tiles[0][n][r]);
    }
}

PA_DEVICE void keep_registers(Weights& weights) {
    PA_UNROLL
    for (int step = 0; step < kBlockK / 16; ++step) {
        PA_UNROLL
        for (int r = 0; r < 4; ++r) keep_register(weights.a[step][r]);
    }
}

// Q tiles, the stages of K, those of V, where O is staged, then work, entries of partial tiles, and barriers.
struct Shared {
    uint32 base;

    static constexpr int kKey = kConsumers * kQueryTileBytes;
    static constexpr int kValue = kKey + kNumStages * kKeyTileBytes;
    static constexpr int kStage = kValue + kNumStages * kValueTileBytes;
    static constexpr int kWork = kStage + (kStageApart ? kNumWarps * kStageBytes : 0);
    static constexpr int kWorkBytes = 80;
    static constexpr int kEntries = kWork + kWorkSlots * kWorkBytes + 16;
    static constexpr int kBarriers = kEntries + kEntrySlots * 16;
    static_assert(kWork % 16 == 0, "work is read 16 bytes at a time");

    PA_DEVICE uint32 query(int consumer) const { return base + consumer * kQueryTileBytes; }
    PA_DEVICE uint32 key(int stage) const { return base + kKey + stage * kKeyTileBytes; }
    PA_DEVICE uint32 value(int stage) const { return base + kValue + stage * kValueTileBytes; }
    PA_DEVICE uint32 stage() const { return base + kStage; }
    PA_DEVICE uint32 work(int count) const { return base + kWork + count % kWorkSlots * kWorkBytes; }
    PA_DEVICE uint32 flag() const { return base + kWork + kWorkSlots * kWorkBytes; }
    PA_DEVICE uint32 entry(int tile) const { return base + kEntries + tile % kEntrySlots * 16; }

    PA_DEVICE uint32 barrier(int index) const { return base + kBarriers + 8 * index; }
    PA_DEVICE uint32 work_full(int count) const { return barrier(count % kWorkSlots); }
    PA_DEVICE uint32 work_empty(int count) const { return barrier(kWorkSlots + count % kWorkSlots); }
    PA_DEVICE uint32 work_wanted() const { return barrier(2 * kWorkSlots); }
    PA_DEVICE uint32 query_full(int consumer) const { return barrier(2 * kWorkSlots + 1 + consumer); }
    PA_DEVICE uint32 query_empty(int consumer) const { return query_full(kConsumers + consumer); }
    PA_DEVICE uint32 key_full(int stage) const { return query_full(2 * kConsumers + stage); }
    PA_DEVICE uint32 key_empty(int stage) const { return key_full(kNumStages + stage); }
    PA_DEVICE uint32 value_full(int stage) const { return key_full(2 * kNumStages + stage); }
    PA_DEVICE uint32 value_empty(int stage) const { return key_empty(2 * kNumStages + stage); }

    PA_DEVICE void init_barriers() const {
        PA_UNROLL
        for (int slot = 0; slot < kWorkSlots; ++slot) {
            mbarrier_init(work_full(slot), 1);
            mbarrier_init(work_empty(slot), kNumWarps + 1);
        }
        mbarrier_init(work_wanted(), 1);
        PA_UNROLL
        for (int consumer = 0; consumer < kConsumers; ++consumer) {
            mbarrier_init(query_full(consumer), 1);
            mbarrier_init(query_empty(consumer), 1);
        }
        PA_UNROLL
        for (int stage = 0; stage < kNumStages; ++stage) {
            mbarrier_init(key_full(stage), 1);
            mbarrier_init(value_full(stage), 1);
            mbarrier_init(key_empty(stage), kConsumers);
            mbarrier_init(value_empty(stage), kConsumers);
        }
        mbarrier_init_fence();
    }
};

PA_DEVICE Shared this_shared() { return Shared{(shared_base() + 1023u) & ~1023u}; }

PA_DEVICE int num_tiles(const Item& item) { return item.tile_end - item.tile_begin + item.full_count; }

static_assert(sizeof(Work) == Shared::kWorkBytes, "20 ints");

// Work travels from the scheduler warp to all others through two slots.
PA_DEVICE void wait_for_work(const Shared& shared, int count) {
    mbarrier_wait(shared.work_full(count), (count / kWorkSlots) & 1);
}

PA_DEVICE bool work_is_known(const Shared& shared, int count) {
    return mbarrier_test(shared.work_full(count), (count / kWorkSlots) & 1);
}

PA_DEVICE Work read_work(const Shared& shared, int count) {
    const uint32 slot = shared.work(count);
    Work work;
    int* fields = &work.batch;
    PA_UNROLL
    for (int n = 0; n < Shared::kWorkBytes / 16; ++n) {
        uint32 words[4];
        shared_load_words(words, slot + 16 * n);
        PA_UNROLL
        for (int t = 0; t < 4; ++t) fields[4 * n + t] = static_cast<int>(words[t]);
    }
    return work;
}

PA_DEVICE void release_work(const Shared& shared, int count, int lane) {
    warp_barrier();
    if (lane == 0) mbarrier_arrive(shared.work_empty(count));
}

// Rows that are not stored directly go through shared memory, over Q where there is no other.
PA_DEVICE bool stages_over_query(const Params& p) { return !kStageApart && !stores_directly(p); }

// Where the map of the pass has the item's rows.
struct QueryRows {
    const TensorMap* map;
    int row, residue;
};

PA_DEVICE QueryRows query_rows(const Params& p, const Hopper& hopper, const Item& item) {
    const int residue = item.q_start % item.q_step;
    return QueryRows{hopper.query + (is_ragged(residue, item.q_step, p.seqlen_q) ? 1 : 0),
                     item.q_start / item.q_step, residue};
}

// Where a tile's rows are: which map of K or V, its coordinates in it.
struct Place {
    int map, row, residue, head, batch;
};

// The producer warp: what all its lanes know. One of them starts the copies. The time from a tile's release
// to its next copy is the consumers': all that can be worked out before is.
struct Producer {
    const Params& p;
    const Hopper& hopper;
    const Shared& shared;
    const int lane;
    int tile;           // K tiles begun since the kernel started
    int query;          // Q tiles, likewise
    TileKeys chunk;     // of tile 32*n + lane of the item
    int same, other;    // likewise: the bit tiles that a partial tile names
    bool owes_value;    // V of the last tile is still to come,
    Place value_place;  // from here

    PA_DEVICE TileKeys keys(const Work& work, int index) {
        if (index % 32 == 0) {
            chunk = tile_keys(p, work.item, index + lane);
            const int tile_index = work.item.tile_begin + index + lane;
            if (tile_index < work.item.tile_end) {
                same = load_int(p.tiles + 4 * static_cast<int64>(tile_index) + 2);
                other = load_int(p.tiles + 4 * static_cast<int64>(tile_index) + 3);
            }
        }
        return TileKeys{shuffle_int(chunk.start, index % 32), shuffle_int(chunk.step, index % 32)};
    }

    // What a partial tile masks goes with its keys, so that consumers wait for no memory but that of the
    // bits.
    PA_DEVICE void send_entry(TileKeys keys, int index) const {
        const uint32 target = shared.entry(tile);
        const int bits_same = shuffle_int(same, index % 32);
        const int bits_other = shuffle_int(other, index % 32);
        if (!elect_one()) return;
        shared_store_int(target, keys.start);
        shared_store_int(target + 4, keys.step);
        shared_store_int(target + 8, bits_same);
        shared_store_int(target + 12, bits_other);
    }

    PA_DEVICE int map_of(TileKeys keys) const {
        if (kMaxSteps == 0 || keys.step == 1) return 0;
        int which = 0;
        PA_UNROLL
        for (int n = 0; n < kMaxSteps; ++n)
            if (hopper.key_steps[n] == keys.step) which = 1 + 2 * n;
        return which + (is_ragged(keys.start % keys.step, keys.step, p.seqlen_k) ? 1 : 0);
    }

    PA_DEVICE Place place(TileKeys keys, int head, int batch) const {
        if constexpr (kMaxSteps == 0) return Place{0, keys.start, 0, head, batch};
        return Place{map_of(keys), keys.start / keys.step, keys.start % keys.step, head, batch};
    }

    // All lanes pass a wait before one starts what ends the next phase: a late one would wait for a later
    // phase than it means.
    PA_DEVICE void wait_all(uint32 barrier, int uses) const {
        mbarrier_wait(barrier, (uses & 1) ^ 1);
        warp_barrier();
    }

    // Until the stage's last tile has been read by all consumers.
    PA_DEVICE void wait_free(int stage, bool is_value, int number) const {
        const uint32 barrier = is_value ? shared.value_empty(stage) : shared.key_empty(stage);
        if constexpr (!kNamedRelease) return wait_all(barrier, number / kNumStages);
        if (number >= kNumStages) named_barrier_sync(free_barrier(stage, is_value), kReleaseThreads);
    }

    template <int kCount>
    PA_DEVICE void load_tile(const TensorMap* maps, uint32 target, uint32 full, const Place& from) const {
        if (!elect_one()) return;
        mbarrier_arrive_expect(full, kCount * kTilePanelBytes);
        PA_UNROLL
        for (int panel = 0; panel < kCount; ++panel)
            copy_box(target + panel * kTilePanelBytes, maps + from.map, full, 64 * panel, from.row,
                     from.residue, from.head, from.batch);
    }

    PA_DEVICE void load_key(const Place& from) const {
        const int stage = tile % kNumStages;
        wait_free(stage, false, tile);
        load_tile<kPanels>(hopper.key, shared.key(stage), shared.key_full(stage), from);
    }

    // V of the tile before, if it is still to come.
    PA_DEVICE void load_value() {
        if (!owes_value) return;
        owes_value = false;
        const int stage = (tile - 1) % kNumStages;
        wait_free(stage, true, tile - 1);
        load_tile<kPanelsV>(hopper.value, shared.value(stage), shared.value_full(stage), value_place);
    }

    PA_DEVICE void load_query(const Work& work) {
        const QueryRows rows = query_rows(p, hopper, work.item);
        PA_UNROLL
        for (int consumer = 0; consumer < kConsumers; ++consumer) {
            wait_all(shared.query_empty(consumer), query);
            if (!elect_one()) continue;
            if (num_tiles(work.item) == 0) {  // the buffer alone is wanted
                mbarrier_arrive(shared.query_full(consumer));
                continue;
            }
            mbarrier_arrive_expect(shared.query_full(consumer), kQueryTileBytes);
            PA_UNROLL
            for (int panel = 0; panel < kPanels; ++panel)
                copy_box(shared.query(consumer) + panel * kQueryPanelBytes, rows.map,
                         shared.query_full(consumer), 64 * panel, rows.row + 64 * consumer, rows.residue,
                         work.head, work.batch);
        }
        ++query;
    }

    // K runs one tile ahead of V, as the consumers do: also the next work's first K of the last work's last
    // V, which is left to come.
    PA_DEVICE void load_tiles(const Work& work) {
        const int total = warp_uniform(num_tiles(work.item));
        const int partial = warp_uniform(work.item.tile_end - work.item.tile_begin);
        const int ask = total > kTilesAhead ? total - kTilesAhead : 0;
        const int head = warp_uniform(work.head / p.group_size);
        const int batch = warp_uniform(work.batch);
#pragma unroll 1
        for (int n = 0; n < total; ++n) {
            if (n == ask && elect_one()) mbarrier_arrive(shared.work_wanted());
            const TileKeys now = keys(work, n);
            const Place from = place(now, head, batch);
            if (n < partial) send_entry(now, n);
            load_key(from);
            load_value();
            // Not before: Q may wait for rows to be stored that wait for V.
            if (n == 0) load_query(work);
            owes_value = true;
            value_place = from;
            ++tile;
        }
        if (total > 0) return;
        if (elect_one()) mbarrier_arrive(shared.work_wanted());
        load_value();
        if (stages_over_query(p)) load_query(work);
    }
};

PA_DEVICE void produce(const Params& p, const Hopper& hopper, const Shared& shared) {
    Producer producer{p, hopper, shared, thread_index() % 32, 0, 0, {0, 1}, 0, 0, false, {0, 0, 0, 0, 0}};
    if (elect_one()) {
        prefetch_tensor_map(hopper.query);
        prefetch_tensor_map(hopper.key);
        prefetch_tensor_map(hopper.value);
    }
    int count = 0;
    wait_for_work(shared, count);
#pragma unroll 1
    while (warp_any(read_work(shared, count).batch_head >= 0)) {  // a vote, as in consume()
        producer.load_tiles(read_work(shared, count));
        release_work(shared, count, producer.lane);
        ++count;
        // Work that is not known yet is no reason to keep the last one waiting.
        if (!warp_any(work_is_known(shared, count))) producer.load_value();
        wait_for_work(shared, count);
    }
    producer.load_value();
}

// The scheduler warp finds the block's next work whenever the producer asks for it.
PA_DEVICE int next_index(const Params& p, const Hopper& hopper, int index, int lane) {
    if (!hopper.has_tickets) return index + grid_blocks();
    int taken = 0;
    if (lane == 0) taken = atomic_add(tickets(p), 1);
    return grid_blocks() + warp_uniform(taken);
}

// The last block to find nothing left clears the tickets for the next launch.
PA_DEVICE void hand_back_tickets(const Params& p, const Hopper& hopper) {
    if (!hopper.has_tickets || atomic_add(tickets(p) + 1, 1) != grid_blocks() - 1) return;
    tickets(p)[0] = 0;
    tickets(p)[1] = 0;
}

PA_DEVICE void send_work(const Work& work, const Shared& shared, int count, int lane) {
    mbarrier_wait(shared.work_empty(count), ((count / kWorkSlots) & 1) ^ 1);
    warp_barrier();  // as in Producer::wait_all
    if (lane != 0) return;
    const int* fields = &work.batch;
    PA_UNROLL
    for (int n = 0; n < Shared::kWorkBytes / 4; ++n) shared_store_int(shared.work(count) + 4 * n, fields[n]);
    mbarrier_arrive(shared.work_full(count));
}

// The block's slots for Q may be in use until the work begins; the L2 cache has room at once.
PA_DEVICE void prefetch_query(const Params& p, const Hopper& hopper, const Work& work) {
    const QueryRows rows = query_rows(p, hopper, work.item);
    PA_UNROLL
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
        PA_UNROLL
        for (int panel = 0; panel < kPanels; ++panel)
            prefetch_box(rows.map, 64 * panel, rows.row + 64 * consumer, rows.residue, work.head, work.batch);
    }
}

PA_DEVICE void schedule(const Params& p, const Hopper& hopper, const Shared& shared) {
    const int lane = thread_index() % 32;
    int index = block_index();
#pragma unroll 1
    for (int count = 0;; ++count) {
        Work work{};
        work.batch_head = -1;  // the end
        while (index < hopper.num_work) {
            work = find_work(p, index);
            if (work.item.num_rows != 0) break;
            work.batch_head = -1;  // padding
            index = next_index(p, hopper, index, lane);
        }
        send_work(work, shared, count, lane);
        if (work.batch_head < 0) break;
#ifndef PA_NO_PREFETCH
        if (lane == 0 && count > 0 && num_tiles(work.item) > 0) prefetch_query(p, hopper, work);
#endif
        mbarrier_wait(shared.work_wanted(), count & 1);
        warp_barrier();  // as in Producer::wait_all
        index = next_index(p, hopper, index, lane);
    }
    if (lane == 0) hand_back_tickets(p, hopper);
}

}  // namespace portattn
