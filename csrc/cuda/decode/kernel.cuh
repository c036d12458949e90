// SPDX-License-Identifier: Apache-2.0
// Decode attention over a SparseIndex: few query rows, many keys.
//
// Tiling: 16 or 64 packed rows (the query heads of a KV head that share lists, so that the cache is
// read once for all of them) by chunks of 64 keys. With 16 rows each of the four warps takes 16
// keys of every chunk and keeps a softmax of its own; with 64 each takes 16 rows. The warps'
// results meet in shared memory when a CTA leaves a tile.
//
// Memory: chunks arrive by cp.async in a ring of K and V tiles in turn, one barrier a tile. Runs
// (runs.cuh) have a main loop without lookups. The keys of other chunks are looked up (lists,
// pages, biases, masks) before their copy is issued, by 64 threads. Q stays in registers, or in
// shared memory at head_dim 256. Keys that no row may see, and whatever lies out of bounds, are
// zero-filled.
//
// Numerics: mma.sync with f32 accumulators, softmax in base 2 and f32, P rounded to the input's
// type.
//
// Source: FlashAttention-2 (arXiv 2307.08691) for the softmax; Stream-K (arXiv 2301.03598) for the
// shares; Rabe & Staats (arXiv 2112.05682) for merging.
#pragma once

#include "../common/runs.cuh"
#include "schedule.cuh"

namespace sparse_attn::cuda {

// Where the keys of a chunk lie and who sees them.
struct Lookup {
  KeyPlace place[kChunkKeys];  // row -1: hidden from all rows
  int32_t key[kChunkKeys];     // position in the sequence, -1: hidden from all rows
  float bias[kChunkKeys];      // base 2
  uint32_t bits[kChunkKeys];   // bit i: row i of the list's tile sees the key
  uint32_t plain[2];           // bit i: all rows see key i (or 32 + i), without bias
};

// The CTA's part of a tile: its rows and its keys. What is needed only afterwards waits here too.
struct DecodePart {
  int64_t id;     // of the tile
  int64_t next;   // chunk of the line behind the part
  int64_t piece;  // that it leaves; -1: it is the whole tile
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
  RunPlan<C::kGroup> plan;
  DecodePart part;
};

// Copies of a CTA. All it needs of the tile lies in shared memory: registers are for the products.
template <class C>
struct DecodeWork {
  using Element = typename C::Element;
  using L = TileLayouts<typename C::Element, C::kHeadDim>;

  using Copy = TileCopy<L, kDecodeThreads>;

  const DecodeParams& p;
  DecodeShared<C>& shared;
  uint32_t copies_to;  // this thread's place in the first tile of the ring
  const char* k_run;   // what it copies of a run
  const char* v_run;

  __device__ DecodeWork(const DecodeParams& params, DecodeShared<C>& memory)
      : p(params),
        shared(memory),
        copies_to(cast_smem_ptr_to_uint(shared.ring[0] + Copy::offset())),
        k_run(Copy::run_base(p, shared.part.sequence, p.call.k, kv_head(), p.k_row_bytes)),
        v_run(Copy::run_base(p, shared.part.sequence, p.call.v, kv_head(), p.v_row_bytes)) {}

  __device__ int64_t kv_head() const {
    const int64_t group = p.call.num_heads / p.call.num_heads_kv;
    const int64_t head = shared.part.tile.first_head;
    return fault(30) ? head % p.call.num_heads_kv : head / group;
  }
  __device__ int64_t table_row() const { return fault(24) ? 0 : shared.part.tile.sequence; }

  __device__ void plan_group(int32_t group) const {
    const DecodePart& part = shared.part;
    cuda::plan_group(p, p.by_block_n, part.sequence, table_row(), part.keys, part.first_slot,
                     part.chunks, group, shared.plan);
  }

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
    KeyPlace place{0, -1};
    if (key >= 0) place = locate(p, part.sequence, table_row(), key);
    if (place.row < 0) key = -1;
    uint32_t bits = ~0u;
    if (entry.mask >= 0) {
      // A list of decode has at most 16 rows that matter: the first word of a key's bits has them.
      const int64_t words = (index.block_m + 63) / 64;
      bits = static_cast<uint32_t>(
          index.block_bits[(int64_t{entry.mask} * index.block_n + entry.within) * words]);
    }
    const bool plain = scaled_only(p.call) && key >= 0 && key < keys.min_hi && entry.bias == 0.0f &&
                       bits == ~0u &&
                       (key < keys.lead || (key >= keys.window_max_lo && key < keys.window_min_hi));
    to.key[i] = key;
    to.place[i] = place;
    to.bias[i] = entry.bias * kLog2e;
    to.bits[i] = bits;
    const uint32_t all = __ballot_sync(0xffffffffu, plain);
    if (i % 32 == 0) to.plain[i / 32] = all;
  }

