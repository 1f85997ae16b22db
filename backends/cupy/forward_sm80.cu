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
        const int64 kv_head = static_cast<uint32>(work.head) / static_cast<uint32>(p.group_size);
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
                        const Lane& lane, const Places& places, uint32 value) {
    constexpr int kSteps = kBlockK / 16;
    if constexpr (!kTensorCores) {
        PA_UNROLL
        for (int step = 0; step < kSteps; ++step) weights_of_keys(s, state, shifts, c, step, 0, 1);
        weights_value_fma(o, s, lane, value);
        return;
    }
    constexpr int kPairs = kOutTiles / 2;
    const uint32 address = value + places.value;
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
                           const Lane& lane, const Places& places, const Work& work, uint32 value) {
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
    add_tile(o, s, state, shifts, c, lane, places, value);
}

// Q, in the group of the first tile's K. -1 or 0 times the query: the scale's sign.
PA_DEVICE void take_query(QueryFragments& fragments, const Params& p, const Places& places,
                          const Buffers& buffers) {
    if (p.query_factor != 1) {
        scale_query(buffers.query, p.query_factor);
        block_barrier();
    }
    load_query(fragments, buffers.query + places.query);
}

// Several buffers: kNumStages - 1 tiles are under way while one is computed, and one barrier a tile says both
// that the tile has come and that every warp has left the one before, whose buffer the next copy takes.
PA_DEVICE void run_tiles_staged(Output& o, RowState& state, const Params& p, const Lane& lane,
                                const Work& work, const Buffers& buffers, int total) {
    constexpr int kAhead = kNumStages - 1;
    const Places places = lane_places(lane);
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
        take_query(fragments, p, places, buffers);
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
            query_key(s, fragments, lane, places, buffers.query, buffers.key(stage));
            finish_tile(s, o, state, tile, p, lane, places, work, buffers.value(stage));
        }
        load_stage = next_stage(load_stage);
        stage = next_stage(stage);
    }
}

// One buffer each, two barriers a tile: V comes during Q K, the next K during the softmax and P V.
PA_DEVICE void run_tiles_single(Output& o, RowState& state, const Params& p, const Lane& lane,
                                const Work& work, const Buffers& buffers, int total) {
    const Places places = lane_places(lane);
    TileLoader loader(p, work, buffers, total);
    load_query_rows(p, work, buffers.query);
    loader.load_key(0, 0);
    cp_async_commit();
    loader.load_value(0, 0);
    cp_async_commit();
    QueryFragments fragments;
    if (kQueryInRegisters || p.query_factor != 1) {
        cp_async_wait<1>();
        block_barrier();
        take_query(fragments, p, places, buffers);
    }
#pragma unroll 1
    for (int index = 0; index < total; ++index) {
        TileState tile;
        begin_tile(tile, p, lane, work, index);  // reads lists while the copies come
        if (index == 0) {
            cp_async_wait<1>();
            block_barrier();
        } else {
            cp_async_wait<0>();
            block_barrier();  // K has come; every warp has left V
            loader.load_value(index, 0);
            cp_async_commit();
        }
        Scores s;
        if (tile.active) query_key(s, fragments, lane, places, buffers.query, buffers.key(0));
        cp_async_wait<0>();
        block_barrier();  // V has come; every warp has left K
        loader.load_key(index + 1, 0);
        cp_async_commit();
        if (tile.active) finish_tile(s, o, state, tile, p, lane, places, work, buffers.value(0));
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

// Whether O may take the place of Q, and then leaves 16 bytes at a time.
constexpr bool kOutputOverQuery = kTensorCores && kAligned && kValuePitch <= kQueryPitch;

// 16-byte chunks of a warp's rows of O: kRoundRows rows at a time, kPanel chunks of each.
constexpr int kPanel = kValuePitch % 128 == 0 ? 8 : 4;
constexpr int kPanels = kValuePitch / (16 * kPanel);
constexpr int kRoundRows = 32 / kPanel;

PA_DEVICE float row_lse(const Params& p, float sum, float top) {
    const float c = kScoreTerms ? 1.0f : p.scale_log2;
    return sum == 0.0f ? -infinity() : top * c * kLn2 + log_exact(sum);
}

// The warp's rows as 16-bit elements, swizzled, from `rows`. The sums of all rows are reduced side by side.
PA_DEVICE void stage_rows(const Params& p, const Work& work, const Lane& lane, const Output& o,
                          RowState& state, uint32 rows) {
    PA_UNROLL
    for (int mask = 1; mask < 4; mask *= 2) {
        PA_UNROLL
        for (int n = 0; n < 2 * kRowTiles; ++n)
            state.sum[n / 2][n % 2] += shuffle_xor(state.sum[n / 2][n % 2], mask);
    }
    const uint32 target = rows + chunk_offset<kValuePitch>(lane.group, 0) + 4 * lane.quad;
    PA_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
        PA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const float sum = state.sum[tile][half];
            float factor = sum == 0.0f ? 0.0f : reciprocal_fast(sum);
            if (p.sinks != nullptr)
                factor *= end_row(p, work, lane.row(tile, half), row_lse(p, sum, state.max[tile][half])).own;
            PA_UNROLL
            for (int n = 0; n < kOutTiles; ++n) {
                const uint32 pair = pack_pair<kDtype == kBfloat16>(o[tile][n][2 * half] * factor,
                                                                   o[tile][n][2 * half + 1] * factor);
                shared_store_int(other_chunk<kValuePitch>(target, n) + (16 * tile + 8 * half) * kValuePitch,
                                 static_cast<int>(pair));
            }
        }
    }
}

