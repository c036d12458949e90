// SPDX-License-Identifier: Apache-2.0
#define SPARSE_ATTN_ISA scalar
#include "table.h"
