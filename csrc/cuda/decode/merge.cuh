// SPDX-License-Identifier: Apache-2.0
// Merges the pieces of tiles that several CTAs shared, and lets the sink take part. A warp a row:
// lse = log2(2^sink + sum_i 2^lse_i), out = sum_i 2^(lse_i - lse) out_i.
#pragma once

#include "kernel.cuh"

namespace sparse_attn::cuda {

constexpr int kMergeThreads = 128;

// Grid: tiles, then groups of four of a tile's rows.
template <class Element>
__global__ void __launch_bounds__(kMergeThreads) decode_merge(const DecodeParams p) {
  const AttentionParams& call = p.call;
  const int64_t id = blockIdx.x;
  const int lane = threadIdx.x % 32;
  const int r = blockIdx.y * (kMergeThreads / 32) + threadIdx.x / 32;
  const int64_t begin = p.first_chunk[id], end = p.first_chunk[id + 1];
  const int64_t share = p.first_chunk[p.tiles + 1];
  if (end <= begin) return;
  const int64_t first = begin / share, last = (end - 1) / share - (fault(23) ? 1 : 0);
  if (first == (end - 1) / share) return;  // one CTA had it whole
  const DeviceSequence sequence = sequence_of(p, id);
  const DecodeTile tile = decode_tile(p, id, sequence);
  if (r >= tile.rows) return;
  const int32_t head = tile.first_head + (tile.begin + r) / tile.rows_per_head;
  const int64_t row = sequence.q_start + tile.first_row + (tile.begin + r) % tile.rows_per_head;

  // CTA c's piece of a tile that began before it is its first, else its second.
  const auto slot = [&](int64_t c) {
    return (2 * c + (begin >= c * share ? 1 : 0)) * p.tile_rows + r;
  };
  const float sink = call.sinks != nullptr ? call.sinks[head] * kLog2e : -INFINITY;
  float top = sink;
  for (int64_t c = first + lane; c <= last; c += 32) top = fmaxf(top, p.piece_lse[slot(c)]);
  for (int offset = 16; offset > 0; offset /= 2)
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
  if (fault(33)) top = p.piece_lse[slot(first)];
  const float base = top == -INFINITY ? 0.0f : top;

  float sum = exp2_fast(sink - base);
  float out[8] = {};  // columns lane + 32 j
  for (int64_t c = first; c <= last; ++c) {
    const float lse = p.piece_lse[slot(c)];
    const float weight = fault(34) ? 1.0f : exp2_fast(lse - base);
    sum += weight;
    const float* piece = p.piece_out + slot(c) * call.head_dim_v;
    CUTE_UNROLL
    for (int j = 0; j < 8; ++j)
      if (lane + 32 * j < call.head_dim_v) out[j] += weight * piece[lane + 32 * j];
  }
  const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
  Element* to = row_of<Element>(call.out, sequence.batch, head, row);
  CUTE_UNROLL
  for (int j = 0; j < 8; ++j)
    if (lane + 32 * j < call.head_dim_v) to[lane + 32 * j] = Element(out[j] * factor);
  if (lane == 0)
    call.lse[(sequence.batch * call.num_heads + head) * call.seqlen_q + row] =
        sum == 0.0f ? -INFINITY : (top + log2f(sum)) * kLn2;
}

}  // namespace sparse_attn::cuda
