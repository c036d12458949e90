// SPDX-License-Identifier: Apache-2.0
// Prefill attention on a stream: one kernel, no allocation, no synchronisation.
#pragma once

#include "config.h"

namespace sparse_attn::cuda {

// One head_dim and type; `p` is planned. Defined by launch.cuh.
template <class Element, int kHeadDim>
cudaError_t launch_prefill(const PrefillParams& p, cudaStream_t stream);

}  // namespace sparse_attn::cuda
