// SPDX-License-Identifier: Apache-2.0
// The options of `ptxemu run` and its descriptions of kernel arguments.
#pragma once

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "ptxemu.h"

namespace ptxemu::cli {

struct RunOptions {
  std::string kernel;
  std::vector<std::string> arguments;
  LaunchConfig config;
  Options options;
  std::uint64_t seeds = 1;
};

RunOptions parse_options(int count, char** words);

/// A number or a buffer.
class Argument {
 public:
  /// Writes the number or the buffer's address into the parameter block.
  void place(const Parameter& parameter, unsigned char* target, GlobalMemory& memory) const;
  /// Prints and saves, as the description asks.
  void finish(std::ostream& out) const;

 private:
  friend Argument parse_argument(const std::string& spec);

  std::string type_;
  bool is_buffer_ = false;
  std::vector<unsigned char> bytes_;
  bool read_only_ = false;
  std::size_t print_ = 0;  // elements
  std::string output_;
};

/// TYPE=VALUE or TYPE[N]=FILL[:ro][:print[=N]][:out=FILE]
Argument parse_argument(const std::string& spec);

}  // namespace ptxemu::cli
