// SPDX-License-Identifier: Apache-2.0
// Device-side geometry of decode: the rows of a tile, and the plan kernel that lays all tiles out
// on one line of chunks.
#pragma once

#include "../common/keys.cuh"
#include "config.h"

namespace sparse_attn::cuda {

// The rows of a tile: packed row r of `rows` is row first_row + (begin + r) % rows_per_head of head
// first_head + (begin + r) / rows_per_head.
struct DecodeTile {
  int64_t sequence;
  int32_t first_head;
  int32_t index_head;
  int32_t list_tile;  // of the index
  int32_t first_row;
  int32_t rows_per_head;
  int32_t begin;
  int32_t rows;  // 0: there is no such tile
};

__device__ inline DecodeTile decode_tile(const DecodeParams& p, int64_t id,
                                         const DeviceSequence& sequence) {
  const AttentionParams& call = p.call;
  const int32_t units = static_cast<int32_t>(call.num_heads / p.heads_per_unit);
  DecodeTile tile;
  tile.sequence = id / p.tiles_per_unit / units;
  const int32_t unit = static_cast<int32_t>(id / p.tiles_per_unit % units);
  const int32_t t = static_cast<int32_t>(id % p.tiles_per_unit);
  tile.first_head = unit * p.heads_per_unit;
  tile.index_head = call.index.num_heads == 1 ? 0 : unit;
  // Lists belong to list_rows rows; other heads take all rows of the sequence together.
  const bool listed = head_row(p, tile.index_head)[0] == kListed;
  const int32_t rows = listed ? p.list_rows : max(sequence.q_len, 1);
  tile.list_tile = listed ? t / p.tiles_per_list : 0;
  tile.first_row = tile.list_tile * rows;
  tile.rows_per_head = max(0, min(rows, sequence.q_len - tile.first_row));
  tile.begin = (listed ? t % p.tiles_per_list : t) * p.tile_rows;
  tile.rows = max(0, min(p.tile_rows, p.heads_per_unit * tile.rows_per_head - tile.begin));
  return tile;
}

__device__ inline TileKeys decode_keys(const DecodeParams& p, const DeviceSequence& s,
                                       const DecodeTile& tile) {
  const RowBounds bounds =
      row_bounds(p, s, head_row(p, tile.index_head), tile.first_row, tile.rows_per_head);
  return tile_keys(p, tile.sequence, tile.index_head, tile.list_tile, bounds);
}

// Sequence of a tile.
__device__ inline DeviceSequence sequence_of(const DecodeParams& p, int64_t id) {
  return device_sequence(p, id / p.tiles_per_unit / (p.call.num_heads / p.heads_per_unit));
}

// Chunks of a tile. Rows that see no key still need one, to be written.
__device__ inline int64_t tile_chunks(const DecodeParams& p, int64_t id) {
  const DeviceSequence s = sequence_of(p, id);
  const DecodeTile tile = decode_tile(p, id, s);
  if (tile.rows == 0) return 0;
  return max(int64_t{1}, ceil_div(decode_keys(p, s, tile).slots, kChunkKeys));
}

constexpr int kPlanThreads = 256;

// first_chunk[t] = chunks of the tiles before t; after them the share of a CTA. One CTA.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) decode_plan(const DecodeParams p) {
  __shared__ int64_t warp_sum[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t before = 0;
  for (int64_t base = 0; base < p.tiles; base += kThreads) {
    const int64_t id = base + threadIdx.x;
    const int64_t own = id < p.tiles ? tile_chunks(p, id) : 0;
    int64_t sum = own;  // inclusive, of the warp
    for (int offset = 1; offset < 32; offset *= 2) {
      const int64_t other = __shfl_up_sync(0xffffffffu, sum, offset);
      if (lane >= offset) sum += other;
    }
    if (lane == 31) warp_sum[warp] = sum;
    __syncthreads();
    int64_t warps_before = 0, all = 0;
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) warps_before += warp_sum[w];
      all += warp_sum[w];
    }
    if (id < p.tiles) p.first_chunk[id] = before + warps_before + sum - own;
    before += all;
    __syncthreads();  // warp_sum is free again
  }
  if (threadIdx.x == 0) {
    p.first_chunk[p.tiles] = before;
    const int64_t share = (before + p.ctas - 1) / p.ctas;
    p.first_chunk[p.tiles + 1] = share < kDecodeMinShare ? kDecodeMinShare : share;
  }
}

}  // namespace sparse_attn::cuda
