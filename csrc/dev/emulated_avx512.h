// SPDX-License-Identifier: Apache-2.0
// The AVX-512 intrinsics that csrc/cpu uses, in plain C++ on AVX2: lets the AVX-512 kernels be
// tested on a CPU without those instructions (SPARSE_ATTN_EMULATE_AVX512 in CMakeLists.txt, which
// includes this file before the kernels). Slow; for tests only.
// Source: the operations as Intel's Software Developer's Manual, volume 2, defines them.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace sparse_attn::emulated {

#define SPARSE_ATTN_EMULATED static inline __attribute__((always_inline))
// What has many steps stays a call: hundreds of copies would take minutes to compile.
#define SPARSE_ATTN_EMULATED_CALL static __attribute__((noinline, unused))

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int16_t Shorts __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(64)));
typedef int16_t HalfShorts __attribute__((vector_size(32)));
typedef uint16_t HalfWords __attribute__((vector_size(32)));

SPARSE_ATTN_EMULATED __m512 join(__m256 low, __m256 high) {
  __m512 x;
  memcpy(&x, &low, 32);
  memcpy(reinterpret_cast<char*>(&x) + 32, &high, 32);
  return x;
}
template <class Half, class Whole>
SPARSE_ATTN_EMULATED Half half_of(Whole x, int which) {
  Half y;
  memcpy(&y, reinterpret_cast<const char*>(&x) + 32 * which, 32);
  return y;
}

// Aligned: vmovdqa of the halves and the undefined-behaviour sanitizer both notice a stray address.
SPARSE_ATTN_EMULATED __m512i load_si512(const void* p) {
  return *static_cast<const __m512i*>(p);
}
SPARSE_ATTN_EMULATED void store_si512(void* p, __m512i x) {
  *static_cast<__m512i*>(p) = x;
}
SPARSE_ATTN_EMULATED __m512i loadu_si512(const void* p) {
  __m512i x;
  memcpy(&x, p, sizeof(x));
  return x;
}
// Masked lanes are not touched in memory.
SPARSE_ATTN_EMULATED_CALL __m512i maskz_loadu_epi16(__mmask32 mask, const void* p) {
  Shorts x = {};
  for (int i = 0; i < 32; ++i) {
    int16_t lane = 0;
    if ((mask >> i) & 1) memcpy(&lane, static_cast<const char*>(p) + 2 * i, 2);
    x[i] = lane;
  }
  return (__m512i)x;
}

SPARSE_ATTN_EMULATED __m512i set1_epi32(int32_t x) {
  return (__m512i)(x - Ints{});
}
SPARSE_ATTN_EMULATED __m512i set1_epi16(int16_t x) {
  return (__m512i)(x - Shorts{});
}
template <class... Lanes>
SPARSE_ATTN_EMULATED __m512i set_epi16(Lanes... highest_first) {
  static_assert(sizeof...(Lanes) == 32);
  const int lanes[32] = {highest_first...};
  Shorts x;
  for (int i = 0; i < 32; ++i) x[i] = static_cast<int16_t>(lanes[31 - i]);
  return (__m512i)x;
}
SPARSE_ATTN_EMULATED __m512i add_epi16(__m512i a, __m512i b) {
  return (__m512i)((Halves)a + (Halves)b);
}
SPARSE_ATTN_EMULATED_CALL __m512i permutexvar_epi16(__m512i index, __m512i a) {
  Shorts r;
  for (int i = 0; i < 32; ++i) r[i] = ((Shorts)a)[((Shorts)index)[i] & 31];
  return (__m512i)r;
}
SPARSE_ATTN_EMULATED_CALL __m512i permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
  Shorts r;
  for (int i = 0; i < 32; ++i) {
    const int from = ((Shorts)index)[i];
    r[i] = (from & 32) != 0 ? ((Shorts)b)[from & 31] : ((Shorts)a)[from & 31];
  }
  return (__m512i)r;
}

// Lane i is lane pick[i] of a, or lane pick[i] - 16 of b. The compiler's own, on vectors wider than
// the CPU's, takes minutes under the sanitizers.
SPARSE_ATTN_EMULATED_CALL Floats shuffle(Floats a, Floats b, Ints pick) {
  float both[32], r[16];
  memcpy(both, &a, 64);
  memcpy(both + 16, &b, 64);
  for (int i = 0; i < 16; ++i) r[i] = both[pick[i] & 31];
  memcpy(&a, r, 64);
  return a;
}

