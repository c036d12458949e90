// SPDX-License-Identifier: Apache-2.0
// Flash attention of one query tile, vectorised over the query rows: scores are held transposed
// ([key][row]), so a key element is a broadcast and K needs no packing or gathering; a column costs
// what a block's key costs. Softmax statistics are vertical operations.
//
//   score:      S[key][row]  = sum_d K[key][d] Q[d][row]          (kKeys keys x kVecs row vectors)
//   softmax:    P = exp2(S c - m),  alpha = exp2(m_old - m)
//   accumulate: O[d][row]    = alpha O + sum_key V[key][d] P[key][row]
//
// float32 inputs run as they are; bf16 runs on the bf16 dot instruction where the CPU has one (Q, P
// and V in pairs along the reduced axis); otherwise 16-bit keys and values are widened per chunk.
// Accumulation is float32. Memory: about 0.3 MB a tile, half of it only for 16-bit inputs.
// Source: the online softmax of FlashAttention (arXiv 2205.14135), laid out for SIMD CPUs.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// Keys (or dims) per micro-kernel call: enough accumulators to hide the FMA latency, few enough
// to stay in registers beside the row vectors and one broadcast.
template <int kVecs>
constexpr int kGroup = kVecs * 8 + kVecs + 1 <= kRegisters ? 8 : (kVecs > 3 || kLanes < 16 ? 6 : 8);

// Panels of a chunk with limits: half a tile where a panel is all of it, so that its first rows
// need not look at the keys that only the others see.
constexpr int kLimitedVecs = 2;

// Without fused multiply-add every product is rounded too; sums over few dims at a time keep the
// error near that of a fused one.
constexpr int kScoreDims = kHasFma ? kMaxHeadDim : 8;

template <int kKeys, int kVecs>
SPARSE_ATTN_KERNEL void score(const float* __restrict q, const char* const* k, int head_dim,
                              float* __restrict s) {
  const float* row[kKeys];
#pragma GCC unroll 16
  for (int i = 0; i < kKeys; ++i) row[i] = reinterpret_cast<const float*>(k[i]);
  for (int first = 0; first < head_dim; first += kScoreDims) {
    const int last = head_dim - first < kScoreDims ? head_dim : first + kScoreDims;
    Vec acc[kKeys][kVecs];
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) acc[i][j] = Vec{};
#pragma GCC unroll 2
    for (int d = first; d < last; ++d) {
      Vec x[kVecs];
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) x[j] = load(q + d * kPanelRows + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        const Vec b = splat(row[i][d]);
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) acc[i][j] = b * x[j] + acc[i][j];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        float* at = s + i * kTileRows + j * kLanes;
        const bool first_dims = kScoreDims == kMaxHeadDim || first == 0;
        store(at, first_dims ? acc[i][j] : load(at) + acc[i][j]);
      }
  }
}

// kPitch: rows between two keys of p.
template <int kDims, int kVecs, int kPitch = kPanelRows>
SPARSE_ATTN_KERNEL void accumulate(const float* __restrict p, const char* const* v, int first_dim,
                                   int keys, const float* __restrict alpha, float* __restrict o) {
  Vec acc[kDims][kVecs];
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j)
#pragma GCC unroll 16
    for (int i = 0; i < kDims; ++i) acc[i][j] = Vec{};
#pragma GCC unroll 2
  for (int key = 0; key < keys; ++key) {
    const float* row = reinterpret_cast<const float*>(v[key]) + first_dim;
    Vec x[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) x[j] = load(p + key * kPitch + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kDims; ++i) {
      const Vec b = splat(row[i]);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) acc[i][j] = b * x[j] + acc[i][j];
    }
  }
  // Added to the running sum only now: a chunk's sum keeps digits that the running one has lost.
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j) {
    const Vec a = load(alpha + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kDims; ++i) {
      float* at = o + i * kPanelRows + j * kLanes;
      store(at, a * load(at) + acc[i][j]);
    }
  }
}

