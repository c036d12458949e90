// SPDX-License-Identifier: Apache-2.0
// Integer arithmetic (PTX ISA, "Integer Arithmetic Instructions").
#include <algorithm>
#include <limits>

#include "lanes.h"

namespace ptxemu {
namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

// Unsigned arithmetic wraps without undefined behaviour; u64 keeps small types from promoting to
// int.
constexpr auto kAdd = []<class T>(T a, T b) { return static_cast<T>(u64(a) + u64(b)); };
constexpr auto kSub = []<class T>(T a, T b) { return static_cast<T>(u64(a) - u64(b)); };
constexpr auto kMulLow = []<class T>(T a, T b) { return static_cast<T>(u64(a) * u64(b)); };
constexpr auto kMadLow = []<class T>(T a, T b, T c) {
  return static_cast<T>(u64(a) * u64(b) + u64(c));
};
template <class T>
T high_product(T a, T b) {
  if constexpr (std::is_signed_v<T>)
    return static_cast<T>((static_cast<__int128>(a) * b) >> (8 * sizeof(T)));
  else
    return static_cast<T>((static_cast<unsigned __int128>(a) * b) >> (8 * sizeof(T)));
}
constexpr auto kMulHigh = []<class T>(T a, T b) { return high_product(a, b); };
constexpr auto kMadHigh = []<class T>(T a, T b, T c) {
  return static_cast<T>(u64(high_product(a, b)) + u64(c));
};
constexpr auto kMin = []<class T>(T a, T b) { return std::min(a, b); };
constexpr auto kMax = []<class T>(T a, T b) { return std::max(a, b); };
constexpr auto kMinRelu = []<class T>(T a, T b) { return std::max(T{0}, std::min(a, b)); };
constexpr auto kMaxRelu = []<class T>(T a, T b) { return std::max(T{0}, std::max(a, b)); };
constexpr auto kNeg = []<class T>(T a) { return static_cast<T>(0 - u64(a)); };
constexpr auto kAbs = []<class T>(T a) { return a < 0 ? static_cast<T>(0 - u64(a)) : a; };
constexpr auto kSad = []<class T>(T a, T b, T c) {
  return static_cast<T>(u64(c) + (a < b ? u64(b) - u64(a) : u64(a) - u64(b)));
};
// Division by zero is an unspecified value in PTX; GPUs give all ones.
constexpr auto kDiv = []<class T>(T a, T b) {
  if (b == 0) return static_cast<T>(~u64{0});
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(0 - u64(a));
  return static_cast<T>(a / b);
};
constexpr auto kRem = []<class T>(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return T{0};
  return static_cast<T>(a % b);
};
constexpr auto kSaturate = [](i64 v) {
  return static_cast<i32>(
      std::clamp<i64>(v, std::numeric_limits<i32>::min(), std::numeric_limits<i32>::max()));
};
constexpr auto kAddSat = [](i32 a, i32 b) { return kSaturate(i64{a} + b); };
constexpr auto kSubSat = [](i32 a, i32 b) { return kSaturate(i64{a} - b); };

// .wide: the result has twice the operands' width.
template <class T, class Wide>
void mul_wide(Step& s) {
  const u64 *a = s.in(1), *b = s.in(2);
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) {
    d[l] = to_bits(static_cast<Wide>(static_cast<Wide>(from_bits<T>(a[l])) * from_bits<T>(b[l])));
  });
}
template <class T, class Wide>
void mad_wide(Step& s) {
  const u64 *a = s.in(1), *b = s.in(2), *c = s.in(3);
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) {
    const u64 product =
        static_cast<u64>(static_cast<Wide>(from_bits<T>(a[l])) * from_bits<T>(b[l]));
    d[l] = to_bits(static_cast<Wide>(product + c[l]));
  });
}

