// SPDX-License-Identifier: Apache-2.0
// Attention of a few query rows (decode), vectorised over head_dim: each key and value row is read
// once for all rows of the tile, in the order it lies in memory, so that the loop runs at memory
// bandwidth. 16-bit keys and values are widened in registers; all arithmetic is float32.
//
//   score:      kLanes (row, key) dot products at a time, reduced together by one lane-sum tree
//   accumulate: acc[row][dim] += P[row][key] V[key][dim] for a register block of (row, dim)
#pragma once

#include "kernels.h"
#include "row_tile.h"
#include "vec.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// A vector of lane sums holds kLanes (row, key) products, so no more rows than lanes.
constexpr int kDimRows = kLanes < kMaxDimRows ? kLanes : kMaxDimRows;

// Vectors of dims that accumulate_dims takes in one pass: 16 accumulators at most.
template <int kRows>
constexpr int kWideVecs = kRows <= 2 ? 8 : 16 / kRows;

// How far ahead of the loads memory is asked for, whatever comes next: keys, then values, then the
// next chunk's keys. 8 KiB is twice what arrives during one access to DRAM.
constexpr int kPrefetchBytes = 8192;

SPARSE_ATTN_INLINE int padded_dim(int dim) {
  return (dim + kLanes - 1) / kLanes * kLanes;
}

// kTail: the row's length is no multiple of kLanes. Kept out of the loops that need not know.
template <DType kType, bool kTail>
SPARSE_ATTN_INLINE Vec load_typed(const char* row, int d, int n) {
  if constexpr (kTail) return load_row(row, d, n, kType);
  return load_wide(row + d * (kType == DType::kFloat32 ? 4 : 2), kType);
}

// scores[row][key] for kRows rows and kLanes / kRows keys, key by key: memory is read in order.
template <DType kType, int kRows, bool kTail>
SPARSE_ATTN_INLINE void score_dims(const Tile& t, const char* const* k, float* out) {
  constexpr int kKeys = kLanes / kRows;
  const int pitch = padded_dim(t.head_dim);
  Vec acc[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kKeys; ++i) {
    Vec sum[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r] = Vec{};
    for (int d = 0; d < t.head_dim; d += kLanes) {
      const Vec x = load_typed<kType, kTail>(k[i], d, t.head_dim);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r] = load(t.q + r * pitch + d) * x + sum[r];
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) acc[r * kKeys + i] = sum[r];
  }
  const Vec sums = sum_lanes<kLanes / 2>(acc);
  float packed[kLanes];
  store(packed, sums);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    memcpy(out + r * kChunkKeys, packed + r * kKeys, kKeys * sizeof(float));
}

// The bytes [begin, begin + size) of rows that lie one behind the other in the order of reading.
SPARSE_ATTN_INLINE void prefetch_bytes(const char* const* rows, int count, int row_bytes, int begin,
                                       int size) {
  for (int at = begin; at < begin + size && at < count * row_bytes; at += 64)
    __builtin_prefetch(rows[at / row_bytes] + at % row_bytes, 0, 3);
}

