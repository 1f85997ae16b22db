// What one query tile keeps of one key class: spans that hold for some or for all of its rows, the signature
// of a tile, and its bits.
#pragma once
#include <cstdint>
#include <vector>

#include "expr.hpp"

namespace portattn {

// Rows at positions first + step*r, r in [0, count).
struct QueryTile {
    i64 first, step, count;
    i64 last() const { return first + step * (count - 1); }
};

// Keys residue + step*t, t in [0, size), in tiles of `block`.
struct KeyClass {
    i64 step, residue, size, block;
    i64 key(i64 t) const { return residue + step * t; }
};

// A tile of a class: its first key and how many of its keys exist.
struct KeyTile {
    i64 first, step, count;
    i64 last() const { return first + step * (count - 1); }
};

struct Sizing {
    i64 seqlen_k;
    i64 block_q, block_k;
};

// Fills node.outer (keys that some row may keep) and node.inner (keys that every row keeps) for the whole
// tree, in class coordinates t, sorted and disjoint. outer may be too large and inner too small; never the
// reverse.
void eval_spans(const Expr& node, const QueryTile& rows, const KeyClass& keys, const Sizing& sizing,
                Span clip);

// Appends numbers such that two tiles with equal signatures have equal bits. `id` names the Segments that the
// caller handles itself (they add nothing).
void append_signature(const Expr& node, const QueryTile& rows, const KeyTile& keys, const Sizing& sizing,
                      const Segments* id, std::vector<i64>& out);

// The bits of a tile, 64 keys a word, rows.count rows of `words` words.
struct BitMatrix {
    i64 rows = 0, words = 0;
    std::vector<uint64_t> data;
    void reset(i64 num_rows, i64 num_words, uint64_t fill) {
        rows = num_rows;
        words = num_words;
        data.assign(static_cast<size_t>(num_rows * num_words), fill);
    }
    uint64_t* row(i64 r) { return data.data() + r * words; }
    const uint64_t* row(i64 r) const { return data.data() + r * words; }
};

// Evaluates the tree over a tile; Segments `id` count as `id_equal`. Bits past keys.count are undefined.
void eval_tile(const Expr& node, const QueryTile& rows, const KeyTile& keys, const Sizing& sizing,
               const Segments* id, bool id_equal, BitMatrix& out);

enum class IdRelation { kSame, kDifferent, kMixed };
// How the ids of a tile's rows and keys relate: all pairs equal, all different, or unknown.
IdRelation relate_ids(const Segments& segments, const QueryTile& rows, const KeyTile& keys);

// The key blocks drawn for query block `block`, ascending (docs/formats.md, RANDOM_BLOCKS).
void draw_blocks(i64 seed, i64 block, i64 count, i64 num_blocks, std::vector<i64>& out);

}  // namespace portattn
