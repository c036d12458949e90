// SPDX-License-Identifier: Apache-2.0
// Decode attention over a SparseIndex: few query rows, many keys.
//
// Tiling: 16 or 64 packed rows (the query heads of a KV head that share lists, so that the cache is
// read once for all of them) by chunks of 64 keys. With 16 rows each of the four warps takes 16
// keys of every chunk and keeps a softmax of its own; with 64 each takes 16 rows. The warps'
// results meet in shared memory when a CTA leaves a tile.
//
// Memory: chunks arrive by cp.async in a ring of K and V tiles in turn, one barrier a tile. The
// keys of a chunk are looked up (lists, pages, biases, masks) before its copy is issued, by 64
// threads. Q stays in registers. Keys that no row may see, and whatever lies out of bounds, are
// zero-filled.
//
// Numerics: mma.sync with f32 accumulators, softmax in base 2 and f32, P rounded to the input's
// type.
//
// Source: FlashAttention-2 (arXiv 2307.08691) for the softmax; Stream-K (arXiv 2301.03598) for the
// shares; Rabe & Staats (arXiv 2112.05682) for merging.
#pragma once

#include "../common/tiles.cuh"
#include "schedule.cuh"

namespace sparse_attn::cuda {

// Where the keys of a chunk lie and who sees them.
struct Lookup {
  int32_t batch[kChunkKeys];  // index into k's and v's first axis: the batch, or the page
  int32_t row[kChunkKeys];
  int32_t key[kChunkKeys];    // position in the sequence, -1: hidden from all rows
  float bias[kChunkKeys];     // base 2
  uint32_t bits[kChunkKeys];  // bit i: row i of the list's tile sees the key
  uint32_t plain[2];          // bit i: all rows see key i (or 32 + i), without bias
};

// The CTA's part of a tile: its rows and its keys.
struct DecodePart {
  DeviceSequence sequence;
  DecodeTile tile;
  TileKeys keys;
  int32_t first_slot;
  int32_t chunks;
};

template <class C>
struct DecodeShared {
  using L = TileLayouts<typename C::Element, C::kHeadDim>;
  union {
    struct {
      alignas(128) typename C::Element ring[C::kRing][L::kKeysElements];
      typename C::Element q[C::kSharedQ ? C::kTileRows * C::kHeadDim : 8];
    };
    // Unnormalised, once the ring is drained; behind a row its maximum (base 2) and its sum, and as
    // much more as makes rows begin in other banks.
    float out[kDecodeWarps][16][C::kHeadDim + 8];
  };
  Lookup lookup[C::kLookups];
  DecodePart part;
};

// Copies of a CTA. All it needs of the tile lies in shared memory: registers are for the products.
template <class C>
struct DecodeWork {
  using Element = typename C::Element;
  using L = TileLayouts<typename C::Element, C::kHeadDim>;

  const DecodeParams& p;
  DecodeShared<C>& shared;

  // Looks a chunk's keys up; the first 64 threads.
  __device__ void look_up(int32_t chunk) const {
    const int i = threadIdx.x;
    if (i >= kChunkKeys) return;
    const DecodePart& part = shared.part;
    const TileKeys& keys = part.keys;
    const IndexView& index = p.call.index;
    Lookup& to = shared.lookup[chunk % C::kLookups];
    SlotEntry entry{-1, -1, 0, 0.0f};
    if (chunk < part.chunks)
      entry = load_slot(index, p.by_block_n, keys, part.first_slot + chunk * kChunkKeys + i);
    int32_t key = entry.key;
    KeyPlace place{0, 0};
    if (key >= 0) place = locate(p, part.sequence, fault(24) ? 0 : part.tile.sequence, key);
    if (place.row < 0) key = -1;
    uint32_t bits = ~0u;
    if (entry.mask >= 0) {
      // A list of decode has at most 16 rows that matter: the first word of a key's bits has them.
      const int64_t words = (index.block_m + 63) / 64;
      bits = static_cast<uint32_t>(
          index.block_bits[(int64_t{entry.mask} * index.block_n + entry.within) * words]);
    }
    const bool plain = key >= 0 && key < keys.min_hi && entry.bias == 0.0f && bits == ~0u &&
                       (key < keys.lead || (key >= keys.window_max_lo && key < keys.window_min_hi));
    to.key[i] = key;
    to.batch[i] = place.batch;
    to.row[i] = place.row;
    to.bias[i] = entry.bias * kLog2e;
    to.bits[i] = bits;
    const uint32_t all = __ballot_sync(0xffffffffu, plain);
    if (i % 32 == 0) to.plain[i / 32] = all;
  }

