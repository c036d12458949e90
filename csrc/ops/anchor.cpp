// SPDX-License-Identifier: Apache-2.0
// sparse_attn::anchor_lists on the CPU.
#include <tuple>

#include "../cpu/anchor.h"
#include "common.h"

namespace sparse_attn::ops {
std::tuple<Tensor, Tensor, Tensor, Tensor> anchor_lists_cpu(const Tensor q, const Tensor k,
                                                            int64_t block, int64_t step,
                                                            int64_t sink, double theta,
                                                            int64_t q_offset, bool causal,
                                                            double softmax_scale, int64_t block_n) {
  AttentionParams p = query_key_params(q, k);
  p.causal = causal;
  p.softmax_scale = static_cast<float>(softmax_scale);
  p.num_sequences = q.size(0);
  constexpr int64_t kMost = int64_t{1} << 30;
  STD_TORCH_CHECK(block > 0 && step > 0 && block <= kMost && step <= kMost &&
                      block * step <= kMost && sink >= 0 && block_n > 0 && block_n <= kMost &&
                      q_offset > -kMost && q_offset < kMost,
                  "sparse_attn::anchor_lists: a size is out of range");
  const cpu::AnchorRule rule{block, step, sink, static_cast<float>(theta), q_offset, block_n};
  std::vector<cpu::AnchorLists> lists = cpu::anchor_lists(p, rule, torch_threads());
  const int64_t supers = (p.seqlen_q + rule.super() - 1) / rule.super();
  const auto counts = [&] {
    return torch::stable::new_empty(q, {q.size(0), p.num_heads, supers}, ScalarType::Long);
  };
  Tensor block_counts = counts(), column_counts = counts();
  Tensor blocks = gather_lists(q, lists, &cpu::AnchorLists::blocks, block_counts);
  Tensor columns = gather_lists(q, lists, &cpu::AnchorLists::columns, column_counts);
  return {block_counts, blocks, column_counts, columns};
}

}  // namespace sparse_attn::ops
