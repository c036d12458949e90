// SPDX-License-Identifier: Apache-2.0
// Scores are taken 64 keys at a time: representatives lie far apart, and the row kernel takes keys
// as row pointers, so a gathered key costs it what a neighbour costs. Candidates stay in ascending
// order, which keeps the walk through K one-way, and the rows of the next 64 are prefetched.
#include "hip.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "kernels.h"
#include "rank.h"
#include "schedule.h"

namespace sparse_attn::cpu {
namespace {

// Up to kTileRows rows of the heads of one KV head: scored rows, or means of stride_q rows.
struct RowBatch {
  int64_t head;  // the first of `heads`
  int32_t heads;
  int64_t first;  // scored row of the tile, the same for each head
  int32_t rows;   // of each head
};

struct Piece {  // a run of leaves [begin, end)
  int32_t begin, end;
  int32_t representative;
  float score;
};

struct Walk {  // a chunk and what is left of it
  int32_t start, end;
  int32_t left, right;
  int32_t won;  // the last winner's representative
  float won_score;
  float best;  // of this head
  float score;
};

// Kept by each thread from call to call, as in forward.cpp.
struct Workspace {
  Tile tile;
  KeyChunk chunk;
  alignas(64) float q_rows[kTileRows * kMaxHeadDim];
  alignas(64) float wide[kMaxHeadDim];
  std::vector<RowBatch> batches;
  std::vector<Piece> pieces, halves;
  std::vector<Walk> walks;
  std::vector<int32_t> positions;
  std::vector<int32_t> owners;  // of positions
  std::vector<float> scores;
  std::vector<uint64_t> order;
};

Workspace& workspace() {
  thread_local std::unique_ptr<Workspace> space;
  if (!space) space.reset(new Workspace);
  return *space;
}

// Rows of K that are scored, by number: all of them, or a copy of those that may be.
struct KeyRows {
  TensorView rows;  // [batch, num_heads_kv, rows, head_dim]
  DType dtype;
  bool packed = false;
};

// One list's tile: its rows, and the scores of keys against them.
class TileSearch {
 public:
  TileSearch(const AttentionParams& params, const KeyRows& keys, const Kernels& kernels,
             const HipSearch& search, bool averaged, int64_t batch, int64_t list, int64_t tile)
      : p_(params),
        k_(keys),
        kernels_(kernels),
        search_(search),
        averaged_(averaged),
        batch_(batch),
        heads_per_list_(params.num_heads / search.lists),
        first_head_(list * heads_per_list_),
        group_(params.num_heads / params.num_heads_kv),
        first_row_(tile * search.block_m),
        rows_(std::min(search.block_m, params.seqlen_q - first_row_)),
        scored_rows_((rows_ + search.stride_q - 1) / search.stride_q),
        space(workspace()) {
    Tile& t = space.tile;
    t.dtype = DType::kFloat32;  // rows and keys are widened here, once for all instruction sets
    t.head_dim = p_.head_dim;
    t.head_dim_v = 0;
    t.softmax_scale = p_.softmax_scale;
  }

  int64_t first_head() const { return first_head_; }
  int64_t last_head() const { return first_head_ + heads_per_list_; }
  int64_t first_position() const { return first_row_ + search_.q_offset; }
  int64_t end_position() const { return first_position() + rows_; }

  // Takes the rows of the heads [begin, end), as many heads of a KV head at once as fit.
  void take_heads(int64_t begin, int64_t end) {
    space.batches.clear();
    loaded_ = -1;
    for (int64_t h = begin; h < end;) {
      const int64_t fit = std::max<int64_t>(kTileRows / scored_rows_, 1);
      const int64_t heads = std::min({fit, end - h, group_ - h % group_});
      for (int64_t r = 0; r < scored_rows_; r += kTileRows) {
        const int64_t rows = std::min<int64_t>(kTileRows, scored_rows_ - r);
        space.batches.push_back({h, static_cast<int32_t>(heads), r, static_cast<int32_t>(rows)});
      }
      h += heads;
    }
  }

  // space.scores[i] = max over the taken rows of softmax_scale * q . keys[space.positions[i]].
  void score_positions() {
    const int64_t n = static_cast<int64_t>(space.positions.size());
    space.scores.assign(n, -INFINITY);
    for (size_t b = 0; b < space.batches.size(); ++b) {
      keys_ = row_pointer(k_.rows, batch_, space.batches[b].head / group_, 0, key_width());
      prefetch_keys(0, std::min<int64_t>(kChunkKeys, n));
      load_rows(b);
      for (int64_t i = 0; i < n; i += kChunkKeys) {
        prefetch_keys(i + kChunkKeys, std::min<int64_t>(i + 2 * kChunkKeys, n));
        load_keys(i, std::min<int64_t>(kChunkKeys, n - i));
        kernels_.score_max(space.tile, space.chunk, space.scores.data() + i);
      }
    }
  }

