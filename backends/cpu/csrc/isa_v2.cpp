#define PA_ISA v2
#define PA_ISA_NAME "x86-64-v2"
#include "isa.inc.hpp"
