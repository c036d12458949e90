// SPDX-License-Identifier: Apache-2.0
// The inner loops of clustering and centroid lookup: the nearest centroid of many keys, the
// products of a few query rows with many centroids, and the softmax shares of clusters. Centroids
// are float32.
//
//   nearest: keys are packed in panels [dim][kPackRows], a centroid element is a broadcast, and the
//            running best is kept beside the accumulators: no keys x centroids buffer. A slice of
//            the centroids stays in L1 while all panels of a block of keys pass over it.
#pragma once

#include "dim_tile.h"
#include "kernels.h"
#include "vec.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

constexpr int kPackRows = kPanelVecs * kLanes;
constexpr int kNearestGroup = kGroup<kPanelVecs>;  // centroids a micro-kernel holds
constexpr int kNearestBytes = 16 << 10;            // of centroids that stay in L1

// to[dim][kPackRows] from the rows; missing rows are zeros.
SPARSE_ATTN_INLINE void pack_panel(const char* const* rows, int count, int dim, DType dtype,
                                   float* to) {
  for (int r = 0; r < kPackRows; r += kLanes) {
    for (int d = 0; d < dim; d += kLanes) {
      Vec x[kLanes];
      for (int i = 0; i < kLanes; ++i)
        x[i] = r + i < count ? load_row(rows[r + i], d, dim, dtype) : Vec{};
      transpose(x);
      const int n = dim - d < kLanes ? dim - d : kLanes;
      for (int i = 0; i < n; ++i) store(to + (d + i) * kPackRows + r, x[i]);
    }
  }
}

