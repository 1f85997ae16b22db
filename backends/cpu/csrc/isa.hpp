// Which instruction set runs.
#pragma once
#include "call.hpp"

namespace portattn {
namespace cpu {

// The set in use. Null, with a message in err, when PORTATTN_CPU_ISA names one that is not there.
const Kernels* kernels_in_use(char* err, int64_t err_len);

}  // namespace cpu
}  // namespace portattn
