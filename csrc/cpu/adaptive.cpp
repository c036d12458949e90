// SPDX-License-Identifier: Apache-2.0
// Work is dealt in groups of tiles (of any head) that read one KV head, so that keys are read once
// for all of them. A tile has three probes: the sum of its query rows, which ranks the keys, and
// two of its rows, which check the choice. Per group: products of probes and keys [keys][probes] in
// float32, levels [keys][probes] in bytes, a histogram of the levels per probe, and the checking
// rows' mass per level of the sum; then each tile's last level, and one pass over the levels that
// writes lists.
#include "adaptive.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "kernels.h"
#include "schedule.h"

namespace sparse_attn::cpu {
namespace {

constexpr int64_t kMaxScoreBytes = 8 << 20;     // of one group; longer keys make smaller groups
constexpr int kRowStep = 16;                    // probes come in multiples of it
constexpr int kChecks = 2;                      // rows of a tile that check its choice
constexpr int kProbes = 1 + kChecks;            // of a tile
constexpr int kMaxTiles = kTileRows / kProbes;  // tiles of a group
constexpr int kSolid = 12;                      // chosen keys that make a granule a block
constexpr uint64_t kHighBits = 0x8080808080808080u;

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
  int32_t near_begin, own_end;  // keys of the window and at the positions of the tile's rows
  int32_t limit;                // keys that its last row may see
  int64_t forced = 0;           // keys
  uint8_t last = 0;             // the last stored level that is taken
  int64_t quota = 0;            // how many keys of it
};

struct Workspace {
  Tile tile;
  KeyChunk chunk;
  alignas(64) float factor[kTileRows], top[kTileRows];
  alignas(64) int32_t limits[kTileRows];
  alignas(64) uint8_t last[kTileRows];
  std::vector<float> probes, wide, scores;
  std::vector<uint8_t> levels;
  std::vector<uint32_t> histogram;
  std::vector<int64_t> checked;  // [checks][tiles][stored level of the sum]: the row's mass
  std::vector<int32_t> chosen[kMaxTiles];
};

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
    space_.levels.resize(int64_t{limit} * rows_);
    space_.histogram.assign(rows_ * kRankLevels, 0);
    kernels_.rank_levels(space_.scores.data(), limit, rows_, space_.top, space_.levels.data(),
                         space_.histogram.data());
    for (int i = 0; i < count_; ++i) force(tiles_[i], i);
    check(limit, weights);
    std::fill_n(space_.last, kTileRows, uint8_t{0});
    for (int i = 0; i < count_; ++i) choose(tiles_[i], i, weights);
    collect(limit);
    for (int i = 0; i < count_; ++i)
      write(space_.chosen[i], tiles_[i].limit,
            keys[(batch_ * p_.num_heads + tiles_[i].head) * tiles + tiles_[i].tile]);
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
      for (int c = 0; c < kChecks; ++c)
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
    for (int c = 0; c < kChecks; ++c) {
      const int probe = (1 + c) * count_ + i;
      space_.factor[probe] = static_cast<float>(factor);
      space_.limits[probe] = p_.causal ? clamp(position + check_row(rows, c) + 1) : tile.limit;
    }
  }

  // The middles of the halves of a tile.
  static int64_t check_row(int64_t rows, int c) { return rows * (2 * c + 1) / (2 * kChecks); }

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

  // Marks the forced keys with level 0, out of the histogram.
  void force(TileChoice& tile, int i) {
    uint32_t* counts = space_.histogram.data() + i * kRankLevels;
    const auto mark = [&](int64_t begin, int64_t end) {
      for (int64_t key = begin; key < end; ++key, ++tile.forced) {
        uint8_t& level = space_.levels[key * rows_ + i];
        --counts[level - 1];
        level = 0;
      }
    };
    const int64_t sink = std::min<int64_t>(rule_.sink, tile.limit);
    mark(0, sink);
    mark(std::max<int64_t>(sink, tile.near_begin), tile.own_end);
  }

  // The checking rows' mass, by the level of the sum.
  void check(int32_t limit, const Weights& weights) {
    space_.checked.assign(int64_t{kChecks} * count_ * (kRankLevels + 1), 0);
    const uint8_t* levels = space_.levels.data();
    for (int32_t key = 0; key < limit; ++key, levels += rows_) {
      int64_t* checked = space_.checked.data();
      for (int c = 1; c <= kChecks; ++c)
        for (int i = 0; i < count_; ++i, checked += kRankLevels + 1)
          checked[levels[i]] += weights.of[levels[c * count_ + i] - 1];
    }
  }

  // Finds where the choice ends.
  void choose(TileChoice& tile, int i, const Weights& weights) {
    const uint32_t* counts = space_.histogram.data() + i * kRankLevels;
    const int64_t* checked[kChecks];
    // Forced keys count for nothing: what the first key holds would hide what it does not give.
    int64_t mass = 0, total = 0, row_mass[kChecks] = {}, row_total[kChecks] = {};
    for (int c = 0; c < kChecks; ++c)
      checked[c] = space_.checked.data() + (int64_t{c} * count_ + i) * (kRankLevels + 1);
    for (int level = 0; level < kRankLevels; ++level) {
      total += counts[level] * weights.of[level];
      for (int c = 0; c < kChecks; ++c) row_total[c] += checked[c][level + 1];
    }
    if (!std::isfinite(space_.top[i])) {  // nothing is known of this tile
      tile.last = kRankLevels;
      tile.quota = tile.limit - tile.forced;
      for (int level = 0; level + 1 < kRankLevels; ++level) tile.quota -= counts[level];
    } else {
      const auto share = [](double part, int64_t whole) {
        return static_cast<int64_t>(std::ceil(part * static_cast<double>(whole)));
      };
      const int64_t target = share(rule_.mass, total);
      const auto unserved = [&] {
        bool any = false;
        for (int c = 0; c < kChecks; ++c) any |= row_mass[c] < share(rule_.guard, row_total[c]);
        return any;
      };
      for (int level = 0; (mass < target || unserved()) && level < kRankLevels; ++level) {
        const int64_t weight = weights.of[level];
        tile.last = static_cast<uint8_t>(level + 1);
        tile.quota = counts[level];
        if (!unserved())  // then mass alone decides, and it weighs something
          tile.quota = std::min(tile.quota, (target - mass + weight - 1) / weight);
        mass += counts[level] * weight;
        for (int c = 0; c < kChecks; ++c) row_mass[c] += checked[c][level + 1];
      }
      if (tile.last == kRankLevels) tile.quota = tile.limit;
    }
    space_.last[i] = tile.last;
  }

  // The chosen keys of every tile, ascending.
  void collect(int32_t limit) {
    for (int i = 0; i < count_; ++i) space_.chosen[i].clear();
    const uint8_t* levels = space_.levels.data();
    for (int32_t key = 0; key < limit; ++key, levels += rows_) {
      for (int first = 0; first < count_; first += 8) {
        // Eight probes at once: a byte's high bit survives where level <= last.
        uint64_t level, last;
        std::memcpy(&level, levels + first, 8);
        std::memcpy(&last, space_.last + first, 8);
        uint64_t hits = ((last | kHighBits) - level) & kHighBits;
        for (; hits != 0; hits &= hits - 1) take(key, first + __builtin_ctzll(hits) / 8, levels);
      }
    }
  }

  void take(int32_t key, int i, const uint8_t* levels) {
    if (levels[i] != 0 && levels[i] == space_.last[i]) {
      if (tiles_[i].quota == 0 || key >= tiles_[i].limit) return;
      --tiles_[i].quota;
    }
    space_.chosen[i].push_back(key);
  }

  // Granules that are nearly full become blocks.
  static void write(const std::vector<int32_t>& chosen, int32_t limit, TileKeys& to) {
    for (size_t begin = 0, end = 0; begin < chosen.size(); begin = end) {
      const int32_t granule = chosen[begin] / kGranule;
      while (end < chosen.size() && chosen[end] / kGranule == granule) ++end;
      const int32_t start = granule * kGranule, exist = std::min(kGranule, limit - start);
      if (static_cast<int>(end - begin) >= std::min<int32_t>(kSolid, exist))
        to.blocks.push_back(start);
      else
        to.columns.insert(to.columns.end(), chosen.begin() + begin, chosen.begin() + end);
    }
    to.columns.shrink_to_fit();
  }

  const AttentionParams& p_;
  const AdaptiveRule& rule_;
  const Kernels& kernels_;
  int64_t batch_, head_kv_;
  Workspace& space_;
  int rows_ = 0;
  int count_ = 0;
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
