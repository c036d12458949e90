// SPDX-License-Identifier: Apache-2.0
#include <type_traits>

#include "../../cuda/prefill/launch.h"
#include "kernels.h"

namespace sparse_attn::ops {

cudaError_t run_prefill(const cuda::DeviceCall& call, cudaStream_t stream) {
  cuda::PrefillParams p;
  static_cast<cuda::DeviceCall&>(p) = call;
  plan_prefill(p);
  return with_instantiation(call.call, [&](auto* element, auto dim) {
    using Element = std::remove_pointer_t<decltype(element)>;
    return cuda::launch_prefill<Element, dim()>(p, stream);
  });
}

}  // namespace sparse_attn::ops
