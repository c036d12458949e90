// SPDX-License-Identifier: Apache-2.0
// Attention probabilities of one tile of query rows, reduced along key columns and along diagonals
// (an observation window). Scores are transposed as in row_tile.h, so a key's probabilities over
// neighbouring rows are neighbours in memory and lie on neighbouring diagonals: a step along all
// diagonals is one vector operation.
#pragma once

#include "kernels.h"
#include "row_tile.h"
#include "vec.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// Scores of a chunk, and the rows' running maxima and sums with it. The probabilities stay in
// t.scores, relative to the maxima that t.row_max holds afterwards.
SPARSE_ATTN_KERNEL void window_attend(Tile& t, const KeyChunk& c) {
  const char* pointers[kChunkKeys + kKeyPadding];
  const char* const* keys =
      tile_uses_pairs(t) ? c.k : float_rows(t, c.k, c.count, t.head_dim, t.k_wide, pointers);
  const bool transform = !(t.softmax_scale > 0.0f);
  const float scale = (transform ? 1.0f : t.softmax_scale) * kLog2E;
  for_panels(t.rows, [&](auto vecs, int first_row) __attribute__((always_inline)) {
    constexpr int kVecs = decltype(vecs)::value;
    score_panel<kVecs>(t, c, keys, c.count, first_row, false, nullptr);
    if (transform || c.limits != nullptr) adjust_panel<kVecs>(t, c, c.count, first_row, transform);
    softmax_panel<kVecs, false, kTileRows>(t, c.count, first_row, scale, t.scores + first_row);
  });
}

// factor[row] for window_reduce: from probabilities relative to `top` to normalised ones.
SPARSE_ATTN_KERNEL void window_factors(const float* top, const float* row_max, const float* row_sum,
                                       float* factor) {
  for (int r = 0; r < kTileRows; r += kLanes) {
    const Vec m = load(row_max + r);
    const Vec f = exp2<6>(load(top + r) - m) / load(row_sum + r);
    store(factor + r, m == kNegInf ? Vec{} : f);  // a row without a key
  }
}

// Adds to columns[key] and along the diagonals the probabilities of a chunk, or takes the maximum:
// row r is at position first_position + r and counts as probs[key][r] * factor[r]. `diagonals` has
// kTileRows numbers of room before and after its distances. A NaN never becomes a maximum.
template <bool kMaximum>
SPARSE_ATTN_INLINE void reduce_chunk(const float* probs, const float* factor, int rows,
                                     const KeyChunk& c, int64_t first_position, float* columns,
                                     float* diagonals, int64_t distances) {
  const auto join = [](Vec x, Vec all)
                        __attribute__((always_inline)) { return kMaximum ? max(x, all) : all + x; };
  alignas(64) float partial[kChunkKeys * kLanes];
  for (int key = 0; key < c.count; ++key) {
    const int64_t distance = first_position - c.position[key];
    const bool on_diagonals = distance > -kTileRows && distance < distances;
    Vec column{};
    for (int r = 0; r < rows; r += kLanes) {
      const Vec p = load(probs + key * kTileRows + r) * load(factor + r);
      column = join(p, column);
      if (on_diagonals) {
        float* at = diagonals + distance + r;
        store(at, join(p, load(at)));
      }
    }
    store(partial + key * kLanes, column);
  }
  for (int key = 0; key < c.count; key += kLanes) {
    const int n = c.count - key < kLanes ? c.count - key : kLanes;
    float all[kLanes];
    if constexpr (kMaximum) {
      for (int i = 0; i < n; ++i) all[i] = max_lane(load(partial + (key + i) * kLanes));
    } else {
      Vec x[kLanes];
      for (int i = 0; i < kLanes; ++i) x[i] = i < n ? load(partial + (key + i) * kLanes) : Vec{};
      store(all, sum_lanes<kLanes / 2>(x));
    }
    for (int i = 0; i < n; ++i) {
      float& column = columns[c.position[key + i]];
      column = kMaximum ? (all[i] > column ? all[i] : column) : column + all[i];
    }
  }
}

SPARSE_ATTN_KERNEL void window_reduce(const float* probs, const float* factor, int rows,
                                      const KeyChunk& c, int64_t first_position, bool maximum,
                                      float* columns, float* diagonals, int64_t distances) {
  if (maximum) {
    reduce_chunk<true>(probs, factor, rows, c, first_position, columns, diagonals, distances);
  } else {
    reduce_chunk<false>(probs, factor, rows, c, first_position, columns, diagonals, distances);
  }
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
