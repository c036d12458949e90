// SPDX-License-Identifier: Apache-2.0
// cp.async and its groups (PTX ISA, "Data Movement and Conversion Instructions: Asynchronous
// copy").
//
// The copies of a thread are an agent of their own, whose clock is the number of the group. A copy
// is checked and its target filled with 0xff when it is issued; the bytes arrive when the thread
// waits for its group, the latest legal moment. Whoever reads before that wait, or without
// synchronising with the thread that waited, does not know of the agent's clock: a race.
#include "decode.h"

namespace ptxemu {

void land(Cta& cta, AsyncCopies::Group& group) {
  for (const PendingCopy& copy : group.copies) {
    u8* target = cta.shared.data() + copy.destination;
    std::memcpy(target, reinterpret_cast<const u8*>(copy.source), copy.source_bytes);
    std::memset(target + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  }
  group.copies.clear();
}

namespace {

u32 async_agent(Step& s, int lane) {
  return s.machine.agents.async + s.thread(lane);
}

// cp.async.{ca,cg}.shared.global [dst], [src], size[, src-size]
void copy(Step& s) {
  const Instruction& i = s.instruction;
  const u32 bytes = static_cast<u32>(s.in(2)[s.first_lane()]);
  if (bytes != 4 && bytes != 8 && bytes != 16)
    s.fail("bounds", "cp.async of " + std::to_string(bytes) + " bytes", s.first_lane());
  s.machine.progress++;
  s.each([&](int l) {
    const u32 wanted = i.n[0] ? static_cast<u32>(s.in(3)[l]) : bytes;
    if (wanted > bytes) s.fail("bounds", "cp.async whose src-size exceeds its size", l);
    AsyncCopies& copies = s.warp.async[l];
    Actor actor = s.actor(l);
    actor.agent = async_agent(s, l);
    actor.clock = copies.open.epoch;
    const u64 source = s.address(1, l);
    if (source % bytes != 0) s.fail("misaligned", "source of cp.async", l);
    if (wanted != 0) {
      // bytes past src-size are not read, so only those before it must exist
      const u32 piece = wanted & (0 - wanted);
      for (u32 at = 0; at < wanted; at += piece) {
        const Step::Place from = s.resolve(Space::kGlobal, source + at, piece, false, l);
        s.record(from, piece, actor, false, l);
      }
    }
    const Step::Place to = s.shared(s.address(std::size_t{0}, l), bytes, true, l, bytes);
    s.record(to, bytes, actor, true, l);
    std::memset(to.data, 0xff, bytes);
    copies.open.copies.push_back({static_cast<u32>(to.address), source, bytes, wanted});
  });
}

void commit(AsyncCopies& copies) {
  const u32 epoch = copies.open.epoch;
  copies.committed.push_back(std::move(copies.open));
  copies.open = {epoch + 1, {}};
}

void commit_group(Step& s) {
  s.each([&](int l) { commit(s.warp.async[l]); });
}

// cp.async.wait_group N: all but the latest N groups are complete; wait_all: everything is
void wait_group(Step& s) {
  const bool all = s.operand_count() == 0;
  const std::size_t keep = all ? 0 : s.in(std::size_t{0})[s.first_lane()];
  s.each([&](int l) {
    AsyncCopies& copies = s.warp.async[l];
    if (all) commit(copies);
    while (copies.committed.size() > keep) {
      AsyncCopies::Group& group = copies.committed.front();
      land(s.cta, group);
      if (s.machine.options.check_races)
        s.clocks().learn(s.thread(l), async_agent(s, l), group.epoch);
      copies.committed.pop_front();
    }
  });
}

// cp.async.mbarrier.arrive[.noinc].b64 [bar]: arrives when the thread's copies so far are complete.
// They complete at once here; only who waits on the mbarrier learns of it.
void arrive_on_mbarrier(Step& s) {
  s.each([&](int l) {
    AsyncCopies& copies = s.warp.async[l];
    for (AsyncCopies::Group& group : copies.committed) land(s.cta, group);
    land(s.cta, copies.open);
    u64 address = s.address(std::size_t{0}, l);
    const Step::Place place = s.shared(address & (kSharedWindow - 1), 8, false, l, 8);
    s.record(place, 8, s.actor(l, true), false, l);
    Mbarrier& barrier = find_mbarrier(s, *place.cta, static_cast<u32>(place.address), l);
    barrier.current.note(async_agent(s, l), copies.open.epoch, s.clocks().agents());
    copies.open.epoch++;
    if (s.instruction.n[0] == 0) barrier.pending++;
    arrive(s.machine, barrier, 1);
  });
}

}  // namespace

Handler decode_async_copy(Instruction& i, Modifiers& m) {
  if (i.has("bulk")) return decode_bulk_copy(i, m);
  if (!m.flag("async")) return nullptr;
  if (m.flag("commit_group")) return commit_group;
  if (m.flag("wait_group") || m.flag("wait_all")) return wait_group;
  if (m.flag("mbarrier")) {
    i.n[0] = m.flag("noinc");
    i.space = m.space();
    i.type = m.type();
    return m.flag("arrive") ? arrive_on_mbarrier : nullptr;
  }
  const bool hint = i.has("L2::cache_hint");
  m.cache_hints();
  const bool both = (m.flag("shared") || m.flag("shared::cta")) && m.flag("global");
  const std::size_t operands = i.operands.size() - (hint ? 1 : 0);
  i.n[0] = operands == 4;
  return both && operands >= 3 ? copy : nullptr;
}

}  // namespace ptxemu
