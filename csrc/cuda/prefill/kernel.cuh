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
// Masks: a chunk is plain if every row sees all of its keys, without a bias; plain chunks run in a
// loop of their own, which knows of no mask. So do not those of a call with softcap or a scale that
// is not positive.
//
// Numerics: mma.sync with f32 accumulators, softmax in base 2 and f32, P rounded to the input's
// type.
//
// Source: FlashAttention-2 (arXiv 2307.08691).
#pragma once

#include "../common/tiles.cuh"
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
  // Neighbouring threads copy neighbouring 16 bytes of a row.
  static constexpr int kRowThreads = L::kColumns / 8;
  static constexpr int kRowStep = kPrefillThreads / kRowThreads;

  const PrefillParams& p;
  PrefillShared<C>& shared;

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
    const bool raw = p.call.softcap == 0.0f && p.call.softmax_scale > 0.0f;
    to.place[i] = place;
    to.key[i] = key;
    to.bias[i] = entry.bias * kLog2e;
    to.bits[i] = entry.mask < 0 ? -1 : entry.mask * p.call.index.block_n + entry.within;
    const bool all = __all_sync(0xffffffffu, seen || fault(5));
    if (i % 32 == 0) to.plain[i / 32] = all && raw;
  }

  __device__ bool is_plain(int32_t chunk) const {
    const ChunkLookup& lookup = shared.lookup[chunk % C::kLookups];
    return (lookup.plain[0] & lookup.plain[1]) != 0;
  }

  // Begins the copy of a chunk's K or V to a place in the ring. Commits always, so that waiting
  // counts tiles.
  __device__ void copy_keys(const TensorView& view, int32_t dim, int32_t chunk, int32_t chunks,
                            int32_t place) const {
    if (chunk < chunks) {
      const int64_t group = p.call.num_heads / p.call.num_heads_kv;
      const int64_t head =
          fault(4) ? shared.tile.first_head % p.call.num_heads_kv : shared.tile.first_head / group;
      const int32_t row = threadIdx.x / kRowThreads, column = threadIdx.x % kRowThreads * 8;
      const Element* base = row_of<const Element>(view, 0, head, 0) + column;
      Element* to =
          &make_tensor(make_smem_ptr(shared.ring[place]), typename L::Keys{})(row, column);
      const ChunkLookup& lookup = shared.lookup[chunk % C::kLookups];
      for_each(make_int_sequence<kChunkKeys / kRowStep>{}, [&](auto i) {
        const KeyPlace from = lookup.place[row + i * kRowStep];
        const Element* at = base + from.batch * view.batch_stride + from.row * view.row_stride;
        for_each(make_int_sequence<C::kHeadDim / L::kColumns>{}, [&](auto j) {
          // Whole atoms of the layout away: the swizzle is the same.
          constexpr int kOffset = typename L::Keys{}(i * Int<kRowStep>{}, j * Int<L::kColumns>{});
          const bool valid = from.row >= 0 && column + j * L::kColumns < dim;
          copy_async(to + kOffset, at + j * L::kColumns, valid);
        });
      });
    }
    cp_async_fence();
  }

  // Tile 2c of the ring holds K of chunk c, tile 2c + 1 its V.
  __device__ void copy_tile(int32_t number, int32_t chunks) const {
    const int32_t place = number % C::kRing;
    if (number % 2 == 0)
      copy_keys(p.call.k, p.call.head_dim, number / 2, chunks, place);
    else
      copy_keys(p.call.v, p.call.head_dim_v, number / 2, chunks, place);
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
    Tensor to = make_tensor(make_smem_ptr(q), typename L::template Rows<kPrefillRows>{});
    constexpr int kVectors = C::kHeadDim / 8;
    for (int i = threadIdx.x; i < kPrefillRows * kVectors; i += kPrefillThreads) {
      const int r = i / kVectors, column = i % kVectors * 8;
      const bool valid = r < shared.tile.rows && column < p.call.head_dim;
      const void* from = valid ? row_of_tile(p.call.q, r) + column : nullptr;
      copy_async(&to(r, column), from, valid);
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

  // Logits in base 2 of 16 rows and 64 keys; scores are the columns 8 n + 2 (lane % 4) + {0, 1} of
  // rows lane / 4 and lane / 4 + 8.
  template <class Scores>
  CUTE_DEVICE void scale_and_mask(const ChunkLookup& lookup, const RowSight& sight, int lane,
                                  Scores& scores) const {
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
          float& score = scores(side + 2 * half, 0, n);
          const float logit = call.softcap == 0.0f ? score * scale : cap * tanh_fast(score * inner);
          score = seen ? logit + (fault(9) ? 0.0f : bias) : -INFINITY;
        }
      }
    }
  }
};

