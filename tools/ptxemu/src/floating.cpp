// SPDX-License-Identifier: Apache-2.0
// Floating-point arithmetic in f32 and f64 (PTX ISA, "Floating Point Instructions"). The
// approximate functions are computed by the host's correctly or nearly correctly rounded ones, so
// they are at least as accurate as a GPU's and may differ from it within the bounds that the ISA
// states.
#include "lanes.h"
#include "rounding.h"

namespace ptxemu {
Handler decode_half_arithmetic(Instruction& i, Modifiers& m);
namespace {

template <class T>
T nan_value() {
  if constexpr (sizeof(T) == 4)
    return std::bit_cast<float>(kNan32);
  else
    return std::bit_cast<double>(kNan64);
}

template <class T, bool kFtz>
T input(u64 bits) {
  const T value = from_bits<T>(bits);
  if constexpr (kFtz && sizeof(T) == 4) return flush_subnormal(value);
  return value;
}

template <class T, bool kFtz>
u64 output(T value, bool saturate) {
  if constexpr (kFtz && sizeof(T) == 4) value = flush_subnormal(value);
  if (saturate) value = value >= T{1} ? T{1} : value > T{0} ? value : T{0};  // NaN: 0
  return std::isnan(value) ? to_bits(nan_value<T>()) : to_bits(value);
}

template <class T, bool kFtz, auto F>
void unary_float(Step& s) {
  const Rounding rounding(s.instruction.n[0]);
  const u64* a = s.in(1);
  u64* d = s.out(std::size_t{0});
  const bool saturate = s.instruction.saturate;
  s.each([&](int l) { d[l] = output<T, kFtz>(F(input<T, kFtz>(a[l])), saturate); });
}

template <class T, bool kFtz, auto F>
void binary_float(Step& s) {
  const Rounding rounding(s.instruction.n[0]);
  const u64 *a = s.in(1), *b = s.in(2);
  u64* d = s.out(std::size_t{0});
  const bool saturate = s.instruction.saturate;
  s.each([&](int l) {
    d[l] = output<T, kFtz>(F(input<T, kFtz>(a[l]), input<T, kFtz>(b[l])), saturate);
  });
}

template <class T, bool kFtz, auto F>
void ternary_float(Step& s) {
  const Rounding rounding(s.instruction.n[0]);
  const u64 *a = s.in(1), *b = s.in(2), *c = s.in(3);
  u64* d = s.out(std::size_t{0});
  const bool saturate = s.instruction.saturate;
  s.each([&](int l) {
    d[l] = output<T, kFtz>(F(input<T, kFtz>(a[l]), input<T, kFtz>(b[l]), input<T, kFtz>(c[l])),
                           saturate);
  });
}

// abs and neg only change the sign bit, of NaN too.
template <bool kFtz>
void sign_f32(Step& s) {
  const u64* a = s.in(1);
  u64* d = s.out(std::size_t{0});
  const bool negate = s.instruction.n[1] != 0;
  s.each([&](int l) {
    const u32 bits = to_bits(input<float, kFtz>(a[l])) & 0xffffffffu;
    d[l] = negate ? bits ^ 0x80000000u : bits & 0x7fffffffu;
  });
}
void sign_f64(Step& s) {
  const u64* a = s.in(1);
  u64* d = s.out(std::size_t{0});
  const u64 sign = u64{1} << 63;
  const bool negate = s.instruction.n[1] != 0;
  s.each([&](int l) { d[l] = negate ? a[l] ^ sign : a[l] & ~sign; });
}

constexpr auto kAdd = []<class T>(T a, T b) { return a + b; };
constexpr auto kSub = []<class T>(T a, T b) { return a - b; };
constexpr auto kMul = []<class T>(T a, T b) { return a * b; };
constexpr auto kDiv = []<class T>(T a, T b) { return a / b; };
constexpr auto kFma = []<class T>(T a, T b, T c) { return std::fma(a, b, c); };
// -0 is less than +0; NaN loses against a number.
constexpr auto kMin = []<class T>(T a, T b) {
  if (std::isnan(a)) return b;
  if (a == b) return std::signbit(a) ? a : b;
  return b < a ? b : a;
};
constexpr auto kMax = []<class T>(T a, T b) {
  if (std::isnan(a)) return b;
  if (a == b) return std::signbit(a) ? b : a;
  return b > a ? b : a;
};
constexpr auto kMinNan = []<class T>(T a, T b) {
  return std::isnan(a) || std::isnan(b) ? nan_value<T>() : kMin(a, b);
};
constexpr auto kMaxNan = []<class T>(T a, T b) {
  return std::isnan(a) || std::isnan(b) ? nan_value<T>() : kMax(a, b);
};
constexpr auto kRcp = []<class T>(T a) { return T{1} / a; };
constexpr auto kSqrt = []<class T>(T a) { return std::sqrt(a); };
constexpr auto kRsqrt = []<class T>(T a) {
  return static_cast<T>(1.0 / std::sqrt(static_cast<double>(a)));
};
constexpr auto kSin = []<class T>(T a) { return static_cast<T>(std::sin(static_cast<double>(a))); };
constexpr auto kCos = []<class T>(T a) { return static_cast<T>(std::cos(static_cast<double>(a))); };
constexpr auto kLg2 = []<class T>(T a) { return std::log2(a); };
constexpr auto kEx2 = []<class T>(T a) { return std::exp2(a); };
constexpr auto kTanh = []<class T>(T a) { return std::tanh(a); };

#define PTXEMU_FOR_FLOATS(i, handler, function)                                          \
  {                                                                                      \
    if ((i).type == Type::kF32)                                                          \
      return (i).ftz ? handler<float, true, function> : handler<float, false, function>; \
    return (i).type == Type::kF64 ? handler<double, false, function> : nullptr;          \
  }

Handler unary_function(Instruction& i) {
  const std::string& name = i.parts[0];
  if (name == "rcp") PTXEMU_FOR_FLOATS(i, unary_float, kRcp)
  if (name == "sqrt") PTXEMU_FOR_FLOATS(i, unary_float, kSqrt)
  if (name == "rsqrt") PTXEMU_FOR_FLOATS(i, unary_float, kRsqrt)
  if (i.type != Type::kF32) return nullptr;
  if (name == "sin") PTXEMU_FOR_FLOATS(i, unary_float, kSin)
  if (name == "cos") PTXEMU_FOR_FLOATS(i, unary_float, kCos)
  if (name == "lg2") PTXEMU_FOR_FLOATS(i, unary_float, kLg2)
  if (name == "ex2") PTXEMU_FOR_FLOATS(i, unary_float, kEx2)
  if (name == "tanh") PTXEMU_FOR_FLOATS(i, unary_float, kTanh)
  return nullptr;
}

template <class T>
void copysign_bits(Step& s) {  // copysign d, a, b: the sign of a on the magnitude of b
  const u64 *a = s.in(1), *b = s.in(2);
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) { d[l] = to_bits(std::copysign(from_bits<T>(b[l]), from_bits<T>(a[l]))); });
}

