// SPDX-License-Identifier: Apache-2.0
#include "tensor_map.h"

#include <array>
#include <cstring>

namespace ptxemu {

std::string encode_tiled(TensorMap* map, int data_type, std::uint32_t rank, void* address,
                         const std::uint64_t* dims, const std::uint64_t* strides,
                         const std::uint32_t* box, const std::uint32_t* element_strides,
                         int interleave, int swizzle, bool fill_nan) {
  // CUtensorMapDataType: u8, u16, u32, i32, u64, i64, f16, f32, f64, bf16, f32.ftz, tf32, tf32.ftz
  static constexpr std::array<std::uint8_t, 13> kBytes{1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  if (data_type < 0 || data_type >= static_cast<int>(kBytes.size())) return "unknown data type";
  if (rank < 1 || rank > 5) return "rank must be 1 to 5";
  if (interleave != 0) return "interleaved layouts are not supported";
  if (swizzle < 0 || swizzle > 3) return "unknown swizzle";
  if (reinterpret_cast<std::uint64_t>(address) % 16 != 0) return "address is no multiple of 16";
  std::memset(static_cast<void*>(map), 0, sizeof *map);
  map->magic = TensorMap::kMagic;
  map->rank = static_cast<std::uint8_t>(rank);
  map->element_bytes = kBytes[data_type];
  map->swizzle = static_cast<TensorSwizzle>(swizzle);
  map->data_type = static_cast<std::uint8_t>(data_type);
  map->address = reinterpret_cast<std::uint64_t>(address);
  map->fill_nan = fill_nan;
  for (std::uint32_t d = 0; d < rank; ++d) {
    map->dims[d] = dims[d];
    map->box[d] = box[d];
    if (dims[d] == 0) return "a dimension is 0";
    if (box[d] == 0 || box[d] > 256) return "a box dimension is not 1 to 256";
    if (element_strides && element_strides[d] != 1) return "element strides are not supported";
    if (d + 1 == rank) break;
    map->strides[d] = strides[d];
    if (strides[d] % 16 != 0) return "a stride is no multiple of 16 bytes";
  }
  const std::uint32_t inner = box[0] * map->element_bytes;
  if (inner % 16 != 0) return "the box's inner dimension is no multiple of 16 bytes";
  if (swizzle != 0 && inner > (16u << swizzle))
    return "the box's inner dimension is wider than the swizzle";
  return "";
}

}  // namespace ptxemu