 private:
  void load_rows(size_t b) {
    if (loaded_ == static_cast<int64_t>(b)) return;
    loaded_ = static_cast<int64_t>(b);
    const RowBatch& batch = space.batches[b];
    Tile& t = space.tile;
    t.rows = batch.heads * batch.rows;
    for (int r = 0; r < t.rows; ++r) {
      const int64_t head = batch.head + r / batch.rows;
      const int64_t row = (batch.first + r % batch.rows) * search_.stride_q;
      t.q_rows[r] =
          averaged_ && search_.stride_q > 1 ? mean_row(head, row, r) : one_row(head, row, r);
    }
    kernels_.row_begin(t);
  }

  const char* query(int64_t head, int64_t row) const {
    return row_pointer(p_.q, batch_, head, first_row_ + row, element_size(p_.dtype));
  }

  const char* one_row(int64_t head, int64_t row, int r) {
    if (p_.dtype == DType::kFloat32) return query(head, row);
    float* to = space.q_rows + r * p_.head_dim;
    kernels_.widen(query(head, row), to, p_.head_dim, p_.dtype);
    return reinterpret_cast<const char*>(to);
  }

  const char* mean_row(int64_t head, int64_t row, int r) {
    float* to = space.q_rows + r * p_.head_dim;
    const int64_t count = std::min(search_.stride_q, rows_ - row);
    std::fill_n(to, p_.head_dim, 0.0f);
    for (int64_t i = 0; i < count; ++i) {
      kernels_.widen(query(head, row + i), space.wide, p_.head_dim, p_.dtype);
      for (int d = 0; d < p_.head_dim; ++d) to[d] += space.wide[d];
    }
    for (int d = 0; d < p_.head_dim; ++d) to[d] /= static_cast<float>(count);
    return reinterpret_cast<const char*>(to);
  }

  void load_keys(int64_t first, int64_t count) {
    KeyChunk& c = space.chunk;
    c.count = static_cast<int32_t>(count);
    for (int64_t i = 0; i < count; ++i) {
      c.k[i] = key(first + i);
      if (k_.dtype == DType::kFloat32) continue;
      float* to = space.tile.k_wide + i * p_.head_dim;
      kernels_.widen(c.k[i], to, p_.head_dim, k_.dtype);
      c.k[i] = reinterpret_cast<const char*>(to);
    }
    for (int i = 0; i < kKeyPadding; ++i) c.k[count + i] = c.k[count - 1];
  }

  void prefetch_keys(int64_t begin, int64_t end) const {
    const int64_t bytes = p_.head_dim * key_width();
    for (int64_t i = begin; i < end; ++i)
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(key(i) + at, 0, 2);
  }

  const char* key(int64_t i) const {
    return keys_ + space.positions[i] * k_.rows.row_stride * key_width();
  }
  int64_t key_width() const { return element_size(k_.dtype); }

  const AttentionParams& p_;
  const KeyRows& k_;
  const Kernels& kernels_;
  const HipSearch& search_;
  bool averaged_;
  int64_t batch_;
  int64_t heads_per_list_;
  int64_t first_head_;
  int64_t group_;
  int64_t first_row_;
  int64_t rows_;
  int64_t scored_rows_;
  int64_t loaded_ = -1;
  const char* keys_ = nullptr;

