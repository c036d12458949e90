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
// next chunk's keys. 4 KiB is what arrives during one access to DRAM.
constexpr int kPrefetchBytes = 4096;

SPARSE_ATTN_INLINE int padded_dim(int dim) {
  return (dim + kLanes - 1) / kLanes * kLanes;
}

// kTail: the row's length is no multiple of kLanes. Kept out of the loops that need not know.
template <DType kType, bool kTail>
SPARSE_ATTN_INLINE Vec load_typed(const char* row, int d, int n) {
  if constexpr (kTail) return load_row(row, d, n, kType);
  return load_wide(row + d * (kType == DType::kFloat32 ? 4 : 2), kType);
}

// Sums the lanes of the kLanes products and puts them where their row and key belong.
template <int kRows>
SPARSE_ATTN_INLINE void scatter_scores(Vec* acc, float* out) {
  constexpr int kKeys = kLanes / kRows;
  float packed[kLanes];
  store(packed, sum_lanes<kLanes / 2>(acc));
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    memcpy(out + r * kChunkKeys, packed + r * kKeys, kKeys * sizeof(float));
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
  scatter_scores<kRows>(acc, out);
}

// Asks for rows line by line, from where the last call stopped.
struct RowPrefetch {
  const char* const* rows;
  int count;
  int row_bytes;
  int row = 0;
  int offset = 0;

  SPARSE_ATTN_INLINE_MEMBER void advance(int bytes) {
    for (; bytes > 0 && row < count; bytes -= 64) {
      __builtin_prefetch(rows[row] + offset, 0, 3);
      offset += 64;
      if (offset >= row_bytes) {
        offset = 0;
        ++row;
      }
    }
  }
};

// What accumulate_dims asks for while it reads a slice of every value row: its own slice of the
// rows ahead, then the next slice, then the next chunk's keys.
template <int kSlice>
struct ValuePrefetch {
  static constexpr int kAhead =
      kPrefetchBytes / kSlice < kChunkKeys ? kPrefetchBytes / kSlice : kChunkKeys;
  const KeyChunk& chunk;
  int slice;
  bool last_pass;
  RowPrefetch next_keys;

  SPARSE_ATTN_INLINE_MEMBER void step(int key) {
    const int ahead = key + kAhead;
    if (ahead < chunk.count) {
      prefetch_row<1>(chunk.v[ahead] + slice, kSlice);
    } else if (last_pass) {
      next_keys.advance(kSlice);
    } else if (ahead - chunk.count < chunk.count) {
      prefetch_row<1>(chunk.v[ahead - chunk.count] + slice + kSlice, kSlice);
    }
  }
};

template <int kSlice>
SPARSE_ATTN_INLINE ValuePrefetch<kSlice> value_prefetch(const Tile& t, const KeyChunk& c,
                                                        int first_dim, const KeyChunk* next) {
  const int width = static_cast<int>(element_size(t.dtype));
  const int slice = first_dim * width;
  RowPrefetch keys{nullptr, 0, t.head_dim * width};
  if (next != nullptr) keys = {next->k, next->count, t.head_dim * width};
  return {c, slice, slice + kSlice >= t.head_dim_v * width, keys};
}

// acc = alpha acc + sum of this chunk, for kRows rows and kVecs vectors of dims.
template <int kRows, int kVecs>
SPARSE_ATTN_INLINE void add_to_acc(Tile& t, int first_dim, const Vec (&sum)[kRows][kVecs]) {
  const int pitch = padded_dim(t.head_dim_v);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      float* at = t.acc + r * pitch + first_dim + j * kLanes;
      store(at, load(at) * t.alpha[r] + sum[r][j]);
    }
}

template <DType kType, int kRows, int kVecs, bool kTail>
SPARSE_ATTN_KERNEL void accumulate_dims(Tile& t, const KeyChunk& c, int first_dim,
                                        const KeyChunk* next) {
  constexpr int kWidth = kType == DType::kFloat32 ? 4 : 2;
  auto prefetch = value_prefetch<kVecs * kLanes * kWidth>(t, c, first_dim, next);
  const int dims = t.head_dim_v;
  const int count = c.count;
  const float* p = t.scores;
  Vec sum[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) sum[r][j] = Vec{};
  for (int key = 0; key < count; ++key) {
    prefetch.step(key);
    const char* row = c.v[key];
    Vec x[kVecs];
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j)
      x[j] = load_typed<kType, kTail>(row, first_dim + j * kLanes, dims);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec b = splat(p[r * kChunkKeys + key]);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) sum[r][j] = b * x[j] + sum[r][j];
    }
  }
  add_to_acc<kRows, kVecs>(t, first_dim, sum);
}

#if defined(__AVX512BF16__)
// The same two products on bf16 pairs, for tiles of so many rows that widening and float32
// arithmetic would be slower than memory: q in pairs along dims, P and V in pairs of keys.
constexpr int kPairDims = 2 * kLanes;
constexpr int kPairQueries = kMaxDimRows * kMaxHeadDim;  // numbers of q before those of P

