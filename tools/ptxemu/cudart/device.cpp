// SPDX-License-Identifier: Apache-2.0
// One device; streams and events that are always done; entry points of the driver.
#include <cstring>

#include "runtime.h"
#include "tensor_map.h"

namespace ptxemu::cudart {
namespace {

constexpr int kMultiprocessors = 4;  // few, so that persistent kernels have several rounds

int attribute_value(int attribute) {
  switch (attribute) {
    case 1:  // cudaDevAttrMaxThreadsPerBlock
    case 2:  // MaxBlockDimX
    case 3:  // MaxBlockDimY
      return 1024;
    case 4:  // MaxBlockDimZ
      return 64;
    case 5:  // MaxGridDimX
      return 0x7fffffff;
    case 6:  // MaxGridDimY
    case 7:  // MaxGridDimZ
      return 65535;
    case 8:  // MaxSharedMemoryPerBlock
      return 48 * 1024;
    case 10:  // WarpSize
      return 32;
    case 12:  // MaxRegistersPerBlock
    case 82:  // MaxRegistersPerMultiprocessor
      return 65536;
    case 16:  // MultiProcessorCount
      return kMultiprocessors;
    case 38:  // L2CacheSize
      return 40 << 20;
    case 39:  // MaxThreadsPerMultiProcessor
      return 2048;
    case 75:  // ComputeCapabilityMajor
      return architecture() / 10;
    case 76:  // ComputeCapabilityMinor
      return architecture() % 10;
    case 81:  // MaxSharedMemoryPerMultiprocessor
      return 228 * 1024;
    case 95:  // CooperativeLaunch
      return 1;
    case 97:  // MaxSharedMemoryPerBlockOptin
      return 227 * 1024;
    case 106:  // MaxBlocksPerMultiprocessor
      return 32;
    case 111:  // ReservedSharedMemoryPerBlock
      return 1024;
    default:
      return 0;
  }
}

int encode_tiled_entry(void* map, int type, std::uint32_t rank, void* address,
                       const std::uint64_t* dims, const std::uint64_t* strides,
                       const std::uint32_t* box, const std::uint32_t* element_strides,
                       int interleave, int swizzle, int, int fill) {
  const std::string wrong =
      ptxemu::encode_tiled(static_cast<ptxemu::TensorMap*>(map), type, rank, address, dims, strides,
                           box, element_strides, interleave, swizzle, fill != 0);
  if (wrong.empty()) return 0;
  fail(kInvalidValue, "cuTensorMapEncodeTiled: " + wrong);
  return 1;  // CUDA_ERROR_INVALID_VALUE
}

cudaError entry_point(const char* name, void** function, int* status) {
  const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&encode_tiled_entry) : nullptr;
  if (status) *status = known ? 0 : 1;  // cudaDriverEntryPointSymbolNotFound
  return known ? static_cast<cudaError>(kSuccess)
               : fail(kNotSupported, std::string("driver function ") + name);
}

cudaError make_handle(void** handle) {
  *handle = new char;
  return kSuccess;
}
cudaError drop_handle(void* handle) {
  delete static_cast<char*>(handle);
  return kSuccess;
}

}  // namespace
}  // namespace ptxemu::cudart

using namespace ptxemu::cudart;

CUDART_API cudaError cudaGetDeviceCount(int* count) {
  *count = 1;
  return kSuccess;
}
CUDART_API cudaError cudaGetDevice(int* device) {
  *device = 0;
  return kSuccess;
}
CUDART_API cudaError cudaSetDevice(int device) {
  return device == 0 ? static_cast<cudaError>(kSuccess) : fail(kInvalidValue, "no such device");
}
CUDART_API cudaError cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute_value(attribute);
  return kSuccess;
}
CUDART_API cudaError cudaDeviceSynchronize() {
  return refuse_capture("cudaDeviceSynchronize");
}
CUDART_API cudaError cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return kSuccess;
}
CUDART_API cudaError cudaDriverGetVersion(int* version) {
  *version = 13000;
  return kSuccess;
}

CUDART_API cudaError cudaStreamCreate(cudaStream* stream) {
  return make_handle(stream);
}
CUDART_API cudaError cudaStreamCreateWithFlags(cudaStream* stream, unsigned) {
  return make_handle(stream);
}
CUDART_API cudaError cudaStreamCreateWithPriority(cudaStream* stream, unsigned, int) {
  return make_handle(stream);
}
CUDART_API cudaError cudaStreamDestroy(cudaStream stream) {
  return drop_handle(stream);
}
CUDART_API cudaError cudaStreamSynchronize(cudaStream) {
  return refuse_capture("cudaStreamSynchronize");
}
CUDART_API cudaError cudaStreamQuery(cudaStream) {
  return refuse_capture("cudaStreamQuery");
}
CUDART_API cudaError cudaStreamWaitEvent(cudaStream, void*, unsigned) {
  return kSuccess;
}
CUDART_API cudaError cudaLaunchHostFunc(cudaStream stream, void (*function)(void*), void* data) {
  return enqueue(stream, "\"host function\"", [=]() -> cudaError {
    function(data);
    return kSuccess;
  });
}

CUDART_API cudaError cudaEventCreate(void** event) {
  return make_handle(event);
}
CUDART_API cudaError cudaEventCreateWithFlags(void** event, unsigned) {
  return make_handle(event);
}
CUDART_API cudaError cudaEventDestroy(void* event) {
  return drop_handle(event);
}
CUDART_API cudaError cudaEventRecord(void*, cudaStream) {
  return kSuccess;
}
CUDART_API cudaError cudaEventSynchronize(void*) {
  return refuse_capture("cudaEventSynchronize");
}
CUDART_API cudaError cudaEventQuery(void*) {
  return refuse_capture("cudaEventQuery");
}
CUDART_API cudaError cudaEventElapsedTime(float* milliseconds, void*, void*) {
  *milliseconds = 0;
  return kSuccess;
}

CUDART_API cudaError cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long,
                                             int* status) {
  return entry_point(name, function, status);
}
CUDART_API cudaError cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                      unsigned long long, int* status) {
  return entry_point(name, function, status);
}
