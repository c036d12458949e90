// SPDX-License-Identifier: Apache-2.0
// The command: ptxemu kernels | opcodes | run.
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <sstream>

#include "arguments.h"
#include "json.h"
#include "ptxemu.h"

namespace {

constexpr const char* kUsage =
    R"(ptxemu executes CUDA kernels from their PTX on the CPU and checks them.

  ptxemu kernels FILE.ptx            kernels and their parameters, as JSON
  ptxemu opcodes FILE.ptx            instructions that are not supported; exit status 1 if any
  ptxemu run FILE.ptx [options]      launch a kernel; exit status 1 on a finding

options of run:
  --kernel NAME      which one (default: the only one); a part of the name that fits one will do
  --grid X[,Y[,Z]]   --block X[,Y[,Z]]   --cluster X[,Y[,Z]]
  --shared BYTES     dynamic shared memory
  --arg SPEC         one per parameter, in order:
      TYPE=VALUE             a number:  i32=5  f32=0.5  u64=0x10
      TYPE[N]=FILL           a buffer:  zeros, ones, iota, random, @FILE, unset
      TYPE[N]=FILL:ro        the kernel must not write it
      TYPE[N]=FILL:print     print it afterwards  (:print=8 for the first eight)
      TYPE[N]=FILL:out=FILE  write its bytes afterwards
    TYPE: i8 u8 i16 u16 f16 bf16 i32 u32 f32 i64 u64 f64
  --seed N           0: in order; else a random interleaving that N determines
  --seeds N          run with seeds 0 to N-1; buffers keep what earlier runs wrote
  --no-races  --no-init              leave checks out
  --max-instructions N               give up after N warp instructions
)";

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw ptxemu::Error("launch", "cannot read " + path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::string pick_kernel(const ptxemu::Module& module, const std::string& wanted) {
  std::vector<std::string> fitting;
  for (const std::string& name : ptxemu::kernel_names(module)) {
    if (name == wanted) return name;
    if (name.find(wanted) != std::string::npos) fitting.push_back(name);
  }
  if (fitting.size() == 1) return fitting[0];
  throw ptxemu::Error("launch", std::to_string(fitting.size()) + " kernels fit '" + wanted +
                                    "'; see ptxemu kernels");
}

int opcodes(const ptxemu::Module& module) {
  const auto refused = ptxemu::unsupported(module);
  for (const auto& u : refused)
    std::cout << u.function << ", line " << u.ptx_line << ": " << u.instruction << "\n  "
              << u.reason << "\n";
  std::cout << refused.size() << " unsupported instructions\n";
  return refused.empty() ? 0 : 1;
}

int run(ptxemu::Module& module, const ptxemu::cli::RunOptions& options) {
  const std::string kernel = pick_kernel(module, options.kernel);
  const auto parameters = ptxemu::parameters(module, kernel);
  if (parameters.size() != options.arguments.size())
    throw ptxemu::Error("launch", kernel + " takes " + std::to_string(parameters.size()) +
                                      " arguments; " + std::to_string(options.arguments.size()) +
                                      " were given");
  ptxemu::GlobalMemory memory;
  std::vector<ptxemu::cli::Argument> arguments;
  for (const std::string& spec : options.arguments)
    arguments.push_back(ptxemu::cli::parse_argument(spec));
  const std::size_t block_bytes =
      parameters.empty() ? 0 : parameters.back().offset + parameters.back().size;
  std::vector<unsigned char> block(block_bytes);
  for (std::size_t a = 0; a < arguments.size(); ++a)
    arguments[a].place(parameters[a], &block[parameters[a].offset], memory);
  ptxemu::Options launch_options = options.options;
  for (std::uint64_t s = 0; s < options.seeds; ++s) {
    launch_options.seed = options.options.seed + s;
    const ptxemu::Stats stats = ptxemu::launch(module, kernel, options.config, block.data(),
                                               block.size(), memory, launch_options);
    std::cout << ptxemu::to_json(stats) << "\n";
  }
  for (const auto& argument : arguments) argument.finish(std::cout);
  return 0;
}

int command(int argc, char** argv) {
  if (argc < 3 || !std::strcmp(argv[1], "--help")) {
    std::cout << kUsage;
    return argc < 2 || std::strcmp(argv[1], "--help") ? 2 : 0;
  }
  const std::string verb = argv[1];
  const auto module = ptxemu::load(read_file(argv[2]));
  if (verb == "kernels") {
    std::cout << ptxemu::to_json(*module) << "\n";
    return 0;
  }
  if (verb == "opcodes") return opcodes(*module);
  if (verb == "run") return run(*module, ptxemu::cli::parse_options(argc - 3, argv + 3));
  std::cerr << kUsage;
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return command(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "ptxemu: " << error.what() << "\n";
    return 1;
  }
}
