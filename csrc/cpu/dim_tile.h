// SPDX-License-Identifier: Apache-2.0
// Attention of a few query rows (decode), vectorised over head_dim: each key and value row is read
// once for all rows of the tile, in the order it lies in memory, so that the loop runs at memory
// bandwidth. 16-bit keys and values are widened in registers, but for bf16 pairs where the CPU
// multiplies them and the rows are so many that arithmetic would hold memory up.
//
//   score:      kLanes (row, key) dot products at a time, reduced together by one lane-sum tree
//   softmax:    online, row by row
//   accumulate: sum[row][dim] += P[row][key] V[key][dim], a few keys and two vectors of dims at a
//               time for all rows; the chunk's sums stay in L1
//
// Meanwhile, the softmax included, the next chunk is prefetched.
#pragma once

#include "kernels.h"
#include "row_tile.h"
#include "vec.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// A vector of lane sums holds kLanes (row, key) products, so no more rows than lanes.
constexpr int kDimRows = kLanes < kMaxDimRows ? kLanes : kMaxDimRows;

// Keys whose values are added to the sums at a time: their vectors, two each, stay in registers.
constexpr int kValueKeys = kLanes == 16 ? 8 : 4;

SPARSE_ATTN_INLINE int padded_dim(int dim) {
  return (dim + kLanes - 1) / kLanes * kLanes;
}

// Asks for the next chunk's rows, keys and values in turn, evenly over the work on this chunk, so
// that memory is never idle while scores, softmax or sums are computed. Shares are of 1,024.
constexpr int kScoreShare = 448;
constexpr int kSoftmaxShare = 128;
constexpr int kValueShare = 448;

struct ChunkPrefetch {
  const KeyChunk* next;
  int count;
  int key_bytes;
  int value_bytes;
  int row = 0;

  SPARSE_ATTN_INLINE_MEMBER ChunkPrefetch(const Tile& t, const KeyChunk* next_chunk)
      : next(next_chunk), count(next_chunk != nullptr ? next_chunk->count : 0) {
    const int width = t.dtype == DType::kFloat32 ? 4 : 2;
    key_bytes = t.head_dim * width;
    value_bytes = t.head_dim_v * width;
  }

  // To be called when `share` of the work is about to be done. Into L2: a chunk outgrows L1.
  SPARSE_ATTN_INLINE_MEMBER void reach(int share) {
    for (const int last = count * share >> 10; row < last; ++row) {
      prefetch_row<2>(next->k[row], key_bytes);
      prefetch_row<2>(next->v[row], value_bytes);
    }
  }
};

// How dot products and sums are formed. Plain: float32 arithmetic, rows widened as they are read.
// kTail: a row's length is no multiple of kLanes; kept out of the loops that need not know.
template <DType kType>
struct PlainForm {
  static constexpr int kDims = kLanes;  // of a row in one vector
  static constexpr int kKeysAtOnce = 1;
  static constexpr bool kWidens = kType != DType::kFloat32;
  typedef Vec Operand;

  template <bool kTail>
  static SPARSE_ATTN_INLINE_MEMBER Vec key(const char* row, int d, int n) {
    if constexpr (kTail) return load_row(row, d, n, kType);
    return load_wide(row + d * (kType == DType::kFloat32 ? 4 : 2), kType);
  }
  static SPARSE_ATTN_INLINE_MEMBER Vec query(const Tile& t, int r, int d) {
    return load(t.q + r * padded_dim(t.head_dim) + d);
  }
  // Vectors [dim] of kVecs * kLanes dims of `keys` keys, one after another.
  template <int kKeys, int kVecs, bool kTail>
  static SPARSE_ATTN_INLINE_MEMBER void values(const char* const* rows, int, int d, int n,
                                               Vec (&x)[kKeys][kVecs]) {
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) x[i][j] = key<kTail>(rows[i], d + j * kLanes, n);
  }
  static SPARSE_ATTN_INLINE_MEMBER Vec weight(const Tile& t, int r, int key) {
    return splat(t.scores[r * kChunkKeys + key]);
  }
  static SPARSE_ATTN_INLINE_MEMBER Vec multiply_add(Vec a, Vec b, Vec sum) { return a * b + sum; }
};

#if defined(__AVX512BF16__)
// bf16 pairs: q and K in pairs along dims, P and V in pairs of keys.
constexpr int kPairQueries = kMaxDimRows * kMaxHeadDim;  // numbers of q before those of P

struct PairForm {
  static constexpr int kDims = 2 * kLanes;
  static constexpr int kKeysAtOnce = 2;
  static constexpr bool kWidens = false;
  typedef __m512i Operand;

