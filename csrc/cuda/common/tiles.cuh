// SPDX-License-Identifier: Apache-2.0
// Shared-memory tiles and warp-level products that the attention kernels have in common.
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/layout.hpp>
#include <cute/layout_composed.hpp>
#include <cute/swizzle_layout.hpp>

#include "keys.cuh"

namespace sparse_attn::cuda {

using namespace cute;

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Tiles of rows of kHeadDim elements, swizzled so that neither copies nor ldmatrix meet a bank
// twice.
template <class Element_, int kHeadDim_>
struct TileLayouts {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kColumns = kHeadDim % 64 == 0 ? 64 : 32;
  using Banks = Swizzle<kColumns == 64 ? 3 : 2, 3, 3>;
  using Swizzled =
      decltype(composition(Banks{}, Layout<Shape<_8, Int<kColumns>>, Stride<Int<kColumns>, _1>>{}));
  template <int kRows>
  using Rows = decltype(tile_to_shape(Swizzled{}, Shape<Int<kRows>, Int<kHeadDim>>{}));
  using Keys = Rows<kChunkKeys>;
  // Where a tile of this layout has an element.
  template <class Tile>
  static CUTE_DEVICE int element(int row, int column) {
    const int at = Tile{}(row, column);
    return fault(18) ? static_cast<int>(Banks{}(at)) : at;  // swizzling again undoes it
  }
  static constexpr int kKeysElements = cosize_v<Keys>;
  static constexpr uint32_t kTileBytes = kKeysElements * sizeof(Element);

  using Atom = conditional_t<is_same_v<Element, cutlass::half_t>, SM80_16x8x16_F32F16F16F32_TN,
                             SM80_16x8x16_F32BF16BF16F32_TN>;
};

// Accumulators of a warp's 16 rows and 8 * kTiles columns: of tile n a lane has the columns
// 8 n + 2 (lane % 4) + {0, 1}, of row lane / 4 in elements 0 and 1 and of row lane / 4 + 8 in 2 and
// 3.
template <int kTiles>
using Accumulators = float[kTiles][4];

// Adds the product of 16 x 16 numbers by 16 x 16 to two tiles. Operands are as load_matrices leaves
// them.
template <class Atom>
CUTE_DEVICE void multiply(const uint32_t (&a)[4], const uint32_t (&b)[4], float (&first)[4],
                          float (&second)[4]) {
  Atom::fma(first[0], first[1], first[2], first[3], a[0], a[1], a[2], a[3], b[0], b[1], first[0],
            first[1], first[2], first[3]);
  Atom::fma(second[0], second[1], second[2], second[3], a[0], a[1], a[2], a[3], b[2], b[3],
            second[0], second[1], second[2], second[3]);
}

// 16 x 16 numbers from shared memory as an operand of the product.
CUTE_DEVICE void load_matrices(uint32_t address, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address));
}
CUTE_DEVICE void load_transposed(uint32_t address, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.x4.trans.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address));
}

// Addresses of a lane for the 16 x 16 pieces of a tile. The swizzle permutes what lies within
// kColumns columns, so there are kColumns / 16 of them; all others are constants away.
template <class L, class Layout>
struct PieceAddresses {
  static constexpr int kAddresses = L::kColumns / 16;
  uint32_t at[kAddresses];

  PieceAddresses() = default;
  CUTE_DEVICE PieceAddresses(const typename L::Element* tile, int row, int column) {
    CUTE_UNROLL
    for (int i = 0; i < kAddresses; ++i)
      at[i] = cast_smem_ptr_to_uint(tile + L::template element<Layout>(row, column + i * 16));
  }
  // The same in a tile that lies so many bytes behind, and may have more or fewer rows.
  template <class Other = Layout>
  CUTE_DEVICE PieceAddresses<L, Other> behind(uint32_t bytes) const {
    PieceAddresses<L, Other> moved;
    CUTE_UNROLL
    for (int i = 0; i < kAddresses; ++i) moved.at[i] = at[i] + bytes;
    return moved;
  }
  // Of the piece at these multiples of 16.
  CUTE_DEVICE uint32_t operator()(int row, int column) const {
    return at[column / 16 % kAddresses] +
           Layout{}(row, column / L::kColumns * L::kColumns) * sizeof(typename L::Element);
  }
};

// Lanes give the rows of the four matrices: of K (16 keys, B), and of V (16 keys, B, transposed),
// which are those of Q too (16 rows, A).
template <class L>
CUTE_DEVICE PieceAddresses<L, typename L::Keys> k_addresses(const typename L::Element* tile,
                                                            int row, int lane) {
  return {tile, row + lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8};
}
template <class L>
CUTE_DEVICE PieceAddresses<L, typename L::Keys> v_addresses(const typename L::Element* tile,
                                                            int row, int lane) {
  return {tile, row + lane % 16, lane / 16 * 8};
}

// What a warp multiplies: sixteen rows of Q by kKeys keys of every chunk, from this row and this
// key on. Q stays in registers, or is loaded piece by piece.
template <class L, int kRows, int kKeys, bool kSharedQ>
struct WarpProducts {
  using Element = typename L::Element;
  using Atom = typename L::Atom;
  static constexpr int kSteps = L::kHeadDim / 16;
  using QLayout = typename L::template Rows<kRows>;

  PieceAddresses<L, typename L::Keys> at_k, at_v;  // in the first tile of the ring
  uint32_t q_behind;                               // bytes from V's first key to Q's first row
  uint32_t q[kSharedQ ? 1 : kSteps][4];

