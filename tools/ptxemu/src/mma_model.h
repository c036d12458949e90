// SPDX-License-Identifier: Apache-2.0
// What mma and wgmma share: the formats of their inputs and the rounding of their results.
#pragma once

#include "types.h"

namespace ptxemu {

enum class Format : int { kF16, kBf16, kTf32 };

/// Element `e` of a register with packed inputs. The low 13 bits of a tf32 input do not count.
inline double read_element(u64 bits, int e, Format format) {
  switch (format) {
    case Format::kF16:
      return half_to_float(static_cast<u16>(bits >> (16 * e)));
    case Format::kBf16:
      return bfloat_to_float(static_cast<u16>(bits >> (16 * e)));
    default:
      return std::bit_cast<float>(static_cast<u32>(bits) & ~0x1fffu);
  }
}

inline u32 round_to_float(double sum) {
  return std::isnan(sum) ? 0x7fffffffu : std::bit_cast<u32>(static_cast<float>(sum));
}

inline u16 round_to_half(double sum) {
  return std::isnan(sum) ? 0x7fff : std::bit_cast<u16>(static_cast<_Float16>(sum));
}

}  // namespace ptxemu
