// SPDX-License-Identifier: Apache-2.0
// Scalar types of PTX and the conversions between register bits and C++ values.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>

namespace ptxemu {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i8 = std::int8_t;
using i16 = std::int16_t;
using i32 = std::int32_t;
using i64 = std::int64_t;

inline constexpr int kWarpSize = 32;
inline constexpr u32 kAllLanes = 0xffffffffu;

enum class Type : u8 {
  kNone,
  kPred,
  kB8,
  kB16,
  kB32,
  kB64,
  kB128,
  kU8,
  kU16,
  kU32,
  kU64,
  kS8,
  kS16,
  kS32,
  kS64,
  kF16,
  kBf16,
  kF16x2,
  kBf16x2,
  kTf32,
  kF32,
  kF64,
};

/// The type that a suffix such as "u32" names; kNone if it names no type.
Type parse_type(std::string_view name);

constexpr u32 size_of(Type type) {
  switch (type) {
    case Type::kPred:
    case Type::kB8:
    case Type::kU8:
    case Type::kS8:
      return 1;
    case Type::kB16:
    case Type::kU16:
    case Type::kS16:
    case Type::kF16:
    case Type::kBf16:
      return 2;
    case Type::kB64:
    case Type::kU64:
    case Type::kS64:
    case Type::kF64:
      return 8;
    case Type::kB128:
      return 16;
    default:
      return 4;
  }
}

constexpr bool is_signed(Type type) {
  return type == Type::kS8 || type == Type::kS16 || type == Type::kS32 || type == Type::kS64;
}

constexpr bool is_float(Type type) {
  return type == Type::kF16 || type == Type::kBf16 || type == Type::kF32 || type == Type::kF64 ||
         type == Type::kTf32;
}

// --- 16-bit floating point ----------------------------------------------------------------------

inline float half_to_float(u16 bits) {
  return static_cast<float>(std::bit_cast<_Float16>(bits));
}

inline float bfloat_to_float(u16 bits) {
  return std::bit_cast<float>(u32{bits} << 16);
}

/// Round to nearest even; NaN becomes the canonical NaN of PTX, 0x7fff.
inline u16 float_to_half(float value) {
  if (std::isnan(value)) return 0x7fff;
  return std::bit_cast<u16>(static_cast<_Float16>(value));
}

inline u16 float_to_bfloat(float value) {
  const u32 bits = std::bit_cast<u32>(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<u16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/// Wrappers so that templates can tell the two formats apart.
struct Half {
  u16 bits;
  operator float() const { return half_to_float(bits); }
};
struct Bfloat {
  u16 bits;
  operator float() const { return bfloat_to_float(bits); }
};

// --- register rows ------------------------------------------------------------------------------
// A register of a warp is a row of 32 u64. Writers extend to 64 bits by the signedness of their
// type; readers take the low bits, so a register may be read as a narrower type.

template <class T>
inline T from_bits(u64 bits) {
  if constexpr (std::is_same_v<T, bool>)
    return (bits & 1) != 0;
  else if constexpr (std::is_same_v<T, float>)
    return std::bit_cast<float>(static_cast<u32>(bits));
  else if constexpr (std::is_same_v<T, double>)
    return std::bit_cast<double>(bits);
  else if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, Bfloat>)
    return T{static_cast<u16>(bits)};
  else
    return static_cast<T>(bits);
}

template <class T>
inline u64 to_bits(T value) {
  if constexpr (std::is_same_v<T, float>)
    return std::bit_cast<u32>(value);
  else if constexpr (std::is_same_v<T, double>)
    return std::bit_cast<u64>(value);
  else if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, Bfloat>)
    return value.bits;
  else
    return static_cast<u64>(value);  // sign-extends signed types
}

/// .ftz: subnormal float values become zero of the same sign.
inline float flush_subnormal(float value) {
  return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value;
}

/// `value`'s low `bytes` bytes, zero- or sign-extended.
inline u64 zero_extend(u64 value, u32 bytes) {
  return bytes >= 8 ? value : value & ((u64{1} << (8 * bytes)) - 1);
}
inline u64 sign_extend(u64 value, u32 bytes) {
  const int shift = 64 - 8 * static_cast<int>(bytes);
  return shift <= 0 ? value : static_cast<u64>(static_cast<i64>(value << shift) >> shift);
}

}  // namespace ptxemu
