// Memory of a call (cut rows, packed keys), kept for the next call: fresh pages cost as much as computing on
// them.
#pragma once
#include <stddef.h>

namespace portattn {
namespace cpu {

// At least `bytes` bytes, aligned to 64, not cleared; null when there is no memory. Any thread.
void* take_memory(size_t bytes);
// Gives it back (null is fine): kept if small enough and there is room, else freed.
void give_memory(void* memory);

}  // namespace cpu
}  // namespace portattn
