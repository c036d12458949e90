// SPDX-License-Identifier: Apache-2.0
#include <exception>

#include "json.h"
#include "ptxemu.h"
#include "ptxemu_c.h"
#include "tensor_map.h"

#define PTXEMU_EXPORT extern "C" __attribute__((visibility("default")))

struct ptxemu_module {
  std::shared_ptr<ptxemu::Module> module;
};

namespace {

thread_local std::string last_error, last_kind, last_text, last_stats;

/// Runs `f`; an exception becomes the thread's error and `failure`.
template <class T, class F>
T guarded(T failure, F&& f) {
  try {
    return f();
  } catch (const ptxemu::Error& error) {
    last_kind = error.kind();
    last_error = error.what();
  } catch (const std::exception& error) {
    last_kind = "internal";
    last_error = error.what();
  }
  return failure;
}

ptxemu::Dim3 dims(const std::uint32_t (&d)[3]) {
  return {d[0], d[1], d[2]};
}

}  // namespace

PTXEMU_EXPORT const char* ptxemu_error(void) {
  return last_error.c_str();
}
PTXEMU_EXPORT const char* ptxemu_error_kind(void) {
  return last_kind.c_str();
}
PTXEMU_EXPORT const char* ptxemu_stats(void) {
  return last_stats.c_str();
}

PTXEMU_EXPORT ptxemu_module* ptxemu_load(const char* ptx) {
  return guarded<ptxemu_module*>(nullptr, [&] { return new ptxemu_module{ptxemu::load(ptx)}; });
}

PTXEMU_EXPORT void ptxemu_unload(ptxemu_module* module) {
  delete module;
}

PTXEMU_EXPORT const char* ptxemu_describe(const ptxemu_module* module) {
  last_text = ptxemu::to_json(*module->module);
  return last_text.c_str();
}

PTXEMU_EXPORT uint64_t ptxemu_variable(const ptxemu_module* module, const char* name,
                                       uint64_t* bytes) {
  const auto [address, size] = ptxemu::variable(*module->module, name);
  *bytes = size;
  return reinterpret_cast<uint64_t>(address);
}

PTXEMU_EXPORT int ptxemu_launch(ptxemu_module* module, const char* kernel,
                                const ptxemu_config* config, const void* parameters,
                                uint64_t parameter_bytes, const ptxemu_buffer* buffers,
                                uint64_t buffer_count) {
  return guarded(1, [&] {
    ptxemu::GlobalMemory memory;
    for (uint64_t b = 0; b < buffer_count; ++b)
      memory.add(reinterpret_cast<const void*>(buffers[b].address), buffers[b].bytes,
                 buffers[b].name, buffers[b].read_only != 0);
    ptxemu::LaunchConfig launch;
    launch.grid = dims(config->grid);
    launch.block = dims(config->block);
    launch.cluster = dims(config->cluster);
    launch.dynamic_shared = config->dynamic_shared;
    launch.cooperative = config->cooperative != 0;
    ptxemu::Options options;
    options.seed = config->seed;
    options.max_instructions = config->max_instructions;
    options.resident = config->resident;
    options.check_races = config->check_races != 0;
    options.check_initialised = config->check_initialised != 0;
    options.unchecked_global = config->unchecked_global != 0;
    last_stats = ptxemu::to_json(ptxemu::launch(*module->module, kernel, launch, parameters,
                                                parameter_bytes, memory, options));
    return 0;
  });
}

PTXEMU_EXPORT int ptxemu_encode_tiled(void* map, int32_t data_type, uint32_t rank, void* address,
                                      const uint64_t* dims, const uint64_t* strides,
                                      const uint32_t* box, int32_t swizzle) {
  return guarded(1, [&] {
    const std::string wrong =
        ptxemu::encode_tiled(static_cast<ptxemu::TensorMap*>(map), data_type, rank, address, dims,
                             strides, box, nullptr, 0, swizzle, false);
    if (!wrong.empty()) throw ptxemu::Error("launch", "tensor map: " + wrong);
    return 0;
  });
}
