// SPDX-License-Identifier: Apache-2.0
// A program that checks itself, through the runtime calls that launchers use. It prints one line a
// check; its exit status is the number of failed ones.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <vector>

__device__ int counter;
__constant__ float scale[2];

__global__ void scale_all(float* x, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    x[i] = x[i] * scale[0] + scale[1];
    atomicAdd(&counter, 1);
  }
}

template <int kThreads>
__global__ void block_sums(const float* x, float* sums) {
  extern __shared__ float partial[];
  float v = x[blockIdx.x * kThreads + threadIdx.x];
  for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / 32; ++w) v += partial[w];
    sums[blockIdx.x] = v;
  }
}

__global__ void out_of_bounds(float* x, int n) {
  x[n + threadIdx.x] = 1;
}

__global__ void racy(int* out) {
  __shared__ int s[64];
  s[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = s[63 - threadIdx.x];
}

__global__ void rank_in_cluster(int* out) {
#if __CUDA_ARCH__ >= 900
  const auto cluster = cooperative_groups::this_cluster();
  __shared__ int mine;
  if (threadIdx.x == 0) mine = 10 * blockIdx.x;
  cluster.sync();
  if (threadIdx.x == 0) {
    const unsigned other = cluster.block_rank() ^ 1;
    out[blockIdx.x] = *cluster.map_shared_rank(&mine, other);
  }
  cluster.sync();
#endif
}

static int failures = 0;
static void check(const char* what, bool right) {
  std::printf("%s: %s\n", right ? "ok" : "FAILED", what);
  failures += !right;
}

static void launches() {
  constexpr int kCount = 1000;
  std::vector<float> host(kCount, 2);
  float* device;
  check("cudaMalloc", cudaMalloc(&device, kCount * sizeof(float)) == cudaSuccess);
  cudaStream_t stream;
  cudaEvent_t event;
  cudaStreamCreate(&stream);
  cudaEventCreate(&event);
  cudaMemcpyAsync(device, host.data(), kCount * sizeof(float), cudaMemcpyHostToDevice, stream);
  const float factors[2] = {3, 0.5f};
  cudaMemcpyToSymbol(scale, factors, sizeof factors);
  const int zero = 0;
  cudaMemcpyToSymbol(counter, &zero, sizeof zero);
  scale_all<<<(kCount + 127) / 128, 128, 0, stream>>>(device, kCount);
  check("launch", cudaGetLastError() == cudaSuccess);
  cudaEventRecord(event, stream);
  cudaEventSynchronize(event);
  cudaMemcpy(host.data(), device, kCount * sizeof(float), cudaMemcpyDeviceToHost);
  int counted = 0;
  cudaMemcpyFromSymbol(&counted, counter, sizeof counted);
  check("result", host.front() == 6.5f && host.back() == 6.5f);
  check("__device__ variable", counted == kCount);
  cudaEventDestroy(event);
  cudaStreamDestroy(stream);
  check("cudaFree", cudaFree(device) == cudaSuccess);
}

static void dynamic_shared() {
  float *x, *sums;
  cudaMalloc(&x, 256 * sizeof(float));
  cudaMalloc(&sums, 2 * sizeof(float));
  std::vector<float> host(256, 1);
  cudaMemcpy(x, host.data(), 256 * sizeof(float), cudaMemcpyHostToDevice);
  constexpr int kBytes = 64 * 1024;
  block_sums<128><<<2, 128, kBytes>>>(x, sums);
  check("too much dynamic shared memory", cudaGetLastError() == cudaErrorInvalidValue);
  check("the error is gone", cudaGetLastError() == cudaSuccess);
  cudaFuncSetAttribute(block_sums<128>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  block_sums<128><<<2, 128, kBytes>>>(x, sums);
  check("cudaFuncSetAttribute", cudaGetLastError() == cudaSuccess);
  cudaMemcpy(host.data(), sums, 2 * sizeof(float), cudaMemcpyDeviceToHost);
  check("sums", host[0] == 128 && host[1] == 128);
  int blocks = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, block_sums<128>, 128, kBytes);
  check("occupancy by shared memory", blocks == 3);
  cudaFree(x);
  cudaFree(sums);
}

static void findings() {
  float* x;
  cudaMalloc(&x, 8 * sizeof(float));
  out_of_bounds<<<1, 1>>>(x, 8);
  const cudaError_t error = cudaGetLastError();
  check("out of bounds", error == cudaErrorIllegalAddress);
  check("its text", std::strstr(cudaGetErrorString(error), "past the end of cudaMalloc"));
  int* out;
  cudaMalloc(&out, 64 * sizeof(int));
  racy<<<1, 64>>>(out);
  check("a race", cudaGetLastError() == cudaErrorLaunchFailure);
  racy<<<1, 2048>>>(out);
  check("too many threads", cudaGetLastError() == cudaErrorInvalidConfiguration);
  cudaFree(x);
  cudaFree(out);
}

static void clusters() {
  int* out;
  cudaMalloc(&out, 4 * sizeof(int));
  cudaLaunchConfig_t config = {};
  config.gridDim = 4;
  config.blockDim = 32;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = 2;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check("cudaLaunchKernelEx", cudaLaunchKernelEx(&config, rank_in_cluster, out) == cudaSuccess);
  int host[4] = {};
  cudaMemcpy(host, out, sizeof host, cudaMemcpyDeviceToHost);
  check("distributed shared memory",
        host[0] == 10 && host[1] == 0 && host[2] == 30 && host[3] == 20);
  cudaFree(out);
}

int main() {
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  check("device", major == 9);
  launches();
  dynamic_shared();
  findings();
  clusters();
  return failures;
}
