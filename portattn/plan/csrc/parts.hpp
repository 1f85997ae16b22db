// How a mask is split into groups of parts, each with its own classes of rows and keys.
#pragma once
#include <vector>

#include "leaves.hpp"

namespace portattn {

// Parts of a mask that are planned together. A pair of query and key belongs to the first group that keeps
// it.
struct Group {
    enum class Kind { kContiguous, kKeyModulo, kDiffModulo };
    Kind kind = Kind::kContiguous;
    i64 modulus = 1;
    std::vector<i64> residues;  // of j (kKeyModulo) or of i - j (kDiffModulo), mod modulus
    Expr mask;                  // what this group keeps, earlier groups excluded
    bool depends_on_query = false;
    i64 row_step = 1;  // the pass it belongs to
};

// Splits a resolved mask; groups come in the order in which they take pairs.
std::vector<Group> split(const Expr& mask, const Sizes& sizes, i64 block_q, i64 block_k);

}  // namespace portattn
