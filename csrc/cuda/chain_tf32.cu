#define PRECISION Precision::TF32
#include "chain_kernels.h"
