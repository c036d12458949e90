// SPDX-License-Identifier: Apache-2.0
// Kernel launches and questions about kernels.
#include <dlfcn.h>
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "json.h"
#include "runtime.h"

namespace ptxemu::cudart {
namespace {

constexpr int kMaxDynamicShared = 227 * 1024;
constexpr int kAttributeMaxDynamicShared = 8;  // cudaFuncAttributeMaxDynamicSharedMemorySize
constexpr int kLaunchCooperative = 2, kLaunchClusterDimension = 4;

struct Call {
  dim3 grid, block;
  std::size_t shared = 0;
  cudaStream stream = nullptr;
};
thread_local std::vector<Call> configurations;

/// Blocks of memory that the preloaded heap knows (heap.cpp), if it is there.
void add_heap_blocks(GlobalMemory& memory) {
  using Visit = void (*)(void*, const void*, std::size_t);
  using Blocks = void (*)(Visit, void*);
  static const auto blocks = reinterpret_cast<Blocks>(dlsym(RTLD_DEFAULT, "ptxemu_heap_blocks"));
  if (!blocks) return;
  blocks(
      [](void* m, const void* address, std::size_t bytes) {
        static_cast<GlobalMemory*>(m)->add(address, bytes, "a heap block");
      },
      &memory);
}

std::string describe(const Kernel& kernel, const LaunchConfig& config) {
  const auto list = [](const auto& size) {
    return "[" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " +
           std::to_string(size.z) + "]";
  };
  return "{\"kernel\": " + json_string(kernel.name) + ", \"grid\": " + list(config.grid) +
         ", \"block\": " + list(config.block) +
         ", \"shared\": " + std::to_string(config.dynamic_shared) + "}";
}

cudaError execute(const Kernel& kernel, Module& module, const LaunchConfig& config,
                  const std::vector<unsigned char>& block) {
  Runtime& r = runtime();
  GlobalMemory memory = r.memory;
  add_heap_blocks(memory);
  const std::string stats = to_json(
      ptxemu::launch(module, kernel.name, config, block.data(), block.size(), memory, r.options));
  r.kernel_stats[kernel.name] = stats;
  if (r.verbose) std::fprintf(stderr, "ptxemu cudart: %s %s\n", kernel.name.c_str(), stats.c_str());
  return kSuccess;
}

cudaError launch(const void* stub, LaunchConfig config, void** arguments, cudaStream stream) {
  Runtime& r = runtime();
  const std::lock_guard lock(r.mutex);
  return guarded([&] {
    Kernel* kernel = find_kernel(stub);
    if (!kernel) return fail(kInvalidDeviceFunction, "no kernel is registered for this function");
    if (config.dynamic_shared > static_cast<std::size_t>(kernel->max_dynamic_shared))
      return fail(kInvalidValue, kernel->name + ": " + std::to_string(config.dynamic_shared) +
                                     " bytes of dynamic shared memory; cudaFuncSetAttribute "
                                     "allows " +
                                     std::to_string(kernel->max_dynamic_shared));
    Module& module = module_of(*kernel->binary);
    const auto slots = ptxemu::parameters(module, kernel->name);
    std::vector<unsigned char> block(slots.empty() ? 0 : slots.back().offset + slots.back().size);
    for (std::size_t p = 0; p < slots.size(); ++p)
      std::memcpy(&block[slots[p].offset], arguments[p], slots[p].size);
    return enqueue(stream, describe(*kernel, config), [=, &module] {
      return guarded([&] { return execute(*kernel, module, config, block); });
    });
  });
}

LaunchConfig configuration(dim3 grid, dim3 block, std::size_t shared) {
  LaunchConfig config;
  config.grid = {grid.x, grid.y, grid.z};
  config.block = {block.x, block.y, block.z};
  config.dynamic_shared = shared;
  return config;
}

struct LaunchAttribute {  // cudaLaunchAttribute
  int id;
  int padding;
  union {
    char bytes[64];
    unsigned cluster[3];
    int cooperative;
  } value;
};

struct LaunchConfiguration {  // cudaLaunchConfig_t
  dim3 grid, block;
  std::size_t shared;
  cudaStream stream;
  LaunchAttribute* attributes;
  unsigned count;
};

struct FunctionAttributes {  // cudaFuncAttributes
  std::size_t shared, constant, local;
  int max_threads, registers, ptx_version, binary_version, cache_mode, max_dynamic_shared, carveout,
      cluster_must_be_set, cluster[3], scheduling, non_portable, reserved[16];
};

}  // namespace
}  // namespace ptxemu::cudart

