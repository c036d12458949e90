// SPDX-License-Identifier: Apache-2.0
// cp.async.bulk and cp.async.bulk.tensor: the copies of the async proxy (PTX ISA, "Asynchronous
// copy: bulk", "Tensors", "Swizzling modes").
//
// A copy to shared memory is an agent of its own: checked, and its target filled with 0xff, when it
// is issued; its bytes arrive when the scheduler says so, and complete_tx hands the agent's clock
// to the mbarrier. A copy to global memory is done at once; the agent of the thread's bulk groups
// stands for it until wait_group.
#include "bulk_copy.h"

#include <algorithm>

namespace ptxemu {

void issue(Step& s, BulkTransfer transfer, int lane) {
  Cluster& cluster = *s.cta.cluster;
  const u32 slot = cluster.next_transfer_agent++ % AgentLayout::kTransfers;
  transfer.agent = s.machine.agents.transfers + slot;
  transfer.epoch = ++cluster.transfer_epochs[slot];
  Actor actor = s.actor(lane);
  actor.agent = transfer.agent;
  actor.clock = transfer.epoch;
  actor.async_proxy = true;
  for (const BulkTransfer::Piece& piece : transfer.pieces) {
    Step::Place to{transfer.cta->shared.data() + piece.destination, Space::kShared, transfer.cta,
                   piece.destination};
    s.record(to, piece.bytes, actor, true, lane);
    std::memset(to.data, 0xff, piece.bytes);
    if (piece.source == 0) continue;
    if (piece.source_cta) {
      const Step::Place from{nullptr, Space::kShared, piece.source_cta,
                             piece.source - reinterpret_cast<u64>(piece.source_cta->shared.data())};
      s.record(from, piece.bytes, actor, false, lane);
    } else {
      s.record({nullptr, Space::kGlobal, nullptr, piece.source}, piece.bytes, actor, false, lane);
    }
  }
  cluster.transfers.push_back(std::move(transfer));
  s.machine.progress++;
}

bool Machine::land_transfer(Cluster& cluster, std::size_t index) {
  if (index >= cluster.transfers.size()) return false;
  const BulkTransfer transfer = std::move(cluster.transfers[index]);
  cluster.transfers.erase(cluster.transfers.begin() + static_cast<std::ptrdiff_t>(index));
  for (const BulkTransfer::Piece& piece : transfer.pieces) {
    u8* target = transfer.cta->shared.data() + piece.destination;
    if (piece.source != 0)
      std::memcpy(target, reinterpret_cast<const u8*>(piece.source), piece.bytes);
    else
      std::memset(target, 0, piece.bytes);
  }
  progress++;
  const auto found = transfer.barrier_cta->mbarriers.find(transfer.barrier);
  if (found == transfer.barrier_cta->mbarriers.end())
    throw Error("mbarrier", "a bulk copy completes on an mbarrier that is no longer valid");
  Mbarrier& barrier = found->second;
  barrier.current.note(transfer.agent, transfer.epoch, cluster.clocks->agents());
  barrier.transactions -= transfer.bytes;
  complete_if_done(*this, barrier);
  return true;
}

Step::Place barrier_place(Step& s, std::size_t operand, int lane) {
  const Step::Place place =
      s.shared(s.address(operand, lane) & (kSharedWindow - 1), 8, true, lane, 8);
  s.record(place, 8, s.actor(lane, true), false, lane);
  find_mbarrier(s, *place.cta, static_cast<u32>(place.address), lane);
  return place;
}

std::vector<Cta*> multicast_targets(Step& s, Cta* single, bool multicast, std::size_t operand,
                                    int lane) {
  if (!multicast) return {single};
  const u64 mask = s.in(operand)[lane] & 0xffff;
  std::vector<Cta*> targets;
  for (std::size_t rank = 0; rank < 16; ++rank) {
    if (!(mask >> rank & 1)) continue;
    if (rank >= s.cta.cluster->ctas.size())
      s.fail("bounds", "multicast to a rank that the cluster does not have", lane);
    targets.push_back(s.cta.cluster->ctas[rank].get());
  }
  return targets;
}

Actor group_actor(Step& s, int lane) {
  Actor actor = s.actor(lane);
  actor.agent = s.machine.agents.bulk + s.thread(lane);
  actor.clock = s.warp.bulk[lane].epoch;
  actor.async_proxy = true;
  return actor;
}

namespace {

/// n[0]: bytes come from shared memory of this CTA; n[1]: multicast; n[2]: reduction, or -1
u32 checked_size(Step& s, std::size_t operand, int lane) {
  const u32 bytes = static_cast<u32>(s.in(operand)[lane]);
  if (bytes % 16 != 0)
    s.fail("misaligned", "bulk copy of " + std::to_string(bytes) + " bytes, no multiple of 16",
           lane);
  return bytes;
}

// cp.async.bulk.shared.{global,shared::cta}.mbarrier [dst], [src], size, [mbar] [, mask]
void copy_to_shared(Step& s) {
  const Instruction& i = s.instruction;
  s.each([&](int l) {
    const u32 bytes = checked_size(s, 2, l);
    const Step::Place barrier = barrier_place(s, 3, l);
    const Step::Place to =
        s.shared(s.address(std::size_t{0}, l) & (kSharedWindow - 1), bytes, true, l, 16);
    const u64 source = s.address(1, l);
    BulkTransfer transfer;
    Cta* source_cta = nullptr;
    if (i.n[0]) {
      const Step::Place from = s.shared(source & (kSharedWindow - 1), bytes, false, l, 16);
      source_cta = from.cta;
      transfer.pieces.push_back(
          {reinterpret_cast<u64>(from.data), static_cast<u32>(to.address), bytes, source_cta});
    } else {
      for (u32 at = 0; at < bytes; at += 16) s.resolve(Space::kGlobal, source + at, 16, false, l);
      transfer.pieces.push_back({source, static_cast<u32>(to.address), bytes, nullptr});
    }
    transfer.bytes = bytes;
    for (Cta* target : multicast_targets(s, to.cta, i.n[1] != 0, 4, l)) {
      BulkTransfer one = transfer;
      one.cta = target;
      one.barrier_cta = i.n[1] ? target : barrier.cta;
      one.barrier = static_cast<u32>(barrier.address);
      issue(s, std::move(one), l);
    }
  });
}

// cp[.reduce].async.bulk.global.shared::cta.bulk_group[.OP.TYPE] [dst], [src], size
void copy_to_global(Step& s) {
  const Instruction& i = s.instruction;
  s.machine.progress++;
  s.each([&](int l) {
    const u32 bytes = checked_size(s, 2, l);
    const u64 target = s.address(std::size_t{0}, l);
    const Step::Place from = s.shared(s.address(1, l) & (kSharedWindow - 1), bytes, false, l, 16);
    Actor actor = group_actor(s, l);
    s.record(from, bytes, actor, false, l);
    actor.strong = i.n[2] >= 0;  // a reduction is relaxed
    for (u32 at = 0; at < bytes; at += 16) {
      const Step::Place to = s.resolve(Space::kGlobal, target + at, 16, true, l);
      s.record(to, 16, actor, true, l);
      store_elements(to.data, from.data + at, 16, i.n[2], i.type);
    }
  });
}

void commit_group(Step& s) {
  s.each([&](int l) { s.warp.bulk[l].epoch++; });
}

// cp.async.bulk.wait_group[.read] N
void wait_group(Step& s) {
  const u64 keep = s.in(std::size_t{0})[s.first_lane()];
  s.each([&](int l) {
    const u32 committed = s.warp.bulk[l].epoch - 1;
    if (committed > keep && s.machine.options.check_races)
      s.clocks().learn(s.thread(l), s.machine.agents.bulk + s.thread(l),
                       committed - static_cast<u32>(keep));
  });
}

}  // namespace

void store_elements(u8* target, const u8* source, u32 bytes, int reduction, Type type) {
  if (reduction < 0) {
    std::memcpy(target, source, bytes);
    return;
  }
  const u32 size = size_of(type);
  for (u32 at = 0; at < bytes; at += size) {
    u64 old = 0, value = 0;
    std::memcpy(&old, target + at, size);
    std::memcpy(&value, source + at, size);
    const u64 result = apply_atomic(reduction, old, value, 0, type);
    std::memcpy(target + at, &result, size);
  }
}

Handler decode_bulk_copy(Instruction& i, Modifiers& m) {
  if (!m.flag("async") && !m.flag("reduce")) return nullptr;
  m.flag("async");
  m.flag("bulk");
  if (m.flag("commit_group")) return commit_group;
  if (m.flag("wait_group")) {
    m.flag("read");
    return wait_group;
  }
  if (m.flag("prefetch")) {
    m.ignore({"L2", "global", "tensor", "tile", "1d", "2d", "3d", "4d", "5d", "L2::cache_hint"});
    return [](Step&) {};
  }
  m.flag("L2::cache_hint");
  i.n[2] = i.has("reduce") ? m.choice({"add", "min", "max", "and", "or", "xor", "inc", "dec"}) : -1;
  m.flag("reduce");
  m.flag("noftz");
  if (i.has("reduce") && i.n[2] < 0) return nullptr;
  if (m.flag("tensor")) return decode_tensor_copy(i, m);
  if (i.has("reduce")) {
    i.type = m.type();
    if (i.type == Type::kNone || (is_float(i.type) && i.n[2] != 0)) return nullptr;
  }
  i.n[1] = m.flag("multicast::cluster");
  if (m.flag("mbarrier::complete_tx::bytes")) {
    if (i.n[2] >= 0) return nullptr;  // reductions into shared memory
    i.n[0] = !m.flag("global");
    m.ignore({"shared::cluster", "shared::cta"});
    return copy_to_shared;
  }
  const bool store = m.flag("bulk_group") && m.flag("global");
  m.ignore({"shared::cta"});
  return store ? copy_to_global : nullptr;
}

}  // namespace ptxemu
