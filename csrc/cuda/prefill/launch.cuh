// SPDX-License-Identifier: Apache-2.0
// What an instantiation includes: the kernel of one head_dim and type, and its launch.
#pragma once

#include "kernel.cuh"
#include "launch.h"

namespace sparse_attn::cuda {

template <class Element, int kHeadDim>
cudaError_t launch_prefill(const PrefillParams& p, cudaStream_t stream) {
  if (p.tiles == 0) return cudaSuccess;
  using Config = PrefillConfig<Element, kHeadDim>;
  const auto kernel = prefill_kernel<Config>;
  constexpr int kBytes = sizeof(PrefillShared<Config>);
  cudaError_t error = seed_fault(stream);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error == cudaSuccess && host_fault(19)) error = cudaStreamSynchronize(stream);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(p.tiles), kPrefillThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace sparse_attn::cuda
