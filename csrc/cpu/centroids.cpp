// SPDX-License-Identifier: Apache-2.0
#include "centroids.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "schedule.h"

namespace sparse_attn::cpu {
namespace {

// Clusters of one head that changed, and those that did not.
struct Split {
  std::vector<int32_t> changed, same;
};

Split split_clusters(const bool* changed, int64_t clusters) {
  Split split;
  for (int64_t c = 0; c < clusters; ++c)
    (changed == nullptr || changed[c] ? split.changed : split.same).push_back(static_cast<int>(c));
  return split;
}

// One block of a head's keys. An unchanged centroid has the product it had, which the label's was
// not below. So a key needs the changed ones only, unless its own changed and none of them is
// above the old product: then the unchanged ones may have come out on top.
void nearest_block(const NearestParams& p, const Kernels& table, const Split& split, int64_t head,
                   int64_t first, NearestBlock& block) {
  const int64_t n = std::min<int64_t>(kNearestRows, p.keys.n - first);
  const float* centroids = p.centroids + head * p.clusters * p.keys.dim;
  const bool* changed = p.changed == nullptr ? nullptr : p.changed + head * p.clusters;
  int32_t* labels = p.labels + head * p.keys.n + first;
  float* scores = p.scores + head * p.keys.n + first;
  const auto row = [&](int64_t i) {
    return row_pointer(p.keys.keys, head / p.keys.heads, head % p.keys.heads, first + i,
                       element_size(p.keys.dtype));
  };
  const auto begin = [&](int64_t i, float best, int32_t label) {
    block.rows[block.count] = row(i);
    block.best[block.count] = best;
    block.label[block.count++] = label;
  };
  block.count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (changed == nullptr || changed[labels[i]]) {
      begin(i, -INFINITY, split.changed[0]);
    } else {
      begin(i, scores[i], labels[i]);
    }
  }
  table.nearest(block, centroids, split.changed.data(), std::ssize(split.changed));
  std::vector<int64_t> again;
  for (int64_t i = 0; i < n; ++i) {
    if (changed != nullptr && changed[labels[i]] && !(block.best[i] > scores[i]))
      again.push_back(i);
    labels[i] = block.label[i];
    scores[i] = block.best[i];
  }
  if (again.empty() || split.same.empty()) return;
  block.count = 0;
  for (const int64_t i : again) begin(i, scores[i], labels[i]);
  table.nearest(block, centroids, split.same.data(), std::ssize(split.same));
  for (size_t i = 0; i < again.size(); ++i) {
    labels[again[i]] = block.label[i];
    scores[again[i]] = block.best[i];
  }
}

// What the tiles of centroid_scores need; kept by each thread from call to call, as in forward.cpp.
struct ShareSpace {
  Tile tile;
  KeyChunk chunk, next;
  std::vector<float> rows;    // [kTileRows, dim] query rows as float32
  std::vector<float> logits;  // [kTileRows, pitch]
  std::vector<float> counts;  // [pitch]
  std::vector<float> shares;  // [1 or group, pitch]
  std::vector<int32_t> ids;   // the clusters that are scored
};

ShareSpace& share_space() {
  thread_local std::unique_ptr<ShareSpace> space;
  if (!space) space = std::make_unique_for_overwrite<ShareSpace>();
  return *space;
}

// Clusters with keys, under kept parents.
void candidates(const ShareParams& p, int64_t head, int64_t tile, std::vector<int32_t>& ids) {
  ids.resize(p.clusters);
  int64_t n = 0;
  const int32_t* counts = p.counts + head * p.clusters;
  const auto take = [&](int64_t from, int64_t to) {
    for (int64_t c = from; c < to; ++c) {
      ids[n] = static_cast<int32_t>(c);
      n += counts[c] > 0;
    }
  };
  if (p.parents == nullptr) {
    take(0, p.clusters);
    return ids.resize(n);
  }
  const int32_t* range = p.parents + head * (p.num_parents + 1);
  const bool* kept = p.kept + (head * p.tiles + tile) * p.num_parents;
  for (int64_t parent = 0; parent < p.num_parents; ++parent)
    if (kept[parent]) take(range[parent], range[parent + 1]);
  ids.resize(n);
}

// logits[row][i] = rows[row] . centroid ids[i], for `count` rows.
void few_rows(const ShareParams& p, const Kernels& table, const float* centroids, int count,
              int64_t pitch, ShareSpace& s) {
  s.tile.rows = count;
  for (int r = 0; r < count; ++r)
    s.tile.q_rows[r] = reinterpret_cast<const char*>(s.rows.data() + r * p.dim);
  table.dim_begin(s.tile);
  const int64_t all = std::ssize(s.ids);
  const auto fill = [&](int64_t first, KeyChunk& chunk) {
    chunk.count = static_cast<int32_t>(std::clamp<int64_t>(all - first, 0, kChunkKeys));
    for (int32_t j = 0; j < chunk.count; ++j)
      chunk.k[j] = reinterpret_cast<const char*>(centroids + int64_t{s.ids[first + j]} * p.dim);
  };
  KeyChunk* chunk = &s.chunk;
  KeyChunk* next = &s.next;
  fill(0, *chunk);
  for (int64_t i = 0; i < all; i += kChunkKeys, std::swap(chunk, next)) {
    fill(i + kChunkKeys, *next);
    table.dim_score(s.tile, *chunk, next);
    for (int r = 0; r < count; ++r)
      std::memcpy(s.logits.data() + r * pitch + i, s.tile.scores + r * kChunkKeys,
                  chunk->count * sizeof(float));
  }
}

// The same for many rows: centroids take the part of the tile's rows, queries that of the keys.
void many_rows(const ShareParams& p, const Kernels& table, const float* centroids, int count,
               int64_t pitch, ShareSpace& s) {
  s.chunk.count = count;
  for (int r = 0; r < count + kKeyPadding; ++r)
    s.chunk.k[r] = reinterpret_cast<const char*>(s.rows.data() + std::min(r, count - 1) * p.dim);
  for (int64_t i = 0; i < std::ssize(s.ids); i += kTileRows) {
    const int64_t n = std::min<int64_t>(kTileRows, std::ssize(s.ids) - i);
    s.tile.rows = static_cast<int32_t>(n);
    for (int64_t j = 0; j < n; ++j)
      s.tile.q_rows[j] = reinterpret_cast<const char*>(centroids + int64_t{s.ids[i + j]} * p.dim);
    table.row_begin(s.tile);
    table.row_score(s.tile, s.chunk);
    for (int r = 0; r < count; ++r)
      std::memcpy(s.logits.data() + r * pitch + i, s.tile.scores + r * kTileRows,
                  n * sizeof(float));
  }
}

void share_tile(const ShareParams& p, const Kernels& table, int64_t head, int64_t tile,
                ShareSpace& s) {
  float* out = p.out + (head * p.tiles + tile) * p.clusters;
  std::fill_n(out, p.clusters, -1.0f);
  candidates(p, head, tile, s.ids);
  const int64_t n = std::ssize(s.ids), pitch = (n + 15) / 16 * 16;
  const int64_t group = p.num_heads / p.num_heads_kv;
  const int64_t first = tile * p.tile_rows;
  const int64_t rows = std::min(p.tile_rows, p.seqlen_q - first);
  if (n == 0) return;
  const int64_t sums = p.reduce_max ? group : 1;
  s.counts.assign(pitch, 0.0f);
  for (int64_t i = 0; i < n; ++i)
    s.counts[i] = static_cast<float>(p.counts[head * p.clusters + s.ids[i]]);
  s.shares.assign(sums * pitch, 0.0f);
  const int64_t all = group * rows, step = std::min<int64_t>(all, kTileRows);
  if (std::ssize(s.logits) < step * pitch) s.logits.resize(step * pitch);
  const float weight = 1.0f / static_cast<float>(p.reduce_max ? rows : all);
  const float* centroids = p.centroids + head * p.clusters * p.dim;
  const int64_t batch = head / p.num_heads_kv, first_head = head % p.num_heads_kv * group;
  for (int64_t done = 0; done < all; done += step) {
    const int count = static_cast<int>(std::min(step, all - done));
    for (int r = 0; r < count; ++r) {
      const int64_t of = done + r;  // rows of one query head after the other
      table.widen(
          row_pointer(p.q, batch, first_head + of / rows, first + of % rows, element_size(p.dtype)),
          s.rows.data() + r * p.dim, p.dim, p.dtype);
    }
    (count <= table.max_dim_rows ? few_rows : many_rows)(p, table, centroids, count, pitch, s);
    for (int r = 0; r < count; ++r)
      table.add_shares(s.logits.data() + r * pitch, s.counts.data(), n, p.scale, weight,
                       s.shares.data() + (p.reduce_max ? (done + r) / rows : 0) * pitch);
  }
  for (int64_t i = 0; i < n; ++i) {
    float share = s.shares[i];
    for (int64_t g = 1; g < sums; ++g) share = std::max(share, s.shares[g * pitch + i]);
    out[s.ids[i]] = share;
  }
}

// Leaves the best of the kept clusters of one list, as many as the budget has room for.
void apply_budget(const float* scores, const int64_t* indptr, int64_t clusters, int64_t budget,
                  bool* keep) {
  std::vector<int32_t> order;
  for (int64_t c = 0; c < clusters; ++c)
    if (keep[c]) order.push_back(static_cast<int32_t>(c));
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  });
  int64_t keys = 0;
  bool room = true;
  for (size_t i = 0; i < order.size(); ++i) {
    const int64_t count = indptr[order[i] + 1] - indptr[order[i]];
    room = room && (i == 0 || keys + count <= budget);
    keys += count;
    keep[order[i]] = room;
  }
}

}  // namespace

