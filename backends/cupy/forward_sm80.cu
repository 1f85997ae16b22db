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

    // Each commits a group, an empty one past the last tile, so that waiting can count groups.
    PA_DEVICE void load_key(int index) {
        if (index < total)
            load_rows<kBlockK, kQueryPitch>(buffers.key(index % kNumStages), key,
                                            kElementBytes * p.key_stride_row, keys.start, keys.step,
                                            p.seqlen_k, kElementBytes * p.head_dim);
        cp_async_commit();
    }

    PA_DEVICE void load_value(int index) {
        if (index < total)
            load_rows<kBlockK, kValuePitch>(buffers.value(index % kNumStages), value,
                                            kElementBytes * p.value_stride_row, keys.start, keys.step,
                                            p.seqlen_k, kElementBytes * p.head_dim_v);
        cp_async_commit();
        keys = tile_keys(p, item, index + 1);
    }
};

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

PA_DEVICE void scores_to_weights(Scores& s, Output& o, RowState& state, const TileState& tile,
                                 const Params& p, const Lane& lane, const Work& work) {
    if constexpr (kScoreTerms) add_score_terms(s, p, lane, work, tile.keys);
    if (tile.partial) {
        apply_mask(s, tile.mask);
        softmax_step<true>(s, o, state, p.scale_log2);
    } else {
        // A bias may hold -inf in a whole row of a full tile.
        softmax_step<kBias>(s, o, state, p.scale_log2);
    }
}

// kNumStages tiles are under way: a tile is loaded into the buffer that the previous one has left.
PA_DEVICE void run_tiles_staged(Output& o, RowState& state, const Params& p, const Lane& lane,
                                const Work& work, const Buffers& buffers, int total) {
    constexpr int kAhead = kNumStages - 1;
    TileLoader loader(p, work, buffers, total);
    load_query_rows(p, work, buffers.query);
    PA_UNROLL
    for (int index = 0; index < kAhead; ++index) {
        loader.load_key(index);
        loader.load_value(index);
    }
    cp_async_wait<2 * kAhead - 1>();
    block_barrier();
    if (p.query_factor != 1) {
        scale_query(buffers.query, p.query_factor);
        block_barrier();
    }
    QueryFragments fragments;
    load_query(fragments, lane, buffers.query);
#pragma unroll 1
    for (int index = 0; index < total; ++index) {
        cp_async_wait<2 * kAhead - 1>();
        block_barrier();  // K has come; every warp has left tile index - 1
        loader.load_key(index + kAhead);
        loader.load_value(index + kAhead);
        TileState tile;
        begin_tile(tile, p, lane, work, index);
        Scores s;
        if (tile.active) {
            query_key(s, fragments, lane, buffers.query, buffers.key(index % kNumStages));
            scores_to_weights(s, o, state, tile, p, lane, work);
        }
        cp_async_wait<2 * kAhead>();
        block_barrier();  // V has come
        if (tile.active) weights_value(o, s, lane, buffers.value(index % kNumStages));
    }
}

// One buffer each: the next K comes during the softmax and P V, the next V during Q K.
PA_DEVICE void run_tiles_single(Output& o, RowState& state, const Params& p, const Lane& lane,
                                const Work& work, const Buffers& buffers, int total) {
    TileLoader loader(p, work, buffers, total);
    load_query_rows(p, work, buffers.query);
    loader.load_key(0);
    cp_async_wait<0>();
    block_barrier();
    if (p.query_factor != 1) {
        scale_query(buffers.query, p.query_factor);
        block_barrier();
    }
    QueryFragments fragments;
    load_query(fragments, lane, buffers.query);
#pragma unroll 1
    for (int index = 0; index < total; ++index) {
        loader.load_value(index);
        TileState tile;
        begin_tile(tile, p, lane, work, index);
        cp_async_wait<1>();
        block_barrier();  // K has come
        Scores s;
        if (tile.active) query_key(s, fragments, lane, buffers.query, buffers.key(0));
        block_barrier();  // every warp has left K
        loader.load_key(index + 1);
        if (tile.active) scores_to_weights(s, o, state, tile, p, lane, work);
        cp_async_wait<1>();
        block_barrier();  // V has come
        if (tile.active) weights_value(o, s, lane, buffers.value(0));
        block_barrier();  // every warp has left V
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
    store_rows(p, work, lane, o, state, buffers.query);
    if (work.item.slot < 0) return;
    if (is_last_piece(p, work, buffers.query)) merge_pieces(p, work, lane);
}

}  // namespace portattn

PA_KERNEL void PA_LAUNCH_BOUNDS(portattn::kThreads, portattn::kBlocksPerSm)
    portattn_forward_sm80(PA_GRID_CONSTANT portattn::Params params) {
    portattn::forward_block(params);
}
