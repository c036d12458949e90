// SPDX-License-Identifier: Apache-2.0
// Which warp runs, and for how long; one instruction of a warp; what to do when
// none can run.
#include <algorithm>
#include <utility>

#include "machine.h"
#include "wgmma_registers.h"

namespace ptxemu {
namespace {

constexpr u32 kLongTurn = 2000;  // warp instructions, in order
constexpr u32 kShortTurn = 64;   // at most, at random
constexpr u32 kPollsPerTurn = 16;
constexpr u32 kFairness = 64;        // every so many steps of a diverged warp another lane leads
constexpr u64 kIdleLimit = 200'000;  // warp instructions without progress, by threads that poll

bool is_uniform(const Warp& w) {
  if (w.blocked != 0 || w.live == 0) return false;
  const int first = std::countr_zero(w.live);
  for (u32 rest = w.live; rest != 0; rest &= rest - 1) {
    const int l = std::countr_zero(rest);
    if (w.pc[l] != w.pc[first] || w.frame[l] != w.frame[first]) return false;
  }
  return true;
}

/// The lane that leads a diverged warp: the deepest call, then the lowest
/// address, which brings the lanes together again; now and then another one, so
/// that lanes that wait for each other go on.
int leader(Machine& machine, Warp& w) {
  const u32 ready = w.live & ~w.blocked;
  const bool other = machine.options.seed != 0 ? machine.draw(8) == 0 : ++w.turn % kFairness == 0;
  if (other) {
    const u32 start = machine.options.seed != 0 ? static_cast<u32>(machine.draw(kWarpSize))
                                                : w.turn / kFairness % kWarpSize;
    return static_cast<int>((std::countr_zero(std::rotr(ready, static_cast<int>(start))) + start) %
                            kWarpSize);
  }
  int best = -1;
  for (u32 rest = ready; rest != 0; rest &= rest - 1) {
    const int l = std::countr_zero(rest);
    if (best < 0 || w.frame[l]->depth > w.frame[best]->depth ||
        (w.frame[l]->depth == w.frame[best]->depth && w.pc[l] < w.pc[best]))
      best = l;
  }
  return best;
}

/// The lanes that execute with `lead`, those waiting there to converge
/// included.
u32 group_of(Warp& w, int lead) {
  u32 group = 0, waiting = 0;
  for (u32 rest = w.live; rest != 0; rest &= rest - 1) {
    const int l = std::countr_zero(rest);
    if (w.pc[l] != w.pc[lead] || w.frame[l] != w.frame[lead]) continue;
    if (!(w.blocked >> l & 1)) {
      group |= 1u << l;
    } else if (w.wait[l] == Wait::kConverge) {
      waiting |= 1u << l;
    }
  }
  w.unblock(waiting);
  return group | waiting;
}

void advance(Warp& w, u32 lanes) {
  for (int l = 0; l < kWarpSize; ++l) w.pc[l] += lanes >> l & 1;
}

/// Are the lanes of a warp waiting for each other at different places?
bool only_converging(const Warp& w) {
  for (u32 rest = w.live; rest != 0; rest &= rest - 1)
    if (w.wait[std::countr_zero(rest)] != Wait::kConverge) return false;
  return w.live != 0;
}

const char* reason(Wait wait) {
  switch (wait) {
    case Wait::kConverge:
      return "waits for lanes of its warp at";
    case Wait::kBarrier:
      return "waits at barrier";
    case Wait::kMbarrier:
      return "waits for the mbarrier at shared+";
    case Wait::kCluster:
      return "waits for its cluster at";
    default:
      return "runs at";
  }
}

}  // namespace

void Warp::block(u32 lanes, Wait why) {
  blocked |= lanes;
  uniform = false;
  for (u32 rest = lanes; rest != 0; rest &= rest - 1) wait[std::countr_zero(rest)] = why;
}

void Warp::unblock(u32 lanes) {
  blocked &= ~lanes;
  for (u32 rest = lanes; rest != 0; rest &= rest - 1) wait[std::countr_zero(rest)] = Wait::kNone;
}

bool Step::converge(u32 needed) {
  needed &= warp.live;
  if ((mask & needed) == needed) return true;
  warp.block(mask, Wait::kConverge);
  stay = true;
  return false;
}

bool Step::converge_all() {
  return converge(kAllLanes);
}

bool Step::converge_full() {
  if (!converge(kAllLanes)) return false;
  if (mask != kAllLanes)
    fail("barrier", instruction.parts[0] + " by a warp that does not have its 32 lanes",
         first_lane());
  return true;
}

const u64* Step::special(u32 index) const {
  u64* row = &warp.specials[std::size_t{index} * kWarpSize];
  const Special which = static_cast<Special>(index);
  if (which == Special::kClock || which == Special::kGlobaltimer)
    std::fill_n(row, kWarpSize, machine.stats.warp_instructions);
  return row;
}

void Machine::step(Warp& w) {
  const int lead = w.uniform ? std::countr_zero(w.live) : leader(*this, w);
  const u32 group = w.uniform ? w.live : group_of(w, lead);
  Frame& frame = *w.frame[lead];
  const Function& function = *frame.function;
  const u32 pc = w.pc[lead];
  if (pc >= function.code.size())
    throw Error("parse", "control runs off the end of " + function.name);
  const Instruction& i = function.code[pc];

  u32 mask = group;
  if (i.guard.kind != OperandKind::kNone) {
    const u64* row = &frame.registers[std::size_t{i.guard.index} * kWarpSize];
    u32 set = 0;
    for (int l = 0; l < kWarpSize; ++l) set |= static_cast<u32>(row[l] & 1) << l;
    mask &= i.guard.negate ? ~set : set;
  }
  stats.warp_instructions++;
  stats.lane_instructions += static_cast<u64>(std::popcount(mask));
  opcode_counts[i.opcode]++;
  if (mask != group) advance(w, group & ~mask);
  const u32 live_before = w.live;
  bool stayed = false;
  if (mask != 0) {
    Step s(*this, w, frame, i, mask, first_instruction[&function] + pc);
    if (!i.handler) s.fail("unsupported", i.reason, s.first_lane());
    const bool registers = kernel.uses_wgmma && function.uses_wgmma;
    if (registers) check_in_flight(s);
    i.handler(s);
    if (s.shared_lanes != 0) count_banks(s, stats.banks);
    stayed = s.stay;
    if (!stayed) advance(w, mask);
    if (registers && !stayed) mark_written(s);
  }
  if (!w.uniform || stayed || w.live != live_before) w.uniform = is_uniform(w);
}

u32 Machine::turn(Warp& w, u32 limit) {
  const u32 polls = w.polls;
  u32 done = 0;
  while (done < limit && w.runnable() && w.polls - polls < kPollsPerTurn) {
    step(w);
    ++done;
  }
  return done;
}

bool Machine::turn_in_order() {
  bool ran = false;
  const u64 before = progress;
  for (const auto& cluster : resident)
    for (const auto& cta : cluster->ctas)
      for (const auto& warp : cta->warps)
        if (warp->runnable()) ran = turn(*warp, kLongTurn) != 0 || ran;
  if (ran && progress == before)  // all spin: let something land
    for (const auto& cluster : resident) land_transfer(*cluster, 0);
  return ran;
}

bool Machine::turn_at_random() {
  std::vector<Warp*> ready;
  for (const auto& cluster : resident) {
    if (!cluster->transfers.empty() && draw(4) == 0)
      land_transfer(*cluster, draw(cluster->transfers.size()));
    for (const auto& cta : cluster->ctas)
      for (const auto& warp : cta->warps)
        if (warp->runnable()) ready.push_back(warp.get());
  }
  if (ready.empty()) return false;
  turn(*ready[draw(ready.size())], 1 + static_cast<u32>(draw(kShortTurn)));
  return true;
}

bool Machine::run_resident() {
  const bool ran = options.seed != 0 ? turn_at_random() : turn_in_order();
  if (ran) return true;
  for (const auto& cluster : resident)
    if (!cluster->transfers.empty())
      return land_transfer(*cluster, options.seed ? draw(cluster->transfers.size()) : 0);
  return false;
}

Stats Machine::run() {
  const Dim3 c = config.cluster;
  const u64 clusters = config.grid.count() / c.count();
  const u64 room = config.cooperative ? clusters : std::max<u32>(1, options.resident);
  u64 next = 0, last_progress = 0, idle_since = 0;
  while (next < clusters || !resident.empty()) {
    while (next < clusters && resident.size() < room)
      resident.push_back(make_cluster(static_cast<u32>(next++)));
    if (!run_resident()) report_deadlock("no thread can go on");
    if (progress != last_progress) {
      last_progress = progress;
      idle_since = stats.warp_instructions;
    } else if (stats.warp_instructions - idle_since > kIdleLimit) {
      bool polls = false;
      for (const auto& cluster : resident)
        for (const auto& cta : cluster->ctas)
          for (const auto& warp : cta->warps) polls |= std::exchange(warp->polls, 0) > 1000;
      if (polls) report_deadlock("threads poll memory that nobody changes");
      idle_since = stats.warp_instructions;
    }
    if (options.max_instructions && stats.warp_instructions > options.max_instructions)
      report_deadlock("the limit of instructions is reached");
    std::erase_if(resident, [&](const auto& cluster) {
      if (cluster->live_threads != 0) return false;
      while (land_transfer(*cluster, 0)) {
      }
      return true;
    });
  }
  for (std::size_t op = 0; op < opcode_counts.size(); ++op)
    if (opcode_counts[op]) stats.opcodes[module.opcodes[op]] += opcode_counts[op];
  return stats;
}

void Machine::report_deadlock(const char* why) {
  std::string text = why;
  bool diverged = false;
  int lines = 0;
  for (const auto& cluster : resident) {
    for (const auto& cta : cluster->ctas) {
      for (const auto& warp : cta->warps) {
        diverged |= only_converging(*warp);
        for (u32 rest = warp->live; rest != 0 && lines < 12;) {
          // one line for the lanes of a warp that are at the same place
          const int l = std::countr_zero(rest);
          u32 same = 0;
          for (u32 r = rest; r != 0; r &= r - 1) {
            const int o = std::countr_zero(r);
            if (warp->pc[o] == warp->pc[l] && warp->frame[o] == warp->frame[l] &&
                warp->wait[o] == warp->wait[l])
              same |= 1u << o;
          }
          rest &= ~same;
          const Wait wait = warp->wait[l];
          const auto& code = warp->frame[l]->function->code;
          const u32 at = warp->pc[l] - (wait == Wait::kBarrier ? 1 : 0);
          text += "\n  " + std::to_string(std::popcount(same)) + " lanes: " + reason(wait);
          if (wait == Wait::kBarrier || wait == Wait::kMbarrier)
            text += (wait == Wait::kBarrier ? " " : "") + std::to_string(warp->waits_for[l]);
          text +=
              ": " + place(*warp, static_cast<u32>(l), code[std::min<u64>(at, code.size() - 1)]);
          ++lines;
        }
      }
    }
  }
  throw Error(options.max_instructions && stats.warp_instructions > options.max_instructions
                  ? "limit"
              : diverged ? "barrier"
                         : "deadlock",
              text);
}

}  // namespace ptxemu
