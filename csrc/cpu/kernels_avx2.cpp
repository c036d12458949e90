// SPDX-License-Identifier: Apache-2.0
#define SPARSE_ATTN_ISA avx2
#include "table.h"
