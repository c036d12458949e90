// SPDX-License-Identifier: Apache-2.0
// sparse_attn::anchor_lists on the CPU.
#include <cstring>
#include <tuple>

#include "../cpu/anchor.h"
#include "common.h"

namespace sparse_attn::ops {
namespace {

Tensor joined(const Tensor& like, const std::vector<cpu::AnchorLists>& lists,
              std::vector<int32_t> cpu::AnchorLists::* member, Tensor& counts) {
  auto* count = static_cast<int64_t*>(counts.mutable_data_ptr());
  int64_t total = 0;
  for (const cpu::AnchorLists& one : lists) {
    *count++ = static_cast<int64_t>((one.*member).size());
    total += static_cast<int64_t>((one.*member).size());
  }
  Tensor all = torch::stable::new_empty(like, {total}, ScalarType::Int);
  auto* to = static_cast<int32_t*>(all.mutable_data_ptr());
  for (const cpu::AnchorLists& one : lists) {
    const std::vector<int32_t>& from = one.*member;
    if (!from.empty()) std::memcpy(to, from.data(), from.size() * sizeof(int32_t));
    to += from.size();
  }
  return all;
}

}  // namespace

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
  const std::vector<cpu::AnchorLists> lists = cpu::anchor_lists(p, rule, torch_threads());
  const int64_t supers = (p.seqlen_q + rule.super() - 1) / rule.super();
  const auto counts = [&] {
    return torch::stable::new_empty(q, {q.size(0), p.num_heads, supers}, ScalarType::Long);
  };
  Tensor block_counts = counts(), column_counts = counts();
  Tensor blocks = joined(q, lists, &cpu::AnchorLists::blocks, block_counts);
  Tensor columns = joined(q, lists, &cpu::AnchorLists::columns, column_counts);
  return {block_counts, blocks, column_counts, columns};
}

}  // namespace sparse_attn::ops
