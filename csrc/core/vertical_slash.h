// SPDX-License-Identifier: Apache-2.0
// From the vertical and slash indices of a head to the blocks and columns of its query tiles. The
// rule is that of sparse_attn/patterns/slash_lists.py, which runs it on other devices; there it is
// stated whole. Slashes lie on an axis u = key - (first position of the tile) + origin that is the
// same for all tiles: bands are merged and cut into blocks once a head, then shifted.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace sparse_attn {

struct SlashShape {
  int64_t seqlen_q, seqlen_k, q_offset;
  int64_t block_m, block_n;
  bool causal;

  int64_t tiles() const { return (seqlen_q + block_m - 1) / block_m; }
  // Fewer covered keys than this are cheaper as columns than as a block.
  int64_t short_run() const { return std::max<int64_t>(1, block_n / 4); }
};

struct SlashLayout {
  int64_t origin = 0;
  std::vector<int32_t> starts;   // first u of every block, ascending
  std::vector<int32_t> singles;  // covered u outside every block, ascending
  std::vector<int32_t> last;     // last covered u not past each u, -1 if none
  std::vector<uint8_t> taken;    // u in a block or covered
};

// `slashes` marks the chosen distances, [distances].
inline SlashLayout slash_layout(const bool* slashes, int64_t distances, const SlashShape& shape) {
  SlashLayout layout;
  // Distances past the last row's position reach no key; one at least keeps the axis non-empty.
  distances = std::min(distances, std::max<int64_t>(1, shape.seqlen_q + shape.q_offset));
  layout.origin = std::max<int64_t>(distances, 1) - 1;
  const int64_t length = layout.origin + shape.block_m;
  const auto none = static_cast<int32_t>(-1);
  layout.last.assign(length + shape.block_n, none);
  layout.taken.assign(length + shape.block_n, 0);
  std::vector<uint8_t>& covered = layout.taken;
  int64_t covered_to = 0;  // covered up to here by what has been marked
  for (int64_t s = distances - 1; s >= 0; --s) {
    if (!slashes[s]) continue;
    const int64_t begin = layout.origin - s;
    for (int64_t u = std::max(begin, covered_to); u < begin + shape.block_m; ++u) covered[u] = 1;
    covered_to = begin + shape.block_m;
  }
  int32_t last = none;
  for (size_t u = 0; u < covered.size(); ++u) {
    if (covered[u]) last = static_cast<int32_t>(u);
    layout.last[u] = last;
  }
  for (int64_t u = 0; u < length;) {
    if (!covered[u]) {
      ++u;
      continue;
    }
    int64_t end = u;
    while (end < length && covered[end]) ++end;
    if (end - u >= shape.short_run()) {
      layout.starts.push_back(static_cast<int32_t>(u));
      u += shape.block_n;
    } else {
      for (; u < end; ++u) layout.singles.push_back(static_cast<int32_t>(u));
    }
  }
  for (const int32_t start : layout.starts)
    std::fill(covered.begin() + start, covered.begin() + start + shape.block_n, uint8_t{1});
  return layout;
}

