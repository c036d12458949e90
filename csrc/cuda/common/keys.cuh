// SPDX-License-Identifier: Apache-2.0
// The keys of a query tile, numbered by slots whatever the kind of its head, and the lookup of a
// chunk of them: where each lies and who sees it. What an index or a page table says out of bounds
// hides keys and is never followed.
#pragma once

#include "sequence.cuh"

namespace sparse_attn::cuda {

constexpr int kChunkKeys = 64;

// Slots: a leading range of keys and then a window, or the keys of blocks and then columns.
struct TileKeys {
  int32_t kind;
  int32_t hi;             // no row sees this key or a later one
  int32_t min_hi;         // every row sees the keys before it, as far as causality goes
  int32_t lead;           // keys [0, lead) are seen whatever the window says
  int32_t window_begin;   // the window's keys from here on follow them
  int32_t window_max_lo;  // every row's window has begun
  int32_t window_min_hi;  // and none has ended
  int32_t block_slots;
  int32_t slots;
  int64_t block_begin, column_begin;
};

// Lists of one tile of the index: [begin, end), bounded by the capacity and by what fits the keys.
struct BoundedSlice {
  int64_t begin;
  int32_t count;
};

__device__ inline BoundedSlice bounded_slice(const int64_t* indptr, int64_t capacity,
                                             int64_t most) {
  const int64_t begin = bounded(indptr[0], 0, capacity);
  return {begin,
          static_cast<int32_t>(bounded(bounded(indptr[1], begin, capacity) - begin, 0, most))};
}

// What rows of a sequence may see, over all of them.
struct RowBounds {
  int32_t hi = 0, min_hi = INT32_MAX;
  int32_t window_max_lo = 0, window_min_hi = INT32_MAX;
  int32_t window_begin = INT32_MAX, window_end = 0;
};

// Rows first_row + r of every `step`-th r from `begin` to `rows`.
__device__ inline RowBounds row_bounds(const DeviceCall& p, const DeviceSequence& s,
                                       const int32_t* head, int32_t first_row, int32_t rows,
                                       int32_t begin = 0, int32_t step = 1) {
  RowBounds bounds;
  for (int32_t r = begin; r < rows; r += step) {
    const RowWindow w = row_window(p, s, head, first_row + r);
    bounds.hi = max(bounds.hi, w.outer_hi);
    bounds.min_hi = min(bounds.min_hi, w.outer_hi);
    bounds.window_max_lo = max(bounds.window_max_lo, w.lo);
    bounds.window_min_hi = min(bounds.window_min_hi, w.hi);
    bounds.window_begin = min(bounds.window_begin, w.lo);
    bounds.window_end = max(bounds.window_end, w.hi);
  }
  return bounds;
}

// Slots of rows with these bounds.
__device__ inline TileKeys tile_keys(const DeviceCall& p, int64_t sequence, int32_t index_head,
                                     int32_t list_tile, const RowBounds& bounds) {
  const IndexView& index = p.call.index;
  const int32_t* head = head_row(p, index_head);
  TileKeys keys{};
  keys.kind = head[0];
  keys.hi = bounds.hi;
  keys.min_hi = bounds.min_hi;
  keys.window_max_lo = bounds.window_max_lo;
  keys.window_min_hi = bounds.window_min_hi;
  if (keys.kind == kListed) {
    const int64_t batch = index.batch == 1 ? 0 : sequence;
    const int64_t at = (batch * index.num_heads + index_head) * (index.num_tiles + 1) + list_tile;
    // Blocks and columns are disjoint, so no valid list is longer than this.
    const BoundedSlice blocks = bounded_slice(index.block_indptr + at, index.block_capacity,
                                              ceil_div(p.call.seqlen_k, index.block_n));
    const BoundedSlice columns =
        bounded_slice(index.column_indptr + at, index.column_capacity, p.call.seqlen_k);
    keys.block_begin = blocks.begin;
    keys.column_begin = columns.begin;
    keys.lead = INT32_MAX;  // no window anywhere
    keys.block_slots = blocks.count * index.block_n;
    // What the last block has past the last row's keys need not be visited. An int32 holds the sum:
    // the operator bounds seqlen_k.
    if (blocks.count > 0) {
      const int64_t last = index.block_indices[blocks.begin + blocks.count - 1];
      keys.block_slots -=
          static_cast<int32_t>(bounded(last + index.block_n - keys.hi, 0, index.block_n));
    }
    keys.slots = keys.block_slots + columns.count;
  } else if (keys.kind == kStreaming) {
    keys.lead = min(max(head[1], 0), keys.hi);
    keys.window_begin = max(keys.lead, bounds.window_begin);
    keys.slots = keys.lead + max(0, bounds.window_end - keys.window_begin);
  } else {
    keys.lead = keys.hi;
    keys.slots = keys.hi;
  }
  return keys;
}

// Slots of rows [first_row, first_row + rows) of a sequence. Called by all lanes of a warp.
__device__ inline TileKeys tile_keys(const DeviceCall& p, const DeviceSequence& s, int64_t sequence,
                                     int32_t index_head, int32_t list_tile, int32_t first_row,
                                     int32_t rows) {
  constexpr uint32_t kAll = 0xffffffffu;
  RowBounds bounds =
      row_bounds(p, s, head_row(p, index_head), first_row, rows, threadIdx.x % 32, 32);
  bounds.hi = __reduce_max_sync(kAll, bounds.hi);
  bounds.min_hi = __reduce_min_sync(kAll, bounds.min_hi);
  bounds.window_max_lo = __reduce_max_sync(kAll, bounds.window_max_lo);
  bounds.window_min_hi = __reduce_min_sync(kAll, bounds.window_min_hi);
  bounds.window_begin = __reduce_min_sync(kAll, bounds.window_begin);
  bounds.window_end = __reduce_max_sync(kAll, bounds.window_end);
  return tile_keys(p, sequence, index_head, list_tile, bounds);
}

// A slot's list entry, loaded well before it is needed.
struct SlotEntry {
  int32_t key;     // not checked
  int32_t mask;    // -1: none; checked
  int32_t within;  // position in the block
  float bias;      // natural log
};

__device__ inline SlotEntry load_slot(const IndexView& index, const FastDivisor& by_block_n,
                                      const TileKeys& keys, int32_t slot) {
  SlotEntry entry{-1, -1, 0, 0.0f};
  if (slot >= keys.slots) return entry;
  if (keys.kind != kListed) {
    entry.key = slot < keys.lead ? slot : keys.window_begin + (slot - keys.lead);
  } else if (slot < keys.block_slots) {
    const int32_t number = by_block_n(slot);
    entry.within = slot - number * index.block_n;
    const int64_t block = keys.block_begin + number;
    entry.key = index.block_indices[block];
    // Below 0 the key stays: a block has no key before its start.
    entry.key = entry.key < 0 ? -1 : entry.key + entry.within;
    if (index.block_bits_ids != nullptr) {
      entry.mask = index.block_bits_ids[block];
      if ((entry.mask < -1 || entry.mask >= index.num_masks) && !fault(11))
        entry.key = entry.mask = -1;  // its bits would still be read
    }
  } else {
    const int64_t column = keys.column_begin + (slot - keys.block_slots);
    entry.key = index.column_indices[column];
    if (index.column_bias != nullptr) entry.bias = index.column_bias[column];
  }
  if (entry.key >= keys.hi && !fault(7)) entry.key = -1;
  return entry;
}

// Where a key's row lies: an index into the first axis of k and v, and a row. Row -1: nowhere, as
// its page does not exist.
struct KeyPlace {
  int32_t batch;
  int32_t row;
};

__device__ inline KeyPlace locate(const DeviceCall& p, const DeviceSequence& s, int64_t sequence,
                                  int32_t key) {
  const PageView& pages = p.call.pages;
  const int32_t row = static_cast<int32_t>(s.k_start) + key;
  if (pages.block_table == nullptr) return {static_cast<int32_t>(s.batch), row};
  const int32_t page_size = static_cast<int32_t>(pages.page_size);
  const int32_t page = pages.block_table[sequence * pages.max_pages + row / page_size];
  if ((page < 0 || page >= p.num_pages) && !fault(14)) return {0, -1};
  return {page, row % page_size};
}

}  // namespace sparse_attn::cuda
