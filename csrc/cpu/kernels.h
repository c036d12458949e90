// SPDX-License-Identifier: Apache-2.0
// The CPU kernels' inner loops behind a table of function pointers, one table per instruction set.
// Everything outside the table (schedule, lists, merging) is compiled once, for any CPU.
#pragma once

#include <cstdint>

#include "../core/key_chunk.h"
#include "../core/types.h"

namespace sparse_attn::cpu {

constexpr int kRankLevels = 126;  // levels, and one more code, fit in seven bits
constexpr int kMaxDimRows = 8;    // a tile vectorised over head_dim has at most this many rows

// A query tile in flight. Rows are (head, row) pairs of one KV head in any layout.
struct Tile {
  DType dtype;      // of q, k and v
  DType out_dtype;  // of the rows written by finish
  int32_t rows;
  int32_t head_dim;
  int32_t head_dim_v;
  float softmax_scale;
  float softcap;
  const char* q_rows[kTileRows];
  char* out_rows[kTileRows];
  float* lse_rows[kTileRows];
  bool has_sink;
  float sink[kTileRows];
  const KeyChunk* fetched;  // the chunk whose rows have been asked for ahead of its turn

  // Running softmax, base 2: exp2(row_max) is the scale that row_sum and acc are relative to.
  alignas(64) float row_max[kTileRows];
  alignas(64) float row_sum[kTileRows];
  alignas(64) float alpha[kTileRows];
  // Row-vectorised: q[dim][row] and acc[dim][row] panel by panel (row_tile.h), scores[key][row].
  // Dim-vectorised: q[row][dim], scores[row][key], acc[row][dim].
  alignas(64) float q[kMaxHeadDim * kTileRows];
  alignas(64) float scores[kChunkKeys * kTileRows];
  alignas(64) float acc[kMaxHeadDim * kTileRows];
  alignas(64) float chunk_acc[kMaxHeadDim * kMaxDimRows];  // a chunk's part of acc[row][dim]
  // A chunk's keys and values in the form that the inner loop wants (see row_tile.h).
  alignas(64) uint16_t p_pairs[kChunkKeys * kTileRows];
  alignas(64) float k_wide[kChunkKeys * kMaxHeadDim];
  alignas(64) float v_wide[kChunkKeys * kMaxHeadDim];
};

// The backward pass of one query tile: `fwd` holds q and, per chunk, the probabilities.
struct BackwardTile {
  Tile fwd;
  const char* grad_out_rows[kTileRows];
  char* grad_q_rows[kTileRows];
  alignas(64) float lse[kTileRows];
  alignas(64) float delta[kTileRows];
  alignas(64) float grad_out[kMaxHeadDim * kTileRows];      // [dim_v][row]
  alignas(64) float grad_out_row[kTileRows * kMaxHeadDim];  // [row][dim_v]
  alignas(64) float q_row[kTileRows * kMaxHeadDim];         // [row][dim]
  alignas(64) float grad_scores[kChunkKeys * kTileRows];    // [key][row]
  float* grad_k;  // [keys, grad_pitch(head_dim)] accumulators of this KV head
  float* grad_v;  // [keys, grad_pitch(head_dim_v)]
};

// Row pitch of the float32 gradient accumulators: a whole number of the widest vectors.
constexpr int grad_pitch(int dim) {
  return (dim + 15) / 16 * 16;
}

// What becomes of a run of rows: kDirection is the mean of rows divided by their norms.
enum class Pool : int32_t { kMean, kMin, kMax, kDirection };

constexpr int kNearestRows = 256;  // keys that a block of nearest holds at most

// Keys in search of their nearest centroid.
struct NearestBlock {
  DType dtype;
  int32_t count;
  int32_t dim;
  const char* rows[kNearestRows];
  alignas(64) float best[kNearestRows];     // the greatest product so far
  alignas(64) int32_t label[kNearestRows];  // and whose it is
  alignas(64) float packed[kNearestRows * kMaxHeadDim];
};

constexpr int kRankChecks = 2;  // rows of a tile that check its choice

// Keys of one level of a tile's ranking: how many, and what they weigh for each checking row.
struct alignas(32) RankLevel {
  int64_t keys;
  int64_t mass[kRankChecks];
};

struct Kernels {
  const char* name;
  // Tiles of any number of rows, vectorised over rows.
  void (*row_begin)(Tile&);
  void (*row_attend)(Tile&, const KeyChunk&, const KeyChunk* next);
  void (*row_finish)(Tile&);
  // Tiles of at most max_dim_rows rows, vectorised over head_dim.
  int max_dim_rows;
  void (*dim_begin)(Tile&);
  void (*dim_attend)(Tile&, const KeyChunk&, const KeyChunk* next);
  void (*dim_finish)(Tile&);
  // scores[key][row] = q . k of a tile that row_begin has set up; nothing scaled, nothing masked.
  void (*row_score)(Tile&, const KeyChunk&);
  // best[key] = max(best[key], softmax_scale * the largest of its scores); a NaN counts as -inf.
  void (*score_max)(Tile&, const KeyChunk&, float* best);
  // Probabilities of a window of rows: of a chunk relative to the running maxima, what makes them
  // final, and their reduction (window_tile.h).
  void (*window_attend)(Tile&, const KeyChunk&);
  void (*window_factors)(const float* top, const float* row_max, const float* row_sum,
                         float* factor);
  void (*window_reduce)(const float* probs, const float* factor, int rows, const KeyChunk&,
                        int64_t first_position, bool maximum, float* columns, float* diagonals,
                        int64_t distances);
  // Clustering and centroid lookup (centroid_tile.h).
  void (*nearest)(NearestBlock&, const float* centroids, const int32_t* ids, int64_t n);
  void (*dim_score)(Tile&, const KeyChunk&, const KeyChunk* next);
  void (*add_shares)(float* s, const float* counts, int64_t n, float scale, float weight,
                     float* out);
  void (*add_rows)(const char* base, int64_t stride_bytes, const int32_t* rows, int64_t count,
                   const float* weights, int dim, DType dtype, float* out);
  // Levels of estimated probability, for adaptive lists (see rank_tile.h).
  void (*rank_scale)(const Tile&, const KeyChunk&, const float* factor, const int32_t* limits,
                     int rows, float* out, float* top);
  void (*rank_levels)(const float* x, int keys, int rows, int tiles, const float* top,
                      const int64_t* weights, uint8_t* levels, int64_t pitch, RankLevel* sums);
  void (*backward_begin)(BackwardTile&);
  void (*backward_attend)(BackwardTile&, const KeyChunk&, const KeyChunk* next);
  void (*backward_finish)(BackwardTile&);
  // n numbers of dtype as float32, and back.
  void (*widen)(const char* from, float* to, int64_t n, DType dtype);
  void (*narrow)(const float* from, char* to, int64_t n, DType dtype);
  // Rows combined into a running result; and a row's exponentials below its maximum, with their
  // sum (see pool_tile.h).
  void (*pool_rows)(const char* from, int64_t row_bytes, int rows, int width, DType dtype,
                    Pool kind, float* to);
  float (*exp_cells)(float* cells, int64_t n, float scale);
};

// The fastest table that this CPU runs, or the one SPARSE_ATTN_CPU_CAPABILITY names.
// Throws std::runtime_error if that name is unknown or this CPU cannot run it.
const Kernels& kernels();

}  // namespace sparse_attn::cpu