 public:
  Workspace& space;
};

// Deals the tiles of all lists, those of one KV head together and the longest first: its keys stay
// in cache, and lists that share them read the same ones in the first steps.
template <class Work>
void deal_tiles(const AttentionParams& p, const HipSearch& search, const Executor& executor,
                Work work) {
  const int64_t tiles = (p.seqlen_q + search.block_m - 1) / search.block_m;
  const int64_t together = std::max<int64_t>(search.lists / p.num_heads_kv, 1);
  const int64_t runs = search.lists / together;
  deal(executor, p.num_sequences * search.lists * tiles, [&](int64_t i) {
    const int64_t within = i % together;
    const int64_t tile = tiles - 1 - i / together % tiles;
    const int64_t run = i / together / tiles;
    const int64_t list = run % runs * together + within;
    const int64_t batch = run / runs;
    work(batch, list, tile, (batch * search.lists + list) * tiles + tile);
    return true;
  });
}

void write_starts(const std::vector<int32_t>& from, int64_t capacity, int64_t at, int32_t* starts,
                  int32_t* counts) {
  counts[at] = static_cast<int32_t>(from.size());
  std::copy(from.begin(), from.end(), starts + at * capacity);
  std::fill(starts + at * capacity + from.size(), starts + (at + 1) * capacity, -1);
}

int64_t keys_of_leaf(const HipTree& tree) {
  return (tree.leaf + tree.stride_k - 1) / tree.stride_k;
}

// A copy of every stride_k-th key of the leaves, if the tiles together score more keys than that:
// neighbours in place of rows that lie a page apart, and widened once.
KeyRows pack_keys(const AttentionParams& p, const Kernels& kernels, const HipSearch& shape,
                  const HipTree& tree, const Executor& executor, std::unique_ptr<float[]>& memory) {
  const int64_t tiles = (p.seqlen_q + shape.block_m - 1) / shape.block_m;
  const int64_t per_leaf = keys_of_leaf(tree);
  const int64_t leaves = std::max<int64_t>(p.seqlen_k - shape.sink, 0) / tree.leaf + 1;
  if (tree.stride_k == 1 || tiles * tree.groups < leaves) return {p.k, p.dtype};
  const int64_t head_size = leaves * per_leaf * p.head_dim;
  memory.reset(new float[p.num_sequences * p.num_heads_kv * head_size]);
  deal(executor, p.num_sequences * p.num_heads_kv, [&](int64_t i) {
    for (int64_t row = 0; row < leaves * per_leaf; ++row) {
      const int64_t key = shape.sink + row / per_leaf * tree.leaf + row % per_leaf * tree.stride_k;
      if (key >= p.seqlen_k) continue;  // never scored
      kernels.widen(
          row_pointer(p.k, i / p.num_heads_kv, i % p.num_heads_kv, key, element_size(p.dtype)),
          memory.get() + i * head_size + row * p.head_dim, p.head_dim, p.dtype);
    }
    return true;
  });
  const TensorView rows{reinterpret_cast<char*>(memory.get()), p.num_heads_kv * head_size,
                        head_size, p.head_dim};
  return {rows, DType::kFloat32, true};
}

// Splits every piece in two, scores the halves that are new and keeps the best.
void split_pieces(TileSearch& search, const HipTree& tree, int64_t sink, int64_t end, bool packed) {
  Workspace& space = search.space;
  space.halves.clear();
  space.positions.clear();
  space.owners.clear();
  const auto add = [&](const Piece& parent, int32_t begin, int32_t half_end) {
    const int32_t representative = tree.center ? begin + (half_end - begin) / 2 : begin;
    const bool known = representative == parent.representative;
    space.halves.push_back({begin, half_end, representative, known ? parent.score : -INFINITY});
    if (known) return;
    const int64_t first = sink + representative * tree.leaf;
    const int64_t count = (std::min(tree.leaf, end - first) + tree.stride_k - 1) / tree.stride_k;
    const int64_t row = packed ? representative * keys_of_leaf(tree) : first;
    for (int64_t i = 0; i < count; ++i) {
      space.positions.push_back(static_cast<int32_t>(row + i * (packed ? 1 : tree.stride_k)));
      space.owners.push_back(static_cast<int32_t>(space.halves.size() - 1));
    }
  };
  for (const Piece& piece : space.pieces) {
    const int32_t middle = piece.begin + (piece.end - piece.begin) / 2;
    if (middle > piece.begin) add(piece, piece.begin, middle);
    add(piece, middle, piece.end);
  }
  search.score_positions();
  for (size_t i = 0; i < space.positions.size(); ++i) {
    float& score = space.halves[space.owners[i]].score;
    score = std::max(score, space.scores[i]);
  }
  keep_best(space.halves, tree.groups, space.order, [](const Piece& half) { return half.score; });
  space.pieces.swap(space.halves);
}

void tree_tile(TileSearch& search, const HipSearch& shape, const HipTree& tree, int64_t seqlen_k,
               bool packed) {
  Workspace& space = search.space;
  const int64_t end = std::min(search.end_position() - shape.window, seqlen_k);
  const int64_t leaves = end > shape.sink ? (end - shape.sink + tree.leaf - 1) / tree.leaf : 0;
  const int64_t pieces = std::min(leaves, tree.groups);
  space.pieces.clear();
  for (int64_t g = 0; g < pieces; ++g)
    space.pieces.push_back({static_cast<int32_t>(g * leaves / pieces),
                            static_cast<int32_t>((g + 1) * leaves / pieces), -1, -INFINITY});
  const auto wide = [](const Piece& piece) { return piece.end - piece.begin > 1; };
  if (leaves > pieces) search.take_heads(search.first_head(), search.last_head());
  while (std::any_of(space.pieces.begin(), space.pieces.end(), wide))
    split_pieces(search, tree, shape.sink, end, packed);
  space.positions.clear();
  for (const Piece& piece : space.pieces)
    space.positions.push_back(static_cast<int32_t>(shape.sink + piece.begin * tree.leaf));
}

// The chunks that the tile may still choose from.
void begin_walks(TileSearch& search, const HipSearch& shape, const HipStage& stage, int64_t at,
                 int64_t seqlen_k) {
  const int64_t scan_window = std::max<int64_t>(shape.window - stage.overlap, 0);
  const int64_t last_start = search.first_position() - scan_window;
  const int64_t end = std::min(search.end_position() - scan_window, seqlen_k);
  std::vector<Walk>& walks = search.space.walks;
  walks.clear();
  const auto add = [&](int64_t start) {
    if (start < 0 || start > last_start || start >= end) return;
    const auto from = static_cast<int32_t>(start);
    const auto to = static_cast<int32_t>(std::min(start + stage.chunk, end));
    walks.push_back({from, to, from, to, -1, -INFINITY, -INFINITY, -INFINITY});
  };
  if (stage.parents == nullptr) {
    for (int64_t start = shape.sink; start < search.end_position() - shape.window;
         start += stage.chunk)
      add(start);
    return;
  }
  const int64_t count = std::min<int64_t>(stage.parent_counts[at], stage.num_parents);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t parent = stage.parents[at * stage.num_parents + i];
    for (int64_t within = 0; within < stage.parent_chunk; within += stage.chunk)
      add(parent + within);
  }
}

// One halving of every chunk. The right half wins ties, so a chunk of one key stays as it is.
void step_walks(TileSearch& search) {
  Workspace& space = search.space;
  space.positions.clear();
  const auto left_key = [](const Walk& w, int32_t middle) { return (w.left + middle) / 2; };
  const auto right_key = [](const Walk& w, int32_t middle) { return (middle + w.right) / 2; };
  const auto middle_of = [](const Walk& w) { return w.left + (w.right - w.left) / 2; };
  for (const Walk& w : space.walks)
    for (const int32_t key : {left_key(w, middle_of(w)), right_key(w, middle_of(w))})
      if (key != w.won) space.positions.push_back(key);
  search.score_positions();
  const float* score = space.scores.data();
  for (Walk& w : space.walks) {
    const int32_t middle = middle_of(w);
    const int32_t left = left_key(w, middle), right = right_key(w, middle);
    const float left_score = left == w.won ? w.won_score : *score++;
    const float right_score = right == w.won ? w.won_score : *score++;
    const bool left_wins = left_score > right_score;
    (left_wins ? w.right : w.left) = middle;
    w.won = left_wins ? left : right;
    w.won_score = left_wins ? left_score : right_score;
    w.best = std::max(w.best, w.won_score);
  }
}

void stage_tile(TileSearch& search, const HipSearch& shape, const HipStage& stage, int64_t at,
                int64_t seqlen_k) {
  Workspace& space = search.space;
  begin_walks(search, shape, stage, at, seqlen_k);
  // A choice of all needs no score.
  const bool chooses = static_cast<int64_t>(space.walks.size()) > stage.keep;
  for (int64_t h = search.first_head(); h < search.last_head() && chooses; ++h) {
    search.take_heads(h, h + 1);
    // After chunk / 2, ..., 1 the one key that is left has been scored already.
    for (int64_t size = stage.chunk; size > 1 || size == stage.chunk; size /= 2) step_walks(search);
    for (Walk& w : space.walks) {
      w.score = std::max(w.score, w.best);
      w.left = w.start;
      w.right = w.end;
      w.won = -1;
      w.best = -INFINITY;
    }
  }
  keep_best(space.walks, stage.keep, space.order, [](const Walk& w) { return w.score; });
  space.positions.clear();
  for (const Walk& w : space.walks) space.positions.push_back(w.start);
}

}  // namespace

