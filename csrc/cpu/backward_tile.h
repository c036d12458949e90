// SPDX-License-Identifier: Apache-2.0
// Gradients of one query tile, by recomputation (FlashAttention, arXiv 2205.14135, section 3.1 and
// appendix B), in the layout of row_tile.h, float32 throughout:
//
//   P  = exp(S - lse)            dP[key][row] = sum_d V[key][d] dO[d][row]
//   dS = P (dP - delta) dS/d(qk) dQ[d][row]  += sum_key K[key][d] dS[key][row]
//   dV[key][d] += sum_row P[key][row] dO[row][d]
//   dK[key][d] += sum_row dS[key][row] Q[row][d]
#pragma once

#include "kernels.h"
#include "row_tile.h"
#include "vec.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// to[key][dim] += sum_row weights[key][row] rows[row][dim] for kKeys keys and kVecs dim vectors.
template <int kKeys, int kVecs>
SPARSE_ATTN_KERNEL void scatter(const float* __restrict weights, const float* __restrict rows,
                                int pitch, int count, float* const* to, int first_dim) {
  Vec acc[kKeys][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) acc[i][j] = Vec{};
  for (int r = 0; r < count; ++r) {
    Vec x[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) x[j] = load(rows + r * pitch + first_dim + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i) {
      const Vec b = splat(weights[i * kTileRows + r]);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) acc[i][j] = b * x[j] + acc[i][j];
    }
  }
  // Added to the running sum only now: a tile's sum keeps digits that the running one has lost.
#pragma GCC unroll 8
  for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      float* at = to[i] + first_dim + j * kLanes;
      store(at, load(at) + acc[i][j]);
    }
}

SPARSE_ATTN_INLINE void scatter_chunk(const BackwardTile& b, const KeyChunk& c,
                                      const float* weights, const float* rows, int dim,
                                      float* grad) {
  float spill[kMaxHeadDim];  // where the padding of the last key group goes
  float* to[kChunkKeys + kKeyPadding];
  const int pitch = grad_pitch(dim);
  for (int i = 0; i < c.count; ++i) to[i] = grad + int64_t{c.position[i]} * pitch;
  const int padded = (c.count + kKeyPadding - 1) / kKeyPadding * kKeyPadding;
  for (int i = c.count; i < padded; ++i) to[i] = spill;
  memset(spill, 0, sizeof(spill));
  for_panels(dim, [&](auto vecs, int d) __attribute__((always_inline)) {
    constexpr int kVecs = decltype(vecs)::value;
    const auto run = [&](int i, auto group) __attribute__((always_inline)) {
      scatter<decltype(group)::value, kVecs>(weights + i * kTileRows, rows, pitch, b.fwd.rows,
                                             to + i, d);
    };
    for_groups<kGroup<kVecs>>(
        padded, [&](int i) { run(i, Int<kGroup<kVecs>>{}); }, [&](int i) { run(i, Int<4>{}); });
  });
}

SPARSE_ATTN_KERNEL void backward_begin(BackwardTile& b) {
  Tile& t = b.fwd;
  const auto both = [&](const char* const* rows, int dim, float* columns, float* row_major)
                        __attribute__((always_inline)) {
                          transpose_rows(rows, t.rows, dim, t.dtype, columns);
                          for (int r = 0; r < t.rows; ++r)
                            widen_row(rows[r], row_major + r * grad_pitch(dim), dim, t.dtype);
                        };
  both(t.q_rows, t.head_dim, t.q, b.q_row);
  both(b.grad_out_rows, t.head_dim_v, b.grad_out, b.grad_out_row);
  clear_panels(t.acc, t.rows, t.head_dim);
  for (int r = 0; r < kTileRows; ++r) {
    t.alpha[r] = 1.0f;
    // An empty row has lse -inf; +inf makes all of its probabilities 0.
    const bool empty = r >= t.rows || !(b.lse[r] > kNegInf);
    if (empty) b.lse[r] = __builtin_inff();
    if (r >= t.rows) b.delta[r] = 0.0f;
  }
}

