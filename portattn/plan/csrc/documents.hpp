// Tiles that begin where documents do: a query tile then holds rows of one document, and sees no keys of
// others, so that nearly all of its tiles are full.
#pragma once
#include <memory>

#include "parts.hpp"

namespace portattn {

// The ids inside whose runs a mask of these groups is best planned, or null if tiles on the grid are fewer
// (documents shorter than a tile) or the mask keeps pairs of different ids.
std::shared_ptr<const Segments> find_documents(const std::vector<Group>& groups, const Sizes& sizes,
                                               i64 block_q, i64 block_k);

// The mask that is left where rows and keys have the same of these ids.
Expr inside_documents(const Expr& mask, const Segments* documents);

}  // namespace portattn
