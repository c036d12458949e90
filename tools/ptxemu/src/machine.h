// SPDX-License-Identifier: Apache-2.0
// The state of a launch: clusters of CTAs of warps, their registers and memory, and what an
// instruction's handler sees of it (Step).
#pragma once

#include <array>
#include <deque>
#include <memory>
#include <random>
#include <unordered_map>
#include <vector>

#include "clocks.h"
#include "ir.h"
#include "shadow.h"

namespace ptxemu {

struct Cluster;
struct Cta;
struct Machine;

/// One activation of a function for some lanes of a warp.
struct Frame {
  const Function* function = nullptr;
  std::vector<u64> registers;  // rows of 32
  std::vector<u8> parameters;  // 32 parameter areas
  Frame* caller = nullptr;
  u32 call_pc = 0;
  u32 depth = 0;
  u32 lanes = 0;  // that are inside, here or in a callee
  u32 local_base = 0;
  std::vector<bool> in_flight;  // registers that wgmma is still writing
  std::vector<bool> unfenced;   // registers written since the last wgmma.fence
};

/// Why a lane does not run.
enum class Wait : u8 { kNone, kConverge, kBarrier, kMbarrier, kCluster };

/// cp.async copies of one lane: what was issued, in groups.
struct PendingCopy {
  u32 destination;  // shared address in the lane's CTA
  u64 source;
  u32 bytes, source_bytes;
};
struct AsyncCopies {
  struct Group {
    u32 epoch;  // clock of its copies
    std::vector<PendingCopy> copies;
  };
  Group open{1, {}};
  std::deque<Group> committed;
};

/// Bulk copies of one lane that complete by bulk groups (shared to global).
struct BulkGroups {
  u32 epoch = 1;
  u32 done = 0;
  bool open = false;
};

struct Warp {
  Cta* cta = nullptr;
  u32 index = 0;
  u32 live = 0;
  u32 blocked = 0;
  bool uniform = true;  // all live lanes are at the same place and none is blocked
  std::array<u32, kWarpSize> pc{};
  std::array<Frame*, kWarpSize> frame{};
  std::array<Wait, kWarpSize> wait{};
  std::array<u64, kWarpSize> waits_for{};  // barrier number or mbarrier address, for reports
  std::vector<std::unique_ptr<Frame>> frames;
  std::vector<u64> specials;
  std::array<std::vector<u8>, kWarpSize> local;
  std::array<AsyncCopies, kWarpSize> async;
  std::array<BulkGroups, kWarpSize> bulk;
  u32 wgmma_epoch = 1;                                     // clock of the open wgmma group
  std::deque<std::vector<std::vector<u32>>> wgmma_groups;  // committed: accumulators of each
  std::vector<std::vector<u32>> wgmma_open;
  u32 polls = 0;
  u32 turn = 0;  // for fair picking among diverged lanes

  bool runnable() const { return (live & ~blocked) != 0; }
  void block(u32 lanes, Wait why);
  void unblock(u32 lanes);
};

/// bar.sync / barrier.sync: who has arrived.
struct NamedBarrier {
  u32 expected = 0;  // 0: every live thread of the CTA
  u32 arrived = 0;
  Clock clock;
  std::vector<std::pair<u32, u32>> waiting;  // warp, lane
  // bar.red
  u32 votes = 0, in_favour = 0;
  std::vector<std::pair<u64*, int>> results;  // where to store which reduction
};

struct Mbarrier {
  u32 count = 0;    // arrivals of a phase
  i64 pending = 0;  // still to come
  i64 transactions = 0;
  u32 phase = 0;   // parity of the current phase
  u64 phases = 0;  // completed so far
  Clock current, completed;
  std::vector<std::pair<Warp*, u32>> waiting;  // lanes blocked in try_wait, of any CTA
};

/// A bulk or tensor copy to shared memory that has been issued and has not landed.
struct BulkTransfer {
  struct Piece {
    u64 source;       // host address; 0: fill with zeros
    u32 destination;  // shared address in `cta`
    u32 bytes;
    Cta* source_cta;  // whose shared memory the source is in; null: global memory
  };
  std::vector<Piece> pieces;
  Cta* cta = nullptr;  // whose shared memory is written
  Cta* barrier_cta = nullptr;
  u32 barrier = 0;
  u32 bytes = 0;  // that complete_tx reports
  u32 agent = 0, epoch = 0;
};

struct Cta {
  Cluster* cluster = nullptr;
  Dim3 index;
  u64 linear = 0;
  u32 rank = 0;          // in the cluster
  u32 first_thread = 0;  // of the cluster's numbering
  std::vector<u8> shared;
  std::unique_ptr<Shadow> shadow;
  std::vector<std::unique_ptr<Warp>> warps;
  std::array<NamedBarrier, 16> barriers;
  std::unordered_map<u32, Mbarrier> mbarriers;
  u32 live_threads = 0;
};

struct SyncLocation {
  ForeignPtr device, cta;
  u64 cta_linear = ~u64{0};  // whose the CTA-scope clocks are
};

struct Cluster {
  u32 linear = 0;
  std::unique_ptr<Clocks> clocks;
  std::vector<std::unique_ptr<Cta>> ctas;
  std::unordered_map<u64, SyncLocation> sync;  // strong accesses to shared memory
  std::vector<BulkTransfer> transfers;
  u32 next_transfer_agent = 0;
  std::vector<u32> transfer_epochs;

