// SPDX-License-Identifier: Apache-2.0
// setp, set, selp, slct (PTX ISA, "Comparison and Selection Instructions").
#include "lanes.h"

namespace ptxemu {
namespace {

enum Comparison {
  kEq,
  kNe,
  kLt,
  kLe,
  kGt,
  kGe,
  kLo,
  kLs,
  kHi,
  kHs,
  kEqu,
  kNeu,
  kLtu,
  kLeu,
  kGtu,
  kGeu,
  kNum,
  kNan,
};

template <class T>
bool compare(int comparison, T a, T b) {
  bool unordered = false;
  if constexpr (std::is_floating_point_v<T>) unordered = std::isnan(a) || std::isnan(b);
  switch (comparison) {
    case kEq:
      return a == b;
    case kNe:
      return !unordered && a != b;
    case kLt:
    case kLo:
      return a < b;
    case kLe:
    case kLs:
      return a <= b;
    case kGt:
    case kHi:
      return a > b;
    case kGe:
    case kHs:
      return a >= b;
    case kEqu:
      return unordered || a == b;
    case kNeu:
      return unordered || a != b;
    case kLtu:
      return unordered || a < b;
    case kLeu:
      return unordered || a <= b;
    case kGtu:
      return unordered || a > b;
    case kGeu:
      return unordered || a >= b;
    case kNum:
      return !unordered;
    default:
      return unordered;
  }
}

/// Compares operand 1 with operand 2 of setp or set, as the type says.
u32 comparison_mask(Step& s, std::size_t first) {
  const Instruction& i = s.instruction;
  const u64 *a = s.in(first), *b = s.in(first + 1);
  const int op = i.n[0];
  u32 result = 0;
  const auto run = [&]<class T>(T) {
    s.each([&](int l) {
      T x = from_bits<T>(a[l]), y = from_bits<T>(b[l]);
      if constexpr (std::is_same_v<T, float>)
        if (i.ftz) x = flush_subnormal(x), y = flush_subnormal(y);
      if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, Bfloat>)
        result |= u32{compare<float>(op, x, y)} << l;
      else
        result |= u32{compare<T>(op, x, y)} << l;
    });
  };
  const bool unsigned_op = op >= kLo && op <= kHs;
  switch (i.type) {
    case Type::kF32:
      run(float{});
      break;
    case Type::kF64:
      run(double{});
      break;
    case Type::kF16:
      run(Half{});
      break;
    case Type::kBf16:
      run(Bfloat{});
      break;
    case Type::kS16:
      unsigned_op ? run(u16{}) : run(i16{});
      break;
    case Type::kS32:
      unsigned_op ? run(u32{}) : run(i32{});
      break;
    case Type::kS64:
      unsigned_op ? run(u64{}) : run(i64{});
      break;
    case Type::kB16:
    case Type::kU16:
      run(u16{});
      break;
    case Type::kB64:
    case Type::kU64:
      run(u64{});
      break;
    default:
      run(u32{});
  }
  return result;
}

bool combine(int operation, bool value, bool with) {
  switch (operation) {
    case 0:
      return value && with;
    case 1:
      return value || with;
    case 2:
      return value != with;
    default:
      return value;
  }
}

// setp.CMP[.BOOL].TYPE p[|q], a, b[, c]: p = (a CMP b) BOOL c, q = !(a CMP b)
// BOOL c
void set_predicate(Step& s) {
  const Instruction& i = s.instruction;
  const bool two = i.n[2] != 0;
  const std::size_t first = two ? 2 : 1;
  const u32 compared = comparison_mask(s, first);
  u64* p = s.out(std::size_t{0});
  u64* q = two ? s.out(1) : nullptr;
  s.each([&](int l) {
    const bool value = compared >> l & 1;
    const bool with = i.n[1] >= 0 && s.predicate(i.operands[first + 2], l);
    if (two) q[l] = combine(i.n[1], !value, with);
    p[l] = combine(i.n[1], value, with);
  });
}

// set.CMP[.BOOL].DTYPE.STYPE d, a, b[, c]: all ones or 1.0f for true
void set_value(Step& s) {
  const Instruction& i = s.instruction;
  const u32 compared = comparison_mask(s, 1);
  const u64 yes = i.type2 == Type::kF32 ? std::bit_cast<u32>(1.0f) : 0xffffffffu;
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) {
    const bool with = i.n[1] >= 0 && s.predicate(i.operands[3], l);
    d[l] = combine(i.n[1], compared >> l & 1, with) ? yes : 0;
  });
}

void select(Step& s) {
  const u64 *a = s.in(1), *b = s.in(2);
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) { d[l] = s.predicate(s.operand(3), l) ? a[l] : b[l]; });
}

// slct.DTYPE.CTYPE d, a, b, c: a if c >= 0
void select_by_sign(Step& s) {
  const u64 *a = s.in(1), *b = s.in(2), *c = s.in(3);
  u64* d = s.out(std::size_t{0});
  const bool integer = s.instruction.type2 == Type::kS32;
  s.each([&](int l) {
    float value = from_bits<float>(c[l]);
    if (s.instruction.ftz) value = flush_subnormal(value);
    d[l] = (integer ? from_bits<i32>(c[l]) >= 0 : value >= 0) ? a[l] : b[l];
  });
}

}  // namespace

Handler decode_compare(Instruction& i, Modifiers& m) {
  const std::string& name = i.parts[0];
  i.ftz = m.flag("ftz");
  if (name == "selp") {
    i.type = m.type();
    return select;
  }
  if (name == "slct") {
    i.type = m.type();
    i.type2 = m.type();
    return i.type2 == Type::kS32 || i.type2 == Type::kF32 ? select_by_sign : nullptr;
  }
  i.n[0] = m.choice({"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu",
                     "ltu", "leu", "gtu", "geu", "num", "nan"});
  i.n[1] = m.choice({"and", "or", "xor"});
  if (name == "set") i.type2 = m.type();
  i.type = m.type();
  if (i.n[0] < 0 || size_of(i.type) < 2 || i.type == Type::kF16x2 || i.type == Type::kBf16x2)
    return nullptr;
  if (name == "set" && i.operands.size() != (i.n[1] >= 0 ? 4u : 3u)) return nullptr;
  if (name == "set")
    return i.type2 == Type::kU32 || i.type2 == Type::kS32 || i.type2 == Type::kF32 ? set_value
                                                                                   : nullptr;
  if (i.n[1] >= 0 && i.operands.size() < 4) return nullptr;
  i.n[2] = i.operands.size() == (i.n[1] >= 0 ? 5u : 4u);
  return set_predicate;
}

}  // namespace ptxemu
