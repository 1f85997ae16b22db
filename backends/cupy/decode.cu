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

PA_DEVICE void compute_row(Output& o, RowState& state, Loader& loader, int& stage, const Params& p,
                           const Lane& lane, const Cursor& work, uint32 query) {
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
    stage_query(p, lane, work, query);
    QueryFragments fragments;
    load_query(fragments, lane, query);
    // The keys that every row attends to: strips inside need no mask.
    const Keys full{visible_keys(p, work.line.position + last_query(p, work.line), work.line.count).begin,
                    visible_keys(p, work.line.position + first_query(p, work.line), work.line.count).end};
    const int rounds = rounds_of(work.count);
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
        cp_async_wait<kNumStages - 2>();
        group_barrier();  // the strip has come; every warp of the group has left the one before
        loader.load_next();
        const int strip = round * kKeyGroups + lane.key_group;
        if (strip < work.count)
            compute_strip(o, state, fragments, query, p, lane, work, full,
                          work.line.keys.begin + (work.first + strip) * kBlockK,
                          loader.strips + stage * kStripBytes);
        stage = stage + 1 == kNumStages ? 0 : stage + 1;
    }
}

PA_DEVICE void decode_block(const Params& p) {
    const Lane lane = this_lane();
    const uint32 shared = shared_base();
    const int worker = block_index();
    const Share share = find_share(p, worker, shared + kStageOffset);
    if (share.begin == share.end) return;
    Loader loader(p, share, lane, shared);
#pragma unroll 1
    for (int n = 0; n < kNumStages - 1; ++n) loader.load_next();
    int stage = 0;
    int begin = share.begin;  // of the row's part, on the axis of all strips
#pragma unroll 1
    for (Cursor work(p, share); work.count > 0; work.next(p)) {
        Output o;
        RowState state;
        compute_row(o, state, loader, stage, p, lane, work, shared + kQueryOffset);
        int first_worker = worker;
        int num_pieces = 1;
        if (work.count < work.line.strips) {
            const int row_begin = begin - work.first;
            first_worker = share.owner(row_begin);
            num_pieces = share.owner(row_begin + work.line.strips - 1) - first_worker + 1;
        }
        const int slot = num_pieces > 1 ? piece_slot(worker, first_worker) : -1;
        store_rows(p, lane, work, o, state, shared, slot);
        if (slot >= 0 && is_last_piece(p, first_worker, num_pieces, shared + kFlagOffset))
            merge_pieces(p, lane, work, first_worker, num_pieces);
        begin += work.count;
    }
}

}  // namespace portattn

PA_KERNEL void PA_LAUNCH_BOUNDS(portattn::kThreads, portattn::kBlocksPerSm)
    portattn_decode(PA_GRID_CONSTANT portattn::Params params) {
    portattn::decode_block(params);
}
