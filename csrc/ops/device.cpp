// SPDX-License-Identifier: Apache-2.0
#include "common.h"

namespace sparse_attn::ops {

bool on_device(const Tensor& x) {
  return x.is_cpu();
}

const char* const kDevice = "on the CPU";

}  // namespace sparse_attn::ops
