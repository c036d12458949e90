// SPDX-License-Identifier: Apache-2.0
// Selection on the CPU: scores and choices that index builders are composed of.
#pragma once

#include <cstdint>

#include "attention.h"

namespace sparse_attn::cpu {

// Where window_scores writes.
struct WindowOutput {
  float* columns;    // [batch, num_heads, seqlen_k]
  float* diagonals;  // [batch, num_heads, distances]
  int64_t distances;
  bool maximum;  // over the rows; else the sum
};

// Sums or maxima of the probabilities of the last `rows` query rows, over every key column and
// along every diagonal. params: q, k and the numbers of one dense call (v and out unused).
void window_scores(const AttentionParams& params, int64_t rows, int64_t q_offset,
                   const WindowOutput& to, const Executor& executor);

// Indices of the k best of every row of scores [rows, n], ascending: indices [rows, k], k <= n.
// Score descending, then index ascending; a NaN counts as -inf.
void top_k(const float* scores, int64_t rows, int64_t n, int64_t k, int32_t* indices,
           const Executor& executor);

}  // namespace sparse_attn::cpu