// acc for kRows rows and kVecs vectors of dims, over all keys of the chunk.
template <DType kType, int kRows, int kVecs, bool kTail>
SPARSE_ATTN_KERNEL void accumulate_dims(Tile& t, const KeyChunk& c, int first_dim,
                                        const KeyChunk* next) {
  const int pitch = padded_dim(t.head_dim_v);
  constexpr int kWidth = kType == DType::kFloat32 ? 4 : 2;
  constexpr int kSlice = kVecs * kLanes * kWidth;  // bytes of a row that one pass reads
  constexpr int kAhead =
      kPrefetchBytes / kSlice < kChunkKeys ? kPrefetchBytes / kSlice : kChunkKeys;
  const int dims = t.head_dim_v;
  const int count = c.count;
  const int slice = first_dim * kWidth;
  const bool last_pass = slice + kSlice >= dims * kWidth;
  float* acc_at = t.acc + first_dim;
  const float* p = t.scores;
  Vec acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) acc[r][j] = Vec{};
  for (int key = 0; key < count; ++key) {
    const int ahead = key + kAhead;
    if (ahead < count) {
      prefetch_row<1>(c.v[ahead] + slice, kSlice);
    } else if (!last_pass) {
      prefetch_row<1>(c.v[ahead - count < count ? ahead - count : 0] + slice + kSlice, kSlice);
    } else if (next != nullptr) {
      prefetch_bytes(next->k, next->count, t.head_dim * kWidth, (ahead - count) * kSlice, kSlice);
    }
    const char* row = c.v[key];
    Vec x[kVecs];
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j)
      x[j] = load_typed<kType, kTail>(row, first_dim + j * kLanes, dims);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec b = splat(p[r * kChunkKeys + key]);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) acc[r][j] = b * x[j] + acc[r][j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      float* at = acc_at + r * pitch + j * kLanes;
      store(at, load(at) * t.alpha[r] + acc[r][j]);
    }
}

// Hides what limits and bits hide of one row's scores.
inline void mask_row(Tile& t, const KeyChunk& c, int r) {
  float* s = t.scores + r * kChunkKeys;
  for (int i = 0; i < c.count; ++i) {
    const bool within = c.limits == nullptr ||
                        (c.position[i] >= c.limits->lo[r] && c.position[i] < c.limits->hi[r]);
    const bool listed = !c.has_bits || ((c.bits[i] >> r) & 1) != 0;
    if (!within || !listed) s[i] = kNegInf;
  }
}

// Scale, softcap, bias and visibility of one row's scores, then the online softmax over its keys.
SPARSE_ATTN_INLINE void softmax_row(Tile& t, const KeyChunk& c, int r) {
  float* s = t.scores + r * kChunkKeys;
  const int padded = (c.count + kLanes - 1) / kLanes * kLanes;
  const float inverse_cap = t.softcap > 0.0f ? t.softmax_scale / t.softcap : 0.0f;
  for (int i = 0; i < c.count; i += kLanes) {
    Vec x = load(s + i);
    x = t.softcap > 0.0f ? t.softcap * tanh(x * inverse_cap) : x * t.softmax_scale;
    if (c.has_bias) x += load(c.bias + i);
    store(s + i, x);
  }
  for (int i = c.count; i < padded; ++i) s[i] = kNegInf;
  if (c.limits != nullptr || c.has_bits) mask_row(t, c, r);
  Vec top = splat(kNegInf);
  for (int i = 0; i < padded; i += kLanes) top = max(top, load(s + i));
  const float chunk_top = max_lane(top) * kLog2E;
  const float old = t.row_max[r];
  const float m = chunk_top > old ? chunk_top : old;
  const float shift = m > kNegInf ? m : 0.0f;
  Vec sum = {};
  for (int i = 0; i < padded; i += kLanes) {
    const Vec p = exp2<6>(multiply_add(load(s + i), splat(kLog2E), splat(-shift)));
    sum += p;
    store(s + i, p);
  }
  // Most chunks leave the maximum as it is.
  t.alpha[r] = m == old ? 1.0f : (old > kNegInf ? __builtin_exp2f(old - shift) : 0.0f);
  t.row_max[r] = m;
  t.row_sum[r] = t.row_sum[r] * t.alpha[r] + add_lanes(sum);
}