#if defined(__AVX512BF16__)
// The same two products on bf16 pairs: q[dim / 2][row][2], p[key / 2][row][2], v[key / 2][dim][2].
SPARSE_ATTN_INLINE Vec dot_pairs(Vec acc, __m512i a, __m512i b) {
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
SPARSE_ATTN_INLINE __m512i splat_pair(const uint16_t* p) {
  return _mm512_set1_epi32(load_as<int32_t>(p));
}

template <int kKeys, int kVecs>
SPARSE_ATTN_KERNEL void score_pairs(const float* __restrict q, const char* const* k, int head_dim,
                                    float* __restrict s) {
  Vec acc[kKeys][kVecs];
  const uint16_t* row[kKeys];
#pragma GCC unroll 16
  for (int i = 0; i < kKeys; ++i) {
    row[i] = reinterpret_cast<const uint16_t*>(k[i]);
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) acc[i][j] = Vec{};
  }
#pragma GCC unroll 2
  for (int d = 0; d < head_dim; d += 2) {
    __m512i x[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) x[j] = _mm512_load_si512(q + d / 2 * kTileRows + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
      const __m512i b = splat_pair(row[i] + d);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) acc[i][j] = dot_pairs(acc[i][j], b, x[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) store(s + i * kTileRows + j * kLanes, acc[i][j]);
}

template <int kDims, int kVecs>
SPARSE_ATTN_KERNEL void accumulate_pairs(const uint16_t* __restrict p, const uint16_t* __restrict v,
                                         int pitch, int key_pairs, const float* __restrict alpha,
                                         float* __restrict o) {
  Vec acc[kDims][kVecs];
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j)
#pragma GCC unroll 16
    for (int i = 0; i < kDims; ++i) acc[i][j] = Vec{};
#pragma GCC unroll 2
  for (int key = 0; key < key_pairs; ++key) {
    __m512i x[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j)
      x[j] = _mm512_load_si512(p + (key * kTileRows + j * kLanes) * 2);
#pragma GCC unroll 16
    for (int i = 0; i < kDims; ++i) {
      const __m512i b = splat_pair(v + key * pitch + i * 2);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) acc[i][j] = dot_pairs(acc[i][j], b, x[j]);
    }
  }
  // Added to the running sum only now: a chunk's sum keeps digits that the running one has lost.
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j) {
    const Vec a = load(alpha + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kDims; ++i) {
      float* at = o + i * kPanelRows + j * kLanes;
      store(at, a * load(at) + acc[i][j]);
    }
  }
}

// Interleaves two vectors of 32 numbers: the pairs of the first 16, and of the others.
SPARSE_ATTN_INLINE void interleave_pairs(__m512i x, __m512i y, __m512i& first, __m512i& second) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  first = _mm512_permutex2var_epi16(x, low, y);
  second = _mm512_permutex2var_epi16(x, high, y);
}

// Interleaves the values of two keys: to[dim][2]. A missing second key counts as zeros.
SPARSE_ATTN_INLINE void pair_values(const char* a, const char* b, int n, uint16_t* to) {
  for (int d = 0; d < n; d += 32) {
    const __mmask32 mask = n - d >= 32 ? ~0u : (1u << (n - d)) - 1;
    const __m512i x = _mm512_maskz_loadu_epi16(mask, a + d * 2);
    const __m512i y = b != nullptr ? _mm512_maskz_loadu_epi16(mask, b + d * 2) : __m512i{};
    __m512i first, second;
    interleave_pairs(x, y, first, second);
    _mm512_store_si512(to + 2 * d, first);
    _mm512_store_si512(to + 2 * d + 32, second);
  }
}
#endif

// q and acc are panels of kPanelRows rows one after another, [panel][dim][row of the panel]: with
// rows of all panels side by side one panel's lines would fall into a few sets of a small L1 cache.
// Where a row of `dims` numbers begins; the rows of its vector follow.
template <class T>
SPARSE_ATTN_INLINE T* panel(T* base, int dims, int row) {
  return base + row / kPanelRows * (dims * kPanelRows) + row % kPanelRows;
}

// P of the panel in flight, [key][row of the panel], for the same reason; where a panel is the
// whole tile, in place of the scores.
SPARSE_ATTN_INLINE float* panel_probabilities(Tile& t, int first_row) {
  if constexpr (kPanelRows == kTileRows) return t.scores + first_row;
  static_assert(kPanelRows == kTileRows ||
                kChunkKeys * kPanelRows * sizeof(float) <= sizeof(t.p_pairs));
  return reinterpret_cast<float*>(t.p_pairs);  // bf16 pairs need it only where panels are tiles
}

inline bool tile_uses_pairs(const Tile& t) {
  return kHasBf16Dot && t.dtype == DType::kBFloat16;
}

// Splits n items, n % 4 == 0, into groups of 4 and then of kBig.
template <int kBig, class BigFn, class SmallFn>
SPARSE_ATTN_INLINE void for_groups(int n, BigFn big, SmallFn small) {
  int i = 0;
  while ((n - i) % kBig != 0 && n - i >= 4) {
    small(i);
    i += 4;
  }
  for (; i < n; i += kBig) big(i);
}

