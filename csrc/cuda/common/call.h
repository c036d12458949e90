// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels are told of a call. Every pointer is of the device: nothing that lies in a
// tensor is known to the host, so that a call needs no synchronisation.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>

#include "../../core/types.h"

namespace sparse_attn::cuda {

// Test builds compile faults in, of which SPARSE_ATTN_FAULT in the environment seeds one by its
// number: that of fault(number) in the kernels, or of host_fault(number) in what launches them.
// Everywhere else they cost nothing.
#if defined(SPARSE_ATTN_FAULTS) && defined(__CUDACC__)
static __device__ int seeded_fault;
__device__ inline bool fault(int number) {
  return seeded_fault == number;
}
inline int chosen_fault() {
  const char* number = std::getenv("SPARSE_ATTN_FAULT");
  return number == nullptr ? 0 : std::atoi(number);
}
inline bool host_fault(int number) {
  return chosen_fault() == number;
}
inline cudaError_t seed_fault(cudaStream_t stream) {
  static int value;  // a graph copies it when it is launched
  value = chosen_fault();
  return cudaMemcpyToSymbolAsync(seeded_fault, &value, sizeof value, 0, cudaMemcpyHostToDevice,
                                 stream);
}
#else
constexpr bool fault(int) {
  return false;
}
constexpr bool host_fault(int) {
  return false;
}
constexpr cudaError_t seed_fault(cudaStream_t) {
  return cudaSuccess;
}
#endif

#ifdef __CUDACC__
#define SPARSE_ATTN_HOST_DEVICE __host__ __device__
#else
#define SPARSE_ATTN_HOST_DEVICE
#endif

struct DeviceCall {
  AttentionParams call;  // `sequences` is not used
  const int32_t* seq_ranges =
      nullptr;            // [num_sequences, 5] q_start, q_len, k_start, k_len, q_offset
  int64_t q_offset = 0;   // without seq_ranges
  int64_t batch = 0;      // of q; 1 with ranges: all sequences in one entry
  int64_t num_pages = 0;  // of k and v, with a block table
  int32_t max_q_len = 0;  // rows of a sequence at most; longer ones count as empty
  // What follows is derived, by plan_runs.
  bool runs = false;        // whether any chunk may count as a run (runs.cuh)
  int32_t page_rows = 0;    // rows from a page to the next, with a block table
  int32_t k_row_bytes = 0;  // from a row to the next
  int32_t v_row_bytes = 0;
};

// Whether logits are scores times a positive number.
SPARSE_ATTN_HOST_DEVICE inline bool scaled_only(const AttentionParams& call) {
  return call.softcap == 0.0f && call.softmax_scale > 0.0f;
}

// Runs need one number for the place of a row, the same for k and v, strides of 32 bits, and
// logits that are scores times a positive number.
inline void plan_runs(DeviceCall& p) {
  const AttentionParams& call = p.call;
  constexpr int64_t kMost = INT32_MAX;
  const int64_t k_row = call.k.row_stride, v_row = call.v.row_stride;
  int64_t rows = call.seqlen_k;
  p.runs =
      scaled_only(call) && k_row >= 0 && v_row >= 0 && k_row * 2 <= kMost && v_row * 2 <= kMost;
  if (call.pages.block_table != nullptr && p.runs) {
    const int64_t step = k_row > 0 ? call.k.batch_stride / k_row : 0;
    p.runs = step * k_row == call.k.batch_stride && step * v_row == call.v.batch_stride;
    rows = p.runs ? step * p.num_pages + call.pages.page_size : 0;
    p.page_rows = static_cast<int32_t>(p.runs && rows <= kMost ? step : 0);
  }
  p.runs = p.runs && rows <= kMost;
  if (!p.runs) return;
  p.k_row_bytes = static_cast<int32_t>(k_row * 2);
  p.v_row_bytes = static_cast<int32_t>(v_row * 2);
}

SPARSE_ATTN_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Division of numbers below 2^31 by a constant of the call (Granlund & Montgomery, 1994).
struct FastDivisor {
  uint32_t divisor = 1;
  uint32_t multiplier = 0;
  uint32_t shift = 0;

  FastDivisor() = default;
  explicit FastDivisor(int32_t by) : divisor(static_cast<uint32_t>(by)) {
    if (by == 1) return;
    while ((uint64_t{1} << shift) < divisor) ++shift;
    const uint64_t power = uint64_t{1} << (31 + shift);
    multiplier = static_cast<uint32_t>((power + divisor - 1) / divisor);
  }
#ifdef __CUDACC__
  __device__ int32_t operator()(int32_t n) const {
    return divisor == 1 ? n
                        : static_cast<int32_t>(__umulhi(static_cast<uint32_t>(n), multiplier) >>
                                               (shift - 1));
  }
#endif
};

}  // namespace sparse_attn::cuda
