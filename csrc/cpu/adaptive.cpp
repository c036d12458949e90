// SPDX-License-Identifier: Apache-2.0
// Work is dealt in groups of tiles (of any head) that read one KV head, so that keys are read once
// for all of them. A tile has three probes: the sum of its query rows, which ranks the keys, and
// two of its rows, which check the choice. Per group: products of probes and keys [keys][probes] in
// float32; levels of the sums [tiles][keys] in bytes, and per level the keys and what they weigh
// for the checking rows; then each tile's last level, and one pass over its levels that writes
// lists.
#include "adaptive.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>

#include "kernels.h"
#include "schedule.h"

namespace sparse_attn::cpu {
namespace {

constexpr int64_t kMaxScoreBytes = 8 << 20;     // of one group; longer keys make smaller groups
constexpr int kRowStep = 16;                    // probes come in multiples of it
constexpr int kProbes = 1 + kRankChecks;        // of a tile
constexpr int kMaxTiles = kTileRows / kProbes;  // tiles of a group
constexpr int kSolid = 12;                      // chosen keys that make a granule a block
constexpr uint64_t kHighBits = 0x8080808080808080u;
constexpr uint64_t kBytes = 0x0101010101010101u;

// A quarter octave a level: 2^31 for the best key, 1 at 31 octaves below it, then nothing.
struct Weights {
  int64_t of[kRankLevels];
  Weights() {
    for (int level = 0; level < kRankLevels - 1; ++level)
      of[level] = std::llround(std::exp2(31.0 - 0.25 * level));
    of[kRankLevels - 1] = 0;
  }
};

struct TileChoice {
  int64_t head, tile;
  int32_t near_begin, own_end;         // keys of the window and at the positions of the tile's rows
  int32_t limit;                       // keys that its last row may see
  int64_t mass = 0;                    // what forced keys weigh
  int64_t row_mass[kRankChecks] = {};  // and for the checking rows
  uint8_t last = 0;                    // the last stored level that is taken
  int64_t quota = 0;                   // how many keys of it
};

struct Workspace {
  Tile tile;
  KeyChunk chunk;
  alignas(64) float factor[kTileRows], top[kTileRows];
  alignas(64) int32_t limits[kTileRows];
  std::vector<float> probes, wide, scores;
  std::vector<uint8_t> levels;   // [tiles][pitch]: 1 + the key's level; 0 is forced
  std::vector<RankLevel> sums;   // [tiles][kRankLevels]
  std::vector<int32_t> columns;  // of one tile
};

int level_of(float top, float x) {
  const float below = top - x;
  return below < kRankLevels - 1 ? static_cast<int>(below) : kRankLevels - 1;
}

// Bit j is set where byte j of `bytes` (below 128) is at most `most`.
uint64_t at_most(uint64_t bytes, uint64_t most) {
  const uint64_t high = (((most * kBytes) | kHighBits) - bytes) & kHighBits;
  return ((high >> 7) * 0x0102040810204080u) >> 56;
}

uint32_t at_most(const uint8_t* granule, int most) {
  uint64_t half[2];
  std::memcpy(half, granule, sizeof(half));
  return static_cast<uint32_t>(at_most(half[0], most) | at_most(half[1], most) << 8);
}

class Group {
 public:
  Group(const AttentionParams& p, const AdaptiveRule& rule, int64_t batch, int64_t head_kv,
        int64_t first, int64_t count, Workspace& space)
      : p_(p), rule_(rule), kernels_(kernels()), batch_(batch), head_kv_(head_kv), space_(space) {
    const int64_t share = p.num_heads / p.num_heads_kv;
    count_ = static_cast<int>(count);
    rows_ = (kProbes * count_ + kRowStep - 1) / kRowStep * kRowStep;
    std::fill_n(space.factor, kTileRows, 0.0f);
    std::fill_n(space.limits, kTileRows, 0);
    std::fill_n(space.top, kTileRows, -INFINITY);
    space.probes.assign(kProbes * count * p.head_dim, 0.0f);
    for (int i = 0; i < count_; ++i) {
      tiles_[i].tile = (first + i) / share;
      tiles_[i].head = head_kv * share + (first + i) % share;
      begin_tile(tiles_[i], i);
    }
  }

  void run(const Weights& weights, TileKeys* keys, int64_t tiles) {
    int32_t limit = 0;
    for (int i = 0; i < count_; ++i) limit = std::max(limit, tiles_[i].limit);
    score(limit);
    // An odd number of cache lines: the tiles' levels of one key must not fall into one set.
    pitch_ = ((limit + 63) / 64 | 1) * 64;
    space_.levels.resize(pitch_ * count_);
    space_.sums.assign(int64_t{count_} * kRankLevels, RankLevel{});
    kernels_.rank_levels(space_.scores.data(), limit, rows_, count_, space_.top, weights.of,
                         space_.levels.data(), pitch_, space_.sums.data());
    for (int i = 0; i < count_; ++i) {
      force(tiles_[i], i, weights);
      choose(tiles_[i], i, weights);
      write(tiles_[i], space_.levels.data() + i * pitch_,
            keys[(batch_ * p_.num_heads + tiles_[i].head) * tiles + tiles_[i].tile]);
    }
  }