  CUTE_DEVICE WarpProducts(const Element* q_tile, const Element* ring, int row, int key, int lane)
      : at_k(k_addresses<L>(ring, key, lane)),
        at_v(v_addresses<L>(ring, key, lane)),
        q_behind(cast_smem_ptr_to_uint(q_tile + row * L::kColumns) -
                 cast_smem_ptr_to_uint(ring + key * L::kColumns)) {}

  // Both begin at rows of whole atoms: the swizzle is the same.
  CUTE_DEVICE PieceAddresses<L, QLayout> at_q() const {
    return at_v.template behind<QLayout>(q_behind);
  }

  CUTE_DEVICE void load_q() {
    const auto at = at_q();
    CUTE_UNROLL
    for (int step = 0; step < kSteps; ++step) load_matrices(at(0, step * 16), q[step]);
  }

  // scores = Q K^T, of the K at a place of the ring.
  CUTE_DEVICE void scores(uint32_t place, Accumulators<kKeys / 8>& scores) {
    const auto at = at_k.behind(place * L::kTileBytes);
    const auto q_at = at_q();
    CUTE_UNROLL
    for (int n = 0; n < kKeys / 8; ++n) {
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
    }
    CUTE_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      if constexpr (kSharedQ) load_matrices(q_at(0, step * 16), q[0]);
      CUTE_UNROLL
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t keys[4];
        load_matrices(at(n * 16, step * 16), keys);
        multiply<Atom>(q[kSharedQ ? 0 : step], keys, scores[2 * n], scores[2 * n + 1]);
      }
    }
  }

  // out += P V, of the V at a place of the ring.
  CUTE_DEVICE void sum_values(uint32_t place, const uint32_t (&weights)[kKeys / 16][4],
                              Accumulators<L::kHeadDim / 8>& out) const {
    const auto at = at_v.behind(place * L::kTileBytes);
    CUTE_UNROLL
    for (int step = 0; step < kKeys / 16; ++step) {
      CUTE_UNROLL
      for (int n = 0; n < kSteps; ++n) {
        uint32_t values[4];
        load_transposed(at(step * 16, n * 16), values);
        multiply<Atom>(weights[step], values, out[2 * n], out[2 * n + 1]);
      }
    }
  }
};

// threadIdx.x, in a way that what follows from it is computed anew where a kernel loops over tiles:
// in registers that would be kept for it, the main loop has something better.
__device__ inline int thread_anew() {
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  return thread;
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh with an absolute error of 2e-7, from the same exponential.
__device__ inline float tanh_fast(float x) {
  return 1.0f - __fdividef(2.0f, exp2_fast(2.0f * kLog2e * x) + 1.0f);
}

// Two numbers rounded to a type, as bits, the first one low.
template <class Element>
__device__ inline uint32_t pack_pair(float low, float high) {
  uint32_t pair;
  if constexpr (is_same_v<Element, cutlass::half_t>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// 16 bytes to shared memory, or zeros.
__device__ inline void copy_async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

template <class Element>
__device__ inline Element* row_of(const TensorView& x, int64_t batch, int64_t head, int64_t row) {
  return reinterpret_cast<Element*>(x.data) + batch * x.batch_stride + head * x.head_stride +
         row * x.row_stride;
}

// The softmax of a thread's two rows (lane / 4 and lane / 4 + 8 of its warp's sixteen): maximum in
// base 2, sum over the thread's own columns.
struct RowState {
  float top[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};
};

// Turns scores into weights and rescales what was summed up to now. Logits in base 2 are
// scores * scale if kRaw (scale > 0), and the scores themselves if not.
template <bool kRaw, int kTiles, int kOutTiles>
CUTE_DEVICE void softmax_step(RowState& state, Accumulators<kTiles>& scores,
                              Accumulators<kOutTiles>& out, float scale) {
  float rescale[2];
  CUTE_UNROLL
  for (int half = 0; half < 2; ++half) {
    float top = fmaxf(scores[0][2 * half], scores[0][2 * half + 1]);
    CUTE_UNROLL
    for (int n = 1; n < kTiles; ++n)
      top = fmaxf(top, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    top = fmaxf(state.top[half], kRaw ? top * scale : top);
    const float base = top == -INFINITY ? 0.0f : top;  // -inf minus -inf would be NaN
    rescale[half] = exp2_fast(state.top[half] - base);
    float sum = 0.0f;
    CUTE_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      CUTE_UNROLL
      for (int side = 0; side < 2; ++side) {
        float& score = scores[n][2 * half + side];
        score = exp2_fast(kRaw ? fmaf(score, scale, -base) : score - base);
        sum += score;
      }
    }
    state.sum[half] = fmaf(state.sum[half], rescale[half], sum);
    state.top[half] = top;
  }
  // Maxima grow seldom after the first chunks.
  const bool grown = rescale[0] != 1.0f || rescale[1] != 1.0f;
  if (!__any_sync(0xffffffffu, grown) || fault(6)) return;
  CUTE_UNROLL
  for (int n = 0; n < kOutTiles; ++n) {
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) out[n][i] *= rescale[i / 2];
  }
}

// Weights of 16 keys as the A operand of the product with V.
template <class Element, int kTiles>
CUTE_DEVICE void round_weights(const Accumulators<kTiles>& scores,
                               uint32_t (&weights)[kTiles / 2][4]) {
  CUTE_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half)
      weights[n / 2][n % 2 * 2 + half] =
          pack_pair<Element>(scores[n][2 * half], scores[n][2 * half + 1]);
  }
}

}  // namespace sparse_attn::cuda
