// SPDX-License-Identifier: Apache-2.0
// mbarrier objects in shared memory (PTX ISA, "Parallel Synchronization and Communication
// Instructions: mbarrier"). The object's state is kept beside the memory; a state token is the
// number of the phase it was taken in.
#include "decode.h"

namespace ptxemu {

Mbarrier& find_mbarrier(Step& s, Cta& cta, u32 address, int lane) {
  const auto found = cta.mbarriers.find(address);
  if (found == cta.mbarriers.end())
    s.fail("mbarrier", "no mbarrier.init at shared+" + std::to_string(address) + " before its use",
           lane);
  return found->second;
}

void complete_if_done(Machine& machine, Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.transactions != 0) return;
  barrier.completed.join(barrier.current);
  barrier.current.clear();
  barrier.pending = barrier.count;
  barrier.phase ^= 1;
  barrier.phases++;
  machine.progress++;
  for (const auto& [warp, lane] : barrier.waiting) warp->unblock(1u << lane);
  barrier.waiting.clear();
}

void arrive(Machine& machine, Mbarrier& barrier, u32 count) {
  barrier.pending -= count;
  machine.progress++;
  complete_if_done(machine, barrier);
}

namespace {

/// The object at an address operand; using it is an access that must be ordered after its init.
Mbarrier& object(Step& s, std::size_t operand, int lane) {
  const u64 address = s.address(operand, lane) & (kSharedWindow - 1);
  const Step::Place place = s.shared(address, 8, true, lane, 8);
  s.record(place, 8, s.actor(lane, true), false, lane);
  return find_mbarrier(s, *place.cta, static_cast<u32>(place.address), lane);
}

u64 number(Step& s, std::size_t operand, int lane) {
  return s.in(operand)[lane] & 0xffffffffu;
}

void init(Step& s) {
  s.machine.progress++;
  s.each([&](int l) {
    const u64 address = s.address(std::size_t{0}, l) & (kSharedWindow - 1);
    const Step::Place place = s.shared(address, 8, true, l, 8);
    s.record(place, 8, s.actor(l), true, l);
    const u64 count = number(s, 1, l);
    if (count == 0 || count > (1u << 20) - 1)
      s.fail("mbarrier", "mbarrier.init for " + std::to_string(count) + " arrivals", l);
    Mbarrier& barrier = place.cta->mbarriers[static_cast<u32>(place.address)];
    barrier = Mbarrier{};
    barrier.count = static_cast<u32>(count);
    barrier.pending = static_cast<i64>(count);
  });
}

void invalidate(Step& s) {
  s.each([&](int l) {
    const u64 address = s.address(std::size_t{0}, l) & (kSharedWindow - 1);
    const Step::Place place = s.shared(address, 8, true, l, 8);
    find_mbarrier(s, *place.cta, static_cast<u32>(place.address), l);
    s.record(place, 8, s.actor(l), true, l);
    place.cta->mbarriers.erase(static_cast<u32>(place.address));
  });
}

// mbarrier.arrive[.expect_tx][.noComplete] [state,] [addr] [, count]
// n[0]: expect_tx; n[1]: drops; n[2]: the operand with the address; n[3]: releases
void arrive_on(Step& s) {
  const Instruction& i = s.instruction;
  const std::size_t at = static_cast<std::size_t>(i.n[2]);
  s.each([&](int l) {
    Mbarrier& barrier = object(s, at, l);
    const bool has_operand = i.operands.size() > at + 1;
    const u32 count = has_operand && !i.n[0] ? static_cast<u32>(number(s, at + 1, l)) : 1;
    if (barrier.pending < static_cast<i64>(count))
      s.fail("mbarrier", "more arrivals than the " + std::to_string(barrier.count) + " of a phase",
             l);
    if (at == 1) s.out(std::size_t{0})[l] = barrier.phases;
    if (i.n[0]) barrier.transactions += static_cast<i64>(number(s, at + 1, l));
    if (i.n[3] && s.machine.options.check_races) s.clocks().release(s.thread(l), barrier.current);
    if (i.n[1]) barrier.count -= count;
    arrive(s.machine, barrier, count);
  });
}

// mbarrier.expect_tx [addr], bytes; mbarrier.complete_tx [addr], bytes (n[0]: completes)
void transactions(Step& s) {
  s.machine.progress++;
  s.each([&](int l) {
    Mbarrier& barrier = object(s, 0, l);
    const i64 bytes = static_cast<i64>(number(s, 1, l));
    barrier.transactions += s.instruction.n[0] ? -bytes : bytes;
    if (s.instruction.n[0]) complete_if_done(s.machine, barrier);
  });
}

// mbarrier.{test,try}_wait[.parity] p, [addr], state-or-parity [, time]
// n[0]: parity; n[1]: try_wait, which may block; n[2]: acquires
void wait(Step& s) {
  const Instruction& i = s.instruction;
  u32 blocked = 0;
  std::array<Mbarrier*, kWarpSize> barriers{};
  s.each([&](int l) {
    Mbarrier& barrier = object(s, 1, l);
    const u64 wanted = number(s, 2, l);
    const bool done = i.n[0] ? (barrier.phase & 1) != (wanted & 1) : barrier.phases > wanted;
    // a time limit may end a try_wait early, so a random schedule lets it fail now and then
    const bool gives_up = !i.n[1] || (s.machine.options.seed != 0 && s.machine.draw(2) == 0);
    if (!done && !gives_up) {
      blocked |= 1u << l;
      barriers[l] = &barrier;
      return;
    }
    s.out(std::size_t{0})[l] = done;
    if (done && i.n[2] && s.machine.options.check_races)
      s.clocks().acquire(s.thread(l), barrier.completed);
    s.warp.pc[l]++;
    if (!done) s.warp.polls++;
  });
  s.stay = true;
  if (blocked == 0) return;
  s.warp.block(blocked, Wait::kMbarrier);
  for (u32 rest = blocked; rest != 0; rest &= rest - 1) {
    const int l = std::countr_zero(rest);
    barriers[l]->waiting.emplace_back(&s.warp, static_cast<u32>(l));
    s.warp.waits_for[l] = s.address(1, l) & ((1u << kRankShift) - 1);
  }
}

}  // namespace

Handler decode_mbarrier(Instruction& i, Modifiers& m) {
  m.ignore({"cta", "cluster"});
  const bool relaxed = m.flag("relaxed");
  m.ignore({"release", "acquire"});
  i.space = m.space();
  if (m.type() != Type::kB64) return nullptr;
  if (m.flag("init")) return init;
  if (m.flag("inval")) return invalidate;
  const int waits = m.choice({"test_wait", "try_wait"});
  if (waits >= 0) {
    i.n[0] = m.flag("parity");
    i.n[1] = waits;
    i.n[2] = !relaxed;
    return i.operands.size() >= 3 ? wait : nullptr;
  }
  const int kind = m.choice({"arrive", "arrive_drop"});
  if (kind >= 0) {
    i.n[0] = m.flag("expect_tx");
    i.n[1] = kind;
    m.flag("noComplete");
    i.n[2] = i.operands[0].kind == OperandKind::kAddress ? 0 : 1;
    i.n[3] = !relaxed;
    return arrive_on;
  }
  i.n[0] = m.choice({"expect_tx", "complete_tx"});
  return i.n[0] >= 0 ? transactions : nullptr;
}

}  // namespace ptxemu
