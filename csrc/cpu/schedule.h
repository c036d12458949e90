// SPDX-License-Identifier: Apache-2.0
// Cuts a call into tiles. A unit is one sequence and the query heads that share tiles; its tiles
// are numbered from 0, and a call's tiles are numbered through all units.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "../core/key_stream.h"
#include "attention.h"

namespace sparse_attn::cpu {

struct Unit {
  int64_t sequence;
  int64_t index_batch;
  int64_t index_head;
  int64_t first_head;
  int32_t heads;             // query heads of one KV head whose rows share a tile
  int32_t rows_per_head;     // of a full tile
  int64_t tile_stride;       // rows between the starts of two tiles' parents
  int32_t tiles_per_parent;  // kernel tiles in one tile of the index
  int64_t tiles;
  int64_t first_tile;  // in the call's numbering
};

class Schedule {
 public:
  explicit Schedule(const AttentionParams& params) : params_(params) {
    const IndexView& index = params.index;
    const int64_t group = params.num_heads / params.num_heads_kv;
    for (int64_t s = 0; s < params.num_sequences; ++s) {
      for (int64_t h = 0; h < params.num_heads;) {
        const int64_t index_head = index.num_heads == 1                  ? 0
                                   : index.num_heads == params.num_heads ? h
                                                                         : h / group;
        Unit unit = unit_of(s, index_head, h);
        // Heads of one KV head that share lists share tiles, as far as rows allow.
        const bool shared = index.num_heads < params.num_heads;
        const int64_t left_in_group = group - h % group;
        const int64_t fit = unit.rows_per_head > 0 ? kTileRows / unit.rows_per_head : 1;
        unit.heads = static_cast<int32_t>(shared ? std::min(left_in_group, fit) : 1);
        unit.first_tile = tiles_;
        tiles_ += unit.tiles;
        h += unit.heads;
        units_.push_back(unit);
      }
    }
  }

  int64_t tiles() const { return tiles_; }
  const std::vector<Unit>& units() const { return units_; }

  const Unit& unit_of_tile(int64_t tile) const {
    const auto after =
        std::upper_bound(units_.begin(), units_.end(), tile,
                         [](int64_t value, const Unit& unit) { return value < unit.first_tile; });
    return *(after - 1);
  }

  // Rows of a unit's tile; none if the parent tile ends before it.
  TileShape shape(const Unit& unit, int64_t tile) const {
    const int64_t parent = tile / unit.tiles_per_parent;
    const int64_t within = tile % unit.tiles_per_parent * kTileRows;
    TileShape shape;
    shape.first_row = parent * unit.tile_stride + within;
    const int64_t rows = std::min({int64_t{unit.rows_per_head}, unit.tile_stride - within,
                                   params_.sequences[unit.sequence].q_len - shape.first_row});
    shape.rows_per_head = static_cast<int32_t>(std::max<int64_t>(rows, 0));
    shape.heads = unit.heads;
    return shape;
  }

 private:
  Unit unit_of(int64_t s, int64_t index_head, int64_t first_head) const {
    const IndexView& index = params_.index;
    const Sequence& sequence = params_.sequences[s];
    Unit unit{};
    unit.sequence = s;
    unit.index_batch = index.batch == 1 ? 0 : s;
    unit.index_head = index_head;
    unit.first_head = first_head;
    const bool listed = index.heads[index_head * 4] == kListed;
    unit.tile_stride = listed ? index.block_m : kTileRows;
    unit.tile_stride = std::min(unit.tile_stride, std::max<int64_t>(sequence.q_len, 1));
    unit.rows_per_head = static_cast<int32_t>(std::min<int64_t>(unit.tile_stride, kTileRows));
    unit.tiles_per_parent = static_cast<int32_t>((unit.tile_stride + kTileRows - 1) / kTileRows);
    unit.tiles = (sequence.q_len + unit.tile_stride - 1) / unit.tile_stride * unit.tiles_per_parent;
    return unit;
  }

  const AttentionParams& params_;
  std::vector<Unit> units_;
  int64_t tiles_ = 0;
};

// The first fault that any thread meets stops all of them.
class FaultBox {
 public:
  bool empty() const { return !set_.load(std::memory_order_relaxed); }
  void put(const IndexFault& fault) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (set_.load()) return;
    fault_ = fault;
    set_.store(true);
  }
  IndexFault take() const { return fault_; }

 private:
  std::atomic<bool> set_{false};
  std::mutex mutex_;
  IndexFault fault_;
};

// Deals 0..n-1 to the executor's threads one by one; work(i) returns false to stop.
// A thread stops only when nothing is left to deal, whatever the tiles' lengths: none idles while
// another has more to do than the tile in its hands.
template <class Work>
void deal(const Executor& executor, int64_t n, Work work) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(executor.num_threads, n);
  const auto take = [&](int64_t) {
    for (int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1))
      if (!work(i)) return;
  };
  if (workers <= 1) return take(0);
  executor.run(workers, take);
}

// As `deal`, with something of its own for each thread: make() is called once a thread, work(i,
// made) for each i.
template <class Make, class Work>
void deal_with(const Executor& executor, int64_t n, Make make, Work work) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(executor.num_threads, n);
  executor.run(workers, [&](int64_t) {
    auto made = make();
    for (int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) work(i, made);
  });
}

// Checks the lists that a unit's tile reads.
inline IndexFault check_unit_tile(const AttentionParams& params, const Unit& unit,
                                  const TileShape& shape) {
  const int64_t parent = shape.first_row / params.index.block_m;
  return check_tile(params.index, unit.index_batch, unit.index_head, parent, params.seqlen_k);
}

inline const char* row_pointer(const TensorView& x, int64_t batch, int64_t head, int64_t row,
                               int64_t width) {
  return x.data + (batch * x.batch_stride + head * x.head_stride + row * x.row_stride) * width;
}

// The keys of a unit's tile.
inline KeyStream key_stream(const AttentionParams& p, const Unit& unit, const TileShape& shape) {
  const Sequence& s = p.sequences[unit.sequence];
  const int64_t head_kv = unit.first_head / (p.num_heads / p.num_heads_kv);
  const int64_t width = element_size(p.dtype);
  if (p.pages.block_table != nullptr)
    return KeyStream(p, s, shape, unit.index_batch, unit.index_head,
                     row_pointer(p.k, 0, head_kv, 0, width), row_pointer(p.v, 0, head_kv, 0, width),
                     p.pages.block_table + unit.sequence * p.pages.max_pages);
  return KeyStream(p, s, shape, unit.index_batch, unit.index_head,
                   row_pointer(p.k, s.batch, head_kv, s.k_start, width),
                   row_pointer(p.v, s.batch, head_kv, s.k_start, width));
}

}  // namespace sparse_attn::cpu
