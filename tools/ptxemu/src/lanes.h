// SPDX-License-Identifier: Apache-2.0
// Handlers of instructions that compute each lane's result from the lane's own operands.
#pragma once

#include "decode.h"

namespace ptxemu {

template <class T, auto F>
void unary(Step& s) {
  const u64* a = s.in(1);
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) { d[l] = to_bits(F(from_bits<T>(a[l]))); });
}

template <class T, auto F>
void binary(Step& s) {
  const u64 *a = s.in(1), *b = s.in(2);
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) { d[l] = to_bits(F(from_bits<T>(a[l]), from_bits<T>(b[l]))); });
}

template <class T, auto F>
void ternary(Step& s) {
  const u64 *a = s.in(1), *b = s.in(2), *c = s.in(3);
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) {
    d[l] = to_bits(F(from_bits<T>(a[l]), from_bits<T>(b[l]), from_bits<T>(c[l])));
  });
}

/// Instances of a handler template over the integer types of an instruction.
#define PTXEMU_FOR_INTEGERS(type, handler, function) \
  switch (type) {                                    \
    case Type::kU16:                                 \
    case Type::kB16:                                 \
      return handler<u16, function>;                 \
    case Type::kS16:                                 \
      return handler<i16, function>;                 \
    case Type::kU32:                                 \
    case Type::kB32:                                 \
      return handler<u32, function>;                 \
    case Type::kS32:                                 \
      return handler<i32, function>;                 \
    case Type::kU64:                                 \
    case Type::kB64:                                 \
      return handler<u64, function>;                 \
    case Type::kS64:                                 \
      return handler<i64, function>;                 \
    default:                                         \
      return nullptr;                                \
  }

/// add, sub, mul, ... of floating-point types, which share their names with the integer ones.
Handler decode_float_arithmetic(Instruction& i, Modifiers& m);

}  // namespace ptxemu
