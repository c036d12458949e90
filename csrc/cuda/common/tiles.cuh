// SPDX-License-Identifier: Apache-2.0
// Shared-memory tiles and warp-level products that the attention kernels have in common.
#pragma once

#include <cutlass/numeric_conversion.h>
#include <cute/tensor.hpp>

#include "keys.cuh"

namespace sparse_attn::cuda {

using namespace cute;

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Tiles of rows of kHeadDim elements, swizzled so that neither copies nor ldmatrix meet a bank
// twice.
template <class Element_, int kHeadDim>
struct TileLayouts {
  using Element = Element_;
  static constexpr int kColumns = kHeadDim % 64 == 0 ? 64 : 32;
  using Swizzled =
      decltype(composition(Swizzle<kColumns == 64 ? 3 : 2, 3, 3>{},
                           Layout<Shape<_8, Int<kColumns>>, Stride<Int<kColumns>, _1>>{}));
  template <int kRows>
  using Rows = decltype(tile_to_shape(Swizzled{}, Shape<Int<kRows>, Int<kHeadDim>>{}));
  using Keys = Rows<kChunkKeys>;
  using Transposed = decltype(composition(
      Keys{}, make_layout(Shape<Int<kHeadDim>, Int<kChunkKeys>>{}, GenRowMajor{})));
  static constexpr int kKeysElements = cosize_v<Keys>;

  using Atom = conditional_t<is_same_v<Element, cutlass::half_t>, SM80_16x8x16_F32F16F16F32_TN,
                             SM80_16x8x16_F32BF16BF16F32_TN>;
  // One warp: every warp multiplies tiles of its own.
  using Mma = TiledMMA<MMA_Atom<Atom>, Layout<Shape<_1, _1, _1>>, cute::Tile<_16, _16, _16>>;
};

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh with an absolute error of 2e-7, from the same exponential.
__device__ inline float tanh_fast(float x) {
  return 1.0f - 2.0f / (exp2_fast(2.0f * kLog2e * x) + 1.0f);
}

// Two numbers rounded to a type, as bits, the first one low.
template <class Element>
__device__ inline uint32_t pack_pair(float low, float high) {
  const cutlass::Array<Element, 2> pair =
      cutlass::NumericArrayConverter<Element, float, 2>::convert({low, high});
  return reinterpret_cast<const uint32_t&>(pair);
}

// 16 bytes to shared memory, or zeros.
__device__ inline void copy_async(void* to, const void* from, bool valid) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(cast_smem_ptr_to_uint(to)),
      "l"(from), "r"(valid ? 16 : 0)
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
template <bool kRaw, class Scores, class Out>
CUTE_DEVICE void softmax_step(RowState& state, Scores& scores, Out& out, float scale) {
  CUTE_UNROLL
  for (int half = 0; half < 2; ++half) {
    float top = -INFINITY;
    CUTE_UNROLL
    for (int n = 0; n < size<2>(scores); ++n)
      top = fmaxf(top, fmaxf(scores(2 * half, 0, n), scores(2 * half + 1, 0, n)));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    top = fmaxf(state.top[half], kRaw ? top * scale : top);
    const float base = top == -INFINITY ? 0.0f : top;  // -inf minus -inf would be NaN
    const float rescale = exp2_fast(state.top[half] - base);
    float sum = 0.0f;
    CUTE_UNROLL
    for (int n = 0; n < size<2>(scores); ++n) {
      CUTE_UNROLL
      for (int side = 0; side < 2; ++side) {
        float& score = scores(2 * half + side, 0, n);
        score = exp2_fast(kRaw ? fmaf(score, scale, -base) : score - base);
        sum += score;
      }
    }
    state.sum[half] = state.sum[half] * rescale + sum;
    state.top[half] = top;
    if (fault(6)) continue;
    CUTE_UNROLL
    for (int n = 0; n < size<2>(out); ++n) {
      out(2 * half, 0, n) *= rescale;
      out(2 * half + 1, 0, n) *= rescale;
    }
  }
}

// Weights as the A operand of the product with V.
template <class Element, class Scores, class Weights>
CUTE_DEVICE void round_weights(const Scores& scores, Weights& weights) {
  Tensor words = recast<uint32_t>(weights);
  CUTE_UNROLL
  for (int n = 0; n < size<2>(scores); ++n) {
    words(2 * n) = pack_pair<Element>(scores(0, 0, n), scores(1, 0, n));
    words(2 * n + 1) = pack_pair<Element>(scores(2, 0, n), scores(3, 0, n));
  }
}

}  // namespace sparse_attn::cuda
