// SPDX-License-Identifier: Apache-2.0
// Device-side geometry of decode: the rows of a tile, the keys it may see, and the plan kernel that
// lays all tiles out on one line of chunks. Nothing read from a tensor is trusted: what an index, a
// range or a page table says out of bounds hides keys or rows and is never followed.
#pragma once

#include "config.h"

namespace sparse_attn::cuda {

// One sequence, bounded. Ranges that leave q or k count as empty.
struct DecodeSequence {
  int64_t batch;  // of q and out; of k and v too without pages
  int64_t q_start, k_start, q_offset;
  int32_t q_len, k_len;
};

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

// The keys of a tile, numbered by slots: a leading range and a window, or blocks and columns.
struct DecodeKeys {
  int32_t kind;
  int32_t hi;             // no row sees this key or a later one
  int32_t min_hi;         // every row sees the keys before it, as far as causality goes
  int32_t lead;           // keys [0, lead) come first, without a window
  int32_t window_begin;   // then the window's keys from here on
  int32_t window_max_lo;  // every row's window has begun
  int32_t window_min_hi;  // and none has ended
  int64_t block_begin, column_begin;
  int64_t block_slots;
  int64_t slots;
};

__device__ inline int32_t clamp_key(int64_t key, int32_t k_len) {
  return static_cast<int32_t>(key < 0 ? 0 : key > k_len ? k_len : key);
}

__device__ inline DecodeSequence decode_sequence(const DecodeParams& p, int64_t s) {
  const AttentionParams& call = p.call;
  if (p.seq_ranges == nullptr)
    return {s, 0, 0, p.q_offset, static_cast<int32_t>(call.seqlen_q),
            static_cast<int32_t>(call.seqlen_k)};
  const int32_t* range = p.seq_ranges + s * 5;
  const int64_t q_start = range[0], q_len = range[1], k_start = range[2], k_len = range[3];
  const bool q_fits =
      q_start >= 0 && q_len >= 0 && q_len <= p.max_q_len && q_start + q_len <= call.seqlen_q;
  const bool k_fits = k_start >= 0 && k_len >= 0 && k_start + k_len <= call.seqlen_k;
  // As many sequences as batch entries: one each. All in one entry: packed.
  const bool packed = p.batch == 1;
  return {packed ? 0 : s, q_start, k_start, range[4], static_cast<int32_t>(q_fits ? q_len : 0),
          static_cast<int32_t>(k_fits ? k_len : 0)};
}

__device__ inline const int32_t* head_row(const DecodeParams& p, int32_t index_head) {
  return p.call.index.heads + int64_t{index_head} * 4;
}

__device__ inline DecodeTile decode_tile(const DecodeParams& p, int64_t id,
                                         const DecodeSequence& sequence) {
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

// The keys [lo, hi) of a window that a row sees, and those [0, hi) that causality leaves it.
struct RowWindow {
  int32_t outer_hi, lo, hi;
};

__device__ inline RowWindow row_window(const DecodeParams& p, const DecodeSequence& s,
                                       const int32_t* head, int32_t row) {
  const int64_t position = row + s.q_offset;
  RowWindow w;
  w.outer_hi = p.call.causal ? clamp_key(position + 1, s.k_len) : s.k_len;
  if (head[0] != kStreaming) return {w.outer_hi, 0, w.outer_hi};
  const int32_t window = head[2];
  const bool dense = row >= int64_t{s.q_len} - head[3];
  w.lo = dense ? 0 : clamp_key(position - window + 1, s.k_len);
  w.hi = dense || p.call.causal ? w.outer_hi : clamp_key(position + window, s.k_len);
  if (window <= 0 && !dense) w.lo = w.hi = 0;
  return w;
}

__device__ inline int64_t bounded(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

__device__ inline DecodeKeys decode_keys(const DecodeParams& p, const DecodeSequence& s,
                                         const DecodeTile& tile) {
  const IndexView& index = p.call.index;
  const int32_t* head = head_row(p, tile.index_head);
  DecodeKeys keys{};
  keys.kind = head[0];
  keys.min_hi = keys.window_min_hi = INT32_MAX;
  int32_t window_begin = INT32_MAX, window_end = 0;
  for (int32_t r = 0; r < tile.rows_per_head; ++r) {
    const RowWindow w = row_window(p, s, head, tile.first_row + r);
    keys.hi = max(keys.hi, w.outer_hi);
    keys.min_hi = min(keys.min_hi, w.outer_hi);
    keys.window_max_lo = max(keys.window_max_lo, w.lo);
    keys.window_min_hi = min(keys.window_min_hi, w.hi);
    window_begin = min(window_begin, w.lo);
    window_end = max(window_end, w.hi);
  }
  if (keys.kind == kListed) {
    const int64_t batch = index.batch == 1 ? 0 : tile.sequence;
    const int64_t at =
        (batch * index.num_heads + tile.index_head) * (index.num_tiles + 1) + tile.list_tile;
    keys.block_begin = bounded(index.block_indptr[at], 0, index.block_capacity);
    keys.column_begin = bounded(index.column_indptr[at], 0, index.column_capacity);
    // Blocks and columns are disjoint, so no valid list is longer than this.
    const int64_t blocks = bounded(
        bounded(index.block_indptr[at + 1], keys.block_begin, index.block_capacity) -
            keys.block_begin,
        0, (p.call.seqlen_k + index.block_n - 1) / index.block_n);
    const int64_t columns = bounded(
        bounded(index.column_indptr[at + 1], keys.column_begin, index.column_capacity) -
            keys.column_begin,
        0, p.call.seqlen_k);
    keys.lead = INT32_MAX;  // no window anywhere
    keys.block_slots = blocks * index.block_n;
    keys.slots = keys.block_slots + columns;
  } else if (keys.kind == kStreaming) {
    keys.lead = min(max(head[1], 0), keys.hi);
    keys.window_begin = max(keys.lead, window_begin);
    keys.slots = keys.lead + max(0, window_end - keys.window_begin);
  } else {
    keys.lead = keys.hi;
    keys.slots = keys.hi;
  }
  return keys;
}

// Chunks of a tile. Rows that see no key still need one, to be written.
__device__ inline int64_t tile_chunks(const DecodeParams& p, int64_t id) {
  const int64_t units = p.call.num_heads / p.heads_per_unit;
  const DecodeSequence s = decode_sequence(p, id / p.tiles_per_unit / units);
  const DecodeTile tile = decode_tile(p, id, s);
  if (tile.rows == 0) return 0;
  const int64_t slots = decode_keys(p, s, tile).slots;
  return slots == 0 ? 1 : (slots + kDecodeKeys - 1) / kDecodeKeys;
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
