// SPDX-License-Identifier: Apache-2.0
// PTX text to a Module. parser.cpp reads directives, variables and functions; statements.cpp
// instructions and their operands.
#pragma once

#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "ir.h"
#include "lexer.h"

namespace ptxemu {

class Parser {
 public:
  Parser(std::string_view source, Module& module)
      : source_(source), tokens_(tokenize(source)), module_(module) {}
  void run();

 private:
  struct RegisterRange {
    u32 first, count;
  };
  struct PendingLabel {
    std::size_t instruction;
    std::string label;
    int slot;  // -1: Instruction::target, else the place in Instruction::targets
  };
  /// What one pair of braces declares.
  struct Scope {
    std::unordered_map<std::string, RegisterRange> ranges;  // "%r" of "%r<12>"
    std::unordered_map<std::string, u32> registers;
    std::unordered_map<std::string, Variable> variables;
    std::unordered_map<std::string, int> labels;
    std::unordered_map<std::string, std::vector<std::string>> branch_targets;
    std::vector<PendingLabel> pending;
  };
  struct Declaration {
    std::string name;
    Type type = Type::kB8;
    u64 align = 0, size = 0;  // bytes
    bool unsized = false;     // name[]
  };

  // parser.cpp
  void module_statement();
  void skip_braces();
  void location();
  void file();
  void function(bool external);
  std::vector<ParameterSlot> formal_parameters(u32& offset);
  void function_attributes();
  void body();
  void register_declaration();
  Declaration declaration();
  void variable_declaration(Space space, bool external);
  void initialise(u8* storage, const Declaration& what);
  void open_scope() { scopes_.emplace_back(); }
  void close_scope();

  // statements.cpp
  void statement();
  void instruction();
  void call_operands(Instruction& i);
  std::vector<Operand> operand_list(char close);
  Operand operand();
  Operand address();
  Operand named(const std::string& name);
  Operand constant(u64 value);
  i64 signed_offset();
  void branch_target_list(const std::string& name);
  std::optional<u32> find_register(const std::string& name);
  const Variable* find_variable(const std::string& name) const;

  // tokens
  const Token& peek(std::size_t ahead = 0) const {
    return tokens_[std::min(at_ + ahead, tokens_.size() - 1)];
  }
  Token take() { return tokens_[std::min(at_++, tokens_.size() - 1)]; }
  bool accept(char c) { return peek().is(c) && (++at_, true); }
  bool accept(std::string_view word) { return peek().is(word) && (++at_, true); }
  Token expect(TokenKind kind, const char* what);
  void expect(char c);
  u64 number();
  void skip_past(char c) {
    while (peek().kind != TokenKind::kEnd && !peek().is(c)) ++at_;
    ++at_;
  }
  [[noreturn]] void fail(const std::string& message) const;

  std::string_view source_;
  std::vector<Token> tokens_;
  std::size_t at_ = 0;
  Module& module_;
  Function* function_ = nullptr;
  std::vector<Scope> scopes_;
  std::unordered_map<u64, u32> constant_rows_;
  std::unordered_map<std::string, u32> opcode_index_;
  std::unordered_map<u64, int> location_index_;  // file, line, column -> the latest such location
  int current_location_ = -1;
  bool doubles_ = false;  // the instruction or variable at hand is of type f64
};

/// The bits of a PTX literal: 12, 0x1F, 0f3F800000, 0d3FF0000000000000, 7U, and 1.5 as an f64 or
/// f32.
u64 parse_literal(const std::string& text, bool is_double);

}  // namespace ptxemu