// Asks for the rows of the next chunk a few at a time, all through this chunk's work: at once they
// would ask for more than memory delivers, and the processor waits when its miss buffers are full.
struct Fetch {
  const KeyChunk* next;  // or null
  int key_bytes, value_bytes;
  int step;  // rows at a time
  int done = 0;

  Fetch(const Tile& t, const KeyChunk& c, const KeyChunk* next_chunk)
      : next(next_chunk),
        key_bytes(t.head_dim * static_cast<int>(element_size(t.dtype))),
        value_bytes(t.head_dim_v * static_cast<int>(element_size(t.dtype))) {
    const int panels = (t.rows + kPanelRows - 1) / kPanelRows;
    const int calls = panels * (c.count + t.head_dim_v + 7) / 8;  // about as many as some() gets
    step = next != nullptr ? (2 * next->count + calls - 1) / calls : 0;
  }
  SPARSE_ATTN_INLINE_MEMBER void some() {
    for (int i = 0; i < step && done < 2 * next->count; ++i, ++done) {
      if (done < next->count) {
        prefetch_row<2>(next->k[done], key_bytes);
      } else {
        prefetch_row<2>(next->v[done - next->count], value_bytes);
      }
    }
  }
};

// How many of a chunk's first keys are worth a look for `rows` rows: those after them lie beyond
// the limits of all of these rows.
SPARSE_ATTN_INLINE int keys_within(const KeyChunk& c, int first_row, int rows) {
  int n = c.count;
  if (c.limits != nullptr) {
    int32_t end = 0;
    for (int r = first_row; r < first_row + rows; ++r)
      end = c.limits->hi[r] > end ? c.limits->hi[r] : end;
    while (n > 0 && c.position[n - 1] >= end) --n;
  }
  return n;
}

// Scores of a chunk's first `count` keys for the rows of one panel; with `own_values`, the chunk's
// values are asked for meanwhile.
template <int kVecs>
SPARSE_ATTN_INLINE void score_panel(Tile& t, const KeyChunk& c, const char* const* keys, int count,
                                    int first_row, bool own_values, Fetch* fetch) {
  const int n = (count + kKeyPadding - 1) / kKeyPadding * kKeyPadding;
  const int value_bytes = t.head_dim_v * static_cast<int>(element_size(t.dtype));
  const float* q = panel(t.q, t.head_dim, first_row);
  float* s = t.scores + first_row;
  const auto run = [&](int i, auto group) __attribute__((always_inline)) {
    constexpr int kKeys = decltype(group)::value;
    if (fetch != nullptr) fetch->some();
    if (own_values)
      for (int j = i; j < i + kKeys && j < c.count; ++j) prefetch_row<2>(c.v[j], value_bytes);
#if defined(__AVX512BF16__)
    if (tile_uses_pairs(t)) {
      score_pairs<kKeys, kVecs>(q, keys + i, t.head_dim, s + i * kTileRows);
      return;
    }
#endif
    score<kKeys, kVecs>(q, keys + i, t.head_dim, s + i * kTileRows);
  };
  for_groups<kGroup<kVecs>>(
      n, [&](int i) { run(i, Int<kGroup<kVecs>>{}); }, [&](int i) { run(i, Int<4>{}); });
}

// Applies what a plain product lacks: softcap, bias, limits and bits. Afterwards the scores are
// logits if `transform`, else still to be scaled.
template <int kVecs>
SPARSE_ATTN_INLINE void adjust_panel(Tile& t, const KeyChunk& c, int count, int first_row,
                                     bool transform) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const float inverse_cap = t.softcap > 0.0f ? t.softmax_scale / t.softcap : 0.0f;
  for (int key = 0; key < count; ++key) {
    for (int j = 0; j < kVecs; ++j) {
      const int row = first_row + j * kLanes;
      float* at = t.scores + key * kTileRows + row;
      Vec s = load(at);
      if (transform) {
        s = t.softcap > 0.0f ? t.softcap * tanh(s * inverse_cap) : s * t.softmax_scale;
        if (c.has_bias) s += c.bias[key];
      }
      if (c.limits != nullptr) {
        const IntVec lo = load_as<IntVec>(c.limits->lo + row);
        const IntVec hi = load_as<IntVec>(c.limits->hi + row);
        const IntVec position = splat_int(c.position[key]);
        s = ((position >= lo) & (position < hi)) ? s : splat(kNegInf);
      }
      if (c.has_bits) {
        const IntVec bits = splat_int(static_cast<int32_t>(c.bits[key] >> row));
        s = ((bits >> lane) & 1) != 0 ? s : splat(kNegInf);
      }
      store(at, s);
    }
  }
}