// Appends one tile's lists. `verticals` is ascending; entries past the keys are ignored.
inline void append_tile(const SlashLayout& layout, const SlashShape& shape,
                        const int32_t* verticals, int64_t num_verticals, int64_t tile,
                        std::vector<int32_t>& blocks, std::vector<int32_t>& columns) {
  const int64_t first = tile * shape.block_m + shape.q_offset;
  int64_t limit = shape.seqlen_k - 1;
  if (shape.causal)
    limit = std::min({first + shape.block_m - 1, shape.seqlen_q - 1 + shape.q_offset, limit});
  const int64_t shift = first - layout.origin;  // key = u + shift
  const auto length = static_cast<int64_t>(layout.taken.size());
  const auto begin = layout.starts.begin(), end = layout.starts.end();
  auto block = std::upper_bound(begin, end, -shape.block_n - shift);  // ends after key 0

  // At most one block straddles key 0: `edge` is where it ends, `head` where what is covered of
  // it ends. It becomes a block at 0 if there is room and enough to cover, and columns if not.
  int64_t edge = 0, head = 0;
  if (block != end && *block + shift < 0) {
    edge = *block + shift + shape.block_n;
    const int64_t u = std::clamp<int64_t>(std::min(edge - 1, limit) - shift, 0, length - 1);
    head = std::clamp<int64_t>(layout.last[u] + 1 + shift, 0, std::max<int64_t>(limit + 1, 0));
    ++block;
  }
  const bool room = block == end || *block + shift >= shape.block_n || *block + shift > limit;
  const bool as_block = head >= shape.short_run() && room;
  if (as_block) blocks.push_back(0);
  for (; block != end && *block + shift <= limit; ++block)
    blocks.push_back(static_cast<int32_t>(*block + shift));

  int64_t front = as_block ? shape.block_n : head;  // keys below are in that block or prefix
  for (int64_t key = 0; key < (as_block ? 0 : head); ++key)
    columns.push_back(static_cast<int32_t>(key));
  const auto low = static_cast<int32_t>(std::min<int64_t>(front, INT32_MAX));
  const int32_t* vertical = std::lower_bound(verticals, verticals + num_verticals, low);
  const int32_t* last_vertical = verticals + num_verticals;
  auto single = std::lower_bound(layout.singles.begin(), layout.singles.end(), front - shift);
  while (true) {
    const int64_t v = vertical != last_vertical ? *vertical : INT64_MAX;
    const int64_t s = single != layout.singles.end() ? *single + shift : INT64_MAX;
    if (std::min(v, s) > limit) break;
    if (s < v) {
      columns.push_back(static_cast<int32_t>(s));
      ++single;
      continue;
    }
    const int64_t u = v - shift;
    const bool taken = v >= edge && u >= 0 && u < length && layout.taken[u];
    if (!taken) columns.push_back(static_cast<int32_t>(v));
    ++vertical;
  }
}

// The same at element level: row p sees key j only if j is a vertical or p - j a chosen distance.
// Blocks carry row-validity bits, which on the u axis do not depend on the tile either: row r sees
// u iff the distance origin - u + r is chosen.
struct ExactLayout {
  int64_t origin = 0;
  std::vector<int32_t> next;  // first covered u at or after each u; its size if none
  std::vector<uint64_t>
      bits;  // distance s is bit s + lead; as causality hides s < 0, those are set
  int64_t lead = 0;
};

inline ExactLayout exact_layout(const bool* slashes, int64_t distances, const SlashShape& shape) {
  ExactLayout layout;
  distances = std::min(distances, std::max<int64_t>(1, shape.seqlen_q + shape.q_offset));
  layout.origin = std::max<int64_t>(distances, 1) - 1;
  const auto length = static_cast<int32_t>(layout.origin + shape.block_m);
  std::vector<uint8_t> covered(length, 0);
  layout.lead = shape.block_m + shape.block_n;
  layout.bits.assign((distances + layout.lead + shape.block_m) / 64 + 2, 0);
  const auto set = [&](int64_t bit) { layout.bits[bit / 64] |= uint64_t{1} << (bit % 64); };
  for (int64_t bit = 0; shape.causal && bit < layout.lead; ++bit) set(bit);
  int64_t covered_to = 0;
  for (int64_t s = distances - 1; s >= 0; --s) {
    if (!slashes[s]) continue;
    set(s + layout.lead);
    const int64_t begin = layout.origin - s;
    for (int64_t u = std::max(begin, covered_to); u < begin + shape.block_m; ++u) covered[u] = 1;
    covered_to = begin + shape.block_m;
  }
  layout.next.assign(length + 1, length);
  for (int32_t u = length - 1; u >= 0; --u) layout.next[u] = covered[u] ? u : layout.next[u + 1];
  return layout;
}

