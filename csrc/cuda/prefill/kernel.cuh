// SPDX-License-Identifier: Apache-2.0
// Prefill attention over a SparseIndex: many query rows, each tile with its own keys.
//
// Tiling: a CTA of four warps takes 64 query rows (of one head, or of the heads of a KV head that
// share lists, where rows are few) and walks its keys in chunks of 64. Each warp has sixteen rows.
// Tiles that are late in their sequence, which causality makes the longest, are the first of the
// grid: the hardware deals CTAs in order, so that no long one is left to the end.
//
// Memory: chunks arrive by cp.async in a ring of K and V tiles in turn, one barrier a tile. The
// keys of a chunk are looked up (lists, pages) before its copy is issued, by 64 threads, from
// entries loaded one chunk earlier still. Q stays in registers, or in shared memory at head_dim
// 256. Keys that no row may see, and whatever lies out of bounds, are zero-filled.
//
// Masks: a chunk is plain if every row sees all of its keys, without a bias, and the call has no
// softcap and a positive scale. Runs (runs.cuh) are plain chunks that need no lookup: they have a
// main loop of their own, of products, exponentials and little else. All others take the loop of
// lookups.
//
// Numerics: mma.sync with f32 accumulators, softmax in base 2 and f32, P rounded to the input's
// type.
//
// Source: FlashAttention-2 (arXiv 2307.08691).
#pragma once

#include "../common/runs.cuh"
#include "config.h"

namespace sparse_attn::cuda {

// Where the keys of a chunk lie and who sees them.
struct ChunkLookup {
  KeyPlace place[kChunkKeys];  // row -1: hidden from all rows
  int32_t key[kChunkKeys];     // position in the sequence; -1: hidden from all rows
  float bias[kChunkKeys];      // base 2
  int32_t bits[kChunkKeys];    // mask * block_n + position in the block; -1: every row sees the key
  uint32_t plain[2];           // every row sees keys 0..31, 32..63, without bias
};

// Kernel tile: row r is row first_row + r % rows_per_head of head first_head + r / rows_per_head.
struct PrefillTile {
  DeviceSequence sequence;
  int64_t number;  // of the sequence
  int32_t first_head;
  int32_t index_head;
  int32_t first_row;
  int32_t rows_per_head;
  int32_t rows;       // 0: there is no such tile
  int32_t list_tile;  // of the index
  int32_t bits_word;  // of a key's bits
  TileKeys keys;
};

// Called by all lanes of a warp.
__device__ inline PrefillTile prefill_tile(const PrefillParams& p, int64_t id) {
  const AttentionParams& call = p.call;
  const int64_t units = call.num_heads / p.heads_per_unit;
  const int32_t t = p.tiles_per_unit - 1 - static_cast<int32_t>(id / (call.num_sequences * units));
  const int32_t unit = static_cast<int32_t>(id % units);
  PrefillTile tile;
  tile.number = id / units % call.num_sequences;
  tile.sequence = device_sequence(p, tile.number);
  tile.index_head = call.index.num_heads == 1 ? 0 : unit;
  const bool listed = head_row(p, tile.index_head)[0] == kListed;
  const RowCut cut(listed ? p.listed_rows : p.other_rows, p.heads_per_unit);
  const int32_t piece = t / cut.head_tiles;
  const int32_t within = piece % cut.pieces * kPrefillRows;
  const int32_t head = t % cut.head_tiles * cut.heads_per_tile;
  tile.list_tile = listed ? piece / cut.pieces : 0;
  tile.first_row = piece / cut.pieces * cut.list_rows + within;
  tile.bits_word = within / kPrefillRows;
  tile.first_head = unit * p.heads_per_unit + head;
  tile.rows_per_head =
      max(0, min(min(cut.list_rows - within, kPrefillRows), tile.sequence.q_len - tile.first_row));
  tile.rows = tile.rows_per_head * min(cut.heads_per_tile, p.heads_per_unit - head);
  return tile;
}

template <class C>
struct PrefillShared {
  using L = TileLayouts<typename C::Element, C::kHeadDim>;
  alignas(128)
      typename C::Element ring[C::kRing][L::kKeysElements];  // one holds the result at last
  typename C::Element q[C::kSharedQ ? kPrefillRows * C::kHeadDim : 8];
  ChunkLookup lookup[C::kLookups];
  RunPlan<C::kGroup> plan;
  PrefillTile tile;
};

// What a thread's two rows see: their windows, and their bit of a key's bits.
struct RowSight {
  RowWindow window[2];
  int32_t bit[2];
};

template <class C>
struct PrefillWork {
  using Element = typename C::Element;
  using L = TileLayouts<Element, C::kHeadDim>;
  using Copy = TileCopy<L, kPrefillThreads>;

