// SPDX-License-Identifier: Apache-2.0
// cvt (PTX ISA, "Data Movement and Conversion Instructions: cvt").
#include <algorithm>

#include "lanes.h"
#include "rounding.h"

namespace ptxemu {
namespace {

/// n[0]: fesetround mode of a result that is rounded; n[1]: integer rounding or -1; n[2]: .relu.
enum IntegerRounding { kNearest, kZero, kDown, kUp };

double round_to_integer(double value, int mode) {
  switch (mode) {
    case kNearest:
      return std::nearbyint(value);  // the host rounds to nearest even
    case kDown:
      return std::floor(value);
    case kUp:
      return std::ceil(value);
    default:
      return std::trunc(value);
  }
}

/// Values beyond the type's range become its nearest bound; NaN becomes 0.
u64 to_integer(double value, Type type) {
  if (std::isnan(value)) return 0;
  const int bits = 8 * static_cast<int>(size_of(type));
  if (is_signed(type)) {
    const double bound = std::ldexp(1.0, bits - 1);
    if (value >= bound) return (u64{1} << (bits - 1)) - 1;
    if (value <= -bound) return sign_extend(u64{1} << (bits - 1), size_of(type));
    return static_cast<u64>(static_cast<i64>(value));
  }
  if (value <= 0) return 0;
  if (value >= std::ldexp(1.0, bits)) return zero_extend(~u64{0}, size_of(type));
  return static_cast<u64>(value);
}

/// Integer to integer: extended by the source's sign, cut to the result's size or saturated to it.
u64 resize(u64 bits, Type from, Type to, bool saturate) {
  const u64 value =
      is_signed(from) ? sign_extend(bits, size_of(from)) : zero_extend(bits, size_of(from));
  if (saturate) {
    const int width = 8 * static_cast<int>(size_of(to));
    const __int128 wide = is_signed(from) ? static_cast<__int128>(static_cast<i64>(value))
                                          : static_cast<__int128>(value);
    const __int128 low = is_signed(to) ? -(__int128{1} << (width - 1)) : 0;
    const __int128 high = (__int128{1} << (is_signed(to) ? width - 1 : width)) - 1;
    return static_cast<u64>(std::clamp(wide, low, high));
  }
  return is_signed(to) ? sign_extend(value, size_of(to)) : zero_extend(value, size_of(to));
}

double read_float(u64 bits, Type type) {
  switch (type) {
    case Type::kF16:
      return half_to_float(static_cast<u16>(bits));
    case Type::kBf16:
      return bfloat_to_float(static_cast<u16>(bits));
    case Type::kF64:
      return from_bits<double>(bits);
    default:
      return from_bits<float>(bits);
  }
}

// Rounded as the host's mode says; 16-bit formats know nearest and toward zero.
u64 write_float(double value, Type type, int mode) {
  switch (type) {
    case Type::kF64:
      return std::isnan(value) ? kNan64 : to_bits(value);
    case Type::kF32:
      return std::isnan(value) ? kNan32 : to_bits(static_cast<float>(value));
    case Type::kF16: {
      u16 bits = double_to_half(value);
      if (mode == FE_TOWARDZERO && !std::isnan(value) &&
          std::fabs(static_cast<double>(half_to_float(bits))) > std::fabs(value))
        --bits;
      return bits;
    }
    default: {
      u16 bits = double_to_bfloat(value);
      if (mode == FE_TOWARDZERO && !std::isnan(value) &&
          std::fabs(static_cast<double>(bfloat_to_float(bits))) > std::fabs(value))
        --bits;
      return bits;
    }
  }
}

double limit(const Instruction& i, double value) {
  if (i.saturate) value = value >= 1 ? 1 : value > 0 ? value : 0;
  if (i.n[2] && value < 0) value = 0;
  return value;
}

double flushed(const Instruction& i, double value) {
  return i.ftz && std::fabs(value) < 0x1p-126 ? std::copysign(0.0, value) : value;
}

void float_to_float(Step& s) {
  const Instruction& i = s.instruction;
  const u64* a = s.in(1);
  u64* d = s.out(std::size_t{0});
  const bool host_mode = i.type == Type::kF32 && i.type2 == Type::kF64;
  s.each([&](int l) {
    double value = flushed(i, read_float(a[l], i.type2));
    if (i.n[1] >= 0) value = round_to_integer(value, i.n[1]);
    value = limit(i, value);
    const Rounding rounding(host_mode ? i.n[0] : FE_TONEAREST);
    d[l] = write_float(value, i.type, i.n[0]);
    if (i.ftz && i.type == Type::kF32) d[l] = to_bits(flush_subnormal(from_bits<float>(d[l])));
  });
}

void float_to_integer(Step& s) {
  const Instruction& i = s.instruction;
  const u64* a = s.in(1);
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) {
    const double value = flushed(i, read_float(a[l], i.type2));
    d[l] = to_integer(round_to_integer(value, i.n[1]), i.type);
  });
}