// Each of the four lanes that share rows takes one of them.
PA_DEVICE void store_lses(const Params& p, const Work& work, const Lane& lane, const RowState& state) {
    float sum = 0.0f;
    float top = 0.0f;
    PA_UNROLL
    for (int n = 0; n < 2 * kRowTiles; ++n) {
        if (lane.quad != n) continue;
        sum = state.sum[n / 2][n % 2];
        top = state.max[n / 2][n % 2];
    }
    const int row = lane.row(lane.quad / 2, lane.quad % 2);
    if (lane.quad >= 2 * kRowTiles || row >= work.item.num_rows) return;
    store_lse(p, work, row, end_row(p, work, row, row_lse(p, sum, top)).lse);
}

// Rows that are neither pieces nor handed on between passes, over the warp's own rows of Q, which no other
// warp reads: no barrier.
PA_DEVICE void store_whole_rows(const Params& p, const Work& work, const Lane& lane, const Output& o,
                                RowState& state, uint32 query) {
    const uint32 rows = query + 16 * kRowTiles * lane.warp * kQueryPitch;
    stage_rows(p, work, lane, o, state, rows);
    warp_barrier();
    const int first = lane.lane / kPanel;
    const int warp_row = 16 * kRowTiles * lane.warp + first;
    const int column = 8 * (lane.lane % kPanel);
    const int64 step = kRoundRows * work.item.q_step * p.output_stride_row;
    uint16* output = static_cast<uint16*>(p.output) + work.batch * p.output_stride_batch +
                     work.head * p.output_stride_head + row_position(work, warp_row) * p.output_stride_row +
                     column;
    PA_UNROLL
    for (int round = 0; round < 16 * kRowTiles; round += kRoundRows) {
        Vec4 chunks[kPanels];
        PA_UNROLL
        for (int panel = 0; panel < kPanels; ++panel)
            chunks[panel] = shared_load_vec4(
                rows + chunk_offset<kValuePitch>(round + first, lane.lane % kPanel + kPanel * panel));
        PA_UNROLL
        for (int panel = 0; panel < kPanels; ++panel) {
            if (warp_row + round < work.item.num_rows && column + 8 * kPanel * panel < p.head_dim_v)
                global_store_vec4(reinterpret_cast<float*>(output + 8 * kPanel * panel), chunks[panel]);
        }
        output += step;
    }
    store_lses(p, work, lane, state);
}

PA_DEVICE void forward_block(const Params& p) {
    const Work work = find_work(p, block_index());
    if (work.item.num_rows == 0) return;  // padding
    const Lane lane = this_lane();
    const Buffers buffers{shared_base()};
    Output o;
    RowState state;
    run_tiles(o, state, p, lane, work, buffers);
    if constexpr (kOutputOverQuery) {
        if (work.item.slot < 0 && !p.continues && p.last_pass && p.head_dim_v % 8 == 0) {
            store_whole_rows(p, work, lane, o, state, buffers.query);
            return;
        }
    }
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
