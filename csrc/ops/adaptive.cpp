// SPDX-License-Identifier: Apache-2.0
// sparse_attn::adaptive_lists on the CPU.
#include "../cpu/adaptive.h"

#include <tuple>

#include "common.h"

namespace sparse_attn::ops {
std::tuple<Tensor, Tensor, Tensor, Tensor> adaptive_lists_cpu(const Tensor q, const Tensor k,
                                                              double mass, double guard,
                                                              int64_t block_m, int64_t sink,
                                                              int64_t window, int64_t q_offset,
                                                              bool causal, double softmax_scale) {
  AttentionParams p = query_key_params(q, k);
  p.causal = causal;
  p.softmax_scale = static_cast<float>(softmax_scale);
  p.num_sequences = q.size(0);
  STD_TORCH_CHECK(mass >= 0.0 && mass <= 1.0, "sparse_attn::adaptive_lists: mass=", mass,
                  " is not in [0, 1]");
  STD_TORCH_CHECK(guard >= 0.0 && guard <= 1.0, "sparse_attn::adaptive_lists: guard=", guard,
                  " is not in [0, 1]");
  STD_TORCH_CHECK(block_m > 0 && block_m <= 1 << 20,
                  "sparse_attn::adaptive_lists: block_m=", block_m, " is not in [1, 2^20]");
  STD_TORCH_CHECK(sink >= 0, "sparse_attn::adaptive_lists: sink=", sink, " is negative");
  STD_TORCH_CHECK(window >= 0 && window < INT32_MAX, "sparse_attn::adaptive_lists: window=", window,
                  " is not in [0, 2^31 - 1)");
  STD_TORCH_CHECK(q_offset > -INT32_MAX && q_offset < INT32_MAX,
                  "sparse_attn::adaptive_lists: q_offset=", q_offset, " is out of range");
  const int64_t tiles = (p.seqlen_q + block_m - 1) / block_m;
  const std::vector<int64_t> shape{q.size(0), p.num_heads, tiles};
  Tensor block_counts = torch::stable::new_empty(q, shape, ScalarType::Long);
  Tensor column_counts = torch::stable::new_empty(q, shape, ScalarType::Long);
  std::vector<cpu::TileKeys> keys(q.size(0) * p.num_heads * tiles);
  cpu::adaptive_keys(p, {mass, guard, block_m, q_offset, sink, window}, keys.data(),
                     torch_threads());
  Tensor blocks = gather_lists(q, keys, &cpu::TileKeys::blocks, block_counts);
  Tensor columns = gather_lists(q, keys, &cpu::TileKeys::columns, column_counts);
  return {block_counts, blocks, column_counts, columns};
}

}  // namespace sparse_attn::ops
