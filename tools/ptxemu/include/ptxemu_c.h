/* SPDX-License-Identifier: Apache-2.0 */
/* The simulator for other languages; tools/ptxemu/python/ptxemu.py uses it. */
#ifndef PTXEMU_C_H
#define PTXEMU_C_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ptxemu_module ptxemu_module;

typedef struct {
  uint64_t address, bytes;
  const char* name;
  int32_t read_only;
} ptxemu_buffer;

typedef struct {
  uint32_t grid[3], block[3];
  uint32_t cluster[3]; /* zeros: what the kernel declares */
  uint32_t cooperative;
  uint64_t dynamic_shared;
  uint64_t seed;
  uint64_t max_instructions; /* 0: no limit */
  uint32_t resident;         /* clusters that run side by side */
  uint32_t check_races, check_initialised, unchecked_global;
} ptxemu_config;

/* Functions that fail return NULL or nonzero; then these say why, until the thread's next call. */
const char* ptxemu_error(void);
const char* ptxemu_error_kind(void);

ptxemu_module* ptxemu_load(const char* ptx);
void ptxemu_unload(ptxemu_module* module);
/* JSON: kernels, parameters, unsupported instructions. Valid until the thread's next call. */
const char* ptxemu_describe(const ptxemu_module* module);
/* The address of a .global or .const variable, or 0. */
uint64_t ptxemu_variable(const ptxemu_module* module, const char* name, uint64_t* bytes);
int ptxemu_launch(ptxemu_module* module, const char* kernel, const ptxemu_config* config,
                  const void* parameters, uint64_t parameter_bytes, const ptxemu_buffer* buffers,
                  uint64_t buffer_count);
/* JSON: statistics of the thread's last successful launch. */
const char* ptxemu_stats(void);
/* The arguments of cuTensorMapEncodeTiled, without its hints. */
int ptxemu_encode_tiled(void* map, int32_t data_type, uint32_t rank, void* address,
                        const uint64_t* dims, const uint64_t* strides, const uint32_t* box,
                        int32_t swizzle);

#ifdef __cplusplus
}
#endif
#endif
