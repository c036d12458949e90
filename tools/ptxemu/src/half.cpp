// SPDX-License-Identifier: Apache-2.0
// Arithmetic in f16 and bf16, alone and in pairs (PTX ISA, "Half Precision Floating Point
// Instructions"). Every operation is computed in double precision and rounded once.
#include <functional>

#include "lanes.h"
#include "rounding.h"

namespace ptxemu {
Handler decode_half_arithmetic(Instruction& i, Modifiers& m);
namespace {

double widen(u16 bits, bool bfloat) {
  return bfloat ? bfloat_to_float(bits) : half_to_float(bits);
}

bool is_nan(u16 bits, bool bfloat) {
  return std::isnan(widen(bits, bfloat));
}

u16 narrow(double value, bool bfloat) {
  return bfloat ? double_to_bfloat(value) : double_to_half(value);
}

u16 flush(u16 bits, bool bfloat) {
  const u16 exponent = bfloat ? 0x7f80 : 0x7c00;
  return (bits & exponent) == 0 ? bits & 0x8000 : bits;
}

enum Operation { kAdd, kSub, kMul, kFma, kMin, kMax, kNeg, kAbs, kEx2, kTanh };

double compute(int operation, double a, double b, double c) {
  switch (operation) {
    case kAdd:
      return a + b;
    case kSub:
      return a - b;
    case kMul:
      return a * b;
    case kFma:
      return std::fma(a, b, c);
    case kEx2:
      return std::exp2(a);
    default:
      return std::tanh(a);
  }
}

// min and max return an operand unchanged, so they work on the bits.
u16 extreme(int operation, u16 a, u16 b, bool bfloat, bool nan) {
  const bool nan_a = is_nan(a, bfloat), nan_b = is_nan(b, bfloat);
  if ((nan_a && nan_b) || (nan && (nan_a || nan_b))) return 0x7fff;
  if (nan_a) return b;
  if (nan_b) return a;
  const double x = widen(a, bfloat), y = widen(b, bfloat);
  if (x == y) return std::signbit(x) == (operation == kMin) ? a : b;
  return (x < y) == (operation == kMin) ? a : b;
}

void half_arithmetic(Step& s) {
  const Instruction& i = s.instruction;
  const int operation = i.n[0];
  const bool bfloat = i.n[1] != 0, nan = i.n[3] != 0, relu = i.n[4] != 0;
  const int operands = static_cast<int>(i.operands.size()) - 1;
  const u64* a = s.in(1);
  const u64* b = operands > 1 ? s.in(2) : a;
  const u64* c = operands > 2 ? s.in(3) : a;
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) {
    u32 packed = 0;
    for (int element = 0; element < i.n[2]; ++element) {
      const int shift = 16 * element;
      u16 x = static_cast<u16>(a[l] >> shift), y = static_cast<u16>(b[l] >> shift),
          z = static_cast<u16>(c[l] >> shift), r;
      if (i.ftz) x = flush(x, bfloat), y = flush(y, bfloat), z = flush(z, bfloat);
      if (operation == kNeg)
        r = x ^ 0x8000;
      else if (operation == kAbs)
        r = x & 0x7fff;
      else if (operation == kMin || operation == kMax)
        r = extreme(operation, x, y, bfloat, nan);
      else
        r = narrow(compute(operation, widen(x, bfloat), widen(y, bfloat), widen(z, bfloat)),
                   bfloat);
      if (i.ftz) r = flush(r, bfloat);
      if (i.saturate) {
        const double value = widen(r, bfloat);
        r = value >= 1 ? narrow(1, bfloat) : value > 0 ? r : 0;
      }
      if (relu && !is_nan(r, bfloat) && std::signbit(widen(r, bfloat))) r = 0;
      packed |= u32{r} << shift;
    }
    d[l] = packed;
  });
}

}  // namespace

Handler decode_half_arithmetic(Instruction& i, Modifiers& m) {
  static constexpr std::string_view kNames[] = {"add", "sub", "mul", "fma", "min",
                                                "max", "neg", "abs", "ex2", "tanh"};
  i.n[0] = -1;
  for (int operation = 0; operation < 10; ++operation)
    if (i.parts[0] == kNames[operation]) i.n[0] = operation;
  i.n[1] = i.type == Type::kBf16 || i.type == Type::kBf16x2;
  i.n[2] = i.type == Type::kF16x2 || i.type == Type::kBf16x2 ? 2 : 1;
  i.n[3] = m.flag("NaN");
  i.n[4] = m.flag("relu");
  i.ftz = m.flag("ftz");
  i.saturate = m.flag("sat");
  m.ignore({"rn", "approx"});
  const bool known = i.type == Type::kF16 || i.type == Type::kF16x2 || i.n[1] != 0;
  return known && i.n[0] >= 0 && i.operands.size() <= 4 ? half_arithmetic : nullptr;
}

}  // namespace ptxemu