  // Begins the copy of a ring tile: tile 2c holds K of chunk c, tile 2c + 1 its V. Commits always,
  // so that waiting counts tiles.
  __device__ void copy_tile(int32_t number) const {
    const int32_t chunk = number / 2;
    if (chunk < shared.part.chunks) {
      const AttentionParams& call = p.call;
      const bool is_v = number % 2 != 0;
      const TensorView& view = is_v ? call.v : call.k;
      const int32_t dim = is_v ? call.head_dim_v : call.head_dim;
      const int64_t group = call.num_heads / call.num_heads_kv;
      const int64_t head = shared.part.tile.first_head;
      const Element* base =
          row_of<Element>(view, 0, fault(30) ? head % call.num_heads_kv : head / group, 0);
      const Lookup& from = shared.lookup[chunk % C::kLookups];
      Tensor to = make_tensor(make_smem_ptr(shared.ring[number % C::kRing]), typename L::Keys{});
      constexpr int kVectors = C::kHeadDim / 8;
#pragma unroll 4  // all at once the addresses would cost too many registers
      for (int i = 0; i < kChunkKeys * kVectors / kDecodeThreads; ++i) {
        const int vector = threadIdx.x + i * kDecodeThreads;
        const int row = vector / kVectors, column = vector % kVectors * 8;
        const bool valid = from.key[row] >= 0 && column < dim;
        const int64_t offset =
            from.batch[row] * view.batch_stride + from.row[row] * view.row_stride + column;
        copy_async(&to(row, column), valid ? base + offset : base, valid);
      }
    }
    cp_async_fence();
  }

  __device__ int32_t packed_head(int r) const {
    const DecodeTile& tile = shared.part.tile;
    return tile.first_head + (tile.begin + r) / tile.rows_per_head;
  }
  __device__ int32_t packed_row(int r) const {  // in the sequence
    const DecodeTile& tile = shared.part.tile;
    return tile.first_row + (tile.begin + r) % tile.rows_per_head;
  }
  __device__ const Element* q_row(int r) const {
    const DeviceSequence& sequence = shared.part.sequence;
    return row_of<Element>(p.call.q, sequence.batch, packed_head(r),
                           sequence.q_start + packed_row(r));
  }

  // The A fragments of Q, straight from global memory; zeros past the rows and the head_dim.
  template <class Fragment>
  __device__ void load_q(Fragment& rQ, int warp_row, int lane) const {
    Tensor words = recast<uint32_t>(rQ);  // ((row half, column half), 1, k step)
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int r = warp_row + half * 8 + lane / 4;
      const bool valid = r < shared.part.tile.rows;
      const Element* row = valid ? q_row(r) : nullptr;
      CUTE_UNROLL
      for (int step = 0; step < C::kHeadDim / 16; ++step) {
        CUTE_UNROLL
        for (int side = 0; side < 2; ++side) {
          const int column = step * 16 + side * 8 + lane % 4 * 2;
          words(half + 2 * side + 4 * step) = valid && column < p.call.head_dim
                                                  ? *reinterpret_cast<const uint32_t*>(row + column)
                                                  : 0u;
        }
      }
    }
  }

  // The same to shared memory, as part of the next group of copies.
  __device__ void copy_q() const {
    Tensor to = make_tensor(make_smem_ptr(shared.q), typename L::template Rows<C::kTileRows>{});
    constexpr int kVectors = C::kHeadDim / 8;
    for (int i = threadIdx.x; i < C::kTileRows * kVectors; i += kDecodeThreads) {
      const int r = i / kVectors, column = i % kVectors * 8;
      const bool valid = r < shared.part.tile.rows && column < p.call.head_dim;
      const Element* base = reinterpret_cast<const Element*>(p.call.q.data);
      copy_async(&to(r, column), valid ? q_row(r) + column : base, valid);
    }
  }
};

// What a thread's two rows see.
struct PairSight {
  RowWindow window[2];
  uint32_t bit[2];
};

