// SPDX-License-Identifier: Apache-2.0
// What the CUDA module registers when it is loaded: kernels for schemas of registration.cpp. Built
// for the simulator it has the schemas in a namespace of its own, and CPU tensors are its memory.
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "schemas.h"

using torch::stable::Tensor;

namespace sparse_attn::ops {

using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> attention_cuda(const Tensor, const Tensor, const Tensor, const Tensor,
                                          const Tensor, const Tensor, const OptionalTensor,
                                          const OptionalTensor, const Tensor, const Tensor,
                                          const OptionalTensor, int64_t, int64_t,
                                          const OptionalTensor, int64_t, bool, double, double,
                                          const OptionalTensor, const OptionalTensor);

}  // namespace sparse_attn::ops

#ifdef SPARSE_ATTN_EMULATED
STABLE_TORCH_LIBRARY(sparse_attn_emulated, m) {
  m.def(ATTENTION_SCHEMA);
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CUDA, m) {
#endif
  m.impl("attention", TORCH_BOX(&sparse_attn::ops::attention_cuda));
}
