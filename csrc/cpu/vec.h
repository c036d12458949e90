// SPDX-License-Identifier: Apache-2.0
// The thin vector type: the compiler's own vectors, and the few operations that it cannot express.
// Included once by each instruction set's translation unit, into a namespace of its own; nothing
// here may come from the standard library's templates, whose instances the linker would share
// between translation units built for different CPUs.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(SPARSE_ATTN_NEON)
#include <arm_neon.h>
#endif

#include "../core/types.h"

#define SPARSE_ATTN_INLINE static inline __attribute__((always_inline))
#define SPARSE_ATTN_INLINE_MEMBER inline __attribute__((always_inline))
#define SPARSE_ATTN_KERNEL static __attribute__((noinline))

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kPanelVecs = 4;  // row vectors that one pass of a micro-kernel keeps in registers
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kPanelVecs = 2;
constexpr int kRegisters = 16;
#elif defined(SPARSE_ATTN_NEON)
constexpr int kLanes = 4;
constexpr int kPanelVecs = 4;
constexpr int kRegisters = 32;
#else
constexpr int kLanes = 4;
constexpr int kPanelVecs = 2;
constexpr int kRegisters = 16;
#endif
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif
#if defined(__AVX512BF16__)
constexpr bool kHasBf16Dot = true;
#else
constexpr bool kHasBf16Dot = false;
#endif

constexpr int kPanelRows = kPanelVecs * kLanes;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UintVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kNegInf = -__builtin_inff();

template <int kValue>
struct Int {
  static constexpr int value = kValue;
};

template <class T>
SPARSE_ATTN_INLINE T load_as(const void* p) {
  T x;
  memcpy(&x, p, sizeof(T));
  return x;
}
SPARSE_ATTN_INLINE Vec load(const float* p) {
  return load_as<Vec>(p);
}
SPARSE_ATTN_INLINE void store(float* p, Vec x) {
  memcpy(p, &x, sizeof(x));
}
SPARSE_ATTN_INLINE Vec splat(float x) {
  return x - Vec{};
}
SPARSE_ATTN_INLINE IntVec splat_int(int32_t x) {
  return x - IntVec{};
}
template <class To, class From>
SPARSE_ATTN_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

SPARSE_ATTN_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(SPARSE_ATTN_NEON)
  return vmaxq_f32(a, b);
#else
  return a > b ? a : b;
#endif
}

// a * b + c, rounded once: logits of 1e4 would lose the digits that matter to the product's
// rounding.
SPARSE_ATTN_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
  if constexpr (kHasFma) return a * b + c;
  typedef double Wide __attribute__((vector_size(kLanes * 8)));
  const Wide product = __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide);
  return __builtin_convertvector(product + __builtin_convertvector(c, Wide), Vec);
}

// Holds x in a register: else the compiler may read memory again at each of its uses, and loads,
// not arithmetic, would bound the loop.
template <class T>
SPARSE_ATTN_INLINE void keep(T& x) {
#if defined(SPARSE_ATTN_EMULATES_AVX512)
  (void)x;
#elif defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__AVX2__)
  asm("" : "+x"(x));
#elif defined(SPARSE_ATTN_NEON)
  asm("" : "+w"(x));
#else
  (void)x;
#endif
}

// Lane i of the result is lane pick[i] of a, or lane pick[i] - kLanes of b.
SPARSE_ATTN_INLINE Vec shuffle(Vec a, Vec b, IntVec pick) {
#if defined(__clang__)
  Vec r;
  for (int i = 0; i < kLanes; ++i) r[i] = pick[i] < kLanes ? a[pick[i]] : b[pick[i] - kLanes];
  return r;
#else
  return __builtin_shuffle(a, b, pick);
#endif
}

