// SPDX-License-Identifier: Apache-2.0
// A program that checks itself, through the runtime calls that launchers use. It prints one line a
// check; its exit status is the number of failed ones.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cmath>
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

static void graphs() {
  constexpr int kCount = 100;
  std::vector<float> host(kCount, 2);
  float* device;
  cudaStream_t stream;
  cudaMalloc(&device, kCount * sizeof(float));
  cudaStreamCreate(&stream);
  const auto capture = [&](const char* what, cudaError_t expected, auto call) {
    cudaGraph_t graph = nullptr;
    cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
    const bool right = call() == expected;
    const bool spoilt = cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureInvalidated;
    check(what, right && spoilt == (expected != cudaSuccess) && spoilt == (graph == nullptr));
    cudaGetLastError();
    return graph;
  };
  const float factors[2] = {3, 0.5f};
  cudaMemcpyToSymbol(scale, factors, sizeof factors);
  const cudaGraph_t graph = capture("a capture", cudaSuccess, [&] {
    cudaMemcpyAsync(device, host.data(), kCount * sizeof(float), cudaMemcpyHostToDevice, stream);
    scale_all<<<1, 128, 0, stream>>>(device, kCount);
    scale_all<<<1, 128, 0, stream>>>(device, kCount);
    cudaStreamCaptureStatus status;
    cudaStreamIsCapturing(stream, &status);
    return status == cudaStreamCaptureStatusActive ? cudaGetLastError() : cudaErrorUnknown;
  });
  const auto first = [&] {
    float value = 0;
    cudaMemcpy(&value, device, sizeof value, cudaMemcpyDeviceToHost);
    return value;
  };
  cudaMemset(device, 0, kCount * sizeof(float));
  cudaGraphExec_t launched;
  cudaGraphInstantiate(&launched, graph, 0);
  cudaGraphDestroy(graph);
  check("nothing was run", first() == 0);
  cudaGraphLaunch(launched, stream);
  check("a launch", first() == 20);
  host[0] = 4;
  cudaGraphLaunch(launched, stream);
  check("another, of what is there now", first() == 38);
  cudaGraphExecDestroy(launched);

  const cudaError_t unsupported = cudaErrorStreamCaptureUnsupported;
  capture("waiting for the device", unsupported, [] { return cudaDeviceSynchronize(); });
  capture("waiting for a stream", unsupported, [&] { return cudaStreamSynchronize(stream); });
  capture("asking a stream", unsupported, [&] { return cudaStreamQuery(stream); });
  capture("memory", unsupported, [] {
    void* made;
    return cudaMalloc(&made, 4);
  });
  capture("freeing", unsupported, [&] { return cudaFree(device); });
  capture("a copy at once", cudaErrorStreamCaptureImplicit,
          [&] { return cudaMemcpy(device, host.data(), 4, cudaMemcpyHostToDevice); });
  capture("the default stream", cudaErrorStreamCaptureImplicit, [&] {
    scale_all<<<1, 128>>>(device, kCount);
    return cudaGetLastError();
  });
  capture("attributes", cudaSuccess, [] {
    return cudaFuncSetAttribute(block_sums<128>, cudaFuncAttributeMaxDynamicSharedMemorySize, 1024);
  });
  cudaStreamDestroy(stream);
  cudaFree(device);
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

__device__ __noinline__ float power_sum(int n, float x) {
  return n == 0 ? 1 : power_sum(n - 1, x) * x + 1;
}
__device__ float half_of(float x) {
  return x / 2;
}
__device__ float square_of(float x) {
  return x * x;
}

__global__ void functions(float* out, int n) {
  const int t = threadIdx.x;
  const float x = t / 7.0f - 2;
  float (*const choice)(float) = t % 2 ? half_of : square_of;
  float local[16];
  for (int i = 0; i < 16; ++i) local[(i * n) % 16] = i * x;
  float r[8] = {sinf(100 * x),       cosf(x),           expf(x),
                logf(x + 3),         powf(x + 3, 1.7f), choice(x),
                power_sum(t % 6, x), local[t % 16]};
  switch (n + t % 4) {
    case 5:
      r[7] += 1;
      break;
    case 6:
      r[7] *= 3;
      break;
    case 7:
      r[7] -= 4;
      break;
    case 8:
      r[7] = -r[7];
      break;
    default:
      r[7] = 0;
  }
  if (t == 0) printf("%d lanes\n", n);
  for (int i = 0; i < 8; ++i) out[t * 8 + i] = r[i];
}

static void device_functions() {
  constexpr int kThreads = 40, kStep = 5;
  std::vector<float> host(kThreads * 8);
  float* out;
  cudaMalloc(&out, host.size() * sizeof(float));
  functions<<<1, kThreads>>>(out, kStep);
  check("functions, recursion, pointers, switch, local arrays", cudaGetLastError() == cudaSuccess);
  cudaMemcpy(host.data(), out, host.size() * sizeof(float), cudaMemcpyDeviceToHost);
  double worst = 0;
  for (int t = 0; t < kThreads; ++t) {
    const float x = t / 7.0f - 2;
    double sum = 1, last = 0;
    for (int i = 0; i < t % 6; ++i) sum = sum * x + 1;
    for (int i = 0; i < 16; ++i)
      if (i * kStep % 16 == t % 16) last = i * x;
    const double ends[] = {last + 1, last * 3, last - 4, -last};
    const double expected[] = {
        std::sin(100 * x),     std::cos(x),           std::exp(x), std::log(x + 3),
        std::pow(x + 3, 1.7f), t % 2 ? x / 2 : x * x, sum,         ends[t % 4]};
    for (int i = 0; i < 8; ++i)
      worst = std::fmax(
          worst, std::fabs(host[t * 8 + i] - expected[i]) / std::fmax(1, std::fabs(expected[i])));
  }
  check("their results", worst < 4e-7);
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
  graphs();
  dynamic_shared();
  findings();
  device_functions();
  clusters();
  return failures;
}
