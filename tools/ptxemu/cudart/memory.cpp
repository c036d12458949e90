// SPDX-License-Identifier: Apache-2.0
// Memory: device memory is host memory that kernels may use; everything happens at once.
#include <cstdlib>
#include <cstring>

#include "runtime.h"

namespace ptxemu::cudart {
namespace {

constexpr std::size_t kAlignment = 256;
constexpr unsigned char kUnset = 0xff;  // what new memory holds

cudaError allocate(void** pointer, std::size_t bytes) {
  const std::lock_guard lock(runtime().mutex);
  *pointer = nullptr;
  if (const cudaError error = refuse_capture("cudaMalloc")) return error;
  if (bytes == 0) return kSuccess;
  void* const made =
      std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (!made) return fail(kMemoryAllocation);
  std::memset(made, kUnset, bytes);
  runtime().memory.add(made, bytes, "cudaMalloc of " + std::to_string(bytes) + " bytes");
  runtime().allocations[made] = bytes;
  *pointer = made;
  return kSuccess;
}

cudaError release(void* pointer) {
  const std::lock_guard lock(runtime().mutex);
  if (const cudaError error = refuse_capture("cudaFree")) return error;
  if (!pointer) return kSuccess;
  if (runtime().allocations.erase(pointer) == 0)
    return fail(kInvalidValue, "cudaFree of a pointer that cudaMalloc did not return");
  runtime().memory.remove(pointer);
  std::free(pointer);
  return kSuccess;
}

cudaError copy(void* target, const void* source, std::size_t bytes) {
  if (bytes != 0) std::memmove(target, source, bytes);
  return kSuccess;
}

cudaError copy_2d(void* target, std::size_t target_pitch, const void* source,
                  std::size_t source_pitch, std::size_t width, std::size_t height) {
  for (std::size_t row = 0; row < height; ++row)
    std::memmove(static_cast<char*>(target) + row * target_pitch,
                 static_cast<const char*>(source) + row * source_pitch, width);
  return kSuccess;
}

/// Of the default stream, and done when it returns.
cudaError at_once(const char* what, const std::function<cudaError()>& run) {
  if (const cudaError error = refuse_capture(what, kCaptureImplicit)) return error;
  return run();
}

/// The memory of a __device__ or __constant__ variable.
std::pair<void*, std::size_t> symbol(const void* host) {
  const auto found = runtime().variables.find(host);
  if (found == runtime().variables.end()) return {nullptr, 0};
  return ptxemu::variable(module_of(*found->second.binary), found->second.name);
}

template <class F>
cudaError with_symbol(const void* host, std::size_t bytes, std::size_t offset, F&& f) {
  const std::lock_guard lock(runtime().mutex);
  return guarded([&]() -> cudaError {
    const auto [address, size] = symbol(host);
    if (!address) return fail(kInvalidSymbol, "no such variable");
    if (offset + bytes > size) return fail(kInvalidValue, "beyond the end of a variable");
    f(static_cast<char*>(address) + offset);
    return kSuccess;
  });
}

cudaError to_symbol(const void* host, const void* source, std::size_t bytes, std::size_t offset) {
  return with_symbol(host, bytes, offset, [&](char* at) { std::memcpy(at, source, bytes); });
}

cudaError fill(void* target, int value, std::size_t bytes) {
  std::memset(target, value, bytes);
  return kSuccess;
}

}  // namespace
}  // namespace ptxemu::cudart

using namespace ptxemu::cudart;

CUDART_API cudaError cudaMalloc(void** pointer, std::size_t bytes) {
  return allocate(pointer, bytes);
}
CUDART_API cudaError cudaMallocAsync(void** pointer, std::size_t bytes, cudaStream) {
  return allocate(pointer, bytes);
}
CUDART_API cudaError cudaMallocManaged(void** pointer, std::size_t bytes, unsigned) {
  return allocate(pointer, bytes);
}
CUDART_API cudaError cudaMallocHost(void** pointer, std::size_t bytes) {
  return allocate(pointer, bytes);
}
CUDART_API cudaError cudaHostAlloc(void** pointer, std::size_t bytes, unsigned) {
  return allocate(pointer, bytes);
}
CUDART_API cudaError cudaFree(void* pointer) {
  return release(pointer);
}
CUDART_API cudaError cudaFreeAsync(void* pointer, cudaStream) {
  return release(pointer);
}
CUDART_API cudaError cudaFreeHost(void* pointer) {
  return release(pointer);
}

