// SPDX-License-Identifier: Apache-2.0
// ldmatrix, stmatrix, movmatrix: 8x8 matrices of 16-bit elements between shared memory and the
// fragments of mma (PTX ISA, "Warp-level matrix load/store/transpose instruction").
#include <algorithm>

#include "decode.h"

namespace ptxemu {
namespace {

/// Eight rows of 16 bytes.
using Matrix = std::array<std::array<u16, 8>, 8>;

const Operand& element(const Operand& o, std::size_t index) {
  return o.kind == OperandKind::kVector ? o.elements[index] : o;
}

/// A shared address from an operand that may also be a generic address into shared memory.
u64 shared_address(Step& s, u64 address, int lane) {
  if (s.instruction.space == Space::kShared) return address;
  if (!(address & kSharedWindow))
    s.fail("bounds", s.instruction.parts[0] + " outside shared memory", lane);
  return address & (kSharedWindow - 1);
}

/// Elements 2*(lane%4) and the next of row lane/4; transposed: of column lane/4.
u32 fragment(const Matrix& matrix, int lane, bool transposed) {
  const int row = lane / 4, column = 2 * (lane % 4);
  const u16 low = transposed ? matrix[column][row] : matrix[row][column];
  const u16 high = transposed ? matrix[column + 1][row] : matrix[row][column + 1];
  return low | u32{high} << 16;
}
void set_fragment(Matrix& matrix, int lane, bool transposed, u32 value) {
  const int row = lane / 4, column = 2 * (lane % 4);
  (transposed ? matrix[column][row] : matrix[row][column]) = static_cast<u16>(value);
  (transposed ? matrix[column + 1][row] : matrix[row][column + 1]) = static_cast<u16>(value >> 16);
}

// n[0]: matrices, n[1]: .trans. Lane 8 * m + r gives the address of row r of matrix m.
void load_matrix(Step& s) {
  if (!s.converge_full()) return;
  const int count = s.instruction.n[0];
  std::array<Matrix, 4> matrices;
  for (int l = 0; l < 8 * count; ++l) {
    const Step::Place place = s.shared(shared_address(s, s.address(1, l), l), 16, false, l, 16);
    s.record(place, 16, s.actor(l), false, l);
    std::memcpy(matrices[l / 8][l % 8].data(), place.data, 16);
  }
  for (int m = 0; m < count; ++m) {
    u64* d = s.out(element(s.operand(0), m));
    s.each([&](int l) { d[l] = fragment(matrices[m], l, s.instruction.n[1] != 0); });
  }
}

void store_matrix(Step& s) {
  if (!s.converge_full()) return;
  const int count = s.instruction.n[0];
  std::array<Matrix, 4> matrices;
  for (int m = 0; m < count; ++m) {
    const u64* a = s.in(element(s.operand(1), m));
    s.each([&](int l) {
      set_fragment(matrices[m], l, s.instruction.n[1] != 0, static_cast<u32>(a[l]));
    });
  }
  s.machine.progress++;
  for (int l = 0; l < 8 * count; ++l) {
    const Step::Place place =
        s.shared(shared_address(s, s.address(std::size_t{0}, l), l), 16, true, l, 16);
    s.record(place, 16, s.actor(l), true, l);
    std::memcpy(place.data, matrices[l / 8][l % 8].data(), 16);
  }
}

void move_matrix(Step& s) {
  if (!s.converge_full()) return;
  Matrix matrix;
  const u64* a = s.in(1);
  s.each([&](int l) { set_fragment(matrix, l, false, static_cast<u32>(a[l])); });
  u64* d = s.out(std::size_t{0});
  s.each([&](int l) { d[l] = fragment(matrix, l, true); });
}

}  // namespace

Handler decode_matrix(Instruction& i, Modifiers& m) {
  const bool aligned = m.flag("sync") && m.flag("aligned");
  if (!aligned || !m.flag("m8n8")) return nullptr;
  const int count = m.choice({"x1", "x2", "x4"});
  i.n[0] = count <= 0 ? 1 : 2 * count;
  i.n[1] = m.flag("trans");
  i.space = m.space();
  if (m.type() != Type::kB16) return nullptr;
  if (i.parts[0] == "movmatrix") return i.n[1] ? move_matrix : nullptr;
  return i.parts[0] == "ldmatrix" ? load_matrix : store_matrix;
}

}  // namespace ptxemu
