// SPDX-License-Identifier: Apache-2.0
// PTX text to tokens.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace ptxemu {

enum class TokenKind { kWord, kNumber, kString, kPunctuation, kEnd };

struct Token {
  TokenKind kind = TokenKind::kEnd;
  std::string text;
  int line = 0;
  std::size_t begin = 0, end = 0;  // in the source text

  bool is(char c) const { return kind == TokenKind::kPunctuation && text[0] == c; }
  bool is(std::string_view word) const { return kind == TokenKind::kWord && text == word; }
};

/// Words hold dots and double colons ("mbarrier.try_wait.parity.shared::cta.b64", ".reg",
/// "%tid.x").
std::vector<Token> tokenize(std::string_view source);

}  // namespace ptxemu
