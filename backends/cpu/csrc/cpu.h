// The CPU kernels of libportattn. Two ways in:
//  * C: fill pa_cpu_args, call portattn_cpu_forward; threads come from args.threads.
//  * C++ (the ONNX Runtime op): portattn::cpu::Forward, with threads from the caller:
//        portattn::cpu::Forward call;
//        if (call.init(args, err, err_len) != 0) fail(err);
//        for (int pass = 0; pass < call.num_passes(); ++pass)          // a barrier between passes
//            parallel_for(call.num_tasks(pass), [&](int64_t i) {       // tasks of a pass in any order, by
//            any thread
//                call.run_task(pass, i, portattn::cpu::thread_scratch(call.scratch_bytes()));
//            });
//    `init` allocates what the schedule's cut rows and passes need; the destructor frees it. All that
//    the args point to (tensors, plan, schedule) must outlive the object.
// Every stride is in elements; the last dimension of query, key, value and output is contiguous.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "portattn.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { PA_FLOAT32 = 0, PA_FLOAT16 = 1, PA_BFLOAT16 = 2 };
enum { PA_CPU_MAIN = 0, PA_CPU_DECODE = 1 };
// How the main kernel copies keys and values first: not at all, float32 tiles to padded rows, or the whole of
// them to bf16 tiles for AMX (only on x86-64-v4+amx). Automatic: tiles where AMX pays, else none.
enum { PA_PACK_AUTO = 0, PA_PACK_NONE = 1, PA_PACK_ROWS = 2, PA_PACK_TILES = 3 };

typedef struct {
    uint32_t struct_size;  // sizeof(pa_cpu_args)
    uint32_t abi_version;  // PA_ABI_VERSION
    const void* query;     // [batch, num_heads, seqlen_q, head_dim]
    const void* key;       // [batch, num_kv_heads, seqlen_k, head_dim]
    const void* value;     // [batch, num_kv_heads, seqlen_k, head_dim_v]
    void* output;          // [batch, num_heads, seqlen_q, head_dim_v]
    float* lse;            // [batch, num_heads, seqlen_q], natural log; may be NULL
    const void* bias;      // [batch, num_heads, seqlen_q, seqlen_k], 0 strides where broadcast; may be NULL
    const float* alibi_slopes;  // [batch, num_heads] by alibi_strides; may be NULL
    const float* sinks;         // [num_heads], contiguous; may be NULL
    int64_t query_strides[3];   // batch, head, row
    int64_t key_strides[3];
    int64_t value_strides[3];
    int64_t output_strides[3];
    int64_t lse_strides[3];
    int64_t bias_strides[4];
    int64_t alibi_strides[2];
    int64_t batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v;
    const pa_plan* plan;          // block_q a multiple of portattn_cpu_panel() for PA_CPU_MAIN
    const pa_schedule* schedule;  // of that plan; PA_CPU_DECODE: see group_heads
    int32_t dtype;                // PA_FLOAT32, ... of query, key, value and output
    int32_t bias_dtype;           // that, or PA_FLOAT32
    float scale;                  // any real number
    float softcap;                // 0: none
    int32_t kernel;               // PA_CPU_MAIN or PA_CPU_DECODE
    int32_t threads;              // >= 1
    int32_t head_group;           // heads whose items are ordered together, longest first; >= 1
    int32_t pack;                 // PA_PACK_...
    int32_t group_heads;  // PA_CPU_DECODE: 1 if the schedule counts KV heads and one task does a group
    int32_t plan_batch;   // the plan's batch index of the tensors' first batch
} pa_cpu_args;

// One backward call. Shapes and strides are as in pa_cpu_args; the last dimension of every tensor is
// contiguous but for the LSE's, its gradient's and the bias's.
typedef struct {
    uint32_t struct_size;  // sizeof(pa_cpu_backward_args)
    uint32_t abi_version;  // PA_ABI_VERSION
    const void* query;
    const void* key;
    const void* value;
    const void* output;  // of the forward
    const float* lse;    // of the forward, natural log
    const void* grad_output;
    const float* grad_lse;  // may be NULL: zero
    const void* bias;       // may be NULL, as the next two
    const float* alibi_slopes;
    const float* sinks;
    void* grad_query;  // written, in the query's dtype; NULL: not asked for, as all that follow
    void* grad_key;    // keys that no tile visits get 0
    void* grad_value;
    float* grad_alibi_slopes;  // [batch, num_heads] by its strides; added to, as the next two
    float* grad_bias;          // strides of 0 where it is the sum over a dimension
    float* grad_sinks;         // [num_heads], contiguous
    int64_t query_strides[3];
    int64_t key_strides[3];
    int64_t value_strides[3];
    int64_t output_strides[3];
    int64_t lse_strides[3];
    int64_t grad_output_strides[3];
    int64_t grad_lse_strides[3];
    int64_t bias_strides[4];
    int64_t alibi_strides[2];
    int64_t grad_query_strides[3];
    int64_t grad_key_strides[3];
    int64_t grad_value_strides[3];
    int64_t grad_alibi_strides[2];
    int64_t grad_bias_strides[4];
    int64_t batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v;
    const pa_plan* plan;  // transposed; block_q a multiple of 32, block_k of portattn_cpu_panel()
    int32_t dtype;
    int32_t bias_dtype;
    float scale;
    float softcap;
    int32_t threads;
    int32_t pack;        // PA_PACK_NONE: no AMX; PA_PACK_TILES: AMX; PA_PACK_AUTO: where it pays
    int32_t plan_batch;  // the plan's batch index of the tensors' first batch
    int32_t reserved;
} pa_cpu_backward_args;

// 0, or an error code with a message in err.
PA_EXPORT int32_t portattn_cpu_forward(const pa_cpu_args* args, char* err, int64_t err_len);
PA_EXPORT int32_t portattn_cpu_backward(const pa_cpu_backward_args* args, char* err, int64_t err_len);
// Name of the instruction set in use ("x86-64-v4", ...), and the rows of one panel in it.
PA_EXPORT const char* portattn_cpu_isa(void);
PA_EXPORT int32_t portattn_cpu_panel(void);
// Use this instruction set from now on; NULL: the environment variable PORTATTN_CPU_ISA, else the best one.
// 0, or -1 if this CPU or build does not have it.
PA_EXPORT int32_t portattn_cpu_select_isa(const char* name);
// What the CPU can do, measured now with `threads` threads: float32 FMA rate in GFLOP/s, and the
// bandwidth in GB/s of reading `bytes` bytes.
PA_EXPORT double portattn_cpu_measure_fma(int32_t threads, double seconds);
PA_EXPORT double portattn_cpu_measure_read(const void* data, int64_t bytes, int32_t threads, int32_t repeats);

#ifdef __cplusplus
}

namespace portattn {
namespace cpu {

struct Call;

class Forward {
  public:
    Forward() = default;
    ~Forward();
    Forward(const Forward&) = delete;
    Forward& operator=(const Forward&) = delete;

    // 0, or an error code with a message in err.
    int32_t init(const pa_cpu_args& args, char* err, int64_t err_len);
    int32_t num_passes() const;
    int64_t num_tasks(int32_t pass) const;
    size_t scratch_bytes() const;  // per thread, 64-byte aligned
    void run_task(int32_t pass, int64_t index, void* scratch) const;
    double work_us() const;  // rough time of the whole call on one thread

  private:
    Call* call_ = nullptr;
};

// This thread's scratch memory of at least `bytes` bytes; kept until the thread ends.
void* thread_scratch(size_t bytes);

}  // namespace cpu
}  // namespace portattn
#endif