void nearest_centroids(const NearestParams& p, const Executor& executor) {
  const Kernels& table = kernels();
  const int64_t heads = p.keys.batch * p.keys.heads;
  if (p.clusters == 0 || p.keys.n == 0) return;
  std::vector<Split> splits;
  for (int64_t h = 0; h < heads; ++h)
    splits.push_back(
        split_clusters(p.changed == nullptr ? nullptr : p.changed + h * p.clusters, p.clusters));
  const int64_t blocks = (p.keys.n + kNearestRows - 1) / kNearestRows;
  deal_with(
      executor, heads * blocks, [] { return std::make_unique_for_overwrite<NearestBlock>(); },
      [&](int64_t i, auto& block) {
        const Split& split = splits[i / blocks];
        if (split.changed.empty()) return;
        block->dtype = p.keys.dtype;
        block->dim = p.keys.dim;
        nearest_block(p, table, split, i / blocks, i % blocks * kNearestRows, *block);
      });
}

bool cluster_members(const int32_t* labels, int64_t heads, int64_t n, int64_t clusters,
                     int64_t* indptr, int32_t* members, const Executor& executor) {
  std::atomic<bool> valid{true};
  deal(executor, heads, [&](int64_t h) {
    const int32_t* label = labels + h * n;
    int64_t* start = indptr + h * (clusters + 1);
    std::fill_n(start, clusters + 1, 0);
    for (int64_t i = 0; i < n; ++i) {
      if (label[i] < 0 || label[i] >= clusters) {
        valid = false;
        return false;
      }
      ++start[label[i] + 1];
    }
    std::partial_sum(start, start + clusters + 1, start);
    std::vector<int64_t> next(start, start + clusters);
    for (int64_t i = 0; i < n; ++i) members[h * n + next[label[i]]++] = static_cast<int32_t>(i);
    return true;
  });
  return valid;
}

