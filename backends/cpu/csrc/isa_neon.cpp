#define PA_ISA neon
#define PA_ISA_NAME "neon"
#include "isa.inc.hpp"
