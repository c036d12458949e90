// SPDX-License-Identifier: Apache-2.0
// Preloaded, remembers the aligned blocks of the process's heap, where torch's CPU tensors live, so
// that the stand-in for libcudart knows the bounds of every tensor, results included.
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

extern "C" {
void* __libc_memalign(std::size_t alignment, std::size_t bytes);
void __libc_free(void* pointer);
}

namespace {

#define PTXEMU_EXPORT extern "C" __attribute__((visibility("default")))

constexpr std::uintptr_t kAlignment = 64;  // of the blocks that count

/// A map whose nodes come from the real heap, whatever is interposed.
template <class T>
struct LibcAllocator {
  using value_type = T;
  LibcAllocator() = default;
  template <class U>
  LibcAllocator(const LibcAllocator<U>&) {}
  T* allocate(std::size_t n) { return static_cast<T*>(__libc_memalign(alignof(T), n * sizeof(T))); }
  void deallocate(T* p, std::size_t) { __libc_free(p); }
  bool operator==(const LibcAllocator&) const { return true; }
};
struct Block {
  std::size_t bytes;
  int pool;   // not 0: made while a graph was captured, and freed with it, not before
  bool free;  // and would be otherwise
};
using Blocks = std::map<std::uintptr_t, Block, std::less<>,
                        LibcAllocator<std::pair<const std::uintptr_t, Block>>>;

// Under the mutex: the pool that new blocks are of, and the last one.
int pool = 0, last_pool = 0;

std::mutex& mutex() {
  static auto* instance = new (__libc_memalign(alignof(std::mutex), sizeof(std::mutex))) std::mutex;
  return *instance;
}
Blocks& blocks() {
  static auto* instance = new (__libc_memalign(alignof(Blocks), sizeof(Blocks))) Blocks;
  return *instance;
}

void* aligned(std::size_t alignment, std::size_t bytes) {
  void* const made = __libc_memalign(alignment, bytes);
  if (!made || alignment < kAlignment) return made;
  const std::lock_guard lock(mutex());
  blocks()[reinterpret_cast<std::uintptr_t>(made)] = {bytes, pool, false};
  return made;
}

}  // namespace

PTXEMU_EXPORT int posix_memalign(void** pointer, std::size_t alignment, std::size_t bytes) {
  void* const made = aligned(alignment, bytes);
  if (!made) return ENOMEM;
  *pointer = made;
  return 0;
}
PTXEMU_EXPORT void* aligned_alloc(std::size_t alignment, std::size_t bytes) {
  return aligned(alignment, bytes);
}

PTXEMU_EXPORT void free(void* pointer) {
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  if (pointer && address % kAlignment == 0) {
    const std::lock_guard lock(mutex());
    const auto found = blocks().find(address);
    if (found != blocks().end() && found->second.pool != 0) {
      found->second.free = true;
      return;
    }
    if (found != blocks().end()) blocks().erase(found);
  }
  __libc_free(pointer);
}

PTXEMU_EXPORT void ptxemu_heap_blocks(void (*visit)(void*, const void*, std::size_t), void* data) {
  // The visitor allocates and frees, so it gets a copy.
  Blocks copy;
  {
    const std::lock_guard lock(mutex());
    copy = blocks();
  }
  for (const auto& [address, block] : copy)
    visit(data, reinterpret_cast<const void*>(address), block.bytes);
}

// --- blocks that a graph works on ----------------------------------------------------------------

PTXEMU_EXPORT void ptxemu_heap_pool_begin() {
  const std::lock_guard lock(mutex());
  pool = ++last_pool;
}
// Visits the blocks that were made since, each of which ptxemu_heap_pool_release gives back.
PTXEMU_EXPORT void ptxemu_heap_pool_end(void (*visit)(void*, const void*), void* data) {
  Blocks copy;
  int ended;
  {
    const std::lock_guard lock(mutex());
    ended = std::exchange(pool, 0);
    copy = blocks();
  }
  for (const auto& [address, block] : copy)
    if (block.pool == ended) visit(data, reinterpret_cast<const void*>(address));
}
PTXEMU_EXPORT void ptxemu_heap_pool_release(const void* pointer) {
  void* const block = const_cast<void*>(pointer);
  bool unused = false;
  {
    const std::lock_guard lock(mutex());
    const auto found = blocks().find(reinterpret_cast<std::uintptr_t>(pointer));
    if (found == blocks().end()) return;
    found->second.pool = 0;
    unused = found->second.free;
  }
  if (unused) free(block);
}
