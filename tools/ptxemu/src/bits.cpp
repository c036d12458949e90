// SPDX-License-Identifier: Apache-2.0
// Logic, shifts and bit fields (PTX ISA, "Logic and Shift Instructions", and the bit instructions
// of "Integer Arithmetic Instructions").
#include <algorithm>

#include "lanes.h"

namespace ptxemu {
namespace {

constexpr auto kAnd = []<class T>(T a, T b) { return static_cast<T>(a & b); };
constexpr auto kOr = []<class T>(T a, T b) { return static_cast<T>(a | b); };
constexpr auto kXor = []<class T>(T a, T b) { return static_cast<T>(a ^ b); };
constexpr auto kNot = []<class T>(T a) { return static_cast<T>(~a); };
constexpr auto kCnot = []<class T>(T a) { return static_cast<T>(a == 0); };
constexpr auto kPopc = []<class T>(T a) { return static_cast<u32>(std::popcount(a)); };
constexpr auto kClz = []<class T>(T a) { return static_cast<u32>(std::countl_zero(a)); };
constexpr auto kBrev = []<class T>(T a) {
  T reversed = 0;
  for (unsigned bit = 0; bit < 8 * sizeof(T); ++bit)
    reversed |= static_cast<T>((a >> bit & 1) << (8 * sizeof(T) - 1 - bit));
  return reversed;
};

// Predicates may be negated operands, and are one bit.
template <auto F>
void logic_predicate(Step& s) {
  u64* d = s.out(std::size_t{0});
  s.each(
      [&](int l) { d[l] = F(s.predicate(s.operand(1), l), s.predicate(s.operand(2), l)) ? 1 : 0; });
}
void not_predicate(Step& s) {
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) { d[l] = s.predicate(s.operand(1), l) ? 0 : 1; });
}

// The amount is a u32 whatever the type; amounts beyond the width shift everything out.
template <class T, bool kLeft>
void shift(Step& s) {
  const u64 *a = s.in(1), *b = s.in(2);
  u64* d = s.out(std::size_t{0});
  constexpr u32 kBits = 8 * sizeof(T);
  s.each([&](int l) {
    const u32 amount = static_cast<u32>(b[l]);
    const T value = from_bits<T>(a[l]);
    if constexpr (kLeft)
      d[l] = amount >= kBits ? 0 : to_bits(static_cast<T>(u64(value) << amount));
    else if constexpr (std::is_signed_v<T>)
      d[l] = to_bits(static_cast<T>(value >> std::min(amount, kBits - 1)));
    else
      d[l] = amount >= kBits ? 0 : to_bits(static_cast<T>(value >> amount));
  });
}

Handler decode_shift(Instruction& i, bool left) {
  switch (i.type) {
    case Type::kB16:
    case Type::kU16:
      return left ? shift<u16, true> : shift<u16, false>;
    case Type::kB32:
    case Type::kU32:
      return left ? shift<u32, true> : shift<u32, false>;
    case Type::kB64:
    case Type::kU64:
      return left ? shift<u64, true> : shift<u64, false>;
    case Type::kS16:
      return left ? nullptr : shift<i16, false>;
    case Type::kS32:
      return left ? nullptr : shift<i32, false>;
    case Type::kS64:
      return left ? nullptr : shift<i64, false>;
    default:
      return nullptr;
  }
}

// shf.{l,r}.{wrap,clamp}.b32 d, low, high, amount
void funnel_shift(Step& s) {
  const u64 *low = s.in(1), *high = s.in(2), *c = s.in(3);
  u64* d = s.out(std::size_t{0});
  const bool left = s.instruction.n[0] == 0, wrap = s.instruction.n[1] == 0;
  s.each([&](int l) {
    const u64 both = high[l] << 32 | (low[l] & 0xffffffffu);
    const u32 amount = wrap ? c[l] & 31 : std::min<u32>(static_cast<u32>(c[l]), 32);
    d[l] = static_cast<u32>(left ? (both << amount) >> 32 : both >> amount);
  });
}

