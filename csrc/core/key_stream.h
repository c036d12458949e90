// SPDX-License-Identifier: Apache-2.0
// Turns what a query tile may see (a dense range, a streaming range, block and column lists) into
// chunks of at most kChunkKeys row pointers. Kernels see only chunks, so a gathered column costs
// them as much as a key of a block, and every kind of head runs through the same inner loops.
#pragma once

#include <algorithm>
#include <cstdint>

#include "index_check.h"
#include "key_chunk.h"
#include "types.h"

namespace sparse_attn {

inline void summarise(RowLimits& limits, int rows) {
  limits.min_lo = *std::min_element(limits.lo, limits.lo + rows);
  limits.max_lo = *std::max_element(limits.lo, limits.lo + rows);
  limits.min_hi = *std::min_element(limits.hi, limits.hi + rows);
  limits.max_hi = *std::max_element(limits.hi, limits.hi + rows);
  std::fill(limits.lo + rows, limits.lo + kTileRows, 0);
  std::fill(limits.hi + rows, limits.hi + kTileRows, 0);
}

// The rows of a kernel tile: `heads` query heads of one KV head, `rows_per_head` rows of each.
struct TileShape {
  int64_t first_row = 0;  // in the sequence
  int32_t rows_per_head = 0;
  int32_t heads = 1;
  int32_t rows() const { return rows_per_head * heads; }
};

// Where a sequence's keys and values lie: in one run, or page by page.
class RowPointers {
 public:
  // `first` is the sequence's key 0 on the axis that the pages make up.
  RowPointers(const AttentionParams& params, const char* k, const char* v,
              const int32_t* block_table, int64_t first)
      : block_table_(block_table), page_size_(params.pages.page_size), first_(first) {
    const int64_t width = element_size(params.dtype);
    const auto make = [&](const char* base, const TensorView& x) {
      return Rows{base, base, x.row_stride * width, x.batch_stride * width};
    };
    k_ = make(k, params.k);
    v_ = make(v, params.v);
    if (block_table != nullptr) end_ = 0;  // no page yet
  }

  // Writes pointers to the rows of at most n keys from `key` on; returns how many, at least one.
  int32_t take(int64_t key, int32_t n, const char** k, const char** v) {
    if (key < begin_ || key >= end_) find_page(key);
    n = static_cast<int32_t>(std::min<int64_t>(n, end_ - key));
    const char* from_k = k_.begin + (key - begin_) * k_.stride;
    const char* from_v = v_.begin + (key - begin_) * v_.stride;
    for (int32_t i = 0; i < n; ++i) {
      k[i] = from_k + i * k_.stride;
      v[i] = from_v + i * v_.stride;
    }
    return n;
  }

 private:
  struct Rows {
    const char* base;   // of page 0
    const char* begin;  // of the run at hand
    int64_t stride;     // bytes from row to row
    int64_t page_stride;
  };

  void find_page(int64_t key) {
    const int64_t entry = (first_ + key) / page_size_;
    begin_ = entry * page_size_ - first_;
    end_ = begin_ + page_size_;
    k_.begin = k_.base + block_table_[entry] * k_.page_stride;
    v_.begin = v_.base + block_table_[entry] * v_.page_stride;
  }

  const int32_t* block_table_;
  int64_t page_size_;
  int64_t first_;
  Rows k_{}, v_{};
  int64_t begin_ = 0;  // keys of the run at hand
  int64_t end_ = INT64_MAX;
};

class KeyStream {
 public:
  // `index_head` / `index_batch` are the index's own axes; k and v point at key 0 of the sequence,
  // or of page 0 if `block_table` has the sequence's pages.
  KeyStream(const AttentionParams& params, const Sequence& sequence, const TileShape& tile,
            int64_t index_batch, int64_t index_head, const char* k, const char* v,
            const int32_t* block_table = nullptr)
      : index_(params.index),
        rows_(params, k, v, block_table, block_table == nullptr ? 0 : sequence.k_start),
        tile_(tile) {
    const int32_t* head = index_.heads + index_head * 4;
    set_causal_limits(sequence, params.causal);
    if (head[0] == kListed) {
      const int64_t index_tile = tile.first_row / index_.block_m;
      lists_ = tile_lists(index_, index_batch, index_head, index_tile);
      bits_word_ = (tile.first_row % index_.block_m) / kTileRows;
      block_ = lists_.block_begin;
      column_ = lists_.column_begin;
    } else if (head[0] == kDense) {
      add_segment(0, outer_.max_hi, outer_);
    } else {
      set_window_limits(sequence, head[2], head[3], params.causal);
      const int32_t sink = std::min(head[1], outer_.max_hi);
      add_segment(0, sink, outer_);
      // The sink segment has delivered the keys below `sink`, whatever the window says of them.
      add_segment(std::max(sink, window_.min_lo), window_.max_hi, window_);
    }
  }

