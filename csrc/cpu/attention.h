// SPDX-License-Identifier: Apache-2.0
// Attention over a SparseIndex on the CPU: schedule, list checks, split keys and merging.
#pragma once

#include <cstdint>
#include <functional>

#include "../core/index_check.h"
#include "../core/types.h"

namespace sparse_attn::cpu {

// Threads come from the caller. run(n, work) calls work(i) once for each i < n, possibly at the
// same time; num_threads is how many of them can be.
struct Executor {
  int num_threads;
  std::function<void(int64_t, const std::function<void(int64_t)>&)> run;
};

// Both return the first fault found in the index, in which case the results are unspecified.
IndexFault attention_forward(const AttentionParams& params, const Executor& executor);
IndexFault attention_backward(const BackwardParams& params, const Executor& executor);

}  // namespace sparse_attn::cpu
