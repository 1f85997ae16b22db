// Which item, head and KV tiles a block works on (docs/formats.md, "Schedule"). Everything here is uniform
// over the block.
#pragma once

#include "config.cuh"
#include "params.cuh"

namespace portattn {

struct Item {
    int q_start, q_step, num_rows, tile_begin;
    int tile_end, full_first, full_count, full_step;
    int full_stride, slot, slot_first, num_pieces;
    int counter, cost, layout, reserved;
};

struct Work {
    int batch, head, batch_head;
    int layout;
    Item item;
};

// Blocks that start one after the other take the same item of a group of heads, then the next item: the KV
// tiles of few heads are live at a time, and items of a group go longest first.
PA_DEVICE Work find_work(const Params& p, int index) {
    const int heads = p.batch * p.num_heads;
    // Unsigned: a division takes fewer instructions, and everything waits for these.
    const uint32 per_group = static_cast<uint32>(p.num_items * p.head_group);
    const uint32 group = static_cast<uint32>(index) / per_group;
    const int first = static_cast<int>(group) * p.head_group;
    const uint32 size = heads - first < p.head_group ? heads - first : p.head_group;
    const uint32 rest = static_cast<uint32>(index) - group * per_group;
    const uint32 item_index = rest / size;
    Work work;
    work.batch_head = first + static_cast<int>(rest - item_index * size);
    work.batch = static_cast<int>(static_cast<uint32>(work.batch_head) / static_cast<uint32>(p.num_heads));
    work.head = work.batch_head - work.batch * p.num_heads;
    work.layout = 0;
    if (p.layout_batch > 1 || p.layout_heads > 1) {  // else there is one, and no load to wait for
        const int row = p.layout_batch == 1 ? 0 : work.batch;
        const int column = p.layout_heads == 1 ? 0 : work.head;
        work.layout = load_int(p.layouts + row * p.layout_heads + column);
    }
    const int64 item = static_cast<int64>(work.layout) * p.num_items + item_index;
    const int* fields = p.items + 16 * item;
    int* target = &work.item.q_start;
    PA_UNROLL
    for (int n = 0; n < 16; ++n) target[n] = load_int(fields + n);
    return work;
}

// The keys of tile `index` of an item: partial tiles first, then full ones.
struct TileKeys {
    int start, step;
};

PA_DEVICE TileKeys tile_keys(const Params& p, const Item& item, int index) {
    const int partial = item.tile_end - item.tile_begin;
    if (index < partial) {
        const int* tile = p.tiles + 4 * static_cast<int64>(item.tile_begin + index);
        return TileKeys{load_int(tile), load_int(tile + 1)};
    }
    const int full = index - partial;
    if (full >= item.full_count) return TileKeys{0, 1};  // past the end: never loaded
    if (item.full_step > 0) return TileKeys{item.full_first + full * item.full_stride, item.full_step};
    const int* entry = p.full_list + 2 * static_cast<int64>(item.full_first + full);
    return TileKeys{load_int(entry), load_int(entry + 1)};
}

}  // namespace portattn
