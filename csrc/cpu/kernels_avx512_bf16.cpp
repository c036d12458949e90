// SPDX-License-Identifier: Apache-2.0
#define SPARSE_ATTN_ISA avx512_bf16
#include "table.h"
