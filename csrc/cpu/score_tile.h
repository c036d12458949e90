// SPDX-License-Identifier: Apache-2.0
// Plain products of a tile's query rows with a chunk's keys, and row conversion: what the selection
// code, which is compiled once for any CPU, builds its scores from.
#pragma once

#include "kernels.h"
#include "row_tile.h"
#include "vec.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// scores[key][row] = q[row] . k[key] for the rows set up by row_begin, neither scaled nor masked.
// Reads only the chunk's count and k; entries of k up to the next multiple of kKeyPadding are read.
SPARSE_ATTN_KERNEL void row_score(Tile& t, const KeyChunk& c) {
  const char* pointers[kChunkKeys + kKeyPadding];
  const char* const* keys =
      tile_uses_pairs(t) ? c.k : float_rows(t, c.k, c.count, t.head_dim, t.k_wide, pointers);
  for_panels(t.rows, [&](auto vecs, int first_row) __attribute__((always_inline)) {
    score_panel<decltype(vecs)::value>(t, c, keys, c.count, first_row, false, nullptr);
  });
}

// best[key] = max(best[key], softmax_scale * q[row] . k[key] over all rows); NaN counts as -inf.
// Reads of the chunk what row_score reads.
SPARSE_ATTN_KERNEL void score_max(Tile& t, const KeyChunk& c, float* best) {
  row_score(t, c);
  const int last = (t.rows - 1) / kLanes * kLanes;
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const IntVec real = lane < splat_int(t.rows - last);
  for (int key = 0; key < c.count; ++key) {
    const float* s = t.scores + key * kTileRows;
    // In this order max drops a NaN.
    Vec top = max(load(s + last) * t.softmax_scale, splat(kNegInf));
    top = real ? top : splat(kNegInf);
    for (int row = 0; row < last; row += kLanes) top = max(load(s + row) * t.softmax_scale, top);
#pragma GCC unroll 4
    for (int step = kLanes / 2; step > 0; step /= 2) {
      IntVec across;
      for (int i = 0; i < kLanes; ++i) across[i] = i ^ step;
      top = max(shuffle(top, top, across), top);
    }
    if (top[0] > best[key]) best[key] = top[0];
  }
}

// n numbers of dtype as float32.
SPARSE_ATTN_KERNEL void widen(const char* from, float* to, int64_t n, DType dtype) {
  const int width = dtype == DType::kFloat32 ? 4 : 2;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load_wide(from + i * width, dtype));
  if (i == n) return;
  const int tail = static_cast<int>(n - i);
  const Vec x = load_wide_tail(from + i * width, dtype, tail);
  memcpy(to + i, &x, tail * sizeof(float));
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