void lop3(Step& s) {
  const u64 *a = s.in(1), *b = s.in(2), *c = s.in(3), *table = s.in(4);
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) {
    u32 result = 0;
    for (int row = 0; row < 8; ++row) {
      if (!(table[l] >> row & 1)) continue;
      result |= static_cast<u32>((row & 4 ? a[l] : ~a[l]) & (row & 2 ? b[l] : ~b[l]) &
                                 (row & 1 ? c[l] : ~c[l]));
    }
    d[l] = result;
  });
}

// prmt.b32 d, a, b, selector: bytes of {b, a}; bit 3 of a selector replicates the sign.
void permute(Step& s) {
  const u64 *a = s.in(1), *b = s.in(2), *c = s.in(3);
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) {
    const u64 both = b[l] << 32 | (a[l] & 0xffffffffu);
    u32 result = 0;
    for (int byte = 0; byte < 4; ++byte) {
      const u32 select = static_cast<u32>(c[l] >> (4 * byte));
      u8 value = static_cast<u8>(both >> (8 * (select & 7)));
      if (select & 8) value = value & 0x80 ? 0xff : 0;
      result |= u32{value} << (8 * byte);
    }
    d[l] = result;
  });
}

// prmt with a mode: the selector is the two low bits of c.
template <int kMode>
void permute_mode(Step& s) {
  const u64 *a = s.in(1), *b = s.in(2), *c = s.in(3);
  u64* d = s.out(std::size_t{0});
  static constexpr u16 kSelectors[6][4] = {
      {0x3210, 0x4321, 0x5432, 0x6543}, {0x5670, 0x6701, 0x7012, 0x0123},
      {0x0000, 0x1111, 0x2222, 0x3333}, {0x3210, 0x3211, 0x3222, 0x3333},
      {0x0000, 0x1110, 0x2210, 0x3210}, {0x1010, 0x3232, 0x1010, 0x3232}};
  s.each([&](int l) {
    const u64 both = b[l] << 32 | (a[l] & 0xffffffffu);
    u32 result = 0;
    for (int byte = 0; byte < 4; ++byte)
      result |= u32{static_cast<u8>(both >> (8 * (kSelectors[kMode][c[l] & 3] >> (4 * byte) & 7)))}
                << (8 * byte);
    d[l] = result;
  });
}

Handler decode_permute(Modifiers& m) {
  switch (m.choice({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"})) {
    case 0:
      return permute_mode<0>;
    case 1:
      return permute_mode<1>;
    case 2:
      return permute_mode<2>;
    case 3:
      return permute_mode<3>;
    case 4:
      return permute_mode<4>;
    case 5:
      return permute_mode<5>;
    default:
      return permute;
  }
}

// bfe d, a, position, length: the sign extends from the field's top bit, or from the value's if the
// field reaches beyond it.
void extract_field(Step& s) {
  const u64 *a = s.in(1), *b = s.in(2), *c = s.in(3);
  u64* d = s.out(std::size_t{0});
  const u32 bytes = size_of(s.instruction.type), bits = 8 * bytes;
  const bool negative = is_signed(s.instruction.type);
  s.each([&](int l) {
    const u32 position = b[l] & 0xff, length = c[l] & 0xff;
    const u64 value = zero_extend(a[l], bytes);
    const u64 sign =
        negative && length ? value >> std::min(position + length - 1, bits - 1) & 1 : 0;
    u64 result = sign ? ~u64{0} : 0;
    for (u32 bit = 0; bit < length && bit < bits; ++bit) {
      const u64 one = position + bit < bits ? value >> (position + bit) & 1 : sign;
      result = (result & ~(u64{1} << bit)) | one << bit;
    }
    d[l] = zero_extend(result, bytes);
  });
}

// bfi d, field, base, position, length
void insert_field(Step& s) {
  const u64 *a = s.in(1), *b = s.in(2), *c = s.in(3), *e = s.in(4);
  u64* d = s.out(std::size_t{0});
  const u32 bytes = size_of(s.instruction.type), bits = 8 * bytes;
  s.each([&](int l) {
    const u32 position = c[l] & 0xff, length = e[l] & 0xff;
    u64 result = zero_extend(b[l], bytes);
    for (u32 bit = 0; bit < length && position + bit < bits; ++bit)
      result = (result & ~(u64{1} << (position + bit))) | (a[l] >> bit & 1) << (position + bit);
    d[l] = result;
  });
}

// bfind[.shiftamt]: the most significant bit that differs from the sign; -1 if none.
void find_bit(Step& s) {
  const u64* a = s.in(1);
  u64* d = s.out(std::size_t{0});
  const u32 bytes = size_of(s.instruction.type);
  const bool negative = is_signed(s.instruction.type), amount = s.instruction.n[0] != 0;
  s.each([&](int l) {
    u64 value = negative ? sign_extend(a[l], bytes) : zero_extend(a[l], bytes);
    if (negative && (value >> 63) != 0) value = ~value;
    if (value == 0) {
      d[l] = 0xffffffffu;
    } else {
      const u32 bit = 63 - static_cast<u32>(std::countl_zero(value));
      d[l] = amount ? 8 * bytes - 1 - bit : bit;
    }
  });
}

// fns.b32 d, mask, base, offset: the offset-th set bit from `base`; offset 0 tests `base` itself.
void find_nth_set(Step& s) {
  const u64 *mask = s.in(1), *base = s.in(2), *offset = s.in(3);
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) {
    const int step = static_cast<i32>(offset[l]) < 0 ? -1 : 1;
    int left = std::abs(static_cast<i32>(offset[l]));
    int bit = static_cast<int>(base[l]);
    u32 found = 0xffffffffu;
    if (left == 0) left = 1;
    const bool only_base = static_cast<i32>(offset[l]) == 0;
    for (; bit >= 0 && bit < 32; bit += step) {
      if (mask[l] >> bit & 1 && --left == 0) {
        found = static_cast<u32>(bit);
        break;
      }
      if (only_base) break;
    }
    d[l] = found;
  });
}

