// SPDX-License-Identifier: Apache-2.0
// Runs: chunks that need no lookup per key. A chunk is a run if it consists of pieces of 16
// consecutive rows in memory, every key of which every row sees, without a bias. Blocks of a
// multiple of 16 keys, dense heads and windows are made of them, but for the keys at their edges.
//
// A CTA plans kGroup chunks at a time, a thread a piece, outside its main loop.
#pragma once

#include "tiles.cuh"

namespace sparse_attn::cuda {

constexpr int kPieceKeys = 16;
constexpr int kPieces = kChunkKeys / kPieceKeys;

// Of two groups of chunks, one of which is being worked on.
template <int kGroup_>
struct RunPlan {
  static constexpr int kGroup = kGroup_;
  // Of chunk c at c % (2 * kGroup): where its pieces begin. -1: no run, or no such chunk.
  alignas(16) int32_t row[2 * kGroup][kPieces];
  // Bit i of group g, at g % 2: chunk i of the group is a run or is not there.
  alignas(4) uint8_t bits[2][4];

  __device__ const int32_t (&rows(uint32_t chunk) const)[kPieces] {
    return row[chunk % (2 * kGroup)];
  }
  __device__ bool is_run(uint32_t chunk) const { return rows(chunk)[0] >= 0; }
};

// Row at which the keys of a piece's slots begin, or -1.
__device__ inline int32_t piece_row(const DeviceCall& p, const FastDivisor& by_block_n,
                                    const DeviceSequence& s, int64_t sequence, const TileKeys& keys,
                                    int32_t slot) {
  const bool listed = keys.kind == kListed;
  const int32_t end = slot + kPieceKeys - 1;
  if (end >= (listed ? keys.block_slots : keys.slots)) return -1;
  const SlotEntry first = load_slot(p.call.index, by_block_n, keys, slot);
  const SlotEntry last = load_slot(p.call.index, by_block_n, keys, end);
  // Of one block or one range, so that what lies between is known.
  if (first.key < 0 || last.key - first.key != kPieceKeys - 1) return -1;
  if (listed && last.within - first.within != kPieceKeys - 1) return -1;
  const bool in_window = first.key >= keys.window_max_lo && last.key < keys.window_min_hi;
  const bool seen = first.mask < 0 && last.key < keys.min_hi && (last.key < keys.lead || in_window);
  if (!seen && !fault(15)) return -1;
  const KeyPlace from = locate(p, s, sequence, first.key), to = locate(p, s, sequence, last.key);
  if (from.row < 0 || from.batch != to.batch || to.row - from.row != kPieceKeys - 1) return -1;
  return p.call.pages.block_table == nullptr ? from.row : from.batch * p.page_rows + from.row;
}

// Plans the chunks of a group; all threads. `first_slot` is that of chunk 0. Followed by a barrier.
template <int kGroup>
__device__ inline void plan_group(const DeviceCall& p, const FastDivisor& by_block_n,
                                  const DeviceSequence& s, int64_t sequence, const TileKeys& keys,
                                  int32_t first_slot, int32_t chunks, int32_t group,
                                  RunPlan<kGroup>& plan) {
  const int t = thread_anew(), lane = t % 32;
  const int32_t chunk = group * kGroup + t / kPieces;
  const bool planned = t < kGroup * kPieces, there = chunk < chunks;
  int32_t row = -1;
  if (planned && there && p.runs)
    row = piece_row(p, by_block_n, s, sequence, keys,
                    first_slot + chunk * kChunkKeys + t % kPieces * kPieceKeys);
  const uint32_t good = __ballot_sync(0xffffffffu, planned && (row >= 0 || !there));
  const auto is_run = [&](int of_warp) { return (good >> of_warp * kPieces & 15) == 15; };
  static_assert(kPieces == 4);
  if (planned) plan.row[chunk % (2 * kGroup)][t % kPieces] = is_run(lane / kPieces) ? row : -1;
  const uint32_t bits = __ballot_sync(0xffffffffu, lane < 32 / kPieces && is_run(lane % 8));
  if (lane == 0) plan.bits[group % 2][t / 32] = static_cast<uint8_t>(bits);
}

// How many chunks from this one on, at most to the end of its group, are runs and are followed by
// `ahead` more of them.
template <int kGroup>
__device__ inline int32_t count_runs(const RunPlan<kGroup>& plan, int32_t chunk, int32_t chunks,
                                     int32_t ahead) {
  const uint32_t group = static_cast<uint32_t>(chunk) / kGroup, at = chunk % kGroup;
  const auto bits = [&](uint32_t g) {
    return uint64_t{*reinterpret_cast<const uint32_t*>(plan.bits[g % 2])};
  };
  const uint64_t runs = (bits(group) | bits(group + 1) << kGroup) >> at;
  const int32_t length = __clzll(static_cast<int64_t>(__brevll(~runs)));
  return min(min(length - ahead, static_cast<int32_t>(kGroup - at)), chunks - chunk);
}

// Tile of the ring that holds K (part 0) or V (1) of a chunk: they are in turn.
template <uint32_t kRing>
CUTE_DEVICE uint32_t place(uint32_t chunk, uint32_t part) {
  return (2 * chunk + part) % kRing;
}

// How the threads of a CTA copy a tile of the ring: neighbouring ones copy neighbouring 16 bytes of
// a row. Each has this row and every kRowStep-th after it, these columns and those kColumns on.
template <class L, int kThreads>
struct TileCopy {
  using Element = typename L::Element;
  static constexpr int kRowThreads = L::kColumns / 8;
  static constexpr int kRowStep = kThreads / kRowThreads;
  static constexpr int kRows = kChunkKeys / kRowStep;
  static constexpr int kParts = L::kHeadDim / L::kColumns;
  static_assert(kRowStep % kPieceKeys == 0);

