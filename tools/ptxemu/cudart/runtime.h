// SPDX-License-Identifier: Apache-2.0
// The state of the stand-in for libcudart, and the few types of its interface that are needed; no
// header of CUDA is, so that it builds where no toolkit is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ptxemu.h"

#define CUDART_API extern "C" __attribute__((visibility("default")))

using cudaError = int;
using cudaStream = void*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace ptxemu::cudart {

enum ErrorCode : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kMemoryAllocation = 2,
  kInvalidConfiguration = 9,
  kInvalidSymbol = 13,
  kInvalidDeviceFunction = 98,
  kInvalidPtx = 218,
  kIllegalState = 401,
  kNotReady = 600,
  kIllegalAddress = 700,
  kAssert = 710,
  kMisalignedAddress = 716,
  kLaunchFailure = 719,
  kNotSupported = 801,
  kCaptureUnsupported = 900,
  kCaptureInvalidated = 901,
  kCaptureImplicit = 906,
};

/// The PTX texts of one fat binary; parsed when a kernel or variable of it is first wanted.
struct FatBinary {
  std::string ptx;
  std::string problem;  // why there is no text
  std::shared_ptr<Module> module;
};

struct Kernel {
  std::string name;
  FatBinary* binary = nullptr;
  int max_dynamic_shared = 48 * 1024;
};

struct HostVariable {
  std::string name;
  FatBinary* binary = nullptr;
};

struct Graph;  // graph.cpp

/// What a stream is told to do goes into a graph, while there is one.
struct Capture {
  std::shared_ptr<Graph> graph;
  cudaStream stream = nullptr;
  bool spoilt = false;  // by a call that no graph can hold
};

struct Runtime {
  std::recursive_mutex mutex;
  std::vector<std::unique_ptr<FatBinary>> binaries;
  std::unordered_map<const void*, Kernel> kernels;          // by host stub
  std::unordered_map<const void*, HostVariable> variables;  // by host shadow
  GlobalMemory memory;                                      // cudaMalloc and registered memory
  std::map<const void*, std::size_t> allocations;
  std::string last_finding, last_kind;
  std::map<std::string, std::string> kernel_stats;  // of each kernel's last launch, as JSON
  std::string all_stats;                            // what ptxemu_cudart_kernel_stats() returned
  Capture capture;
  Options options;
  int verbose = 0;
};

/// Settings come from the environment when the library is loaded; see README.md.
Runtime& runtime();
int architecture();

/// Sets what cudaGetLastError() returns, and returns it.
cudaError fail(int code, const std::string& message = "");
/// Runs `f`, which returns an error code; an exception becomes the matching one.
template <class F>
cudaError guarded(F&& f);

/// Runs `run`, or keeps it for the graph if the stream is captured; `what` is JSON that says what.
cudaError enqueue(cudaStream stream, const std::string& what, std::function<cudaError()> run);
/// kSuccess, or while any stream is captured an error, after which that capture has failed.
cudaError refuse_capture(const std::string& what, int code = kCaptureUnsupported);

Module& module_of(FatBinary& binary);
Kernel* find_kernel(const void* stub);

cudaError code_of(const Error& error);

template <class F>
cudaError guarded(F&& f) {
  try {
    return f();
  } catch (const Error& error) {
    runtime().last_kind = error.kind();
    return fail(code_of(error), error.what());
  } catch (const std::exception& error) {
    runtime().last_kind = "internal";
    return fail(kLaunchFailure, error.what());
  }
}

}  // namespace ptxemu::cudart
