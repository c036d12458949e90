// SPDX-License-Identifier: Apache-2.0
#include "decode.h"

#include <unordered_map>

namespace ptxemu {
namespace {

struct Entry {
  Decoder decoder;
  std::size_t operands;  // at least
};

const std::unordered_map<std::string_view, Entry>& table() {
  static const std::unordered_map<std::string_view, Entry> kTable = [] {
    std::unordered_map<std::string_view, Entry> t;
    const auto add = [&](Decoder decoder, std::size_t operands,
                         std::initializer_list<std::string_view> names) {
      for (std::string_view name : names) t[name] = {decoder, operands};
    };
    // add, sub, mul, ... are integer or floating point by their type;
    // decode_integer hands over
    add(decode_integer, 2, {"abs", "neg"});
    add(decode_integer, 3, {"add", "sub", "mul", "div", "rem", "min", "max"});
    add(decode_integer, 4, {"mad", "sad", "dp4a"});
    add(decode_float, 2, {"rcp", "sqrt", "rsqrt", "sin", "cos", "lg2", "ex2", "tanh", "testp"});
    add(decode_float, 3, {"copysign"});
    add(decode_float, 4, {"fma"});
    add(decode_bits, 2, {"not", "cnot", "bfind", "brev", "popc", "clz"});
    add(decode_bits, 3, {"and", "or", "xor", "shl", "shr"});
    add(decode_bits, 4, {"shf", "prmt", "bfe", "fns"});
    add(decode_bits, 5, {"lop3", "bfi"});
    add(decode_compare, 3, {"setp", "set"});
    add(decode_compare, 4, {"selp", "slct"});
    add(decode_move, 2, {"mov", "cvta", "isspacep", "getctarank"});
    add(decode_move, 3, {"mapa"});
    add(decode_convert, 2, {"cvt"});
    add(decode_memory, 2, {"ld", "ldu", "st"});
    add(decode_memory, 1, {"prefetch", "prefetchu", "discard", "applypriority", "createpolicy"});
    add(decode_atomic, 3, {"atom"});
    add(decode_atomic, 2, {"red"});
    add(decode_control, 0,
        {"bra", "brx", "call", "ret", "exit", "trap", "brkpt", "nanosleep", "setmaxnreg",
         "griddepcontrol", "pmevent"});
    add(decode_warp, 1, {"activemask"});
    add(decode_warp, 3, {"vote", "match", "redux", "elect"});
    add(decode_warp, 5, {"shfl"});
    add(decode_matrix, 2, {"ldmatrix", "stmatrix", "movmatrix"});
    add(decode_barrier, 0, {"bar", "barrier"});
    add(decode_fence, 0, {"membar", "fence"});
    add(decode_mma, 4, {"mma"});
    add(decode_async_copy, 0, {"cp"});
    add(decode_mbarrier, 1, {"mbarrier"});
    add(decode_wgmma, 0, {"wgmma"});
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
  if (i.operands.size() < entry->second.operands) {
    i.reason = "too few operands for " + i.parts[0];
    return;
  }
  Modifiers modifiers(i);
  const Handler handler = entry->second.decoder(i, modifiers);
  const std::string left = modifiers.left_over();
  if (!left.empty())
    i.reason = "." + left + " of " + i.parts[0] + " is not supported";
  else if (!handler)
    i.reason = i.reason.empty() ? "this form of " + i.parts[0] + " is not supported" : i.reason;
  else
    i.handler = handler;
}

}  // namespace ptxemu