Handler wide(Type type, bool add) {
  switch (type) {
    case Type::kU16:
      return add ? mad_wide<u16, u32> : mul_wide<u16, u32>;
    case Type::kS16:
      return add ? mad_wide<i16, i32> : mul_wide<i16, i32>;
    case Type::kU32:
      return add ? mad_wide<u32, u64> : mul_wide<u32, u64>;
    case Type::kS32:
      return add ? mad_wide<i32, i64> : mul_wide<i32, i64>;
    default:
      return nullptr;
  }
}

Handler multiply(Instruction& i, Modifiers& m, bool add) {
  switch (m.choice({"lo", "hi", "wide"})) {
    case 0:
      if (add) PTXEMU_FOR_INTEGERS(i.type, ternary, kMadLow)
      PTXEMU_FOR_INTEGERS(i.type, binary, kMulLow)
    case 1:
      if (add) PTXEMU_FOR_INTEGERS(i.type, ternary, kMadHigh)
      PTXEMU_FOR_INTEGERS(i.type, binary, kMulHigh)
    case 2:
      return wide(i.type, add);
    default:
      return nullptr;
  }
}

// dp4a.A.B d, a, b, c: four products of bytes, summed with c.
template <bool kSignedA, bool kSignedB>
void dp4a(Step& s) {
  const u64 *a = s.in(1), *b = s.in(2), *c = s.in(3);
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) {
    u32 sum = static_cast<u32>(c[l]);
    for (int byte = 0; byte < 4; ++byte) {
      const u8 x = static_cast<u8>(a[l] >> (8 * byte)), y = static_cast<u8>(b[l] >> (8 * byte));
      sum += static_cast<u32>((kSignedA ? static_cast<i8>(x) : x) *
                              (kSignedB ? static_cast<i8>(y) : y));
    }
    d[l] = sum;
  });
}

Handler decode_dp4a(Instruction& i, Modifiers& m) {
  const Type a = m.type();
  const Type b = m.type();
  i.type = a;
  if (a == Type::kS32) return b == Type::kS32 ? dp4a<true, true> : dp4a<true, false>;
  return b == Type::kS32 ? dp4a<false, true> : dp4a<false, false>;
}

}  // namespace

Handler decode_integer(Instruction& i, Modifiers& m) {
  const std::string& name = i.parts[0];
  if (name == "dp4a") return decode_dp4a(i, m);
  i.type = m.type();
  if (is_float(i.type) || i.type == Type::kF16x2 || i.type == Type::kBf16x2)
    return decode_float_arithmetic(i, m);
  if (name == "mul") return multiply(i, m, false);
  if (name == "mad") return multiply(i, m, true);
  if (name == "add" || name == "sub") {
    if (m.flag("sat")) {
      if (i.type != Type::kS32) return nullptr;
      return name == "add" ? binary<i32, kAddSat> : binary<i32, kSubSat>;
    }
    if (name == "add") PTXEMU_FOR_INTEGERS(i.type, binary, kAdd)
    PTXEMU_FOR_INTEGERS(i.type, binary, kSub)
  }
  if (name == "div") PTXEMU_FOR_INTEGERS(i.type, binary, kDiv)
  if (name == "rem") PTXEMU_FOR_INTEGERS(i.type, binary, kRem)
  const bool relu = (name == "min" || name == "max") && m.flag("relu");
  if (name == "min" && relu) PTXEMU_FOR_INTEGERS(i.type, binary, kMinRelu)
  if (name == "max" && relu) PTXEMU_FOR_INTEGERS(i.type, binary, kMaxRelu)
  if (name == "min") PTXEMU_FOR_INTEGERS(i.type, binary, kMin)
  if (name == "max") PTXEMU_FOR_INTEGERS(i.type, binary, kMax)
  if (name == "neg") PTXEMU_FOR_INTEGERS(i.type, unary, kNeg)
  if (name == "abs") PTXEMU_FOR_INTEGERS(i.type, unary, kAbs)
  if (name == "sad") PTXEMU_FOR_INTEGERS(i.type, ternary, kSad)
  return nullptr;
}

}  // namespace ptxemu
