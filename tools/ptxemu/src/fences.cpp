// SPDX-License-Identifier: Apache-2.0
// membar, fence and the effects of strong accesses (PTX ISA, "Memory Consistency Model": release
// and acquire patterns). A fence publishes what its thread knows; a strong write after it carries
// that to its location; a strong read brings it to its thread, where it counts after a fence or at
// once if the read acquires.
#include "decode.h"

namespace ptxemu {

void before_strong_write(Step& s, const Step::Place& place, Order order, bool cta_scope, int lane) {
  if (!s.machine.options.check_races) return;
  Cluster& cluster = *s.cta.cluster;
  const u32 thread = s.thread(lane);
  ForeignPtr device = cluster.clocks->fences(thread).device;
  ForeignPtr local = cluster.clocks->fences(thread).cta;
  if (order == Order::kRelease || order == Order::kAcqRel) {
    const ForeignPtr now = cluster.clocks->release_globally(thread);
    local = join(local, now);
    if (!cta_scope) device = join(device, now);
  }
  if (!device && !local) return;
  SyncLocation& location = s.sync_location(place);
  location.device = join(location.device, device);
  if (location.cta_linear != s.cta.linear) location.cta = nullptr;
  location.cta_linear = s.cta.linear;
  location.cta = join(location.cta, local);
}

void after_strong_read(Step& s, const Step::Place& place, Order order, bool, int lane) {
  if (!s.machine.options.check_races) return;
  Cluster& cluster = *s.cta.cluster;
  const u32 thread = s.thread(lane);
  SyncLocation& location = s.sync_location(place);
  const ForeignPtr found =
      location.cta_linear == s.cta.linear ? join(location.device, location.cta) : location.device;
  if (order == Order::kAcquire || order == Order::kAcqRel)
    cluster.clocks->acquire_globally(thread, found);
  else
    cluster.clocks->fences(thread).pending = join(cluster.clocks->fences(thread).pending, found);
}

namespace {

// n[0]: CTA scope
void fence(Step& s) {
  if (!s.machine.options.check_races) return;
  Cluster& cluster = *s.cta.cluster;
  s.each([&](int l) {
    const u32 thread = s.thread(l);
    Fences& fences = cluster.clocks->fences(thread);
    cluster.clocks->acquire_globally(thread, fences.pending);
    fences.pending = nullptr;
    fences.cta = cluster.clocks->release_globally(thread);
    if (s.instruction.n[0] == 0) fences.device = fences.cta;
  });
}

// fence.proxy.async: orders generic accesses with those of the async proxy (TMA, bulk, wgmma)
void fence_proxy(Step& s) {
  s.each([&](int l) { s.clocks().fence_proxy(s.thread(l)); });
}

}  // namespace

Handler decode_fence(Instruction& i, Modifiers& m) {
  if (m.flag("proxy")) {
    const bool async = m.flag("async") || m.flag("async::generic");
    // proxies of aliases and tensor maps: nothing here depends on them
    m.ignore({"alias", "tensormap::generic", "acquire", "release", "sync_restrict::shared::cta",
              "sync_restrict::shared::cluster", "cluster", "gpu", "sys", "cta"});
    m.space();
    return async ? fence_proxy : [](Step&) {};
  }
  // fence.mbarrier_init.release.cluster: makes an initialised mbarrier visible
  m.ignore({"mbarrier_init", "sc", "acq_rel", "acquire", "release", "sync_restrict::shared::cta",
            "sync_restrict::shared::cluster"});
  const int scope = m.choice({"cta", "cluster", "gpu", "sys", "gl"});
  if (scope < 0) return nullptr;
  i.n[0] = scope == 0;
  return fence;
}

}  // namespace ptxemu