void hip_tree(const AttentionParams& p, const HipSearch& shape, const HipTree& tree,
              int32_t* starts, int32_t* counts, const Executor& executor) {
  const Kernels& table = kernels();
  std::unique_ptr<float[]> memory;
  const KeyRows keys = pack_keys(p, table, shape, tree, executor, memory);
  deal_tiles(p, shape, executor, [&](int64_t batch, int64_t list, int64_t tile, int64_t at) {
    TileSearch search(p, keys, table, shape, false, batch, list, tile);
    tree_tile(search, shape, tree, p.seqlen_k, keys.packed);
    write_starts(search.space.positions, tree.groups, at, starts, counts);
  });
}

void hip_stage(const AttentionParams& p, const HipSearch& shape, const HipStage& stage,
               int32_t* starts, int32_t* counts, const Executor& executor) {
  const Kernels& table = kernels();
  const KeyRows keys{p.k, p.dtype};
  deal_tiles(p, shape, executor, [&](int64_t batch, int64_t list, int64_t tile, int64_t at) {
    TileSearch search(p, keys, table, shape, true, batch, list, tile);
    stage_tile(search, shape, stage, at, p.seqlen_k);
    write_starts(search.space.positions, stage.keep, at, starts, counts);
  });
}

}  // namespace sparse_attn::cpu
