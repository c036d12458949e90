// SPDX-License-Identifier: Apache-2.0
// sparse_attn::adaptive_lists on the CPU.
#include "../cpu/adaptive.h"

#include <cstring>
#include <tuple>

#include "common.h"

namespace sparse_attn::ops {
namespace {

// One list after another. Lists are freed as they are copied, so that memory holds them once.
Tensor gather(const Tensor& like, std::vector<cpu::TileKeys>& keys,
              std::vector<int32_t> cpu::TileKeys::* member, int64_t* counts) {
  int64_t total = 0;
  for (size_t i = 0; i < keys.size(); ++i)
    total += counts[i] = static_cast<int64_t>((keys[i].*member).size());
  Tensor all = torch::stable::new_empty(like, {total}, ScalarType::Int);
  auto* to = static_cast<int32_t*>(all.mutable_data_ptr());
  for (cpu::TileKeys& tile : keys) {
    const std::vector<int32_t> from = std::move(tile.*member);
    if (!from.empty()) std::memcpy(to, from.data(), from.size() * sizeof(int32_t));
    to += from.size();
  }
  return all;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> adaptive_lists_cpu(const Tensor q, const Tensor k,
                                                              double mass, double guard,
                                                              int64_t block_m, int64_t sink,
                                                              int64_t q_offset, bool causal,
                                                              double softmax_scale) {
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
  STD_TORCH_CHECK(q_offset > -INT32_MAX && q_offset < INT32_MAX,
                  "sparse_attn::adaptive_lists: q_offset=", q_offset, " is out of range");
  const int64_t tiles = (p.seqlen_q + block_m - 1) / block_m;
  const std::vector<int64_t> shape{q.size(0), p.num_heads, tiles};
  Tensor block_counts = torch::stable::new_empty(q, shape, ScalarType::Long);
  Tensor column_counts = torch::stable::new_empty(q, shape, ScalarType::Long);
  std::vector<cpu::TileKeys> keys(q.size(0) * p.num_heads * tiles);
  cpu::adaptive_keys(p, {mass, guard, block_m, q_offset, sink}, keys.data(), torch_threads());
  Tensor blocks = gather(q, keys, &cpu::TileKeys::blocks,
                         static_cast<int64_t*>(block_counts.mutable_data_ptr()));
  Tensor columns = gather(q, keys, &cpu::TileKeys::columns,
                          static_cast<int64_t*>(column_counts.mutable_data_ptr()));
  return {block_counts, blocks, column_counts, columns};
}

}  // namespace sparse_attn::ops
