// SPDX-License-Identifier: Apache-2.0
#include "selection.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "../core/key_stream.h"
#include "kernels.h"
#include "rank.h"
#include "schedule.h"

namespace sparse_attn::cpu {
namespace {

struct Workspace {
  Tile tile;
  KeyChunk chunk;
  alignas(64) float factor[kTileRows];
};

// Keys whose probabilities are kept from the first pass to the second, which spares those the
// second product: 32 MiB at most. Past them the scores are computed again.
constexpr int64_t kKeptKeys = int64_t{1} << 17;

// One head's window, a tile of at most kTileRows rows at a time.
void window_head(const AttentionParams& p, const Kernels& kernels, const Sequence& window,
                 int64_t head, const WindowOutput& to) {
  const int64_t width = element_size(p.dtype);
  const int64_t head_kv = head / (p.num_heads / p.num_heads_kv);
  const char* k = row_pointer(p.k, window.batch, head_kv, 0, width);
  // Rows near the ends write past their distances.
  std::vector<float> padded(to.distances + 2 * kTileRows);
  float* diagonals = padded.data() + kTileRows;
  const int64_t most = (std::min(kKeptKeys, window.k_len) + kChunkKeys - 1) / kChunkKeys;
  // Uninitialised: zeros would be written once for nothing.
  const std::unique_ptr<float[]> kept(new float[most * kChunkKeys * kTileRows]);
  std::vector<float> tops(most * kTileRows);
  const auto space = std::make_unique<Workspace>();
  Tile& tile = space->tile;
  KeyChunk& chunk = space->chunk;
  tile.dtype = p.dtype;
  tile.head_dim = p.head_dim;
  tile.head_dim_v = 0;
  tile.softmax_scale = p.softmax_scale;
  tile.softcap = 0.0f;
  for (int64_t row = 0; row < window.q_len; row += kTileRows) {
    TileShape shape;
    shape.first_row = row;
    shape.rows_per_head = static_cast<int32_t>(std::min<int64_t>(kTileRows, window.q_len - row));
    tile.rows = shape.rows_per_head;
    for (int r = 0; r < tile.rows; ++r)
      tile.q_rows[r] = row_pointer(p.q, window.batch, head, window.q_start + row + r, width);
    kernels.row_begin(tile);
    KeyStream first(p, window, shape, 0, 0, k, k);
    for (int64_t i = 0; first.next(chunk); ++i) {
      kernels.window_attend(tile, chunk);
      if (i >= most) continue;
      std::memcpy(kept.get() + i * kChunkKeys * kTileRows, tile.scores,
                  chunk.count * kTileRows * sizeof(float));
      std::memcpy(tops.data() + i * kTileRows, tile.row_max, sizeof(tile.row_max));
    }
    float row_sum[kTileRows];
    std::memcpy(row_sum, tile.row_sum, sizeof(row_sum));
    std::fill(row_sum + tile.rows, row_sum + kTileRows, INFINITY);  // rows that do not exist
    KeyStream second(p, window, shape, 0, 0, k, k);
    for (int64_t i = 0; second.next(chunk); ++i) {
      const bool again = i >= most;  // the maxima are final by now, and stay
      if (again) kernels.window_attend(tile, chunk);
      const float* top = again ? tile.row_max : tops.data() + i * kTileRows;
      const float* probs = again ? tile.scores : kept.get() + i * kChunkKeys * kTileRows;
      kernels.window_factors(top, tile.row_max, row_sum, space->factor);
      kernels.window_reduce(probs, space->factor, tile.rows, chunk, window.q_offset + row,
                            to.maximum, to.columns, diagonals, to.distances);
    }
  }
  std::copy_n(diagonals, to.distances, to.diagonals);
}

}  // namespace

void window_scores(const AttentionParams& p, int64_t rows, int64_t q_offset, const WindowOutput& to,
                   const Executor& executor) {
  const Kernels& table = kernels();
  const int64_t batch = p.num_sequences;
  std::fill_n(to.columns, batch * p.num_heads * p.seqlen_k, 0.0f);
  deal(executor, batch * p.num_heads, [&](int64_t i) {
    const int64_t skipped = p.seqlen_q - rows;
    const Sequence window{i / p.num_heads, skipped, rows, 0, p.seqlen_k, q_offset + skipped};
    WindowOutput head = to;
    head.columns += i * p.seqlen_k;
    head.diagonals += i * to.distances;
    window_head(p, table, window, i % p.num_heads, head);
    return true;
  });
}

void top_k(const float* scores, int64_t rows, int64_t n, int64_t k, int32_t* indices,
           const Executor& executor) {
  deal(executor, rows, [&](int64_t row) {
    // One integer a score, better first: the order is total, so the choice is deterministic.
    std::vector<uint64_t> order(n);
    for (int64_t i = 0; i < n; ++i) order[i] = rank_key(scores[row * n + i], i);
    if (k < n) std::nth_element(order.begin(), order.begin() + k, order.end());
    int32_t* out = indices + row * k;
    for (int64_t i = 0; i < k; ++i) out[i] = static_cast<int32_t>(order[i] & 0xffffffffu);
    std::sort(out, out + k);
    return true;
  });
}

}  // namespace sparse_attn::cpu