CUDART_API cudaError cudaMemcpy(void* target, const void* source, std::size_t bytes, int) {
  return at_once("cudaMemcpy", [=] { return copy(target, source, bytes); });
}
CUDART_API cudaError cudaMemcpyAsync(void* target, const void* source, std::size_t bytes, int,
                                     cudaStream stream) {
  return enqueue(stream, "\"copy\"", [=] { return copy(target, source, bytes); });
}
CUDART_API cudaError cudaMemcpy2D(void* target, std::size_t target_pitch, const void* source,
                                  std::size_t source_pitch, std::size_t width, std::size_t height,
                                  int) {
  return at_once("cudaMemcpy2D", [=] {
    return copy_2d(target, target_pitch, source, source_pitch, width, height);
  });
}
CUDART_API cudaError cudaMemcpy2DAsync(void* target, std::size_t target_pitch, const void* source,
                                       std::size_t source_pitch, std::size_t width,
                                       std::size_t height, int, cudaStream stream) {
  return enqueue(stream, "\"copy\"", [=] {
    return copy_2d(target, target_pitch, source, source_pitch, width, height);
  });
}
CUDART_API cudaError cudaMemset(void* target, int value, std::size_t bytes) {
  return at_once("cudaMemset", [=] { return fill(target, value, bytes); });
}
CUDART_API cudaError cudaMemsetAsync(void* target, int value, std::size_t bytes,
                                     cudaStream stream) {
  return enqueue(stream, "\"fill\"", [=] { return fill(target, value, bytes); });
}

CUDART_API cudaError cudaMemcpyToSymbol(const void* host, const void* source, std::size_t bytes,
                                        std::size_t offset, int) {
  return at_once("cudaMemcpyToSymbol", [=] { return to_symbol(host, source, bytes, offset); });
}
CUDART_API cudaError cudaMemcpyToSymbolAsync(const void* host, const void* source,
                                             std::size_t bytes, std::size_t offset, int,
                                             cudaStream stream) {
  return enqueue(stream, "\"copy\"", [=] { return to_symbol(host, source, bytes, offset); });
}
CUDART_API cudaError cudaMemcpyFromSymbol(void* target, const void* host, std::size_t bytes,
                                          std::size_t offset, int) {
  return at_once("cudaMemcpyFromSymbol", [=] {
    return with_symbol(host, bytes, offset, [&](char* at) { std::memcpy(target, at, bytes); });
  });
}
CUDART_API cudaError cudaGetSymbolAddress(void** address, const void* host) {
  return with_symbol(host, 0, 0, [&](char* at) { *address = at; });
}
CUDART_API cudaError cudaGetSymbolSize(std::size_t* size, const void* host) {
  const std::lock_guard lock(runtime().mutex);
  return guarded([&]() -> cudaError {
    const auto [address, bytes] = symbol(host);
    if (!address) return fail(kInvalidSymbol, "no such variable");
    *size = bytes;
    return kSuccess;
  });
}
CUDART_API cudaError cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *free = *total = std::size_t{8} << 30;
  return kSuccess;
}

struct PointerAttributes {  // cudaPointerAttributes
  int type, device;
  void *device_pointer, *host_pointer;
  long reserved[8];
};
CUDART_API cudaError cudaPointerGetAttributes(PointerAttributes* attributes, const void* pointer) {
  const std::lock_guard lock(runtime().mutex);
  const auto* range = runtime().memory.find(reinterpret_cast<std::uint64_t>(pointer));
  const bool known = range && reinterpret_cast<std::uint64_t>(pointer) < range->end;
  *attributes = {known ? 2 : 0,
                 0,
                 const_cast<void*>(known ? pointer : nullptr),
                 const_cast<void*>(pointer),
                 {}};
  return kSuccess;
}