// If one operand is a NaN, the second is returned.
SPARSE_ATTN_EMULATED __m512 max_ps(__m512 a, __m512 b) {
  return join(_mm256_max_ps(half_of<__m256>(a, 0), half_of<__m256>(b, 0)),
              _mm256_max_ps(half_of<__m256>(a, 1), half_of<__m256>(b, 1)));
}
SPARSE_ATTN_EMULATED float reduce_max_ps(__m512 x) {
  const __m256 m = _mm256_max_ps(half_of<__m256>(x, 0), half_of<__m256>(x, 1));
  float top = m[0];
  for (int i = 1; i < 8; ++i) top = m[i] > top ? m[i] : top;
  return top;
}
SPARSE_ATTN_EMULATED float reduce_add_ps(__m512 x) {
  const __m256 s = half_of<__m256>(x, 0) + half_of<__m256>(x, 1);
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

SPARSE_ATTN_EMULATED __m512 floor_ps(__m512 x) {
  return join(_mm256_floor_ps(half_of<__m256>(x, 0)), _mm256_floor_ps(half_of<__m256>(x, 1)));
}
// x - floor(x); 0 for an infinity.
template <int kControl>
SPARSE_ATTN_EMULATED __m512 reduce_ps(__m512 x) {
  static_assert(kControl == (_MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
  const Words infinite = (Words)(((Words)x & 0x7fffffffu) == 0x7f800000u);
  return (__m512)((Words)(x - floor_ps(x)) & ~infinite);
}
// a * 2^floor(b). In steps that a float's exponent holds: b beyond +-508 acts as an infinity does.
SPARSE_ATTN_EMULATED_CALL __m512 scalef_ps(__m512 a, __m512 b) {
  const Floats whole = floor_ps(b);
  const Floats low = whole < -508.0f ? Floats{} - 508.0f : whole;
  Floats rest = low > 508.0f ? Floats{} + 508.0f : low;
  Floats y = a;
  for (int i = 0; i < 4; ++i) {
    Floats step = rest > 127.0f ? Floats{} + 127.0f : rest;
    step = step < -126.0f ? Floats{} - 126.0f : step;
    rest -= step;
    y *= (Floats)((__builtin_convertvector(step, Ints) + 127) << 23);
  }
  return b == b ? y : (Floats)b;
}

SPARSE_ATTN_EMULATED __m512i cvtepu16_epi32(__m256i x) {
  return (__m512i) __builtin_convertvector((HalfWords)x, Words);
}
SPARSE_ATTN_EMULATED __m256i cvtepi32_epi16(__m512i x) {
  return (__m256i) __builtin_convertvector((Ints)x, HalfShorts);
}
SPARSE_ATTN_EMULATED __m512 cvtph_ps(__m256i x) {
  return join(_mm256_cvtph_ps(_mm256_castsi256_si128(x)),
              _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1)));
}
template <int kControl>
SPARSE_ATTN_EMULATED __m256i cvtps_ph(__m512 x) {
  const __m128i low = _mm256_cvtps_ph(half_of<__m256>(x, 0), kControl);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                 _mm256_cvtps_ph(half_of<__m256>(x, 1), kControl), 1);
}

// The bf16 instructions take denormal numbers for zeros of their sign.
SPARSE_ATTN_EMULATED Floats without_denormals(Floats x) {
  const Words bits = (Words)x;
  const Words denormal = (Words)((bits & 0x7f800000u) == 0u);
  return (Floats)(bits & (~denormal | 0x80000000u));
}
SPARSE_ATTN_EMULATED Words rounded_bf16(Floats x) {
  const Words bits = (Words)without_denormals(x);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words nan = (Words)(x != x);
  return (nan & ((bits >> 16) | 0x40u)) | (~nan & rounded);
}
// The lower half of the result is from the second operand.
SPARSE_ATTN_EMULATED_CALL __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {
  Halves r;
  const Words a = rounded_bf16(low), b = rounded_bf16(high);
  for (int i = 0; i < 16; ++i) {
    r[i] = static_cast<uint16_t>(a[i]);
    r[i + 16] = static_cast<uint16_t>(b[i]);
  }
  return (__m512bh)r;
}
// sum + a[odd] b[odd], then + a[even] b[even], each rounded once (to nearest, denormals to zero).
SPARSE_ATTN_EMULATED_CALL __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const auto part = [](__m512bh x, bool odd) {
    const Words pair = (Words)x;
    return without_denormals((Floats)(odd ? pair & 0xffff0000u : pair << 16));
  };
  const Floats first = part(a, true) * part(b, true) + without_denormals(sum);
  return without_denormals(part(a, false) * part(b, false) + without_denormals(first));
}

#undef SPARSE_ATTN_EMULATED
#undef SPARSE_ATTN_EMULATED_CALL

}  // namespace sparse_attn::emulated

// From here on the code that follows believes in the instructions. The intrinsics' own headers have
// been read already, so these macros cannot change them.
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#define SPARSE_ATTN_EMULATES_AVX512 1  // no 512-bit registers

#define __builtin_shuffle ::sparse_attn::emulated::shuffle
#define _mm512_load_si512 ::sparse_attn::emulated::load_si512
#define _mm512_loadu_si512 ::sparse_attn::emulated::loadu_si512
#define _mm512_store_si512 ::sparse_attn::emulated::store_si512
#define _mm512_maskz_loadu_epi16 ::sparse_attn::emulated::maskz_loadu_epi16
#define _mm512_set1_epi32 ::sparse_attn::emulated::set1_epi32
#define _mm512_set1_epi16 ::sparse_attn::emulated::set1_epi16
#define _mm512_set_epi16 ::sparse_attn::emulated::set_epi16
#define _mm512_add_epi16 ::sparse_attn::emulated::add_epi16
#define _mm512_permutexvar_epi16 ::sparse_attn::emulated::permutexvar_epi16
#define _mm512_permutex2var_epi16 ::sparse_attn::emulated::permutex2var_epi16
#define _mm512_max_ps ::sparse_attn::emulated::max_ps
#define _mm512_reduce_max_ps ::sparse_attn::emulated::reduce_max_ps
#define _mm512_reduce_add_ps ::sparse_attn::emulated::reduce_add_ps
#undef _mm512_reduce_ps
#define _mm512_reduce_ps(x, control) ::sparse_attn::emulated::reduce_ps<(control)>(x)
#define _mm512_scalef_ps ::sparse_attn::emulated::scalef_ps
#define _mm512_cvtepu16_epi32 ::sparse_attn::emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 ::sparse_attn::emulated::cvtepi32_epi16
#define _mm512_cvtph_ps ::sparse_attn::emulated::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(x, control) ::sparse_attn::emulated::cvtps_ph<(control)>(x)
#define _mm512_cvtne2ps_pbh ::sparse_attn::emulated::cvtne2ps_pbh
#define _mm512_dpbf16_ps ::sparse_attn::emulated::dpbf16_ps
