#define PA_ISA amx
#define PA_ISA_NAME "x86-64-v4+amx"
#define PA_ISA_AMX
#include "isa.inc.hpp"
