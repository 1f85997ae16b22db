#define PA_ISA v3
#define PA_ISA_NAME "x86-64-v3"
#include "isa.inc.hpp"