// A band of tiles' lists. Masks are [count][block_n][words]; equal ones of a band are shared.
struct ExactLists {
  std::vector<int32_t> blocks, block_masks, columns;
  std::vector<uint64_t> masks;
  std::vector<int32_t> mask_at;  // by the u of a block's first key: its mask, kUnknown if not made
  static constexpr int32_t kUnknown = -2;

  explicit ExactLists(const ExactLayout& layout) : mask_at(layout.next.size(), kUnknown) {}
};

namespace detail {

// Appends the mask of the block that begins at u = first, whose keys in [vertical, end) are seen
// by all rows; returns its number, or -1 if every row sees every key.
inline int32_t append_mask(const ExactLayout& layout, const SlashShape& shape, int64_t first,
                           int64_t first_key, const int32_t* vertical, const int32_t* end,
                           std::vector<uint64_t>& masks) {
  const int64_t words = (shape.block_m + 63) / 64;
  const auto number = static_cast<int32_t>(masks.size() / (words * shape.block_n));
  bool all = true;
  for (int64_t key = 0; key < shape.block_n; ++key) {
    const bool is_vertical = vertical != end && *vertical == first_key + key;
    if (is_vertical) ++vertical;
    for (int64_t word = 0; word < words; ++word) {
      const int64_t rows = std::min<int64_t>(shape.block_m - word * 64, 64);
      const uint64_t every = rows == 64 ? ~uint64_t{0} : (uint64_t{1} << rows) - 1;
      uint64_t seen = every;
      if (!is_vertical) {
        const int64_t bit = layout.origin - first - key + word * 64 + layout.lead;
        seen = layout.bits[bit / 64] >> (bit % 64);
        if (bit % 64 != 0) seen |= layout.bits[bit / 64 + 1] << (64 - bit % 64);
        seen &= every;
      }
      all = all && seen == every;
      masks.push_back(seen);
    }
  }
  if (!all) return number;
  masks.resize(number * words * shape.block_n);
  return -1;
}

}  // namespace detail

// As append_tile, at element level: verticals inside a block are bits of it.
inline void append_exact_tile(const ExactLayout& layout, const SlashShape& shape,
                              const int32_t* verticals, int64_t num_verticals, int64_t tile,
                              ExactLists& to) {
  const int64_t first = tile * shape.block_m + shape.q_offset;
  int64_t limit = shape.seqlen_k - 1;
  if (shape.causal)
    limit = std::min({first + shape.block_m - 1, shape.seqlen_q - 1 + shape.q_offset, limit});
  const int64_t shift = first - layout.origin;  // key = u + shift
  const auto length = static_cast<int64_t>(layout.next.size()) - 1;
  const int32_t* vertical = std::lower_bound(verticals, verticals + num_verticals, 0);
  const int32_t* last_vertical =
      std::upper_bound(vertical, verticals + num_verticals, std::max<int64_t>(limit, -1));
  int64_t u = std::max<int64_t>(-shift, 0);
  while (true) {
    u = u < length ? layout.next[u] : length;
    const int64_t key = u < length && u + shift <= limit ? u + shift : INT64_MAX;
    for (; vertical != last_vertical && *vertical < key; ++vertical)
      to.columns.push_back(*vertical);
    if (key == INT64_MAX) break;
    const int32_t* inside = vertical;
    while (vertical != last_vertical && *vertical < key + shape.block_n) ++vertical;
    int32_t mask = inside == vertical ? to.mask_at[u] : ExactLists::kUnknown;
    if (mask == ExactLists::kUnknown) {
      mask = detail::append_mask(layout, shape, u, key, inside, vertical, to.masks);
      if (inside == vertical) to.mask_at[u] = mask;
    }
    to.blocks.push_back(static_cast<int32_t>(key));
    to.block_masks.push_back(mask);
    u += shape.block_n;
  }
}

}  // namespace sparse_attn