template <class C>
__device__ inline PairSight pair_sight(const DecodeWork<C>& work, int warp_row, int lane) {
  const DecodePart& part = work.shared.part;
  PairSight sight;
  CUTE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int r = warp_row + half * 8 + lane / 4;
    sight.window[half] = {0, 0, 0};
    sight.bit[half] = 0;
    if (r >= part.tile.rows) continue;
    const int32_t row = work.packed_row(r);
    sight.window[half] =
        row_window(work.p, part.sequence, head_row(work.p, part.tile.index_head), row);
    sight.bit[half] = 1u << (row - part.tile.first_row);
  }
  return sight;
}

// Logits in base 2 from the products of 16 rows and the warp's keys; accumulators are the columns
// 8 n + 2 (lane % 4) + {0, 1} of rows lane / 4 and lane / 4 + 8.
template <class C, class Scores>
__device__ inline void scale_and_mask(const DecodeWork<C>& work, const Lookup& lookup,
                                      const PairSight& sight, int warp_key, int lane,
                                      Scores& scores) {
  const AttentionParams& call = work.p.call;
  if (call.softcap == 0.0f) {
    const float scale = call.softmax_scale * kLog2e;
    CUTE_UNROLL
    for (int i = 0; i < size(scores); ++i) scores(i) *= scale;
  } else {
    const float scale = call.softmax_scale / call.softcap, cap = call.softcap * kLog2e;
    CUTE_UNROLL
    for (int i = 0; i < size(scores); ++i) scores(i) = cap * tanh_fast(scores(i) * scale);
  }
  constexpr uint32_t kAll = C::kWarpKeys == 64 ? ~0u : (1u << (C::kWarpKeys % 32)) - 1;
  bool plain;
  if constexpr (C::kWarpKeys == 64) {
    plain = (lookup.plain[0] & lookup.plain[1]) == ~0u;
  } else {
    plain = ((lookup.plain[warp_key / 32] >> (warp_key % 32)) & kAll) == kAll;
  }
  if (plain) return;
  const int32_t lead = work.shared.part.keys.lead;
  CUTE_UNROLL
  for (int n = 0; n < C::kWarpKeys / 8; ++n) {
    CUTE_UNROLL
    for (int side = 0; side < 2; ++side) {
      const int i = warp_key + n * 8 + lane % 4 * 2 + side;
      const int32_t key = lookup.key[i];
      const uint32_t bits = lookup.bits[i];
      const float bias = lookup.bias[i];
      CUTE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const RowWindow& w = sight.window[half];
        const bool seen = key >= 0 && key < w.outer_hi + (fault(29) ? 1 : 0) &&
                          (key < lead || (key >= w.lo && key < w.hi)) &&
                          ((bits & sight.bit[half]) != 0 || fault(28));
        float& score = scores(side + 2 * half, 0, n);
        score = seen ? score + bias : -INFINITY;
      }
    }
  }
}

