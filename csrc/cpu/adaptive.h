// SPDX-License-Identifier: Apache-2.0
// The keys that an adaptive query tile attends to (sparse_attn/patterns/adaptive.py has the rule).
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"

namespace sparse_attn::cpu {

constexpr int kGranule = 16;  // keys of a block in the lists

struct AdaptiveRule {
  double mass;       // share of the estimated mass that a tile keeps
  double guard;      // share of each checking row's mass that it keeps
  int64_t block_m;   // rows of a tile
  int64_t q_offset;  // position of query row 0
  int64_t sink;      // first keys that are always kept
  int64_t window;    // keys before the tile's own that are always kept
};

// The lists of one tile, ascending.
struct TileKeys {
  std::vector<int32_t> blocks, columns;
};

// Fills keys [batch, num_heads, tiles]. params: q, k and the numbers of a call (v, out and index
// unused); params.num_sequences is the batch.
void adaptive_keys(const AttentionParams& params, const AdaptiveRule& rule, TileKeys* keys,
                   const Executor& executor);

}  // namespace sparse_attn::cpu
