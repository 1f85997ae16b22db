#include "threads.hpp"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "cpu.h"

namespace portattn {
namespace cpu {
namespace {

constexpr int32_t MAX_SHARES = 64;

// Each thread has a share of neighbouring indices (heads whose keys then stay in its own cache, from call to
// call as well), and helps the others when it is done.
struct Work {
    void (*fn)(void*, int64_t);
    void* context;
    int32_t shares;
    struct alignas(64) Share {
        std::atomic<int64_t> next;
        int64_t end;
    } share[MAX_SHARES];

    Work(void (*function)(void*, int64_t), void* data, int64_t count, int32_t threads)
        : fn(function), context(data), shares(threads < MAX_SHARES ? threads : MAX_SHARES) {
        for (int32_t i = 0; i < shares; ++i) {
            share[i].next.store(count * i / shares, std::memory_order_relaxed);
            share[i].end = count * (i + 1) / shares;
        }
    }

    void run(int32_t thread) {
        for (int32_t i = 0; i < shares; ++i) {
            Share& mine = share[(thread + i) % shares];
            for (;;) {
                int64_t index = mine.next.fetch_add(1, std::memory_order_relaxed);
                if (index >= mine.end) break;
                fn(context, index);
            }
        }
    }
};

// Threads that sleep until a call comes; one call at a time, others run alone.
class Pool {
  public:
    void run(Work& work, int32_t threads) {
        std::unique_lock<std::mutex> owner(busy_, std::try_to_lock);
        if (!owner.owns_lock()) {
            work.run(0);
            return;
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (started_ < threads - 1) {
                std::thread([this, id = started_] { loop(id); }).detach();
                ++started_;
            }
            work_ = &work;
            wanted_ = threads - 1;
            running_ = threads - 1;
            ++generation_;
        }
        wake_.notify_all();
        work.run(threads - 1);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
        work_ = nullptr;
    }

  private:
    void loop(int32_t id) {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (id >= wanted_) continue;
            Work* work = work_;
            lock.unlock();
            work->run(id);
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_, done_;
    Work* work_ = nullptr;
    int32_t started_ = 0, wanted_ = 0, running_ = 0;
    uint64_t generation_ = 0;
};

typedef void (*gomp_parallel_fn)(void (*)(void*), void*, unsigned, unsigned);
typedef int (*thread_num_fn)();

struct OpenMp {
    gomp_parallel_fn parallel = nullptr;
    thread_num_fn thread_num = nullptr;
};

struct OpenMpWork {
    Work* work;
    thread_num_fn thread_num;
};

std::atomic<Pool*> pool{nullptr};
std::atomic<bool> forked{false};

// A child has none of the parent's threads: neither ours nor libgomp's, which would wait for them for ever.
void after_fork_in_child() {
    forked.store(true);
    pool.store(nullptr);
}

OpenMp find_openmp() {
    pthread_atfork(nullptr, nullptr, after_fork_in_child);
    OpenMp found;
    void* handle = dlopen("libgomp.so.1", RTLD_NOLOAD | RTLD_LAZY);
    if (!handle) return found;
    found.parallel = reinterpret_cast<gomp_parallel_fn>(dlsym(handle, "GOMP_parallel"));
    found.thread_num = reinterpret_cast<thread_num_fn>(dlsym(handle, "omp_get_thread_num"));
    return found;
}

// Looked up at the first call: from Python torch is loaded by then, in ONNX Runtime the caller has its own
// threads.
const OpenMp& openmp() {
    static const OpenMp found = find_openmp();
    return found;
}

Pool& own_pool() {
    Pool* current = pool.load();
    if (current) return *current;
    Pool* fresh = new Pool;  // never freed: its threads live until the process ends
    if (pool.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;
    return *current;
}

struct Memory {
    void* data = nullptr;
    size_t bytes = 0;
    ~Memory() { free(data); }
};

}  // namespace

void parallel_for(int64_t count, int32_t threads, void (*fn)(void*, int64_t), void* context) {
    if (threads > count) threads = (int32_t)count;
    Work work(fn, context, count, threads > 1 ? threads : 1);
    if (threads <= 1) {
        work.run(0);
        return;
    }
    const OpenMp& omp = openmp();
    if (omp.parallel && omp.thread_num && !forked.load()) {
        OpenMpWork shared{&work, omp.thread_num};
        omp.parallel(
            [](void* p) {
                OpenMpWork* w = static_cast<OpenMpWork*>(p);
                w->work->run(w->thread_num());
            },
            &shared, (unsigned)threads, 0);
    } else {
        own_pool().run(work, threads);
    }
}

void* thread_scratch(size_t bytes) {
    static thread_local Memory memory;
    if (memory.bytes < bytes) {
        free(memory.data);
        memory.bytes = (bytes + 4095) / 4096 * 4096;
        memory.data = aligned_alloc(4096, memory.bytes);
        if (!memory.data) abort();
    }
    return memory.data;
}

}  // namespace cpu
}  // namespace portattn
