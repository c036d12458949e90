// SPDX-License-Identifier: Apache-2.0
#include "anchor.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "kernels.h"
#include "schedule.h"

namespace sparse_attn::cpu {
namespace {

struct Run {
  int64_t begin, end;
};

// Keys of 16-bit inputs are widened a chunk at a time; products are float32 whatever the input.
struct Workspace {
  Tile tile;
  KeyChunk chunk;
  alignas(64) float keys[kChunkKeys * kMaxHeadDim];
  alignas(64) float rows[kTileRows * kMaxHeadDim];
  float top[kTileRows];
};

class Superblock {
 public:
  Superblock(const AttentionParams& p, const AnchorRule& rule, const Kernels& kernels, int64_t item,
             int64_t supers)
      : p_(p), rule_(rule), kernels_(kernels), width_(element_size(p.dtype)) {
    const int64_t head = item / supers % p.num_heads;
    batch_ = item / supers / p.num_heads;
    head_ = head;
    head_kv_ = head / (p.num_heads / p.num_heads_kv);
    first_row_ = item % supers * rule.super();
    last_row_ = std::min(first_row_ + rule.super(), p.seqlen_q);
    const int64_t start = first_row_ + rule.q_offset;
    const int64_t aligned = start - ((start % rule.super()) + rule.super()) % rule.super();
    const int64_t last = last_row_ - 1 + rule.q_offset;
    limit_ = std::clamp<int64_t>(p.causal ? last + 1 : p.seqlen_k, 0, p.seqlen_k);
    sink_ = {0, std::min(rule.sink, limit_)};
    local_ = {std::clamp<int64_t>(aligned, sink_.end, limit_),
              std::clamp<int64_t>(start + rule.super(), sink_.end, limit_)};
  }

  AnchorLists lists() {
    space_ = std::make_unique<Workspace>();
    space_->tile.dtype = DType::kFloat32;
    space_->tile.head_dim = p_.head_dim;
    space_->tile.head_dim_v = 0;
    find_anchors();
    std::vector<uint8_t> kept(limit_, 0);
    const int64_t tiles = static_cast<int64_t>(bounds_.size());
    for (int64_t tile = 0; tile < tiles; tile += kTileRows) {
      mark({sink_.end, local_.begin}, tile, kept);
      mark({local_.end, limit_}, tile, kept);
    }
    AnchorLists lists;
    take_run(sink_, lists);
    take_kept({sink_.end, local_.begin}, kept, lists);
    take_run(local_, lists);
    take_kept({local_.end, limit_}, kept, lists);
    return lists;
  }

 private:
  // Per tile, over its rows that see an anchor key: the sum of scaled queries, and what a key's
  // product with that sum must reach. Sums instead of means: the same rule, and exact where the
  // inputs are.
  void find_anchors() {
    Workspace& w = *space_;
    const int64_t tiles = (last_row_ - first_row_ + rule_.block - 1) / rule_.block;
    sums_.assign(tiles * p_.head_dim, 0.0f);
    bounds_.assign(tiles, 0.0f);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = first_row_ + tile * rule_.block;
      const int64_t end = std::min(begin + rule_.block, last_row_);
      int64_t seeing = 0;
      for (int64_t row = begin; row < end; row += kTileRows) {
        const auto rows = static_cast<int32_t>(std::min<int64_t>(kTileRows, end - row));
        load_queries(row, rows);
        std::fill_n(w.top, kTileRows, -INFINITY);
        for (const Run& run : {sink_, local_}) find_tops(run, row + rule_.q_offset, rows);
        for (int32_t r = 0; r < rows; ++r) {
          if (!(w.top[r] > -INFINITY)) continue;
          ++seeing;
          bounds_[tile] += w.top[r];
          for (int32_t d = 0; d < p_.head_dim; ++d)
            sums_[tile * p_.head_dim + d] += w.rows[r * p_.head_dim + d];
        }
      }
      bounds_[tile] -= static_cast<float>(seeing) * rule_.theta;
      if (seeing == 0) bounds_[tile] = INFINITY;
    }
  }

  void load_queries(int64_t row, int32_t rows) {
    Workspace& w = *space_;
    for (int32_t r = 0; r < rows; ++r) {
      float* to = w.rows + r * p_.head_dim;
      kernels_.widen(row_pointer(p_.q, batch_, head_, row + r, width_), to, p_.head_dim, p_.dtype);
      for (int32_t d = 0; d < p_.head_dim; ++d) to[d] *= p_.softmax_scale;
    }
    begin_tile(w.rows, rows);
  }