using namespace ptxemu::cudart;

CUDART_API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared,
                                                cudaStream stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}

CUDART_API cudaError __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared,
                                                void* stream) {
  if (configurations.empty()) return fail(kInvalidConfiguration);
  const Call call = configurations.back();
  configurations.pop_back();
  *grid = call.grid;
  *block = call.block;
  *shared = call.shared;
  std::memcpy(stream, &call.stream, sizeof call.stream);
  return kSuccess;
}

CUDART_API cudaError cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments,
                                      std::size_t shared, cudaStream stream) {
  return launch(stub, configuration(grid, block, shared), arguments, stream);
}
CUDART_API cudaError cudaLaunchKernel_ptsz(const void* stub, dim3 grid, dim3 block,
                                           void** arguments, std::size_t shared,
                                           cudaStream stream) {
  return launch(stub, configuration(grid, block, shared), arguments, stream);
}
CUDART_API cudaError __cudaLaunchKernel(void* kernel, dim3 grid, dim3 block, void** arguments,
                                        std::size_t shared, cudaStream stream) {
  return launch(kernel, configuration(grid, block, shared), arguments, stream);
}
CUDART_API cudaError __cudaLaunchKernel_ptsz(void* kernel, dim3 grid, dim3 block, void** arguments,
                                             std::size_t shared, cudaStream stream) {
  return launch(kernel, configuration(grid, block, shared), arguments, stream);
}

CUDART_API cudaError cudaLaunchCooperativeKernel(const void* stub, dim3 grid, dim3 block,
                                                 void** arguments, std::size_t shared,
                                                 cudaStream stream) {
  ptxemu::LaunchConfig config = configuration(grid, block, shared);
  config.cooperative = true;
  return launch(stub, config, arguments, stream);
}

CUDART_API cudaError cudaLaunchKernelExC(const LaunchConfiguration* given, const void* stub,
                                         void** arguments) {
  ptxemu::LaunchConfig config = configuration(given->grid, given->block, given->shared);
  for (unsigned a = 0; a < given->count; ++a) {
    const LaunchAttribute& attribute = given->attributes[a];
    const unsigned* c = attribute.value.cluster;
    if (attribute.id == kLaunchClusterDimension) config.cluster = {c[0], c[1], c[2]};
    if (attribute.id == kLaunchCooperative) config.cooperative = attribute.value.cooperative != 0;
  }
  return launch(stub, config, arguments, given->stream);
}

CUDART_API cudaError cudaFuncSetAttribute(const void* stub, int attribute, int value) {
  const std::lock_guard lock(runtime().mutex);
  Kernel* kernel = find_kernel(stub);
  if (!kernel) return fail(kInvalidDeviceFunction, "no kernel is registered for this function");
  if (attribute != kAttributeMaxDynamicShared) return kSuccess;
  if (value < 0 || value > kMaxDynamicShared)
    return fail(kInvalidValue, std::to_string(value) + " bytes of dynamic shared memory; " +
                                   std::to_string(kMaxDynamicShared) + " are possible");
  kernel->max_dynamic_shared = value;
  return kSuccess;
}

CUDART_API cudaError cudaFuncGetAttributes(FunctionAttributes* attributes, const void* stub) {
  const std::lock_guard lock(runtime().mutex);
  return guarded([&]() -> cudaError {
    Kernel* kernel = find_kernel(stub);
    if (!kernel) return fail(kInvalidDeviceFunction, "no kernel is registered for this function");
    *attributes = {};
    attributes->shared = ptxemu::static_shared(module_of(*kernel->binary), kernel->name);
    attributes->max_threads = 1024;
    attributes->ptx_version = attributes->binary_version = architecture();
    attributes->max_dynamic_shared = kernel->max_dynamic_shared;
    return kSuccess;
  });
}

/// By threads and shared memory alone: registers are ptxas's to say.
CUDART_API cudaError cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void* stub, int threads, std::size_t shared, unsigned) {
  const std::lock_guard lock(runtime().mutex);
  return guarded([&]() -> cudaError {
    Kernel* kernel = find_kernel(stub);
    if (!kernel || threads <= 0) return fail(kInvalidValue, "occupancy of no kernel");
    const std::size_t bytes =
        1024 + shared + ptxemu::static_shared(module_of(*kernel->binary), kernel->name);
    *blocks = std::min(2048 / threads, static_cast<int>((kMaxDynamicShared + 1024) / bytes));
    return kSuccess;
  });
}
CUDART_API cudaError cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* stub,
                                                                   int threads,
                                                                   std::size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, stub, threads, shared, 0);
}
