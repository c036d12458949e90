// SPDX-License-Identifier: Apache-2.0
// From the leaves that every query tile chose to the lists of an index in which each row sees
//
//   key < sink,  a key of a chosen leaf,  and the keys p - window < key <= p  (p its position).
//
// Causality is the kernel's. All rows of a tile see the keys of the first two kinds, and of the
// third those from its last row's window on. The keys before them, from the first row's window on
// (the edge), are seen by the first few rows only: blocks with row bits. Key j of the edge is seen
// by the rows r < j - p0 + window, with p0 the first row's position, so that all tiles share one
// set of masks, but for those whose leaves or sinks reach into the edge.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace sparse_attn {

struct LeafShape {
  int64_t seqlen_q, seqlen_k, q_offset, block_m, block_n, leaf, sink, window;

  int64_t tiles() const { return (seqlen_q + block_m - 1) / block_m; }
  int64_t words() const { return (block_m + 63) / 64; }
  // Blocks of the edge, and so masks that tiles share.
  int64_t edge_blocks() const { return window > 0 ? (block_m - 1 + block_n - 1) / block_n : 0; }
};

struct LeafLists {
  std::vector<int32_t> blocks, mask_ids, columns;
  std::vector<int64_t> masks;  // own ones [n, block_n, words]; their ids count from edge_blocks()
};

struct KeyRun {
  int64_t begin, end;
};

// The rows of word w that see key j by their window alone.
inline int64_t window_bits(const LeafShape& s, int64_t first_position, int64_t key, int64_t word) {
  const int64_t rows = key - first_position + s.window - 64 * word;
  if (rows >= 64) return -1;
  return rows <= 0 ? 0 : static_cast<int64_t>((uint64_t{1} << rows) - 1);
}

// The masks that tiles share, for an edge that begins at the first key of the first row's window.
inline std::vector<int64_t> shared_masks(const LeafShape& s) {
  std::vector<int64_t> masks;
  for (int64_t i = 0; i < s.edge_blocks() * s.block_n; ++i)
    for (int64_t w = 0; w < s.words(); ++w) masks.push_back(window_bits(s, s.window - 1, i, w));
  return masks;
}

// Sinks, leaves and the window that all rows share, as disjoint ascending runs below `end`.
inline void key_runs(const LeafShape& s, const int32_t* leaves, int64_t count, int64_t window_begin,
                     int64_t end, std::vector<KeyRun>& runs) {
  runs.clear();
  const auto add = [&](int64_t begin, int64_t run_end) {
    run_end = std::min(run_end, end);
    if (!runs.empty() && begin <= runs.back().end) {
      runs.back().end = std::max(runs.back().end, run_end);
    } else if (begin < run_end) {
      runs.push_back({begin, run_end});
    }
  };
  add(0, s.sink);
  for (int64_t i = 0; i < count && leaves[i] < window_begin; ++i)
    if (leaves[i] >= 0) add(leaves[i], leaves[i] + s.leaf);
  add(window_begin, end);
}

// Blocks from the run's begin, then single keys. Past `end` no row sees a key: there a block may
// run over.
inline void append_run(const LeafShape& s, KeyRun run, int64_t end, LeafLists& out) {
  for (; run.begin + s.block_n <= run.end || (run.end == end && run.begin < end);
       run.begin += s.block_n) {
    out.blocks.push_back(static_cast<int32_t>(run.begin));
    out.mask_ids.push_back(-1);
  }
  for (; run.begin < run.end; ++run.begin) out.columns.push_back(static_cast<int32_t>(run.begin));
}

// The edge's blocks from `begin`; `shared` says whether their masks are the shared ones, as long
// as no run reaches into them.
inline void append_edge(const LeafShape& s, int64_t first_position, int64_t begin, int64_t blocks,
                        int64_t window_begin, bool shared, const std::vector<KeyRun>& runs,
                        LeafLists& out) {
  const int64_t words = s.words();
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t start = begin + i * s.block_n;
    const int64_t edge_end = std::min(start + s.block_n, window_begin);
    out.blocks.push_back(static_cast<int32_t>(start));
    const bool reached = std::any_of(runs.begin(), runs.end(), [&](const KeyRun& run) {
      return run.begin < edge_end && run.end > start;
    });
    if (shared && !reached) {
      out.mask_ids.push_back(static_cast<int32_t>(i));
      continue;
    }
    const size_t at = out.masks.size();
    out.mask_ids.push_back(
        static_cast<int32_t>(s.edge_blocks() + static_cast<int64_t>(at) / (s.block_n * words)));
    out.masks.resize(at + s.block_n * words);
    for (int64_t key = 0; key < s.block_n; ++key)
      for (int64_t w = 0; w < words; ++w)
        out.masks[at + key * words + w] = window_bits(s, first_position, start + key, w);
    for (const KeyRun& run : runs)
      for (int64_t key = std::max(run.begin, start); key < std::min(run.end, edge_end); ++key)
        std::fill_n(out.masks.begin() + at + (key - start) * words, words, int64_t{-1});
  }
}

// Appends one tile's lists. `runs` is working space.
inline void append_leaf_tile(const LeafShape& s, int64_t tile, const int32_t* leaves, int64_t count,
                             std::vector<KeyRun>& runs, LeafLists& out) {
  const int64_t first = tile * s.block_m + s.q_offset;
  const int64_t last = std::min((tile + 1) * s.block_m, s.seqlen_q) - 1 + s.q_offset;
  const int64_t end = std::clamp<int64_t>(last + 1, 0, s.seqlen_k);
  const auto window_of = [&](int64_t p) {
    return s.window == 0 ? end : std::clamp<int64_t>(p - s.window + 1, 0, end);
  };
  const int64_t edge = window_of(first), window = window_of(last);
  const int64_t blocks = (window - edge + s.block_n - 1) / s.block_n;
  key_runs(s, leaves, count, window, end, runs);
  // Without an edge no run is cut.
  const int64_t before = blocks > 0 ? edge : end;
  const int64_t after = blocks > 0 ? edge + blocks * s.block_n : end;
  for (const KeyRun& run : runs)
    if (run.begin < before) append_run(s, {run.begin, std::min(run.end, before)}, end, out);
  append_edge(s, first, edge, blocks, window, edge == first - s.window + 1, runs, out);
  for (const KeyRun& run : runs)
    if (run.end > after) append_run(s, {std::max(run.begin, after), run.end}, end, out);
}

}  // namespace sparse_attn
