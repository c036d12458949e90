// SPDX-License-Identifier: Apache-2.0
// Prefill attention: tile shapes and the plan of a call.
#pragma once

#include <algorithm>

#include "../common/call.h"

namespace sparse_attn::cuda {

constexpr int kPrefillRows = 64;  // query rows of a kernel tile
constexpr int kPrefillThreads = kPrefillRows / 16 * 32;

// How rows that share lists are cut into kernel tiles: pieces of at most kPrefillRows rows of a
// head, and as many heads of a unit in one tile as fit. A piece never crosses a multiple of 64 rows
// of a list, so the bits of a key for a tile are one word.
struct RowCut {
  int32_t list_rows;  // rows of a sequence that share lists
  int32_t pieces;     // of list_rows
  int32_t heads_per_tile;
  int32_t head_tiles;  // tiles that the heads of a unit need for one piece

  SPARSE_ATTN_HOST_DEVICE RowCut(int32_t rows, int32_t heads)
      : list_rows(rows), pieces((rows + kPrefillRows - 1) / kPrefillRows) {
    const int32_t fit = rows < kPrefillRows ? kPrefillRows / rows : 1;
    heads_per_tile = heads < fit ? heads : fit;
    head_tiles = (heads + heads_per_tile - 1) / heads_per_tile;
  }

  int64_t tiles(int32_t rows) const { return ceil_div(rows, list_rows) * pieces * head_tiles; }
};

struct PrefillParams : DeviceCall {
  // What follows is derived, by plan_prefill.
  int32_t heads_per_unit = 1;  // query heads that share lists and a KV head
  int32_t listed_rows = 0;     // rows that share lists, in a listed head
  int32_t other_rows = 0;      // and in another
  int32_t tiles_per_unit = 0;  // kernel tiles of a sequence and unit, at most
  int64_t tiles = 0;
  FastDivisor by_block_n;
};

inline void plan_prefill(PrefillParams& p) {
  const AttentionParams& call = p.call;
  const int64_t group = call.num_heads / call.num_heads_kv;
  p.heads_per_unit = static_cast<int32_t>(call.index.num_heads < call.num_heads ? group : 1);
  const int32_t rows = std::max(p.max_q_len, 1);
  p.listed_rows = std::min(call.index.block_m, rows);
  p.other_rows = std::min(kPrefillRows, rows);
  p.tiles_per_unit =
      static_cast<int32_t>(std::max(RowCut(p.listed_rows, p.heads_per_unit).tiles(rows),
                                    RowCut(p.other_rows, p.heads_per_unit).tiles(rows)));
  p.tiles = call.num_sequences * (call.num_heads / p.heads_per_unit) * p.tiles_per_unit;
  p.by_block_n = FastDivisor(call.index.block_n);
  plan_runs(p);
}

// Head dims of the instantiations; others run in the next larger one, padded with zeros.
template <class Element_, int kHeadDim_>
struct PrefillConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  // Tiles of K and V in turn fill a ring of this many. At head_dim 256 two fit the 99 KiB of sm_86.
  static constexpr int kRing = kHeadDim <= 128 ? 4 : 2;
  static constexpr int kAhead = kRing / 2;  // chunks by which the copy of K leads
  static constexpr int kLookups = kRing;    // chunks whose lookups are kept: kAhead + 1 at least
  static constexpr int kGroup = kHeadDim <= 128 ? 32 : 4;  // chunks planned at a time
  // Q stays in registers where they suffice.
  static constexpr bool kSharedQ = kHeadDim > 128;
  static constexpr int kMinBlocks = kHeadDim <= 128 ? 2 : 1;
};

}  // namespace sparse_attn::cuda
