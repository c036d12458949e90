// SPDX-License-Identifier: Apache-2.0
// Error codes; the text of a finding is what cudaGetErrorString says of it.
#include <cstdio>
#include <cstdlib>

#include "json.h"
#include "runtime.h"

namespace ptxemu::cudart {
namespace {

thread_local int last_error = kSuccess;

}  // namespace

Runtime& runtime() {
  static Runtime* const instance = [] {
    auto* made = new Runtime;  // outlives every static destructor that may still call in
    const auto setting = [](const char* name) -> std::uint64_t {
      const char* value = std::getenv(name);
      return value ? std::strtoull(value, nullptr, 0) : 0;
    };
    made->options.seed = setting("PTXEMU_SEED");
    made->options.unchecked_global = setting("PTXEMU_UNCHECKED") != 0;
    made->options.check_races = setting("PTXEMU_NO_RACES") == 0;
    made->options.check_initialised = setting("PTXEMU_NO_INIT") == 0;
    made->options.max_instructions = setting("PTXEMU_MAX_INSTRUCTIONS");
    made->verbose = static_cast<int>(setting("PTXEMU_VERBOSE"));
    return made;
  }();
  return *instance;
}

int architecture() {
  static const int arch = [] {
    const char* value = std::getenv("PTXEMU_ARCH");
    return value ? std::atoi(value) : 90;
  }();
  return arch;
}

cudaError fail(int code, const std::string& message) {
  last_error = code;
  runtime().last_finding = message;
  if (runtime().verbose && !message.empty())
    std::fprintf(stderr, "ptxemu cudart: %s\n", message.c_str());
  return code;
}

cudaError code_of(const Error& error) {
  const std::string& kind = error.kind();
  if (kind == "bounds") return kIllegalAddress;
  if (kind == "misaligned") return kMisalignedAddress;
  if (kind == "trap") return kAssert;
  if (kind == "launch") return kInvalidConfiguration;
  if (kind == "parse") return kInvalidPtx;
  if (kind == "unsupported") return kNotSupported;
  return kLaunchFailure;
}

const char* name_of(int code) {
  switch (code) {
    case kSuccess:
      return "cudaSuccess";
    case kInvalidValue:
      return "cudaErrorInvalidValue";
    case kMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case kInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case kInvalidSymbol:
      return "cudaErrorInvalidSymbol";
    case kInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case kInvalidPtx:
      return "cudaErrorInvalidPtx";
    case kIllegalState:
      return "cudaErrorIllegalState";
    case kNotReady:
      return "cudaErrorNotReady";
    case kIllegalAddress:
      return "cudaErrorIllegalAddress";
    case kAssert:
      return "cudaErrorAssert";
    case kMisalignedAddress:
      return "cudaErrorMisalignedAddress";
    case kLaunchFailure:
      return "cudaErrorLaunchFailure";
    case kNotSupported:
      return "cudaErrorNotSupported";
    case kCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    case kCaptureInvalidated:
      return "cudaErrorStreamCaptureInvalidated";
    case kCaptureImplicit:
      return "cudaErrorStreamCaptureImplicit";
    default:
      return "cudaErrorUnknown";
  }
}

}  // namespace ptxemu::cudart

using namespace ptxemu::cudart;

CUDART_API cudaError cudaGetLastError() {
  const int code = last_error;
  last_error = kSuccess;
  return code;
}
CUDART_API cudaError cudaPeekAtLastError() {
  return last_error;
}
CUDART_API const char* cudaGetErrorName(cudaError code) {
  return name_of(code);
}
CUDART_API const char* cudaGetErrorString(cudaError code) {
  const std::string& finding = runtime().last_finding;
  return code != kSuccess && !finding.empty() ? finding.c_str()
         : code == kSuccess                   ? "no error"
                                              : name_of(code);
}

// --- what only the stand-in has ------------------------------------------------------------------

CUDART_API const char* ptxemu_cudart_finding() {
  return runtime().last_finding.c_str();
}
CUDART_API const char* ptxemu_cudart_finding_kind() {
  return runtime().last_kind.c_str();
}
CUDART_API const char* ptxemu_cudart_kernel_stats() {
  Runtime& r = runtime();
  const std::lock_guard lock(r.mutex);
  r.all_stats = "{" +
                ptxemu::json_list(r.kernel_stats,
                                  [](const auto& kernel) {
                                    return ptxemu::json_string(kernel.first) + ": " + kernel.second;
                                  }) +
                "}";
  return r.all_stats.c_str();
}
CUDART_API void ptxemu_cudart_seed(std::uint64_t seed) {
  runtime().options.seed = seed;
}
CUDART_API void ptxemu_cudart_register(const void* address, std::size_t bytes, const char* name,
                                       int read_only) {
  const std::lock_guard lock(runtime().mutex);
  runtime().memory.add(address, bytes, name, read_only != 0);
}
CUDART_API void ptxemu_cudart_unregister(const void* address) {
  const std::lock_guard lock(runtime().mutex);
  runtime().memory.remove(address);
}
