// SPDX-License-Identifier: Apache-2.0
#include "decode.h"

#include <unordered_map>

namespace ptxemu {
namespace {

const std::unordered_map<std::string_view, Decoder>& table() {
  static const std::unordered_map<std::string_view, Decoder> kTable = [] {
    std::unordered_map<std::string_view, Decoder> t;
    const auto add = [&](Decoder decoder, std::initializer_list<std::string_view> names) {
      for (std::string_view name : names) t[name] = decoder;
    };
    // add, sub, mul, ... are integer or floating point by their type; decode_integer hands over
    add(decode_integer,
        {"add", "sub", "mul", "mad", "div", "rem", "abs", "neg", "min", "max", "sad", "dp4a"});
    add(decode_float,
        {"fma", "rcp", "sqrt", "rsqrt", "sin", "cos", "lg2", "ex2", "tanh", "copysign", "testp"});
    add(decode_bits, {"and", "or", "xor", "not", "cnot", "shl", "shr", "shf", "lop3", "prmt", "bfe",
                      "bfi", "bfind", "brev", "popc", "clz", "fns"});
    add(decode_compare, {"setp", "set", "selp", "slct"});
    add(decode_move, {"mov", "cvta", "isspacep", "mapa", "getctarank"});
    add(decode_convert, {"cvt"});
    add(decode_memory,
        {"ld", "ldu", "st", "prefetch", "prefetchu", "discard", "applypriority", "createpolicy"});
    add(decode_atomic, {"atom", "red"});
    add(decode_control, {"bra", "brx", "call", "ret", "exit", "trap", "brkpt", "nanosleep",
                         "setmaxnreg", "griddepcontrol", "pmevent"});
    add(decode_warp, {"shfl", "vote", "match", "redux", "activemask", "elect"});
    add(decode_matrix, {"ldmatrix", "stmatrix", "movmatrix"});
    add(decode_barrier, {"bar", "barrier"});
    add(decode_fence, {"membar", "fence"});
    add(decode_mma, {"mma"});
    add(decode_async_copy, {"cp"});
    add(decode_mbarrier, {"mbarrier"});
    add(decode_wgmma, {"wgmma"});
    return t;
  }();
  return kTable;
}

}  // namespace

Space Modifiers::space() {
  if (flag("global")) return Space::kGlobal;
  if (flag("shared") || flag("shared::cta") || flag("shared::cluster")) return Space::kShared;
  if (flag("local")) return Space::kLocal;
  if (flag("param") || flag("param::entry") || flag("param::func")) return Space::kParam;
  if (flag("const")) return Space::kConst;
  return Space::kGeneric;
}

void Modifiers::cache_hints() {
  ignore({"ca", "cg", "cs", "lu", "cv", "wb", "wt", "L2::cache_hint", "L2::64B", "L2::128B",
          "L2::256B", "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first",
          "L1::evict_last", "L1::no_allocate", "L2::evict_first", "L2::evict_last",
          "L2::evict_normal"});
}

void decode(Instruction& i) {
  const auto entry = table().find(i.parts[0]);
  if (entry == table().end()) {
    i.reason = "unknown instruction " + i.parts[0];
    return;
  }
  Modifiers modifiers(i);
  const Handler handler = entry->second(i, modifiers);
  const std::string left = modifiers.left_over();
  if (!left.empty())
    i.reason = "." + left + " of " + i.parts[0] + " is not supported";
  else if (!handler)
    i.reason = i.reason.empty() ? "this form of " + i.parts[0] + " is not supported" : i.reason;
  else
    i.handler = handler;
}

}  // namespace ptxemu
