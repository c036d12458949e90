// SPDX-License-Identifier: Apache-2.0
// Just enough JSON to hand results to other languages.
#pragma once

#include <cstdio>
#include <string>

#include "ptxemu.h"

namespace ptxemu {

inline std::string json_string(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
      out += escaped;
    } else {
      out += c;
    }
  }
  return out + "\"";
}

/// Joins f(item) of all items with commas.
template <class Items, class F>
std::string json_list(const Items& items, F&& f) {
  std::string out;
  for (const auto& item : items) out += (out.empty() ? "" : ", ") + f(item);
  return out;
}

inline std::string to_json(const Stats& stats) {
  return "{\"ctas\": " + std::to_string(stats.ctas) +
         ", \"warp_instructions\": " + std::to_string(stats.warp_instructions) +
         ", \"lane_instructions\": " + std::to_string(stats.lane_instructions) +
         ", \"opcodes\": {" +
         json_list(
             stats.opcodes,
             [](const auto& o) { return json_string(o.first) + ": " + std::to_string(o.second); }) +
         "}, \"banks\": {" +
         json_list(stats.banks,
                   [](const auto& b) {
                     return json_string(b.first) +
                            ": {\"accesses\": " + std::to_string(b.second.accesses) +
                            ", \"wavefronts\": " + std::to_string(b.second.wavefronts) +
                            ", \"least\": " + std::to_string(b.second.least) + "}";
                   }) +
         "}, \"notices\": [" + json_list(stats.notices, json_string) + "]}";
}

/// Kernels with their parameters, and what is not supported.
inline std::string to_json(const Module& module) {
  const auto kernel = [&](const std::string& name) {
    return "{\"name\": " + json_string(name) +
           ", \"static_shared\": " + std::to_string(static_shared(module, name)) +
           ", \"parameters\": [" +
           json_list(parameters(module, name),
                     [](const Parameter& p) {
                       return "{\"name\": " + json_string(p.name) +
                              ", \"type\": " + json_string(p.type) +
                              ", \"offset\": " + std::to_string(p.offset) +
                              ", \"size\": " + std::to_string(p.size) + "}";
                     }) +
           "]}";
  };
  const auto refused = [](const Unsupported& u) {
    return "{\"function\": " + json_string(u.function) +
           ", \"line\": " + std::to_string(u.ptx_line) +
           ", \"instruction\": " + json_string(u.instruction) +
           ", \"reason\": " + json_string(u.reason) + "}";
  };
  return "{\"kernels\": [" + json_list(kernel_names(module), kernel) + "], \"unsupported\": [" +
         json_list(unsupported(module), refused) + "]}";
}

}  // namespace ptxemu
