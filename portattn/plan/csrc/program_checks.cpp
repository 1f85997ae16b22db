// Whether a program's data fits the call.
#include <string>

#include "expr.hpp"

namespace portattn {

namespace {

[[noreturn]] void fail(const std::string& message) { throw PlanError{message}; }

std::string str(i64 value) { return std::to_string(value); }

}  // namespace

const pa_array& Program::array(i64 slot, const char* what) const {
    if (slot < 0 || slot >= num_arrays_)
        fail(std::string(what) + " names data slot " + str(slot) + " of " + str(num_arrays_));
    return arrays_[slot];
}

void Program::check_data(const Expr& node) {
    switch (node.op) {
        case Op::kKeyModulo:
        case Op::kDiffModulo:
            if (node.a < 1) fail("modulus is " + str(node.a) + "; it must be at least 1");
            break;
        case Op::kBlockBand:
            if (node.a < 1) fail("BlockBand n is " + str(node.a) + "; it must be at least 1");
            break;
        case Op::kRandomBlocks:
            if (node.a < 1 || node.b < 0) fail("RandomBlocks needs n >= 1 and count >= 0");
            break;
        case Op::kKeySet:
        case Op::kQuerySet:
            check_set(node);
            break;
        case Op::kBlockTable:
            check_table(node);
            break;
        case Op::kSegments:
            check_segments(node);
            break;
        case Op::kDocuments:
            check_documents(node);
            break;
        case Op::kKeyLengths:
            check_lengths(node);
            break;
        default:
            break;
    }
}

void Program::check_set(const Expr& node) const {
    const pa_array& set = array(node.a, "KeySet or QuerySet");
    if (set.dtype != 1 || set.ndim != 1) fail("positions must be a 1-D int64 tensor");
    const auto* data = static_cast<const int64_t*>(set.data);
    for (i64 n = 1; n < set.shape[0]; ++n)
        if (data[n] <= data[n - 1]) fail("positions must be sorted and unique");
}

void Program::check_table(const Expr& node) {
    const pa_array& table = array(node.a, "BlockTable");
    if (table.dtype != 2 || table.ndim < 2 || table.ndim > 4)
        fail(
            "BlockTable table must be a bool tensor [nq, nk], [heads, nq, nk] or [batch, 1 or heads, nq, "
            "nk]");
    if (node.b < 1 || node.c < 1) fail("BlockTable blocks must be at least 1");
    const i64 rows = table.shape[table.ndim - 2], cols = table.shape[table.ndim - 1];
    if (sizes_.seqlen_q > 0 && sizes_.seqlen_k > 0) {
        const i64 first = floor_div(sizes_.q_offset, node.b);
        const i64 last = floor_div(sizes_.q_offset + sizes_.seqlen_q - 1, node.b);
        const i64 last_col = floor_div(sizes_.seqlen_k - 1, node.c);
        if (first < 0 || last >= rows || last_col >= cols)
            fail("BlockTable table is " + str(rows) + " x " + str(cols) + " blocks of " + str(node.b) +
                 " x " + str(node.c) + "; query positions " + str(sizes_.q_offset) + ".." +
                 str(sizes_.q_offset + sizes_.seqlen_q - 1) + " and " + str(sizes_.seqlen_k) +
                 " keys need block rows " + str(first) + ".." + str(last) + " and " + str(last_col + 1) +
                 " columns; give a larger table");
    }
    if (table.ndim >= 3) {
        const i64 heads = table.shape[table.ndim - 3];
        if (heads != 1 && heads != sizes_.num_heads)
            fail("BlockTable table has " + str(heads) + " heads, the call has " + str(sizes_.num_heads) +
                 "; give 1 or one per query head");
        depends_on_head_ |= heads != 1;
    }
    if (table.ndim == 4) {
        if (table.shape[0] != 1 && table.shape[0] != sizes_.batch)
            fail("BlockTable table has batch " + str(table.shape[0]) + ", the call has " + str(sizes_.batch));
        depends_on_batch_ |= table.shape[0] != 1;
    }
}

void Program::check_segments(const Expr& node) {
    const char* const names[2] = {"q_ids", "k_ids"};
    const i64 first[2] = {sizes_.q_offset, 0};
    const i64 length[2] = {sizes_.q_offset + sizes_.seqlen_q, sizes_.seqlen_k};
    for (int side = 0; side < 2; ++side) {
        const pa_array& ids = array(side == 0 ? node.a : node.b, "Segments");
        if (ids.dtype != 0 || ids.ndim < 1 || ids.ndim > 2)
            fail(std::string("Segments ") + names[side] + " must be an int32 tensor [S] or [B, S]");
        if (first[side] < 0 || ids.shape[ids.ndim - 1] < length[side])
            fail(std::string("Segments ") + names[side] + " has " + str(ids.shape[ids.ndim - 1]) +
                 " positions; the call uses positions " + str(first[side]) + ".." + str(length[side] - 1) +
                 "; give an id for each");
        if (ids.ndim == 2) {
            if (ids.shape[0] != 1 && ids.shape[0] != sizes_.batch)
                fail(std::string("Segments ") + names[side] + " has batch " + str(ids.shape[0]) +
                     ", the call has " + str(sizes_.batch));
            depends_on_batch_ |= ids.shape[0] != 1;
        }
    }
}

void Program::check_documents(const Expr& node) const {
    const pa_array& bounds = array(node.a, "Documents");
    if (bounds.dtype != 1 || bounds.ndim != 1 || bounds.shape[0] < 2)
        fail("Documents bounds must be an int64 tensor of at least 2 values");
    const auto* values = static_cast<const int64_t*>(bounds.data);
    const i64 last = values[bounds.shape[0] - 1];
    for (i64 n = 1; n < bounds.shape[0]; ++n)
        if (values[n] < values[n - 1]) fail("Documents bounds must never fall");
    if (values[0] != 0) fail("Documents bounds must start at 0");
    if (sizes_.q_offset < 0 || sizes_.q_offset + sizes_.seqlen_q > last || sizes_.seqlen_k > last)
        fail("Documents bounds cover the positions [0, " + str(last) + "); the call uses query positions " +
             str(sizes_.q_offset) + ".." + str(sizes_.q_offset + sizes_.seqlen_q - 1) + " and " +
             str(sizes_.seqlen_k) + " keys; give bounds that cover all of them");
}

void Program::check_lengths(const Expr& node) {
    const pa_array& lengths = array(node.a, "KeyLengths");
    if (lengths.dtype != 1 || lengths.ndim != 1) fail("lengths must be a 1-D int64 tensor");
    if (lengths.shape[0] != 1 && lengths.shape[0] != sizes_.batch)
        fail("lengths has " + str(lengths.shape[0]) + " entries, the call has batch " + str(sizes_.batch) +
             "; give one length per batch entry");
    depends_on_batch_ |= lengths.shape[0] != 1;
}

}  // namespace portattn
