// SPDX-License-Identifier: Apache-2.0
// Decode attention: tile shapes, the plan of a call, and where its workspace lies.
//
// Work is counted in chunks of kChunkKeys keys. The tiles of all sequences and heads, end to end,
// make one line of chunks, which the CTAs of the grid share out in equal pieces, whatever the
// lengths of the lists. So a CTA ends at most one tile that another began, and begins one that
// another ends: two partial results a CTA, a workspace of fixed size, and no count is ever read by
// the host.
#pragma once

#include <algorithm>

#include "../common/call.h"

namespace sparse_attn::cuda {

constexpr int kDecodeMaxRows = 16;  // query rows of a sequence, up to which a call is decode
constexpr int kDecodeWarps = 4;
constexpr int kDecodeThreads = kDecodeWarps * 32;
constexpr int64_t kDecodeMinShare =
    2;  // chunks: a smaller share costs more in merging than it gains
constexpr int kDecodeCtasPerSm = 2;

// What the three kernels of a call are told.
struct DecodeParams : DeviceCall {
  // What follows is derived, by plan_decode.
  int32_t tile_rows = 0;       // rows of a kernel tile: 16 or 64
  int32_t heads_per_unit = 1;  // query heads that share lists and a KV head
  int32_t list_rows = 0;       // rows of a sequence that share lists
  int32_t tiles_per_list = 1;  // kernel tiles of one list's packed rows
  int32_t tiles_per_unit = 1;  // kernel tiles of a sequence and unit, at most
  int64_t tiles = 0;
  int32_t ctas = 0;
  FastDivisor by_block_n;
  int64_t* first_chunk = nullptr;  // [tiles + 1], then the chunks of one CTA
  float* piece_lse = nullptr;      // [2 * ctas, tile_rows], base 2
  float* piece_out = nullptr;      // [2 * ctas, tile_rows, head_dim_v]
};

// Fills the derived numbers, pointers but not; returns the bytes of workspace that the call needs.
inline int64_t plan_decode(DecodeParams& p, int multiprocessors) {
  const AttentionParams& call = p.call;
  const int64_t group = call.num_heads / call.num_heads_kv;
  p.heads_per_unit = static_cast<int32_t>(call.index.num_heads < call.num_heads ? group : 1);
  p.list_rows = std::min(call.index.block_m, std::max(p.max_q_len, 1));
  const int64_t rows = int64_t{p.heads_per_unit} * std::max(p.max_q_len, 1);
  p.tile_rows = rows <= 16 ? 16 : 64;
  p.tiles_per_list =
      static_cast<int32_t>(ceil_div(int64_t{p.heads_per_unit} * p.list_rows, p.tile_rows));
  const int64_t listed = ceil_div(std::max(p.max_q_len, 1), p.list_rows) * p.tiles_per_list;
  p.tiles_per_unit = static_cast<int32_t>(std::max(listed, ceil_div(rows, p.tile_rows)));
  p.tiles = call.num_sequences * (call.num_heads / p.heads_per_unit) * p.tiles_per_unit;
  // No CTA may be without work only because lists happen to be short: the grid is the device's.
  p.ctas = multiprocessors * kDecodeCtasPerSm;
  p.by_block_n = FastDivisor(call.index.block_n);
  plan_runs(p);
  const int64_t pieces = int64_t{2} * p.ctas * p.tile_rows;
  return (p.tiles + 2) * int64_t{sizeof(int64_t)} + pieces * int64_t{sizeof(float)} +
         pieces * call.head_dim_v * int64_t{sizeof(float)} + 16;
}

// Lays the workspace out; `workspace` is aligned to 16 bytes.
inline void place_decode(DecodeParams& p, void* workspace) {
  char* at = static_cast<char*>(workspace);
  const int64_t rows = int64_t{2} * p.ctas * p.tile_rows;
  p.piece_out = reinterpret_cast<float*>(at);
  at += rows * p.call.head_dim_v * int64_t{sizeof(float)};
  p.piece_lse = reinterpret_cast<float*>(at);
  at += rows * int64_t{sizeof(float)};
  p.first_chunk = reinterpret_cast<int64_t*>(at);  // rows are a multiple of 16: still aligned
}

// Head dims of the instantiations; others run in the next larger one, padded with zeros.
template <class Element_, int kHeadDim_, int kTileRows_>
struct DecodeConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTileRows = kTileRows_;
  // Sixteen rows: each warp takes a quarter of a chunk's keys, and the four meet at the end.
  // Sixty-four: each takes sixteen rows and all keys.
  static constexpr int kWarpsM = kTileRows / 16;
  static constexpr int kWarpsN = kDecodeWarps / kWarpsM;
  static constexpr int kWarpKeys = 64 / kWarpsN;  // of a chunk
  // Tiles of K and V in turn fill a ring of this many. At head_dim 256 two fit the 99 KiB of sm_86.
  static constexpr int kRing = kHeadDim <= 128 ? 4 : 2;
  static constexpr int kAhead = kRing / 2;  // chunks by which the copy of K leads
  static constexpr int kLookups = kRing;    // chunks whose lookups are kept: kAhead + 1 at least
  static constexpr int kGroup = kHeadDim <= 128 ? 32 : 4;  // chunks planned at a time
  // Q stays in registers where they suffice.
  static constexpr bool kSharedQ = kHeadDim > 128;
  static constexpr int kMinBlocks = kHeadDim <= 128 ? 2 : 1;
  static_assert(kTileRows == 16 || kTileRows == 64);
};

}  // namespace sparse_attn::cuda
