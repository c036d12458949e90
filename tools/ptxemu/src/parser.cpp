// SPDX-License-Identifier: Apache-2.0
#include "parser.h"

#include <algorithm>
#include <array>

namespace ptxemu {
namespace {

u64 round_up(u64 value, u64 unit) {
  return (value + unit - 1) / unit * unit;
}

Space space_of(const std::string& word) {
  if (word == ".shared") return Space::kShared;
  if (word == ".local") return Space::kLocal;
  if (word == ".param") return Space::kParam;
  if (word == ".const") return Space::kConst;
  return Space::kGlobal;
}

bool names_space(const Token& token) {
  static constexpr std::array<std::string_view, 5> kSpaces{".global", ".const", ".shared", ".local",
                                                           ".param"};
  return std::find(kSpaces.begin(), kSpaces.end(), token.text) != kSpaces.end();
}

}  // namespace

u64 parse_literal(const std::string& text, bool is_double) {
  if (text.size() > 2 && text[0] == '0') {
    const char kind = static_cast<char>(std::tolower(text[1]));
    if (kind == 'f' || kind == 'd') return std::stoull(text.substr(2), nullptr, 16);
    if (kind == 'b') return std::stoull(text.substr(2), nullptr, 2);
  }
  if (text.find('.') != std::string::npos) {
    const double value = std::stod(text);
    return is_double ? to_bits(value) : to_bits(static_cast<float>(value));
  }
  return std::stoull(text, nullptr, 0);
}

void Parser::fail(const std::string& message) const {
  throw Error("parse",
              "line " + std::to_string(peek().line) + ", at '" + peek().text + "': " + message);
}

Token Parser::expect(TokenKind kind, const char* what) {
  if (peek().kind != kind) fail(std::string("expected ") + what);
  return take();
}

void Parser::expect(char c) {
  if (!accept(c)) fail(std::string("expected '") + c + "'");
}

u64 Parser::number() {
  const bool negative = accept('-');
  const std::string text = expect(TokenKind::kNumber, "a number").text;
  const u64 value = parse_literal(text, doubles_);
  if (negative && text.find('.') != std::string::npos)
    return value ^ (doubles_ ? u64{1} << 63 : u64{1} << 31);
  return negative ? 0 - value : value;
}

void Parser::run() {
  open_scope();
  while (peek().kind != TokenKind::kEnd) module_statement();
}

void Parser::module_statement() {
  if (accept(".version")) {
    take();
  } else if (accept(".target")) {
    module_.target = take().text;
    while (accept(',')) take();
  } else if (accept(".address_size")) {
    if (take().text != "64") fail("only 64-bit addresses are supported");
  } else if (accept(".file")) {
    file();
  } else if (peek().is(".loc")) {
    location();
  } else if (accept(".section")) {
    take();
    skip_braces();
  } else if (accept(".pragma") || accept(".alias")) {
    skip_past(';');
  } else {
    bool external = false;
    while (peek().is(".extern") || peek().is(".visible") || peek().is(".weak") ||
           peek().is(".common"))
      external |= take().text == ".extern";
    if (peek().is(".entry") || peek().is(".func"))
      function(external);
    else if (names_space(peek()))
      variable_declaration(space_of(take().text), external);
    else if (!accept(';'))
      fail("unknown statement at module scope");
  }
}

void Parser::skip_braces() {
  expect('{');
  for (int depth = 1; depth > 0;) {
    if (peek().kind == TokenKind::kEnd) fail("unclosed brace");
    depth += peek().is('{') ? 1 : peek().is('}') ? -1 : 0;
    ++at_;
  }
}

void Parser::file() {
  const int index = static_cast<int>(number());
  const std::string quoted = expect(TokenKind::kString, "a file name").text;
  module_.files[index] = quoted.substr(1, quoted.size() - 2);
  while (accept(',')) number();
}

// .loc FILE LINE COLUMN [, function_name LABEL [+ N], inlined_at FILE LINE COLUMN]
void Parser::location() {
  take();
  const auto position = [&] {
    Location where;
    where.file = static_cast<int>(number());
    where.line = static_cast<int>(number());
    where.column = static_cast<int>(number());
    return where;
  };
  const auto key = [](const Location& l) {
    return u64(l.file) << 48 | u64(l.line) << 16 | (u64(l.column) & 0xffff);
  };
  Location where = position();
  while (accept(',')) {
    const std::string attribute = take().text;
    if (attribute == "inlined_at") {
      const auto parent = location_index_.find(key(position()));
      if (parent != location_index_.end()) where.parent = parent->second;
    } else {
      take();
      if (accept('+')) number();
    }
  }
  current_location_ = static_cast<int>(module_.locations.size());
  location_index_[key(where)] = current_location_;
  module_.locations.push_back(where);
}

// --- functions ----------------------------------------------------------------------------------

void Parser::function(bool external) {
  auto parsed = std::make_unique<Function>();
  Function& f = *parsed;
  f.is_kernel = take().text == ".entry";
  constant_rows_.clear();
  open_scope();
  if (peek().is('(')) f.returns = formal_parameters(f.parameter_area);
  f.name = expect(TokenKind::kWord, "a function name").text;
  if (peek().is('(')) f.parameters = formal_parameters(f.parameter_area);
  if (f.is_kernel) f.parameter_block = f.parameter_area;
  function_ = &f;
  function_attributes();

  const auto [known, is_new] =
      module_.function_index.try_emplace(f.name, static_cast<int>(module_.functions.size()));
  f.is_declaration = peek().is(';');
  if (is_new)
    module_.functions.push_back(std::move(parsed));
  else if (!f.is_declaration || external)
    module_.functions[known->second] = std::move(parsed);

  if (accept(';')) {
    close_scope();
  } else {
    f.shared_bytes = module_.shared_bytes;
    expect('{');
    body();
  }
  function_ = nullptr;
  current_location_ = -1;
}

/// "(.param .u64 a, .param .align 8 .b8 b[32])": declares the names and lays them out.
std::vector<ParameterSlot> Parser::formal_parameters(u32& offset) {
  std::vector<ParameterSlot> slots;
  expect('(');
  while (!accept(')')) {
    if (!accept(".param")) fail("only .param parameters are supported");
    const Declaration what = declaration();
    offset = static_cast<u32>(round_up(offset, what.align));
    slots.push_back({what.name, what.type, offset, static_cast<u32>(what.size)});
    scopes_.back().variables[what.name] = {Space::kParam, false, offset, what.size};
    offset += static_cast<u32>(what.size);
    accept(',');
  }
  return slots;
}

void Parser::function_attributes() {
  while (!peek().is('{') && !peek().is(';')) {
    const std::string name = expect(TokenKind::kWord, "an attribute or '{'").text;
    std::array<u32, 3> values{1, 1, 1};
    std::size_t count = 0;
    while (peek().kind == TokenKind::kNumber || peek().is(',')) {
      if (accept(',')) continue;
      const u32 value = static_cast<u32>(number());
      if (count < values.size()) values[count++] = value;
    }
    const Dim3 dims{values[0], values[1], values[2]};
    if (name == ".reqntid") function_->required_block = dims;
    if (name == ".maxntid") function_->max_block = dims;
    if (name == ".reqnctapercluster") function_->cluster = dims;
  }
}

void Parser::body() {
  const std::size_t depth = scopes_.size();
  while (scopes_.size() >= depth) {
    if (peek().kind == TokenKind::kEnd) fail("unclosed function body");
    if (accept('{'))
      open_scope();
    else if (accept('}'))
      close_scope();
    else
      statement();
  }
}

/// Resolves the branches to labels of this scope; hands the others to the enclosing one.
void Parser::close_scope() {
  Scope scope = std::move(scopes_.back());
  scopes_.pop_back();
  for (const PendingLabel& branch : scope.pending) {
    const auto label = scope.labels.find(branch.label);
    if (label == scope.labels.end()) {
      if (scopes_.size() <= 1)
        throw Error("parse", "function " + function_->name + ": no label " + branch.label);
      scopes_.back().pending.push_back(branch);
      continue;
    }
    Instruction& i = function_->code[branch.instruction];
    (branch.slot < 0 ? i.target : i.targets[branch.slot]) = label->second;
  }
}

// --- declarations -------------------------------------------------------------------------------

// .reg .b32 %r<12>;  .reg .pred p, q;
void Parser::register_declaration() {
  if (accept(".v2") || accept(".v4")) fail("vector registers are not supported");
  expect(TokenKind::kWord, "a register type");
  do {
    const std::string name = expect(TokenKind::kWord, "a register name").text;
    if (accept('<')) {
      const u32 count = static_cast<u32>(number());
      expect('>');
      scopes_.back().ranges[name] = {function_->registers, count};
      function_->registers += count;
    } else {
      scopes_.back().registers[name] = function_->registers++;
    }
  } while (accept(','));
  expect(';');
}

// [.align N] [.v2|.v4] .TYPE [.ptr ...] NAME [dimensions]
Parser::Declaration Parser::declaration() {
  Declaration what;
  u64 count = 1;
  while (peek().kind == TokenKind::kWord && peek().text[0] == '.') {
    const std::string word = take().text;
    if (word == ".align")
      what.align = number();
    else if (word == ".v2" || word == ".v4")
      count = word == ".v2" ? 2 : 4;
    else if (word == ".attribute")
      skip_past(')');
    else if (parse_type(word.substr(1)) != Type::kNone)
      what.type = parse_type(word.substr(1));
    // .ptr .global .align N describes what a parameter points to: the .align is the pointee's
    if (word == ".ptr") {
      while (names_space(peek())) ++at_;
      if (accept(".align")) number();
    }
  }
  what.name = expect(TokenKind::kWord, "a name").text;
  while (accept('[')) {
    what.unsized |= peek().is(']');
    if (!peek().is(']')) count *= number();
    expect(']');
  }
  what.size = what.unsized ? 0 : count * size_of(what.type);
  if (what.align == 0) what.align = size_of(what.type);
  return what;
}

void Parser::variable_declaration(Space space, bool external) {
  do {
    const Declaration what = declaration();
    Variable variable{space, false, 0, what.size};
    const auto place = [&](u32& end) {
      variable.address = round_up(end, what.align);
      end = static_cast<u32>(variable.address + what.size);
    };
    if (space == Space::kShared) {
      variable.dynamic_shared = external || what.unsized;
      if (!variable.dynamic_shared)
        place(function_ ? function_->shared_bytes : module_.shared_bytes);
    } else if (space == Space::kLocal) {
      if (!function_) fail(".local variables at module scope are not supported");
      place(function_->local_bytes);
      variable.symbol = function_->registers++;
      function_->local_symbols.emplace_back(variable.symbol, static_cast<u32>(variable.address));
    } else if (space == Space::kParam) {
      place(function_->parameter_area);
    } else {
      auto storage = std::make_unique<u8[]>(what.size + 256);
      variable.address = round_up(reinterpret_cast<u64>(storage.get()), 256);
      u8* data = reinterpret_cast<u8*>(variable.address);
      module_.memory.add(data, what.size, what.name, space == Space::kConst);
      module_.storage.push_back(std::move(storage));
      if (accept('=')) initialise(data, what);
    }
    // what the host may look up by name is known to the module, too
    if (!function_ || space == Space::kGlobal || space == Space::kConst)
      module_.variables[what.name] = variable;
    scopes_.back().variables[what.name] = variable;
  } while (accept(','));
  expect(';');
}

void Parser::initialise(u8* storage, const Declaration& what) {
  const u32 size = size_of(what.type);
  doubles_ = what.type == Type::kF64;
  u64 at = 0;
  int depth = 0;
  do {
    if (accept('{')) {
      ++depth;
    } else if (accept('}')) {
      --depth;
    } else if (!accept(',')) {
      u64 value;
      if (peek().kind == TokenKind::kWord) {
        const bool generic = accept("generic") && accept('(');
        const std::string name = take().text;
        const auto variable = module_.variables.find(name);
        const auto function = module_.function_index.find(name);
        if (variable != module_.variables.end())
          value = variable->second.address;
        else if (function != module_.function_index.end())
          value = kFunctionWindow + function->second;
        else
          fail("unknown symbol " + name + " in an initialiser");
        if (generic) expect(')');
        if (accept('+')) value += number();
      } else {
        value = number();
      }
      if (at + size > what.size) fail("too many initial values for " + what.name);
      std::memcpy(storage + at, &value, size);
      at += size;
    }
  } while (depth > 0);
}

}  // namespace ptxemu
