// SPDX-License-Identifier: Apache-2.0
// D[64, 64] = A[64, K] B[64, K]^T in bf16 with f32 accumulators: a producer warp loads tiles of K
// by TMA into a ring of two stages, a warpgroup multiplies them by wgmma. `kFault` leaves one
// synchronisation out.
#include <cstdint>

enum Fault { kNone, kNoFullWait, kNoEmptyWait, kEarlyRelease, kNoFinalWait, kNoFence, kWrongBytes };

struct alignas(64) TensorMap {
  char bytes[128];
};

constexpr int kStages = 2, kTile = 64;
constexpr uint32_t kTileBytes = kTile * kTile * 2;

__device__ uint32_t address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ void init(uint64_t* bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(bar)), "r"(count));
}

__device__ void expect(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(bar)),
               "r"(bytes)
               : "memory");
}

__device__ void arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(bar)) : "memory");
}

__device__ void wait(uint64_t* bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(address(bar)),
      "r"(parity)
      : "memory");
}

__device__ void load(void* tile, const TensorMap* map, int x, int y, uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(address(tile)),
      "l"(map), "r"(x), "r"(y), "r"(address(bar))
      : "memory");
}

/// A K-major tile of 64 rows of 128 bytes, 128-byte swizzle.
__device__ uint64_t descriptor(const void* tile, int byte_offset) {
  const uint64_t start = (address(tile) + byte_offset) >> 4;
  return (start & 0x3fff) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
__device__ void multiply(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, 0, 0;\n}"
      : D4(0), D4(4), D4(8), D4(12), D4(16), D4(20), D4(24), D4(28)
      : "l"(a), "l"(b), "r"(accumulate));
}

struct Shared {
  alignas(1024) uint16_t a[kStages][kTile * kTile], b[kStages][kTile * kTile];
  uint64_t full[kStages], empty[kStages];
};

template <int kFault>
__device__ void produce(Shared& s, const TensorMap* map_a, const TensorMap* map_b, int steps) {
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    if (kFault != kNoEmptyWait) wait(&s.empty[stage], (step / kStages & 1) ^ 1);
    expect(&s.full[stage], 2 * kTileBytes + (kFault == kWrongBytes ? 16 : 0));
    load(s.a[stage], map_a, step * kTile, 0, &s.full[stage]);
    load(s.b[stage], map_b, step * kTile, 0, &s.full[stage]);
  }
}

template <int kFault>
__device__ void consume(Shared& s, float* out, int steps) {
  float d[32];
  for (float& x : d) x = 0;
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    if (kFault != kNoFullWait) wait(&s.full[stage], step / kStages & 1);
    if (kFault != kNoFence) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int k = 0; k < kTile / 16; ++k)
      multiply(d, descriptor(s.a[stage], 32 * k), descriptor(s.b[stage], 32 * k), 1);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    const bool last = step + 1 == steps;
    if (kFault == kNoFinalWait && last) break;
    if (kFault == kEarlyRelease && !last)
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    else
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    arrive(&s.empty[stage]);
  }
  const int t = threadIdx.x, row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
  for (int i = 0; i < 32; ++i)
    out[(row + i / 2 % 2 * 8) * kTile + i / 4 * 8 + column + i % 2] = d[i];
}

template <int kFault>
__global__ void __launch_bounds__(160)
    gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
         float* out, int steps) {
  extern __shared__ __align__(1024) char storage[];
  Shared& s = *reinterpret_cast<Shared*>(storage);
  if (threadIdx.x == 0)
    for (int i = 0; i < kStages; ++i) init(&s.full[i], 1), init(&s.empty[i], 128);
  __syncthreads();
  if (threadIdx.x < 128)
    consume<kFault>(s, out, steps);
  else if (threadIdx.x == 128)
    produce<kFault>(s, &map_a, &map_b, steps);
}

#define INSTANCE(fault)                                                   \
  template __global__ void gemm<fault>(const __grid_constant__ TensorMap, \
                                       const __grid_constant__ TensorMap, float*, int);
INSTANCE(kNone)
INSTANCE(kNoFullWait)
INSTANCE(kNoEmptyWait)
INSTANCE(kEarlyRelease)
INSTANCE(kNoFinalWait)
INSTANCE(kNoFence)
INSTANCE(kWrongBytes)
