// SPDX-License-Identifier: Apache-2.0
// Anchor attention's identification on the CPU: which keys the rows of a superblock look at nearly
// as much as at the keys they see anyway (sparse_attn/patterns/anchor.py states the rule).
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"

namespace sparse_attn::cpu {

struct AnchorRule {
  int64_t block;  // rows of a tile, whose queries are averaged
  int64_t step;   // tiles of a superblock
  int64_t sink;
  float theta;
  int64_t q_offset;
  int64_t block_n;

  int64_t super() const { return block * step; }
};

// What the rows of one superblock see.
struct AnchorLists {
  std::vector<int32_t> blocks, columns;
};

// params: q, k and the numbers of one call (v, out and index unused). Lists of [batch, num_heads,
// superblocks], in that order.
std::vector<AnchorLists> anchor_lists(const AttentionParams& params, const AnchorRule& rule,
                                      const Executor& executor);

}  // namespace sparse_attn::cpu
