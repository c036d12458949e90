// SPDX-License-Identifier: Apache-2.0
#include "blocks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "rank.h"
#include "schedule.h"

namespace sparse_attn::cpu {
namespace {

constexpr int64_t kPoolRows = 64;  // added to a block's running sum at once: keeps its error small

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

int64_t floor_div(int64_t a, int64_t b) {
  return a / b - (a % b < 0 ? 1 : 0);
}

// One tile's row of the grid: [0, sink_end) and [local_begin, allowed) are forced.
struct TileChoice {
  int64_t allowed, sink_end, local_begin, local_end;

  TileChoice(const BlockGrid& grid, int64_t tile) : allowed(grid.allowed(tile)) {
    const int64_t diagonal = grid.diagonal(tile);
    sink_end = std::min(grid.sink, allowed);
    local_end = std::clamp<int64_t>(diagonal + 1, sink_end, std::max(allowed, sink_end));
    local_begin = std::clamp<int64_t>(diagonal + 1 - grid.local, sink_end, local_end);
  }

  int64_t forced() const { return sink_end + local_end - local_begin; }

  void mark_forced(bool* mask) const {
    std::fill_n(mask, sink_end, true);
    std::fill(mask + local_begin, mask + local_end, true);
  }

  // free(block) for every allowed block that is not forced, ascending.
  template <class Fn>
  void each_free(Fn free) const {
    for (int64_t j = sink_end; j < local_begin; ++j) free(j);
    for (int64_t j = local_end; j < allowed; ++j) free(j);
  }

  template <class Fn>
  void each_forced(Fn forced) const {
    for (int64_t j = 0; j < sink_end; ++j) forced(j);
    for (int64_t j = local_begin; j < local_end; ++j) forced(j);
  }
};

// Softmax of a row's first n scores, not yet divided by its sum, which is returned.
double exponentials(const float* scores, int64_t n, std::vector<double>& mass) {
  mass.assign(n, 0.0);
  float top = -INFINITY;
  for (int64_t j = 0; j < n; ++j) top = scores[j] > top ? scores[j] : top;
  if (top == -INFINITY) return 0.0;
  double sum = 0.0;
  for (int64_t j = 0; j < n; ++j) {
    if (std::isnan(scores[j])) continue;
    mass[j] = top == INFINITY ? double(scores[j] == top) : std::exp(double{scores[j]} - top);
    sum += mass[j];
  }
  return sum;
}

double non_negative(float score) {
  return score > 0.0f ? score : 0.0;  // not for a NaN
}

// Candidates in order; the sort is as far as the choice has come.
class Ordered {
 public:
  void add(float score, int64_t index) { entries_.push_back(rank_key(score, index)); }
  void clear() { entries_.clear(); }

  // take(index) in order, until it returns false.
  template <class Fn>
  void walk(Fn take) {
    const size_t n = entries_.size();
    for (size_t begin = 0, step = 16; begin < n; begin += step, step *= 2) {
      const size_t end = std::min(n, begin + step);
      if (end < n)
        std::nth_element(entries_.begin() + begin, entries_.begin() + end, entries_.end());
      std::sort(entries_.begin() + begin, entries_.begin() + end);
      for (size_t i = begin; i < end; ++i)
        if (!take(static_cast<int64_t>(entries_[i] & 0xffffffffu))) return;
    }
  }