 private:
  void begin_tile(TileChoice& tile, int i) {
    const int64_t width = element_size(p_.dtype), first = tile.tile * rule_.block_m;
    const int64_t rows = std::min(rule_.block_m, p_.seqlen_q - first);
    float* sum = space_.probes.data() + int64_t{i} * p_.head_dim;
    float row_values[kMaxHeadDim];
    for (int64_t r = 0; r < rows; ++r) {
      kernels_.widen(row_pointer(p_.q, batch_, tile.head, first + r, width), row_values,
                     p_.head_dim, p_.dtype);
      for (int d = 0; d < p_.head_dim; ++d) sum[d] += row_values[d];
      for (int c = 0; c < kRankChecks; ++c)
        if (r == check_row(rows, c))
          std::copy_n(row_values, p_.head_dim, sum + int64_t{1 + c} * count_ * p_.head_dim);
    }
    const auto clamp = [&](int64_t key) {
      return static_cast<int32_t>(std::clamp<int64_t>(key, 0, p_.seqlen_k));
    };
    const int64_t position = first + rule_.q_offset;
    tile.near_begin = clamp(position - rule_.window);
    tile.own_end = clamp(position + rows);
    tile.limit = p_.causal ? tile.own_end : static_cast<int32_t>(p_.seqlen_k);
    const double factor = 4 * M_LOG2E * static_cast<double>(p_.softmax_scale);
    space_.factor[i] = static_cast<float>(factor / rows);
    space_.limits[i] = tile.limit;
    for (int c = 0; c < kRankChecks; ++c) {
      const int probe = (1 + c) * count_ + i;
      space_.factor[probe] = static_cast<float>(factor);
      space_.limits[probe] = p_.causal ? clamp(position + check_row(rows, c) + 1) : tile.limit;
    }
  }

  // The middles of the halves of a tile.
  static int64_t check_row(int64_t rows, int c) { return rows * (2 * c + 1) / (2 * kRankChecks); }

  // Scaled products with keys [0, limit), and each probe's best.
  void score(int32_t limit) {
    const int64_t width = element_size(p_.dtype);
    const int dim = p_.head_dim;
    Tile& tile = space_.tile;
    tile.dtype = DType::kFloat32;  // sums of rows need it, whatever q and k are
    tile.rows = kProbes * count_;
    tile.head_dim = dim;
    tile.head_dim_v = 0;
    for (int i = 0; i < tile.rows; ++i)
      tile.q_rows[i] = reinterpret_cast<const char*>(space_.probes.data() + int64_t{i} * dim);
    kernels_.row_begin(tile);
    space_.scores.resize(int64_t{limit} * rows_);
    space_.wide.resize(kChunkKeys * dim);
    KeyChunk& chunk = space_.chunk;
    for (int32_t first = 0; first < limit; first += kChunkKeys) {
      chunk.count = std::min(kChunkKeys, limit - first);
      for (int i = 0; i < chunk.count; ++i) {
        const char* key = row_pointer(p_.k, batch_, head_kv_, first + i, width);
        if (p_.dtype != DType::kFloat32) {
          kernels_.widen(key, space_.wide.data() + i * dim, dim, p_.dtype);
          key = reinterpret_cast<const char*>(space_.wide.data() + i * dim);
        }
        chunk.k[i] = key;
        chunk.position[i] = first + i;
      }
      std::fill_n(chunk.k + chunk.count, kKeyPadding, chunk.k[chunk.count - 1]);
      kernels_.row_score(tile, chunk);
      kernels_.rank_scale(tile, chunk, space_.factor, space_.limits, rows_,
                          space_.scores.data() + int64_t{first} * rows_, space_.top);
    }
  }

  // Marks the forced keys with level 0, and takes them out of the levels' sums.
  void force(TileChoice& tile, int i, const Weights& weights) {
    RankLevel* sums = space_.sums.data() + int64_t{i} * kRankLevels;
    const auto mark = [&](int64_t begin, int64_t end) {
      for (int64_t key = begin; key < end; ++key) {
        uint8_t& level = space_.levels[i * pitch_ + key];
        RankLevel& sum = sums[level - 1];
        --sum.keys;
        tile.mass += weights.of[level - 1];
        for (int c = 0; c < kRankChecks; ++c) {
          const int probe = (1 + c) * count_ + i;
          const int64_t weight =
              weights.of[level_of(space_.top[probe], space_.scores[key * rows_ + probe])];
          sum.mass[c] -= weight;
          tile.row_mass[c] += weight;
        }
        level = 0;
      }
    };
    const int64_t sink = std::min<int64_t>(rule_.sink, tile.limit);
    mark(0, sink);
    mark(std::max<int64_t>(sink, tile.near_begin), tile.own_end);
  }

