// SPDX-License-Identifier: Apache-2.0
// Executes CUDA kernels on the CPU from the PTX text that nvcc emits, and checks them while they
// run: races, bounds, alignment, uninitialised shared memory, proxy fences, barriers, deadlocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptxemu {

struct Dim3 {
  std::uint32_t x = 1, y = 1, z = 1;
  std::uint64_t count() const { return std::uint64_t{x} * y * z; }
};

struct Options {
  /// 0: warps in order, long turns. Any other value: a random interleaving that it determines.
  std::uint64_t seed = 0;
  bool check_races = true;
  bool check_initialised = true;
  /// Accept any global address as valid; for programs whose buffers are not registered.
  bool unchecked_global = false;
  /// Clusters (or CTAs without clusters) that run side by side; all of a cooperative launch.
  std::uint32_t resident = 4;
  /// Warp instructions after which a launch is given up; 0: no limit.
  std::uint64_t max_instructions = 0;
};

/// What the kernel did wrong, or what the simulator cannot do.
class Error : public std::runtime_error {
 public:
  /// `kind` is one word a test can match: race, bounds, misaligned, uninitialised, proxy,
  /// wgmma, barrier, deadlock, trap, unsupported, parse, launch, mbarrier, limit.
  Error(std::string kind, const std::string& message)
      : std::runtime_error(kind + ": " + message), kind_(std::move(kind)) {}
  const std::string& kind() const { return kind_; }

 private:
  std::string kind_;
};

/// How shared memory served accesses of warps. A wavefront is what its 32 banks of 4 bytes serve at
/// once: one word each.
struct BankUse {
  std::uint64_t accesses = 0;
  std::uint64_t wavefronts = 0;
  /// Wavefronts without conflicts: one for 32 lanes of 4 bytes, 16 of 8 or 8 of 16.
  std::uint64_t least = 0;
};

struct Stats {
  std::uint64_t ctas = 0;
  std::uint64_t warp_instructions = 0;
  std::uint64_t lane_instructions = 0;
  /// Executions by opcode, e.g. "mma" or "ld".
  std::map<std::string, std::uint64_t> opcodes;
  /// Of ld, st, ldmatrix, stmatrix and cp (the writes of cp.async).
  std::map<std::string, BankUse> banks;
  /// What was done differently from a GPU, e.g. an ignored printf.
  std::vector<std::string> notices;
};

struct Parameter {
  std::string name;
  std::string type;    // "u64", "f32", ...; "b8" with size > 1 for a struct
  std::size_t offset;  // in the parameter block
  std::size_t size;    // bytes
};

struct Module;

/// An instruction that launch() would refuse, with its place.
struct Unsupported {
  std::string function;
  std::string instruction;
  std::string reason;
  int ptx_line;
};

std::shared_ptr<Module> load(const std::string& ptx);
std::vector<std::string> kernel_names(const Module& module);
std::vector<Parameter> parameters(const Module& module, const std::string& kernel);
/// Bytes of statically declared shared memory.
std::size_t static_shared(const Module& module, const std::string& kernel);
std::vector<Unsupported> unsupported(const Module& module);
/// The address of a module-scope .global or .const variable and its size; {nullptr, 0} if none.
std::pair<void*, std::size_t> variable(const Module& module, const std::string& name);

/// Memory that kernels may use. Accesses elsewhere in global memory are findings.
class GlobalMemory {
 public:
  void add(const void* address, std::size_t bytes, std::string name, bool read_only = false);
  void remove(const void* address);
  void clear() { ranges_.clear(); }
  bool empty() const { return ranges_.empty(); }

  struct Range {
    std::uint64_t begin, end;
    std::string name;
    bool read_only;
  };
  /// The range that holds `address`, or else the nearest one below it, or null.
  const Range* find(std::uint64_t address) const;

 private:
  std::map<std::uint64_t, Range> ranges_;
};

struct LaunchConfig {
  Dim3 grid, block;
  Dim3 cluster{0, 0, 0};  // 0: what the kernel declares (.reqnctapercluster), else 1
  std::size_t dynamic_shared = 0;
  bool cooperative = false;
};

/// Runs `kernel` to its end; throws Error at the first finding.
Stats launch(Module& module, const std::string& kernel, const LaunchConfig& config,
             const void* parameter_block, std::size_t parameter_bytes, const GlobalMemory& memory,
             const Options& options = {});

}  // namespace ptxemu