#define PTXEMU_FOR_BITS(type, handler, function) \
  switch (size_of(type)) {                       \
    case 2:                                      \
      return handler<u16, function>;             \
    case 4:                                      \
      return handler<u32, function>;             \
    case 8:                                      \
      return handler<u64, function>;             \
    default:                                     \
      return nullptr;                            \
  }

constexpr auto kBoolAnd = [](bool a, bool b) { return a && b; };
constexpr auto kBoolOr = [](bool a, bool b) { return a || b; };
constexpr auto kBoolXor = [](bool a, bool b) { return a != b; };

}  // namespace

Handler decode_bits(Instruction& i, Modifiers& m) {
  const std::string& name = i.parts[0];
  if (name == "prmt") {
    i.type = m.type();
    return decode_permute(m);
  }
  if (name == "shf") {
    i.n[0] = m.choice({"l", "r"});
    i.n[1] = m.choice({"wrap", "clamp"});
    i.type = m.type();
    return i.n[0] >= 0 && i.n[1] >= 0 ? funnel_shift : nullptr;
  }
  i.type = m.type();
  if (i.type == Type::kNone) return nullptr;
  if (i.type == Type::kPred) {
    if (name == "and") return logic_predicate<kBoolAnd>;
    if (name == "or") return logic_predicate<kBoolOr>;
    if (name == "xor") return logic_predicate<kBoolXor>;
    return name == "not" ? not_predicate : nullptr;
  }
  if (name == "and") PTXEMU_FOR_BITS(i.type, binary, kAnd)
  if (name == "or") PTXEMU_FOR_BITS(i.type, binary, kOr)
  if (name == "xor") PTXEMU_FOR_BITS(i.type, binary, kXor)
  if (name == "not") PTXEMU_FOR_BITS(i.type, unary, kNot)
  if (name == "cnot") PTXEMU_FOR_BITS(i.type, unary, kCnot)
  if (name == "popc") PTXEMU_FOR_BITS(i.type, unary, kPopc)
  if (name == "clz") PTXEMU_FOR_BITS(i.type, unary, kClz)
  if (name == "brev") PTXEMU_FOR_BITS(i.type, unary, kBrev)
  if (name == "shl") return decode_shift(i, true);
  if (name == "shr") return decode_shift(i, false);
  if (name == "lop3") return i.operands.size() == 5 ? lop3 : nullptr;
  if (name == "bfe") return extract_field;
  if (name == "bfi") return insert_field;
  if (name == "bfind") {
    i.n[0] = m.flag("shiftamt");
    return find_bit;
  }
  if (name == "fns") return find_nth_set;
  return nullptr;
}

}  // namespace ptxemu
