#define PRECISION Precision::BF16
#include "chain_kernels.h"
