// SPDX-License-Identifier: Apache-2.0
// Rules about the registers of wgmma: not touched while in flight, fenced after other writes.
#pragma once

#include "machine.h"

namespace ptxemu {

/// Before any instruction of a function with wgmma: none may use a register in flight, but a move,
/// which passes the state on (compilers copy accumulators around loops).
void check_in_flight(Step& s);
/// After it: what it wrote needs wgmma.fence before wgmma may use it.
void mark_written(Step& s);

void check_fenced(Step& s, const Operand& operand);
void put_in_flight(Step& s, const Operand& accumulators);
void refresh_in_flight(Warp& warp, Frame& frame);

}  // namespace ptxemu
