// SPDX-License-Identifier: Apache-2.0
// Rows combined into one: sums, minima, maxima and sums of directions of rows in memory order; and
// the softmax of a row of cells. What block-sparse estimators are built from.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

template <Pool kKind>
SPARSE_ATTN_INLINE Vec pool_two(Vec a, Vec b) {
  if constexpr (kKind == Pool::kMin) return -max(-a, -b);
  if constexpr (kKind == Pool::kMax) return max(a, b);
  return a + b;
}

// Four rows at a time: the running result is read and written once for them, and a sum is shallow.
template <Pool kKind, DType kType>
SPARSE_ATTN_KERNEL void pool_typed(const char* from, int64_t row_bytes, int rows, int width,
                                   float* to) {
  constexpr int kWidth = kType == DType::kFloat32 ? 4 : 2;
  for (int r = 0; r < rows; r += 4) {
    const int last = rows - r < 4 ? rows - r - 1 : 3;
    const char* row[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) row[i] = from + (r + (i < last ? i : last)) * row_bytes;
    const auto combine = [&](int d, auto read) __attribute__((always_inline)) {
      Vec x = read(row[0] + d * kWidth);
      if (last == 3) {
        const Vec y = pool_two<kKind>(read(row[2] + d * kWidth), read(row[3] + d * kWidth));
        x = pool_two<kKind>(pool_two<kKind>(x, read(row[1] + d * kWidth)), y);
      } else {
        for (int i = 1; i <= last; ++i) x = pool_two<kKind>(x, read(row[i] + d * kWidth));
      }
      store(to + d, pool_two<kKind>(load(to + d), x));
    };
    int d = 0;
    for (; d + kLanes <= width; d += kLanes)
      combine(d, [](const char* p) __attribute__((always_inline)) { return load_wide(p, kType); });
    if (d < width)
      combine(d, [&](const char* p) __attribute__((always_inline)) {
        return load_wide_tail(p, kType, width - d);
      });
  }
}

// to += row / |row|; a row of zeros adds nothing.
template <DType kType>
SPARSE_ATTN_KERNEL void pool_directions(const char* from, int64_t row_bytes, int rows, int width,
                                        float* to) {
  constexpr int kWidth = kType == DType::kFloat32 ? 4 : 2;
  for (int r = 0; r < rows; ++r) {
    const char* row = from + r * row_bytes;
    Vec square{};
    int d = 0;
    for (; d + kLanes <= width; d += kLanes) {
      const Vec x = load_wide(row + d * kWidth, kType);
      square += x * x;
    }
    const Vec tail = d < width ? load_wide_tail(row + d * kWidth, kType, width - d) : Vec{};
    const float norm = __builtin_sqrtf(add_lanes(square + tail * tail));
    const Vec inverse = splat(norm > 0.0f ? 1.0f / norm : 0.0f);
    for (int i = 0; i + kLanes <= width; i += kLanes)
      store(to + i, load(to + i) + load_wide(row + i * kWidth, kType) * inverse);
    if (d < width) store(to + d, load(to + d) + tail * inverse);
  }
}

// Combines `rows` rows of `width` numbers of dtype into to, which has room up to the next multiple
// of kLanes. For kMean and kDirection, to is a running sum.
SPARSE_ATTN_KERNEL void pool_rows(const char* from, int64_t row_bytes, int rows, int width,
                                  DType dtype, Pool kind, float* to) {
  const auto run = [&](auto type) __attribute__((always_inline)) {
    constexpr DType kType = static_cast<DType>(decltype(type)::value);
    switch (kind) {
      case Pool::kMean:
        return pool_typed<Pool::kMean, kType>(from, row_bytes, rows, width, to);
      case Pool::kMin:
        return pool_typed<Pool::kMin, kType>(from, row_bytes, rows, width, to);
      case Pool::kMax:
        return pool_typed<Pool::kMax, kType>(from, row_bytes, rows, width, to);
      case Pool::kDirection:
        return pool_directions<kType>(from, row_bytes, rows, width, to);
    }
  };
  if (dtype == DType::kFloat32) return run(Int<static_cast<int>(DType::kFloat32)>{});
  if (dtype == DType::kBFloat16) return run(Int<static_cast<int>(DType::kBFloat16)>{});
  run(Int<static_cast<int>(DType::kFloat16)>{});
}

// cells[i] = exp(scale * (cells[i] - top)) with the largest of the scaled ones as top; returns the
// sum. A NaN anywhere gives NaN.
SPARSE_ATTN_KERNEL float exp_cells(float* cells, int64_t n, float scale) {
  const Vec factor = splat(scale * kLog2E);
  Vec top = splat(kNegInf);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) top = max(top, load(cells + i) * factor);
  float padded[kLanes];
  const int tail = static_cast<int>(n - i);
  for (int l = 0; l < kLanes; ++l) padded[l] = l < tail ? cells[i + l] * factor[0] : kNegInf;
  top = max(top, load(padded));
  const float highest = max_lane(top);
  const Vec shift = splat(highest > kNegInf ? -highest : 0.0f);
  Vec sum{};
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const Vec p = exp2<6>(multiply_add(load(cells + i), factor, shift));
    sum += p;
    store(cells + i, p);
  }
  if (tail > 0) {
    // Lanes behind the end take a number of the row: its exponential is at most 1, as exp2 wants.
    for (int l = 0; l < kLanes; ++l) padded[l] = cells[i + (l < tail ? l : 0)];
    Vec p = exp2<6>(multiply_add(load(padded), factor, shift));
    for (int l = tail; l < kLanes; ++l) p[l] = 0.0f;
    sum += p;
    memcpy(cells + i, &p, tail * sizeof(float));
  }
  return add_lanes(sum);
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