  // Begins the copy of a chunk's K (kPart 0) or V (1) to the ring. Commits always, so that waiting
  // counts tiles. With kRuns the chunk is known to be a run, or not to be there.
  template <int kPart, bool kRuns>
  CUTE_DEVICE void copy_tile(int32_t chunk) const {
    const uint32_t to = copies_to + place<C::kRing>(chunk, kPart) * L::kTileBytes;
    const int dim = kPart == 0 ? p.call.head_dim : p.call.head_dim_v;
    if (kRuns || shared.plan.is_run(chunk))
      Copy::copy_run(to, shared.plan.rows(chunk), kPart == 0 ? k_run : v_run,
                     kPart == 0 ? p.k_row_bytes : p.v_row_bytes, dim);
    else if (chunk < shared.part.chunks)
      Copy::copy_places(to, shared.lookup[chunk % C::kLookups].place,
                        kPart == 0 ? p.call.k : p.call.v, kv_head(), dim);
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

  // The A operands of Q, straight from global memory; zeros past the rows and the head_dim.
  template <int kSteps>
  __device__ void load_q(uint32_t (&q)[kSteps][4], int warp_row, int lane) const {
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int r = warp_row + half * 8 + lane / 4;
      const bool valid = r < shared.part.tile.rows;
      const Element* row = valid ? q_row(r) : nullptr;
      CUTE_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        CUTE_UNROLL
        for (int side = 0; side < 2; ++side) {
          const int column = step * 16 + side * 8 + lane % 4 * 2;
          q[step][half + 2 * side] = valid && column < p.call.head_dim
                                         ? *reinterpret_cast<const uint32_t*>(row + column)
                                         : 0u;
        }
      }
    }
  }

  // The same to shared memory, as part of the next group of copies.
  __device__ void copy_q() const {
    using Rows = typename L::template Rows<C::kTileRows>;
    constexpr int kVectors = C::kHeadDim / 8;
    for (int i = threadIdx.x; i < C::kTileRows * kVectors; i += kDecodeThreads) {
      const int r = i / kVectors, column = i % kVectors * 8;
      const bool valid = r < shared.part.tile.rows && column < p.call.head_dim;
      const Element* base = reinterpret_cast<const Element*>(p.call.q.data);
      copy_async(cast_smem_ptr_to_uint(shared.q + L::template element<Rows>(r, column)),
                 valid ? q_row(r) + column : base, valid);
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

// Whether all rows see all of the warp's keys of a chunk, without bias or softcap.
template <class C>
__device__ inline bool is_plain(const Lookup& lookup, int warp_key) {
  if constexpr (C::kWarpKeys == 64) {
    return (lookup.plain[0] & lookup.plain[1]) == ~0u;
  } else {
    constexpr uint32_t kAll = (1u << C::kWarpKeys) - 1;
    return (lookup.plain[warp_key / 32] >> (warp_key % 32) & kAll) == kAll;
  }
}

// Logits in base 2 from the products of 16 rows and the warp's keys.
template <class C>
__device__ inline void scale_and_mask(const DecodeWork<C>& work, const Lookup& lookup,
                                      const PairSight& sight, int warp_key, int lane,
                                      Accumulators<C::kWarpKeys / 8>& scores) {
  const AttentionParams& call = work.p.call;
  const float scale = call.softmax_scale * kLog2e;
  const float inner = call.softcap == 0.0f ? 0.0f : call.softmax_scale / call.softcap;
  const float cap = call.softcap * kLog2e;
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
        float& score = scores[n][side + 2 * half];
        const float logit = call.softcap == 0.0f ? score * scale : cap * tanh_fast(score * inner);
        score = seen ? logit + bias : -INFINITY;
      }
    }
  }
}

// Leaves a warp's unnormalised rows, their maxima and sums in shared memory.
template <class C>
__device__ inline void store_rows(DecodeShared<C>& shared, const RowState& state,
                                  const Accumulators<C::kHeadDim / 8>& out, int warp, int lane) {
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
    for (int n = 0; n < C::kHeadDim / 8; ++n)
      *reinterpret_cast<float2*>(&shared.out[warp][r][n * 8 + lane % 4 * 2]) =
          make_float2(out[n][2 * half], out[n][2 * half + 1]);
  }
}