void integer_to_float(Step& s) {
  const Instruction& i = s.instruction;
  const u64* a = s.in(1);
  u64* d = s.out(std::size_t{0});
  const Rounding rounding(i.n[0]);
  s.each([&](int l) {
    const i64 value = static_cast<i64>(resize(a[l], i.type2, i.type2, false));
    const bool negative = is_signed(i.type2);
    if (i.type == Type::kF64)
      d[l] = to_bits(negative ? static_cast<double>(value) : static_cast<double>(u64(value)));
    else if (i.type == Type::kF32)
      d[l] = to_bits(negative ? static_cast<float>(value) : static_cast<float>(u64(value)));
    else  // a double holds what matters: integers beyond 2^53 are far beyond f16's range
      d[l] = write_float(negative ? static_cast<double>(value) : static_cast<double>(u64(value)),
                         i.type, i.n[0]);
  });
}

void integer_to_integer(Step& s) {
  const Instruction& i = s.instruction;
  const u64* a = s.in(1);
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) { d[l] = resize(a[l], i.type2, i.type, i.saturate); });
}

// cvt.rn.{f16x2,bf16x2}.f32 d, high, low
void pack_halves(Step& s) {
  const Instruction& i = s.instruction;
  const u64 *high = s.in(1), *low = s.in(2);
  u64* d = s.out(std::size_t{0});
  const Type half = i.type == Type::kF16x2 ? Type::kF16 : Type::kBf16;
  s.each([&](int l) {
    const auto one = [&](u64 bits) {
      return write_float(limit(i, from_bits<float>(bits)), half, i.n[0]);
    };
    d[l] = one(high[l]) << 16 | one(low[l]);
  });
}

// cvt.{rna,rn,rz}.tf32.f32: 10 explicit bits of mantissa; rna rounds halves away from zero
void to_tf32(Step& s) {
  const Instruction& i = s.instruction;
  const u64* a = s.in(1);
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) {
    u32 bits = static_cast<u32>(a[l]);
    if (std::isnan(from_bits<float>(bits))) {
      d[l] = kNan32;
      return;
    }
    if (!std::isinf(from_bits<float>(bits))) {
      if (i.n[3] == 0) bits += 0x1000;
      if (i.n[3] == 1) bits += 0xfff + (bits >> 13 & 1);
    }
    bits &= ~0x1fffu;
    if (i.n[2] && bits >> 31) bits = 0;
    d[l] = bits;
  });
}

}  // namespace

Handler decode_convert(Instruction& i, Modifiers& m) {
  i.n[1] = m.choice({"rni", "rzi", "rmi", "rpi"});
  i.n[3] = m.flag("rna") ? 0 : i.has("rn") ? 1 : 2;
  i.n[0] = rounding_mode(m);
  i.n[2] = m.flag("relu");
  i.ftz = m.flag("ftz");
  i.saturate = m.flag("sat");
  i.type = m.type();
  i.type2 = m.type();
  if (i.type == Type::kTf32) return i.type2 == Type::kF32 ? to_tf32 : nullptr;
  if (i.type == Type::kF16x2 || i.type == Type::kBf16x2)
    return i.type2 == Type::kF32 && i.operands.size() == 3 ? pack_halves : nullptr;
  if (i.type == Type::kNone || i.type2 == Type::kNone || i.operands.size() != 2) return nullptr;
  const bool halves = (i.type == Type::kF16 || i.type == Type::kBf16) &&
                      (i.n[0] == FE_DOWNWARD || i.n[0] == FE_UPWARD);
  if (halves) return nullptr;
  if (is_float(i.type2)) {
    if (is_float(i.type)) return float_to_float;
    return i.n[1] >= 0 ? float_to_integer : nullptr;
  }
  return is_float(i.type) ? integer_to_float : integer_to_integer;
}

}  // namespace ptxemu