 private:
  std::vector<uint64_t> entries_;
};

// The best `wanted` of the free blocks.
void best_free(const TileChoice& tile, const float* scores, int64_t wanted, bool* mask,
               std::vector<uint32_t>& ranks) {
  ranks.clear();
  tile.each_free([&](int64_t j) { ranks.push_back(rank_of(scores[j])); });
  const int64_t n = static_cast<int64_t>(ranks.size());
  if (wanted >= n) return tile.each_free([&](int64_t j) { mask[j] = true; });
  if (wanted <= 0) return;
  const auto worst = ranks.begin() + (wanted - 1);
  std::nth_element(ranks.begin(), worst, ranks.end(), std::greater<uint32_t>());
  const uint32_t level = *worst;
  int64_t spare = 1;  // how many of the level's own may stay, the first of them
  for (auto it = ranks.begin(); it != worst; ++it) spare += *it == level;
  tile.each_free([&](int64_t j) {
    const uint32_t rank = rank_of(scores[j]);
    if (rank > level) mask[j] = true;
    if (rank == level && spare > 0) mask[j] = true, --spare;
  });
}

void share_of_tile(const TileChoice& tile, const float* scores, double share, bool logits,
                   bool* mask, std::vector<double>& mass, Ordered& order) {
  double total = 0.0, covered = 0.0;
  if (logits) {
    total = exponentials(scores, tile.allowed, mass);
  } else {
    mass.resize(tile.allowed);
    for (int64_t j = 0; j < tile.allowed; ++j) total += mass[j] = non_negative(scores[j]);
  }
  tile.each_forced([&](int64_t j) { covered += mass[j]; });
  const double needed = share * total;
  if (!(covered < needed)) return;
  order.clear();
  tile.each_free([&](int64_t j) { order.add(scores[j], j); });
  order.walk([&](int64_t j) {
    if (!(covered < needed)) return false;
    covered += mass[j];
    mask[j] = true;
    return true;
  });
}

// All tiles of one row of the grid together; probabilities are rounded to float32 and ordered so.
void share_of_row(const BlockGrid& grid, const float* scores, double share, bool logits,
                  bool* mask) {
  const int64_t n = grid.blocks;
  std::vector<float> mass(grid.tiles * n);
  std::vector<double> row;
  double total = 0.0, covered = 0.0;
  Ordered order;
  for (int64_t t = 0; t < grid.tiles; ++t) {
    const TileChoice tile(grid, t);
    const float* from = scores + t * n;
    float* to = mass.data() + t * n;
    const double sum = logits ? exponentials(from, tile.allowed, row) : 1.0;
    for (int64_t j = 0; j < tile.allowed; ++j) {
      to[j] = static_cast<float>(!logits ? non_negative(from[j]) : sum > 0.0 ? row[j] / sum : 0.0);
      total += to[j];
    }
    tile.each_forced([&](int64_t j) { covered += to[j]; });
    tile.each_free([&](int64_t j) { order.add(to[j], t * n + j); });
  }
  const double needed = share * total;
  order.walk([&](int64_t j) {
    if (!(covered < needed)) return false;
    covered += mass[j];
    mask[j] = true;
    return true;
  });
}

// work(row, tile, choice, scores, mask) for every tile, whose forced blocks are marked.
template <class Work>
void each_tile(const BlockGrid& grid, const float* scores, int64_t rows, bool* mask,
               const Executor& executor, Work work) {
  deal(executor, rows * grid.tiles, [&](int64_t i) {
    const TileChoice tile(grid, i % grid.tiles);
    bool* to = mask + i * grid.blocks;
    std::fill_n(to, grid.blocks, false);
    tile.mark_forced(to);
    work(i / grid.tiles, i % grid.tiles, tile, scores + i * grid.blocks, to);
    return true;
  });
}

}  // namespace

int64_t BlockGrid::diagonal(int64_t tile) const {
  const int64_t last = std::min((first_tile + tile + 1) * block_m, seqlen_q) - 1 + q_offset;
  return floor_div(last, block_n);
}

int64_t BlockGrid::allowed(int64_t tile) const {
  return causal ? std::clamp<int64_t>(diagonal(tile) + 1, 0, blocks) : blocks;
}

void pool_blocks(const TensorView& x, DType dtype, int64_t batch, int64_t num_heads, int64_t seqlen,
                 int64_t dim, int64_t block, Pool kind, float* to, const Executor& executor) {
  const Kernels& table = kernels();
  const int64_t width = element_size(dtype), blocks = ceil_div(seqlen, block);
  // Heads that lie side by side in a token are one wide row: memory is read in its own order.
  const bool wide = kind != Pool::kDirection && x.head_stride == dim && num_heads > 1;
  const int64_t together = wide ? num_heads : 1, units = num_heads / together;
  const int64_t row = together * dim;
  const float start = kind == Pool::kMin ? INFINITY : kind == Pool::kMax ? -INFINITY : 0.0f;
  const bool sums = kind == Pool::kMean || kind == Pool::kDirection;
  deal(executor, batch * units * blocks, [&](int64_t i) {
    const int64_t b = i / (units * blocks), h = i / blocks % units * together, t = i % blocks;
    const int64_t count = std::min(block, seqlen - t * block);
    std::vector<float> result(row + 16, start), part;
    for (int64_t first = 0; first < count; first += kPoolRows) {
      const int rows = static_cast<int>(std::min(kPoolRows, count - first));
      const char* from = row_pointer(x, b, h, t * block + first, width);
      if (!sums || first == 0) {
        table.pool_rows(from, x.row_stride * width, rows, static_cast<int>(row), dtype, kind,
                        result.data());
        continue;
      }
      part.assign(row + 16, 0.0f);
      table.pool_rows(from, x.row_stride * width, rows, static_cast<int>(row), dtype, kind,
                      part.data());
      for (int64_t d = 0; d < row; ++d) result[d] += part[d];
    }
    if (sums)
      for (int64_t d = 0; d < row; ++d) result[d] /= static_cast<float>(count);
    for (int64_t g = 0; g < together; ++g)
      std::copy_n(result.data() + g * dim, dim, to + ((b * num_heads + h + g) * blocks + t) * dim);
    return true;
  });
}

void block_top_k(const BlockGrid& grid, const float* scores, int64_t rows, const int32_t* budget,
                 int64_t row_stride, int64_t tile_stride, bool* mask, const Executor& executor) {
  each_tile(grid, scores, rows, mask, executor,
            [&](int64_t row, int64_t t, const TileChoice& tile, const float* from, bool* to) {
              thread_local std::vector<uint32_t> ranks;
              const int64_t wanted = budget[row * row_stride + t * tile_stride] - tile.forced();
              best_free(tile, from, wanted, to, ranks);
            });
}

void block_top_p(const BlockGrid& grid, const float* scores, int64_t rows, double share,
                 bool logits, bool whole, bool* mask, const Executor& executor) {
  const bool all = share >= 1.0;
  each_tile(grid, scores, rows, mask, executor,
            [&](int64_t, int64_t, const TileChoice& tile, const float* from, bool* to) {
              if (all) std::fill_n(to, tile.allowed, true);
              if (all || whole) return;
              thread_local std::vector<double> mass;
              thread_local Ordered order;
              share_of_tile(tile, from, share, logits, to, mass, order);
            });
  if (all || !whole) return;
  const int64_t size = grid.tiles * grid.blocks;
  deal(executor, rows, [&](int64_t row) {
    share_of_row(grid, scores + row * size, share, logits, mask + row * size);
    return true;
  });
}

void block_threshold(const BlockGrid& grid, const float* scores, int64_t rows, double threshold,
                     bool* mask, const Executor& executor) {
  each_tile(grid, scores, rows, mask, executor,
            [&](int64_t, int64_t, const TileChoice& tile, const float* from, bool* to) {
              thread_local std::vector<double> mass;
              const double sum = exponentials(from, tile.allowed, mass);
              for (int64_t j = 0; j < tile.allowed; ++j)
                if (mass[j] > threshold * sum) to[j] = true;
            });
}

void count_marks(const bool* mask, int64_t rows, int64_t n, int64_t* counts,
                 const Executor& executor) {
  deal(executor, rows, [&](int64_t row) {
    const auto* from = reinterpret_cast<const uint8_t*>(mask + row * n);
    int64_t count = 0;
    for (int64_t j = 0; j < n; ++j) count += from[j];
    counts[row] = count;
    return true;
  });
}

void list_marks(const bool* mask, int64_t rows, int64_t n, int64_t step, const int64_t* starts,
                int32_t* indices, const Executor& executor) {
  deal(executor, rows, [&](int64_t row) {
    const bool* from = mask + row * n;
    int32_t* to = indices + starts[row];
    for (int64_t j = 0; j < n;) {
      uint64_t eight = 1;
      if (j + 8 <= n) std::memcpy(&eight, from + j, 8);
      if (eight == 0) {
        j += 8;
        continue;
      }
      for (const int64_t end = std::min(n, j + 8); j < end; ++j)
        if (from[j]) *to++ = static_cast<int32_t>(j * step);
    }
    return true;
  });
}

void cell_block_sums(const float* cells, int64_t rows, int64_t num_cells, int64_t width,
                     const int64_t* limits, int64_t tile_cells, int64_t block_cells, float scale,
                     float* sums, const Executor& executor) {
  const Kernels& table = kernels();
  const int64_t tiles = ceil_div(num_cells, tile_cells), blocks = ceil_div(width, block_cells);
  deal(executor, rows * tiles, [&](int64_t i) {
    thread_local std::vector<float> row;
    row.resize(width);
    float* to = sums + i * blocks;
    std::fill_n(to, blocks, 0.0f);
    const int64_t first = i % tiles * tile_cells;
    for (int64_t c = first; c < std::min(num_cells, first + tile_cells); ++c) {
      const int64_t n = std::clamp<int64_t>(limits[c], 0, width);
      std::copy_n(cells + (i / tiles * num_cells + c) * width, n, row.data());
      const float total = table.exp_cells(row.data(), n, scale);
      if (!(total > 0.0f) || !std::isfinite(total)) continue;
      for (int64_t b = 0; b * block_cells < n; ++b) {
        float sum = 0.0f;
        for (int64_t j = b * block_cells; j < std::min(n, (b + 1) * block_cells); ++j)
          sum += row[j];
        to[b] += sum / total;
      }
    }
    return true;
  });
}

}  // namespace sparse_attn::cpu
