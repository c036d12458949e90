// SPDX-License-Identifier: Apache-2.0
#include "arguments.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>

#include "../src/types.h"

namespace ptxemu::cli {
namespace {

[[noreturn]] void refuse(const std::string& what) {
  throw Error("launch", what);
}

Type type_named(const std::string& name) {
  std::string ptx = name;
  if (ptx[0] == 'i') ptx[0] = 's';
  const Type type = parse_type(ptx);
  if (type == Type::kNone || size_of(type) > 8 || type == Type::kPred)
    refuse("unknown type " + name);
  return type;
}

/// The bits of `value` in a type.
u64 encode(Type type, double value, const std::string* text) {
  switch (type) {
    case Type::kF16:
      return float_to_half(static_cast<float>(value));
    case Type::kBf16:
      return float_to_bfloat(static_cast<float>(value));
    case Type::kF32:
      return to_bits(static_cast<float>(value));
    case Type::kF64:
      return to_bits(value);
    default:
      if (!text) return static_cast<u64>(static_cast<i64>(value));
      return (*text)[0] == '-' ? static_cast<u64>(std::stoll(*text, nullptr, 0))
                               : std::stoull(*text, nullptr, 0);
  }
}

double decode(Type type, const unsigned char* bytes) {
  u64 bits = 0;
  std::memcpy(&bits, bytes, size_of(type));
  switch (type) {
    case Type::kF16:
      return half_to_float(static_cast<u16>(bits));
    case Type::kBf16:
      return bfloat_to_float(static_cast<u16>(bits));
    case Type::kF32:
      return from_bits<float>(bits);
    case Type::kF64:
      return from_bits<double>(bits);
    default:
      return is_signed(type)
                 ? static_cast<double>(static_cast<i64>(sign_extend(bits, size_of(type))))
                 : static_cast<double>(bits);
  }
}

void fill(std::vector<unsigned char>& bytes, Type type, const std::string& how) {
  const u32 size = size_of(type);
  if (how[0] == '@') {
    std::ifstream file(how.substr(1), std::ios::binary);
    if (!file) refuse("cannot read " + how.substr(1));
    const std::vector<char> content((std::istreambuf_iterator<char>(file)), {});
    std::copy_n(content.begin(), std::min(content.size(), bytes.size()), bytes.begin());
    return;
  }
  if (how == "unset") {
    std::fill(bytes.begin(), bytes.end(), 0xff);
    return;
  }
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  for (std::size_t i = 0; i * size < bytes.size(); ++i) {
    double value = 0;
    if (how == "ones")
      value = 1;
    else if (how == "iota")
      value = static_cast<double>(i);
    else if (how == "random")
      value = is_float(type) ? normal(random) : static_cast<double>(random() % 100);
    else if (how != "zeros")
      refuse("unknown fill " + how);
    const u64 bits = encode(type, value, nullptr);
    std::memcpy(&bytes[i * size], &bits, size);
  }
}

Dim3 dims(const std::string& text) {
  Dim3 result;
  std::uint32_t* const parts[] = {&result.x, &result.y, &result.z};
  std::size_t at = 0;
  for (std::uint32_t* part : parts) {
    std::size_t used = 0;
    *part = static_cast<std::uint32_t>(std::stoul(text.substr(at), &used));
    at += used;
    if (at >= text.size() || text[at++] != ',') break;
  }
  return result;
}

}  // namespace

RunOptions parse_options(int count, char** words) {
  RunOptions result;
  int at = 0;
  while (at < count) {
    const std::string option = words[at++];
    if (option == "--no-races") {
      result.options.check_races = false;
      continue;
    }
    if (option == "--no-init") {
      result.options.check_initialised = false;
      continue;
    }
    if (at == count) refuse(option + " needs a value");
    const std::string value = words[at++];
    if (option == "--kernel")
      result.kernel = value;
    else if (option == "--grid")
      result.config.grid = dims(value);
    else if (option == "--block")
      result.config.block = dims(value);
    else if (option == "--cluster")
      result.config.cluster = dims(value);
    else if (option == "--shared")
      result.config.dynamic_shared = std::stoull(value);
    else if (option == "--arg")
      result.arguments.push_back(value);
    else if (option == "--seed")
      result.options.seed = std::stoull(value);
    else if (option == "--seeds")
      result.seeds = std::stoull(value);
    else if (option == "--max-instructions")
      result.options.max_instructions = std::stoull(value);
    else
      refuse("unknown option " + option);
  }
  return result;
}

Argument parse_argument(const std::string& spec) {
  const std::size_t equals = spec.find('=');
  if (equals == std::string::npos) refuse("argument '" + spec + "': TYPE=VALUE or TYPE[N]=FILL");
  const std::string left = spec.substr(0, equals);
  std::string value = spec.substr(equals + 1);
  Argument argument;
  const std::size_t bracket = left.find('[');
  argument.type_ = left.substr(0, bracket);
  const Type type = type_named(argument.type_);
  argument.is_buffer_ = bracket != std::string::npos;
  if (!argument.is_buffer_) {
    const u64 bits = encode(type, is_float(type) ? std::stod(value) : 0, &value);
    argument.bytes_.resize(size_of(type));
    std::memcpy(argument.bytes_.data(), &bits, size_of(type));
    return argument;
  }
  const std::size_t elements = std::stoull(left.substr(bracket + 1));
  argument.bytes_.resize(elements * size_of(type));
  for (std::size_t colon; (colon = value.rfind(':')) != std::string::npos;) {
    const std::string attribute = value.substr(colon + 1);
    if (attribute == "ro")
      argument.read_only_ = true;
    else if (attribute == "print")
      argument.print_ = elements;
    else if (attribute.starts_with("print="))
      argument.print_ = std::min<std::size_t>(elements, std::stoull(attribute.substr(6)));
    else if (attribute.starts_with("out="))
      argument.output_ = attribute.substr(4);
    else
      refuse("unknown attribute " + attribute);
    value.resize(colon);
  }
  fill(argument.bytes_, type, value);
  return argument;
}

void Argument::place(const Parameter& parameter, unsigned char* target,
                     GlobalMemory& memory) const {
  if (is_buffer_) {
    if (parameter.size != 8) refuse("parameter " + parameter.name + " is no pointer");
    const auto address = reinterpret_cast<std::uint64_t>(bytes_.data());
    std::memcpy(target, &address, 8);
    memory.add(bytes_.data(), bytes_.size(), parameter.name, read_only_);
    return;
  }
  if (parameter.size != bytes_.size())
    refuse("parameter " + parameter.name + " has " + std::to_string(parameter.size) +
           " bytes, the argument " + std::to_string(bytes_.size()));
  std::memcpy(target, bytes_.data(), bytes_.size());
}

void Argument::finish(std::ostream& out) const {
  const Type type = type_named(type_);
  for (std::size_t i = 0; i < print_; ++i)
    out << (i ? " " : "") << decode(type, &bytes_[i * size_of(type)])
        << (i + 1 == print_ ? "\n" : "");
  if (output_.empty()) return;
  std::ofstream file(output_, std::ios::binary);
  file.write(reinterpret_cast<const char*>(bytes_.data()),
             static_cast<std::streamsize>(bytes_.size()));
  if (!file) refuse("cannot write " + output_);
}

}  // namespace ptxemu::cli