  struct Arrival {  // barrier.cluster
    u32 arrived = 0;
    Clock clock;
  };
  Arrival arrival;
  Clock completed_clock;
  u64 cluster_phase = 0;
  std::vector<u64> arrived_phase;  // by thread: 1 + the phase it arrived at
  std::vector<std::pair<Warp*, u32>> waiting;
  u32 live_threads = 0;
};

/// Agents of one cluster, in this order: threads, cp.async copies by thread, bulk groups by thread,
/// wgmma by warp, loads in flight.
struct AgentLayout {
  static constexpr u32 kTransfers = 64;
  u32 threads = 0, async = 0, bulk = 0, wgmma = 0, transfers = 0, count = 0;
};

struct Machine {
  Machine(Module& module, const Function& kernel, const LaunchConfig& config, const u8* parameters,
          const GlobalMemory& memory, const Options& options);
  Stats run();

  Module& module;
  const Function& kernel;
  LaunchConfig config;
  const u8* parameters;
  const GlobalMemory& memory;
  Options options;
  Stats stats;
  std::vector<u64> opcode_counts;
  std::vector<const Instruction*> instructions;  // by Module-wide index
  std::unordered_map<const Function*, u32> first_instruction;
  Shadow global_shadow;
  std::unordered_map<u64, SyncLocation> sync;
  AgentLayout agents;
  u32 threads_per_cta = 0;
  u32 dynamic_base = 0;
  std::vector<std::unique_ptr<Cluster>> resident;
  std::mt19937_64 random;
  u64 progress = 0;  // counts what may let others go on: stores, arrivals, exits
  u32 last_where = 0;

  void notice(const std::string& text);
  u64 draw(u64 below) { return random() % below; }

  // scheduler.cpp
  void step(Warp& warp);
  u32 turn(Warp& warp, u32 limit);
  bool land_transfer(Cluster& cluster, std::size_t index);
  [[noreturn]] void report_deadlock(const char* why);
  std::string place(const Warp& warp, u32 lane, const Instruction& i) const;
  std::string place(const Cluster& cluster, u32 agent) const;

 private:
  std::unique_ptr<Cluster> make_cluster(u32 linear);
  void make_warp(Cta& cta, u32 index);
  bool run_resident();
  bool turn_in_order();
  bool turn_at_random();
};

/// What one instruction does for a group of lanes of a warp.
struct Step {
  Step(Machine& machine_, Warp& warp_, Frame& frame_, const Instruction& instruction_, u32 mask_,
       u32 where_)
      : machine(machine_),
        cta(*warp_.cta),
        warp(warp_),
        frame(frame_),
        instruction(instruction_),
        mask(mask_),
        where(where_) {}

  Machine& machine;
  Cta& cta;
  Warp& warp;
  Frame& frame;
  const Instruction& instruction;
  u32 mask;           // lanes whose guard holds; the others have gone on
  u32 where;          // Module-wide index of the instruction
  bool stay = false;  // the handler has set the program counters itself
  // What lanes have accessed in the CTA's shared memory, of this many bytes each.
  u32 shared_lanes = 0, shared_bytes = 0;
  std::array<u32, kWarpSize> shared_at;

