// SPDX-License-Identifier: Apache-2.0
// sparse_attn::check_index: every rule that the kernels check tile by tile, over a whole index.
#include <string>

#include "../cpu/kernels.h"
#include "common.h"

namespace sparse_attn::ops {

void check_index_cpu(const Tensor heads, const Tensor block_indptr, const Tensor block_indices,
                     const std::optional<Tensor> block_bits_ids,
                     const std::optional<Tensor> block_bits, const Tensor column_indptr,
                     const Tensor column_indices, const std::optional<Tensor> column_bias,
                     int64_t block_m, int64_t block_n, int64_t seqlen_q, int64_t seqlen_k) {
  const IndexView index =
      index_view({heads, block_indptr, block_indices, block_bits_ids, block_bits, column_indptr,
                  column_indices, column_bias, block_m, block_n});
  STD_TORCH_CHECK(index.num_tiles == (seqlen_q + block_m - 1) / block_m,
                  "sparse_attn::check_index: indptr has ", index.num_tiles,
                  " query tiles, expected ", (seqlen_q + block_m - 1) / block_m);
  raise_fault("check_index", check_heads(index));
  for (int64_t b = 0; b < index.batch; ++b)
    for (int64_t h = 0; h < index.num_heads; ++h)
      for (int64_t t = 0; t < index.num_tiles; ++t)
        raise_fault("check_index", check_tile(index, b, h, t, seqlen_k));
}

std::string cpu_capability() {
  return cpu::kernels().name;
}

}  // namespace sparse_attn::ops
