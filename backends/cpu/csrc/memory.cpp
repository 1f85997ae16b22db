#include "memory.hpp"

#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>

namespace portattn {
namespace cpu {
namespace {

constexpr size_t HEADER = 64;               // in front of what the caller sees: the block's size
constexpr size_t LARGEST_KEPT = 64u << 20;  // 4 blocks of at most this are kept
constexpr size_t HUGE_PAGE = 2u << 20;
// Slots instead of a lock: a lock held by another thread at fork stays locked in the child.
std::atomic<char*> kept[4];

size_t& size_of(char* block) { return *reinterpret_cast<size_t*>(block); }

char* new_block(size_t bytes) {
    size_t align = bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : 64;
    bytes = (bytes + align - 1) / align * align;
    char* block = static_cast<char*>(aligned_alloc(align, bytes));
    if (!block) return nullptr;
#if defined(__linux__)
    if (align == HUGE_PAGE) madvise(block, bytes, MADV_HUGEPAGE);  // only a wish: fewer page faults
#endif
    size_of(block) = bytes;
    return block;
}

}  // namespace

void* take_memory(size_t bytes) {
    bytes += HEADER;
    for (std::atomic<char*>& slot : kept) {
        char* block = slot.exchange(nullptr);
        if (!block) continue;
        if (size_of(block) >= bytes && size_of(block) / 8 <= bytes) return block + HEADER;
        char* empty = nullptr;
        if (!slot.compare_exchange_strong(empty, block)) free(block);
    }
    char* block = new_block(bytes);
    return block ? block + HEADER : nullptr;
}

void give_memory(void* memory) {
    if (!memory) return;
    char* block = static_cast<char*>(memory) - HEADER;
    if (size_of(block) <= LARGEST_KEPT) {
        for (std::atomic<char*>& slot : kept) {
            char* empty = nullptr;
            if (slot.compare_exchange_strong(empty, block)) return;
        }
        // All slots hold other sizes: this one is more likely to be wanted again.
        block = kept[0].exchange(block);
    }
    free(block);
}

}  // namespace cpu
}  // namespace portattn
