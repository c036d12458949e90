// SPDX-License-Identifier: Apache-2.0
// Branches, calls and the end of a thread (PTX ISA, "Control Flow Instructions", "Stack
// Manipulation", "Miscellaneous Instructions").
#include "decode.h"

namespace ptxemu {
namespace {

void jump(Step& s, u32 lanes, u32 target) {
  for (u32 rest = lanes; rest != 0; rest &= rest - 1) s.warp.pc[std::countr_zero(rest)] = target;
}

void branch(Step& s) {
  jump(s, s.mask, static_cast<u32>(s.instruction.target));
  s.stay = true;
}

void branch_indexed(Step& s) {
  const u64* index = s.in(std::size_t{0});
  const auto& targets = s.instruction.targets;
  s.each([&](int l) {
    const u32 i = static_cast<u32>(index[l]);
    if (i >= targets.size()) s.fail("bounds", "brx.idx beyond its targets", l);
    s.warp.pc[l] = static_cast<u32>(targets[i]);
  });
  s.stay = true;
}

u8* parameter(Frame& frame, int lane, u32 offset) {
  return &frame.parameters[std::size_t{frame.function->parameter_area} * lane + offset];
}

/// Enters `callee` with the lanes of `mask`: a new frame with the arguments copied.
void enter(Step& s, const Function& callee, u32 mask) {
  const Instruction& i = s.instruction;
  auto entered = std::make_unique<Frame>();
  Frame& frame = *entered;
  frame.function = &callee;
  frame.registers.resize(std::size_t{callee.registers} * kWarpSize);
  frame.parameters.resize(std::size_t{callee.parameter_area} * kWarpSize);
  frame.caller = &s.frame;
  frame.call_pc = s.warp.pc[std::countr_zero(mask)];
  frame.depth = s.frame.depth + 1;
  frame.lanes = mask;
  frame.local_base = (s.frame.local_base + s.frame.function->local_bytes + 15) / 16 * 16;
  frame.in_flight.resize(callee.registers);
  frame.unfenced.resize(callee.registers);
  if (frame.depth > 1000) s.fail("limit", "calls nested more than 1000 deep", s.first_lane());
  for (const auto& [symbol, offset] : callee.local_symbols)
    std::fill_n(&frame.registers[std::size_t{symbol} * kWarpSize], kWarpSize,
                u64{frame.local_base} + offset);
  for (u32 rest = mask; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    for (std::size_t a = 0; a < i.arguments.size() && a < callee.parameters.size(); ++a) {
      const ParameterSlot& formal = callee.parameters[a];
      const u64 actual = s.in(i.arguments[a])[lane];
      std::memcpy(parameter(frame, lane, formal.offset),
                  parameter(s.frame, lane, static_cast<u32>(actual)), formal.size);
    }
    std::vector<u8>& local = s.warp.local[lane];
    if (local.size() < frame.local_base + callee.local_bytes)
      local.resize(frame.local_base + callee.local_bytes, 0xff);
    s.warp.pc[lane] = 0;
    s.warp.frame[lane] = &frame;
  }
  s.warp.frames.push_back(std::move(entered));
}

/// What an external function would do; printf is left out with a notice.
bool call_external(Step& s, const Function& callee) {
  if (callee.name == "vprintf") {
    s.machine.notice("printf was called and ignored");
    if (!s.instruction.results.empty()) {
      const u64* slot = s.in(s.instruction.results[0]);
      s.each([&](int l) { std::memset(parameter(s.frame, l, static_cast<u32>(slot[l])), 0, 4); });
    }
    return true;
  }
  if (callee.name == "__assertfail") s.fail("trap", "a device assertion failed", s.first_lane());
  s.fail("unsupported", "call of external function " + callee.name, s.first_lane());
}

void call(Step& s) {
  const Instruction& i = s.instruction;
  s.stay = true;
  s.warp.uniform = false;
  const u32 next = s.warp.pc[s.first_lane()] + 1;
  std::unordered_map<u64, u32> callees;  // function -> lanes
  s.each([&](int l) {
    const u64 callee =
        i.target < 0 ? s.in(std::size_t{0})[l] - kFunctionWindow : static_cast<u64>(i.target);
    callees[callee] |= 1u << l;
  });
  for (const auto& [index, lanes] : callees) {
    if (index >= s.machine.module.functions.size())
      s.fail("bounds", "call through a pointer to no function", std::countr_zero(lanes));
    const Function& callee = *s.machine.module.functions[index];
    if (callee.is_declaration) {
      call_external(s, callee);
      jump(s, lanes, next);
    } else {
      enter(s, callee, lanes);
    }
  }
}

void return_from_call(Step& s) {
  if (!s.frame.caller) {
    thread_exits(s.machine, s.warp, s.mask);
    return;
  }
  s.stay = true;
  Frame& caller = *s.frame.caller;
  const Instruction& call = caller.function->code[s.frame.call_pc];
  const auto& returns = s.frame.function->returns;
  s.each([&](int l) {
    for (std::size_t r = 0; r < returns.size() && r < call.results.size(); ++r) {
      const Operand& result = call.results[r];
      const u64 slot = caller.function->constants[std::size_t{result.index} * kWarpSize];
      std::memcpy(parameter(caller, l, static_cast<u32>(slot)),
                  parameter(s.frame, l, returns[r].offset), returns[r].size);
    }
    s.warp.frame[l] = &caller;
    s.warp.pc[l] = s.frame.call_pc + 1;
  });
  s.warp.uniform = false;
  s.frame.lanes &= ~s.mask;
  if (s.frame.lanes == 0)
    std::erase_if(s.warp.frames, [&](const auto& f) { return f.get() == &s.frame; });
}

void exit_thread(Step& s) {
  thread_exits(s.machine, s.warp, s.mask);
}

void trap(Step& s) {
  s.fail("trap", "trap was executed", s.first_lane());
}

void nothing(Step&) {}

}  // namespace

Handler decode_control(Instruction& i, Modifiers& m) {
  const std::string& name = i.parts[0];
  m.flag("uni");
  if (name == "bra") return branch;
  if (name == "brx") return m.flag("idx") ? branch_indexed : nullptr;
  if (name == "call") return call;
  if (name == "ret") return return_from_call;
  if (name == "exit") return exit_thread;
  if (name == "trap" || name == "brkpt") return trap;
  // hints: sleeping, register counts, and dependencies between grids, which run one after another
  m.ignore({"u32", "inc", "dec", "sync", "aligned", "launch_dependents", "wait", "mask"});
  return nothing;
}

}  // namespace ptxemu