// scores (logits) -> P, grad_scores (dP) -> dS, both in place.
template <int kVecs>
SPARSE_ATTN_INLINE void backward_scores(BackwardTile& b, const KeyChunk& c, int count,
                                        int first_row) {
  Tile& t = b.fwd;
  for (int key = 0; key < count; ++key) {
    for (int j = 0; j < kVecs; ++j) {
      const int row = first_row + j * kLanes;
      float* s_at = t.scores + key * kTileRows + row;
      float* g_at = b.grad_scores + key * kTileRows + row;
      const Vec s = load(s_at);
      const Vec p = exp2<6>((s - load(b.lse + row)) * kLog2E);
      Vec g = p * (load(g_at) - load(b.delta + row)) * t.softmax_scale;
      if (t.softcap > 0.0f) {
        const Vec y = (s - (c.has_bias ? c.bias[key] : 0.0f)) / t.softcap;
        g *= 1.0f - y * y;
      }
      store(s_at, p);
      store(g_at, p > 0.0f ? g : Vec{});
    }
  }
}

// P and dS of a chunk for the rows of one panel, and their part of dQ.
template <int kVecs>
SPARSE_ATTN_INLINE void backward_panel(BackwardTile& b, const KeyChunk& c, const char* const* keys,
                                       const char* const* values, int row, Fetch& fetch) {
  Tile& t = b.fwd;
  const int padded = (c.count + kKeyPadding - 1) / kKeyPadding * kKeyPadding;
  const int count = keys_within(c, row, kVecs * kLanes);
  const int scored = (count + kKeyPadding - 1) / kKeyPadding * kKeyPadding;
  const auto score_both = [&](int i, auto group) __attribute__((always_inline)) {
    constexpr int kKeys = decltype(group)::value;
    fetch.some();
    float* s = t.scores + i * kTileRows + row;
    score<kKeys, kVecs>(panel(t.q, t.head_dim, row), keys + i, t.head_dim, s);
    float* g = b.grad_scores + i * kTileRows + row;
    score<kKeys, kVecs>(panel(b.grad_out, t.head_dim_v, row), values + i, t.head_dim_v, g);
  };
  for_groups<kGroup<kVecs>>(
      scored, [&](int i) { score_both(i, Int<kGroup<kVecs>>{}); },
      [&](int i) { score_both(i, Int<4>{}); });
  adjust_panel<kVecs>(t, c, count, row, true);
  backward_scores<kVecs>(b, c, count, row);
  // The scatters read all keys of all rows.
  for (int key = count; key < padded; ++key) {
    memset(t.scores + key * kTileRows + row, 0, kVecs * sizeof(Vec));
    memset(b.grad_scores + key * kTileRows + row, 0, kVecs * sizeof(Vec));
  }
  const auto gather = [&](int d, auto group) __attribute__((always_inline)) {
    fetch.some();
    accumulate<decltype(group)::value, kVecs, kTileRows>(
        b.grad_scores + row, keys, d, count, t.alpha + row,
        panel(t.acc, t.head_dim, row) + d * kPanelRows);
  };
  for_groups<kGroup<kVecs>>(
      t.head_dim, [&](int d) { gather(d, Int<kGroup<kVecs>>{}); },
      [&](int d) { gather(d, Int<4>{}); });
}

SPARSE_ATTN_KERNEL void backward_attend(BackwardTile& b, const KeyChunk& c, const KeyChunk* next) {
  Tile& t = b.fwd;
  const char* key_pointers[kChunkKeys + kKeyPadding];
  const char* value_pointers[kChunkKeys + kKeyPadding];
  const auto keys = float_rows(t, c.k, c.count, t.head_dim, t.k_wide, key_pointers);
  const auto values = float_rows(t, c.v, c.count, t.head_dim_v, t.v_wide, value_pointers);
  Fetch fetch(t, c, next);
  const auto attend = [&](auto vecs, int row) __attribute__((always_inline)) {
    backward_panel<decltype(vecs)::value>(b, c, keys, values, row, fetch);
  };
  if (c.limits != nullptr) {
    for_panels<kLimitedVecs>(t.rows, attend);
  } else {
    for_panels(t.rows, attend);
  }
  scatter_chunk(b, c, t.scores, b.grad_out_row, t.head_dim_v, b.grad_v);
  scatter_chunk(b, c, b.grad_scores, b.q_row, t.head_dim, b.grad_k);
}

SPARSE_ATTN_KERNEL void backward_finish(BackwardTile& b) {
  write_rows(b.fwd.acc, b.fwd.alpha, b.fwd.rows, b.fwd.head_dim, b.grad_q_rows, b.fwd.dtype);
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
