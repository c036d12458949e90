// SPDX-License-Identifier: Apache-2.0
// Sequences and what their rows see, on the device. Nothing read from a tensor is trusted: what a
// range says out of bounds leaves a sequence empty and is never followed.
#pragma once

#include "call.h"

namespace sparse_attn::cuda {

// One sequence, bounded. Ranges that leave q or k count as empty.
struct DeviceSequence {
  int64_t batch;  // of q and out; of k and v too without pages
  int64_t q_start, k_start, q_offset;
  int32_t q_len, k_len;
};

__device__ inline int64_t bounded(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

__device__ inline int32_t clamp_key(int64_t key, int32_t k_len) {
  return static_cast<int32_t>(bounded(key, 0, k_len));
}

__device__ inline DeviceSequence device_sequence(const DeviceCall& p, int64_t s) {
  const AttentionParams& call = p.call;
  if (p.seq_ranges == nullptr)
    return {s,
            0,
            0,
            p.q_offset,
            static_cast<int32_t>(call.seqlen_q),
            static_cast<int32_t>(call.seqlen_k)};
  const int32_t* range = p.seq_ranges + s * 5;
  const int64_t q_start = range[0], q_len = range[1], k_start = range[2], k_len = range[3];
  const bool q_fits =
      q_start >= 0 && q_len >= 0 && q_len <= p.max_q_len && q_start + q_len <= call.seqlen_q;
  const bool k_fits = k_start >= 0 && k_len >= 0 && k_start + k_len <= call.seqlen_k;
  // As many sequences as batch entries: one each. All in one entry: packed.
  return {p.batch == 1 ? 0 : s,
          q_start,
          k_start,
          range[4],
          static_cast<int32_t>(q_fits ? q_len : 0),
          static_cast<int32_t>(k_fits ? k_len : 0)};
}

// kind, sink, window, dense_tail of a head of the index.
__device__ inline const int32_t* head_row(const DeviceCall& p, int32_t index_head) {
  return p.call.index.heads + int64_t{index_head} * 4;
}

// The keys [lo, hi) of a window that a row sees, and those [0, outer_hi) that causality leaves it.
struct RowWindow {
  int32_t outer_hi, lo, hi;
};

__device__ inline RowWindow row_window(const DeviceCall& p, const DeviceSequence& s,
                                       const int32_t* head, int32_t row) {
  const int64_t position = row + s.q_offset;
  RowWindow w;
  w.outer_hi = p.call.causal ? clamp_key(position + 1, s.k_len) : s.k_len;
  if (head[0] != kStreaming) return {w.outer_hi, 0, w.outer_hi};
  const int32_t window = head[2];
  const bool dense = row >= int64_t{s.q_len} - head[3];
  w.lo = dense ? 0 : clamp_key(position - window + 1, s.k_len);
  w.hi = dense || p.call.causal ? w.outer_hi : clamp_key(position + window, s.k_len);
  if (window <= 0 && !dense) w.lo = w.hi = 0;
  return w;
}

}  // namespace sparse_attn::cuda