template <int kRows>
SPARSE_ATTN_INLINE void score_dims_pairs(const Tile& t, const char* const* k, float* out) {
  constexpr int kKeys = kLanes / kRows;
  Vec acc[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kKeys; ++i) {
    Vec sum[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r] = Vec{};
    for (int d = 0; d < t.head_dim; d += kPairDims) {
      const __m512i x = _mm512_loadu_si512(k[i] + d * 2);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        sum[r] = dot_pairs(sum[r], _mm512_loadu_si512(t.p_pairs + r * t.head_dim + d), x);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) acc[r * kKeys + i] = sum[r];
  }
  scatter_scores<kRows>(acc, out);
}

template <int kRows, int kVecs>
SPARSE_ATTN_KERNEL void accumulate_dims_pairs(Tile& t, const KeyChunk& c, int first_dim,
                                              const KeyChunk* next) {
  auto prefetch = value_prefetch<kVecs * kLanes * 2>(t, c, first_dim, next);
  const int count = c.count;
  uint16_t* p = t.p_pairs + kPairQueries;
  for (int r = 0; r < kRows && first_dim == 0; ++r)
    for (int key = 0; key < kChunkKeys; key += kLanes) {
      const HalfVec half = narrow_bf16(load(t.scores + r * kChunkKeys + key));
      memcpy(p + r * kChunkKeys + key, &half, sizeof(half));
    }
  Vec sum[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) sum[r][j] = Vec{};
  for (int key = 0; key < count; key += 2) {
    prefetch.step(key);
    prefetch.step(key + 1);
    const char* a = c.v[key] + first_dim * 2;
    const char* b = key + 1 < count ? c.v[key + 1] + first_dim * 2 : nullptr;
    alignas(64) uint16_t pairs[2 * kVecs * kLanes];
    pair_values(a, b, kVecs * kLanes, pairs);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i weight = splat_pair(p + r * kChunkKeys + key);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j)
        sum[r][j] = dot_pairs(sum[r][j], weight, _mm512_loadu_si512(pairs + j * 2 * kLanes));
    }
  }
  add_to_acc<kRows, kVecs>(t, first_dim, sum);
}
#endif

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

template <DType kType, int kRows, class Score>
SPARSE_ATTN_INLINE void score_chunk(Tile& t, const KeyChunk& c, Score score_keys) {
  constexpr int kKeys = kLanes / kRows;
  constexpr int kWidth = kType == DType::kFloat32 ? 4 : 2;
  constexpr int kSlice = kWideVecs<kRows> * kLanes * kWidth;  // of the first pass over the values
  const int key_bytes = t.head_dim * kWidth;
  const int ahead = (kPrefetchBytes + key_bytes - 1) / key_bytes;  // keys
  const char* keys[kLanes];
  for (int i = 0; i < c.count; i += kKeys) {
    for (int j = 0; j < kKeys; ++j) {
      const int key = i + j;
      keys[j] = c.k[key < c.count ? key : c.count - 1];
      if (key + ahead < c.count) {
        prefetch_row<1>(c.k[key + ahead], key_bytes);
        continue;
      }
      // Past the keys come the values' slices for the first pass.
      const int begin = (key + ahead - c.count) * key_bytes;
      for (int at = begin / kSlice; at < (begin + key_bytes) / kSlice && at < c.count; ++at)
        prefetch_row<1>(c.v[at], kSlice);
    }
    score_keys(keys, t.scores + i);
  }
}

// Whether a tile's dot products run on pairs: only where arithmetic would hold memory up.
template <DType kType, int kRows>
SPARSE_ATTN_INLINE bool dims_in_pairs(int dim) {
  constexpr int kWide = kWideVecs<kRows> * kLanes;
  return kHasBf16Dot && kType == DType::kBFloat16 && kRows >= 4 && dim % (2 * kLanes) == 0 &&
         dim % kWide == 0;
}

template <DType kType, int kRows>
SPARSE_ATTN_INLINE void dim_attend_rows(Tile& t, const KeyChunk& c, const KeyChunk* next) {
  const auto score = [&](auto form) __attribute__((always_inline)) {
    score_chunk<kType, kRows>(
        t, c, [&](const char* const* keys, float* out) __attribute__((always_inline)) {
#if defined(__AVX512BF16__)
          if constexpr (decltype(form)::value == 2) return score_dims_pairs<kRows>(t, keys, out);
#endif
          score_dims<kType, kRows, decltype(form)::value == 1>(t, keys, out);
        });
  };
  if (dims_in_pairs<kType, kRows>(t.head_dim)) {
    score(Int<2>{});
  } else if (t.head_dim % kLanes == 0) {
    score(Int<0>{});
  } else {
    score(Int<1>{});
  }
  for (int r = 0; r < t.rows; ++r) softmax_row(t, c, r);
  for (int r = t.rows; r < kRows; ++r) t.alpha[r] = 0.0f;
  // Register blocks: as wide as fits, then single vectors, the last with a tail.
  constexpr int kWide = kWideVecs<kRows>;
  int d = 0;
#if defined(__AVX512BF16__)
  if (dims_in_pairs<kType, kRows>(t.head_dim_v)) {
    for (; d < t.head_dim_v; d += kWide * kLanes)
      accumulate_dims_pairs<kRows, kWide>(t, c, d, next);
    return;
  }
#endif
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
  if (kHasBf16Dot && t.dtype == DType::kBFloat16) {  // what score_dims_pairs reads
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
