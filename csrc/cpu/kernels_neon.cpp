// SPDX-License-Identifier: Apache-2.0
// Every aarch64 has NEON. kernels_scalar.cpp stays portable code there, hence a macro of our own.
#define SPARSE_ATTN_ISA neon
#define SPARSE_ATTN_NEON 1
#include "table.h"
