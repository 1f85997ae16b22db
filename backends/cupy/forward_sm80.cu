// Attention forward over any plan, for sm_80 and later: mma.sync m16n8k16, cp.async, online softmax in
// registers.
//
// One block computes one item of the schedule for one head: a tile of block_q query rows against a list of KV
// tiles, partial ones (with a mask of bits or ids) first, then full ones (FlashAttention-2, Dao 2023,
// algorithm 1, on the tile lists of docs/formats.md). Rows cut into pieces are merged by the block that
// finishes last; later passes merge with the rows of earlier ones. float32 inputs take FMAs in place of
// tensor cores. It does not do: kv_lengths, gradients.
#include "epilogue.cuh"

namespace portattn {

// Shared memory: Q, then kNumStages K tiles, then kNumStages V tiles.
struct Buffers {
    uint32 query;

    PA_DEVICE uint32 key(int stage) const { return query + kQueryBytes + stage * kKeyBytes; }
    PA_DEVICE uint32 value(int stage) const {
        return query + kQueryBytes + kNumStages * kKeyBytes + stage * kValueBytes;
    }
};

// K and V of one head, and the next tile to load. The tile's position is read one tile before it is needed,
// so that the copies do not wait for it.
struct TileLoader {
    const Params& p;
    const Item& item;
    Buffers buffers;
    const char* key;
    const char* value;
    int total;
    TileKeys keys;  // of the next tile

    PA_DEVICE TileLoader(const Params& params, const Work& work, Buffers shared, int total_tiles)
        : p(params),
          item(work.item),
          buffers(shared),
          total(total_tiles),
          keys(tile_keys(params, work.item, 0)) {
        const int64 kv_head = work.head / p.group_size;
        key = static_cast<const char*>(p.key) +
              kElementBytes * (work.batch * p.key_stride_batch + kv_head * p.key_stride_head);
        value = static_cast<const char*>(p.value) +
                kElementBytes * (work.batch * p.value_stride_batch + kv_head * p.value_stride_head);
    }

    PA_DEVICE void load_key(int index, int stage) {
        if (index < total)
            load_rows<kBlockK, kQueryPitch>(buffers.key(stage), key, kElementBytes * p.key_stride_row,
                                            keys.start, keys.step, p.seqlen_k, kElementBytes * p.head_dim);
    }