template <DType kType, int kRows, bool kTail>
SPARSE_ATTN_INLINE void score_chunk(Tile& t, const KeyChunk& c) {
  constexpr int kKeys = kLanes / kRows;
  constexpr int kWidth = kType == DType::kFloat32 ? 4 : 2;
  constexpr int kSlice = kWideVecs<kRows> * kLanes * kWidth;  // of the first pass over the values
  const int key_bytes = t.head_dim * kWidth;
  const int all_bytes = c.count * key_bytes;
  const char* keys[kLanes];
  for (int i = 0; i < c.count; i += kKeys) {
    for (int j = 0; j < kKeys; ++j) keys[j] = c.k[i + j < c.count ? i + j : c.count - 1];
    const int ahead = i * key_bytes + kPrefetchBytes;
    if (ahead < all_bytes) {
      prefetch_bytes(c.k, c.count, key_bytes, ahead, kKeys * key_bytes);
    } else {  // past the keys come the slices of the values
      for (int at = ahead - all_bytes; at < ahead - all_bytes + kKeys * key_bytes; at += kSlice)
        if (at / kSlice < c.count) prefetch_row<1>(c.v[at / kSlice], kSlice);
    }
    score_dims<kType, kRows, kTail>(t, keys, t.scores + i);
  }
}

template <DType kType, int kRows>
SPARSE_ATTN_INLINE void dim_attend_rows(Tile& t, const KeyChunk& c, const KeyChunk* next) {
  if (t.head_dim % kLanes == 0) {
    score_chunk<kType, kRows, false>(t, c);
  } else {
    score_chunk<kType, kRows, true>(t, c);
  }
  for (int r = 0; r < t.rows; ++r) softmax_row(t, c, r);
  for (int r = t.rows; r < kRows; ++r) t.alpha[r] = 0.0f;
  // Register blocks: as wide as fits, then single vectors, the last with a tail.
  constexpr int kWide = kWideVecs<kRows>;
  int d = 0;
  for (; d + kWide * kLanes <= t.head_dim_v; d += kWide * kLanes)
    accumulate_dims<kType, kRows, kWide, false>(t, c, d, next);
  for (; d + kLanes <= t.head_dim_v; d += kLanes)
    accumulate_dims<kType, kRows, 1, false>(t, c, d, next);
  if (d < t.head_dim_v) accumulate_dims<kType, kRows, 1, true>(t, c, d, next);
}

template <DType kType>
SPARSE_ATTN_KERNEL void dim_attend_typed(Tile& t, const KeyChunk& c, const KeyChunk* next) {
  if (t.rows == 1) return dim_attend_rows<kType, 1>(t, c, next);
  if (t.rows == 2) return dim_attend_rows<kType, 2>(t, c, next);
  if (t.rows <= 4) return dim_attend_rows<kType, 4>(t, c, next);
  if constexpr (kDimRows == 8) dim_attend_rows<kType, 8>(t, c, next);
}

SPARSE_ATTN_KERNEL void dim_attend(Tile& t, const KeyChunk& c, const KeyChunk* next) {
  if (t.dtype == DType::kFloat32) return dim_attend_typed<DType::kFloat32>(t, c, next);
  if (t.dtype == DType::kBFloat16) return dim_attend_typed<DType::kBFloat16>(t, c, next);
  dim_attend_typed<DType::kFloat16>(t, c, next);
}

SPARSE_ATTN_KERNEL void dim_begin(Tile& t) {
  const int pitch = padded_dim(t.head_dim);
  const int pitch_v = padded_dim(t.head_dim_v);
  memset(t.q, 0, sizeof(float) * pitch * kMaxDimRows);
  memset(t.acc, 0, sizeof(float) * pitch_v * kMaxDimRows);
  for (int r = 0; r < t.rows; ++r) {
    widen_row(t.q_rows[r], t.q + r * pitch, t.head_dim, t.dtype);
    t.row_max[r] = kNegInf;
    t.row_sum[r] = 0.0f;
  }
}

SPARSE_ATTN_KERNEL void dim_finish(Tile& t) {
  const int pitch = padded_dim(t.head_dim_v);
  for (int r = 0; r < t.rows; ++r) {
    const float factor = finish_row(t, r);
    float* acc = t.acc + r * pitch;
    for (int d = 0; d < t.head_dim_v; d += kLanes) store(acc + d, load(acc + d) * factor);
    narrow_row(acc, t.out_rows[r], t.head_dim_v, t.out_dtype);
  }
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