  const PrefillParams& p;
  PrefillShared<C>& shared;
  int32_t chunks;
  uint32_t copies_to;  // this thread's place in the first tile of the ring
  const char* k_run;   // what it copies of a run
  const char* v_run;

  __device__ PrefillWork(const PrefillParams& params, PrefillShared<C>& memory)
      : p(params),
        shared(memory),
        chunks(static_cast<int32_t>(ceil_div(shared.tile.keys.slots, kChunkKeys)) -
               (fault(12) ? 1 : 0)),
        copies_to(cast_smem_ptr_to_uint(shared.ring[0] + Copy::offset())),
        k_run(Copy::run_base(p, shared.tile.sequence, p.call.k, kv_head(), p.k_row_bytes)),
        v_run(Copy::run_base(p, shared.tile.sequence, p.call.v, kv_head(), p.v_row_bytes)) {}

  __device__ int64_t kv_head() const {
    const int64_t group = p.call.num_heads / p.call.num_heads_kv;
    return fault(4) ? shared.tile.first_head % p.call.num_heads_kv : shared.tile.first_head / group;
  }

  __device__ void plan_group(int32_t group) const {
    const PrefillTile& tile = shared.tile;
    cuda::plan_group(p, p.by_block_n, tile.sequence, tile.number, tile.keys, 0, chunks, group,
                     shared.plan);
  }

  // The list entry of this thread's slot of a chunk.
  __device__ SlotEntry load_entry(int32_t chunk) const {
    return load_slot(p.call.index, p.by_block_n, shared.tile.keys,
                     chunk * kChunkKeys + static_cast<int32_t>(threadIdx.x));
  }

  // Completes a chunk's lookup from the entries of the first 64 threads.
  __device__ void look_up(int32_t chunk, const SlotEntry& entry) const {
    const int i = threadIdx.x;
    const PrefillTile& tile = shared.tile;
    const TileKeys& keys = tile.keys;
    ChunkLookup& to = shared.lookup[chunk % C::kLookups];
    KeyPlace place{0, -1};
    int32_t key = entry.key;
    if (key >= 0) place = locate(p, tile.sequence, tile.number, key);
    if (place.row < 0) key = -1;
    const bool seen = key >= 0 && key < keys.min_hi && entry.bias == 0.0f && entry.mask < 0 &&
                      (key < keys.lead || (key >= keys.window_max_lo && key < keys.window_min_hi));
    to.place[i] = place;
    to.key[i] = key;
    to.bias[i] = entry.bias * kLog2e;
    to.bits[i] = entry.mask < 0 ? -1 : entry.mask * p.call.index.block_n + entry.within;
    const bool all = __all_sync(0xffffffffu, seen || fault(5));
    if (i % 32 == 0) to.plain[i / 32] = all && scaled_only(p.call);
  }

  __device__ bool is_plain(int32_t chunk) const {
    if (shared.plan.is_run(chunk)) return true;
    const ChunkLookup& lookup = shared.lookup[chunk % C::kLookups];
    return (lookup.plain[0] & lookup.plain[1]) != 0;
  }

