// SPDX-License-Identifier: Apache-2.0
// Estimated probabilities of keys as small integers. A key's level is how many quarter octaves its
// probability lies below that of the best key of the row, so mass is summed and compared exactly
// in integers, and nothing needs an exponential.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// out[key][row] = factor[row] * scores[key][row], or -inf from the row's limit on; top[row] grows
// to the largest. `rows` is a multiple of 16; limits of rows that the tile lacks are 0.
SPARSE_ATTN_KERNEL void rank_scale(const Tile& t, const KeyChunk& c, const float* factor,
                                   const int32_t* limits, int rows, float* out, float* top) {
  for (int key = 0; key < c.count; ++key) {
    const IntVec position = splat_int(c.position[key]);
    for (int r = 0; r < rows; r += kLanes) {
      const Vec scaled = load(t.scores + key * kTileRows + r) * load(factor + r);
      const Vec x = position < load_as<IntVec>(limits + r) ? scaled : splat(kNegInf);
      const Vec best = load(top + r);
      store(out + key * rows + r, x);
      store(top + r, x > best ? x : best);  // a NaN is never better
    }
  }
}

// levels[key][row] = 1 + min(floor(top[row] - x[key][row]), kRankLevels - 1), counted in
// histogram[row][level - 1]. A NaN has the last level.
SPARSE_ATTN_KERNEL void rank_levels(const float* x, int keys, int rows, const float* top,
                                    uint8_t* levels, uint32_t* histogram) {
  alignas(64) int32_t level[kTileRows];
  const Vec last = splat(kRankLevels - 1);
  for (int key = 0; key < keys; ++key, x += rows, levels += rows) {
    for (int r = 0; r < rows; r += kLanes) {
      const Vec below = load(top + r) - load(x + r);
      const IntVec n = __builtin_convertvector(below < last ? below : last, IntVec);
      memcpy(level + r, &n, sizeof(n));
    }
    for (int r = 0; r < rows; ++r) {
      levels[r] = static_cast<uint8_t>(level[r] + 1);
      ++histogram[r * kRankLevels + level[r]];
    }
  }
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