// testp.OP p, a
void test_property(Step& s) {
  const u64* a = s.in(1);
  u64* d = s.out(std::size_t{0});
  const bool single = s.instruction.type == Type::kF32;
  s.each([&](int l) {
    const int kind =
        single ? std::fpclassify(from_bits<float>(a[l])) : std::fpclassify(from_bits<double>(a[l]));
    switch (s.instruction.n[0]) {
      case 0:
        d[l] = kind != FP_NAN && kind != FP_INFINITE;
        break;
      case 1:
        d[l] = kind == FP_INFINITE;
        break;
      case 2:
        d[l] = kind != FP_NAN;
        break;
      case 3:
        d[l] = kind == FP_NAN;
        break;
      case 4:
        d[l] = kind == FP_NORMAL;
        break;
      default:
        d[l] = kind == FP_SUBNORMAL;
    }
  });
}

}  // namespace

Handler decode_float(Instruction& i, Modifiers& m) {
  const std::string& name = i.parts[0];
  if (name == "testp") {
    i.n[0] = m.choice({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
    i.type = m.type();
    return i.n[0] >= 0 ? test_property : nullptr;
  }
  i.type = m.type();
  if (name == "copysign")
    return i.type == Type::kF32 ? copysign_bits<float> : copysign_bits<double>;
  return decode_float_arithmetic(i, m);
}

Handler decode_float_arithmetic(Instruction& i, Modifiers& m) {
  if (i.type != Type::kF32 && i.type != Type::kF64) return decode_half_arithmetic(i, m);
  const std::string& name = i.parts[0];
  i.ftz = m.flag("ftz");
  i.saturate = m.flag("sat");
  i.n[0] = rounding_mode(m);
  m.ignore({"approx", "full"});
  if (name == "add") PTXEMU_FOR_FLOATS(i, binary_float, kAdd)
  if (name == "sub") PTXEMU_FOR_FLOATS(i, binary_float, kSub)
  if (name == "mul") PTXEMU_FOR_FLOATS(i, binary_float, kMul)
  if (name == "div") PTXEMU_FOR_FLOATS(i, binary_float, kDiv)
  if (name == "fma" || name == "mad") PTXEMU_FOR_FLOATS(i, ternary_float, kFma)
  if (name == "min" || name == "max") {
    const bool nan = m.flag("NaN");
    if (i.operands.size() != 3) return nullptr;
    if (name == "min" && nan) PTXEMU_FOR_FLOATS(i, binary_float, kMinNan)
    if (name == "min") PTXEMU_FOR_FLOATS(i, binary_float, kMin)
    if (nan) PTXEMU_FOR_FLOATS(i, binary_float, kMaxNan)
    PTXEMU_FOR_FLOATS(i, binary_float, kMax)
  }
  if (name == "abs" || name == "neg") {
    i.n[1] = name == "neg";
    if (i.type == Type::kF64) return sign_f64;
    return i.ftz ? sign_f32<true> : sign_f32<false>;
  }
  return unary_function(i);
}

}  // namespace ptxemu
