// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>

#include "parser.h"

namespace ptxemu {
namespace {

/// Names of the special registers, in the order of enum Special.
constexpr std::array<std::string_view, static_cast<std::size_t>(Special::kCount)> kSpecialNames{
    "%tid.x",
    "%tid.y",
    "%tid.z",
    "%ntid.x",
    "%ntid.y",
    "%ntid.z",
    "%ctaid.x",
    "%ctaid.y",
    "%ctaid.z",
    "%nctaid.x",
    "%nctaid.y",
    "%nctaid.z",
    "%laneid",
    "%warpid",
    "%nwarpid",
    "%smid",
    "%nsmid",
    "%gridid",
    "%lanemask_eq",
    "%lanemask_lt",
    "%lanemask_le",
    "%lanemask_gt",
    "%lanemask_ge",
    "%clusterid.x",
    "%clusterid.y",
    "%clusterid.z",
    "%nclusterid.x",
    "%nclusterid.y",
    "%nclusterid.z",
    "%cluster_ctaid.x",
    "%cluster_ctaid.y",
    "%cluster_ctaid.z",
    "%cluster_nctaid.x",
    "%cluster_nctaid.y",
    "%cluster_nctaid.z",
    "%cluster_ctarank",
    "%cluster_nctarank",
    "%dynamic_smem_size",
    "%total_smem_size",
    "",
    "%clock",
    "%clock_hi",
    "%globaltimer"};

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find('.', begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

}  // namespace

void Parser::statement() {
  if (peek().is(".loc")) return location();
  if (accept(".reg")) return register_declaration();
  if (accept(".pragma")) return skip_past(';');
  if (accept(';')) return;
  if (peek().is(".shared") || peek().is(".local") || peek().is(".param") || peek().is(".global") ||
      peek().is(".const")) {
    const std::string word = take().text;
    return variable_declaration(word == ".shared"  ? Space::kShared
                                : word == ".local" ? Space::kLocal
                                : word == ".param" ? Space::kParam
                                : word == ".const" ? Space::kConst
                                                   : Space::kGlobal,
                                false);
  }
  if (accept(".extern")) {
    if (!accept(".shared")) fail("only .extern .shared is supported in a function");
    return variable_declaration(Space::kShared, true);
  }
  if (peek().kind == TokenKind::kWord && peek(1).is(':')) {
    const std::string name = take().text;
    take();
    if (accept(".callprototype")) return skip_past(';');
    if (accept(".branchtargets")) return branch_target_list(name);
    scopes_.back().labels[name] = static_cast<int>(function_->code.size());
    return;
  }
  instruction();
}

void Parser::branch_target_list(const std::string& name) {
  std::vector<std::string>& labels = scopes_.back().branch_targets[name];
  do labels.push_back(expect(TokenKind::kWord, "a label").text);
  while (accept(','));
  expect(';');
}

void Parser::instruction() {
  Instruction i;
  i.ptx_line = peek().line;
  i.location = current_location_;
  const std::size_t begin = peek().begin;
  if (accept('@')) {
    const bool negate = accept('!');
    i.guard = named(expect(TokenKind::kWord, "a predicate").text);
    i.guard.negate = negate;
  }
  const std::string name = expect(TokenKind::kWord, "an instruction").text;
  i.parts = split(name);
  doubles_ = i.has("f64");
  if (i.parts[0] == "bra") {
    scopes_.back().pending.push_back(
        {function_->code.size(), expect(TokenKind::kWord, "a label").text, -1});
  } else if (i.parts[0] == "brx") {
    i.operands.push_back(operand());
    expect(',');
    const std::string list = take().text;
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->branch_targets.find(list);
      if (found == scope->branch_targets.end()) continue;
      for (const std::string& label : found->second) {
        scopes_.back().pending.push_back(
            {function_->code.size(), label, static_cast<int>(i.targets.size())});
        i.targets.push_back(-1);
      }
      break;
    }
    if (i.targets.empty()) fail("no .branchtargets " + list);
  } else if (i.parts[0] == "call") {
    call_operands(i);
  } else {
    i.operands = operand_list(';');
  }
  if (!peek().is(';')) fail("expected ';' after " + name);
  i.text = std::string(source_.substr(begin, take().begin - begin));
  std::replace_if(i.text.begin(), i.text.end(), [](char c) { return std::isspace(c); }, ' ');

