// SPDX-License-Identifier: Apache-2.0
// A parsed PTX module: functions of decoded instructions over numbered registers.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "ptxemu.h"
#include "types.h"

namespace ptxemu {

struct Step;
using Handler = void (*)(Step&);

enum class Space : u8 { kGeneric, kGlobal, kShared, kLocal, kParam, kConst };

/// Generic addresses of the windows; host addresses (global memory) lie below all of them.
inline constexpr u64 kSharedWindow = u64{1} << 48;
inline constexpr u64 kLocalWindow = u64{1} << 49;
inline constexpr u64 kParamWindow = u64{1} << 50;
inline constexpr u64 kFunctionWindow = u64{1} << 51;
/// In a shared address, bits 24 and up hold 1 + the rank of the CTA in its cluster; 0 is "mine".
inline constexpr int kRankShift = 24;

enum class OperandKind : u8 { kNone, kRegister, kConstant, kSpecial, kVector, kAddress, kSink };

struct Operand {
  OperandKind kind = OperandKind::kNone;
  OperandKind base_kind = OperandKind::kNone;  // of an address: register, constant or special
  bool negate = false;                         // !p
  u32 index = 0;                               // row of the register, constant or special
  i64 offset = 0;                              // of an address
  std::vector<Operand> elements;               // of a vector; coordinates of an address
};

/// A source position and where it was inlined, innermost first.
struct Location {
  int file = 0;
  int line = 0;
  int column = 0;
  int parent = -1;  // index into Module::locations
};

struct Instruction {
  Handler handler = nullptr;  // null: not supported, for the reason in `reason`
  std::vector<std::string> parts;
  std::vector<Operand> operands;
  Operand guard;

  // What the decoder of its class worked out; the meaning of `n` is the class's own.
  Type type = Type::kNone;
  Type type2 = Type::kNone;
  Space space = Space::kGeneric;
  bool ftz = false, saturate = false, strong = false;
  std::array<int, 6> n{};

  int target = -1;           // branch: index of the instruction; call: of the function
  std::vector<int> targets;  // brx.idx
  std::vector<Operand> results, arguments;  // call

  int ptx_line = 0;
  int location = -1;
  u32 opcode = 0;  // index into Module::opcodes, for statistics
  std::string text;
  std::string reason;

  /// For messages: wgmma names up to 128 registers.
  std::string short_text() const { return text.size() <= 120 ? text : text.substr(0, 117) + "..."; }

  bool has(std::string_view part) const {
    for (const auto& p : parts)
      if (p == part) return true;
    return false;
  }
};

struct ParameterSlot {
  std::string name;
  Type type;
  u32 offset, size;
};

/// A variable in .global, .const, .shared, .local or .param.
struct Variable {
  Space space = Space::kGlobal;
  bool dynamic_shared = false;
  u64 address = 0;  // in its own space; a host address for global and const
  u64 size = 0;
  u32 symbol = 0;  // of a local variable: the register that holds its address in a frame
};

struct Function {
  std::string name;
  bool is_kernel = false;
  bool is_declaration = false;
  std::vector<Instruction> code;
  std::vector<ParameterSlot> parameters;  // formal parameters, in the parameter area
  std::vector<ParameterSlot> returns;     // formal results, in the parameter area
  u32 parameter_block = 0;                // bytes of a kernel's parameters
  u32 parameter_area = 0;  // bytes per lane: formal parameters, results, and .param locals
  u32 local_bytes = 0;     // bytes per lane in .local
  u32 shared_bytes = 0;    // static, module scope included
  u32 registers = 0;
  Dim3 required_block{0, 0, 0}, max_block{0, 0, 0}, cluster{0, 0, 0};
  std::vector<std::pair<u32, u32>> local_symbols;  // register, offset in the frame's .local
  std::vector<u64> constants;                      // rows of 32 equal values

  // Which agents of the race model a launch needs.
  bool uses_async_copy = false, uses_bulk_copy = false, uses_wgmma = false;
};

struct Module {
  std::vector<std::unique_ptr<Function>> functions;
  std::unordered_map<std::string, int> function_index;
  std::unordered_map<std::string, Variable> variables;
  std::vector<std::unique_ptr<u8[]>> storage;  // of .global and .const variables
  GlobalMemory memory;                         // the same, as ranges
  std::vector<std::string> opcodes;
  std::unordered_map<int, std::string> files;
  std::vector<Location> locations;
  u32 shared_bytes = 0;  // module-scope shared variables
  std::string target;

  const Function& function(const std::string& name) const;
  const Function& kernel(const std::string& name) const;
  /// "file.cu:12 (inlined at main.cu:40)", or "" without line information.
  std::string source(int location) const;
};

/// Rows of the special registers, in the order of the rows of Warp::specials.
enum class Special : u32 {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kLaneid,
  kWarpid,
  kNwarpid,
  kSmid,
  kNsmid,
  kGridid,
  kLanemaskEq,
  kLanemaskLt,
  kLanemaskLe,
  kLanemaskGt,
  kLanemaskGe,
  kClusteridX,
  kClusteridY,
  kClusteridZ,
  kNclusteridX,
  kNclusteridY,
  kNclusteridZ,
  kClusterCtaidX,
  kClusterCtaidY,
  kClusterCtaidZ,
  kClusterNctaidX,
  kClusterNctaidY,
  kClusterNctaidZ,
  kClusterCtarank,
  kClusterNctarank,
  kDynamicSmemSize,
  kTotalSmemSize,
  kDynamicSharedBase,  // the address of extern .shared arrays
  kClock,
  kClockHi,
  kGlobaltimer,
  kCount,
};

/// Sets the handler of a parsed instruction, or its reason for having none.
void decode(Instruction& instruction);

}  // namespace ptxemu
