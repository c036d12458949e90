// SPDX-License-Identifier: Apache-2.0
#include "wgmma_registers.h"

#include <algorithm>

namespace ptxemu {
namespace {

template <class F>
void for_registers(const Operand& o, F&& f) {
  if (o.kind == OperandKind::kRegister) f(o.index);
  if (o.kind == OperandKind::kAddress && o.base_kind == OperandKind::kRegister) f(o.index);
  for (const Operand& element : o.elements) for_registers(element, f);
}

bool is_move(const Instruction& i) {
  return i.parts[0] == "mov" && i.operands.size() == 2 &&
         i.operands[0].kind == OperandKind::kRegister;
}

template <class F>
void for_groups(Warp& warp, F&& f) {
  for (auto& group : warp.wgmma_groups) f(group);
  f(warp.wgmma_open);
}

}  // namespace

void check_in_flight(Step& s) {
  const Instruction& i = s.instruction;
  if (i.parts[0] == "wgmma") return;
  if (s.warp.wgmma_groups.empty() && s.warp.wgmma_open.empty()) return;
  if (is_move(i)) {
    const u32 target = i.operands[0].index;
    const Operand& source = i.operands[1];
    if (source.kind == OperandKind::kRegister && s.frame.in_flight[source.index]) {
      for_groups(s.warp, [&](auto& group) {
        for (std::vector<u32>& registers : group)
          if (std::find(registers.begin(), registers.end(), source.index) != registers.end())
            registers.push_back(target);
      });
      s.frame.in_flight[target] = true;
    }
    return;
  }
  for (const Operand& operand : i.operands)
    for_registers(operand, [&](u32 index) {
      if (s.frame.in_flight[index])
        s.fail("wgmma",
               "a register is used while wgmma.mma_async may still write it; "
               "wgmma.wait_group is missing",
               s.first_lane());
    });
}

void mark_written(Step& s) {
  const Instruction& i = s.instruction;
  if (i.parts[0] == "wgmma" || i.operands.empty()) return;
  const Operand& target = i.operands[0];
  if (target.kind != OperandKind::kRegister && target.kind != OperandKind::kVector) return;
  bool unfenced = true;
  if (is_move(i) && i.operands[1].kind == OperandKind::kRegister)
    unfenced = s.frame.unfenced[i.operands[1].index];
  for_registers(target, [&](u32 index) { s.frame.unfenced[index] = unfenced; });
}

void check_fenced(Step& s, const Operand& operand) {
  for_registers(operand, [&](u32 index) {
    if (s.frame.unfenced[index])
      s.fail("wgmma", "a register was written and wgmma uses it without wgmma.fence in between",
             s.first_lane());
  });
}

void put_in_flight(Step& s, const Operand& accumulators) {
  std::vector<u32> registers;
  for_registers(accumulators, [&](u32 index) {
    registers.push_back(index);
    s.frame.in_flight[index] = true;
  });
  s.warp.wgmma_open.push_back(std::move(registers));
}

void refresh_in_flight(Warp& warp, Frame& frame) {
  std::fill(frame.in_flight.begin(), frame.in_flight.end(), false);
  for_groups(warp, [&](auto& group) {
    for (const std::vector<u32>& registers : group)
      for (u32 index : registers) frame.in_flight[index] = true;
  });
}

}  // namespace ptxemu
