// SPDX-License-Identifier: Apache-2.0
// What one core of this machine can do: multiply-adds from registers, and reading memory.
// Compiled by machine.py for the CPU that it runs on (-march=native), called through ctypes.
#include <cstddef>
#include <cstdint>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

// More chains than latency x ports (4 x 2) hides the latency; 12 leave registers for the operands.
constexpr int kChains = 12;

template <typename V>
double fma_peak(std::int64_t iterations, double* sink) {
    constexpr int kLanes = sizeof(V) / sizeof(float);
    const V zero = {};
    const V factor = zero + 0.999f, addend = zero + 1e-3f;
    V sums[kChains];
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = zero + 1e-3f * chain;
    for (std::int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
        for (int chain = 0; chain < kChains; ++chain) {
            sums[chain] = sums[chain] * factor + addend;
        }
    }
    V sum = zero;
    for (int chain = 0; chain < kChains; ++chain) sum += sums[chain];
    *sink += sum[0];
    return 2.0 * kLanes * kChains * static_cast<double>(iterations);
}

typedef float Vec16 __attribute__((vector_size(16)));
typedef float Vec32 __attribute__((vector_size(32)));
typedef float Vec64 __attribute__((vector_size(64)));

}  // namespace

// Floating-point operations done by `iterations` rounds, 0 if this CPU has no such instruction.
// bits: width of the vectors of float32, or 16 for 512-bit dot products of bfloat16 pairs.
extern "C" double machine_fma(int bits, std::int64_t iterations, double* sink) {
#if defined(__FMA__) || !defined(__x86_64__)
    if (bits == 128) return fma_peak<Vec16>(iterations, sink);
#endif
#ifdef __FMA__
    if (bits == 256) return fma_peak<Vec32>(iterations, sink);
#endif
#ifdef __AVX512F__
    if (bits == 512) return fma_peak<Vec64>(iterations, sink);
#endif
#ifdef __AVX512BF16__
    if (bits == 16) {
        __m512 sums[kChains];
        for (int chain = 0; chain < kChains; ++chain) sums[chain] = _mm512_setzero_ps();
        const __m512i one = _mm512_set1_epi32(0x3f803f80), small = _mm512_set1_epi32(0x3c003c00);
        for (std::int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
            for (int chain = 0; chain < kChains; ++chain) {
                sums[chain] = _mm512_dpbf16_ps(sums[chain], (__m512bh)one, (__m512bh)small);
            }
        }
        for (int chain = 0; chain < kChains; ++chain) *sink += _mm512_reduce_add_ps(sums[chain]);
        return 64.0 * kChains * static_cast<double>(iterations);
    }
#endif
    return 0;
}

// Sum of `bytes` bytes at `data` (64-byte aligned, a multiple of 1024), read once in order.
extern "C" std::int64_t machine_read(const void* data, std::size_t bytes) {
    // As wide as the registers are: wider sums are spilled, and bound the loop instead of memory.
#ifdef __AVX512F__
    constexpr int kBytes = 64;
#elif defined(__AVX2__)
    constexpr int kBytes = 32;
#else
    constexpr int kBytes = 16;
#endif
    typedef std::int64_t Vec __attribute__((vector_size(kBytes)));
    constexpr int kLanes = kBytes / sizeof(std::int64_t);
    const Vec* line = static_cast<const Vec*>(data);
    const Vec* end = line + bytes / sizeof(Vec);
    Vec sums[8] = {};
    for (; line < end; line += 8) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) sums[i] += line[i];
    }
    std::int64_t total = 0;
    for (int i = 0; i < 8; ++i) {
        for (int lane = 0; lane < kLanes; ++lane) total += sums[i][lane];
    }
    return total;
}
