// SPDX-License-Identifier: Apache-2.0
#define SPARSE_ATTN_ISA neon
#define SPARSE_ATTN_NEON \
  1  // every aarch64 has it; kernels_scalar.cpp stays portable code there too
#include "table.h"