// Normalises the rows and writes them and their lse; the ring is drained.
template <class C, class Out>
CUTE_DEVICE void write_rows(const PrefillWork<C>& work, RowState& state, const Out& out,
                            int warp_row, int lane) {
  using Element = typename C::Element;
  using L = TileLayouts<Element, C::kHeadDim>;
  const AttentionParams& call = work.p.call;
  const PrefillTile& tile = work.shared.tile;
  Tensor staged =
      make_tensor(make_smem_ptr(work.shared.ring[0]), typename L::template Rows<kPrefillRows>{});
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
    for (int n = 0; n < size<2>(out); ++n)
      *reinterpret_cast<uint32_t*>(&staged(r, n * 8 + lane % 4 * 2)) =
          pack_pair<Element>(out(2 * half, 0, n) * factor, out(2 * half + 1, 0, n) * factor);
  }
  __syncwarp();  // a warp reads only what it wrote
  const int vectors = call.head_dim_v / 8;
  for (int i = lane; i < 16 * vectors; i += 32) {
    const int r = warp_row + i / vectors, column = i % vectors * 8;
    if (r < tile.rows)
      *reinterpret_cast<uint4*>(work.row_of_tile(call.out, r) + column) =
          *reinterpret_cast<const uint4*>(&staged(r, column));
  }
}