// Softmax of a chunk's scores times `scale` (base-2 units): P to `probabilities`, kPitch rows from
// key to key, or to bf16 pairs.
template <int kVecs, bool kPairs, int kPitch = kPanelRows>
SPARSE_ATTN_KERNEL void softmax_panel(Tile& t, int keys, int first_row, float scale,
                                      float* probabilities) {
  constexpr int kDegree = kPairs ? 4 : 6;  // P is rounded to bf16 next
  Vec top[kVecs], shift[kVecs], sum[kVecs];
  const Vec factor = splat(scale);
  float* s = t.scores + first_row;
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j) top[j] = splat(kNegInf);
  for (int key = 0; key < keys; ++key)
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) top[j] = max(top[j], load(s + key * kTileRows + j * kLanes));
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j) {
    float* m = t.row_max + first_row + j * kLanes;
    const Vec old = load(m);
    const Vec now = max(old, top[j] * scale);
    shift[j] = now == kNegInf ? Vec{} : now;  // a row without a key yet: exp2(-inf - 0) = 0
    const Vec alpha = exp2<6>(old - shift[j]);
    store(m, now);
    store(t.alpha + first_row + j * kLanes, alpha);
    sum[j] = Vec{};  // of this chunk alone: keys added to a large running sum would lose digits
  }
  if constexpr (kPairs) {
#if defined(__AVX512BF16__)
    const __m512i interleave =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int key = 0; key < keys; key += 2) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        const float* at = s + key * kTileRows + j * kLanes;
        const Vec a = exp2<kDegree>(multiply_add(load(at), factor, -shift[j]));
        const Vec b = key + 1 < keys
                          ? exp2<kDegree>(multiply_add(load(at + kTileRows), factor, -shift[j]))
                          : Vec{};
        sum[j] += a + b;
        const __m512i pair = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
        _mm512_store_si512(t.p_pairs + key * kTileRows + (first_row + j * kLanes) * 2,
                           _mm512_permutexvar_epi16(interleave, pair));
      }
    }
#endif
  } else {
    for (int key = 0; key < keys; ++key) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        const Vec logit = load(s + key * kTileRows + j * kLanes);
        const Vec p = exp2<kDegree>(multiply_add(logit, factor, -shift[j]));
        sum[j] += p;
        store(probabilities + key * kPitch + j * kLanes, p);
      }
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j) {
    const int row = first_row + j * kLanes;
    store(t.row_sum + row, load(t.alpha + row) * load(t.row_sum + row) + sum[j]);
  }
}

// O += V P for the rows of one panel.
template <int kVecs>
SPARSE_ATTN_INLINE void accumulate_panel(Tile& t, const char* const* values, int count,
                                         int first_row, Fetch& fetch) {
  float* o = panel(t.acc, t.head_dim_v, first_row);
  const float* p = panel_probabilities(t, first_row);
  const float* alpha = t.alpha + first_row;
  const auto run = [&](int d, auto group) __attribute__((always_inline)) {
    constexpr int kDims = decltype(group)::value;
    fetch.some();
#if defined(__AVX512BF16__)
    if (tile_uses_pairs(t)) {
      const int pitch = 2 * ((t.head_dim_v + 31) / 32 * 32);
      const uint16_t* v = reinterpret_cast<const uint16_t*>(t.v_wide) + 2 * d;
      accumulate_pairs<kDims, kVecs>(t.p_pairs + 2 * first_row, v, pitch, (count + 1) / 2, alpha,
                                     o + d * kPanelRows);
      return;
    }
#endif
    accumulate<kDims, kVecs>(p, values, d, count, alpha, o + d * kPanelRows);
  };
  for_groups<kGroup<kVecs>>(
      t.head_dim_v, [&](int d) { run(d, Int<kGroup<kVecs>>{}); }, [&](int d) { run(d, Int<4>{}); });
}

