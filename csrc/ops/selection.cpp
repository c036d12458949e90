// SPDX-License-Identifier: Apache-2.0
// sparse_attn::window_scores, top_k and vertical_slash_lists on the CPU.
#include <cstring>
#include <tuple>

#include "../core/vertical_slash.h"
#include "../cpu/selection.h"
#include "common.h"

namespace sparse_attn::ops {

std::tuple<Tensor, Tensor> window_scores_cpu(const Tensor q, const Tensor k, int64_t last_q,
                                             int64_t num_distances, int64_t q_offset, bool causal,
                                             double softmax_scale) {
  static const int32_t dense_head[4] = {kDense, 0, 0, 0};
  AttentionParams p = query_key_params(q, k);
  p.causal = causal;
  p.softmax_scale = static_cast<float>(softmax_scale);
  p.num_sequences = q.size(0);
  p.index.heads = dense_head;
  p.index.num_heads = 1;
  STD_TORCH_CHECK(last_q >= 0 && last_q <= p.seqlen_q,
                  "sparse_attn::window_scores: last_q=", last_q, " is not in [0, ", p.seqlen_q,
                  "]");
  STD_TORCH_CHECK(num_distances >= 0, "sparse_attn::window_scores: num_distances is negative");
  Tensor columns =
      torch::stable::new_empty(q, {q.size(0), p.num_heads, p.seqlen_k}, ScalarType::Float);
  Tensor diagonals =
      torch::stable::new_empty(q, {q.size(0), p.num_heads, num_distances}, ScalarType::Float);
  cpu::window_scores(p, last_q, q_offset, static_cast<float*>(columns.mutable_data_ptr()),
                     static_cast<float*>(diagonals.mutable_data_ptr()), num_distances,
                     torch_threads());
  return {columns, diagonals};
}

Tensor top_k_cpu(const Tensor scores, int64_t k) {
  STD_TORCH_CHECK(scores.is_cpu() && scores.scalar_type() == ScalarType::Float &&
                      scores.dim() == 2 && scores.is_contiguous(),
                  "sparse_attn::top_k: scores is not a contiguous float32 [rows, n] CPU tensor");
  const int64_t rows = scores.size(0), n = scores.size(1);
  STD_TORCH_CHECK(k >= 0 && k <= n && n <= INT32_MAX, "sparse_attn::top_k: k=", k,
                  " is not in [0, ", n, "]");
  Tensor indices = torch::stable::new_empty(scores, {rows, k}, ScalarType::Int);
  cpu::top_k(static_cast<const float*>(scores.const_data_ptr()), rows, n, k,
             static_cast<int32_t*>(indices.mutable_data_ptr()), torch_threads());
  return indices;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> vertical_slash_lists_cpu(
    const Tensor verticals, const Tensor slashes, int64_t seqlen_q, int64_t seqlen_k,
    int64_t q_offset, bool causal, int64_t block_m, int64_t block_n) {
  STD_TORCH_CHECK(verticals.is_cpu() && verticals.scalar_type() == ScalarType::Int &&
                      verticals.dim() == 2 && verticals.is_contiguous(),
                  "sparse_attn::vertical_slash_lists: verticals is not a contiguous int32 "
                  "[heads, count] CPU tensor");
  STD_TORCH_CHECK(slashes.is_cpu() && slashes.scalar_type() == ScalarType::Bool &&
                      slashes.dim() == 2 && slashes.is_contiguous() &&
                      slashes.size(0) == verticals.size(0),
                  "sparse_attn::vertical_slash_lists: slashes is not a contiguous bool "
                  "[heads, distances] CPU tensor");
  STD_TORCH_CHECK(
      seqlen_q >= 0 && seqlen_k >= 0 && seqlen_k < INT32_MAX && block_m > 0 && block_n > 0,
      "sparse_attn::vertical_slash_lists: a length or block size is out of range");
  const SlashShape shape{seqlen_q, seqlen_k, q_offset, block_m, block_n, causal};
  const int64_t heads = verticals.size(0), tiles = shape.tiles();
  struct Lists {
    std::vector<int32_t> blocks, columns;
  };
  std::vector<Lists> lists(heads);
  Tensor block_counts = torch::stable::new_empty(verticals, {heads, tiles}, ScalarType::Long);
  Tensor column_counts = torch::stable::new_empty(verticals, {heads, tiles}, ScalarType::Long);
  auto* block_count = static_cast<int64_t*>(block_counts.mutable_data_ptr());
  auto* column_count = static_cast<int64_t*>(column_counts.mutable_data_ptr());
  const int64_t num_verticals = verticals.size(1), distances = slashes.size(1);
  const auto* vertical = static_cast<const int32_t*>(verticals.const_data_ptr());
  const auto* slash = static_cast<const bool*>(slashes.const_data_ptr());
  torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      const SlashLayout layout = slash_layout(slash + h * distances, distances, shape);
      for (int64_t t = 0; t < tiles; ++t) {
        const size_t blocks = lists[h].blocks.size(), columns = lists[h].columns.size();
        append_tile(layout, shape, vertical + h * num_verticals, num_verticals, t, lists[h].blocks,
                    lists[h].columns);
        block_count[h * tiles + t] = static_cast<int64_t>(lists[h].blocks.size() - blocks);
        column_count[h * tiles + t] = static_cast<int64_t>(lists[h].columns.size() - columns);
      }
    }
  });
  const auto gather = [&](std::vector<int32_t> Lists::* member) {
    size_t total = 0;
    for (const Lists& head : lists) total += (head.*member).size();
    Tensor all = torch::stable::new_empty(verticals, {static_cast<int64_t>(total)});
    auto* to = static_cast<int32_t*>(all.mutable_data_ptr());
    for (const Lists& head : lists) {
      const std::vector<int32_t>& from = head.*member;
      if (!from.empty()) std::memcpy(to, from.data(), from.size() * sizeof(int32_t));
      to += from.size();
    }
    return all;
  };
  return {block_counts, gather(&Lists::blocks), column_counts, gather(&Lists::columns)};
}

}  // namespace sparse_attn::ops
