// SPDX-License-Identifier: Apache-2.0
// Happens-before by vector clocks.
//
// An *agent* is whatever accesses memory on its own schedule: a thread, the cp.async copies of a
// thread, the bulk copies of a thread, the wgmma operations of a warp, one TMA load. Each has a
// clock of its own; agents of a cluster are numbered densely. Only threads have knowledge (a row):
// what they know of every agent of their cluster, and of other clusters in `foreign`.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "types.h"

namespace ptxemu {

/// Clocks of whole clusters, by the cluster's linear index.
using ForeignClocks = std::map<u32, std::vector<u32>>;
using ForeignPtr = std::shared_ptr<const ForeignClocks>;

/// Of a thread: what its fences have published (for writes of device or CTA scope that follow), and
/// what its strong reads have brought that a fence has yet to make count. Barriers hand these on:
/// all threads write and fence, one of them signals; one reads the signal, all fence and read.
struct Fences {
  ForeignPtr device, cta, pending;
  void join(const Fences& other);
};

/// What a synchronisation object (barrier, mbarrier) hands from those who arrive to those who wait.
struct Clock {
  std::vector<u32> seen;     // by agent
  std::vector<u32> proxied;  // the part of it that the async proxy sees, too
  ForeignPtr foreign;
  Fences fences;

  void clear() { *this = {}; }
  void join(const Clock& other);
  /// `agent` has finished everything up to `clock`.
  void note(u32 agent, u32 clock, u32 agents);
};

void join(std::vector<u32>& into, const std::vector<u32>& other);
ForeignPtr join(const ForeignPtr& a, const ForeignPtr& b);

/// The knowledge of all threads of one cluster.
class Clocks {
 public:
  Clocks(u32 cluster, u32 threads, u32 agents, bool track_proxy);

  u32 cluster() const { return cluster_; }
  u32 agents() const { return agents_; }
  const u32* row(u32 thread) const { return &rows_[std::size_t{thread} * agents_]; }
  const u32* proxied(u32 thread) const {
    return proxied_.empty() ? nullptr : &proxied_[std::size_t{thread} * agents_];
  }
  u32 now(u32 thread) const { return row(thread)[thread]; }
  const ForeignClocks* foreign(u32 thread) const { return foreign_[thread].get(); }

  Fences& fences(u32 thread) { return fences_[thread]; }

  /// Hands the thread's knowledge to `clock`; what the thread does later is not part of it.
  void release(u32 thread, Clock& clock);
  void acquire(u32 thread, const Clock& clock);
  /// `thread` now knows that `agent` has finished everything up to `clock`.
  void learn(u32 thread, u32 agent, u32 clock);
  /// fence.proxy.async: what the thread knows is visible to the async proxy, too.
  void fence_proxy(u32 thread);

  /// The same for objects that other clusters may use.
  ForeignPtr release_globally(u32 thread);
  void acquire_globally(u32 thread, const ForeignPtr& clocks);

 private:
  u32* mutable_row(u32 thread) { return &rows_[std::size_t{thread} * agents_]; }

  u32 cluster_, threads_, agents_;
  std::vector<u32> rows_;     // [threads][agents]
  std::vector<u32> proxied_;  // the same, or empty
  std::vector<ForeignPtr> foreign_;
  std::vector<Fences> fences_;
};

}  // namespace ptxemu
