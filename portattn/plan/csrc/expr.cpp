#include "expr.hpp"

#include <algorithm>
#include <string>

namespace portattn {

namespace {

constexpr int kMaxDepth = 64;
constexpr i64 kMaxNodes = 1 << 16;

int num_operands(Op op) {
    switch (op) {
        case Op::kAll:
        case Op::kNot:
            return 0;
        case Op::kKeySet:
        case Op::kQuerySet:
        case Op::kKeyLengths:
        case Op::kDocuments:
        case Op::kAnd:
        case Op::kOr:
        case Op::kPerHead:
        case Op::kPerBatch:
            return 1;
        case Op::kBand:
        case Op::kKeyRange:
        case Op::kQueryRange:
        case Op::kSegments:
            return 2;
        default:
            return 3;
    }
}

bool has_children(Op op) {
    return op == Op::kAnd || op == Op::kOr || op == Op::kNot || op == Op::kPerHead || op == Op::kPerBatch;
}

[[noreturn]] void fail(const std::string& message) { throw PlanError{message}; }

std::string str(i64 value) { return std::to_string(value); }

}  // namespace

bool Expr::depends_on_query() const {
    switch (op) {
        case Op::kAll:
        case Op::kKeyRange:
        case Op::kKeyModulo:
        case Op::kKeySet:
        case Op::kKeyLengths:
            return false;
        case Op::kAnd:
        case Op::kOr:
            return std::any_of(children.begin(), children.end(),
                               [](const Expr& e) { return e.depends_on_query(); });
        default:
            return true;
    }
}

Expr negate(const Expr& node) {
    Expr out = node;
    if (node.is_leaf()) {
        out.negated = !node.negated;
        return out;
    }
    out.op = node.op == Op::kAnd ? Op::kOr : Op::kAnd;
    for (Expr& child : out.children) child = negate(child);
    return out;
}

Program::Program(const int64_t* code, i64 length, const pa_array* arrays, i64 num_arrays, const Sizes& sizes)
    : code_(code), length_(length), arrays_(arrays), num_arrays_(num_arrays), sizes_(sizes) {
    if (length < 2) fail("program has " + str(length) + " numbers; it needs a version and an expression");
    if (code[0] != 1)
        fail("program version is " + str(code[0]) + "; this library reads version 1: upgrade portattn");
    i64 at = 1;
    root_ = parse(at, 0);
    if (at != length) fail("program has " + str(length - at) + " numbers after its expression; remove them");
}

Expr Program::parse(i64& at, int depth) {
    if (depth > kMaxDepth) fail("program nests deeper than " + str(kMaxDepth) + "; simplify the mask");
    if (++num_nodes_ > kMaxNodes)
        fail("program has more than " + str(kMaxNodes) + " nodes; simplify the mask");
    if (at >= length_) fail("program ends inside an expression at " + str(at));
    const i64 opcode = code_[at++];
    if (opcode < 0 || opcode > static_cast<i64>(Op::kDocuments))
        fail("program holds unknown opcode " + str(opcode) + "; upgrade portattn");
    Expr node;
    node.op = static_cast<Op>(opcode);
    const int operands = num_operands(node.op);
    if (at + operands > length_) fail("program ends inside the operands of opcode " + str(opcode));
    i64* const slots[3] = {&node.a, &node.b, &node.c};
    for (int n = 0; n < operands; ++n) *slots[n] = code_[at++];
    if (has_children(node.op)) {
        const i64 count = node.op == Op::kNot ? 1 : node.a;
        if (count < 1 || count > length_ - at)
            fail("opcode " + str(opcode) + " has " + str(count) + " children");
        if (node.op == Op::kPerHead) {
            if (count != sizes_.num_heads)
                fail("per_head holds " + str(count) + " masks, the call has " + str(sizes_.num_heads) +
                     " query heads; give one mask per query head");
            depends_on_head_ = true;
        }
        if (node.op == Op::kPerBatch) {
            if (count != sizes_.batch)
                fail("per_batch holds " + str(count) + " masks, the call has batch " + str(sizes_.batch) +
                     "; give one mask per batch entry");
            depends_on_batch_ = true;
        }
        node.children.reserve(static_cast<size_t>(count));
        for (i64 n = 0; n < count; ++n) node.children.push_back(parse(at, depth + 1));
    } else {
        check_data(node);
    }
    return node;
}

Expr Program::bind_leaf(const Expr& node, i64 batch, i64 head) const {
    Expr out = node;
    if (node.op == Op::kKeyModulo || node.op == Op::kDiffModulo) {
        out.b = std::max<i64>(node.b, 0);
        out.c = std::min(node.c, node.a);
    } else if (node.op == Op::kKeySet || node.op == Op::kQuerySet) {
        out.positions = static_cast<const int64_t*>(arrays_[node.a].data);
        out.num_positions = arrays_[node.a].shape[0];
    } else if (node.op == Op::kKeyLengths) {
        const pa_array& lengths = arrays_[node.a];
        out.op = Op::kKeyRange;
        out.a = 0;
        out.b = static_cast<const int64_t*>(lengths.data)[lengths.shape[0] == 1 ? 0 : batch];
    } else if (node.op == Op::kBlockTable) {
        const pa_array& table = arrays_[node.a];
        out.table_rows = table.shape[table.ndim - 2];
        out.table_cols = table.shape[table.ndim - 1];
        const i64 heads = table.ndim >= 3 ? table.shape[table.ndim - 3] : 1;
        const i64 b = table.ndim == 4 && table.shape[0] != 1 ? batch : 0, h = heads != 1 ? head : 0;
        out.table =
            static_cast<const uint8_t*>(table.data) + (b * heads + h) * out.table_rows * out.table_cols;
    } else if (node.op == Op::kDocuments) {
        out.op = Op::kSegments;
        for (const SegmentsEntry& entry : segments_)
            if (entry.slot_q == node.a && entry.slot_k == -1) out.segments = entry.segments;
        if (!out.segments) {
            const pa_array& bounds = arrays_[node.a];
            out.segments = make_documents(static_cast<const int64_t*>(bounds.data), bounds.shape[0],
                                          sizes_.q_offset, sizes_.seqlen_q, sizes_.seqlen_k);
            segments_.push_back({node.a, -1, 0, out.segments});
        }
    } else if (node.op == Op::kSegments) {
        const pa_array &q = arrays_[node.a], &k = arrays_[node.b];
        const bool batched = (q.ndim == 2 && q.shape[0] != 1) || (k.ndim == 2 && k.shape[0] != 1);
        const i64 b = batched ? batch : 0;
        for (const SegmentsEntry& entry : segments_)
            if (entry.slot_q == node.a && entry.slot_k == node.b && entry.batch == b)
                out.segments = entry.segments;
        if (!out.segments) {
            auto ids = [b](const pa_array& x) {
                const i64 row = x.ndim == 2 && x.shape[0] != 1 ? b : 0;
                return static_cast<const int32_t*>(x.data) + row * x.shape[x.ndim - 1];
            };
            out.segments = make_segments(ids(q), ids(k), sizes_.q_offset, sizes_.seqlen_q, sizes_.seqlen_k);
            segments_.push_back({node.a, node.b, b, out.segments});
        }
    }
    return out;
}

Expr Program::bind(const Expr& node, i64 batch, i64 head, bool negate_node) const {
    switch (node.op) {
        case Op::kNot:
            return bind(node.children[0], batch, head, !negate_node);
        case Op::kPerHead:
            return bind(node.children[static_cast<size_t>(head)], batch, head, negate_node);
        case Op::kPerBatch:
            return bind(node.children[static_cast<size_t>(batch)], batch, head, negate_node);
        case Op::kAnd:
        case Op::kOr:
            break;
        default: {
            Expr leaf = bind_leaf(node, batch, head);
            leaf.negated = negate_node;
            if (leaf.op == Op::kKeyModulo || leaf.op == Op::kDiffModulo) {
                // All residues or none: no modulus is left.
                if (leaf.c - leaf.b == leaf.a) leaf.op = Op::kAll;
                if (leaf.b >= leaf.c) {
                    leaf.op = Op::kAll;
                    leaf.negated = !negate_node;
                }
            }
            return leaf;
        }
    }
    Expr out;
    out.op = (node.op == Op::kAnd) != negate_node ? Op::kAnd : Op::kOr;
    for (const Expr& child : node.children) {
        Expr bound = bind(child, batch, head, negate_node);
        if (bound.op == out.op) {
            for (Expr& inner : bound.children) out.children.push_back(std::move(inner));
        } else {
            out.children.push_back(std::move(bound));
        }
    }
    if (out.op == Op::kAnd) {
        // Segments joined by And become one, so that they need one comparison of ids in the kernel.
        size_t first = out.children.size();
        for (size_t n = 0; n < out.children.size();) {
            Expr& child = out.children[n];
            if (child.op != Op::kSegments || child.negated) {
                ++n;
                continue;
            }
            if (first == out.children.size()) {
                first = n++;
                continue;
            }
            if (child.segments != out.children[first].segments)
                out.children[first].segments =
                    intersect_segments(*out.children[first].segments, *child.segments);
            out.children.erase(out.children.begin() + static_cast<long>(n));
        }
    }
    if (out.children.size() == 1) return Expr(out.children[0]);
    return out;
}

Expr Program::resolve(i64 batch, i64 head) const { return bind(root_, batch, head, false); }

void Program::fingerprint_node(const Expr& node, i64 batch, i64 head, std::vector<i64>& out) const {
    if (node.op == Op::kPerHead || node.op == Op::kPerBatch) {
        const i64 index = node.op == Op::kPerHead ? head : batch;
        fingerprint_node(node.children[static_cast<size_t>(index)], batch, head, out);
        return;
    }
    out.insert(out.end(),
               {static_cast<i64>(node.op), node.a, node.b, node.c, static_cast<i64>(node.children.size())});
    if (node.op == Op::kKeyLengths) {
        out.push_back(bind_leaf(node, batch, head).b);
    } else if (node.op == Op::kBlockTable) {
        out.push_back(static_cast<i64>(reinterpret_cast<intptr_t>(bind_leaf(node, batch, head).table)));
    } else if (node.op == Op::kSegments) {
        const pa_array &q = arrays_[node.a], &k = arrays_[node.b];
        const bool batched = (q.ndim == 2 && q.shape[0] != 1) || (k.ndim == 2 && k.shape[0] != 1);
        out.push_back(batched ? batch : 0);
    }
    for (const Expr& child : node.children) fingerprint_node(child, batch, head, out);
}

std::vector<i64> Program::fingerprint(i64 batch, i64 head) const {
    std::vector<i64> out;
    fingerprint_node(root_, batch, head, out);
    return out;
}

}  // namespace portattn
