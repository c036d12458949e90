// SPDX-License-Identifier: Apache-2.0
// What bulk copies and tensor copies share.
#pragma once

#include <vector>

#include "decode.h"

namespace ptxemu {

/// Checks and starts a copy to shared memory; it lands later.
void issue(Step& s, BulkTransfer transfer, int lane);
Step::Place barrier_place(Step& s, std::size_t operand, int lane);
std::vector<Cta*> multicast_targets(Step& s, Cta* single, bool multicast, std::size_t operand,
                                    int lane);
/// The agent of the thread's open bulk group.
Actor group_actor(Step& s, int lane);
/// Copies, or reduces (an operation of atom) into the target.
void store_elements(u8* target, const u8* source, u32 bytes, int reduction, Type type);
/// memory_access.cpp
u64 apply_atomic(int operation, u64 old, u64 b, u64 c, Type type);

Handler decode_tensor_copy(Instruction& i, Modifiers& m);

}  // namespace ptxemu