// Runs through the CTA's part of a tile; leaves each warp's unnormalised rows, their maxima and
// sums in shared memory.
template <class C>
__device__ inline void attend(const DecodeWork<C>& work) {
  using Element = typename C::Element;
  using L = TileLayouts<typename C::Element, C::kHeadDim>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp % C::kWarpsM * 16, warp_n = warp / C::kWarpsM;
  DecodeShared<C>& shared = work.shared;

  typename L::Mma mma;
  auto slice = mma.get_slice(lane);
  const auto plain_k = make_layout(Shape<Int<C::kWarpKeys>, Int<C::kHeadDim>>{});
  const auto plain_v = make_layout(Shape<Int<C::kHeadDim>, Int<C::kWarpKeys>>{});
  Element* const none = nullptr;
  Tensor rQ = slice.partition_fragment_A(
      make_tensor(make_smem_ptr(none), make_layout(Shape<_16, Int<C::kHeadDim>>{})));
  Tensor rP = slice.partition_fragment_A(
      make_tensor(make_smem_ptr(none), make_layout(Shape<_16, Int<C::kWarpKeys>>{})));
  Tensor rK = slice.partition_fragment_B(make_tensor(make_smem_ptr(none), plain_k));
  Tensor rV = slice.partition_fragment_B(make_tensor(make_smem_ptr(none), plain_v));
  Tensor scores = partition_fragment_C(mma, Shape<_16, Int<C::kWarpKeys>>{});
  Tensor out = partition_fragment_C(mma, Shape<_16, Int<C::kHeadDim>>{});
  auto copy_k = make_tiled_copy_B(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, mma).get_slice(lane);
  auto copy_v = make_tiled_copy_B(Copy_Atom<SM75_U16x8_LDSM_T, Element>{}, mma).get_slice(lane);
  Tensor rK_copy = copy_k.retile_D(rK);
  Tensor rV_copy = copy_v.retile_D(rV);

  auto copy_q = make_tiled_copy_A(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, mma).get_slice(lane);
  Tensor rQ_copy = copy_q.retile_D(rQ);
  Tensor sQ_copy = copy_q.partition_S(
      local_tile(make_tensor(make_smem_ptr(shared.q), typename L::template Rows<C::kTileRows>{}),
                 Shape<_16, Int<C::kHeadDim>>{}, make_coord(warp % C::kWarpsM, 0)));

  RowState state;
  clear(out);
  const int32_t chunks = shared.part.chunks;
  for (int c = 0; c < C::kRing / 2; ++c) work.look_up(c);
  __syncthreads();
  if constexpr (C::kSharedQ)
    work.copy_q();
  else
    work.load_q(rQ, warp_row, lane);
  for (int t = 0; t < C::kRing - 1; ++t) work.copy_tile(t);
  const PairSight sight = pair_sight(work, warp_row, lane);

  // Tile t has landed and nobody reads tile t - 1 any more: its place takes the next copy.
  const auto next_tile = [&](int32_t t) {
    if (!fault(21)) cp_async_wait<C::kRing - 2>();
    if (!fault(22)) __syncthreads();
    work.copy_tile(t + C::kRing - 1);
  };
  for (int32_t chunk = 0; chunk < chunks; ++chunk) {
    next_tile(2 * chunk);
    work.look_up(chunk + C::kRing / 2);
    Tensor sK = local_tile(
        make_tensor(make_smem_ptr(shared.ring[2 * chunk % C::kRing]), typename L::Keys{}),
        Shape<Int<C::kWarpKeys>, Int<C::kHeadDim>>{}, make_coord(warp_n, 0));
    Tensor sK_copy = copy_k.partition_S(sK);
    clear(scores);
    CUTE_UNROLL
    for (int step = 0; step < size<2>(rQ); ++step) {
      if constexpr (C::kSharedQ)
        copy(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, sQ_copy(_, _, step), rQ_copy(_, _, step));
      copy(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, sK_copy(_, _, step), rK_copy(_, _, step));
      gemm(mma, rQ(_, _, step), rK(_, _, step), scores);
    }
    scale_and_mask(work, shared.lookup[chunk % C::kLookups], sight, warp_n * C::kWarpKeys, lane,
                   scores);
    softmax_step<false>(state, scores, out, 1.0f);
    round_weights<Element>(scores, rP);

    next_tile(2 * chunk + 1);
    Tensor sV = local_tile(make_tensor(make_smem_ptr(shared.ring[(2 * chunk + 1) % C::kRing]),
                                       typename L::Transposed{}),
                           Shape<Int<C::kHeadDim>, Int<C::kWarpKeys>>{}, make_coord(0, warp_n));
    Tensor sV_copy = copy_v.partition_S(sV);
    CUTE_UNROLL
    for (int step = 0; step < size<2>(rP); ++step) {
      copy(Copy_Atom<SM75_U16x8_LDSM_T, Element>{}, sV_copy(_, _, step), rV_copy(_, _, step));
      gemm(mma, rP(_, _, step), rV(_, _, step), out);
    }
  }

  cp_async_wait<0>();
  __syncthreads();  // the ring's memory becomes `out`
  CUTE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int r = half * 8 + lane / 4;
    float sum = state.sum[half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (lane % 4 == 0) {
      shared.out[warp][r][C::kHeadDim] = state.top[half];
      shared.out[warp][r][C::kHeadDim + 1] = sum;
    }
    CUTE_UNROLL
    for (int n = 0; n < size<2>(out); ++n)
      *reinterpret_cast<float2*>(&shared.out[warp][r][n * 8 + lane % 4 * 2]) =
          make_float2(out(2 * half, 0, n), out(2 * half + 1, 0, n));
  }
  __syncthreads();
}