// Runs through the CTA's part of a tile; leaves its warps' rows in shared memory.
template <class C>
__device__ inline void attend(const DecodeWork<C>& work) {
  using Element = typename C::Element;
  constexpr int kAhead = C::kAhead;
  const int thread = thread_anew();
  const int lane = thread % 32, warp = thread / 32;
  const int warp_row = warp % C::kWarpsM * 16, warp_key = warp / C::kWarpsM * C::kWarpKeys;
  DecodeShared<C>& shared = work.shared;
  const int32_t chunks = shared.part.chunks;
  WarpProducts<typename DecodeWork<C>::L, C::kTileRows, C::kWarpKeys, C::kSharedQ> products(
      shared.q, shared.ring[0], warp_row, warp_key, lane);
  RowState state;
  float out[C::kHeadDim / 8][4] = {};

  work.plan_group(0);
  work.plan_group(1);
  for (int c = 0; c < kAhead; ++c) work.look_up(c);
  __syncthreads();  // plan, lookups
  if constexpr (C::kSharedQ)
    work.copy_q();
  else
    work.load_q(products.q, warp_row, lane);
  CUTE_UNROLL
  for (int c = 0; c < kAhead; ++c) {
    work.template copy_tile<0, false>(c);
    if (c < kAhead - 1) work.template copy_tile<1, false>(c);
  }

  // The oldest tile on its way has landed and nobody reads the one before it any more.
  const auto next_tile = [] {
    if (!fault(21)) cp_async_wait<C::kRing - 2>();
    if (!fault(22)) __syncthreads();
  };
  const float scale = work.p.call.softmax_scale * kLog2e;
  // In the loop of runs all chunks up to `chunk + kAhead` are runs.
  const auto step_over = [&](int32_t chunk, auto runs) __attribute__((always_inline)) {
    constexpr bool kRuns = decltype(runs)::value;
    next_tile();
    work.template copy_tile<1, kRuns>(chunk + kAhead - 1);
    if (!kRuns && !shared.plan.is_run(chunk + kAhead)) work.look_up(chunk + kAhead);
    float scores[C::kWarpKeys / 8][4];
    products.scores(place<C::kRing>(chunk, 0), scores);
    const Lookup& lookup = shared.lookup[chunk % C::kLookups];
    if (kRuns || shared.plan.is_run(chunk) || is_plain<C>(lookup, warp_key)) {
      softmax_step<true>(state, scores, out, scale);
    } else {
      scale_and_mask(work, lookup, pair_sight(work, warp_row, lane), warp_key, lane, scores);
      softmax_step<false>(state, scores, out, 1.0f);
    }
    uint32_t weights[C::kWarpKeys / 16][4];
    round_weights<Element>(scores, weights);
    next_tile();
    work.template copy_tile<0, kRuns>(chunk + kAhead);
    products.sum_values(place<C::kRing>(chunk, 1), weights, out);
  };
  for (int32_t chunk = 0; chunk < chunks;) {
    if (chunk > 0 && chunk % C::kGroup == 0) {
      work.plan_group(chunk / C::kGroup + 1);
      if (!fault(36)) __syncthreads();  // plan
    }
    const int32_t runs = count_runs(shared.plan, chunk, chunks, kAhead);
    for (const int32_t end = chunk + runs; chunk < end; ++chunk) step_over(chunk, true_type{});
    if (chunk == chunks || (runs > 0 && chunk % C::kGroup == 0)) continue;
    do {
      step_over(chunk++, false_type{});
    } while (chunk < chunks && chunk % C::kGroup != 0 &&
             count_runs(shared.plan, chunk, chunks, kAhead) <= 0);
  }
  cp_async_wait<0>();
  __syncthreads();  // the ring's memory becomes `out`
  store_rows(shared, state, out, warp, lane);
  __syncthreads();
}

// Adds the warps' rows up and writes them: as the result, or as the part's piece.
template <class C>
__device__ inline void write_rows(const DecodeWork<C>& work) {
  const int64_t piece = work.shared.part.piece;
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
__global__ void __launch_bounds__(kDecodeThreads, C::kMinBlocks)
    decode_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(128) char shared_bytes[];
  auto& shared = *reinterpret_cast<DecodeShared<C>*>(shared_bytes);
  const auto end = [&] {
    return min((blockIdx.x + int64_t{1}) * p.first_chunk[p.tiles + 1], p.first_chunk[p.tiles]);
  };
  int64_t chunk = blockIdx.x * p.first_chunk[p.tiles + 1];
  if (chunk >= end()) return;
  for (int64_t id = tile_of_chunk(p, chunk); chunk < end(); ++id) {
    const int64_t tile_begin = p.first_chunk[id], tile_end = p.first_chunk[id + 1];
    if (tile_end <= chunk) continue;  // a tile without rows
    __syncthreads();                  // nobody needs the last tile's part any more
    if (threadIdx.x == 0) {
      DecodePart& part = shared.part;
      part.id = id;
      part.next = min(end(), tile_end);
      // A CTA leaves at most two pieces: one of a tile begun before it, one that goes on after it.
      const bool begins = chunk == tile_begin, ends = part.next == tile_end;
      part.piece = begins && ends ? -1 : int64_t{2} * blockIdx.x + (begins ? 1 : 0);
      part.sequence = sequence_of(p, id);
      part.tile = decode_tile(p, id, part.sequence);
      part.keys = decode_keys(p, part.sequence, part.tile);
      part.first_slot = static_cast<int32_t>(chunk - tile_begin) * kChunkKeys;
      part.chunks = static_cast<int32_t>(part.next - chunk);
    }
    __syncthreads();
    const DecodeWork<C> work(p, shared);
    attend(work);
    write_rows(work);
    id = shared.part.id;
    chunk = shared.part.next;
  }
}

}  // namespace sparse_attn::cuda
