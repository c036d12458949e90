// SPDX-License-Identifier: Apache-2.0
// sparse_attn::pool_blocks, block_top_k, block_top_p, block_threshold, list_blocks and
// cell_block_sums on the CPU.
#include <string>
#include <tuple>

#include "../cpu/blocks.h"
#include "common.h"

namespace sparse_attn::ops {
namespace {

using cpu::BlockGrid;

constexpr int64_t kMostTokens = int64_t{1} << 40;  // far from overflow in sums of positions

const float* scores_of(const char* op, const Tensor& scores, int64_t dims) {
  STD_TORCH_CHECK(scores.is_cpu() && scores.scalar_type() == ScalarType::Float &&
                      scores.dim() == dims && scores.is_contiguous(),
                  "sparse_attn::", op, ": the scores are not a contiguous float32 CPU tensor of ",
                  dims, " dimensions");
  return static_cast<const float*>(scores.const_data_ptr());
}

BlockGrid grid_of(const char* op, const Tensor& scores, int64_t first_tile, int64_t seqlen_q,
                  int64_t block_m, int64_t block_n, int64_t q_offset, bool causal, int64_t sink,
                  int64_t local) {
  scores_of(op, scores, 3);
  const BlockGrid grid{scores.size(1), scores.size(2), first_tile, seqlen_q, block_m,
                       block_n,        q_offset,       sink,       local,    causal};
  const auto sane = [](int64_t low, int64_t x) { return low <= x && x <= kMostTokens; };
  STD_TORCH_CHECK(sane(1, block_m) && sane(1, block_n) && sane(0, seqlen_q) &&
                      sane(0, first_tile) && sane(-kMostTokens, q_offset) && sane(0, sink) &&
                      sane(0, local) && first_tile + grid.tiles <= kMostTokens / block_m,
                  "sparse_attn::", op, ": a length, offset or block size is out of range");
  STD_TORCH_CHECK(grid.blocks == 0 || grid.tiles <= INT32_MAX / grid.blocks, "sparse_attn::", op,
                  ": a grid of ", grid.tiles, " x ", grid.blocks, " blocks is too large");
  return grid;
}

Tensor mask_like(const Tensor& scores) {
  return torch::stable::new_empty(scores, {scores.size(0), scores.size(1), scores.size(2)},
                                  ScalarType::Bool);
}

bool* marks(Tensor& mask) {
  return static_cast<bool*>(mask.mutable_data_ptr());
}

cpu::Pool pool_named(const std::string& kind) {
  if (kind == "mean") return cpu::Pool::kMean;
  if (kind == "min") return cpu::Pool::kMin;
  if (kind == "max") return cpu::Pool::kMax;
  STD_TORCH_CHECK(kind == "direction", "sparse_attn::pool_blocks: kind=", kind,
                  " is none of mean, min, max and direction");
  return cpu::Pool::kDirection;
}

}  // namespace

Tensor pool_blocks_cpu(const Tensor x, int64_t block, std::string kind) {
  const cpu::Pool pool = pool_named(kind);
  const auto [view, dtype] = rows_view(x, "x");
  const int64_t batch = x.size(0), heads = x.size(1), seqlen = x.size(2), dim = x.size(3);
  STD_TORCH_CHECK(block >= 1 && block <= kMostTokens, "sparse_attn::pool_blocks: block=", block,
                  " is out of range");
  STD_TORCH_CHECK(dim * heads < INT32_MAX, "sparse_attn::pool_blocks: head_dim=", dim,
                  " is too large");
  Tensor to = torch::stable::new_empty(x, {batch, heads, (seqlen + block - 1) / block, dim},
                                       ScalarType::Float);
  if (x.numel() > 0)
    cpu::pool_blocks(view, dtype, batch, heads, seqlen, dim, block, pool,
                     static_cast<float*>(to.mutable_data_ptr()), torch_threads());
  return to;
}

Tensor block_top_k_cpu(const Tensor scores, const Tensor budget, int64_t first_tile,
                       int64_t seqlen_q, int64_t block_m, int64_t block_n, int64_t q_offset,
                       bool causal, int64_t sink, int64_t local) {
  const BlockGrid grid = grid_of("block_top_k", scores, first_tile, seqlen_q, block_m, block_n,
                                 q_offset, causal, sink, local);
  const auto fits = [&](int64_t d) {
    return budget.size(d) == scores.size(d) || budget.size(d) == 1;
  };
  STD_TORCH_CHECK(budget.is_cpu() && budget.scalar_type() == ScalarType::Int && budget.dim() == 2 &&
                      budget.is_contiguous() && fits(0) && fits(1),
                  "sparse_attn::block_top_k: budget is not a contiguous int32 [rows or 1, tiles or "
                  "1] CPU tensor");
  Tensor mask = mask_like(scores);
  cpu::block_top_k(grid, scores_of("block_top_k", scores, 3), scores.size(0),
                   static_cast<const int32_t*>(budget.const_data_ptr()),
                   budget.size(0) == 1 ? 0 : budget.size(1), budget.size(1) == 1 ? 0 : 1,
                   marks(mask), torch_threads());
  return mask;
}

Tensor block_top_p_cpu(const Tensor scores, double share, bool logits, bool whole,
                       int64_t first_tile, int64_t seqlen_q, int64_t block_m, int64_t block_n,
                       int64_t q_offset, bool causal, int64_t sink, int64_t local) {
  const BlockGrid grid = grid_of("block_top_p", scores, first_tile, seqlen_q, block_m, block_n,
                                 q_offset, causal, sink, local);
  Tensor mask = mask_like(scores);
  cpu::block_top_p(grid, scores_of("block_top_p", scores, 3), scores.size(0), share, logits, whole,
                   marks(mask), torch_threads());
  return mask;
}

Tensor block_threshold_cpu(const Tensor scores, double threshold, int64_t first_tile,
                           int64_t seqlen_q, int64_t block_m, int64_t block_n, int64_t q_offset,
                           bool causal, int64_t sink, int64_t local) {
  const BlockGrid grid = grid_of("block_threshold", scores, first_tile, seqlen_q, block_m, block_n,
                                 q_offset, causal, sink, local);
  Tensor mask = mask_like(scores);
  cpu::block_threshold(grid, scores_of("block_threshold", scores, 3), scores.size(0), threshold,
                       marks(mask), torch_threads());
  return mask;
}

std::tuple<Tensor, Tensor> list_blocks_cpu(const Tensor mask, int64_t block_n) {
  STD_TORCH_CHECK(
      mask.is_cpu() && mask.scalar_type() == ScalarType::Bool && mask.dim() == 2 &&
          mask.is_contiguous(),
      "sparse_attn::list_blocks: mask is not a contiguous bool [rows, blocks] CPU tensor");
  const int64_t rows = mask.size(0), n = mask.size(1);
  STD_TORCH_CHECK(block_n >= 1 && (n == 0 || block_n <= INT32_MAX / n),
                  "sparse_attn::list_blocks: ", n, " blocks of ", block_n,
                  " tokens are more than an index can address");
  const auto* from = static_cast<const bool*>(mask.const_data_ptr());
  Tensor counts = torch::stable::new_empty(mask, {rows}, ScalarType::Long);
  auto* count = static_cast<int64_t*>(counts.mutable_data_ptr());
  cpu::count_marks(from, rows, n, count, torch_threads());
  std::vector<int64_t> starts(rows);
  int64_t total = 0;
  for (int64_t i = 0; i < rows; ++i) {
    starts[i] = total;
    total += count[i];
  }
  Tensor indices = torch::stable::new_empty(mask, {total}, ScalarType::Int);
  cpu::list_marks(from, rows, n, block_n, starts.data(),
                  static_cast<int32_t*>(indices.mutable_data_ptr()), torch_threads());
  return {counts, indices};
}

Tensor cell_block_sums_cpu(const Tensor cells, const Tensor limits, int64_t tile_cells,
                           int64_t block_cells, double scale) {
  const float* from = scores_of("cell_block_sums", cells, 3);
  const int64_t rows = cells.size(0), num_cells = cells.size(1), width = cells.size(2);
  STD_TORCH_CHECK(limits.is_cpu() && limits.scalar_type() == ScalarType::Long &&
                      limits.dim() == 1 && limits.is_contiguous() && limits.size(0) == num_cells,
                  "sparse_attn::cell_block_sums: limits is not a contiguous int64 [", num_cells,
                  "] CPU tensor");
  STD_TORCH_CHECK(tile_cells >= 1 && block_cells >= 1 && tile_cells <= kMostTokens &&
                      block_cells <= kMostTokens,
                  "sparse_attn::cell_block_sums: tile_cells=", tile_cells,
                  " or block_cells=", block_cells, " is out of range");
  Tensor sums = torch::stable::new_empty(cells, {rows, (num_cells + tile_cells - 1) / tile_cells,
                                                 (width + block_cells - 1) / block_cells});
  cpu::cell_block_sums(from, rows, num_cells, width,
                       static_cast<const int64_t*>(limits.const_data_ptr()), tile_cells,
                       block_cells, static_cast<float>(scale),
                       static_cast<float*>(sums.mutable_data_ptr()), torch_threads());
  return sums;
}

}  // namespace sparse_attn::ops
