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
  for (int r = 0; r < rows; r += kLanes) {
    const Vec by = load(factor + r);
    const IntVec limit = load_as<IntVec>(limits + r);
    Vec best = load(top + r);
    for (int key = 0; key < c.count; ++key) {
      const Vec scaled = load(t.scores + key * kTileRows + r) * by;
      const Vec x = splat_int(c.position[key]) < limit ? scaled : splat(kNegInf);
      best = x > best ? x : best;  // a NaN is never better
      store(out + key * rows + r, x);
    }
    store(top + r, best);
  }
}

// levels[tile][key] = 1 + min(floor(top[row] - x[key][row]), kRankLevels - 1) of the row that ranks
// for the tile, row `tile` of `tiles`; a NaN has the last level. sums[tile][level - 1] counts these
// keys, and adds up their weights by the levels of the tile's checking rows: (1 + c) * tiles + tile
// for check c. Levels of a tile are `pitch` apart from the next tile's.
SPARSE_ATTN_KERNEL void rank_levels(const float* x, int keys, int rows, int tiles, const float* top,
                                    const int64_t* weights, uint8_t* levels, int64_t pitch,
                                    RankLevel* sums) {
  alignas(64) int32_t level[kTileRows];
  const Vec last = splat(kRankLevels - 1);
  for (int key = 0; key < keys; ++key, x += rows) {
    for (int r = 0; r < rows; r += kLanes) {
      const Vec below = load(top + r) - load(x + r);
      const IntVec n = __builtin_convertvector(below < last ? below : last, IntVec);
      memcpy(level + r, &n, sizeof(n));
    }
    for (int i = 0; i < tiles; ++i) {
      RankLevel& sum = sums[i * kRankLevels + level[i]];
      ++sum.keys;
      for (int c = 0; c < kRankChecks; ++c) sum.mass[c] += weights[level[(1 + c) * tiles + i]];
      levels[i * pitch + key] = static_cast<uint8_t>(level[i] + 1);
    }
  }
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