  // Finds where the choice ends.
  void choose(TileChoice& tile, int i, const Weights& weights) {
    const RankLevel* sums = space_.sums.data() + int64_t{i} * kRankLevels;
    int64_t mass = tile.mass, total = mass, row_mass[kRankChecks], row_total[kRankChecks];
    for (int c = 0; c < kRankChecks; ++c) row_mass[c] = row_total[c] = tile.row_mass[c];
    for (int level = 0; level < kRankLevels; ++level) {
      total += sums[level].keys * weights.of[level];
      for (int c = 0; c < kRankChecks; ++c) row_total[c] += sums[level].mass[c];
    }
    if (!std::isfinite(space_.top[i])) {  // nothing is known of this tile
      tile.last = kRankLevels;
      tile.quota = tile.limit;
    } else {
      const auto share = [](double part, int64_t whole) {
        return static_cast<int64_t>(std::ceil(part * static_cast<double>(whole)));
      };
      const int64_t target = share(rule_.mass, total);
      const auto unserved = [&] {
        bool any = false;
        for (int c = 0; c < kRankChecks; ++c) any |= row_mass[c] < share(rule_.guard, row_total[c]);
        return any;
      };
      for (int level = 0; (mass < target || unserved()) && level < kRankLevels; ++level) {
        const int64_t weight = weights.of[level];
        tile.last = static_cast<uint8_t>(level + 1);
        tile.quota = sums[level].keys;
        if (!unserved())  // then mass alone decides, and it weighs something
          tile.quota = std::min(tile.quota, (target - mass + weight - 1) / weight);
        mass += sums[level].keys * weight;
        for (int c = 0; c < kRankChecks; ++c) row_mass[c] += sums[level].mass[c];
      }
      if (tile.last == kRankLevels) tile.quota = tile.limit;
    }
  }

  // The chosen keys of a tile, ascending; granules that are nearly full become blocks.
  void write(TileChoice& tile, const uint8_t* levels, TileKeys& to) {
    space_.columns.resize(tile.limit + kGranule);
    int32_t* columns = space_.columns.data();
    for (int32_t start = 0; start < tile.limit; start += kGranule) {
      const int32_t exist = std::min(kGranule, tile.limit - start);
      uint32_t kept = chosen(tile, levels + start) & ((1u << exist) - 1);
      if (std::popcount(kept) >= std::min<int32_t>(kSolid, exist)) {
        to.blocks.push_back(start);
        continue;
      }
      for (; kept != 0; kept &= kept - 1) *columns++ = start + std::countr_zero(kept);
    }
    to.columns.assign(space_.columns.data(), columns);
  }

  // A bit a key of a granule: better levels, and of the last one as many as are left of the quota.
  static uint32_t chosen(TileChoice& tile, const uint8_t* granule) {
    if (tile.last == 0) return at_most(granule, 0);
    const uint32_t better = at_most(granule, tile.last - 1);
    if (tile.quota == 0) return better;
    uint32_t last = at_most(granule, tile.last) & ~better, kept = better;
    for (; last != 0 && tile.quota > 0; last &= last - 1, --tile.quota) kept |= last & -last;
    return kept;
  }

  const AttentionParams& p_;
  const AdaptiveRule& rule_;
  const Kernels& kernels_;
  int64_t batch_, head_kv_;
  Workspace& space_;
  int rows_ = 0;
  int count_ = 0;
  int64_t pitch_ = 0;  // of a tile's levels
  TileChoice tiles_[kMaxTiles];
};

}  // namespace

void adaptive_keys(const AttentionParams& p, const AdaptiveRule& rule, TileKeys* keys,
                   const Executor& executor) {
  static const Weights weights;
  const int64_t tiles = (p.seqlen_q + rule.block_m - 1) / rule.block_m;
  const int64_t all = tiles * (p.num_heads / p.num_heads_kv);  // of one KV head
  const int64_t fit = kMaxScoreBytes / (std::max<int64_t>(p.seqlen_k, 1) * sizeof(float));
  const int64_t rows = std::clamp<int64_t>(fit / kRowStep * kRowStep, kRowStep, kTileRows);
  const int64_t size = rows / kProbes, groups = (all + size - 1) / size,
                heads = p.num_sequences * p.num_heads_kv;
  std::vector<std::unique_ptr<Workspace>> spare;  // one a thread, kept from group to group
  std::mutex mutex;
  deal(executor, heads * groups, [&](int64_t i) {
    std::unique_ptr<Workspace> space;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!spare.empty()) {
        space = std::move(spare.back());
        spare.pop_back();
      }
    }
    if (!space) space = std::make_unique<Workspace>();
    const int64_t head = i / groups, first = i % groups * size;
    Group group(p, rule, head / p.num_heads_kv, head % p.num_heads_kv, first,
                std::min(size, all - first), *space);
    group.run(weights, keys, tiles);
    const std::lock_guard<std::mutex> lock(mutex);
    spare.push_back(std::move(space));
    return true;
  });
}

}  // namespace sparse_attn::cpu