  KeyStream(const KeyStream&) = delete;  // chunks point at its limits
  KeyStream& operator=(const KeyStream&) = delete;

  // Keys the stream would deliver in all.
  int64_t count_keys() const {
    int64_t keys = 0;
    for (int i = 0; i < num_segments_; ++i) keys += segments_[i].end - segments_[i].begin;
    for (int64_t i = lists_.block_begin; i < lists_.block_end; ++i) {
      const int32_t start = index_.block_indices[i];
      if (start >= outer_.max_hi) break;
      keys += std::min(index_.block_n, outer_.max_hi - start);
    }
    for (int64_t i = lists_.column_begin; i < lists_.column_end; ++i)
      keys += index_.column_indices[i] < outer_.max_hi;
    return keys;
  }

  // Delivers only `count` keys, beginning with the `begin`-th.
  void restrict_to(int64_t begin, int64_t count) {
    skip_ = begin;
    left_ = count;
  }

  // Fills the next chunk; false when no key is left.
  bool next(KeyChunk& chunk) {
    chunk.count = 0;
    chunk.limits = nullptr;
    chunk.has_bias = false;
    chunk.has_bits = false;
    while (chunk.count < kChunkKeys && left_ > 0) {
      if (segment_ < num_segments_) {
        Segment& segment = segments_[segment_];
        take_run(chunk, segment.begin, segment.end, *segment.limits, -1);
        if (segment.begin < segment.end) break;
        ++segment_;
        if (chunk.count > 0) break;  // the next segment has its own limits
      } else if (block_ < lists_.block_end && block_key() < outer_.max_hi) {
        const int32_t start = index_.block_indices[block_];
        int32_t key = start + block_done_;
        const int32_t end = std::min(start + index_.block_n, outer_.max_hi);
        const int32_t mask = index_.block_bits_ids ? index_.block_bits_ids[block_] : -1;
        take_run(chunk, key, end, outer_, mask, block_done_);
        block_done_ = key - start;
        if (key < end) break;
        ++block_;
        block_done_ = 0;
      } else if (column_ < lists_.column_end && index_.column_indices[column_] < outer_.max_hi) {
        take_columns(chunk);
      } else {
        break;
      }
    }
    for (int i = 0; i < kKeyPadding && chunk.count > 0; ++i) {
      chunk.k[chunk.count + i] = chunk.k[chunk.count - 1];
      chunk.v[chunk.count + i] = chunk.v[chunk.count - 1];
    }
    return chunk.count > 0;
  }

 private:
  struct Segment {
    int32_t begin, end;
    const RowLimits* limits;
  };

  int32_t block_key() const { return index_.block_indices[block_] + block_done_; }

  void add_segment(int32_t begin, int32_t end, const RowLimits& limits) {
    if (begin < end) segments_[num_segments_++] = {begin, end, &limits};
  }

  static int32_t clamp_key(int64_t key, int64_t k_len) {
    return static_cast<int32_t>(std::clamp<int64_t>(key, 0, k_len));
  }

  void set_causal_limits(const Sequence& sequence, bool causal) {
    for (int r = 0; r < tile_.rows(); ++r) {
      const int64_t p = tile_.first_row + r % tile_.rows_per_head + sequence.q_offset;
      outer_.lo[r] = 0;
      outer_.hi[r] = clamp_key(causal ? p + 1 : sequence.k_len, sequence.k_len);
    }
    summarise(outer_, tile_.rows());
  }

  void set_window_limits(const Sequence& sequence, int32_t window, int32_t dense_tail,
                         bool causal) {
    for (int r = 0; r < tile_.rows(); ++r) {
      const int64_t row = tile_.first_row + r % tile_.rows_per_head;
      const int64_t p = row + sequence.q_offset;
      const bool dense = row >= sequence.q_len - dense_tail;
      window_.lo[r] = dense ? 0 : clamp_key(p - window + 1, sequence.k_len);
      window_.hi[r] = dense || causal ? outer_.hi[r] : clamp_key(p + window, sequence.k_len);
      if (window == 0 && !dense) window_.hi[r] = window_.lo[r] = 0;
    }
    summarise(window_, tile_.rows());
  }