  // Begins the copy of a chunk's K (kPart 0) or V (1) to the ring, whose tiles they are in turn.
  // Commits always, so that waiting counts tiles. With kRuns the chunk is known to be a run, or not
  // to be there.
  template <int kPart, bool kRuns>
  CUTE_DEVICE void copy_tile(int32_t chunk) const {
    const uint32_t to = copies_to + place<C::kRing>(chunk, kPart) * L::kTileBytes;
    const int dim = kPart == 0 ? p.call.head_dim : p.call.head_dim_v;
    if (kRuns || shared.plan.is_run(chunk))
      Copy::copy_run(to, shared.plan.rows(chunk), kPart == 0 ? k_run : v_run,
                     kPart == 0 ? p.k_row_bytes : p.v_row_bytes, dim);
    else if (chunk < chunks)
      Copy::copy_places(to, shared.lookup[chunk % C::kLookups].place,
                        kPart == 0 ? p.call.k : p.call.v, kv_head(), dim);
    cp_async_fence();
  }

  __device__ int32_t head_of(int r) const {
    return shared.tile.first_head + r / shared.tile.rows_per_head;
  }
  __device__ int32_t row_in_sequence(int r) const {
    return shared.tile.first_row + r % shared.tile.rows_per_head;
  }
  __device__ Element* row_of_tile(const TensorView& x, int r) const {
    const DeviceSequence& sequence = shared.tile.sequence;
    return row_of<Element>(x, sequence.batch, head_of(r), sequence.q_start + row_in_sequence(r));
  }

  // Q to shared memory, as part of the next group of copies.
  __device__ void copy_q(Element* q) const {
    using Rows = typename L::template Rows<kPrefillRows>;
    constexpr int kVectors = C::kHeadDim / 8;
    for (int i = threadIdx.x; i < kPrefillRows * kVectors; i += kPrefillThreads) {
      const int r = i / kVectors, column = i % kVectors * 8;
      const bool valid = r < shared.tile.rows && column < p.call.head_dim;
      const void* from = valid ? row_of_tile(p.call.q, r) + column : nullptr;
      copy_async(cast_smem_ptr_to_uint(q + L::template element<Rows>(r, column)), from, valid);
    }
  }

  __device__ RowSight row_sight(int warp_row, int lane) const {
    RowSight sight;
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int r = warp_row + half * 8 + lane / 4;
      sight.window[half] = {0, 0, 0};
      sight.bit[half] = 0;
      if (r >= shared.tile.rows) continue;
      const int32_t row = row_in_sequence(r);
      sight.window[half] =
          row_window(p, shared.tile.sequence, head_row(p, shared.tile.index_head), row);
      sight.bit[half] = row - shared.tile.first_row;
    }
    return sight;
  }

  // Logits in base 2 of 16 rows and 64 keys.
  CUTE_DEVICE void scale_and_mask(const ChunkLookup& lookup, const RowSight& sight, int lane,
                                  Accumulators<kChunkKeys / 8>& scores) const {
    const AttentionParams& call = p.call;
    const float scale = call.softmax_scale * kLog2e;
    const float inner = call.softcap == 0.0f ? 0.0f : call.softmax_scale / call.softcap;
    const float cap = call.softcap * kLog2e;
    const int32_t lead = shared.tile.keys.lead;
    const int64_t words = (call.index.block_m + 63) / 64;
    CUTE_UNROLL
    for (int n = 0; n < kChunkKeys / 8; ++n) {
      CUTE_UNROLL
      for (int side = 0; side < 2; ++side) {
        const int i = n * 8 + lane % 4 * 2 + side;
        const int32_t key = lookup.key[i];
        const float bias = lookup.bias[i];
        const int32_t at = lookup.bits[i];
        const uint64_t bits =
            at < 0 || fault(8)
                ? ~uint64_t{0}
                : static_cast<uint64_t>(call.index.block_bits[at * words + shared.tile.bits_word]);
        CUTE_UNROLL
        for (int half = 0; half < 2; ++half) {
          const RowWindow& w = sight.window[half];
          const bool seen = key >= 0 && key < w.outer_hi + (fault(3) ? 1 : 0) &&
                            (key < lead || (key >= w.lo && key < w.hi)) &&
                            (bits >> sight.bit[half] & 1) != 0;
          float& score = scores[n][side + 2 * half];
          const float logit = call.softcap == 0.0f ? score * scale : cap * tanh_fast(score * inner);
          score = seen ? logit + (fault(9) ? 0.0f : bias) : -INFINITY;
        }
      }
    }
  }
};