  template <bool>
  static SPARSE_ATTN_INLINE_MEMBER __m512i key(const char* row, int d, int) {
    return _mm512_loadu_si512(row + d * 2);
  }
  static SPARSE_ATTN_INLINE_MEMBER __m512i query(const Tile& t, int r, int d) {
    return _mm512_loadu_si512(t.p_pairs + r * t.head_dim + d);
  }
  // Of kKeys pairs of keys, the last perhaps half a one: the values of both interleaved.
  template <int kKeys, int kVecs, bool>
  static SPARSE_ATTN_INLINE_MEMBER void values(const char* const* rows, int left, int d, int,
                                               __m512i (&x)[kKeys][kVecs]) {
    static_assert(kVecs == 2);
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i) {
      const __m512i a = _mm512_loadu_si512(rows[2 * i] + d * 2);
      const __m512i b = 2 * i + 1 < left ? _mm512_loadu_si512(rows[2 * i + 1] + d * 2) : __m512i{};
      interleave_pairs(a, b, x[i][0], x[i][1]);
    }
  }
  static SPARSE_ATTN_INLINE_MEMBER __m512i weight(const Tile& t, int r, int key) {
    return splat_pair(t.p_pairs + kPairQueries + r * kChunkKeys + key);
  }
  static SPARSE_ATTN_INLINE_MEMBER Vec multiply_add(__m512i a, __m512i b, Vec sum) {
    return dot_pairs(sum, a, b);
  }
};
#endif

// scores[row][key] for kRows rows and kLanes / kRows keys.
template <class Form, int kRows, bool kTail>
SPARSE_ATTN_INLINE void score_block(const Tile& t, int first_row, const char* const* k,
                                    float* out) {
  constexpr int kKeys = kLanes / kRows;
  constexpr int kTogether = kRows < 4 ? 4 / kRows : kKeys;
  const int n = t.head_dim;
  Vec acc[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kKeys; i += kTogether) {
    Vec sum[kRows][kTogether];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < kTogether; ++j) sum[r][j] = Vec{};
#pragma GCC unroll 2
    for (int d = 0; d < n; d += Form::kDims) {
      typename Form::Operand x[kTogether];
#pragma GCC unroll 8
      for (int j = 0; j < kTogether; ++j) x[j] = Form::template key<kTail>(k[i + j], d, n);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        auto q = Form::query(t, first_row + r, d);
        if constexpr (kTogether > 1) keep(q);
#pragma GCC unroll 8
        for (int j = 0; j < kTogether; ++j) sum[r][j] = Form::multiply_add(q, x[j], sum[r][j]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < kTogether; ++j) acc[r * kKeys + i + j] = sum[r][j];
  }
  float packed[kLanes];
  store(packed, sum_lanes<kLanes / 2>(acc));
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    memcpy(out + (first_row + r) * kChunkKeys, packed + r * kKeys, kKeys * sizeof(float));
}

template <class Form, int kRows, bool kTail, class Prefetch>
SPARSE_ATTN_KERNEL void score_chunk(Tile& t, const KeyChunk& c, Prefetch& prefetch) {
  // Twice as many lanes as rows at least: else a query vector would serve one key only. But where
  // a key is widened for each block of rows, one block of all rows is faster on AVX2.
  constexpr bool kOneBlock = kRows < kLanes / 2 || (Form::kWidens && kLanes == 8);
  constexpr int kBlockRows = kOneBlock ? kRows : kLanes / 2;
  constexpr int kKeys = kLanes / kBlockRows;
  const int step = kScoreShare * kKeys / c.count;
  int share = 0;
  int i = 0;
  for (; i + kKeys <= c.count; i += kKeys) {
    prefetch.reach(share += step);
#pragma GCC unroll 2
    for (int r = 0; r < kRows; r += kBlockRows)
      score_block<Form, kBlockRows, kTail>(t, r, c.k + i, t.scores + i);
  }
  if (i == c.count) return;
  const char* keys[kKeys];
  for (int j = 0; j < kKeys; ++j) keys[j] = c.k[i + j < c.count ? i + j : c.count - 1];
  for (int r = 0; r < kRows; r += kBlockRows)
    score_block<Form, kBlockRows, kTail>(t, r, keys, t.scores + i);
}

// sum[row][dim] += P V for kKeys keys (or pairs of them) and kVecs vectors of dims.
template <class Form, int kRows, int kKeys, int kVecs, bool kTail>
SPARSE_ATTN_INLINE void add_values(Tile& t, const KeyChunk& c, int key, int d) {
  const int pitch = padded_dim(t.head_dim_v);
  typename Form::Operand x[kKeys][kVecs];
  Form::template values<kKeys, kVecs, kTail>(c.v + key, c.count - key, d, t.head_dim_v, x);
  float* at = t.chunk_acc + d;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r, at += pitch) {
    Vec sum[kVecs];
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) sum[j] = load(at + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i) {
      auto p = Form::weight(t, r, key + i * Form::kKeysAtOnce);
      if constexpr (kVecs > 1) keep(p);
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) sum[j] = Form::multiply_add(p, x[i][j], sum[j]);
    }
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) store(at + j * kLanes, sum[j]);
  }
}

