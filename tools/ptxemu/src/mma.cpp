// SPDX-License-Identifier: Apache-2.0
// mma.sync (PTX ISA, "Warp-level matrix multiply-accumulate": fragments of m16n8k4, k8, k16).
//
// Rounding model: products are exact, they and the accumulator are summed in double precision, and
// the sum is rounded once, to nearest even. Tensor cores align the addends of a short chunk to the
// largest and cut bits below; results can differ from a GPU's by a few units in the last place of
// the largest addend. Small integers and powers of two come out the same.
#include "mma_model.h"

#include "decode.h"

namespace ptxemu {
namespace {

/// n[0]: k; n[1]: Format of a and b; n[2]: d is f16; n[3]: c is f16.
void multiply_accumulate(Step& s) {
  if (!s.converge_full()) return;
  const Instruction& i = s.instruction;
  const int k = i.n[0];
  const Format format = static_cast<Format>(i.n[1]);
  const int per_register = format == Format::kTf32 ? 1 : 2;
  double a[16][16], b[16][8], acc[16][8];

  // register r of a holds rows g + 8 * (r % 2); columns advance with the lane, then with r / 2
  const int columns = 4 * per_register;
  for (std::size_t r = 0; r < s.operand(1).elements.size(); ++r) {
    const u64* row = s.in(s.operand(1).elements[r]);
    for (int l = 0; l < kWarpSize; ++l)
      for (int e = 0; e < per_register; ++e)
        a[l / 4 + 8 * (r % 2)][(l % 4) * per_register + e + columns * (r / 2)] =
            read_element(row[l], e, format);
  }
  const Operand& operand_b = s.operand(2);
  const std::size_t registers_b =
      operand_b.kind == OperandKind::kVector ? operand_b.elements.size() : 1;
  for (std::size_t r = 0; r < registers_b; ++r) {
    const u64* row =
        s.in(operand_b.kind == OperandKind::kVector ? operand_b.elements[r] : operand_b);
    for (int l = 0; l < kWarpSize; ++l)
      for (int e = 0; e < per_register; ++e)
        b[(l % 4) * per_register + e + columns * r][l / 4] = read_element(row[l], e, format);
  }
  const auto& operand_c = s.operand(3).elements;
  for (std::size_t r = 0; r < operand_c.size(); ++r) {
    const u64* row = s.in(operand_c[r]);
    for (int l = 0; l < kWarpSize; ++l) {
      const int g = l / 4, t = l % 4;
      if (i.n[3]) {
        for (int e = 0; e < 2; ++e)
          acc[g + 8 * r][2 * t + e] = read_element(row[l], e, Format::kF16);
      } else {
        acc[g + 8 * (r / 2)][2 * t + (r & 1)] = from_bits<float>(row[l]);
      }
    }
  }
  for (int m = 0; m < 16; ++m)
    for (int kk = 0; kk < k; ++kk)
      for (int n = 0; n < 8; ++n) acc[m][n] += a[m][kk] * b[kk][n];

  const auto& operand_d = s.operand(0).elements;
  for (std::size_t r = 0; r < operand_d.size(); ++r) {
    u64* row = s.out(operand_d[r]);
    for (int l = 0; l < kWarpSize; ++l) {
      const int g = l / 4, t = l % 4;
      row[l] = i.n[2] ? round_to_half(acc[g + 8 * r][2 * t]) |
                            u64{round_to_half(acc[g + 8 * r][2 * t + 1])} << 16
                      : round_to_float(acc[g + 8 * (r / 2)][2 * t + (r & 1)]);
    }
  }
}

}  // namespace

Handler decode_mma(Instruction& i, Modifiers& m) {
  if (!m.flag("sync") || !m.flag("aligned")) return nullptr;
  const int shape = m.choice({"m16n8k4", "m16n8k8", "m16n8k16"});
  if (shape < 0 || !m.flag("row") || !m.flag("col")) return nullptr;
  const Type d = m.type(), a = m.type(), b = m.type(), c = m.type();
  i.type = d;
  i.n[0] = 4 << shape;
  i.n[2] = d == Type::kF16;
  i.n[3] = c == Type::kF16;
  const bool tf32 = a == Type::kTf32;
  if (a != b || !(a == Type::kF16 || a == Type::kBf16 || tf32)) return nullptr;
  if (tf32 ? shape == 2 : shape == 0) return nullptr;
  if (!(d == Type::kF32 || (d == Type::kF16 && a == Type::kF16)) ||
      !(c == Type::kF32 || (c == Type::kF16 && a == Type::kF16)))
    return nullptr;
  i.n[1] = static_cast<int>(tf32 ? Format::kTf32 : a == Type::kBf16 ? Format::kBf16 : Format::kF16);
  const std::size_t registers_a = static_cast<std::size_t>(i.n[0]) * 16 / (tf32 ? 32 : 64);
  return i.operands.size() == 4 && i.operands[1].elements.size() == registers_a
             ? multiply_accumulate
             : nullptr;
}

}  // namespace ptxemu