// Normalises the rows and writes them and their lse; the ring is drained.
template <class C>
CUTE_DEVICE void write_rows(const PrefillWork<C>& work, const RowState& state,
                            const Accumulators<C::kHeadDim / 8>& out, int warp_row, int lane) {
  using Element = typename C::Element;
  using L = TileLayouts<Element, C::kHeadDim>;
  const AttentionParams& call = work.p.call;
  const PrefillTile& tile = work.shared.tile;
  Element* const staged = work.shared.ring[0];
  using Rows = typename L::template Rows<kPrefillRows>;
  CUTE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int r = warp_row + half * 8 + lane / 4;
    float sum = state.sum[half], top = state.top[half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    float rescale = 1.0f;
    const bool valid = r < tile.rows;
    if (call.sinks != nullptr && valid && !fault(10)) {
      const float sink = call.sinks[work.head_of(r)] * kLog2e;
      const float larger = fmaxf(top, sink);
      const float base = larger == -INFINITY ? 0.0f : larger;
      rescale = exp2_fast(top - base);
      sum = sum * rescale + exp2_fast(sink - base);
      top = larger;
    }
    const float factor = sum == 0.0f ? 0.0f : rescale / sum;
    if (valid && lane % 4 == 0) {
      const int64_t row = tile.sequence.q_start + work.row_in_sequence(r);
      call.lse[(tile.sequence.batch * call.num_heads + work.head_of(r)) * call.seqlen_q + row] =
          sum == 0.0f ? -INFINITY : (top + log2f(sum)) * (fault(13) ? 1.0f : kLn2);
    }
    CUTE_UNROLL
    for (int n = 0; n < C::kHeadDim / 8; ++n)
      *reinterpret_cast<uint32_t*>(staged + L::template element<Rows>(r, n * 8 + lane % 4 * 2)) =
          pack_pair<Element>(out[n][2 * half] * factor, out[n][2 * half + 1] * factor);
  }
  __syncwarp();  // a warp reads only what it wrote
  const int vectors = call.head_dim_v / 8;
  for (int i = lane; i < 16 * vectors; i += 32) {
    const int r = warp_row + i / vectors, column = i % vectors * 8;
    if (r < tile.rows)
      *reinterpret_cast<uint4*>(work.row_of_tile(call.out, r) + column) =
          *reinterpret_cast<const uint4*>(staged + L::template element<Rows>(r, column));
  }
}

