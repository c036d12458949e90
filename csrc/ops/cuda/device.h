// SPDX-License-Identifier: Apache-2.0
// What the operators of the CUDA module have in common.
#pragma once

#include <cuda_runtime.h>

#include <optional>

#include <torch/csrc/stable/accelerator.h>

#include "../../cuda/common/call.h"
#include "../common.h"

namespace sparse_attn::ops {

// While it lives, launches go to the device of a tensor; `stream` is torch's current one there.
class Device {
 public:
  explicit Device(const Tensor& like);
  cudaStream_t stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
};

// The tensor itself if kernels can copy its rows 16 bytes at a time, else a contiguous copy.
Tensor aligned_rows(const Tensor& x);

// All that a kernel is told of a call, checked against the shapes: values are the kernels' to
// bound.
cuda::DeviceCall device_call(const AttentionArgs& args);

void raise_cuda(const char* op, cudaError_t error);

}  // namespace sparse_attn::ops