    // After load_key of the same tile.
    PA_DEVICE void load_value(int index, int stage) {
        if (index < total)
            load_rows<kBlockK, kValuePitch>(buffers.value(stage), value, kElementBytes * p.value_stride_row,
                                            keys.start, keys.step, p.seqlen_k, kElementBytes * p.head_dim_v);
        keys = tile_keys(p, item, index + 1);
    }
};

PA_DEVICE int next_stage(int stage) { return stage + 1 == kNumStages ? 0 : stage + 1; }

PA_DEVICE void load_query_rows(const Params& p, const Work& work, uint32 shared) {
    const char* query = static_cast<const char*>(p.query) +
                        kElementBytes * (work.batch * p.query_stride_batch + work.head * p.query_stride_head);
    load_rows<kBlockQ, kQueryPitch>(shared, query, kElementBytes * p.query_stride_row, work.item.q_start,
                                    work.item.q_step, p.seqlen_q, kElementBytes * p.head_dim);
}

// What a warp knows about the tile that it computes.
struct TileState {
    TileKeys keys;
    bool partial;
    bool active;  // false: the mask keeps nothing for this warp's rows
    TileMask mask;
};

PA_DEVICE void begin_tile(TileState& tile, const Params& p, const Lane& lane, const Work& work, int index) {
    tile.partial = index < work.item.tile_end - work.item.tile_begin;
    tile.active = true;
    if (kScoreTerms || tile.partial) tile.keys = tile_keys(p, work.item, index);
    if (!tile.partial) return;
    const int* entry = p.tiles + 4 * static_cast<int64>(work.item.tile_begin + index);
    const int same = load_int(entry + 2);
    const int other = load_int(entry + 3);
    tile.active = tile_reaches_warp(p, lane, same, other);
    if (tile.active) load_mask(tile.mask, p, lane, work, tile.keys, same, other);
}

PA_DEVICE void score_to_weight(Scores& s, RowState& state, const RowShifts& shifts, float c, int tile, int n,
                               int r) {
    const float weight = weight_exp2(fma_f32(s[tile][n][r], c, shifts.shift[tile][r / 2]));
    s[tile][n][r] = weight;
    state.sum[tile][r / 2] += weight;
}

// Part `part` of `parts` of the weights of 16 keys.
PA_DEVICE void weights_of_keys(Scores& s, RowState& state, const RowShifts& shifts, float c, int step,
                               int part, int parts) {
    constexpr int kElements = 8 * kRowTiles;
    PA_UNROLL
    for (int index = 0; index < kElements; ++index) {
        if (index * parts / kElements != part) continue;
        score_to_weight(s, state, shifts, c, index / 8, 2 * step + index / 4 % 2, index % 4);
    }
}

// O += P V. The weights of the next 16 keys are computed between the products of these: a warp issues in
// order, and a product keeps the tensor cores busy for longer than its issue.
PA_DEVICE void add_tile(Output& o, Scores& s, RowState& state, const RowShifts& shifts, float c,
                        const Lane& lane, uint32 value) {
    constexpr int kSteps = kBlockK / 16;
    if constexpr (!kTensorCores) {
        PA_UNROLL
        for (int step = 0; step < kSteps; ++step) weights_of_keys(s, state, shifts, c, step, 0, 1);
        weights_value_fma(o, s, lane, value);
        return;
    }
    constexpr int kPairs = kOutTiles / 2;
    const uint32 address = value + chunk_offset<kValuePitch>(lane.lane % 16, lane.lane / 16);
    weights_of_keys(s, state, shifts, c, 0, 0, 1);
    PA_UNROLL
    for (int step = 0; step < kSteps; ++step) {
        uint32 a[kRowTiles][4];
        PA_UNROLL
        for (int tile = 0; tile < kRowTiles; ++tile) {
            // The layout of accumulators is that of A: no shuffle is needed.
            PA_UNROLL
            for (int r = 0; r < 4; ++r) {
                const float* pair = &s[tile][2 * step + r / 2][2 * (r % 2)];
                a[tile][r] = pack_pair<kDtype == kBfloat16>(pair[0], pair[1]);
            }
        }
        PA_UNROLL
        for (int pair = 0; pair < kPairs; ++pair) {
            uint32 b[4];
            ldmatrix_x4_trans(b, other_chunk<kValuePitch>(address, 2 * pair) + 16 * step * kValuePitch);
            PA_UNROLL
            for (int tile = 0; tile < kRowTiles; ++tile) {
                mma_m16n8k16<kDtype == kBfloat16>(o[tile][2 * pair], a[tile], b[0], b[1]);
                mma_m16n8k16<kDtype == kBfloat16>(o[tile][2 * pair + 1], a[tile], b[2], b[3]);
            }
            if (step + 1 < kSteps) weights_of_keys(s, state, shifts, c, step + 1, pair, kPairs);
        }
    }
}

PA_DEVICE void finish_tile(Scores& s, Output& o, RowState& state, const TileState& tile, const Params& p,
                           const Lane& lane, const Work& work, uint32 value) {
    const float c = kScoreTerms ? 1.0f : p.scale_log2;
    RowShifts shifts;
    bool grown;
    if constexpr (kScoreTerms) add_score_terms(s, p, lane, work, tile.keys);
    if (tile.partial) {
        apply_mask(s, tile.mask);
        grown = raise_bases<true>(s, state, shifts, c);
    } else {
        // A bias may hold -inf in a whole row of a full tile.
        grown = raise_bases<kBias>(s, state, shifts, c);
    }
    if (grown) rescale_output(o, shifts.factors);
    add_tile(o, s, state, shifts, c, lane, value);
}

// Q, in the group of the first tile's K. -1 or 0 times the query: the scale's sign.
PA_DEVICE void take_query(QueryFragments& fragments, const Params& p, const Lane& lane,
                          const Buffers& buffers) {
    if (p.query_factor != 1) {
        scale_query(buffers.query, p.query_factor);
        block_barrier();
    }
    load_query(fragments, lane, buffers.query);
}

// Several buffers: kNumStages - 1 tiles are under way while one is computed, and one barrier a tile says both
// that the tile has come and that every warp has left the one before, whose buffer the next copy takes.
PA_DEVICE void run_tiles_staged(Output& o, RowState& state, const Params& p, const Lane& lane,
                                const Work& work, const Buffers& buffers, int total) {
    constexpr int kAhead = kNumStages - 1;
    TileLoader loader(p, work, buffers, total);
    load_query_rows(p, work, buffers.query);
    int load_stage = 0;
    PA_UNROLL
    for (int index = 0; index < kAhead; ++index) {
        loader.load_key(index, load_stage);
        loader.load_value(index, load_stage);
        cp_async_commit();
        load_stage = next_stage(load_stage);
    }
    QueryFragments fragments;
    if (kQueryInRegisters || p.query_factor != 1) {
        cp_async_wait<kAhead - 1>();
        block_barrier();
        take_query(fragments, p, lane, buffers);
    }
    int stage = 0;
#pragma unroll 1
    for (int index = 0; index < total; ++index) {
        cp_async_wait<kAhead - 1>();
        block_barrier();  // it has come; every warp has left tile index - 1
        loader.load_key(index + kAhead, load_stage);
        loader.load_value(index + kAhead, load_stage);
        cp_async_commit();  // an empty group past the last tile, so that waiting can count groups
        TileState tile;
        begin_tile(tile, p, lane, work, index);
        if (tile.active) {
            Scores s;
            query_key(s, fragments, lane, buffers.query, buffers.key(stage));
            finish_tile(s, o, state, tile, p, lane, work, buffers.value(stage));
        }
        load_stage = next_stage(load_stage);
        stage = next_stage(stage);
    }
}

// One buffer each, two barriers a tile: V comes during Q K, the next K during the softmax and P V.
PA_DEVICE void run_tiles_single(Output& o, RowState& state, const Params& p, const Lane& lane,
                                const Work& work, const Buffers& buffers, int total) {
    TileLoader loader(p, work, buffers, total);
    load_query_rows(p, work, buffers.query);
    loader.load_key(0, 0);
    cp_async_commit();
    QueryFragments fragments;
    if (kQueryInRegisters || p.query_factor != 1) {
        cp_async_wait<0>();
        block_barrier();
        take_query(fragments, p, lane, buffers);
    }
#pragma unroll 1
    for (int index = 0; index < total; ++index) {
        cp_async_wait<0>();
        block_barrier();  // K has come; every warp has left V
        loader.load_value(index, 0);
        cp_async_commit();
        TileState tile;
        begin_tile(tile, p, lane, work, index);
        Scores s;
        if (tile.active) query_key(s, fragments, lane, buffers.query, buffers.key(0));
        cp_async_wait<0>();
        block_barrier();  // V has come; every warp has left K
        loader.load_key(index + 1, 0);
        cp_async_commit();
        if (tile.active) finish_tile(s, o, state, tile, p, lane, work, buffers.value(0));
    }
}

PA_DEVICE void run_tiles(Output& o, RowState& state, const Params& p, const Lane& lane, const Work& work,
                         const Buffers& buffers) {
    PA_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
        PA_UNROLL
        for (int n = 0; n < kOutTiles; ++n) {
            PA_UNROLL
            for (int r = 0; r < 4; ++r) o[tile][n][r] = 0.0f;
        }
        PA_UNROLL
        for (int half = 0; half < 2; ++half) {
            state.max[tile][half] = -infinity();
            state.sum[tile][half] = 0.0f;
        }
    }
    const int total = work.item.tile_end - work.item.tile_begin + work.item.full_count;
    if (total == 0) return;
    if constexpr (kNumStages > 1) {
        run_tiles_staged(o, state, p, lane, work, buffers, total);
    } else {
        run_tiles_single(o, state, p, lane, work, buffers, total);
    }
}

PA_DEVICE void forward_block(const Params& p) {
    const Work work = find_work(p, block_index());
    if (work.item.num_rows == 0) return;  // padding
    const Lane lane = this_lane();
    const Buffers buffers{shared_base()};
    Output o;
    RowState state;
    run_tiles(o, state, p, lane, work, buffers);
    block_barrier();  // every warp has left the tiles
    store_rows(p, work, lane, o, state, buffers.query);
    if (work.item.slot < 0) return;
    if (is_last_piece(p, work, buffers.query, [] { block_barrier(); })) merge_pieces(p, work, lane);
}

}  // namespace portattn

PA_KERNEL void PA_LAUNCH_BOUNDS(portattn::kThreads, portattn::kBlocksPerSm)
    portattn_forward_sm80(PA_GRID_CONSTANT portattn::Params params) {
    portattn::forward_block(params);
}
