// SPDX-License-Identifier: Apache-2.0
// sparse_attn::vertical_slash_lists on the CPU.
#include <cstring>
#include <tuple>

#include "../core/vertical_slash.h"
#include "../cpu/schedule.h"
#include "common.h"

namespace sparse_attn::ops {
namespace {

// A selection serves the rows of one chunk of one head; its tiles are worked on a band at a time.
constexpr int64_t kBandTiles = 128;

struct Problem {
  const int32_t* verticals;  // [heads * chunks, num_verticals], ascending
  const bool* slashes;       // [heads * chunks, distances]
  int64_t num_verticals, distances;
  SlashShape whole;
  int64_t chunk;
  int64_t heads;

  int64_t chunks() const { return std::max<int64_t>((whole.seqlen_q + chunk - 1) / chunk, 1); }
  int64_t chunk_bands() const { return (chunk / whole.block_m + kBandTiles - 1) / kBandTiles; }
  // The rows of one chunk, as a call of their own.
  SlashShape shape(int64_t selection) const {
    const int64_t row = selection % chunks() * chunk;
    SlashShape part = whole;
    part.seqlen_q = std::min(chunk, whole.seqlen_q - row);
    part.q_offset = whole.q_offset + row;
    return part;
  }
};

// The lists of one band of tiles.
struct Band {
  std::vector<int32_t> blocks, block_masks, columns;
  std::vector<uint64_t> masks;
};

Band build_band(const Problem& problem, const SlashLayout& layout, const ExactLayout& exact_layout,
                bool exact, int64_t selection, int64_t begin, int64_t end, int64_t* block_counts,
                int64_t* column_counts) {
  const SlashShape shape = problem.shape(selection);
  const int32_t* verticals = problem.verticals + selection * problem.num_verticals;
  Band band;
  ExactLists lists(exact_layout);
  for (int64_t tile = begin; tile < end; ++tile) {
    auto& blocks = exact ? lists.blocks : band.blocks;
    auto& columns = exact ? lists.columns : band.columns;
    const size_t blocks_before = blocks.size(), columns_before = columns.size();
    if (exact) {
      append_exact_tile(exact_layout, shape, verticals, problem.num_verticals, tile, lists);
    } else {
      append_tile(layout, shape, verticals, problem.num_verticals, tile, blocks, columns);
    }
    block_counts[tile] = static_cast<int64_t>(blocks.size() - blocks_before);
    column_counts[tile] = static_cast<int64_t>(columns.size() - columns_before);
  }
  if (!exact) return band;
  return {std::move(lists.blocks), std::move(lists.block_masks), std::move(lists.columns),
          std::move(lists.masks)};
}

// One array after another.
template <class T>
void gather(const std::vector<Band>& bands, std::vector<T> Band::* member, void* to) {
  auto* at = static_cast<char*>(to);
  for (const Band& band : bands) {
    const std::vector<T>& from = band.*member;
    if (!from.empty()) std::memcpy(at, from.data(), from.size() * sizeof(T));
    at += from.size() * sizeof(T);
  }
}

template <class T>
int64_t total(const std::vector<Band>& bands, std::vector<T> Band::* member) {
  size_t n = 0;
  for (const Band& band : bands) n += (band.*member).size();
  return static_cast<int64_t>(n);
}

std::vector<Band> build_bands(const Problem& problem, bool exact, int64_t* block_counts,
                              int64_t* column_counts) {
  const cpu::Executor threads = torch_threads();
  const int64_t selections = problem.heads * problem.chunks();
  std::vector<SlashLayout> layouts(selections);
  std::vector<ExactLayout> exact_layouts(selections);
  cpu::deal(threads, selections, [&](int64_t i) {
    const bool* slashes = problem.slashes + i * problem.distances;
    if (exact) {
      exact_layouts[i] = exact_layout(slashes, problem.distances, problem.shape(i));
    } else {
      layouts[i] = slash_layout(slashes, problem.distances, problem.shape(i));
    }
    return true;
  });
  const int64_t tiles = problem.whole.tiles(), chunk_tiles = problem.chunk / problem.whole.block_m;
  std::vector<Band> bands(selections * problem.chunk_bands());
  cpu::deal(threads, static_cast<int64_t>(bands.size()), [&](int64_t i) {
    const int64_t selection = i / problem.chunk_bands();
    const int64_t begin = i % problem.chunk_bands() * kBandTiles;
    const int64_t end =
        std::min({begin + kBandTiles, chunk_tiles, problem.shape(selection).tiles()});
    const int64_t first =
        selection / problem.chunks() * tiles + selection % problem.chunks() * chunk_tiles;
    if (begin < end)
      bands[i] = build_band(problem, layouts[selection], exact_layouts[selection], exact, selection,
                            begin, end, block_counts + first, column_counts + first);
    return true;
  });
  return bands;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> vertical_slash_lists_cpu(
    const Tensor verticals, const Tensor slashes, int64_t seqlen_q, int64_t seqlen_k,
    int64_t q_offset, bool causal, int64_t block_m, int64_t block_n, int64_t chunk, bool exact) {
  STD_TORCH_CHECK(verticals.is_cpu() && verticals.scalar_type() == ScalarType::Int &&
                      verticals.dim() == 2 && verticals.is_contiguous(),
                  "sparse_attn::vertical_slash_lists: verticals is not a contiguous int32 "
                  "[heads * chunks, count] CPU tensor");
  STD_TORCH_CHECK(slashes.is_cpu() && slashes.scalar_type() == ScalarType::Bool &&
                      slashes.dim() == 2 && slashes.is_contiguous() &&
                      slashes.size(0) == verticals.size(0),
                  "sparse_attn::vertical_slash_lists: slashes is not a contiguous bool "
                  "[heads * chunks, distances] CPU tensor");
  STD_TORCH_CHECK(seqlen_q >= 0 && seqlen_q < INT32_MAX && seqlen_k >= 0 && seqlen_k < INT32_MAX &&
                      block_m > 0 && block_m <= 1 << 20 && block_n > 0 && block_n <= 1 << 20 &&
                      q_offset > -INT32_MAX && q_offset < INT32_MAX,
                  "sparse_attn::vertical_slash_lists: a length or block size is out of range");
  STD_TORCH_CHECK(chunk > 0 && chunk % block_m == 0,
                  "sparse_attn::vertical_slash_lists: chunk=", chunk, " is not a multiple of ",
                  block_m);
  Problem problem{
      static_cast<const int32_t*>(verticals.const_data_ptr()),
      static_cast<const bool*>(slashes.const_data_ptr()),
      verticals.size(1),
      slashes.size(1),
      {seqlen_q, seqlen_k, q_offset, block_m, block_n, causal},
      std::min(chunk, std::max<int64_t>(seqlen_q + block_m - 1, block_m) / block_m * block_m),
      0};
  STD_TORCH_CHECK(verticals.size(0) % problem.chunks() == 0,
                  "sparse_attn::vertical_slash_lists: ", verticals.size(0),
                  " selections do not divide into ", problem.chunks(), " chunks");
  problem.heads = verticals.size(0) / problem.chunks();
  const int64_t tiles = problem.whole.tiles(), words = (block_m + 63) / 64;
  const auto empty = [&](std::initializer_list<int64_t> size, ScalarType dtype) {
    return torch::stable::new_empty(verticals, size, dtype);
  };
  Tensor block_counts = empty({problem.heads, tiles}, ScalarType::Long);
  Tensor column_counts = empty({problem.heads, tiles}, ScalarType::Long);
  const std::vector<Band> bands =
      build_bands(problem, exact, static_cast<int64_t*>(block_counts.mutable_data_ptr()),
                  static_cast<int64_t*>(column_counts.mutable_data_ptr()));
  Tensor blocks = empty({total(bands, &Band::blocks)}, ScalarType::Int);
  Tensor columns = empty({total(bands, &Band::columns)}, ScalarType::Int);
  Tensor ids = empty({total(bands, &Band::block_masks)}, ScalarType::Int);
  const int64_t masks = total(bands, &Band::masks) / (words * block_n);
  Tensor bits = empty({masks, block_n, words}, ScalarType::Long);
  gather(bands, &Band::blocks, blocks.mutable_data_ptr());
  gather(bands, &Band::columns, columns.mutable_data_ptr());
  gather(bands, &Band::masks, bits.mutable_data_ptr());
  // Masks are numbered through all bands.
  auto* id = static_cast<int32_t*>(ids.mutable_data_ptr());
  int64_t before = 0;
  for (const Band& band : bands) {
    for (const int32_t mask : band.block_masks)
      *id++ = mask < 0 ? mask : static_cast<int32_t>(mask + before);
    before += static_cast<int64_t>(band.masks.size()) / (words * block_n);
  }
  return {block_counts, blocks, column_counts, columns, ids, bits};
}

}  // namespace sparse_attn::ops
