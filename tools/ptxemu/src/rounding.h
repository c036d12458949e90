// SPDX-License-Identifier: Apache-2.0
// Rounding modes of the host's arithmetic. Files that use Rounding need -frounding-math.
#pragma once

#include <cfenv>

#include "decode.h"

namespace ptxemu {

/// .rn, .rz, .rm, .rp as fesetround() takes them; FE_TONEAREST if none is given.
inline int rounding_mode(Modifiers& m) {
  constexpr int kModes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  const int choice = m.choice({"rn", "rz", "rm", "rp"});
  return choice < 0 ? FE_TONEAREST : kModes[choice];
}

/// Rounds in `mode` as long as it lives.
class Rounding {
 public:
  explicit Rounding(int mode) : active_(mode != FE_TONEAREST) {
    if (active_) std::fesetround(mode);
  }
  ~Rounding() {
    if (active_) std::fesetround(FE_TONEAREST);
  }
  Rounding(const Rounding&) = delete;
  Rounding& operator=(const Rounding&) = delete;

 private:
  bool active_;
};

inline constexpr u32 kNan32 = 0x7fffffffu;
inline constexpr u64 kNan64 = 0x7fffffffffffffffull;

/// Correctly rounded 16-bit results of an exact or double-precision value: rounding to odd first
/// keeps the second rounding from going wrong.
inline u16 double_to_half(double value) {
  if (std::isnan(value)) return 0x7fff;
  return std::bit_cast<u16>(static_cast<_Float16>(value));
}
inline float round_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  if (static_cast<double>(nearest) == value || !std::isfinite(nearest)) return nearest;
  u32 bits = std::bit_cast<u32>(nearest);
  if (std::fabs(static_cast<double>(nearest)) > std::fabs(value)) --bits;  // toward zero
  return std::bit_cast<float>(bits | 1);
}
inline u16 double_to_bfloat(double value) {
  return float_to_bfloat(round_to_odd(value));
}

}  // namespace ptxemu
