// SPDX-License-Identifier: Apache-2.0
// mov, cvta, isspacep, mapa, getctarank: values and addresses from one place to another (PTX ISA,
// "Data Movement and Conversion Instructions").
#include "lanes.h"

namespace ptxemu {
namespace {

void move(Step& s) {
  const u64* a = s.in(1);
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) { d[l] = a[l]; });
}

void move_predicate(Step& s) {
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) { d[l] = s.predicate(s.operand(1), l); });
}

// mov.b64 d, {a, b}: packs, the first element lowest
void pack(Step& s) {
  const auto& elements = s.operand(1).elements;
  const u32 bytes = size_of(s.instruction.type) / static_cast<u32>(elements.size());
  std::array<u64, kWarpSize> packed{};
  for (std::size_t e = 0; e < elements.size(); ++e) {
    const u64* a = s.in(elements[e]);
    s.each([&](int l) { packed[l] |= zero_extend(a[l], bytes) << (8 * bytes * e); });
  }
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) { d[l] = packed[l]; });
}

void unpack(Step& s) {
  const auto& elements = s.operand(0).elements;
  const u32 bytes = size_of(s.instruction.type) / static_cast<u32>(elements.size());
  std::array<u64, kWarpSize> whole{};
  const u64* a = s.in(1);
  s.each([&](int l) { whole[l] = a[l]; });
  for (std::size_t e = 0; e < elements.size(); ++e) {
    u64* d = s.out(elements[e]);
    s.each([&](int l) { d[l] = zero_extend(whole[l] >> (8 * bytes * e), bytes); });
  }
}

u64 window_of(Space space) {
  switch (space) {
    case Space::kShared:
      return kSharedWindow;
    case Space::kLocal:
      return kLocalWindow;
    case Space::kParam:
      return kParamWindow;
    default:
      return 0;
  }
}

// cvta.SPACE: from the space's own addresses to generic ones; cvta.to.SPACE: back
void convert_address(Step& s) {
  const u64* a = s.in(1);
  u64* d = s.out(std::size_t{0});
  const u64 window = window_of(s.instruction.space);
  const bool to = s.instruction.n[0] != 0;
  s.each([&](int l) {
    if (window == 0)
      d[l] = a[l];
    else
      d[l] = to ? a[l] & (window - 1) : a[l] | window;
  });
}

void is_space(Step& s) {
  const u64* a = s.in(1);
  u64* d = s.out(std::size_t{0});
  const Space space = s.instruction.space;
  const u64 all = kSharedWindow | kLocalWindow | kParamWindow | kFunctionWindow;
  s.each([&](int l) {
    bool inside = (a[l] & all) == window_of(space);
    if (space == Space::kShared && inside && s.instruction.n[0] == 0) {
      const u64 rank = (a[l] & (kSharedWindow - 1)) >> kRankShift;
      inside = rank == 0 || rank == s.cta.rank + 1;  // shared::cta
    }
    d[l] = inside;
  });
}

// mapa d, address, rank: the same place in the shared memory of another CTA of the cluster
void map_address(Step& s) {
  const u64 *a = s.in(1), *b = s.in(2);
  u64* d = s.out(std::size_t{0});
  const u64 size = s.cta.cluster->ctas.size();
  s.each([&](int l) {
    const u64 rank = b[l] & 0xffffffffu;
    if (rank >= size)
      s.fail("bounds",
             "mapa: rank " + std::to_string(rank) + " in a cluster of " + std::to_string(size) +
                 " CTAs",
             l);
    const u64 ranks = ((u64{1} << 32) - 1) & ~((u64{1} << kRankShift) - 1);
    d[l] = (a[l] & ~ranks) | (rank + 1) << kRankShift;
  });
}

void cta_rank(Step& s) {
  const u64* a = s.in(1);
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) {
    const u64 rank = (a[l] & 0xffffffffu) >> kRankShift;
    d[l] = rank == 0 ? s.cta.rank : rank - 1;
  });
}

}  // namespace

Handler decode_move(Instruction& i, Modifiers& m) {
  const std::string& name = i.parts[0];
  if (name == "mov") {
    i.type = m.type();
    if (i.operands.size() != 2 || i.type == Type::kNone || i.type == Type::kB128) return nullptr;
    if (i.operands[1].kind == OperandKind::kVector) return pack;
    if (i.operands[0].kind == OperandKind::kVector) return unpack;
    return i.type == Type::kPred ? move_predicate : move;
  }
  if (name == "isspacep") {
    i.n[0] = i.has("shared::cluster");
    i.space = m.space();
    return is_space;
  }
  i.n[0] = m.flag("to");
  i.space = m.space();
  i.type = m.type();
  if (name == "cvta") return convert_address;
  if (name == "mapa") return map_address;
  return cta_rank;
}

}  // namespace ptxemu
