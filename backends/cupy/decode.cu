// Attention of few query rows over long keys and values, for sm_80 and later: bound by reading K and V once.
//
// A block takes an equal share of all strips of keys of all sequences (decode_work.cuh), so that ragged
// lengths, which only the device knows, keep every SM reading to the end (Flash-Decoding, Dao et al. 2023,
// with the split made on the device). Rows are the query heads of one KV head times the queries, 16 to a
// warp, for mma.m16n8k16. Key groups of warps walk strips of their own with their own maximum, sum and O,
// each with its own ring of cp.async copies and no barrier among them; the copies run on across rows of work.
// Where a row ends the groups merge through shared memory, and the last of the blocks of a row merges theirs.
// It does not do: masks other than one interval of keys a row, float32, gradients.
#include "decode_merge.cuh"

namespace portattn {

// What a row of work begins with.
PA_DEVICE void clear(Output& o, RowState& state) {
    PA_UNROLL
    for (int n = 0; n < kOutTiles; ++n) {
        PA_UNROLL
        for (int r = 0; r < 4; ++r) o[n][r] = 0.0f;
    }
    PA_UNROLL
    for (int half = 0; half < 2; ++half) {
        state.max[half] = -infinity();
        state.sum[half] = 0.0f;
    }
}

// The blocks that have parts of a row of work.
struct Owners {
    int first, count;
};

PA_DEVICE Owners find_owners(const Share& share, int worker, const Cursor& work) {
    if (work.count == work.line.strips) return Owners{worker, 1};
    const int begin = share.end - work.left - work.first;
    const int first = share.owner(begin);
    return Owners{first, share.owner(begin + work.line.strips - 1) - first + 1};
}

// Stores what the block computed of a row of work; the last block of the row merges what all of them stored.
PA_DEVICE void end_row(const Params& p, const Owners& owners, int worker, const Lane& lane,
                       const Cursor& work, const Output& o, const RowState& state, uint32 shared) {
    const int slot = owners.count > 1 ? piece_slot(worker, owners.first) : -1;
    store_rows(p, lane, work, o, state, shared, slot);
    if (slot >= 0 && is_last_piece(p, owners.first, owners.count, shared + kFlagOffset))
        merge_pieces(p, lane, work, owners.first, owners.count);
}

// One loop for all rounds of all rows, that of the first copies included: each step stands in the program
// once. After other kernels a block finds neither its code nor its data in a cache, and each 128 bytes of
// code cost about what 128 bytes of data do.
PA_DEVICE void decode_block(const Params& p) {
    const Lane lane = this_lane();
    const uint32 shared = shared_base();
    const int worker = block_index();
    const Share share = find_share(p, worker, shared + kStageOffset);
    if (share.begin == share.end) return;
    Cursor work(share);
    Loader loader(p, share, lane, shared);
    Output o;
    RowState state;
    QueryFragments fragments;
    Owners owners{0, 0};
    int round = 1 - kNumStages;  // of the row; below 0 there are copies only
#pragma unroll 1
    while (work.left > 0) {
        if (round == 0) {
            work.enter(p);
            owners = find_owners(share, worker, work);
            clear(o, state);
            load_query(fragments, p, lane, work, shared + kQueryOffset);
        }
        if (round >= 0) {
            cp_async_wait<kNumStages - 2>();
            group_barrier();  // the strip has come; every warp of the group has left the one before
        }
        loader.load_next();
        if (round >= 0) {
            const int strip = round * kKeyGroups + lane.key_group;
            if (strip < work.count)
                compute_strip(o, state, fragments, shared + kQueryOffset, p, lane, work,
                              work.line.keys.begin + (work.first + strip) * kBlockK,
                              loader.strips + loader.stage * kStripBytes);
        }
        ++round;
        if (round > 0 && round == rounds_of(work.count)) {
            end_row(p, owners, worker, lane, work, o, state, shared);
            work.next(p);
            round = 0;
        }
    }
}

}  // namespace portattn

PA_KERNEL void PA_LAUNCH_BOUNDS(portattn::kThreads, portattn::kBlocksPerSm)
    portattn_decode(PA_GRID_CONSTANT portattn::Params params) {
    portattn::decode_block(params);
}
