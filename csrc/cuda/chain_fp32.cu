#define PRECISION Precision::FP32
#include "chain_kernels.h"