// Pointers to float32 rows: the rows themselves, or widened copies of 16-bit rows in `wide`.
SPARSE_ATTN_INLINE const char* const* float_rows(const Tile& t, const char* const* rows, int count,
                                                 int dim, float* wide, const char** pointers) {
  if (t.dtype == DType::kFloat32) return rows;
  const int pitch = (dim + kLanes - 1) / kLanes * kLanes;
  for (int i = 0; i < count; ++i) {
    widen_row(rows[i], wide + i * pitch, dim, t.dtype);
    pointers[i] = reinterpret_cast<const char*>(wide + i * pitch);
  }
  for (int i = count; i < count + kKeyPadding; ++i) pointers[i] = pointers[count - 1];
  return pointers;
}

// Brings a chunk's values into the form that accumulate_panel reads.
SPARSE_ATTN_INLINE const char* const* prepare_values(Tile& t, const KeyChunk& c,
                                                     const char** pointers) {
#if defined(__AVX512BF16__)
  if (tile_uses_pairs(t)) {
    const int pitch = 2 * ((t.head_dim_v + 31) / 32 * 32);
    uint16_t* to = reinterpret_cast<uint16_t*>(t.v_wide);
    for (int i = 0; i < c.count; i += 2, to += pitch)
      pair_values(c.v[i], i + 1 < c.count ? c.v[i + 1] : nullptr, t.head_dim_v, to);
    return c.v;
  }
#endif
  return float_rows(t, c.v, c.count, t.head_dim_v, t.v_wide, pointers);
}

template <int kVecs>
SPARSE_ATTN_INLINE void attend_panel(Tile& t, const KeyChunk& c, Fetch& fetch,
                                     const char* const* keys, const char* const*& values,
                                     const char** value_pointers, int first_row) {
  const int count = keys_within(c, first_row, kVecs * kLanes);
  if (count == 0) return;
  const bool first = values == nullptr;
  score_panel<kVecs>(t, c, keys, count, first_row, first && t.fetched != &c, &fetch);
  // Only now: a tile's first values were asked for while its scores were computed.
  if (first) values = prepare_values(t, c, value_pointers);
  const bool transform = t.softcap > 0.0f || c.has_bias || !(t.softmax_scale > 0.0f);
  if (transform || c.limits != nullptr || c.has_bits)
    adjust_panel<kVecs>(t, c, count, first_row, transform);
  const float scale = (transform ? 1.0f : t.softmax_scale) * kLog2E;
  if (tile_uses_pairs(t)) {
    softmax_panel<kVecs, kHasBf16Dot>(t, count, first_row, scale, nullptr);
  } else {
    float* probabilities = panel_probabilities(t, first_row);
    softmax_panel<kVecs, false>(t, count, first_row, scale, probabilities);
  }
  accumulate_panel<kVecs>(t, values, count, first_row, fetch);
}

// Calls attend(Int<vecs>, first_row) over the tile's row vectors in panels of at most kMost.
template <int kMost = kPanelVecs, class Fn>
SPARSE_ATTN_INLINE void for_panels(int rows, Fn attend) {
  int left = (rows + kLanes - 1) / kLanes;
  int first_row = 0;
  for (; left >= kMost; left -= kMost, first_row += kMost * kLanes) attend(Int<kMost>{}, first_row);
  if constexpr (kMost > 3)
    if (left == 3) attend(Int<3>{}, first_row);
  if constexpr (kMost > 2)
    if (left == 2) attend(Int<2>{}, first_row);
  if (left == 1) attend(Int<1>{}, first_row);
}

SPARSE_ATTN_KERNEL void row_attend(Tile& t, const KeyChunk& c, const KeyChunk* next) {
  const char* key_pointers[kChunkKeys + kKeyPadding];
  const char* value_pointers[kChunkKeys + kKeyPadding];
  const char* const* keys =
      tile_uses_pairs(t) ? c.k : float_rows(t, c.k, c.count, t.head_dim, t.k_wide, key_pointers);
  const char* const* values = nullptr;
  Fetch fetch(t, c, next);
  const auto attend = [&](auto vecs, int first_row) __attribute__((always_inline)) {
    attend_panel<decltype(vecs)::value>(t, c, fetch, keys, values, value_pointers, first_row);
  };
  if (c.limits != nullptr) {
    for_panels<kLimitedVecs>(t.rows, attend);
  } else {
    for_panels(t.rows, attend);
  }
  t.fetched = next;
}

// kLanes numbers of a row of n, beginning at d.
SPARSE_ATTN_INLINE Vec load_row(const char* row, int d, int n, DType dtype) {
  const char* at = row + d * (dtype == DType::kFloat32 ? 4 : 2);
  return n - d >= kLanes ? load_wide(at, dtype) : load_wide_tail(at, dtype, n - d);
}

