// SPDX-License-Identifier: Apache-2.0
// The race model's memory of who touched what: a cell per 4-byte word, split into bytes where
// narrower accesses happen.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

#include "clocks.h"
#include "types.h"

namespace ptxemu {

/// Who accesses, and what it knows.
struct Actor {
  u32 cluster = 0;
  u32 agent = 0;
  u32 clock = 0;
  const u32* row = nullptr;      // what the acting thread knows of its cluster's agents
  const u32* proxied = nullptr;  // the part that the async proxy sees, if that is tracked
  const ForeignClocks* foreign = nullptr;
  bool strong = false;       // atomic, volatile, relaxed, acquire or release
  bool async_proxy = false;  // TMA, bulk copies, wgmma
  u32 where = 0;             // Module-wide index of the instruction
};

/// One remembered access.
struct Access {
  u32 cluster = 0;
  u32 clock = 0;  // 0: none
  u16 agent = 0;
  bool strong = false, async_proxy = false;
  u32 where = 0;
};

enum class Conflict { kNone, kRace, kUninitialised, kProxy };

struct Verdict {
  Conflict conflict = Conflict::kNone;
  Access other;
  bool other_writes = false;
};

class Shadow {
 public:
  /// `initialised`: reads before any write are fine (global memory). `exact_readers`: remember all
  /// concurrent readers of a word, not two.
  Shadow(bool initialised, bool exact_readers, u32 agents)
      : initialised_(initialised), exact_readers_(exact_readers), agents_(agents) {}
  void resize(std::size_t bytes) { flat_.assign((bytes + 3) / 4, Cell{}); }

  /// Checks and records an access to [address, address + bytes).
  Verdict access(u64 address, u32 bytes, const Actor& actor, bool write, bool check_races,
                 bool check_initialised);

 private:
  struct Cell {
    Access write;
    std::array<Access, 2> reads;
    u32 crowd = 0;  // 1 + index into crowds_: more readers than fit
    u32 split = 0;  // 1 + index into split_, of a whole word's cell
    bool initialised = false;
  };
  struct Crowd {
    std::vector<u32> clocks;  // by agent
    u32 where = 0;
  };
  static constexpr std::size_t kPageWords = 1024;

  Cell& word(u64 index);
  Verdict touch(Cell& cell, const Actor& actor, bool write, bool races, bool initialised);
  Verdict check_reads(const Cell& cell, const Actor& actor) const;
  void record_read(Cell& cell, const Actor& actor);

  bool initialised_, exact_readers_;
  u32 agents_;
  std::vector<Cell> flat_;                                                        // shared memory
  std::unordered_map<u64, std::unique_ptr<std::array<Cell, kPageWords>>> pages_;  // global memory
  u64 last_page_ = ~u64{0};
  std::array<Cell, kPageWords>* last_cells_ = nullptr;
  std::vector<std::array<Cell, 4>> split_;
  std::vector<Crowd> crowds_;
};

}  // namespace ptxemu
