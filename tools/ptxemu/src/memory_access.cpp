// SPDX-License-Identifier: Apache-2.0
// ld, st, atom, red and cache hints (PTX ISA, "Data Movement and Conversion Instructions",
// "Parallel Synchronization and Communication Instructions: atom, red", and "Memory Consistency
// Model").
#include <algorithm>

#include "bulk_copy.h"
#include "decode.h"

namespace ptxemu {
namespace {

/// n[0]: elements of a vector; n[1]: Order; n[2]: CTA scope; n[3]: operation of an atomic.
Order order_of(const Instruction& i) {
  return static_cast<Order>(i.n[1]);
}

std::size_t elements_of(const Operand& o) {
  return o.kind == OperandKind::kVector ? o.elements.size() : 1;
}
const Operand& element(const Operand& o, std::size_t index) {
  return o.kind == OperandKind::kVector ? o.elements[index] : o;
}

void load(Step& s) {
  const Instruction& i = s.instruction;
  const u32 size = size_of(i.type), bytes = size * static_cast<u32>(i.n[0]);
  const bool negative = is_signed(i.type);
  const Operand& target = s.operand(0);
  if (i.strong) s.warp.polls++;
  s.each([&](int l) {
    const u64 address = s.address(1, l);
    u8* data;
    if (i.strong) {
      const Step::Place place = s.resolve(i.space, address, bytes, false, l);
      s.record(place, bytes, s.actor(l, true), false, l);
      after_strong_read(s, place, order_of(i), i.n[2] != 0, l);
      data = place.data;
    } else {
      data = s.access(i.space, address, bytes, false, l);
    }
    for (int e = 0; e < i.n[0]; ++e) {
      u64 value = 0;
      std::memcpy(&value, data + size * e, size);
      s.out(element(target, e))[l] = negative ? sign_extend(value, size) : value;
    }
  });
}

void store(Step& s) {
  const Instruction& i = s.instruction;
  const u32 size = size_of(i.type), bytes = size * static_cast<u32>(i.n[0]);
  const Operand& source = s.operand(1);
  s.machine.progress++;
  s.each([&](int l) {
    const u64 address = s.address(std::size_t{0}, l);
    u8* data;
    if (i.strong) {
      const Step::Place place = s.resolve(i.space, address, bytes, true, l);
      before_strong_write(s, place, order_of(i), i.n[2] != 0, l);
      s.record(place, bytes, s.actor(l, true), true, l);
      data = place.data;
    } else {
      data = s.access(i.space, address, bytes, true, l);
    }
    for (int e = 0; e < i.n[0]; ++e) {
      const u64 value = s.in(element(source, e))[l];
      std::memcpy(data + size * e, &value, size);
    }
  });
}

Handler decode_load_store(Instruction& i, Modifiers& m, bool is_load) {
  m.ignore({"nc", "weak", "unified"});
  i.strong = m.flag("volatile");
  Order order = i.strong ? Order::kRelaxed : Order::kNone;
  if (m.flag("relaxed")) order = Order::kRelaxed;
  if (m.flag("acquire")) order = Order::kAcquire;
  if (m.flag("release")) order = Order::kRelease;
  m.flag("mmio");
  i.strong = order != Order::kNone;
  i.n[1] = static_cast<int>(order);
  i.n[2] = m.choice({"cta", "cluster", "gpu", "sys"}) == 0;
  m.cache_hints();
  i.space = m.space();
  i.n[0] = 1 << (1 + m.choice({"v2", "v4", "v8"}));
  i.type = m.type();
  if (i.type == Type::kNone || i.type == Type::kPred || i.type == Type::kB128) return nullptr;
  const Operand& value = i.operands.at(is_load ? 0 : 1);
  if (elements_of(value) != static_cast<std::size_t>(i.n[0])) return nullptr;
  return is_load ? load : store;
}

// --- atom and red -------------------------------------------------------------------------------

enum Operation { kAdd, kMin, kMax, kAnd, kOr, kXor, kInc, kDec, kExch, kCas };

u64 pairwise_add(u64 a, u64 b, Type type) {
  u32 result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const u16 x = static_cast<u16>(a >> shift), y = static_cast<u16>(b >> shift);
    const u16 sum = type == Type::kF16x2 ? float_to_half(half_to_float(x) + half_to_float(y))
                                         : float_to_bfloat(bfloat_to_float(x) + bfloat_to_float(y));
    result |= u32{sum} << shift;
  }
  return result;
}

u64 add(u64 a, u64 b, Type type) {
  switch (type) {
    case Type::kF32:
      return to_bits(from_bits<float>(a) + from_bits<float>(b));
    case Type::kF64:
      return to_bits(from_bits<double>(a) + from_bits<double>(b));
    case Type::kF16:
      return float_to_half(half_to_float(static_cast<u16>(a)) + half_to_float(static_cast<u16>(b)));
    case Type::kBf16:
      return float_to_bfloat(bfloat_to_float(static_cast<u16>(a)) +
                             bfloat_to_float(static_cast<u16>(b)));
    case Type::kF16x2:
    case Type::kBf16x2:
      return pairwise_add(a, b, type);
    default:
      return a + b;
  }
}

bool less(u64 a, u64 b, Type type) {
  const u32 size = size_of(type);
  if (is_signed(type))
    return static_cast<i64>(sign_extend(a, size)) < static_cast<i64>(sign_extend(b, size));
  return zero_extend(a, size) < zero_extend(b, size);
}

}  // namespace

