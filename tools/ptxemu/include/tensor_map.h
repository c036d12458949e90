// SPDX-License-Identifier: Apache-2.0
// The simulator's own contents of a CUtensorMap: what TMA copies read.
#pragma once

#include <cstdint>
#include <string>

namespace ptxemu {

/// Values of CUtensorMapSwizzle.
enum class TensorSwizzle : std::uint8_t { kNone, k32B, k64B, k128B };

struct alignas(64) TensorMap {
  static constexpr std::uint32_t kMagic = 0x544d4150;
  std::uint32_t magic;
  std::uint8_t rank;
  std::uint8_t element_bytes;
  TensorSwizzle swizzle;
  std::uint8_t data_type;  // CUtensorMapDataType
  std::uint64_t address;
  std::uint64_t dims[5];     // elements, innermost first
  std::uint64_t strides[4];  // bytes, of dims[1] and up
  std::uint32_t box[5];      // elements
  std::uint32_t fill_nan;
  std::uint32_t reserved[4];
};
static_assert(sizeof(TensorMap) == 128);

/// The arguments of cuTensorMapEncodeTiled. Returns what is wrong with them, or "".
std::string encode_tiled(TensorMap* map, int data_type, std::uint32_t rank, void* address,
                         const std::uint64_t* dims, const std::uint64_t* strides,
                         const std::uint32_t* box, const std::uint32_t* element_strides,
                         int interleave, int swizzle, bool fill_nan);

}  // namespace ptxemu