template <int kStep>
SPARSE_ATTN_INLINE IntVec exchange_low() {  // a's lanes without the bit, b's moved up into it
  IntVec m;
  for (int i = 0; i < kLanes; ++i) m[i] = (i & kStep) ? kLanes + (i ^ kStep) : i;
  return m;
}
template <int kStep>
SPARSE_ATTN_INLINE IntVec exchange_high() {  // a's lanes with the bit moved down, b's with it
  IntVec m;
  for (int i = 0; i < kLanes; ++i) m[i] = (i & kStep) ? kLanes + i : (i | kStep);
  return m;
}

template <int kStep>
SPARSE_ATTN_INLINE void transpose_stage(Vec* x) {
  if constexpr (kStep > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & kStep) != 0) continue;
      const Vec a = x[i], b = x[i | kStep];
      x[i] = shuffle(a, b, exchange_low<kStep>());
      x[i | kStep] = shuffle(a, b, exchange_high<kStep>());
    }
    transpose_stage<kStep / 2>(x);
  }
}
SPARSE_ATTN_INLINE void transpose(Vec* x) {
  transpose_stage<kLanes / 2>(x);
}

// Lane i of the result is the sum of the lanes of x[i].
template <int kStep>
SPARSE_ATTN_INLINE Vec sum_lanes(Vec* x) {
  if constexpr (kStep == 0) {
    return x[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kStep; ++i) {
      IntVec keep, cross;  // lanes with the bit take from the second vector
      for (int l = 0; l < kLanes; ++l) {
        keep[l] = (l & kStep) ? kLanes + l : l;
        cross[l] = (l & kStep) ? kLanes + (l ^ kStep) : (l ^ kStep);
      }
      x[i] = shuffle(x[i], x[i + kStep], keep) + shuffle(x[i], x[i + kStep], cross);
    }
    return sum_lanes<kStep / 2>(x);
  }
}

template <int kStep>
SPARSE_ATTN_INLINE Vec swap_lanes(Vec x) {  // lane i of the result is lane i ^ kStep
  IntVec pick;
  for (int i = 0; i < kLanes; ++i) pick[i] = i ^ kStep;
  return shuffle(x, x, pick);
}
template <int kStep = kLanes / 2>
SPARSE_ATTN_INLINE float max_lane(Vec x) {
  if constexpr (kStep == 0) return x[0];
  return max_lane<kStep / 2>(max(x, swap_lanes<kStep>(x)));
}
template <int kStep = kLanes / 2>
SPARSE_ATTN_INLINE float add_lanes(Vec x) {
  if constexpr (kStep == 0) return x[0];
  return add_lanes<kStep / 2>(x + swap_lanes<kStep>(x));
}

// 2^x for x <= 0 (any x below 128), 0 at -inf. Relative error of kDegree 6: 6.5e-8, 4: 3e-6.
// Minimax polynomials of 2^r - 1 on [0, 1) with P(0) = 0, so that 2^0 is exactly 1.
template <int kDegree>
SPARSE_ATTN_INLINE Vec exp2_fraction(Vec r) {
  static_assert(kDegree == 4 || kDegree == 6);
  Vec p;
  if constexpr (kDegree == 6) {
    p = splat(2.161291510e-04f);
    p = p * r + 1.246784640e-03f;
    p = p * r + 9.675451573e-03f;
    p = p * r + 5.548528062e-02f;
    p = p * r + 2.402293056e-01f;
    p = p * r + 6.931470444e-01f;
  } else {
    p = splat(1.342668435e-02f);
    p = p * r + 5.224247404e-02f;
    p = p * r + 2.412802049e-01f;
    p = p * r + 6.930448449e-01f;
  }
  return p * r + 1.0f;
}

