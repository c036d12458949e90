// SPDX-License-Identifier: Apache-2.0
#include "selection.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "../core/key_stream.h"
#include "kernels.h"
#include "schedule.h"

namespace sparse_attn::cpu {
namespace {

struct Workspace {
  Tile tile;
  KeyChunk chunk;
};

// One head's window, a tile of at most kTileRows rows at a time.
void window_head(const AttentionParams& p, const Kernels& kernels, const Sequence& window,
                 int64_t head, float* columns, float* diagonals, int64_t distances) {
  const int64_t width = element_size(p.dtype);
  const int64_t head_kv = head / (p.num_heads / p.num_heads_kv);
  const char* k = row_pointer(p.k, window.batch, head_kv, 0, width);
  std::vector<float> padded(distances + 2 * kTileRows);  // rows near the ends write past them
  const auto space = std::make_unique<Workspace>();
  Tile& tile = space->tile;
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
    while (first.next(space->chunk)) kernels.window_attend(tile, space->chunk);
    KeyStream second(p, window, shape, 0, 0, k, k);
    while (second.next(space->chunk))
      kernels.window_sum(tile, space->chunk, window.q_offset + row, columns,
                         padded.data() + kTileRows, distances);
  }
  std::copy_n(padded.data() + kTileRows, distances, diagonals);
}

// Orders as a float does, in unsigned integers; greater is better. A NaN counts as -inf.
uint32_t rank_of(float score) {
  if (std::isnan(score)) score = -INFINITY;
  if (score == 0.0f) score = 0.0f;  // -0 equals 0
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

}  // namespace

void window_scores(const AttentionParams& p, int64_t rows, int64_t q_offset, float* columns,
                   float* diagonals, int64_t distances, const Executor& executor) {
  const Kernels& table = kernels();
  const int64_t batch = p.num_sequences;
  std::fill_n(columns, batch * p.num_heads * p.seqlen_k, 0.0f);
  deal(executor, batch * p.num_heads, [&](int64_t i) {
    const int64_t skipped = p.seqlen_q - rows;
    const Sequence window{i / p.num_heads, skipped, rows, 0, p.seqlen_k, q_offset + skipped};
    window_head(p, table, window, i % p.num_heads, columns + i * p.seqlen_k,
                diagonals + i * distances, distances);
    return true;
  });
}

void top_k(const float* scores, int64_t rows, int64_t n, int64_t k, int32_t* indices,
           const Executor& executor) {
  deal(executor, rows, [&](int64_t row) {
    // One integer a score, better first: the order is total, so the choice is deterministic.
    std::vector<uint64_t> order(n);
    for (int64_t i = 0; i < n; ++i)
      order[i] = (uint64_t{~rank_of(scores[row * n + i])} << 32) | static_cast<uint64_t>(i);
    if (k < n) std::nth_element(order.begin(), order.begin() + k, order.end());
    int32_t* out = indices + row * k;
    for (int64_t i = 0; i < k; ++i) out[i] = static_cast<int32_t>(order[i] & 0xffffffffu);
    std::sort(out, out + k);
    return true;
  });
}

}  // namespace sparse_attn::cpu
