// SPDX-License-Identifier: Apache-2.0
// Attention probabilities of one tile of query rows, summed along key columns and along diagonals
// (an observation window). Scores are transposed as in row_tile.h, so a key's probabilities over
// neighbouring rows are neighbours in memory and lie on neighbouring diagonals: a diagonal sum is
// a vector addition.
#pragma once

#include "kernels.h"
#include "row_tile.h"
#include "vec.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

template <class Fn>
SPARSE_ATTN_INLINE void window_panels(Tile& t, const KeyChunk& c, Fn use) {
  const char* pointers[kChunkKeys + kKeyPadding];
  const char* const* keys =
      tile_uses_pairs(t) ? c.k : float_rows(t, c.k, c.count, t.head_dim, t.k_wide, pointers);
  const bool transform = !(t.softmax_scale > 0.0f);
  const float scale = (transform ? 1.0f : t.softmax_scale) * kLog2E;
  for_panels(t.rows, [&](auto vecs, int first_row) __attribute__((always_inline)) {
    constexpr int kVecs = decltype(vecs)::value;
    score_panel<kVecs>(t, c, keys, first_row, false);
    if (transform || c.limits != nullptr) adjust_panel<kVecs>(t, c, first_row, transform);
    use(vecs, first_row, scale);
  });
}

// First pass: the rows' maxima and sums.
SPARSE_ATTN_KERNEL void window_attend(Tile& t, const KeyChunk& c) {
  window_panels(t, c, [&](auto vecs, int first_row, float scale) __attribute__((always_inline)) {
    softmax_panel<decltype(vecs)::value, false>(t, c.count, first_row, scale);
  });
}

// Second pass: columns[key] += sum over rows, diagonals[distance] += along each diagonal, where
// row r is at position first_position + r. `diagonals` has kTileRows numbers of room before and
// after its distances.
SPARSE_ATTN_KERNEL void window_sum(Tile& t, const KeyChunk& c, int64_t first_position,
                                   float* columns, float* diagonals, int64_t distances) {
  alignas(64) float shift[kTileRows], weight[kTileRows], partial[kChunkKeys * kLanes];
  for (int r = 0; r < kTileRows; ++r) {
    const bool seen = r < t.rows && t.row_max[r] > kNegInf;
    shift[r] = seen ? -t.row_max[r] : 0.0f;
    weight[r] = seen ? 1.0f / t.row_sum[r] : 0.0f;
  }
  memset(partial, 0, sizeof(float) * kLanes * kChunkKeys);
  window_panels(t, c, [&](auto vecs, int first_row, float scale) __attribute__((always_inline)) {
    constexpr int kVecs = decltype(vecs)::value;
    for (int key = 0; key < c.count; ++key) {
      const int64_t distance = first_position + first_row - c.position[key];
      const bool on_diagonals = distance > -kTileRows && distance < distances;
      Vec column = load(partial + key * kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        const int row = first_row + j * kLanes;
        const Vec s = load(t.scores + key * kTileRows + row);
        const Vec p =
            exp2<6>(multiply_add(s, splat(scale), load(shift + row))) * load(weight + row);
        column += p;
        if (on_diagonals) {
          float* at = diagonals + distance + j * kLanes;
          store(at, load(at) + p);
        }
      }
      store(partial + key * kLanes, column);
    }
  });
  for (int key = 0; key < c.count; key += kLanes) {
    Vec x[kLanes];
    for (int i = 0; i < kLanes; ++i) x[i] = load(partial + (key + i) * kLanes);
    float sums[kLanes];
    store(sums, sum_lanes<kLanes / 2>(x));
    for (int i = 0; i < kLanes && key + i < c.count; ++i) columns[c.position[key + i]] += sums[i];
  }
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
