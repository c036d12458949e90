// SPDX-License-Identifier: Apache-2.0
// Decode attention on a stream: three kernels, no allocation, no synchronisation.
#pragma once

#include "config.h"

namespace sparse_attn::cuda {

// One head_dim and type; `p` is planned and placed. Defined by launch.cuh.
template <class Element, int kHeadDim>
cudaError_t launch_decode(const DecodeParams& p, cudaStream_t stream);

}  // namespace sparse_attn::cuda