// The order is product descending, then id ascending, whatever order the ids come in.
template <int kKeys>
SPARSE_ATTN_KERNEL void nearest_group(const float* __restrict x, const float* centroids,
                                      const int32_t* ids, int dim, float* best, int32_t* label) {
  const float* row[kKeys];
  Vec acc[kKeys][kPanelVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kKeys; ++i) {
    row[i] = centroids + int64_t{ids[i]} * dim;
#pragma GCC unroll 4
    for (int j = 0; j < kPanelVecs; ++j) acc[i][j] = Vec{};
  }
#pragma GCC unroll 2
  for (int d = 0; d < dim; ++d) {
    Vec v[kPanelVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kPanelVecs; ++j) v[j] = load(x + d * kPackRows + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
      const Vec b = splat(row[i][d]);
#pragma GCC unroll 4
      for (int j = 0; j < kPanelVecs; ++j) acc[i][j] = b * v[j] + acc[i][j];
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kPanelVecs; ++j) {
    Vec top = load(best + j * kLanes);
    IntVec at = load_as<IntVec>(label + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
      const IntVec id = splat_int(ids[i]);
      const IntVec better = (acc[i][j] > top) | ((acc[i][j] == top) & (id < at));
      top = better ? acc[i][j] : top;
      at = better ? id : at;
    }
    store(best + j * kLanes, top);
    memcpy(label + j * kLanes, &at, sizeof(at));
  }
}

// Improves best and label of the block's rows by the n centroids that `ids` names.
SPARSE_ATTN_KERNEL void nearest(NearestBlock& b, const float* centroids, const int32_t* ids,
                                int64_t n) {
  const int dim = b.dim;
  for (int r = 0; r < b.count; r += kPackRows)
    pack_panel(b.rows + r, b.count - r, dim, b.dtype, b.packed + r * dim);
  const int groups = kNearestBytes / (dim * 4 * kNearestGroup);
  const int64_t slice = (groups > 1 ? groups : 1) * kNearestGroup;
  for (int64_t first = 0; first < n; first += slice) {
    const int64_t end = n - first < slice ? n : first + slice;
    for (int r = 0; r < b.count; r += kPackRows) {
      const float* x = b.packed + r * dim;
      int64_t i = first;
      for (; i + kNearestGroup <= end; i += kNearestGroup)
        nearest_group<kNearestGroup>(x, centroids, ids + i, dim, b.best + r, b.label + r);
      for (; i + 2 <= end; i += 2)
        nearest_group<2>(x, centroids, ids + i, dim, b.best + r, b.label + r);
      if (i < end) nearest_group<1>(x, centroids, ids + i, dim, b.best + r, b.label + r);
    }
  }
}

// Asks for the centroids some 4 KiB ahead, in this chunk and then in the next.
struct CentroidPrefetch {
  const KeyChunk& c;
  const KeyChunk* next;
  int row_bytes;
  int row = 0;

  SPARSE_ATTN_INLINE_MEMBER void reach(int share) {
    const int ahead = (4096 + row_bytes - 1) / row_bytes;
    for (const int last = c.count * share / kScoreShare; row < last; ++row) {
      const int at = row + ahead;
      if (at < c.count) {
        prefetch_row<1>(c.k[at], row_bytes);
      } else if (next != nullptr && at - c.count < next->count) {
        prefetch_row<1>(next->k[at - c.count], row_bytes);
      }
    }
  }
};

template <int kRows>
SPARSE_ATTN_INLINE void dim_score_rows(Tile& t, const KeyChunk& c, const KeyChunk* next) {
  CentroidPrefetch prefetch{c, next, t.head_dim * 4};
  if (t.head_dim % kLanes == 0) {
    score_chunk<PlainForm<DType::kFloat32>, kRows, false>(t, c, prefetch);
  } else {
    score_chunk<PlainForm<DType::kFloat32>, kRows, true>(t, c, prefetch);
  }
}

// scores[row][key] = q[row] . k[key] of at most max_dim_rows float32 rows set up by dim_begin;
// meanwhile the next chunk's keys are prefetched.
SPARSE_ATTN_KERNEL void dim_score(Tile& t, const KeyChunk& c, const KeyChunk* next) {
  if (t.rows == 1) return dim_score_rows<1>(t, c, next);
  if (t.rows == 2) return dim_score_rows<2>(t, c, next);
  if (t.rows <= 4) return dim_score_rows<4>(t, c, next);
  if constexpr (kDimRows == 8) dim_score_rows<8>(t, c, next);
}

// out[i] += weight exp(scale s[i]) / sum_j counts[j] exp(scale s[j]). s has room up to a multiple
// of 16 numbers and is overwritten; so has counts, with zeros, and out.
SPARSE_ATTN_KERNEL void add_shares(float* s, const float* counts, int64_t n, float scale,
                                   float weight, float* out) {
  const Vec factor = splat(scale * kLog2E);
  Vec top = splat(kNegInf);
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec x = load(s + i) * factor;
    if (i + kLanes > n)
      for (int j = static_cast<int>(n - i); j < kLanes; ++j) x[j] = kNegInf;
    store(s + i, x);
    top = max(top, x);
  }
  const float shift = max_lane(top);
  if (!(shift > kNegInf)) return;
  Vec sum = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec e = exp2<6>(load(s + i) - shift);
    store(s + i, e);
    sum = load(counts + i) * e + sum;
  }
  const Vec share = splat(weight / add_lanes(sum));
  for (int64_t i = 0; i < n; i += kLanes) store(out + i, load(s + i) * share + load(out + i));
}

// out = sum over the rows of weight[i] * row[i], added in order.
SPARSE_ATTN_KERNEL void add_rows(const char* base, int64_t stride_bytes, const int32_t* rows,
                                 int64_t count, const float* weights, int dim, DType dtype,
                                 float* out) {
  for (int d = 0; d < dim; d += kLanes) {
    Vec sum = {};
    for (int64_t i = 0; i < count; ++i) {
      const char* row = base + rows[i] * stride_bytes;
      const float w = weights == nullptr ? 1.0f : weights[rows[i]];
      sum = load_row(row, d, dim, dtype) * w + sum;
    }
    const int n = dim - d < kLanes ? dim - d : kLanes;
    memcpy(out + d, &sum, n * sizeof(float));
  }
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
