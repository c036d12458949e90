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
// number, those of fault(number) in the kernels. Everywhere else they cost nothing.
#if defined(SPARSE_ATTN_FAULTS) && defined(__CUDACC__)
static __device__ int seeded_fault;
__device__ inline bool fault(int number) {
  return seeded_fault == number;
}
inline cudaError_t seed_fault() {
  const char* number = std::getenv("SPARSE_ATTN_FAULT");
  const int value = number == nullptr ? 0 : std::atoi(number);
  return cudaMemcpyToSymbol(seeded_fault, &value, sizeof value);
}
#else
constexpr bool fault(int) {
  return false;
}
constexpr cudaError_t seed_fault() {
  return cudaSuccess;
}
#endif

struct DeviceCall {
  AttentionParams call;  // `sequences` is not used
  const int32_t* seq_ranges =
      nullptr;            // [num_sequences, 5] q_start, q_len, k_start, k_len, q_offset
  int64_t q_offset = 0;   // without seq_ranges
  int64_t batch = 0;      // of q; 1 with ranges: all sequences in one entry
  int64_t num_pages = 0;  // of k and v, with a block table
  int32_t max_q_len = 0;  // rows of a sequence at most; longer ones count as empty
};

#ifdef __CUDACC__
#define SPARSE_ATTN_HOST_DEVICE __host__ __device__
#else
#define SPARSE_ATTN_HOST_DEVICE
#endif

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
