// SPDX-License-Identifier: Apache-2.0
#include "shadow.h"

#include <algorithm>

namespace ptxemu {
namespace {

/// Does `actor` know that `access` is finished?
bool ordered(const Actor& actor, const Access& access) {
  if (access.clock == 0) return true;
  if (access.cluster == actor.cluster) return actor.row[access.agent] >= access.clock;
  if (!actor.foreign) return false;
  const auto clocks = actor.foreign->find(access.cluster);
  return clocks != actor.foreign->end() && access.agent < clocks->second.size() &&
         clocks->second[access.agent] >= access.clock;
}

bool conflicts(const Actor& actor, const Access& access) {
  return !(actor.strong && access.strong) && !ordered(actor, access);
}

Access remember(const Actor& actor) {
  return {actor.cluster, actor.clock,       static_cast<u16>(actor.agent),
          actor.strong,  actor.async_proxy, actor.where};
}

}  // namespace

Shadow::Cell& Shadow::word(u64 index) {
  if (!flat_.empty()) return flat_[index];
  const u64 page = index / kPageWords;
  if (page != last_page_) {
    auto& cells = pages_[page];
    if (!cells) cells = std::make_unique<std::array<Cell, kPageWords>>();
    last_page_ = page;
    last_cells_ = cells.get();
  }
  return (*last_cells_)[index % kPageWords];
}

Verdict Shadow::access(u64 address, u32 bytes, const Actor& actor, bool write, bool races,
                       bool check_initialised) {
  const u64 end = address + bytes;
  while (address < end) {
    Cell& cell = word(address / 4);
    const u32 first = address % 4;
    const u32 last = static_cast<u32>(std::min<u64>(4, first + (end - address)));
    if (last - first < 4 && cell.split == 0) {
      split_.push_back({cell, cell, cell, cell});
      for (Cell& byte : split_.back()) byte.crowd = 0;
      if (cell.crowd != 0) {
        for (Cell& byte : split_.back()) {
          crowds_.push_back(Crowd(crowds_[cell.crowd - 1]));
          byte.crowd = static_cast<u32>(crowds_.size());
        }
      }
      cell.split = static_cast<u32>(split_.size());
    }
    if (cell.split == 0) {
      const Verdict v = touch(cell, actor, write, races, check_initialised);
      if (v.conflict != Conflict::kNone) return v;
    } else {
      const u32 split = cell.split - 1;
      for (u32 b = first; b < last; ++b) {
        const Verdict v = touch(split_[split][b], actor, write, races, check_initialised);
        if (v.conflict != Conflict::kNone) return v;
      }
    }
    address += last - first;
  }
  return {};
}

Verdict Shadow::touch(Cell& cell, const Actor& actor, bool write, bool races, bool initialised) {
  if (races) {
    if (conflicts(actor, cell.write)) return {Conflict::kRace, cell.write, true};
    if (actor.async_proxy && actor.proxied && cell.write.clock != 0 && !cell.write.async_proxy &&
        cell.write.cluster == actor.cluster && actor.proxied[cell.write.agent] < cell.write.clock)
      return {Conflict::kProxy, cell.write, true};
    if (write) {
      const Verdict v = check_reads(cell, actor);
      if (v.conflict != Conflict::kNone) return v;
      cell.write = remember(actor);
      cell.reads = {};
      if (cell.crowd != 0) {
        crowds_[cell.crowd - 1].clocks.assign(agents_, 0);
      }
    } else {
      record_read(cell, actor);
    }
  }
  if (write)
    cell.initialised = true;
  else if (initialised && !initialised_ && !cell.initialised)
    return {Conflict::kUninitialised, {}, true};
  return {};
}

Verdict Shadow::check_reads(const Cell& cell, const Actor& actor) const {
  for (const Access& read : cell.reads)
    if (conflicts(actor, read)) return {Conflict::kRace, read, false};
  if (cell.crowd == 0) return {};
  const Crowd& crowd = crowds_[cell.crowd - 1];
  for (u32 agent = 0; agent < agents_; ++agent)
    if (actor.row[agent] < crowd.clocks[agent])
      return {
          Conflict::kRace,
          {actor.cluster, crowd.clocks[agent], static_cast<u16>(agent), false, false, crowd.where},
          false};
  return {};
}

/// A read that the actor knows of is covered by its own. Where more readers are concurrent than the
/// cell has room for, shared memory keeps a clock for every agent; global memory prefers to keep
/// readers of two clusters, since any later writer then conflicts with one of them.
void Shadow::record_read(Cell& cell, const Actor& actor) {
  for (Access& read : cell.reads) {
    if (!ordered(actor, read) && !(read.cluster == actor.cluster && read.agent == actor.agent))
      continue;
    read = remember(actor);
    return;
  }
  if (!exact_readers_) {
    if (cell.reads[0].cluster == cell.reads[1].cluster || actor.cluster == cell.reads[1].cluster)
      cell.reads[1] = remember(actor);
    return;
  }
  if (actor.strong) return;  // a crowd does not remember which of its reads were strong
  if (cell.crowd == 0) {
    crowds_.push_back({std::vector<u32>(agents_), 0});
    cell.crowd = static_cast<u32>(crowds_.size());
  }
  Crowd& crowd = crowds_[cell.crowd - 1];
  if (crowd.clocks[actor.agent] < actor.clock) crowd.clocks[actor.agent] = actor.clock;
  crowd.where = actor.where;
}

}  // namespace ptxemu
