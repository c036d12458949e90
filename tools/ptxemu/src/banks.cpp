// SPDX-License-Identifier: Apache-2.0
// Bank conflicts (CUDA C++ Programming Guide, "Shared Memory" of compute capability 5.x and later:
// 32 banks, successive words of 4 bytes in successive banks; lanes that access the same word do not
// conflict). Wider accesses are served for as many lanes at a time as make 128 bytes.
#include <algorithm>

#include "machine.h"

namespace ptxemu {
namespace {

constexpr u32 kBanks = 32, kWord = 4;

/// Wavefronts of lanes that are served together.
u32 wavefronts(const Step& s, u32 lanes) {
  std::array<std::array<u32, kWarpSize>, kBanks> words;  // distinct ones, by bank
  std::array<u32, kBanks> count{};
  for (u32 rest = lanes; rest != 0; rest &= rest - 1) {
    const u32 at = s.shared_at[static_cast<u32>(std::countr_zero(rest))];
    for (u32 word = at / kWord; word * kWord < at + s.shared_bytes; ++word) {
      auto& of_bank = words[word % kBanks];
      u32& n = count[word % kBanks];
      if (std::find(of_bank.begin(), of_bank.begin() + n, word) == of_bank.begin() + n)
        of_bank[n++] = word;
    }
  }
  return *std::max_element(count.begin(), count.end());
}

}  // namespace

void count_banks(const Step& s, std::map<std::string, BankUse>& banks) {
  const std::string& name = s.instruction.parts[0];
  const bool counts =
      name == "ld" || name == "st" || name == "ldmatrix" || name == "stmatrix" || name == "cp";
  if (!counts || s.shared_bytes > 16) return;  // bulk copies, atomics and mbarriers do not
  BankUse& use = banks[name];
  use.accesses++;
  const u32 together = std::min(32u, 128 / s.shared_bytes);
  for (u32 first = 0; first < kWarpSize; first += together) {
    const u32 lanes = s.shared_lanes & (kAllLanes >> (kWarpSize - together)) << first;
    if (lanes == 0) continue;
    use.wavefronts += wavefronts(s, lanes);
    use.least++;
  }
}

}  // namespace ptxemu
