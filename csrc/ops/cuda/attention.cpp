// SPDX-License-Identifier: Apache-2.0
// sparse_attn::attention on CUDA.
#include <tuple>

#include "device.h"
#include "kernels.h"

namespace sparse_attn::ops {

std::tuple<Tensor, Tensor> attention_cuda(
    const Tensor q, const Tensor k, const Tensor v, const Tensor heads, const Tensor block_indptr,
    const Tensor block_indices, const std::optional<Tensor> block_bits_ids,
    const std::optional<Tensor> block_bits, const Tensor column_indptr, const Tensor column_indices,
    const std::optional<Tensor> column_bias, int64_t block_m, int64_t block_n,
    const std::optional<Tensor> seq_ranges, int64_t q_offset, bool causal, double softmax_scale,
    double softcap, const std::optional<Tensor> sinks, const std::optional<Tensor> block_table) {
  cuda::DeviceCall call =
      device_call({q,
                   k,
                   v,
                   {heads, block_indptr, block_indices, block_bits_ids, block_bits, column_indptr,
                    column_indices, column_bias, block_m, block_n},
                   seq_ranges,
                   q_offset,
                   causal,
                   softmax_scale,
                   softcap,
                   sinks,
                   block_table});
  AttentionParams& p = call.call;
  const Device device(q);
  const Tensor rows[] = {aligned_rows(q), aligned_rows(k), aligned_rows(v)};  // live until launched
  p.q = tensor_view(rows[0]);
  p.k = tensor_view(rows[1]);
  p.v = tensor_view(rows[2]);
  const auto [out, lse] = new_results(q, seq_ranges.has_value(), p);
  if (out.numel() > 0 || lse.numel() > 0)
    raise_cuda("attention", call.max_q_len <= cuda::kDecodeMaxRows
                                ? run_decode(call, q, device.stream())
                                : run_prefill(call, device.stream()));
  return {out, lse};
}

}  // namespace sparse_attn::ops
