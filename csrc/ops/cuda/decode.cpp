// SPDX-License-Identifier: Apache-2.0
#include <type_traits>

#include "../../cuda/decode/launch.h"
#include "kernels.h"

namespace sparse_attn::ops {

cudaError_t run_decode(const cuda::DeviceCall& call, const Tensor& like, cudaStream_t stream) {
  cuda::DecodeParams p;
  static_cast<cuda::DeviceCall&>(p) = call;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int64_t bytes = plan_decode(p, multiprocessors);
  const int64_t sizes[] = {bytes / int64_t{sizeof(float)} + 1};
  Tensor workspace = empty_dense(like, sizes, {0}, ScalarType::Float);
  place_decode(p, workspace.mutable_data_ptr());
  return with_instantiation(call.call, [&](auto* element, auto dim) {
    using Element = std::remove_pointer_t<decltype(element)>;
    return cuda::launch_decode<Element, dim()>(p, stream);
  });
}

}  // namespace sparse_attn::ops
