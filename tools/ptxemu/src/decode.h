// SPDX-License-Identifier: Apache-2.0
// From an instruction's name to its handler. A decoder takes the modifiers it understands; one that
// is left over makes the instruction unsupported, so that none is ever ignored by accident.
#pragma once

#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "ir.h"
#include "machine.h"

namespace ptxemu {

class Modifiers {
 public:
  explicit Modifiers(const Instruction& i) : parts_(i.parts), taken_(i.parts.size()) {
    taken_[0] = true;
  }

  /// True if the modifier is there.
  bool flag(std::string_view name) {
    for (std::size_t i = 1; i < parts_.size(); ++i) {
      if (taken_[i] || parts_[i] != name) continue;
      taken_[i] = true;
      return true;
    }
    return false;
  }
  /// Takes whichever of `names` are there: hints and qualifiers without effect here.
  void ignore(std::initializer_list<std::string_view> names) {
    for (std::string_view name : names) flag(name);
  }
  /// The index of the one of `names` that is there, or -1.
  int choice(std::initializer_list<std::string_view> names) {
    int index = 0;
    for (std::string_view name : names) {
      if (flag(name)) return index;
      ++index;
    }
    return -1;
  }
  /// The next modifier that is a type.
  Type type() {
    for (std::size_t i = 1; i < parts_.size(); ++i) {
      const Type type = taken_[i] ? Type::kNone : parse_type(parts_[i]);
      if (type == Type::kNone) continue;
      taken_[i] = true;
      return type;
    }
    return Type::kNone;
  }
  /// The first modifier that `accepts`, or "".
  template <class F>
  std::string take_if(F&& accepts) {
    for (std::size_t i = 1; i < parts_.size(); ++i) {
      if (taken_[i] || !accepts(parts_[i])) continue;
      taken_[i] = true;
      return parts_[i];
    }
    return "";
  }
  std::string left_over() const {
    for (std::size_t i = 1; i < parts_.size(); ++i)
      if (!taken_[i]) return parts_[i];
    return "";
  }
  /// .global, .shared, .shared::cta, ...; kGeneric if none.
  Space space();
  /// Cache hints: none changes what an access does.
  void cache_hints();

 private:
  const std::vector<std::string>& parts_;
  std::vector<bool> taken_;
};

/// Each returns the handler, or null if the instruction is not of its class or not supported.
using Decoder = Handler (*)(Instruction&, Modifiers&);
Handler decode_integer(Instruction& i, Modifiers& m);
Handler decode_bits(Instruction& i, Modifiers& m);
Handler decode_float(Instruction& i, Modifiers& m);
Handler decode_compare(Instruction& i, Modifiers& m);
Handler decode_move(Instruction& i, Modifiers& m);
Handler decode_convert(Instruction& i, Modifiers& m);
Handler decode_memory(Instruction& i, Modifiers& m);
Handler decode_atomic(Instruction& i, Modifiers& m);
Handler decode_control(Instruction& i, Modifiers& m);
Handler decode_warp(Instruction& i, Modifiers& m);
Handler decode_matrix(Instruction& i, Modifiers& m);
Handler decode_barrier(Instruction& i, Modifiers& m);
Handler decode_fence(Instruction& i, Modifiers& m);
Handler decode_mma(Instruction& i, Modifiers& m);
Handler decode_async_copy(Instruction& i, Modifiers& m);
Handler decode_mbarrier(Instruction& i, Modifiers& m);
Handler decode_bulk_copy(Instruction& i, Modifiers& m);
Handler decode_wgmma(Instruction& i, Modifiers& m);

}  // namespace ptxemu
