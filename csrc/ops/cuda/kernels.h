// SPDX-License-Identifier: Apache-2.0
// From a call to the kernel that is instantiated for its type and head dims.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../../cuda/common/call.h"
#include "../../cuda/decode/config.h"
#include "../common.h"

namespace cutlass {
struct bfloat16_t;
struct half_t;
}  // namespace cutlass

namespace sparse_attn::ops {

// Calls run(element, dim) with a null pointer of the element type and the smallest instantiated
// head_dim that holds those of q and v, as a std::integral_constant.
template <class Run>
cudaError_t with_instantiation([[maybe_unused]] const AttentionParams& p, Run run) {
#ifdef SPARSE_ATTN_ONLY_BF16  // test builds that have no other
  return run(static_cast<cutlass::bfloat16_t*>(nullptr),
             std::integral_constant<int, SPARSE_ATTN_ONLY_BF16>{});
#else
  const int32_t dim = std::max(p.head_dim, p.head_dim_v);
  const auto with_dim = [&](auto* element) {
    if (dim <= 64) return run(element, std::integral_constant<int, 64>{});
    if (dim <= 96) return run(element, std::integral_constant<int, 96>{});
    if (dim <= 128) return run(element, std::integral_constant<int, 128>{});
    return run(element, std::integral_constant<int, 256>{});
  };
  if (p.dtype == DType::kFloat16) return with_dim(static_cast<cutlass::half_t*>(nullptr));
  return with_dim(static_cast<cutlass::bfloat16_t*>(nullptr));
#endif
}

// For sequences of at most cuda::kDecodeMaxRows rows; the workspace is of `like`'s device.
cudaError_t run_decode(const cuda::DeviceCall& call, const Tensor& like, cudaStream_t stream);
cudaError_t run_prefill(const cuda::DeviceCall& call, cudaStream_t stream);

}  // namespace sparse_attn::ops
