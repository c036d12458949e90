// SPDX-License-Identifier: Apache-2.0
// Written by tools/cuda/instantiate.py.
#include "../launch.cuh"

namespace sparse_attn::cuda {

template cudaError_t launch_decode<cutlass::bfloat16_t, 64>(const DecodeParams&, cudaStream_t);

}  // namespace sparse_attn::cuda
