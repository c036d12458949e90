// SPDX-License-Identifier: Apache-2.0
#define SPARSE_ATTN_ISA avx512
#include "table.h"
