// SPDX-License-Identifier: Apache-2.0
// Hierarchical pruning: a search for the keys of every query tile that scores a few representatives
// of ever smaller pieces of the key axis. The rules are those of sparse_attn/patterns/hip.py.
#pragma once

#include <cstdint>

#include "attention.h"

namespace sparse_attn::cpu {

// What both searches are told besides q and k. Attention is causal.
struct HipSearch {
  int64_t q_offset;
  int64_t block_m;   // rows of a tile
  int64_t stride_q;  // rows from one that is scored to the next, or rows averaged into one
  int64_t lists;     // divides num_heads; the query heads of a list share its choice
  int64_t sink;      // keys that are no candidates, at the start
  int64_t window;    // and up to the tile's last row
};

struct HipTree {
  int64_t groups;    // pieces kept at every step
  int64_t leaf;      // keys of the smallest piece
  int64_t stride_k;  // keys of a representative leaf from one that is scored to the next
  bool center;       // a piece is represented by its middle leaf, else by its first
};

// The leaves that the tree search keeps: starts [batch, lists, tiles, groups], ascending, and
// counts [batch, lists, tiles]. Places past a count are -1.
void hip_tree(const AttentionParams& params, const HipSearch& search, const HipTree& tree,
              int32_t* starts, int32_t* counts, const Executor& executor);

struct HipStage {
  int64_t chunk;  // a power of two
  int64_t keep;
  int64_t overlap;                         // keys of the window that are candidates
  const int32_t* parents = nullptr;        // [batch, lists, tiles, num_parents], ascending, or null
  const int32_t* parent_counts = nullptr;  // [batch, lists, tiles]
  int64_t num_parents = 0;
  int64_t parent_chunk = 0;
};

// The chunks that one stage of pruning keeps: starts [batch, lists, tiles, keep] and counts as in
// hip_tree. Without parents the chunks are those of the whole key axis, else theirs.
void hip_stage(const AttentionParams& params, const HipSearch& search, const HipStage& stage,
               int32_t* starts, int32_t* counts, const Executor& executor);

}  // namespace sparse_attn::cpu
