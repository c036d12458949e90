// SPDX-License-Identifier: Apache-2.0
// Chooses an instruction set at run time; the only place that asks the CPU what it can do.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace sparse_attn::cpu {

extern const Kernels scalar_kernels;
#if defined(__x86_64__)
extern const Kernels avx512_bf16_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx2_kernels;
#elif defined(__aarch64__)
extern const Kernels neon_kernels;
#endif

namespace {

#if defined(SPARSE_ATTN_EMULATE_AVX512)
constexpr bool kEmulated = true;  // the AVX-512 tables are made of AVX2 code, slow, for tests
#else
constexpr bool kEmulated = false;
#endif

struct Candidate {
  const Kernels* table;
  bool runs_here;
  bool only_by_name = false;
};

struct Candidates {
  Candidate list[4];
  int count;
};

Candidates candidates() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  return {{{&avx512_bf16_kernels, kEmulated ? avx2 : bf16, kEmulated},
           {&avx512_kernels, kEmulated ? avx2 : avx512, kEmulated},
           {&avx2_kernels, avx2},
           {&scalar_kernels, true}},
          4};
#elif defined(__aarch64__)
  return {{{&neon_kernels, true}, {&scalar_kernels, true}}, 2};
#else
  return {{{&scalar_kernels, true}}, 1};
#endif
}

}  // namespace

const Kernels& kernels() {
  static const Candidates all = candidates();
  const char* forced = std::getenv("SPARSE_ATTN_CPU_CAPABILITY");
  std::string known;
  for (int i = 0; i < all.count; ++i) {
    const Candidate& c = all.list[i];
    if (forced == nullptr || *forced == '\0') {
      if (c.runs_here && !c.only_by_name) return *c.table;
    } else if (std::string(forced) == c.table->name) {
      if (c.runs_here) return *c.table;
      throw std::runtime_error("SPARSE_ATTN_CPU_CAPABILITY=" + std::string(forced) +
                               ": this CPU lacks these instructions");
    }
    known += (known.empty() ? "" : ", ") + std::string(c.table->name);
  }
  throw std::runtime_error("SPARSE_ATTN_CPU_CAPABILITY=" + std::string(forced) +
                           " is unknown; known: " + known);
}

}  // namespace sparse_attn::cpu
