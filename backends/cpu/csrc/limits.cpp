// Measures what this CPU can do: float32 multiply-adds and reading memory, with the instruction set in use.
#include <time.h>

#include "isa.hpp"
#include "threads.hpp"

namespace {

using namespace portattn::cpu;

double seconds_now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

struct FmaWork {
    const Kernels* kernels;
    int64_t steps;
    double flops[64];
};

struct ReadWork {
    const Kernels* kernels;
    const float* data;
    int64_t count, parts;
    float sum[64];
};

}  // namespace

extern "C" double portattn_cpu_measure_fma(int32_t threads, double seconds) {
    char err[256];
    FmaWork work{};
    work.kernels = kernels_in_use(err, sizeof err);
    if (!work.kernels || threads < 1 || threads > 64) return 0.0;
    work.steps = 1000000;
    auto run = [](void* context, int64_t i) {
        FmaWork* w = static_cast<FmaWork*>(context);
        w->flops[i] = w->kernels->fma_flops(w->steps);
    };
    double best = 0.0, end = seconds_now() + seconds;
    do {
        double start = seconds_now();
        parallel_for(threads, threads, run, &work);
        double elapsed = seconds_now() - start, flops = 0.0;
        for (int32_t i = 0; i < threads; ++i) flops += work.flops[i];
        if (flops / elapsed > best) best = flops / elapsed;
    } while (seconds_now() < end);
    return best * 1e-9;
}

extern "C" double portattn_cpu_measure_read(const void* data, int64_t bytes, int32_t threads,
                                            int32_t repeats) {
    char err[256];
    ReadWork work{};
    work.kernels = kernels_in_use(err, sizeof err);
    if (!work.kernels || threads < 1 || threads > 64) return 0.0;
    work.data = static_cast<const float*>(data);
    work.count = bytes / 4;
    work.parts = threads;
    auto run = [](void* context, int64_t i) {
        ReadWork* w = static_cast<ReadWork*>(context);
        int64_t each = w->count / w->parts;
        w->sum[i] = w->kernels->read_sum(w->data + i * each, each);
    };
    double best = 0.0;
    for (int32_t r = 0; r < repeats; ++r) {
        double start = seconds_now();
        parallel_for(threads, threads, run, &work);
        double rate = (double)bytes / (seconds_now() - start);
        if (rate > best) best = rate;
    }
    return best * 1e-9;
}