template <class Form, int kRows, int kKeys>
SPARSE_ATTN_INLINE void add_value_rows(Tile& t, const KeyChunk& c, int key) {
  const int n = t.head_dim_v;
  int d = 0;
  for (; d + 2 * kLanes <= n; d += 2 * kLanes)
    add_values<Form, kRows, kKeys, 2, false>(t, c, key, d);
  if constexpr (Form::kKeysAtOnce == 1) {
    if (d + kLanes <= n) {
      add_values<Form, kRows, kKeys, 1, false>(t, c, key, d);
      d += kLanes;
    }
    if (d < n) add_values<Form, kRows, kKeys, 1, true>(t, c, key, d);
  }
}

// acc = alpha acc + P V. The chunk's sum is formed by itself: added key by key to a long running
// sum, its digits would be lost.
template <class Form, int kRows>
SPARSE_ATTN_KERNEL void accumulate_chunk(Tile& t, const KeyChunk& c, ChunkPrefetch& prefetch) {
  constexpr int kKeys = kValueKeys;
  const int pitch = padded_dim(t.head_dim_v);
  memset(t.chunk_acc, 0, sizeof(float) * pitch * kRows);
  const int step = kValueShare * kKeys / c.count;
  int share = kScoreShare + kSoftmaxShare;
  int key = 0;
  for (; key + kKeys <= c.count; key += kKeys) {
    prefetch.reach(share += step);
    add_value_rows<Form, kRows, kKeys / Form::kKeysAtOnce>(t, c, key);
  }
  for (; key < c.count; key += Form::kKeysAtOnce) add_value_rows<Form, kRows, 1>(t, c, key);
  for (int r = 0; r < kRows; ++r) {
    float* acc = t.acc + r * pitch;
    const float* sum = t.chunk_acc + r * pitch;
    for (int d = 0; d < pitch; d += kLanes)
      store(acc + d, load(acc + d) * t.alpha[r] + load(sum + d));
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
SPARSE_ATTN_KERNEL void softmax_row(Tile& t, const KeyChunk& c, int r) {
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

template <class Form, int kRows, bool kTail>
SPARSE_ATTN_INLINE void attend_with(Tile& t, const KeyChunk& c, const KeyChunk* next) {
  ChunkPrefetch prefetch(t, next);
  score_chunk<Form, kRows, kTail>(t, c, prefetch);
  for (int r = 0; r < t.rows; ++r) {
    prefetch.reach(kScoreShare + kSoftmaxShare * (r + 1) / t.rows);
    softmax_row(t, c, r);
  }
  for (int r = t.rows; r < kRows; ++r) t.alpha[r] = 0.0f;
#if defined(__AVX512BF16__)
  if constexpr (Form::kKeysAtOnce == 2) {
    uint16_t* p = t.p_pairs + kPairQueries;
    for (int r = 0; r < kRows; ++r)
      for (int key = 0; key < kChunkKeys; key += kLanes) {
        const HalfVec half = narrow_bf16(load(t.scores + r * kChunkKeys + key));
        memcpy(p + r * kChunkKeys + key, &half, sizeof(half));
      }
  }
#endif
  accumulate_chunk<Form, kRows>(t, c, prefetch);
}

template <DType kType, int kRows>
SPARSE_ATTN_INLINE void dim_attend_rows(Tile& t, const KeyChunk& c, const KeyChunk* next) {
#if defined(__AVX512BF16__)
  if constexpr (kType == DType::kBFloat16 && kRows >= 4)
    if (t.head_dim % PairForm::kDims == 0 && t.head_dim_v % PairForm::kDims == 0)
      return attend_with<PairForm, kRows, false>(t, c, next);
#endif
  if (t.head_dim % kLanes == 0) return attend_with<PlainForm<kType>, kRows, false>(t, c, next);
  attend_with<PlainForm<kType>, kRows, true>(t, c, next);
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
  if (kHasBf16Dot && t.dtype == DType::kBFloat16) {  // what PairForm reads
    memset(t.p_pairs, 0, sizeof(uint16_t) * t.head_dim * kMaxDimRows);
    for (int r = 0; r < t.rows; ++r)
      memcpy(t.p_pairs + r * t.head_dim, t.q_rows[r], t.head_dim * sizeof(uint16_t));
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
