// SPDX-License-Identifier: Apache-2.0
// Where addresses lead, and the checks of every access.
#include <cstdio>

#include "machine.h"

namespace ptxemu {
namespace {

std::string hex(u64 value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string size_text(u32 bytes) {
  return std::to_string(bytes) + " bytes";
}

std::string verb(bool write) {
  return write ? "write of " : "read of ";
}

}  // namespace

void GlobalMemory::add(const void* address, std::size_t bytes, std::string name, bool read_only) {
  const u64 begin = reinterpret_cast<u64>(address);
  ranges_[begin] = {begin, begin + bytes, std::move(name), read_only};
}

void GlobalMemory::remove(const void* address) {
  ranges_.erase(reinterpret_cast<u64>(address));
}

const GlobalMemory::Range* GlobalMemory::find(u64 address) const {
  auto after = ranges_.upper_bound(address);
  return after == ranges_.begin() ? nullptr : &std::prev(after)->second;
}

u64 Step::address(const Operand& o, int lane) const {
  switch (o.base_kind) {
    case OperandKind::kRegister:
      return frame.registers[std::size_t{o.index} * kWarpSize + lane] + o.offset;
    case OperandKind::kConstant:
      return frame.function->constants[std::size_t{o.index} * kWarpSize] + o.offset;
    case OperandKind::kSpecial:
      return special(o.index)[lane] + o.offset;
    default:
      fail_operand();
  }
}

/// Shared addresses are 32 bits wide: rank and offset.
Step::Place Step::shared(u64 address, u32 bytes, bool write, int lane, u32 align) {
  const u32 rank = static_cast<u32>(address & 0xffffffffu) >> kRankShift;
  const u32 offset = static_cast<u32>(address) & ((1u << kRankShift) - 1);
  Cta* target = &cta;
  if (rank != 0) {
    if (rank > cta.cluster->ctas.size())
      fail("bounds", "shared address " + hex(address) + " names no CTA of the cluster", lane);
    target = cta.cluster->ctas[rank - 1].get();
  }
  if (offset + u64{bytes} > target->shared.size())
    fail("bounds",
         verb(write) + size_text(bytes) + " at shared+" + std::to_string(offset) + ", where " +
             std::to_string(target->shared.size()) + " bytes of shared memory end",
         lane);
  if (offset % align != 0)
    fail("misaligned",
         verb(write) + size_text(bytes) + " at shared+" + std::to_string(offset) +
             ", which is no multiple of " + std::to_string(align),
         lane);
  if (target == &cta) {
    shared_lanes |= 1u << lane;
    shared_bytes = bytes;
    shared_at[static_cast<u32>(lane)] = offset;
  }
  return {target->shared.data() + offset, Space::kShared, target, offset};
}

Step::Place Step::resolve(Space space, u64 address, u32 bytes, bool write, int lane) {
  if (space == Space::kGeneric) {
    const u64 windows = kSharedWindow | kLocalWindow | kParamWindow | kFunctionWindow;
    switch (address & windows) {
      case 0:
        space = Space::kGlobal;
        break;
      case kSharedWindow:
        space = Space::kShared;
        break;
      case kLocalWindow:
        space = Space::kLocal;
        break;
      case kParamWindow:
        if ((address & (kParamWindow - 1)) + bytes > machine.kernel.parameter_block || write)
          fail("bounds", verb(write) + size_text(bytes) + " in the kernel's parameters", lane);
        return {const_cast<u8*>(machine.parameters) + (address & (kParamWindow - 1)),
                Space::kParam};
      default:
        fail("bounds", "generic address " + hex(address) + " is in no window", lane);
    }
    if (space != Space::kGlobal) address &= kSharedWindow - 1;
  }
  if (space == Space::kShared) return shared(address, bytes, write, lane, bytes);
  if (address % bytes != 0)
    fail("misaligned", verb(write) + size_text(bytes) + " at " + hex(address), lane);
  if (space == Space::kLocal) {
    std::vector<u8>& local = warp.local[lane];
    if (address + bytes > local.size())
      fail("bounds",
           verb(write) + size_text(bytes) + " at local+" + std::to_string(address) + ", where " +
               std::to_string(local.size()) + " bytes of local memory end",
           lane);
    return {local.data() + address, Space::kLocal};
  }
  if (space == Space::kParam) {
    const Function& f = *frame.function;
    if (address + bytes > f.parameter_area)
      fail("bounds", verb(write) + size_text(bytes) + " beyond the parameters", lane);
    if (address < f.parameter_block) {
      if (write) fail("bounds", "write to a kernel's parameter", lane);
      return {const_cast<u8*>(machine.parameters) + address, Space::kParam};
    }
    return {&frame.parameters[std::size_t{f.parameter_area} * lane + address], Space::kParam};
  }

  const GlobalMemory* const both[] = {&machine.memory, &machine.module.memory};
  for (const GlobalMemory* where : both) {
    const GlobalMemory::Range* range = where->find(address);
    if (!range || address + bytes > range->end) continue;
    if (write && range->read_only)
      fail("bounds", "write to " + range->name + ", which is read-only", lane);
    return {reinterpret_cast<u8*>(address), Space::kGlobal, nullptr, address};
  }
  if (machine.options.unchecked_global && address >= 4096)
    return {reinterpret_cast<u8*>(address), Space::kGlobal, nullptr, address};
  std::string near;
  const GlobalMemory::Range* range = machine.memory.find(address);
  if (range)
    near = "; " + std::to_string(address + bytes - range->end) + " bytes past the end of " +
           range->name + " (" + std::to_string(range->end - range->begin) + " bytes)";
  fail("bounds", verb(write) + size_text(bytes) + " at global address " + hex(address) + near,
       lane);
}

Actor Step::actor(int lane, bool strong) const {
  const u32 t = thread(lane);
  const Clocks& c = clocks();
  return {c.cluster(), t, c.now(t), c.row(t), c.proxied(t), c.foreign(t), strong, false, where};
}

void Step::record(const Place& place, u32 bytes, const Actor& who, bool write, int lane) {
  const Options& options = machine.options;
  if (place.space != Space::kShared && place.space != Space::kGlobal) return;
  const bool is_shared = place.space == Space::kShared;
  if (!options.check_races && !(is_shared && options.check_initialised)) return;
  Shadow& shadow = is_shared ? *place.cta->shadow : machine.global_shadow;
  const Verdict verdict = shadow.access(place.address, bytes, who, write, options.check_races,
                                        options.check_initialised && is_shared);
  if (verdict.conflict == Conflict::kNone) return;
  const std::string what =
      verb(write) + size_text(bytes) + " at " +
      (is_shared ? "shared+" + std::to_string(place.address) : "global " + hex(place.address));
  if (verdict.conflict == Conflict::kUninitialised)
    fail("uninitialised", what + ", which nothing has written", lane);
  const Instruction& other = *machine.instructions[verdict.other.where];
  std::string earlier = std::string(verdict.other_writes ? "the write" : "the read") + " by ";
  if (verdict.other.cluster == cta.cluster->linear)
    earlier += machine.place(*cta.cluster, verdict.other.agent);
  else
    earlier += "a thread of cluster " + std::to_string(verdict.other.cluster);
  earlier += " at PTX line " + std::to_string(other.ptx_line) + " `" + other.short_text() + "`";
  const std::string source = machine.module.source(other.location);
  if (!source.empty()) earlier += " (" + source + ")";
  if (verdict.conflict == Conflict::kProxy)
    fail("proxy", what + " through the async proxy without fence.proxy.async after " + earlier,
         lane);
  fail("race", what + " is not ordered with " + earlier, lane);
}

u8* Step::access(Space space, u64 address, u32 bytes, bool write, int lane, bool strong) {
  const Place place = resolve(space, address, bytes, write, lane);
  record(place, bytes, actor(lane, strong), write, lane);
  return place.data;
}

SyncLocation& Step::sync_location(const Place& place) {
  if (place.space != Space::kShared) return machine.sync[place.address];
  return cta.cluster->sync[u64{place.cta->rank} << kRankShift | place.address];
}

void Step::fail(const char* kind, const std::string& message, int lane) const {
  throw Error(kind, message + "\n  in " + machine.place(warp, static_cast<u32>(lane), instruction));
}

void Step::fail_operand() const {
  fail("unsupported", "an operand of this kind", first_lane() % kWarpSize);
}

}  // namespace ptxemu
