// SPDX-License-Identifier: Apache-2.0
#include "lexer.h"

#include <cctype>

#include "ptxemu.h"

namespace ptxemu {
namespace {

bool starts_word(char c) {
  return std::isalpha(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' ||
         c == '.';
}
bool continues_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' ||
         c == '.';
}

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(source) {}

  std::vector<Token> run() {
    while (skip_space()) tokens_.push_back(next());
    tokens_.push_back({TokenKind::kEnd, "", line_, at_, at_});
    return std::move(tokens_);
  }

 private:
  char peek(std::size_t ahead = 0) const {
    return at_ + ahead < source_.size() ? source_[at_ + ahead] : '\0';
  }

  bool skip_space() {
    while (at_ < source_.size()) {
      if (peek() == '\n') {
        ++line_, ++at_;
      } else if (std::isspace(static_cast<unsigned char>(peek()))) {
        ++at_;
      } else if (peek() == '/' && peek(1) == '/') {
        while (at_ < source_.size() && peek() != '\n') ++at_;
      } else if (peek() == '/' && peek(1) == '*') {
        at_ += 2;
        while (at_ < source_.size() && !(peek() == '*' && peek(1) == '/')) {
          if (peek() == '\n') ++line_;
          ++at_;
        }
        at_ += 2;
      } else if (peek() == '\0') {
        ++at_;  // texts from a fatbin are padded with zeros
      } else {
        return true;
      }
    }
    return false;
  }

  Token next() {
    const std::size_t begin = at_;
    TokenKind kind = TokenKind::kPunctuation;
    if (starts_word(peek())) {
      kind = TokenKind::kWord;
      while (continues_word(peek()) || (peek() == ':' && peek(1) == ':'))
        at_ += peek() == ':' ? 2 : 1;
    } else if (std::isdigit(static_cast<unsigned char>(peek()))) {
      kind = TokenKind::kNumber;
      while (continues_word(peek())) ++at_;
    } else if (peek() == '"') {
      kind = TokenKind::kString;
      for (++at_; at_ < source_.size() && peek() != '"'; ++at_)
        if (peek() == '\\') ++at_;
      ++at_;
    } else {
      ++at_;
    }
    return {kind, std::string(source_.substr(begin, at_ - begin)), line_, begin, at_};
  }

  std::string_view source_;
  std::size_t at_ = 0;
  int line_ = 1;
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokenize(std::string_view source) {
  return Lexer(source).run();
}

}  // namespace ptxemu
