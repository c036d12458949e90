// SPDX-License-Identifier: Apache-2.0
// sparse_attn::attention and its backward on the CPU.
#include <tuple>

#include "common.h"

namespace sparse_attn::ops {

std::tuple<Tensor, Tensor> attention_cpu(
    const Tensor q, const Tensor k, const Tensor v, const Tensor heads, const Tensor block_indptr,
    const Tensor block_indices, const std::optional<Tensor> block_bits_ids,
    const std::optional<Tensor> block_bits, const Tensor column_indptr, const Tensor column_indices,
    const std::optional<Tensor> column_bias, int64_t block_m, int64_t block_n,
    const std::optional<Tensor> seq_ranges, int64_t q_offset, bool causal, double softmax_scale,
    double softcap, const std::optional<Tensor> sinks, const std::optional<Tensor> block_table) {
  std::vector<Sequence> sequences;
  AttentionParams p =
      attention_params({q,
                        k,
                        v,
                        {heads, block_indptr, block_indices, block_bits_ids, block_bits,
                         column_indptr, column_indices, column_bias, block_m, block_n},
                        seq_ranges,
                        q_offset,
                        causal,
                        softmax_scale,
                        softcap,
                        sinks,
                        block_table},
                       sequences);
  const auto [out, lse] = new_results(q, seq_ranges.has_value(), p);
  raise_fault("attention", cpu::attention_forward(p, torch_threads()));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor grad_out, const Tensor delta, const Tensor lse, const Tensor q, const Tensor k,
    const Tensor v, const Tensor heads, const Tensor block_indptr, const Tensor block_indices,
    const std::optional<Tensor> block_bits_ids, const std::optional<Tensor> block_bits,
    const Tensor column_indptr, const Tensor column_indices,
    const std::optional<Tensor> column_bias, int64_t block_m, int64_t block_n,
    const std::optional<Tensor> seq_ranges, int64_t q_offset, bool causal, double softmax_scale,
    double softcap) {
  std::vector<Sequence> sequences;
  const std::optional<Tensor> none;
  BackwardParams b;
  b.forward = attention_params({q,
                                k,
                                v,
                                {heads, block_indptr, block_indices, block_bits_ids, block_bits,
                                 column_indptr, column_indices, column_bias, block_m, block_n},
                                seq_ranges,
                                q_offset,
                                causal,
                                softmax_scale,
                                softcap,
                                none,
                                none},
                               sequences);
  const AttentionParams& p = b.forward;
  for (const Tensor* x : {&delta, &lse})
    STD_TORCH_CHECK(x->is_cpu() && x->scalar_type() == ScalarType::Float && x->is_contiguous() &&
                        x->numel() == q.size(0) * p.num_heads * p.seqlen_q,
                    "sparse_attn::attention_backward: delta and lse are not contiguous float32 "
                    "[batch, heads, seqlen_q]");
  STD_TORCH_CHECK(grad_out.is_cpu() && grad_out.scalar_type() == q.scalar_type() &&
                      grad_out.dim() == 4 && grad_out.size(0) == q.size(0) &&
                      grad_out.size(1) == p.num_heads && grad_out.size(2) == p.seqlen_q &&
                      grad_out.size(3) == p.head_dim_v && grad_out.stride(3) == 1,
                  "sparse_attn::attention_backward: grad_out does not fit q and v");
  // Gradients of two sequences that share keys would overwrite each other.
  if (q.size(0) == 1) check_disjoint(sequences, "k", &Sequence::k_start, &Sequence::k_len);
  Tensor grad_q = empty_rows(q, p.num_heads, p.seqlen_q, p.head_dim);
  Tensor grad_k = empty_rows(k, p.num_heads_kv, p.seqlen_k, p.head_dim);
  Tensor grad_v = empty_rows(v, p.num_heads_kv, p.seqlen_k, p.head_dim_v);
  if (seq_ranges.has_value())  // rows and keys of no sequence
    for (Tensor* x : {&grad_q, &grad_k, &grad_v}) torch::stable::zero_(*x);
  b.forward.lse = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
  b.delta = static_cast<const float*>(delta.const_data_ptr());
  b.grad_out = tensor_view(grad_out);
  b.grad_q = tensor_view(grad_q);
  b.grad_k = tensor_view(grad_k);
  b.grad_v = tensor_view(grad_v);
  raise_fault("attention_backward", cpu::attention_backward(b, torch_threads()));
  return {grad_q, grad_k, grad_v};
}

}  // namespace sparse_attn::ops