template <class C>
CUTE_DEVICE void attend(const PrefillWork<C>& work) {
  using Element = typename C::Element;
  constexpr int kAhead = C::kAhead;
  PrefillShared<C>& shared = work.shared;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
  const bool looks_up = threadIdx.x < kChunkKeys;
  const int32_t chunks = work.chunks;
  // Without a place of its own Q passes through the ring, whose last tile is filled last.
  Element* const q = C::kSharedQ ? shared.q : shared.ring[C::kRing - 1];
  WarpProducts<typename PrefillWork<C>::L, kPrefillRows, kChunkKeys, C::kSharedQ> products(
      q, shared.ring[0], warp_row, 0, lane);
  RowState state;
  float out[C::kHeadDim / 8][4] = {};

  work.plan_group(0);
  work.plan_group(1);
  if (looks_up)
    for (int c = 0; c < kAhead; ++c) work.look_up(c, work.load_entry(c));
  work.copy_q(q);
  __syncthreads();  // plan, lookups
  CUTE_UNROLL
  for (int c = 0; c < kAhead; ++c) {
    work.template copy_tile<0, false>(c);
    if (c < kAhead - 1) work.template copy_tile<1, false>(c);
  }
  if constexpr (!C::kSharedQ) {
    cp_async_wait<C::kRing - 2>();  // Q came with the first tile
    __syncthreads();
    products.load_q();
  }

  // The oldest tile on its way has landed and nobody reads the one before it any more.
  const auto next_tile = [] {
    fault(1) ? cp_async_wait<C::kRing - 1>() : cp_async_wait<C::kRing - 2>();
    if (!fault(2)) __syncthreads();
  };
  const float scale = work.p.call.softmax_scale * kLog2e;
  SlotEntry entry{};
  // In the loop of runs all chunks up to `chunk + kAhead` are runs.
  const auto step_over = [&](int32_t chunk, auto runs) __attribute__((always_inline)) {
    constexpr bool kRuns = decltype(runs)::value;
    next_tile();
    work.template copy_tile<1, kRuns>(chunk + kAhead - 1);
    if (!kRuns && looks_up) {
      if (!shared.plan.is_run(chunk + kAhead)) work.look_up(chunk + kAhead, entry);
      entry = work.load_entry(chunk + kAhead + 1);
    }
    float scores[kChunkKeys / 8][4];
    products.scores(place<C::kRing>(chunk, 0), scores);
    if (kRuns || work.is_plain(chunk)) {
      softmax_step<true>(state, scores, out, scale);
    } else {
      work.scale_and_mask(shared.lookup[chunk % C::kLookups], work.row_sight(warp_row, lane), lane,
                          scores);
      softmax_step<false>(state, scores, out, 1.0f);
    }
    uint32_t weights[kChunkKeys / 16][4];
    round_weights<Element>(scores, weights);
    next_tile();
    work.template copy_tile<0, kRuns>(chunk + kAhead);
    products.sum_values(place<C::kRing>(chunk, 1), weights, out);
  };
  for (int32_t chunk = 0; chunk < chunks;) {
    if (chunk > 0 && chunk % C::kGroup == 0) {
      work.plan_group(chunk / C::kGroup + 1);
      if (!fault(16)) __syncthreads();  // plan
    }
    const int32_t runs = count_runs(shared.plan, chunk, chunks, kAhead);
    for (const int32_t end = chunk + runs; chunk < end; ++chunk) step_over(chunk, true_type{});
    if (chunk == chunks || (runs > 0 && chunk % C::kGroup == 0)) continue;
    if (looks_up) entry = work.load_entry(chunk + kAhead);
    do {
      step_over(chunk++, false_type{});
    } while (chunk < chunks && chunk % C::kGroup != 0 &&
             count_runs(shared.plan, chunk, chunks, kAhead) <= 0);
  }
  cp_async_wait<0>();
  __syncthreads();  // the ring's memory becomes the result's
  write_rows(work, state, out, warp_row, lane);
}

template <class C>
__global__ void __launch_bounds__(kPrefillThreads, C::kMinBlocks)
    prefill_kernel(const __grid_constant__ PrefillParams p) {
  extern __shared__ __align__(128) char shared_bytes[];
  auto& shared = *reinterpret_cast<PrefillShared<C>*>(shared_bytes);
  if (threadIdx.x < 32) {
    PrefillTile tile = prefill_tile(p, blockIdx.x);
    tile.keys = tile_keys(p, tile.sequence, tile.number, tile.index_head, tile.list_tile,
                          tile.first_row, tile.rows_per_head);
    if (threadIdx.x == 0) shared.tile = tile;
  }
  __syncthreads();
  if (shared.tile.rows == 0) return;
  attend(PrefillWork<C>(p, shared));
}

}  // namespace sparse_attn::cuda
