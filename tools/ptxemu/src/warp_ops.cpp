// SPDX-License-Identifier: Apache-2.0
// Exchange between the lanes of a warp (PTX ISA, "shfl.sync", "vote.sync", "match.sync",
// "redux.sync", "activemask", "elect.sync"). None of these orders memory.
#include <algorithm>

#include "decode.h"

namespace ptxemu {
namespace {

u32 mask_operand(Step& s, std::size_t operand) {
  const u64* row = s.in(operand);
  const u32 first = static_cast<u32>(row[s.first_lane()]);
  s.each([&](int l) {
    if (!(static_cast<u32>(row[l]) >> l & 1))
      s.fail("barrier",
             "a lane executes " + s.instruction.parts[0] + " whose membermask does not name it", l);
  });
  return first;
}

// shfl.sync.MODE.b32 d[|p], a, b, c, membermask; n[0]: mode, n[1]: with p
void shuffle(Step& s) {
  const Instruction& i = s.instruction;
  const std::size_t a = i.n[1] ? 2 : 1;
  const u32 members = mask_operand(s, a + 3);
  if (!s.converge(members)) return;
  std::array<u64, kWarpSize> values;
  std::copy_n(s.in(a), kWarpSize, values.begin());
  const u64 *shift = s.in(a + 1), *clamp = s.in(a + 2);
  u64* d = s.out(std::size_t{0});
  u64* p = i.n[1] ? s.out(1) : nullptr;
  std::array<u64, kWarpSize> result{};
  std::array<bool, kWarpSize> inside{};
  s.each([&](int l) {
    const int b = static_cast<int>(shift[l] & 31);
    const int segment = static_cast<int>(clamp[l] >> 8 & 31), c = static_cast<int>(clamp[l] & 31);
    const int low = l & segment, high = low | (c & ~segment);
    int source = l;
    bool in_range = false;
    switch (i.n[0]) {
      case 0:  // up
        source = l - b;
        in_range = source >= high;
        break;
      case 1:  // down
        source = l + b;
        in_range = source <= high;
        break;
      case 2:  // bfly
        source = l ^ b;
        in_range = source <= high;
        break;
      default:  // idx
        source = low | (b & ~segment);
        in_range = source <= high;
    }
    if (!in_range) source = l;
    if (!(s.mask >> source & 1))
      s.fail("barrier",
             "shfl.sync reads lane " + std::to_string(source) + ", which does not take part", l);
    result[l] = zero_extend(values[source], 4);
    inside[l] = in_range;
  });
  s.each([&](int l) {
    d[l] = result[l];
    if (p) p[l] = inside[l];
  });
}

// vote.sync.MODE d, [!]p, membermask
void vote(Step& s) {
  const u32 members = mask_operand(s, 2);
  if (!s.converge(members)) return;
  u32 ballot = 0;
  s.each([&](int l) { ballot |= u32{s.predicate(s.operand(1), l)} << l; });
  u64 value = ballot;
  if (s.instruction.n[0] == 1) value = ballot == s.mask;
  if (s.instruction.n[0] == 2) value = ballot != 0;
  if (s.instruction.n[0] == 3) value = ballot == s.mask || ballot == 0;
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) { d[l] = value; });
}

// match.{any,all}.sync.TYPE d[|p], a, membermask
void match(Step& s) {
  const Instruction& i = s.instruction;
  const bool all = i.n[0] == 1, two = i.operands.size() == 4;
  const std::size_t a = two ? 2 : 1;
  if (!s.converge(mask_operand(s, a + 1))) return;
  std::array<u64, kWarpSize> value;
  std::copy_n(s.in(a), kWarpSize, value.begin());
  for (u64& v : value) v = zero_extend(v, size_of(i.type));
  u64* d = s.out(std::size_t{0});
  u64* p = two ? s.out(1) : nullptr;
  s.each([&](int l) {
    u32 same = 0;
    s.each([&](int other) { same |= u32{value[other] == value[l]} << other; });
    d[l] = all ? (same == s.mask ? s.mask : 0) : same;
    if (p) p[l] = same == s.mask;
  });
}

// redux.sync.OP.TYPE d, a, membermask
void reduce(Step& s) {
  const Instruction& i = s.instruction;
  if (!s.converge(mask_operand(s, 2))) return;
  const u64* a = s.in(1);
  u32 result = static_cast<u32>(a[s.first_lane()]);
  const bool negative = is_signed(i.type);
  for (u32 rest = s.mask & (s.mask - 1); rest != 0; rest &= rest - 1) {
    const u32 value = static_cast<u32>(a[std::countr_zero(rest)]);
    const bool is_less =
        negative ? static_cast<i32>(value) < static_cast<i32>(result) : value < result;
    switch (i.n[0]) {
      case 0:
        result += value;
        break;
      case 1:
        result = is_less ? value : result;
        break;
      case 2:
        result = is_less ? result : value;
        break;
      case 3:
        result &= value;
        break;
      case 4:
        result |= value;
        break;
      default:
        result ^= value;
    }
  }
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) { d[l] = result; });
}

void active_mask(Step& s) {
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) { d[l] = s.mask; });
}

// elect.sync d|p, membermask: the lowest member is elected
void elect(Step& s) {
  if (!s.converge(mask_operand(s, 2))) return;
  const int leader = s.first_lane();
  u64 *d = s.out(std::size_t{0}), *p = s.out(1);
  s.each([&](int l) {
    d[l] = static_cast<u64>(leader);
    p[l] = l == leader;
  });
}

}  // namespace

Handler decode_warp(Instruction& i, Modifiers& m) {
  const std::string& name = i.parts[0];
  if (name == "activemask") {
    i.type = m.type();
    return active_mask;
  }
  if (!m.flag("sync")) return nullptr;
  if (name == "shfl") {
    i.n[0] = m.choice({"up", "down", "bfly", "idx"});
    i.n[1] = i.operands.size() == 6;
    i.type = m.type();
    return i.n[0] >= 0 && i.operands.size() >= 5 ? shuffle : nullptr;
  }
  if (name == "vote") {
    i.n[0] = m.choice({"ballot", "all", "any", "uni"});
    i.type = m.type();
    return i.n[0] >= 0 ? vote : nullptr;
  }
  if (name == "match") {
    i.n[0] = m.choice({"any", "all"});
    i.type = m.type();
    return i.n[0] >= 0 ? match : nullptr;
  }
  if (name == "redux") {
    i.n[0] = m.choice({"add", "min", "max", "and", "or", "xor"});
    i.type = m.type();
    return i.n[0] >= 0 && i.type != Type::kF32 ? reduce : nullptr;
  }
  return i.operands.size() == 3 ? elect : nullptr;
}

}  // namespace ptxemu
