// SPDX-License-Identifier: Apache-2.0
// The order of all choices: score descending, then index ascending; a NaN counts as -inf.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace sparse_attn::cpu {

// Orders as a float does, in unsigned integers; greater is better. A NaN counts as -inf.
inline uint32_t rank_of(float score) {
  if (std::isnan(score)) score = -INFINITY;
  if (score == 0.0f) score = 0.0f;  // -0 equals 0
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// One integer that sorts a score and its index, better first: the order is total.
inline uint64_t rank_key(float score, int64_t index) {
  return (uint64_t{~rank_of(score)} << 32) | static_cast<uint64_t>(index);
}

// Leaves in `items` the `count` of best score_of(item), in the order they had.
template <class Item, class ScoreOf>
void keep_best(std::vector<Item>& items, int64_t count, std::vector<uint64_t>& order,
               ScoreOf score_of) {
  const int64_t n = static_cast<int64_t>(items.size());
  if (n <= count) return;
  if (count == 0) return items.clear();
  order.resize(n);
  for (int64_t i = 0; i < n; ++i) order[i] = rank_key(score_of(items[i]), i);
  std::nth_element(order.begin(), order.begin() + count - 1, order.end());
  const uint64_t last = order[count - 1];
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i)
    if (rank_key(score_of(items[i]), i) <= last) items[kept++] = items[i];
  items.resize(kept);
}

}  // namespace sparse_attn::cpu
