// SPDX-License-Identifier: Apache-2.0
// What an instantiation includes: the kernels of one head_dim and type, and their launch.
#pragma once

#include "launch.h"
#include "merge.cuh"

namespace sparse_attn::cuda {

template <class C>
cudaError_t launch_tiles(const DecodeParams& p, cudaStream_t stream) {
  const auto kernel = decode_kernel<C>;
  constexpr int kBytes = sizeof(DecodeShared<C>);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<p.ctas, kDecodeThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}

template <class Element, int kHeadDim>
cudaError_t launch_decode(const DecodeParams& p, cudaStream_t stream) {
  if (p.tiles == 0) return cudaSuccess;
  cudaError_t error = seed_fault(stream);
  if (error != cudaSuccess) return error;
  decode_plan<kPlanThreads><<<1, kPlanThreads, 0, stream>>>(p);
  error = cudaGetLastError();
  int64_t chunks = 0;
  if (error == cudaSuccess && host_fault(20))
    error = cudaMemcpy(&chunks, p.first_chunk + p.tiles, sizeof chunks, cudaMemcpyDeviceToHost);
  if (error == cudaSuccess)
    error = p.tile_rows == 16 ? launch_tiles<DecodeConfig<Element, kHeadDim, 16>>(p, stream)
                              : launch_tiles<DecodeConfig<Element, kHeadDim, 64>>(p, stream);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(p.tiles), p.tile_rows / (kMergeThreads / 32));
  decode_merge<Element><<<grid, kMergeThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace sparse_attn::cuda