  const auto [known, is_new] =
      opcode_index_.try_emplace(i.parts[0], static_cast<u32>(module_.opcodes.size()));
  if (is_new) module_.opcodes.push_back(i.parts[0]);
  i.opcode = known->second;
  function_->uses_async_copy |= name.starts_with("cp.async") && !contains(name, "bulk");
  function_->uses_bulk_copy |= contains(name, ".bulk");
  function_->uses_wgmma |= i.parts[0] == "wgmma";
  decode(i);
  function_->code.push_back(std::move(i));
}

// call [(results),] callee [, (arguments)] [, prototype]
void Parser::call_operands(Instruction& i) {
  if (accept('(')) {
    i.results = operand_list(')');
    expect(')');
    expect(',');
  }
  const std::string callee = expect(TokenKind::kWord, "a function").text;
  const auto known = module_.function_index.find(callee);
  if (known != module_.function_index.end())
    i.target = known->second;
  else
    i.operands.push_back(named(callee));
  if (accept(',') && accept('(')) {
    i.arguments = operand_list(')');
    expect(')');
    if (accept(',')) take();
  } else if (!peek().is(';')) {
    take();
  }
}

/// Operands up to `close`, which stays. "p|q" counts as two operands.
std::vector<Operand> Parser::operand_list(char close) {
  std::vector<Operand> list;
  if (peek().is(close)) return list;
  do list.push_back(operand());
  while (accept(',') || accept('|'));
  return list;
}

Operand Parser::operand() {
  if (peek().is('[')) return address();
  if (accept('{')) {
    Operand vector;
    vector.kind = OperandKind::kVector;
    vector.elements = operand_list('}');
    expect('}');
    return vector;
  }
  if (accept('!')) {
    Operand negated = operand();
    negated.negate = true;
    return negated;
  }
  if (peek().is('-') || peek().kind == TokenKind::kNumber) return constant(number());
  const std::string name = expect(TokenKind::kWord, "an operand").text;
  if (name == "_") {
    Operand sink;
    sink.kind = OperandKind::kSink;
    return sink;
  }
  Operand result = named(name);
  if (peek().is('+')) {
    const i64 offset = signed_offset();
    if (result.kind != OperandKind::kConstant) fail("an offset needs a constant address");
    result = constant(function_->constants[result.index * kWarpSize] + offset);
  }
  return result;
}

i64 Parser::signed_offset() {
  i64 offset = 0;
  while (peek().is('+') || peek().is('-')) {
    const bool negative = take().is('-');
    const i64 value = static_cast<i64>(number());
    offset += negative ? -value : value;
  }
  return offset;
}

// [base + offset, extra...]
Operand Parser::address() {
  expect('[');
  Operand result;
  result.kind = OperandKind::kAddress;
  Operand base = peek().kind == TokenKind::kNumber ? constant(number()) : named(take().text);
  result.base_kind = base.kind;
  result.index = base.index;
  result.offset = signed_offset();
  while (accept(',')) result.elements.push_back(operand());
  expect(']');
  return result;
}

Operand Parser::constant(u64 value) {
  const auto [row, is_new] =
      constant_rows_.try_emplace(value, static_cast<u32>(function_->constants.size() / kWarpSize));
  if (is_new) function_->constants.insert(function_->constants.end(), kWarpSize, value);
  Operand result;
  result.kind = OperandKind::kConstant;
  result.index = row->second;
  return result;
}

/// The operand that a name stands for: a register, a special register, a variable or a function.
Operand Parser::named(const std::string& name) {
  Operand result;
  if (const auto index = find_register(name)) {
    result.kind = OperandKind::kRegister;
    result.index = *index;
    return result;
  }
  const std::string full = name == "%clock64" || name == "%clock_lo" ? "%clock" : name;
  const auto special = std::find(kSpecialNames.begin(), kSpecialNames.end(), full);
  if (!name.empty() && special != kSpecialNames.end()) {
    result.kind = OperandKind::kSpecial;
    result.index = static_cast<u32>(special - kSpecialNames.begin());
    return result;
  }
  if (const Variable* variable = find_variable(name)) {
    if (variable->space == Space::kLocal) {
      result.kind = OperandKind::kRegister;
      result.index = variable->symbol;
      return result;
    }
    if (!variable->dynamic_shared) return constant(variable->address);
    result.kind = OperandKind::kSpecial;
    result.index = static_cast<u32>(Special::kDynamicSharedBase);
    return result;
  }
  const auto function = module_.function_index.find(name);
  if (function != module_.function_index.end()) return constant(kFunctionWindow + function->second);
  if (name == "WARP_SZ") return constant(kWarpSize);
  fail("unknown name " + name);
}

std::optional<u32> Parser::find_register(const std::string& name) {
  const std::size_t digits = name.find_last_not_of("0123456789") + 1;
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    const auto exact = scope->registers.find(name);
    if (exact != scope->registers.end()) return exact->second;
    if (digits == name.size()) continue;
    const auto range = scope->ranges.find(name.substr(0, digits));
    if (range == scope->ranges.end()) continue;
    const u64 number = std::stoull(name.substr(digits));
    if (number < range->second.count) return range->second.first + static_cast<u32>(number);
  }
  return std::nullopt;
}

const Variable* Parser::find_variable(const std::string& name) const {
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    const auto found = scope->variables.find(name);
    if (found != scope->variables.end()) return &found->second;
  }
  return nullptr;
}

}  // namespace ptxemu