  const u64* in(const Operand& o) const {
    if (o.kind == OperandKind::kRegister) return &frame.registers[std::size_t{o.index} * kWarpSize];
    if (o.kind == OperandKind::kConstant)
      return &frame.function->constants[std::size_t{o.index} * kWarpSize];
    if (o.kind == OperandKind::kSpecial) return special(o.index);
    fail_operand();
  }
  const u64* in(std::size_t operand) const { return in(instruction.operands[operand]); }
  /// The row to write; of "_", a row that nobody reads.
  u64* out(const Operand& o) {
    if (o.kind == OperandKind::kRegister) return &frame.registers[std::size_t{o.index} * kWarpSize];
    if (o.kind == OperandKind::kSink) return sink.data();
    fail_operand();
  }
  u64* out(std::size_t operand) { return out(instruction.operands[operand]); }
  bool predicate(const Operand& o, int lane) const { return ((in(o)[lane] & 1) != 0) != o.negate; }
  const Operand& operand(std::size_t index) const { return instruction.operands[index]; }
  std::size_t operand_count() const { return instruction.operands.size(); }

  u64 address(const Operand& o, int lane) const;
  u64 address(std::size_t operand, int lane) const {
    return address(instruction.operands[operand], lane);
  }

  template <class F>
  void each(F&& f) const {
    if (mask == kAllLanes) {
      for (int lane = 0; lane < kWarpSize; ++lane) f(lane);
    } else {
      for (u32 rest = mask; rest != 0; rest &= rest - 1) f(std::countr_zero(rest));
    }
  }
  int first_lane() const { return std::countr_zero(mask); }
  u32 thread(int lane) const {
    return cta.first_thread + warp.index * kWarpSize + static_cast<u32>(lane);
  }
  Clocks& clocks() const { return *cta.cluster->clocks; }

  /// True when all live lanes of `needed` are in this group; else the group waits for them.
  bool converge(u32 needed);
  bool converge_all();   // .aligned: every live lane of the warp
  bool converge_full();  // and the warp must have all its 32 lanes

  // memory.cpp
  struct Place {  // where an address leads
    u8* data = nullptr;
    Space space = Space::kGlobal;
    Cta* cta = nullptr;  // of shared memory
    u64 address = 0;     // in its space; of shared memory without the rank
  };
  Place resolve(Space space, u64 address, u32 bytes, bool write, int lane);
  Actor actor(int lane, bool strong = false) const;
  void record(const Place& place, u32 bytes, const Actor& actor, bool write, int lane);
  /// resolve() and record() of an ordinary access by a thread.
  u8* access(Space space, u64 address, u32 bytes, bool write, int lane, bool strong = false);
  Place shared(u64 address, u32 bytes, bool write, int lane, u32 align);
  SyncLocation& sync_location(const Place& place);

  [[noreturn]] void fail(const char* kind, const std::string& message, int lane) const;
  [[noreturn]] void fail_operand() const;

 private:
  const u64* special(u32 index) const;
  std::array<u64, kWarpSize> sink;  // what "_" takes
};

/// Memory-model effects of strong accesses (fences.cpp).
enum class Order : u8 { kNone, kRelaxed, kAcquire, kRelease, kAcqRel };
void before_strong_write(Step& s, const Step::Place& place, Order order, bool cta_scope, int lane);
void after_strong_read(Step& s, const Step::Place& place, Order order, bool cta_scope, int lane);

/// banks.cpp: adds what a step has accessed to the statistics.
void count_banks(const Step& s, std::map<std::string, BankUse>& banks);

/// mbarrier.cpp
Mbarrier& find_mbarrier(Step& s, Cta& cta, u32 address, int lane);
void arrive(Machine& machine, Mbarrier& barrier, u32 count);
void complete_if_done(Machine& machine, Mbarrier& barrier);

/// barriers.cpp: a thread has left; barriers that count live threads may complete.
void thread_exits(Machine& machine, Warp& warp, u32 lanes);

/// async_copy.cpp: the bytes of a group of cp.async copies arrive in shared memory.
void land(Cta& cta, AsyncCopies::Group& group);

}  // namespace ptxemu