template <int kDegree>
SPARSE_ATTN_INLINE Vec exp2(Vec x) {
#if defined(__AVX512DQ__)
  // VREDUCEPS gives x - floor(x) (0 at -inf) and VSCALEFPS multiplies by 2^floor(x).
  const __m512 r = _mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return (Vec)_mm512_scalef_ps((__m512)exp2_fraction<kDegree>((Vec)r), (__m512)x);
#else
  // 2^-127 comes out as the number whose exponent bits are 0, which is 0. In this order a NaN
  // stays.
  const Vec t = max(splat(-127.0f), x);
#if defined(__AVX2__)
  const Vec floor = (Vec)_mm256_floor_ps((__m256)t);
  const IntVec n = (IntVec)_mm256_cvtps_epi32((__m256)floor);
#elif defined(SPARSE_ATTN_NEON)
  const Vec floor = vrndmq_f32(t);
  const IntVec n = vcvtq_s32_f32(floor);
#else
  IntVec n = __builtin_convertvector(t, IntVec);
  n += __builtin_convertvector(n, Vec) > t;  // true is -1
  const Vec floor = __builtin_convertvector(n, Vec);
#endif
  const Vec p = exp2_fraction<kDegree>(t - floor);
  return bits_as<Vec>(bits_as<IntVec>(p) + (n << 23));
#endif
}

SPARSE_ATTN_INLINE Vec abs(Vec x) {
  return bits_as<Vec>(bits_as<IntVec>(x) & 0x7fffffff);
}

// Absolute error below 1e-7.
SPARSE_ATTN_INLINE Vec tanh(Vec x) {
  const Vec a = abs(x);
  const Vec y = x * x;
  Vec p = splat(-5.704987201e-03f);
  p = p * y + 2.063908743e-02f;
  p = p * y + -5.373971514e-02f;
  p = p * y + 1.333144220e-01f;
  p = p * y + -3.333328194e-01f;
  const Vec small = x + x * y * p;
  const Vec e = exp2<6>(a * (-2.0f * kLog2E));
  Vec large = (1.0f - e) / (1.0f + e);
  large = x < 0.0f ? -large : large;
  return a < 0.625f ? small : large;
}

// The conversions between integer widths that GCC 12 takes apart into halves.
SPARSE_ATTN_INLINE UintVec widen_integers(HalfVec x) {
#if defined(__AVX512F__)
  return (UintVec)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (UintVec)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, UintVec);
#endif
}
SPARSE_ATTN_INLINE HalfVec narrow_integers(UintVec x) {
#if defined(__AVX512F__)
  return (HalfVec)_mm512_cvtepi32_epi16((__m512i)x);
#else
  return __builtin_convertvector(x, HalfVec);
#endif
}

