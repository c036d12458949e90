// SPDX-License-Identifier: Apache-2.0
// cp.async.bulk.tensor, tiled mode (PTX ISA, "cp.async.bulk.tensor", "Tensor tiled mode",
// "Swizzling modes").
#include "bulk_copy.h"
#include "tensor_map.h"

namespace ptxemu {
namespace {

/// n[0]: rank; n[1]: multicast; n[2]: reduction, or -1
const TensorMap& tensor_map(Step& s, std::size_t operand, int lane) {
  const Instruction& i = s.instruction;
  const u64 address = s.address(operand, lane);
  if (address % 64 != 0) s.fail("misaligned", "the tensor map is no multiple of 64 bytes", lane);
  const Step::Place place = s.resolve(Space::kGeneric, address, 64, false, lane);
  s.resolve(Space::kGeneric, address + 64, 64, false, lane);
  const auto* map = reinterpret_cast<const TensorMap*>(place.data);
  if (map->magic != TensorMap::kMagic)
    s.fail("bounds", "no tensor map is there (encode it with cuTensorMapEncodeTiled)", lane);
  if (map->rank != i.n[0])
    s.fail("bounds",
           "a tensor map of rank " + std::to_string(map->rank) + " in a copy of rank " +
               std::to_string(i.n[0]),
           lane);
  return *map;
}

/// The address bits above the 16-byte chunk that are XORed into it.
u32 swizzled(u32 address, TensorSwizzle swizzle) {
  const u32 mask = (1u << static_cast<int>(swizzle)) - 1;
  return address ^ (address >> 7 & mask) << 4;
}

/// Calls f(global address or 0, shared address, bytes) for the pieces of a box; 0 where the box
/// reaches out of the tensor.
template <class F>
void for_pieces(const TensorMap& map, const std::array<i64, 5>& start, u32 shared, F&& f) {
  std::array<u32, 5> at{};
  const u32 size = map.element_bytes, per_chunk = 16 / size;
  u32 offset = shared;
  for (;;) {
    bool inside = true;
    u64 row = map.address;
    for (int d = 1; d < map.rank; ++d) {
      const i64 coordinate = start[d] + at[d];
      inside &= coordinate >= 0 && coordinate < static_cast<i64>(map.dims[d]);
      row += static_cast<u64>(coordinate) * map.strides[d - 1];
    }
    for (u32 x = 0; x < map.box[0]; x += per_chunk, offset += 16) {
      const i64 first = start[0] + x;
      const u32 target = swizzled(offset, map.swizzle);
      if (inside && first >= 0 && first + per_chunk <= static_cast<i64>(map.dims[0])) {
        f(row + static_cast<u64>(first) * size, target, 16u);
        continue;
      }
      for (u32 e = 0; e < per_chunk; ++e) {
        const i64 element = first + e;
        const bool valid = inside && element >= 0 && element < static_cast<i64>(map.dims[0]);
        f(valid ? row + static_cast<u64>(element) * size : 0, target + e * size, size);
      }
    }
    int d = 1;
    while (d < map.rank && ++at[d] == map.box[d]) at[d++] = 0;
    if (d >= map.rank) return;
  }
}

std::array<i64, 5> coordinates(Step& s, const Operand& address, int lane) {
  std::array<i64, 5> result{};
  const auto& elements = address.elements.at(0).elements;
  for (std::size_t d = 0; d < elements.size() && d < result.size(); ++d)
    result[d] = static_cast<i32>(s.in(elements[d])[lane]);
  return result;
}

u32 box_bytes(const TensorMap& map) {
  u32 bytes = map.element_bytes;
  for (int d = 0; d < map.rank; ++d) bytes *= map.box[d];
  return bytes;
}

/// Of the box in shared memory.
constexpr u32 kBoxAlignment = 128;

// cp.async.bulk.tensor.Nd.shared.global.mbarrier [dst], [map, {coordinates}], [mbar] [, mask]
void tensor_to_shared(Step& s) {
  const Instruction& i = s.instruction;
  s.each([&](int l) {
    const TensorMap& map = tensor_map(s, 1, l);
    const Step::Place barrier = barrier_place(s, 2, l);
    const Step::Place to = s.shared(s.address(std::size_t{0}, l) & (kSharedWindow - 1),
                                    box_bytes(map), true, l, kBoxAlignment);
    if (map.fill_nan) s.fail("unsupported", "tensor maps that fill with NaN", l);
    BulkTransfer transfer;
    for_pieces(map, coordinates(s, s.operand(1), l), static_cast<u32>(to.address),
               [&](u64 source, u32 target, u32 bytes) {
                 if (source != 0) s.resolve(Space::kGlobal, source, bytes, false, l);
                 transfer.pieces.push_back({source, target, bytes, nullptr});
               });
    transfer.bytes = box_bytes(map);
    for (Cta* target : multicast_targets(s, to.cta, i.n[1] != 0, 3, l)) {
      BulkTransfer one = transfer;
      one.cta = target;
      one.barrier_cta = i.n[1] ? target : barrier.cta;
      one.barrier = static_cast<u32>(barrier.address);
      issue(s, std::move(one), l);
    }
  });
}

Type element_type(const TensorMap& map) {
  static constexpr std::array<Type, 13> kTypes{
      Type::kU8,  Type::kU16, Type::kU32,  Type::kS32, Type::kU64, Type::kS64, Type::kF16,
      Type::kF32, Type::kF64, Type::kBf16, Type::kF32, Type::kF32, Type::kF32};
  return kTypes.at(map.data_type);
}

// cp[.reduce].async.bulk.tensor.Nd.global.shared::cta.bulk_group [map, {coordinates}], [src]
void tensor_to_global(Step& s) {
  const Instruction& i = s.instruction;
  s.machine.progress++;
  s.each([&](int l) {
    const TensorMap& map = tensor_map(s, 0, l);
    const Step::Place from =
        s.shared(s.address(1, l) & (kSharedWindow - 1), box_bytes(map), false, l, kBoxAlignment);
    Actor actor = group_actor(s, l);
    s.record(from, box_bytes(map), actor, false, l);
    actor.strong = i.n[2] >= 0;
    for_pieces(map, coordinates(s, s.operand(0), l), static_cast<u32>(from.address),
               [&](u64 target, u32 source, u32 bytes) {
                 if (target == 0) return;
                 const Step::Place to = s.resolve(Space::kGlobal, target, bytes, true, l);
                 s.record(to, bytes, actor, true, l);
                 store_elements(to.data, from.cta->shared.data() + source, bytes, i.n[2],
                                element_type(map));
               });
  });
}

}  // namespace

Handler decode_tensor_copy(Instruction& i, Modifiers& m) {
  i.n[0] = 1 + m.choice({"1d", "2d", "3d", "4d", "5d"});
  m.flag("tile");
  i.n[1] = m.flag("multicast::cluster");
  if (i.n[0] == 0) return nullptr;
  if (m.flag("mbarrier::complete_tx::bytes")) {
    if (i.n[2] >= 0 || !m.flag("global")) return nullptr;
    m.ignore({"shared::cluster", "shared::cta"});
    return tensor_to_shared;
  }
  const bool store = m.flag("bulk_group") && m.flag("global");
  m.flag("shared::cta");
  return store ? tensor_to_global : nullptr;
}

}  // namespace ptxemu