  static CUTE_DEVICE int row() { return threadIdx.x / kRowThreads; }
  static CUTE_DEVICE int column() { return threadIdx.x % kRowThreads * 8; }
  // Where in a tile this thread's part of row 0 of its rows goes.
  static CUTE_DEVICE int offset() { return L::template element<typename L::Keys>(row(), column()); }

  // This thread's part of its i-th row; `to` is its place of row 0, `from` where its column begins.
  static CUTE_DEVICE void copy_row(uint32_t to, int i, const Element* from, bool valid, int dim) {
    CUTE_UNROLL
    for (int j = 0; j < kParts; ++j) {
      // Whole atoms of the layout away: the swizzle is the same.
      const int at = typename L::Keys{}(i * kRowStep, j * L::kColumns);
      copy_async(to + at * static_cast<int>(sizeof(Element)), from + j * L::kColumns,
                 valid && column() + j * L::kColumns < dim);
    }
  }

  // Keys that lie here.
  static CUTE_DEVICE void copy_places(uint32_t to, const KeyPlace (&places)[kChunkKeys],
                                      const TensorView& view, int64_t head, int dim) {
    const Element* base = row_of<const Element>(view, 0, head, 0) + column();
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const KeyPlace from = places[row() + i * kRowStep];
      copy_row(to, i, base + from.batch * view.batch_stride + from.row * view.row_stride,
               from.row >= 0, dim);
    }
  }

  // Where this thread's part of row 0 of a head lies, for copy_run. Pages are part of a run's rows,
  // batch entries are not.
  static __device__ const char* run_base(const DeviceCall& p, const DeviceSequence& s,
                                         const TensorView& view, int64_t head, int32_t row_bytes) {
    const int64_t batch = p.call.pages.block_table == nullptr ? s.batch : 0;
    const Element* base = row_of<const Element>(view, batch, head, 0) + column();
    return reinterpret_cast<const char*>(base) + int64_t{row() % kPieceKeys} * row_bytes;
  }

  // A run, whose pieces begin at these rows, unless they are -1.
  static CUTE_DEVICE void copy_run(uint32_t to, const int32_t (&rows)[kPieces], const char* base,
                                   int32_t row_bytes, int dim) {
    const int4 pieces = *reinterpret_cast<const int4*>(rows);
    if (pieces.x < 0) return;
    const auto copy = [&](int i, int32_t piece) {
      const char* from = base + int64_t{piece} * row_bytes;
      copy_row(to, i, reinterpret_cast<const Element*>(from), true, dim);
    };
    if constexpr (kRowStep == kPieceKeys) {
      copy(0, pieces.x), copy(1, fault(17) ? pieces.x : pieces.y), copy(2, pieces.z),
          copy(3, pieces.w);
    } else {
      static_assert(kRowStep == 2 * kPieceKeys);
      const bool second = row() >= kPieceKeys;
      copy(0, second ? pieces.y : pieces.x), copy(1, second ? pieces.w : pieces.z);
    }
  }
};

}  // namespace sparse_attn::cuda
