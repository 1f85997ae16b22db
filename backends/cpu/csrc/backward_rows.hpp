// The backward's first and last step: statistics of query rows, and gradients from float32 sums.
#pragma once
#include "backward.hpp"

namespace portattn {
namespace cpu {
namespace PA_ISA {

template <class T>
static float dot(const typename T::type* a, const typename T::type* b, int64_t count) {
    vf sum = vf{};
    int64_t d = 0;
    for (; d + VL <= count; d += VL) sum += T::loadv(a + d) * T::loadv(b + d);
    float rest = 0.0f;
    for (; d < count; ++d) rest += T::load1(a + d) * T::load1(b + d);
    return sum_of(sum) + rest;
}

// LSE and delta of up to STAT_ROWS rows of one head. sum_j dS_j of a row is known without its keys:
// delta (1 - sum_j p_j) + grad_lse sum_j p_j, and sum_j p_j = 1 - p_sink; that is the gradient of a bias that
// is the same for all keys. The sink's is p_sink (grad_lse - delta): its "value" is 0.
static void backward_rows(const BackwardCall& call, int64_t index) {
    const pa_cpu_backward_args& a = call.args;
    int64_t head = index / call.stat_tasks, first = index % call.stat_tasks * STAT_ROWS;
    int64_t last = first + STAT_ROWS < a.seqlen_q ? first + STAT_ROWS : a.seqlen_q;
    int64_t b = head / a.num_heads, h = head % a.num_heads;
    float* bias = nullptr;
    if (a.grad_bias && a.grad_bias_strides[3] == 0)
        bias = a.grad_bias + b * a.grad_bias_strides[0] + h * a.grad_bias_strides[1];
    double sinks = 0.0;
    by_storage(a.dtype, [&](auto t) {
        typedef decltype(t) T;
        typedef typename T::type type;
        const type* o = (const type*)a.output + b * a.output_strides[0] + h * a.output_strides[1];
        const type* g =
            (const type*)a.grad_output + b * a.grad_output_strides[0] + h * a.grad_output_strides[1];
        for (int64_t n = first; n < last; ++n) {
            float lse = a.lse[b * a.lse_strides[0] + h * a.lse_strides[1] + n * a.lse_strides[2]];
            bool empty = lse == -__builtin_inff();
            float grad_lse = 0.0f, delta = 0.0f, sink = 0.0f;
            if (a.grad_lse && !empty)
                grad_lse = a.grad_lse[b * a.grad_lse_strides[0] + h * a.grad_lse_strides[1] +
                                      n * a.grad_lse_strides[2]];
            if (!empty)
                delta = dot<T>(o + n * a.output_strides[2], g + n * a.grad_output_strides[2], a.head_dim_v);
            if (a.sinks && !empty) sink = __builtin_expf(a.sinks[h] - lse);
            double lse2 = (double)lse * 1.4426950408889634;
            call.lse2[head * a.seqlen_q + n] = empty ? __builtin_inff() : (float)lse2;
            call.lse2_rest[head * a.seqlen_q + n] = empty ? 0.0f : (float)(lse2 - (double)(float)lse2);
            call.delta[head * a.seqlen_q + n] = delta - grad_lse;
            sinks += sink * (grad_lse - delta);
            if (bias)
                bias[n * a.grad_bias_strides[2]] += empty ? 0.0f : delta * sink + grad_lse * (1.0f - sink);
        }
        return 0;
    });
    call.sink_sums[index] = sinks;
}

template <class T>
static void store_line(typename T::type* to, const float* from, int64_t count, float factor) {
    for (int64_t d = 0; d < count; d += VL)
        store_vector<T>(
            to + d,
            (count - d >= VL ? loadu(from + d) : load_part<Float32>(from + d, (int)(count - d))) * factor,
            count - d);
}

// Up to STORE_ROWS rows of dQ: the chunks' sums in order, times the scale.
template <class T>
static void store_queries(const BackwardCall& call, int64_t head, int64_t first) {
    const pa_cpu_backward_args& a = call.args;
    if (!a.grad_query) return;
    typename T::type* out = (typename T::type*)a.grad_query + head / a.num_heads * a.grad_query_strides[0] +
                            head % a.num_heads * a.grad_query_strides[1];
    int64_t last = first + STORE_ROWS < a.seqlen_q ? first + STORE_ROWS : a.seqlen_q;
    float line[256] __attribute__((aligned(64)));
    for (int64_t n = first; n < last; ++n) {
        for (int64_t d = 0; d < a.head_dim; ++d) line[d] = 0.0f;
        for (int64_t c = 0; c < call.num_chunks; ++c) {
            const Chunk& chunk = call.chunks[c];
            if (n < chunk.q_begin || n >= chunk.q_end) continue;
            const float* sums =
                call.grad_query + (head * call.query_rows + chunk.offset + n - chunk.q_begin) * call.query_ld;
            for (int64_t d = 0; d < a.head_dim; ++d) line[d] += sums[d];
        }
        store_line<T>(out + n * a.grad_query_strides[2], line, a.head_dim, a.scale);
    }
}

template <class T>
static void store_sums(const float* sums, int64_t first, int64_t last, int64_t dim, float factor,
                       typename T::type* out, int64_t stride) {
    for (int64_t n = first; n < last; ++n) store_line<T>(out + n * stride, sums + n * dim, dim, factor);
}

static void backward_store(const BackwardCall& call, int64_t index) {
    const pa_cpu_backward_args& a = call.args;
    int64_t row_tasks = (a.seqlen_q + STORE_ROWS - 1) / STORE_ROWS, heads = a.batch * a.num_heads;
    by_storage(a.dtype, [&](auto t) {
        typedef decltype(t) T;
        typedef typename T::type type;
        if (index < heads * row_tasks) {
            store_queries<T>(call, index / row_tasks, index % row_tasks * STORE_ROWS);
            return 0;
        }
        int64_t key_tasks = (a.seqlen_k + STORE_ROWS - 1) / STORE_ROWS, at = index - heads * row_tasks;
        int64_t head = at / key_tasks, first = at % key_tasks * STORE_ROWS;
        int64_t last = first + STORE_ROWS < a.seqlen_k ? first + STORE_ROWS : a.seqlen_k;
        int64_t b = head / a.num_kv_heads, h = head % a.num_kv_heads;
        if (a.grad_key)
            store_sums<T>(call.grad_key + head * a.seqlen_k * a.head_dim, first, last, a.head_dim, a.scale,
                          (type*)a.grad_key + b * a.grad_key_strides[0] + h * a.grad_key_strides[1],
                          a.grad_key_strides[2]);
        if (a.grad_value)
            store_sums<T>(call.grad_value + head * a.seqlen_k * a.head_dim_v, first, last, a.head_dim_v, 1.0f,
                          (type*)a.grad_value + b * a.grad_value_strides[0] + h * a.grad_value_strides[1],
                          a.grad_value_strides[2]);
        return 0;
    });
}

}  // namespace PA_ISA
}  // namespace cpu
}  // namespace portattn