void cluster_means(const KeysView& keys, const float* weights, const int64_t* indptr,
                   const int32_t* members, int64_t clusters, float* means,
                   const Executor& executor) {
  constexpr int64_t kStep = 64;  // clusters a thread takes at a time
  const Kernels& table = kernels();
  const int64_t width = element_size(keys.dtype);
  const int64_t steps = (clusters + kStep - 1) / kStep;
  deal(executor, keys.batch * keys.heads * steps, [&](int64_t i) {
    const int64_t h = i / steps;
    const char* base = row_pointer(keys.keys, h / keys.heads, h % keys.heads, 0, width);
    const int64_t* start = indptr + h * (clusters + 1);
    for (int64_t c = i % steps * kStep; c < std::min(clusters, (i % steps + 1) * kStep); ++c) {
      float* mean = means + (h * clusters + c) * keys.dim;
      const int64_t count = start[c + 1] - start[c];
      table.add_rows(base, keys.keys.row_stride * width, members + h * keys.n + start[c], count,
                     weights == nullptr ? nullptr : weights + h * keys.n, keys.dim, keys.dtype,
                     mean);
      for (int d = 0; d < keys.dim && count > 0; ++d) mean[d] /= static_cast<float>(count);
    }
    return true;
  });
}

void centroid_scores(const ShareParams& p, const Executor& executor) {
  const Kernels& table = kernels();
  const auto begin = [&] {
    ShareSpace* space = &share_space();
    space->tile.dtype = DType::kFloat32;
    space->tile.head_dim = p.dim;
    space->tile.head_dim_v = 0;
    space->rows.resize(kTileRows * p.dim);
    return space;
  };
  deal_with(executor, p.batch * p.num_heads_kv * p.tiles, begin,
            [&](int64_t i, auto space) { share_tile(p, table, i / p.tiles, i % p.tiles, *space); });
}

