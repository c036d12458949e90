// SPDX-License-Identifier: Apache-2.0
#include "clocks.h"

#include <algorithm>

namespace ptxemu {
namespace {

void join_row(u32* into, const u32* other, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) into[i] = std::max(into[i], other[i]);
}

}  // namespace

void join(std::vector<u32>& into, const std::vector<u32>& other) {
  if (into.size() < other.size()) into.resize(other.size());
  join_row(into.data(), other.data(), other.size());
}

ForeignPtr join(const ForeignPtr& a, const ForeignPtr& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  auto joined = std::make_shared<ForeignClocks>(*a);
  for (const auto& [cluster, clocks] : *b) join((*joined)[cluster], clocks);
  return joined;
}

void Fences::join(const Fences& other) {
  device = ptxemu::join(device, other.device);
  cta = ptxemu::join(cta, other.cta);
  pending = ptxemu::join(pending, other.pending);
}

void Clock::join(const Clock& other) {
  ptxemu::join(seen, other.seen);
  ptxemu::join(proxied, other.proxied);
  foreign = ptxemu::join(foreign, other.foreign);
  fences.join(other.fences);
}

void Clock::note(u32 agent, u32 clock, u32 agents) {
  if (seen.size() < agents) seen.resize(agents);
  seen[agent] = std::max(seen[agent], clock);
}

Clocks::Clocks(u32 cluster, u32 threads, u32 agents, bool track_proxy)
    : cluster_(cluster),
      threads_(threads),
      agents_(agents),
      rows_(std::size_t{threads} * agents),
      proxied_(track_proxy ? rows_.size() : 0),
      foreign_(threads),
      fences_(threads) {
  for (u32 t = 0; t < threads_; ++t) mutable_row(t)[t] = 1;
}

void Clocks::release(u32 thread, Clock& clock) {
  u32* mine = mutable_row(thread);
  if (clock.seen.empty()) {
    clock.seen.assign(mine, mine + agents_);
    if (const u32* p = proxied(thread)) clock.proxied.assign(p, p + agents_);
  } else {
    join_row(clock.seen.data(), mine, agents_);
    if (!proxied_.empty()) {
      clock.proxied.resize(agents_);
      join_row(clock.proxied.data(), proxied(thread), agents_);
    }
  }
  clock.foreign = join(clock.foreign, foreign_[thread]);
  clock.fences.join(fences_[thread]);
  ++mine[thread];
}

void Clocks::acquire(u32 thread, const Clock& clock) {
  join_row(mutable_row(thread), clock.seen.data(), clock.seen.size());
  if (!proxied_.empty())
    join_row(&proxied_[std::size_t{thread} * agents_], clock.proxied.data(), clock.proxied.size());
  foreign_[thread] = join(foreign_[thread], clock.foreign);
  fences_[thread].join(clock.fences);
}

void Clocks::learn(u32 thread, u32 agent, u32 clock) {
  u32& known = mutable_row(thread)[agent];
  known = std::max(known, clock);
}

void Clocks::fence_proxy(u32 thread) {
  if (proxied_.empty()) return;
  join_row(&proxied_[std::size_t{thread} * agents_], row(thread), agents_);
  ++mutable_row(thread)[thread];  // later writes are not covered by this fence
}

ForeignPtr Clocks::release_globally(u32 thread) {
  auto clocks = foreign_[thread] ? std::make_shared<ForeignClocks>(*foreign_[thread])
                                 : std::make_shared<ForeignClocks>();
  (*clocks)[cluster_].assign(row(thread), row(thread) + agents_);
  ++mutable_row(thread)[thread];
  return clocks;
}

void Clocks::acquire_globally(u32 thread, const ForeignPtr& clocks) {
  if (!clocks) return;
  const auto own = clocks->find(cluster_);
  if (own != clocks->end()) join_row(mutable_row(thread), own->second.data(), own->second.size());
  if (clocks->size() > (own != clocks->end() ? 1u : 0u))
    foreign_[thread] = join(foreign_[thread], clocks);
}

}  // namespace ptxemu