SPARSE_ATTN_INLINE Vec widen_bf16(HalfVec x) {
  return bits_as<Vec>(widen_integers(x) << 16);
}
SPARSE_ATTN_INLINE Vec widen_fp16(HalfVec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps((__m256i)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps((__m128i)x);
#elif defined(SPARSE_ATTN_NEON)
  return vcvt_f32_f16(bits_as<float16x4_t>(x));
#else
  const UintVec u = __builtin_convertvector(x, UintVec);
  const UintVec magnitude = (u & 0x7fffu) << 13;
  // Rebias the exponent by a multiplication, which also makes subnormals right.
  Vec y = bits_as<Vec>(magnitude) * bits_as<float>(uint32_t{0x77800000});  // 2^112
  const UintVec special = bits_as<UintVec>(magnitude >= 0x0f800000u);
  UintVec bits = bits_as<UintVec>(y);
  bits = (special & (magnitude | 0x7f800000u)) | (~special & bits);
  return bits_as<Vec>(bits | ((u & 0x8000u) << 16));
#endif
}

SPARSE_ATTN_INLINE HalfVec narrow_bf16(Vec x) {
  const UintVec u = bits_as<UintVec>(x);
  UintVec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const UintVec nan = bits_as<UintVec>(x != x);
  rounded = (nan & ((u >> 16) | 0x40u)) | (~nan & rounded);
  return narrow_integers(rounded);
}
SPARSE_ATTN_INLINE HalfVec narrow_fp16(Vec x) {
#if defined(__AVX512F__)
  return (HalfVec)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (HalfVec)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(SPARSE_ATTN_NEON)
  return bits_as<HalfVec>(vcvt_f16_f32(x));
#else
  const UintVec u = bits_as<UintVec>(x);
  const UintVec sign = (u >> 16) & 0x8000u;
  const UintVec magnitude = u & 0x7fffffffu;
  // Normal numbers: rebias and round to nearest even; an overflow carries into infinity.
  const UintVec odd = (magnitude >> 13) & 1u;
  UintVec normal = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
  const UintVec overflow = bits_as<UintVec>(magnitude >= 0x477ff000u);
  normal = (overflow & 0x7c00u) | (~overflow & normal);
  // Subnormal results: adding 0.5 puts the rounding at the right bit.
  const Vec shifted = bits_as<Vec>(magnitude) + 0.5f;
  const UintVec subnormal = bits_as<UintVec>(shifted) - 0x3f000000u;
  const UintVec small = bits_as<UintVec>(magnitude < 0x38800000u);
  UintVec y = (small & subnormal) | (~small & normal);
  const UintVec nan = bits_as<UintVec>(magnitude > 0x7f800000u);
  y = (nan & 0x7e00u) | (~nan & y);
  return __builtin_convertvector(y | sign, HalfVec);
#endif
}

template <DType kValue>
struct Type {
  static constexpr DType value = kValue;
};

// Calls use(Type<dtype>), so that its inner loops need not ask.
template <class Fn>
SPARSE_ATTN_INLINE void with_type(DType dtype, Fn use) {
  if (dtype == DType::kFloat32) {
    use(Type<DType::kFloat32>{});
  } else if (dtype == DType::kBFloat16) {
    use(Type<DType::kBFloat16>{});
  } else {
    use(Type<DType::kFloat16>{});
  }
}

// kLanes numbers of dtype, widened.
SPARSE_ATTN_INLINE Vec load_wide(const char* p, DType dtype) {
  if (dtype == DType::kFloat32) return load_as<Vec>(p);
  const HalfVec half = load_as<HalfVec>(p);
  return dtype == DType::kBFloat16 ? widen_bf16(half) : widen_fp16(half);
}

// The first n < kLanes numbers, the rest 0: a row's tail is never read past its end.
SPARSE_ATTN_INLINE Vec load_wide_tail(const char* p, DType dtype, int n) {
  char padded[kLanes * 4] = {};
  memcpy(padded, p, n * (dtype == DType::kFloat32 ? 4 : 2));
  return load_wide(padded, dtype);
}

SPARSE_ATTN_INLINE void store_narrow(char* p, Vec x, DType dtype, int n) {
  if (dtype == DType::kFloat32) {
    if (n == kLanes) return store(reinterpret_cast<float*>(p), x);
    memcpy(p, &x, n * sizeof(float));
  } else {
    const HalfVec half = dtype == DType::kBFloat16 ? narrow_bf16(x) : narrow_fp16(x);
    memcpy(p, &half, n == kLanes ? sizeof(half) : n * sizeof(uint16_t));
  }
}

// Widens a row of n numbers (any n) into floats; `to` has room up to the next multiple of kLanes.
SPARSE_ATTN_INLINE void widen_row(const char* from, float* to, int n, DType dtype) {
  const int width = dtype == DType::kFloat32 ? 4 : 2;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load_wide(from + i * width, dtype));
  if (i < n) store(to + i, load_wide_tail(from + i * width, dtype, n - i));
}

SPARSE_ATTN_INLINE void narrow_row(const float* from, char* to, int64_t n, DType dtype) {
  const int width = dtype == DType::kFloat32 ? 4 : 2;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_narrow(to + i * width, load(from + i), dtype, kLanes);
  if (i < n) {
    float padded[kLanes] = {};
    memcpy(padded, from + i, (n - i) * sizeof(float));
    store_narrow(to + i * width, load(padded), dtype, static_cast<int>(n - i));
  }
}

// Asks for a row's cache lines: kLevel 1 for L1, 2 for L2.
template <int kLevel>
SPARSE_ATTN_INLINE void prefetch_row(const char* p, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 4 - kLevel);
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