template <class C>
CUTE_DEVICE void attend(const PrefillWork<C>& work) {
  using Element = typename C::Element;
  using L = TileLayouts<Element, C::kHeadDim>;
  PrefillShared<C>& shared = work.shared;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = warp * 16;
  const bool looks_up = threadIdx.x < kChunkKeys;

  typename L::Mma mma;
  auto slice = mma.get_slice(lane);
  Element* const none = nullptr;
  const auto fragment_a = [&](auto columns) {
    return slice.partition_fragment_A(
        make_tensor(make_smem_ptr(none), make_layout(make_shape(_16{}, columns))));
  };
  const auto fragment_b = [&](auto rows, auto columns) {
    return slice.partition_fragment_B(
        make_tensor(make_smem_ptr(none), make_layout(make_shape(rows, columns))));
  };
  // K and V pass through registers in pieces of 16 x 16, so do those of Q that has a place in
  // shared memory.
  constexpr int kSteps = C::kHeadDim / 16;
  Tensor rQ = fragment_a(Int<C::kSharedQ ? 16 : C::kHeadDim>{});
  Tensor rP = fragment_a(Int<kChunkKeys>{});
  Tensor rK = fragment_b(_16{}, _16{});
  Tensor rV = fragment_b(_16{}, _16{});
  Tensor out = partition_fragment_C(mma, Shape<_16, Int<C::kHeadDim>>{});
  const Copy_Atom<SM75_U32x4_LDSM_N, Element> load;
  const Copy_Atom<SM75_U16x8_LDSM_T, Element> load_transposed;
  auto copy_q = make_tiled_copy_A(load, mma).get_slice(lane);
  auto copy_k = make_tiled_copy_B(load, mma).get_slice(lane);
  auto copy_v = make_tiled_copy_B(load_transposed, mma).get_slice(lane);
  Tensor rQ_copy = copy_q.retile_D(rQ);
  Tensor rK_copy = copy_k.retile_D(rK);
  Tensor rV_copy = copy_v.retile_D(rV);
  // Without a place of its own Q passes through the ring, whose last tile is filled last.
  Element* const q = C::kSharedQ ? shared.q : shared.ring[C::kRing - 1];
  Tensor sQ_copy = copy_q.partition_S(
      local_tile(make_tensor(make_smem_ptr(q), typename L::template Rows<kPrefillRows>{}),
                 Shape<_16, Int<C::kHeadDim>>{}, make_coord(warp, 0)));

  RowState state;
  clear(out);
  const int32_t chunks = ceil_div(shared.tile.keys.slots, kChunkKeys) - (fault(12) ? 1 : 0);
  SlotEntry entry{};
  if (looks_up) {
    for (int c = 0; c < C::kRing / 2; ++c) work.look_up(c, work.load_entry(c));
    entry = work.load_entry(C::kRing / 2);
  }
  work.copy_q(q);
  __syncthreads();  // lookups
  for (int t = 0; t < C::kRing - 1; ++t) work.copy_tile(t, chunks);
  const RowSight sight = work.row_sight(warp_row, lane);
  if constexpr (!C::kSharedQ) {
    cp_async_wait<C::kRing - 2>();  // Q came with the first tile
    __syncthreads();
    CUTE_UNROLL
    for (int step = 0; step < kSteps; ++step) copy(load, sQ_copy(_, _, step), rQ_copy(_, _, step));
  }

  // Tile t has landed and nobody reads tile t - 1 any more: its place takes the next copy.
  const auto next_tile = [&](int32_t t) {
    fault(1) ? cp_async_wait<C::kRing - 1>() : cp_async_wait<C::kRing - 2>();
    if (!fault(2)) __syncthreads();
    work.copy_tile(t + C::kRing - 1, chunks);
  };
  const float scale = work.p.call.softmax_scale * kLog2e;
  const auto step_over = [&](int32_t chunk, auto plain) __attribute__((always_inline)) {
    next_tile(2 * chunk);
    if (looks_up) {
      work.look_up(chunk + C::kRing / 2, entry);
      entry = work.load_entry(chunk + C::kRing / 2 + 1);
    }
    Tensor scores = partition_fragment_C(mma, Shape<_16, Int<kChunkKeys>>{});
    clear(scores);
    Tensor sK_copy = copy_k.partition_S(
        make_tensor(make_smem_ptr(shared.ring[2 * chunk % C::kRing]), typename L::Keys{}));
    CUTE_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      if constexpr (C::kSharedQ) copy(load, sQ_copy(_, _, step), rQ_copy(_, _, 0));
      CUTE_UNROLL
      for (int n = 0; n < kChunkKeys / 16; ++n) {
        copy(load, sK_copy(_, n, step), rK_copy(_, 0, 0));
        CUTE_UNROLL
        for (int side = 0; side < 2; ++side)
          gemm(mma, rQ(_, 0, C::kSharedQ ? 0 : step), rK(_, side, 0), scores(_, 0, 2 * n + side));
      }
    }
    if constexpr (!plain)
      work.scale_and_mask(shared.lookup[chunk % C::kLookups], sight, lane, scores);
    softmax_step<plain>(state, scores, out, scale);
    round_weights<Element>(scores, rP);

    next_tile(2 * chunk + 1);
    Tensor sV_copy = copy_v.partition_S(make_tensor(
        make_smem_ptr(shared.ring[(2 * chunk + 1) % C::kRing]), typename L::Transposed{}));
    CUTE_UNROLL
    for (int step = 0; step < kChunkKeys / 16; ++step) {
      CUTE_UNROLL
      for (int n = 0; n < kSteps; ++n) {
        copy(load_transposed, sV_copy(_, n, step), rV_copy(_, 0, 0));
        CUTE_UNROLL
        for (int side = 0; side < 2; ++side)
          gemm(mma, rP(_, 0, step), rV(_, side, 0), out(_, 0, 2 * n + side));
      }
    }
  };
  for (int32_t chunk = 0; chunk < chunks;) {
    for (; chunk < chunks && work.is_plain(chunk); ++chunk) step_over(chunk, true_type{});
    for (; chunk < chunks && !work.is_plain(chunk); ++chunk) step_over(chunk, false_type{});
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
  attend(PrefillWork<C>{p, shared});
}

}  // namespace sparse_attn::cuda