// Adds the warps' rows up and writes them: as the result, or as piece number `piece`.
template <class C>
__device__ inline void write_rows(const DecodeWork<C>& work, int64_t piece) {
  using Element = typename C::Element;
  const DecodeParams& p = work.p;
  const AttentionParams& call = p.call;
  const DeviceSequence& sequence = work.shared.part.sequence;
  const int columns = call.head_dim_v / 4;
  for (int i = threadIdx.x; i < work.shared.part.tile.rows * columns; i += kDecodeThreads) {
    const int r = i / columns, column = i % columns * 4;
    const int32_t head = work.packed_head(r);
    const int64_t row = sequence.q_start + work.packed_row(r);
    // Rows of 16 are in all four warps, rows of 64 in one.
    const auto& rows = work.shared.out;
    const int first_warp = r / 16;
    const float sink =
        call.sinks != nullptr && (piece < 0 || fault(32)) ? call.sinks[head] * kLog2e : -INFINITY;
    float top = sink;
    CUTE_UNROLL
    for (int w = 0; w < C::kWarpsN; ++w)
      top = fmaxf(top, rows[first_warp + w][r % 16][C::kHeadDim]);
    const float base = top == -INFINITY ? 0.0f : top;
    float sum = exp2_fast(sink - base);
    float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    CUTE_UNROLL
    for (int w = 0; w < C::kWarpsN; ++w) {
      const float* from = rows[first_warp + w][r % 16];
      const float weight = fault(26) ? 1.0f : exp2_fast(from[C::kHeadDim] - base);
      const float4 part = *reinterpret_cast<const float4*>(from + column);
      sum += weight * from[C::kHeadDim + 1];
      out.x += weight * part.x;
      out.y += weight * part.y;
      out.z += weight * part.z;
      out.w += weight * part.w;
    }
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
    const float lse = sum == 0.0f ? -INFINITY : top + log2f(sum);
    if (piece >= 0) {
      const int64_t slot = piece * C::kTileRows + r;
      *reinterpret_cast<float4*>(p.piece_out + slot * call.head_dim_v + column) =
          make_float4(out.x * factor, out.y * factor, out.z * factor, out.w * factor);
      if (column == 0) p.piece_lse[slot] = lse;
    } else {
      Element* to = row_of<Element>(call.out, sequence.batch, head, row) + column;
      *reinterpret_cast<uint2*>(to) =
          make_uint2(pack_pair<Element>(out.x * factor, out.y * factor),
                     pack_pair<Element>(out.z * factor, out.w * factor));
      if (column == 0)
        call.lse[(sequence.batch * call.num_heads + head) * call.seqlen_q + row] = lse * kLn2;
    }
  }
}

// Tile that chunk number `chunk` belongs to: the last one that begins at or before it.
__device__ inline int64_t tile_of_chunk(const DecodeParams& p, int64_t chunk) {
  int64_t low = 0, high = p.tiles;  // first_chunk[low] <= chunk < first_chunk[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (p.first_chunk[middle] <= chunk)
      low = middle;
    else
      high = middle;
  }
  return low;
}

template <class C>
__global__ void __launch_bounds__(kDecodeThreads) decode_kernel(const DecodeParams p) {
  extern __shared__ __align__(128) char shared_bytes[];
  auto& shared = *reinterpret_cast<DecodeShared<C>*>(shared_bytes);
  const int64_t share = p.first_chunk[p.tiles + 1];
  int64_t chunk = blockIdx.x * share;
  const int64_t end = min(chunk + share, p.first_chunk[p.tiles]);
  if (chunk >= end) return;
  const DecodeWork<C> work{p, shared};
  for (int64_t id = tile_of_chunk(p, chunk); chunk < end; ++id) {
    const int64_t tile_begin = p.first_chunk[id], tile_end = p.first_chunk[id + 1];
    if (tile_end <= chunk) continue;  // a tile without rows
    __syncthreads();                  // nobody needs the last tile's part any more
    if (threadIdx.x == 0) {
      DecodePart& part = shared.part;
      part.sequence = sequence_of(p, id);
      part.tile = decode_tile(p, id, part.sequence);
      part.keys = decode_keys(p, part.sequence, part.tile);
      part.first_slot = static_cast<int32_t>(chunk - tile_begin) * kChunkKeys;
      part.chunks = static_cast<int32_t>(min(end, tile_end) - chunk);
    }
    __syncthreads();
    attend(work);
    // A CTA leaves at most two pieces: one of a tile begun before it, one that goes on after it.
    const bool begins = chunk == tile_begin, ends = end >= tile_end;
    write_rows(work, begins && ends ? -1 : int64_t{2} * blockIdx.x + (begins ? 1 : 0));
    chunk = min(end, tile_end);
  }
}

}  // namespace sparse_attn::cuda
