// SPDX-License-Identifier: Apache-2.0
// Block-sparse selection on the CPU: pooled rows, and choices on a grid of query tiles x key
// blocks.
#pragma once

#include <cstdint>

#include "../core/types.h"
#include "attention.h"
#include "kernels.h"

namespace sparse_attn::cpu {

// to [batch, num_heads, ceil(seqlen / block), dim] = mean, minimum, maximum, or mean direction of
// every run of `block` rows of x; a shorter last run counts its own rows.
void pool_blocks(const TensorView& x, DType dtype, int64_t batch, int64_t num_heads, int64_t seqlen,
                 int64_t dim, int64_t block, Pool kind, float* to, const Executor& executor);

// A grid's geometry. Tile t's diagonal is the block of the position of its last row. Allowed are
// the blocks up to the diagonal (all of them if not causal); forced are, of these, the first `sink`
// and the `local` ones that end with the diagonal.
struct BlockGrid {
  int64_t tiles, blocks;  // tiles from first_tile on
  int64_t first_tile;
  int64_t seqlen_q;
  int64_t block_m, block_n;
  int64_t q_offset;
  int64_t sink, local;
  bool causal;

  int64_t diagonal(int64_t tile) const;
  int64_t allowed(int64_t tile) const;  // blocks [0, allowed) are
};

// All of these write mask [rows, tiles, blocks] from scores of the same shape. Order: score
// descending, then index ascending; a NaN counts as -inf.

// The forced blocks and the best others, up to budget[row * row_stride + tile * tile_stride].
void block_top_k(const BlockGrid& grid, const float* scores, int64_t rows, const int32_t* budget,
                 int64_t row_stride, int64_t tile_stride, bool* mask, const Executor& executor);

// The forced blocks, then the fewest others in order until `share` of the mass is covered: that of
// the tile or, if `whole`, of all tiles of the row together. Masses are the scores themselves
// (what is negative counts as 0) or, if `logits`, their softmax over the tile's allowed blocks.
void block_top_p(const BlockGrid& grid, const float* scores, int64_t rows, double share,
                 bool logits, bool whole, bool* mask, const Executor& executor);

// The forced blocks, and those whose softmax over the tile's allowed blocks is above `threshold`.
void block_threshold(const BlockGrid& grid, const float* scores, int64_t rows, double threshold,
                     bool* mask, const Executor& executor);

// counts[row] of the marks of mask [rows, n].
void count_marks(const bool* mask, int64_t rows, int64_t n, int64_t* counts,
                 const Executor& executor);

// Writes step * position of every mark of a row at starts[row] of indices, ascending.
void list_marks(const bool* mask, int64_t rows, int64_t n, int64_t step, const int64_t* starts,
                int32_t* indices, const Executor& executor);

// Softmax of rows of cells, summed by block. cells [rows, num_cells, width] holds q . k of cells;
// cell row c sees the first limits[c] <= width cells. Rows are summed in tiles of tile_cells, keys
// in blocks of block_cells: sums [rows, ceil(num_cells / tile_cells), ceil(width / block_cells)].
// A row whose probabilities are not finite counts as zeros.
void cell_block_sums(const float* cells, int64_t rows, int64_t num_cells, int64_t width,
                     const int64_t* limits, int64_t tile_cells, int64_t block_cells, float scale,
                     float* sums, const Executor& executor);

}  // namespace sparse_attn::cpu
