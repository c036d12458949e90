// SPDX-License-Identifier: Apache-2.0
// Barriers of a CTA, a warp and a cluster (PTX ISA, "bar, barrier", "bar.warp.sync",
// "barrier.cluster").
#include <algorithm>

#include "decode.h"

namespace ptxemu {
namespace {

/// n[0]: sync, arrive or red; n[1]: aligned; n[2]: the reduction.
enum Kind { kSync, kArrive, kRed };
enum Reduction { kPopc, kAnd, kOr };

void release_waiting(Machine& machine, Cta& cta, NamedBarrier& barrier) {
  Clocks& clocks = *cta.cluster->clocks;
  for (const auto& [target, which] : barrier.results) {
    if (which == kPopc)
      *target = barrier.in_favour;
    else
      *target = which == kAnd ? barrier.in_favour == barrier.votes : barrier.in_favour != 0;
  }
  for (const auto& [w, lane] : barrier.waiting) {
    Warp& warp = *cta.warps[w];
    if (machine.options.check_races)
      clocks.acquire(cta.first_thread + w * kWarpSize + lane, barrier.clock);
    warp.unblock(1u << lane);
  }
  barrier = NamedBarrier{};
  machine.progress++;
}

bool complete(const Cta& cta, const NamedBarrier& barrier) {
  return barrier.arrived != 0 &&
         barrier.arrived == (barrier.expected ? barrier.expected : cta.live_threads);
}

// bar.sync a[, b]; bar.arrive a, b; bar.red.OP d, a[, b], p
void cta_barrier(Step& s) {
  const Instruction& i = s.instruction;
  if (i.n[1] && !s.converge_all()) return;
  const bool red = i.n[0] == kRed;
  const std::size_t a = red ? 1 : 0, vote = i.operands.size() - 1;
  const std::size_t operands = i.operands.size() - a - (red ? 1 : 0);
  const int first = s.first_lane();
  const u64 number = s.in(a)[first] & 0xffffffffu;
  if (number >= s.cta.barriers.size())
    s.fail("barrier", "barrier " + std::to_string(number) + "; a CTA has 16", first);
  NamedBarrier& barrier = s.cta.barriers[number];
  const u32 expected = operands > 1 ? static_cast<u32>(s.in(a + 1)[first]) : 0;
  if (expected % kWarpSize != 0)
    s.fail(
        "barrier",
        "a thread count of " + std::to_string(expected) + ", which is no multiple of the warp size",
        first);
  if (barrier.arrived != 0 && barrier.expected != expected)
    s.fail("barrier",
           "barrier " + std::to_string(number) + " for " + std::to_string(expected) +
               " threads, where others arrived for " + std::to_string(barrier.expected),
           first);
  barrier.expected = expected;
  const u32 lanes = static_cast<u32>(std::popcount(s.mask));
  barrier.arrived += expected && i.n[1] ? kWarpSize : lanes;
  if (expected && barrier.arrived > expected)
    s.fail("barrier",
           "more threads at barrier " + std::to_string(number) + " than the " +
               std::to_string(expected) + " it expects",
           first);
  s.machine.progress++;
  s.each([&](int l) {
    if (s.machine.options.check_races) s.clocks().release(s.thread(l), barrier.clock);
    s.warp.pc[l]++;
    if (red) {
      barrier.votes++;
      barrier.in_favour += s.predicate(i.operands[vote], l);
      barrier.results.emplace_back(s.out(std::size_t{0}) + l, i.n[2]);
    }
    if (i.n[0] == kArrive) return;
    barrier.waiting.emplace_back(s.warp.index, static_cast<u32>(l));
    s.warp.waits_for[l] = number;
  });
  s.stay = true;
  if (i.n[0] != kArrive) s.warp.block(s.mask, Wait::kBarrier);
  if (complete(s.cta, barrier)) release_waiting(s.machine, s.cta, barrier);
}

void warp_barrier(Step& s) {
  const u32 members = static_cast<u32>(s.in(std::size_t{0})[s.first_lane()]);
  s.each([&](int l) {
    if (!(members >> l & 1))
      s.fail("barrier", "bar.warp.sync whose membermask does not name the lane", l);
  });
  if (!s.converge(members)) return;
  if (!s.machine.options.check_races) return;
  Clock clock;
  s.each([&](int l) { s.clocks().release(s.thread(l), clock); });
  s.each([&](int l) { s.clocks().acquire(s.thread(l), clock); });
}

// --- clusters -----------------------------------------------------------------------------------

void complete_cluster(Machine& machine, Cluster& cluster) {
  if (cluster.arrival.arrived == 0 || cluster.arrival.arrived < cluster.live_threads) return;
  cluster.completed_clock = std::move(cluster.arrival.clock);
  cluster.arrival = {};
  cluster.cluster_phase++;
  for (const auto& [warp, lane] : cluster.waiting) warp->unblock(1u << lane);
  cluster.waiting.clear();
  machine.progress++;
}

// barrier.cluster.arrive[.release|.relaxed][.aligned]; n[0]: releases
void cluster_arrive(Step& s) {
  Cluster& cluster = *s.cta.cluster;
  if (s.instruction.n[1] && !s.converge_all()) return;
  s.each([&](int l) {
    u64& phase = cluster.arrived_phase[s.thread(l)];
    if (phase != 0) s.fail("barrier", "two barrier.cluster.arrive without a wait", l);
    phase = cluster.cluster_phase + 1;
    cluster.arrival.arrived++;
    if (s.instruction.n[0] && s.machine.options.check_races)
      s.clocks().release(s.thread(l), cluster.arrival.clock);
  });
  s.machine.progress++;
  complete_cluster(s.machine, cluster);
}

// barrier.cluster.wait[.acquire][.aligned]: a lane that must wait executes it again
void cluster_wait(Step& s) {
  Cluster& cluster = *s.cta.cluster;
  if (s.instruction.n[1] && !s.converge_all()) return;
  s.stay = true;
  s.each([&](int l) {
    u64& phase = cluster.arrived_phase[s.thread(l)];
    if (phase == 0) s.fail("barrier", "barrier.cluster.wait without an arrive", l);
    if (cluster.cluster_phase < phase) {
      cluster.waiting.emplace_back(&s.warp, static_cast<u32>(l));
      s.warp.block(1u << l, Wait::kCluster);
      return;
    }
    phase = 0;
    if (s.machine.options.check_races) s.clocks().acquire(s.thread(l), cluster.completed_clock);
    s.warp.pc[l]++;
  });
}

}  // namespace

void thread_exits(Machine& machine, Warp& warp, u32 lanes) {
  Cta& cta = *warp.cta;
  warp.live &= ~lanes;
  const u32 count = static_cast<u32>(std::popcount(lanes));
  cta.live_threads -= count;
  cta.cluster->live_threads -= count;
  machine.progress++;
  u32 converging = 0;
  for (int l = 0; l < kWarpSize; ++l) converging |= u32{warp.wait[l] == Wait::kConverge} << l;
  warp.unblock(converging);
  for (NamedBarrier& barrier : cta.barriers)
    if (barrier.expected == 0 && complete(cta, barrier)) release_waiting(machine, cta, barrier);
  complete_cluster(machine, *cta.cluster);
}

Handler decode_barrier(Instruction& i, Modifiers& m) {
  if (m.flag("warp")) {
    m.flag("sync");
    return warp_barrier;
  }
  if (m.flag("cluster")) {
    i.n[0] = !m.flag("relaxed");
    m.ignore({"release", "acquire"});
    i.n[1] = m.flag("aligned");
    if (m.flag("arrive")) return cluster_arrive;
    return m.flag("wait") ? cluster_wait : nullptr;
  }
  m.flag("cta");
  i.n[0] = m.choice({"sync", "arrive", "red"});
  i.n[1] = m.flag("aligned") || i.parts[0] == "bar";
  i.n[2] = m.choice({"popc", "and", "or"});
  i.type = m.type();
  if (i.n[0] < 0 || i.operands.empty()) return nullptr;
  if (i.n[0] == kRed && (i.n[2] < 0 || i.operands.size() < 3)) return nullptr;
  return cta_barrier;
}

}  // namespace ptxemu