  // Moves keys [key, end) into the chunk until one of the two is full or empty.
  void take_run(KeyChunk& chunk, int32_t& key, int32_t end, const RowLimits& limits, int32_t mask,
                int32_t offset_in_block = 0) {
    if (skip_ > 0) {
      const int64_t skipped = std::min<int64_t>(skip_, end - key);
      skip_ -= skipped;
      key += static_cast<int32_t>(skipped);
      offset_in_block += static_cast<int32_t>(skipped);
    }
    const int32_t room = static_cast<int32_t>(std::min<int64_t>(kChunkKeys - chunk.count, left_));
    const int32_t n = std::min(end - key, room);
    if (n <= 0) return;
    note_limits(chunk, limits, key, key + n - 1);
    if (mask >= 0) begin_bits(chunk);
    for (int32_t i = 0; i < n;)
      i += rows_.take(key + i, n - i, chunk.k + chunk.count + i, chunk.v + chunk.count + i);
    for (int32_t i = 0; i < n; ++i) {
      const int32_t at = chunk.count + i;
      chunk.position[at] = key + i;
      if (chunk.has_bits)
        chunk.bits[at] = mask < 0 ? ~uint64_t{0} : row_bits(mask, offset_in_block + i);
      if (chunk.has_bias) chunk.bias[at] = 0.0f;
    }
    chunk.count += n;
    left_ -= n;
    key += n;
  }

  void take_columns(KeyChunk& chunk) {
    if (skip_ > 0) {
      const int64_t skipped = std::min(skip_, lists_.column_end - column_);
      skip_ -= skipped;
      column_ += skipped;
    }
    const int64_t room = std::min<int64_t>(kChunkKeys - chunk.count, left_);
    const int64_t n = std::min(room, lists_.column_end - column_);
    if (n <= 0) return;
    if (index_.column_bias != nullptr && !chunk.has_bias) {
      chunk.has_bias = true;
      std::fill(chunk.bias, chunk.bias + chunk.count, 0.0f);
    }
    const int32_t* keys = index_.column_indices + column_;
    int32_t taken = 0;
    for (; taken < n && keys[taken] < outer_.max_hi; ++taken) {
      const int32_t at = chunk.count + taken;
      const int32_t key = keys[taken];
      chunk.position[at] = key;
      rows_.take(key, 1, chunk.k + at, chunk.v + at);
      if (chunk.has_bits) chunk.bits[at] = ~uint64_t{0};
      if (chunk.has_bias) chunk.bias[at] = index_.column_bias[column_ + taken];
    }
    if (taken == 0) return;
    note_limits(chunk, outer_, keys[0], keys[taken - 1]);
    chunk.count += taken;
    left_ -= taken;
    column_ += taken;
  }

  static void note_limits(KeyChunk& chunk, const RowLimits& limits, int32_t first, int32_t last) {
    if (last >= limits.min_hi || first < limits.max_lo) chunk.limits = &limits;
  }

  static void begin_bits(KeyChunk& chunk) {
    if (chunk.has_bits) return;
    chunk.has_bits = true;
    std::fill(chunk.bits, chunk.bits + chunk.count, ~uint64_t{0});
  }

  // The bits of a block's key for this tile's rows, repeated for each packed head.
  uint64_t row_bits(int32_t mask, int32_t key_in_block) const {
    const int64_t words = (index_.block_m + kTileRows - 1) / kTileRows;
    const int64_t at = (static_cast<int64_t>(mask) * index_.block_n + key_in_block) * words;
    const uint64_t word = static_cast<uint64_t>(index_.block_bits[at + bits_word_]);
    if (tile_.heads == 1) return word;
    const uint64_t one = word & ((uint64_t{1} << tile_.rows_per_head) - 1);
    uint64_t all = 0;
    for (int32_t h = 0; h < tile_.heads; ++h) all |= one << (h * tile_.rows_per_head);
    return all;
  }

  const IndexView& index_;
  RowPointers rows_;
  TileShape tile_;
  TileLists lists_;
  Segment segments_[2];
  int num_segments_ = 0;
  int segment_ = 0;
  int64_t block_ = 0;
  int32_t block_done_ = 0;  // keys of the current block already delivered
  int64_t column_ = 0;
  int64_t bits_word_ = 0;
  int64_t skip_ = 0;
  int64_t left_ = INT64_MAX;
  RowLimits outer_;   // causality and the sequence's end
  RowLimits window_;  // a streaming head's window
};

}  // namespace sparse_attn
