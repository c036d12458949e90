// SPDX-License-Identifier: Apache-2.0
// The rules a SparseIndex keeps. Every kernel runs check_tile on a tile's lists before it reads a
// key through them, so that a corrupt index raises and never reads out of bounds.
#pragma once

#include <cstdint>
#include <string>

#include "types.h"

namespace sparse_attn {

struct IndexFault {
  const char* what = nullptr;  // null: no fault
  int64_t value = 0;
  int64_t limit = 0;
  int64_t batch = 0, head = 0, tile = 0;

  explicit operator bool() const { return what != nullptr; }
  std::string message() const {
    return "index of batch " + std::to_string(batch) + ", head " + std::to_string(head) +
           ", query tile " + std::to_string(tile) + ": " + what + " (value " +
           std::to_string(value) + ", limit " + std::to_string(limit) + ")";
  }
};

// One tile's slices of the CSR lists.
struct TileLists {
  int64_t block_begin = 0, block_end = 0;
  int64_t column_begin = 0, column_end = 0;
};

inline TileLists tile_lists(const IndexView& index, int64_t batch, int64_t head, int64_t tile) {
  const int64_t at = (batch * index.num_heads + head) * (index.num_tiles + 1) + tile;
  return {index.block_indptr[at], index.block_indptr[at + 1], index.column_indptr[at],
          index.column_indptr[at + 1]};
}

namespace detail {

inline IndexFault check_slice(int64_t begin, int64_t end, int64_t capacity) {
  if (begin < 0) return {"indptr is negative", begin, 0};
  if (end < begin) return {"indptr decreases", end, begin};
  if (end > capacity) return {"indptr runs past the capacity of indices", end, capacity};
  return {};
}

inline IndexFault check_blocks(const IndexView& index, const TileLists& lists, int64_t seqlen_k) {
  int64_t next_free = 0;
  for (int64_t i = lists.block_begin; i < lists.block_end; ++i) {
    const int64_t start = index.block_indices[i];
    if (start < 0) return {"block start is negative", start, 0};
    if (start >= seqlen_k) return {"block start is past the keys", start, seqlen_k};
    if (start < next_free) return {"blocks are not ascending and disjoint", start, next_free};
    next_free = start + index.block_n;
    if (index.block_bits_ids != nullptr) {
      const int64_t id = index.block_bits_ids[i];
      if (id < -1 || id >= index.num_masks)
        return {"block_bits_ids is out of range", id, index.num_masks};
    }
  }
  return {};
}

inline IndexFault check_columns(const IndexView& index, const TileLists& lists, int64_t seqlen_k) {
  int64_t next_free = 0;
  int64_t block = lists.block_begin;
  for (int64_t i = lists.column_begin; i < lists.column_end; ++i) {
    const int64_t key = index.column_indices[i];
    if (key < 0) return {"column is negative", key, 0};
    if (key >= seqlen_k) return {"column is past the keys", key, seqlen_k};
    if (key < next_free) return {"columns are not strictly ascending", key, next_free};
    next_free = key + 1;
    while (block < lists.block_end && index.block_indices[block] + int64_t{index.block_n} <= key)
      ++block;
    if (block < lists.block_end && index.block_indices[block] <= key)
      return {"column lies inside a block of its tile", key, index.block_indices[block]};
  }
  return {};
}

}  // namespace detail

// Checks the lists of one tile. `batch` and `head` are the index's own axes.
inline IndexFault check_tile(const IndexView& index, int64_t batch, int64_t head, int64_t tile,
                             int64_t seqlen_k) {
  const TileLists lists = tile_lists(index, batch, head, tile);
  IndexFault fault = detail::check_slice(lists.block_begin, lists.block_end, index.block_capacity);
  if (!fault)
    fault = detail::check_slice(lists.column_begin, lists.column_end, index.column_capacity);
  const int32_t kind = index.heads[head * 4];
  if (!fault && kind != kListed &&
      (lists.block_end > lists.block_begin || lists.column_end > lists.column_begin))
    fault = {"a head that is not listed carries list entries", kind, kListed};
  if (!fault) fault = detail::check_blocks(index, lists, seqlen_k);
  if (!fault) fault = detail::check_columns(index, lists, seqlen_k);
  fault.batch = batch;
  fault.head = head;
  fault.tile = tile;
  return fault;
}

// Checks the per-head numbers, and that heads which are not listed carry no lists.
inline IndexFault check_heads(const IndexView& index) {
  for (int64_t h = 0; h < index.num_heads; ++h) {
    const int32_t* row = index.heads + h * 4;
    IndexFault fault;
    if (row[0] < kDense || row[0] > kListed) fault = {"unknown head kind", row[0], kListed};
    for (int i = 1; i < 4 && !fault; ++i)
      if (row[i] < 0) fault = {"sink, window or dense_tail is negative", row[i], 0};
    for (int64_t b = 0; b < index.batch && !fault && row[0] != kListed; ++b) {
      if (index.num_tiles == 0) break;
      const TileLists first = tile_lists(index, b, h, 0);
      const TileLists last = tile_lists(index, b, h, index.num_tiles - 1);
      if (last.block_end != first.block_begin || last.column_end != first.column_begin)
        fault = {"a head that is not listed carries list entries", row[0], kListed, b};
    }
    if (fault) {
      fault.head = h;
      return fault;
    }
  }
  return {};
}

}  // namespace sparse_attn
