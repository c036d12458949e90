// SPDX-License-Identifier: Apache-2.0
// The body of an instruction set's translation unit: one table of its kernels. The including file
// defines SPARSE_ATTN_ISA, the namespace, table and capability name.
#include "backward_tile.h"
#include "centroid_tile.h"
#include "dim_tile.h"
#include "pool_tile.h"
#include "rank_tile.h"
#include "row_tile.h"
#include "score_tile.h"
#include "window_tile.h"

namespace sparse_attn::cpu {
namespace SPARSE_ATTN_ISA {

static void narrow(const float* from, char* to, int64_t n, DType dtype) {
  narrow_row(from, to, n, dtype);
}

}  // namespace SPARSE_ATTN_ISA

#define SPARSE_ATTN_STRING_(x) #x
#define SPARSE_ATTN_STRING(x) SPARSE_ATTN_STRING_(x)
#define SPARSE_ATTN_TABLE_(x) x##_kernels
#define SPARSE_ATTN_TABLE(x) SPARSE_ATTN_TABLE_(x)

extern const Kernels SPARSE_ATTN_TABLE(SPARSE_ATTN_ISA);
const Kernels SPARSE_ATTN_TABLE(SPARSE_ATTN_ISA) = {
    .name = SPARSE_ATTN_STRING(SPARSE_ATTN_ISA),
    .row_begin = SPARSE_ATTN_ISA::row_begin,
    .row_attend = SPARSE_ATTN_ISA::row_attend,
    .row_finish = SPARSE_ATTN_ISA::row_finish,
    .max_dim_rows = SPARSE_ATTN_ISA::kDimRows,
    .dim_begin = SPARSE_ATTN_ISA::dim_begin,
    .dim_attend = SPARSE_ATTN_ISA::dim_attend,
    .dim_finish = SPARSE_ATTN_ISA::dim_finish,
    .row_score = SPARSE_ATTN_ISA::row_score,
    .score_max = SPARSE_ATTN_ISA::score_max,
    .window_attend = SPARSE_ATTN_ISA::window_attend,
    .window_factors = SPARSE_ATTN_ISA::window_factors,
    .window_reduce = SPARSE_ATTN_ISA::window_reduce,
    .nearest = SPARSE_ATTN_ISA::nearest,
    .dim_score = SPARSE_ATTN_ISA::dim_score,
    .add_shares = SPARSE_ATTN_ISA::add_shares,
    .add_rows = SPARSE_ATTN_ISA::add_rows,
    .rank_scale = SPARSE_ATTN_ISA::rank_scale,
    .rank_levels = SPARSE_ATTN_ISA::rank_levels,
    .backward_begin = SPARSE_ATTN_ISA::backward_begin,
    .backward_attend = SPARSE_ATTN_ISA::backward_attend,
    .backward_finish = SPARSE_ATTN_ISA::backward_finish,
    .widen = SPARSE_ATTN_ISA::widen,
    .narrow = SPARSE_ATTN_ISA::narrow,
    .pool_rows = SPARSE_ATTN_ISA::pool_rows,
    .exp_cells = SPARSE_ATTN_ISA::exp_cells,
};

}  // namespace sparse_attn::cpu
