// Baseline code for finished rows: sinks, the merge of a cut row's pieces, output in its own dtype.
#include <math.h>
#include <string.h>

#include "call.hpp"

namespace portattn {
namespace cpu {
namespace {

uint16_t to_bfloat16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (f != f) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

uint16_t to_half(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) {  // subnormal in half: the adder rounds at 2^-24
        float a;
        memcpy(&a, &magnitude, 4);
        a += 0.5f;
        uint32_t rounded;
        memcpy(&rounded, &a, 4);
        return (uint16_t)(sign | (rounded - 0x3f000000));
    }
    uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    return (uint16_t)(sign | ((rounded - 0x38000000) >> 13));
}

const float* running_row(const Call& call, const Task& task, RowPlace place) {
    const int64_t* strides = call.running_strides;
    return call.running + task.b * strides[0] + place.h * strides[1] + place.row * strides[2];
}

float* running_lse(const Call& call, const Task& task, RowPlace place) {
    return call.running_lse + (task.b * call.args.num_heads + place.h) * call.args.seqlen_q + place.row;
}

void store_output(const Call& call, const Task& task, RowPlace place, const float* o, float factor,
                  float lse) {
    const pa_cpu_args& a = call.args;
    int64_t at =
        task.b * a.output_strides[0] + place.h * a.output_strides[1] + place.row * a.output_strides[2];
    if (a.dtype == PA_FLOAT32) {
        float* out = static_cast<float*>(a.output) + at;
        for (int64_t d = 0; d < a.head_dim_v; ++d) out[d] = o[d] * factor;
    } else {
        uint16_t* out = static_cast<uint16_t*>(a.output) + at;
        for (int64_t d = 0; d < a.head_dim_v; ++d)
            out[d] = a.dtype == PA_FLOAT16 ? to_half(o[d] * factor) : to_bfloat16(o[d] * factor);
    }
    if (a.lse)
        a.lse[task.b * a.lse_strides[0] + place.h * a.lse_strides[1] + place.row * a.lse_strides[2]] = lse;
}

}  // namespace

float apply_sink(const Call& call, int64_t h, float lse, float* factor) {
    float sink = call.args.sinks[h];
    if (lse == -INFINITY) return sink;  // the output is 0 already
    if (sink == -INFINITY) return lse;
    *factor *= 1.0f / (1.0f + expf(sink - lse));
    float top = lse > sink ? lse : sink, low = lse > sink ? sink : lse;
    return top + log1pf(expf(low - top));
}

RowPlace row_place(const Call& call, const Task& task, int64_t r) {
    int64_t rows = task.item[PA_ITEM_NUM_ROWS], head = r / rows;
    int64_t row = task.item[PA_ITEM_Q_START] + (int64_t)task.item[PA_ITEM_Q_STEP] * (r % rows);
    (void)call;
    return RowPlace{task.h + head, row};
}

void store_row(const Call& call, const Task& task, RowPlace place, const float* o, float lse) {
    if (!task.last_pass) {
        // `o` may be the running row itself only in the main kernel, which does not come here.
        memcpy(const_cast<float*>(running_row(call, task, place)), o, sizeof(float) * call.args.head_dim_v);
        *running_lse(call, task, place) = lse;
        return;
    }
    float factor = 1.0f;
    if (call.args.sinks) lse = apply_sink(call, place.h, lse, &factor);
    store_output(call, task, place, o, factor, lse);
}

bool arrive_last(const Call& call, const Task& task) {
    int32_t* counter =
        call.counters + task.head_index * call.schedule->num_counters + task.item[PA_ITEM_COUNTER];
    if (__atomic_add_fetch(counter, 1, __ATOMIC_ACQ_REL) != task.item[PA_ITEM_NUM_PIECES]) return false;
    __atomic_store_n(counter, 0, __ATOMIC_RELAXED);
    return true;
}

void merge_pieces(const Call& call, const Task& task, int64_t rows) {
    const int64_t dim = call.args.head_dim_v, pieces = task.item[PA_ITEM_NUM_PIECES];
    const int64_t first = task.head_index * call.schedule->num_slots + task.item[PA_ITEM_SLOT_FIRST];
    float sum[256];
    for (int64_t r = 0; r < rows; ++r) {
        RowPlace place = row_place(call, task, r);
        float before = task.first_pass ? -INFINITY : *running_lse(call, task, place);
        float top = before;
        for (int64_t i = 0; i < pieces; ++i) {
            float lse = call.slot_lse[(first + i) * call.slot_rows + r];
            if (lse > top || lse != lse) top = lse;
        }
        float total = 0.0f;
        for (int64_t d = 0; d < dim; ++d) sum[d] = 0.0f;
        auto add = [&](const float* o, float lse) {
            if (lse == -INFINITY) return;
            float weight = expf(lse - top);
            total += weight;
            for (int64_t d = 0; d < dim; ++d) sum[d] += weight * o[d];
        };
        if (!task.first_pass) add(running_row(call, task, place), before);
        for (int64_t i = 0; i < pieces; ++i) {
            int64_t at = (first + i) * call.slot_rows + r;
            add(call.slots + at * dim, call.slot_lse[at]);
        }
        float scale = total == 0.0f ? 0.0f : 1.0f / total;
        for (int64_t d = 0; d < dim; ++d) sum[d] *= scale;
        store_row(call, task, place, sum, total == 0.0f ? -INFINITY : top + logf(total));
    }
}

}  // namespace cpu
}  // namespace portattn
