#define PA_ISA v4
#define PA_ISA_NAME "x86-64-v4"
#include "isa.inc.hpp"
