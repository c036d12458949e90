// SPDX-License-Identifier: Apache-2.0
// sparse_attn::window_scores and top_k on the CPU.
#include <tuple>

#include "../cpu/selection.h"
#include "common.h"

namespace sparse_attn::ops {

std::tuple<Tensor, Tensor> window_scores_cpu(const Tensor q, const Tensor k, int64_t last_q,
                                             int64_t num_distances, int64_t q_offset, bool causal,
                                             double softmax_scale, bool maximum) {
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
  const cpu::WindowOutput to{static_cast<float*>(columns.mutable_data_ptr()),
                             static_cast<float*>(diagonals.mutable_data_ptr()), num_distances,
                             maximum};
  cpu::window_scores(p, last_q, q_offset, to, torch_threads());
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

}  // namespace sparse_attn::ops