  void begin_tile(const float* rows, int32_t count) {
    Tile& tile = space_->tile;
    tile.rows = count;
    for (int32_t r = 0; r < count; ++r)
      tile.q_rows[r] = reinterpret_cast<const char*>(rows + r * p_.head_dim);
    kernels_.row_begin(tile);
  }

  // Scores of up to kChunkKeys keys from `key` on, into tile.scores.
  void score_keys(int64_t key, int64_t count) {
    Workspace& w = *space_;
    w.chunk.count = static_cast<int32_t>(count);
    for (int64_t i = 0; i < count; ++i) {
      const char* row = row_pointer(p_.k, batch_, head_kv_, key + i, width_);
      if (p_.dtype != DType::kFloat32) {
        float* to = w.keys + i * p_.head_dim;
        kernels_.widen(row, to, p_.head_dim, p_.dtype);
        row = reinterpret_cast<const char*>(to);
      }
      w.chunk.k[i] = row;
    }
    for (int i = 0; i < kKeyPadding; ++i) w.chunk.k[count + i] = w.chunk.k[count - 1];
    kernels_.row_score(w.tile, w.chunk);
  }

  // The rows' largest scores among the keys of a run that they see; a NaN is none.
  void find_tops(const Run& run, int64_t position, int32_t rows) {
    Workspace& w = *space_;
    const int64_t end = p_.causal ? std::min(run.end, position + rows) : run.end;
    for (int64_t key = run.begin; key < end; key += kChunkKeys) {
      const int64_t count = std::min<int64_t>(kChunkKeys, end - key);
      score_keys(key, count);
      for (int64_t i = 0; i < count; ++i) {
        const float* scores = w.tile.scores + i * kTileRows;
        const int64_t hidden = p_.causal ? key + i - position : 0;  // rows before the key
        if (hidden <= 0) {
          for (int r = 0; r < kTileRows; ++r)
            w.top[r] = scores[r] > w.top[r] ? scores[r] : w.top[r];
        } else {
          for (int64_t r = hidden; r < rows; ++r)
            w.top[r] = scores[r] > w.top[r] ? scores[r] : w.top[r];
        }
      }
    }
  }

  // Marks the keys of a run that reach the bound of one of the tiles from `first` on.
  void mark(const Run& run, int64_t first, std::vector<uint8_t>& kept) {
    Workspace& w = *space_;
    const auto tiles = static_cast<int32_t>(
        std::min<int64_t>(kTileRows, static_cast<int64_t>(bounds_.size()) - first));
    begin_tile(sums_.data() + first * p_.head_dim, tiles);
    for (int64_t key = run.begin; key < run.end; key += kChunkKeys) {
      const int64_t count = std::min<int64_t>(kChunkKeys, run.end - key);
      score_keys(key, count);
      for (int64_t i = 0; i < count; ++i)
        for (int32_t t = 0; t < tiles; ++t)
          kept[key + i] |= w.tile.scores[i * kTileRows + t] >= bounds_[first + t];
    }
  }

  // A run as blocks; where nothing follows it, the last block may run past it.
  void take_run(const Run& run, AnchorLists& lists) const {
    int64_t key = run.begin;
    while (key < run.end && (key + rule_.block_n <= run.end || run.end == limit_)) {
      lists.blocks.push_back(static_cast<int32_t>(key));
      key += rule_.block_n;
    }
    for (; key < run.end; ++key) lists.columns.push_back(static_cast<int32_t>(key));
  }

  static void take_kept(const Run& run, const std::vector<uint8_t>& kept, AnchorLists& lists) {
    for (int64_t key = run.begin; key < run.end; ++key)
      if (kept[key]) lists.columns.push_back(static_cast<int32_t>(key));
  }

  const AttentionParams& p_;
  const AnchorRule& rule_;
  const Kernels& kernels_;
  const int64_t width_;
  int64_t batch_, head_, head_kv_, first_row_, last_row_, limit_;
  Run sink_, local_;
  std::vector<float> sums_, bounds_;
  std::unique_ptr<Workspace> space_;
};

}  // namespace

std::vector<AnchorLists> anchor_lists(const AttentionParams& p, const AnchorRule& rule,
                                      const Executor& executor) {
  const Kernels& table = kernels();
  const int64_t supers = (p.seqlen_q + rule.super() - 1) / rule.super();
  std::vector<AnchorLists> lists(p.num_sequences * p.num_heads * supers);
  // The last superblocks have the most to look at: they come first.
  const auto n = static_cast<int64_t>(lists.size());
  deal(executor, n, [&](int64_t i) {
    const int64_t item = i % (n / supers) * supers + supers - 1 - i / (n / supers);
    lists[item] = Superblock(p, rule, table, item, supers).lists();
    return true;
  });
  return lists;
}

}  // namespace sparse_attn::cpu