void keep_clusters(const float* scores, const int64_t* indptr, int64_t heads, int64_t tiles,
                   int64_t clusters, double threshold, int64_t budget, bool* keep, int64_t* counts,
                   const Executor& executor) {
  deal(executor, heads * tiles, [&](int64_t i) {
    const float* score = scores + i * clusters;
    const int64_t* start = indptr + i / tiles * (clusters + 1);
    bool* kept = keep + i * clusters;
    for (int64_t c = 0; c < clusters; ++c) kept[c] = keeps_cluster(score[c], threshold);
    if (budget >= 0) apply_budget(score, start, clusters, budget, kept);
    counts[i] = 0;
    for (int64_t c = 0; c < clusters; ++c)
      if (kept[c]) counts[i] += start[c + 1] - start[c];
    return true;
  });
}

bool kept_members(const bool* keep, const int64_t* counts, const int64_t* indptr,
                  const int32_t* members, int64_t heads, int64_t tiles, int64_t clusters, int64_t n,
                  int32_t* indices, const Executor& executor) {
  std::vector<int64_t> first(heads * tiles + 1, 0);
  std::partial_sum(counts, counts + heads * tiles, first.begin() + 1);
  std::atomic<bool> valid{true};
  deal(executor, heads * tiles, [&](int64_t i) {
    const int64_t h = i / tiles;
    const int64_t* start = indptr + h * (clusters + 1);
    // A bit a key puts the members of all kept clusters in order.
    std::vector<uint64_t> bits((n + 63) / 64, 0);
    std::vector<int32_t> kept;
    for (int64_t c = 0; c < clusters; ++c) {
      if (!keep[i * clusters + c]) continue;
      kept.push_back(static_cast<int32_t>(c));
      for (int64_t j = start[c]; j < start[c + 1]; j += 16)
        __builtin_prefetch(members + h * n + j);  // ranges lie far apart in memory
    }
    for (const int32_t c : kept) {
      for (int64_t j = start[c]; j < start[c + 1]; ++j) {
        const int64_t key = members[h * n + j];
        if (key < 0 || key >= n) {
          valid = false;
          return false;
        }
        bits[key / 64] |= uint64_t{1} << (key % 64);
      }
    }
    int32_t* out = indices + first[i];
    int32_t* const end = indices + first[i + 1];
    for (int64_t word = 0; word < std::ssize(bits); ++word)
      for (uint64_t left = bits[word]; left != 0 && out < end; left &= left - 1)
        *out++ = static_cast<int32_t>(word * 64 + std::countr_zero(left));
    if (out != end) valid = false;  // a key stands twice
    return out == end;
  });
  return valid;
}

}  // namespace sparse_attn::cpu
