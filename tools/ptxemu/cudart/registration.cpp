// SPDX-License-Identifier: Apache-2.0
// What the code that nvcc generates calls before main: fat binaries, kernels, variables.
#include <cstring>

#include "runtime.h"

namespace ptxemu::cudart {
namespace {

struct Wrapper {  // __fatBinC_Wrapper_t
  int magic, version;
  const char* data;
  void* file_name;
};

struct BinaryHeader {
  std::uint32_t magic;
  std::uint16_t version, header_size;
  std::uint64_t size;
};

struct EntryHeader {
  std::uint16_t kind;  // 1: PTX
  std::uint16_t version;
  std::uint32_t header_size;
  std::uint64_t size;
  std::uint32_t compressed_size, unknown, unknown2, arch;
};

constexpr std::uint32_t kMagic = 0xba55ed50;

/// The PTX for the newest architecture that is not newer than the one to be.
void choose(FatBinary& binary, const char* data) {
  BinaryHeader header;
  std::memcpy(&header, data, sizeof header);
  if (header.magic != kMagic) {
    binary.problem = "unknown format of a fat binary";
    return;
  }
  std::uint32_t best = 0;
  bool compressed = false;
  const char* const end = data + header.header_size + header.size;
  for (const char* at = data + header.header_size; at < end;) {
    EntryHeader entry;
    std::memcpy(&entry, at, sizeof entry);
    const char* payload = at + entry.header_size;
    at = payload + entry.size;
    if (entry.kind != 1 || entry.arch > static_cast<std::uint32_t>(architecture())) continue;
    if (entry.compressed_size != 0) {
      compressed = true;
    } else if (entry.arch >= best) {
      best = entry.arch;
      binary.ptx.assign(payload, strnlen(payload, entry.size));
      const std::size_t begin = binary.ptx.find_first_not_of('\n');
      if (begin != std::string::npos) binary.ptx.erase(0, begin);
    }
  }
  if (binary.ptx.empty())
    binary.problem =
        std::string(compressed ? "its PTX is compressed" : "it holds no PTX that fits") +
        "; compile with -gencode arch=compute_80,code=compute_80 --compress-mode=none";
}

}  // namespace

Module& module_of(FatBinary& binary) {
  if (!binary.module) {
    if (binary.ptx.empty()) throw Error("parse", "a fat binary: " + binary.problem);
    binary.module = load(binary.ptx);
  }
  return *binary.module;
}

Kernel* find_kernel(const void* stub) {
  const auto found = runtime().kernels.find(stub);
  return found == runtime().kernels.end() ? nullptr : &found->second;
}

}  // namespace ptxemu::cudart

using namespace ptxemu::cudart;

CUDART_API void** __cudaRegisterFatBinary(void* wrapper) {
  const std::lock_guard lock(runtime().mutex);
  auto binary = std::make_unique<FatBinary>();
  choose(*binary, static_cast<const Wrapper*>(wrapper)->data);
  runtime().binaries.push_back(std::move(binary));
  return reinterpret_cast<void**>(runtime().binaries.back().get());
}

CUDART_API void __cudaRegisterFatBinaryEnd(void**) {}

CUDART_API void __cudaUnregisterFatBinary(void** handle) {
  const std::lock_guard lock(runtime().mutex);
  const auto belongs = [&](const auto& item) {
    return static_cast<void*>(item.second.binary) == static_cast<void*>(handle);
  };
  std::erase_if(runtime().kernels, belongs);
  std::erase_if(runtime().variables, belongs);
  std::erase_if(runtime().binaries, [&](const auto& binary) {
    return static_cast<void*>(binary.get()) == static_cast<void*>(handle);
  });
}

CUDART_API void __cudaRegisterFunction(void** handle, const char* stub, char*, const char* name,
                                       int, void*, void*, void*, void*, int*) {
  const std::lock_guard lock(runtime().mutex);
  runtime().kernels[stub] = {name, reinterpret_cast<FatBinary*>(handle)};
}

CUDART_API void __cudaRegisterVar(void** handle, char* host, char*, const char* name, int,
                                  std::size_t, int, int) {
  const std::lock_guard lock(runtime().mutex);
  runtime().variables[host] = {name, reinterpret_cast<FatBinary*>(handle)};
}

CUDART_API void __cudaRegisterManagedVar(void** handle, void** host, char*, const char* name, int,
                                         std::size_t, int, int) {
  const std::lock_guard lock(runtime().mutex);
  runtime().variables[host] = {name, reinterpret_cast<FatBinary*>(handle)};
}

CUDART_API char __cudaInitModule(void**) {
  return 1;
}

CUDART_API cudaError __cudaGetKernel(void** kernel, const void* stub) {
  *kernel = const_cast<void*>(stub);  // the stub serves as the handle, too
  return kSuccess;
}
