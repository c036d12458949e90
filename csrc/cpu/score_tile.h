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
    score_panel<decltype(vecs)::value>(t, c, keys, first_row, false);
  });
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