// Rows of n numbers, widened, into panels: to[number][row]; missing rows are zeros.
SPARSE_ATTN_INLINE void transpose_rows(const char* const* from, int rows, int n, DType dtype,
                                       float* to) {
  with_type(dtype, [&](auto type) __attribute__((always_inline)) {
    for (int r = 0; r < rows; r += kLanes) {
      for (int d = 0; d < n; d += kLanes) {
        Vec x[kLanes];
        for (int i = 0; i < kLanes; ++i)
          x[i] = r + i < rows ? load_row(from[r + i], d, n, decltype(type)::value) : Vec{};
        transpose(x);
        float* at = panel(to, n, r) + d * kPanelRows;
        const int count = n - d < kLanes ? n - d : kLanes;
        for (int i = 0; i < count; ++i) store(at + i * kPanelRows, x[i]);
      }
    }
  });
}

SPARSE_ATTN_INLINE void clear_panels(float* to, int rows, int dim) {
  for (int r = 0; r < rows; r += kPanelRows)
    memset(panel(to, dim, r), 0, sizeof(float) * dim * kPanelRows);
}

SPARSE_ATTN_KERNEL void row_begin(Tile& t) {
  if (tile_uses_pairs(t)) {
    // A pair is one lane.
    transpose_rows(t.q_rows, t.rows, t.head_dim / 2, DType::kFloat32, t.q);
  } else {
    transpose_rows(t.q_rows, t.rows, t.head_dim, t.dtype, t.q);
  }
  clear_panels(t.acc, t.rows, t.head_dim_v);
  t.fetched = nullptr;
  for (int r = 0; r < kTileRows; ++r) {
    t.row_max[r] = kNegInf;
    t.row_sum[r] = 0.0f;
  }
}

// ln(2^top * sum), rounded once: the backward pass takes the exponential of it. -inf for sum 0.
inline float log_sum(float top, float sum) {
  if (!(sum > 0.0f)) return sum == 0.0f ? kNegInf : sum;
  if (sum == __builtin_inff()) return sum;
  const int32_t exponent = (bits_as<int32_t>(sum) >> 23) - 127;  // sums below 2^-126 do not occur
  const float mantissa = bits_as<float>(bits_as<int32_t>(sum) - (exponent << 23));
  const double log2_sum = double{top} + exponent + double{__builtin_log2f(mantissa)};
  return static_cast<float>(log2_sum * 0.69314718055994530942);
}

// Folds the sink into a row's statistics and writes its lse; returns what acc is multiplied by.
inline float finish_row(Tile& t, int r) {
  float m = t.row_max[r], sum = t.row_sum[r], rescale = 1.0f;
  if (t.has_sink) {
    const float sink = t.sink[r] * kLog2E;
    const float top = sink > m ? sink : m;
    rescale = m > kNegInf ? __builtin_exp2f(m - top) : 0.0f;
    sum = sum * rescale + (sink > kNegInf ? __builtin_exp2f(sink - top) : 0.0f);
    m = top;
  }
  *t.lse_rows[r] = log_sum(m, sum);
  return sum == 0.0f ? 0.0f : rescale / sum;
}

// Writes from[dim][row] times factor[row] as rows of dtype.
SPARSE_ATTN_INLINE void write_rows(const float* from, const float* factor, int rows, int dim,
                                   char* const* to, DType dtype) {
  with_type(dtype, [&](auto type) __attribute__((always_inline)) {
    constexpr DType kType = decltype(type)::value;
    constexpr int kWidth = kType == DType::kFloat32 ? 4 : 2;
    for (int r = 0; r < rows; r += kLanes) {
      const Vec f = load(factor + r);
      for (int d = 0; d < dim; d += kLanes) {
        const int n = dim - d < kLanes ? dim - d : kLanes;
        const float* at = panel(from, dim, r) + d * kPanelRows;
        Vec x[kLanes];
        for (int i = 0; i < kLanes; ++i) x[i] = i < n ? load(at + i * kPanelRows) * f : Vec{};
        transpose(x);
        for (int i = 0; i < kLanes && r + i < rows; ++i)
          store_narrow(to[r + i] + d * kWidth, x[i], kType, n);
      }
    }
  });
}

SPARSE_ATTN_KERNEL void row_finish(Tile& t) {
  for (int r = 0; r < kTileRows; ++r) t.alpha[r] = r < t.rows ? finish_row(t, r) : 0.0f;
  write_rows(t.acc, t.alpha, t.rows, t.head_dim_v, t.out_rows, t.out_dtype);
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