u64 apply_atomic(int operation, u64 old, u64 b, u64 c, Type type) {
  switch (operation) {
    case kAdd:
      return add(old, b, type);
    case kMin:
      return less(b, old, type) ? b : old;
    case kMax:
      return less(old, b, type) ? b : old;
    case kAnd:
      return old & b;
    case kOr:
      return old | b;
    case kXor:
      return old ^ b;
    case kInc:
      return old >= (b & 0xffffffffu) ? 0 : old + 1;
    case kDec:
      return old == 0 || old > (b & 0xffffffffu) ? b : old - 1;
    case kExch:
      return b;
    default:
      return zero_extend(old, size_of(type)) == zero_extend(b, size_of(type)) ? c : old;
  }
}

namespace {

template <bool kReturns>
void atomic(Step& s) {
  const Instruction& i = s.instruction;
  const u32 size = size_of(i.type);
  constexpr std::size_t kFirst = kReturns ? 1 : 0;
  const Operand& operand = s.operand(kFirst + 1);
  const std::size_t count = elements_of(operand);
  const u32 bytes = size * static_cast<u32>(count);
  s.warp.polls++;
  s.each([&](int l) {
    const Step::Place place = s.resolve(i.space, s.address(kFirst, l), bytes, true, l);
    before_strong_write(s, place, order_of(i), i.n[2] != 0, l);
    s.record(place, bytes, s.actor(l, true), true, l);
    for (std::size_t e = 0; e < count; ++e) {
      u64 old = 0;
      std::memcpy(&old, place.data + e * size, size);
      const u64 c = i.n[3] == kCas ? s.in(kFirst + 2)[l] : 0;
      const u64 value = apply_atomic(i.n[3], old, s.in(element(operand, e))[l], c, i.type);
      if (zero_extend(value, size) != old) s.machine.progress++;
      std::memcpy(place.data + e * size, &value, size);
      if constexpr (kReturns) s.out(element(s.operand(0), e))[l] = old;
    }
    if (kReturns) after_strong_read(s, place, order_of(i), i.n[2] != 0, l);
  });
}

}  // namespace

Handler decode_memory(Instruction& i, Modifiers& m) {
  const std::string& name = i.parts[0];
  if (name == "ld" || name == "ldu") return decode_load_store(i, m, true);
  if (name == "st") return decode_load_store(i, m, false);
  if (name == "createpolicy") {  // its result is only a cache hint
    m.take_if([](const std::string& part) { return part.starts_with("L2::"); });
    m.ignore({"fractional", "range", "global", "b64"});
    m.take_if([](const std::string& part) { return part.starts_with("L2::"); });
    return [](Step& s) {
      u64* d = s.out(std::size_t{0});
      s.each([&](int l) { d[l] = 0; });
    };
  }
  // prefetch, discard, applypriority: nothing that a program could observe
  m.space();
  m.cache_hints();
  m.ignore({"L1", "L2", "tensormap"});
  return [](Step&) {};
}

Handler decode_atomic(Instruction& i, Modifiers& m) {
  Order order = Order::kRelaxed;
  m.flag("relaxed");
  if (m.flag("acquire")) order = Order::kAcquire;
  if (m.flag("release")) order = Order::kRelease;
  if (m.flag("acq_rel")) order = Order::kAcqRel;
  i.n[1] = static_cast<int>(order);
  i.n[2] = m.choice({"cta", "cluster", "gpu", "sys"}) == 0;
  i.n[3] = m.choice({"add", "min", "max", "and", "or", "xor", "inc", "dec", "exch", "cas"});
  m.ignore({"noftz", "v2", "v4", "v8"});
  m.cache_hints();
  i.space = m.space();
  i.type = m.type();
  i.strong = true;
  const bool returns = i.parts[0] == "atom";
  const bool float_extreme =
      (i.n[3] == kMin || i.n[3] == kMax) &&
      (is_float(i.type) || i.type == Type::kF16x2 || i.type == Type::kBf16x2);
  if (i.n[3] < 0 || size_of(i.type) < 2 || i.type == Type::kB128 || float_extreme) return nullptr;
  if (i.operands.size() < (returns ? 3u : 2u) + (i.n[3] == kCas ? 1u : 0u)) return nullptr;
  return returns ? atomic<true> : atomic<false>;
}

}  // namespace ptxemu
