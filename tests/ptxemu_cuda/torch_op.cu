// SPDX-License-Identifier: Apache-2.0
// A torch operator on the stable ABI with a real launcher, registered for CPU tensors, which the
// stand-in for libcudart takes for device memory.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

using torch::stable::Tensor;

constexpr int kThreads = 128;

template <class T>
__global__ void row_sums(const T* x, float* out, int columns, int row_stride) {
  __shared__ float partial[kThreads / 32];
  float sum = 0;
  for (int c = threadIdx.x; c < columns; c += kThreads)
    sum += float(x[blockIdx.x * row_stride + c]);
  for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kThreads / 32; ++w) sum += partial[w];
  out[blockIdx.x] = sum;
}

// `slack` columns too many are read, to show what happens then
Tensor sums(const Tensor x, int64_t slack) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have two dimensions");
  Tensor out = torch::stable::new_empty(x, {x.size(0)}, torch::headeronly::ScalarType::Float);
  const int rows = x.size(0), columns = x.size(1) + slack, stride = x.stride(0);
  auto* result = static_cast<float*>(out.mutable_data_ptr());
  if (x.scalar_type() == torch::headeronly::ScalarType::BFloat16)
    row_sums<<<rows, kThreads>>>(static_cast<const __nv_bfloat16*>(x.const_data_ptr()), result,
                                 columns, stride);
  else
    row_sums<<<rows, kThreads>>>(static_cast<const float*>(x.const_data_ptr()), result, columns,
                                 stride);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "row_sums: ", cudaGetErrorString(error));
  return out;
}

STABLE_TORCH_LIBRARY(ptxemu_test, m) {
  m.def("sums(Tensor x, int slack=0) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(ptxemu_test, CPU, m) {
  m.impl("sums", TORCH_BOX(&sums));
}
