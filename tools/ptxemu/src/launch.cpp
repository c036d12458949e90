// SPDX-License-Identifier: Apache-2.0
// Setting up a launch: agents, clusters, CTAs, warps, special registers.
#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>

#include "machine.h"

namespace ptxemu {
namespace {

constexpr u32 kMaxSharedBytes = 227 * 1024;

std::string triple(const Dim3& d) {
  return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
}

/// A kernel's name as C++ writes it, cut where template arguments get long.
std::string readable(const std::string& name) {
  constexpr std::size_t kLongest = 100;
  std::string result = name;
  if (name.starts_with("_Z")) {
    int status = 0;
    char* const text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
    if (text) result = text;
    std::free(text);
  }
  if (result.starts_with("void ")) result.erase(0, 5);
  if (result.size() > kLongest) result = result.substr(0, kLongest) + "...";
  return result;
}

Dim3 unlinear(u64 index, const Dim3& extent) {
  return {static_cast<u32>(index % extent.x), static_cast<u32>(index / extent.x % extent.y),
          static_cast<u32>(index / extent.x / extent.y)};
}

AgentLayout lay_out(const Module& module, u32 threads, u32 warps) {
  bool async = false, bulk = false, wgmma = false;
  for (const auto& f : module.functions) {
    async |= f->uses_async_copy;
    bulk |= f->uses_bulk_copy;
    wgmma |= f->uses_wgmma;
  }
  AgentLayout a;
  a.threads = threads;
  a.async = threads;
  a.bulk = a.async + (async ? threads : 0);
  a.wgmma = a.bulk + (bulk ? threads : 0);
  a.transfers = a.wgmma + (wgmma ? warps : 0);
  a.count = a.transfers + (bulk ? AgentLayout::kTransfers : 0);
  return a;
}

}  // namespace

Machine::Machine(Module& m, const Function& k, const LaunchConfig& c, const u8* block,
                 const GlobalMemory& global, const Options& o)
    : module(m),
      kernel(k),
      config(c),
      parameters(block),
      memory(global),
      options(o),
      opcode_counts(m.opcodes.size()),
      global_shadow(true, false, 0),
      random(o.seed) {
  for (const auto& f : module.functions) {
    first_instruction[f.get()] = static_cast<u32>(instructions.size());
    for (const Instruction& i : f->code) instructions.push_back(&i);
  }
  if (config.cluster.x == 0) config.cluster = kernel.cluster.x ? kernel.cluster : Dim3{1, 1, 1};
  threads_per_cta = static_cast<u32>(config.block.count());
  dynamic_base = (kernel.shared_bytes + 1023) / 1024 * 1024;
  const Dim3 g = config.grid, b = config.block, cl = config.cluster;
  const auto refuse = [&](const std::string& why) {
    throw Error("launch",
                kernel.name + ", grid " + triple(g) + ", block " + triple(b) + ": " + why);
  };
  if (g.count() == 0 || b.count() == 0) refuse("an extent is 0");
  if (g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) refuse("the grid is too large");
  if (b.count() > 1024 || b.x > 1024 || b.y > 1024 || b.z > 64) refuse("the block is too large");
  if (g.x % cl.x || g.y % cl.y || g.z % cl.z || cl.count() > 16)
    refuse("the grid is no multiple of the cluster " + triple(cl));
  if (kernel.required_block.x && kernel.required_block.count() != b.count())
    refuse("the kernel requires a block of " + triple(kernel.required_block));
  if (kernel.max_block.x && b.count() > kernel.max_block.count())
    refuse("the kernel allows a block of at most " + triple(kernel.max_block));
  if (kernel.shared_bytes + config.dynamic_shared > kMaxSharedBytes)
    refuse("more than " + std::to_string(kMaxSharedBytes) + " bytes of shared memory");
  const u32 cluster_threads = threads_per_cta * static_cast<u32>(cl.count());
  const u32 warps = (threads_per_cta + kWarpSize - 1) / kWarpSize * static_cast<u32>(cl.count());
  agents = lay_out(module, cluster_threads, warps);
}

std::unique_ptr<Cluster> Machine::make_cluster(u32 linear) {
  auto made = std::make_unique<Cluster>();
  Cluster& cluster = *made;
  cluster.linear = linear;
  const u32 threads = agents.threads;
  const bool proxy = agents.count > agents.wgmma || agents.wgmma > agents.bulk;
  cluster.clocks = std::make_unique<Clocks>(linear, threads, agents.count, proxy);
  cluster.arrived_phase.resize(threads);
  cluster.transfer_epochs.resize(AgentLayout::kTransfers);
  cluster.live_threads = threads;
  const Dim3 g = config.grid, c = config.cluster;
  const Dim3 at = unlinear(linear, {g.x / c.x, g.y / c.y, g.z / c.z});
  for (u32 rank = 0; rank < c.count(); ++rank) {
    auto cta = std::make_unique<Cta>();
    const Dim3 inside = unlinear(rank, c);
    cta->cluster = &cluster;
    cta->rank = rank;
    cta->index = {at.x * c.x + inside.x, at.y * c.y + inside.y, at.z * c.z + inside.z};
    cta->linear = (u64{cta->index.z} * g.y + cta->index.y) * g.x + cta->index.x;
    cta->first_thread = rank * threads_per_cta;
    cta->live_threads = threads_per_cta;
    cta->shared.assign(
        config.dynamic_shared ? dynamic_base + config.dynamic_shared : kernel.shared_bytes, 0xff);
    cta->shadow = std::make_unique<Shadow>(false, true, agents.count);
    cta->shadow->resize(cta->shared.size());
    for (u32 w = 0; w * kWarpSize < threads_per_cta; ++w) make_warp(*cta, w);
    stats.ctas++;
    cluster.ctas.push_back(std::move(cta));
  }
  return made;
}

void Machine::make_warp(Cta& cta, u32 index) {
  auto made = std::make_unique<Warp>();
  Warp& warp = *made;
  warp.cta = &cta;
  warp.index = index;
  const u32 left = threads_per_cta - index * kWarpSize;
  warp.live = left >= kWarpSize ? kAllLanes : (1u << left) - 1;
  auto frame = std::make_unique<Frame>();
  frame->function = &kernel;
  frame->registers.assign(std::size_t{kernel.registers} * kWarpSize, 0xdeadbeefdeadbeefull);
  frame->parameters.resize(std::size_t{kernel.parameter_area} * kWarpSize);
  frame->lanes = warp.live;
  frame->in_flight.resize(kernel.registers);
  frame->unfenced.resize(kernel.registers);
  for (const auto& [symbol, offset] : kernel.local_symbols)
    std::fill_n(&frame->registers[std::size_t{symbol} * kWarpSize], kWarpSize, u64{offset});
  for (int l = 0; l < kWarpSize; ++l) {
    warp.frame[l] = frame.get();
    warp.local[l].assign(kernel.local_bytes, 0xff);
  }
  warp.frames.push_back(std::move(frame));

  warp.specials.resize(static_cast<std::size_t>(Special::kCount) * kWarpSize);
  const auto row = [&](Special which) {
    return &warp.specials[static_cast<std::size_t>(which) * kWarpSize];
  };
  const auto fill = [&](Special which, u64 value) { std::fill_n(row(which), kWarpSize, value); };
  const auto fill3 = [&](Special x, const Dim3& d) {
    const u32 first = static_cast<u32>(x);
    fill(x, d.x);
    fill(static_cast<Special>(first + 1), d.y);
    fill(static_cast<Special>(first + 2), d.z);
  };
  const Dim3 g = config.grid, b = config.block, c = config.cluster, at = cta.index;
  for (u32 l = 0; l < kWarpSize; ++l) {
    const u32 thread = index * kWarpSize + l;
    row(Special::kTidX)[l] = thread % b.x;
    row(Special::kTidY)[l] = thread / b.x % b.y;
    row(Special::kTidZ)[l] = thread / b.x / b.y;
    row(Special::kLaneid)[l] = l;
    row(Special::kLanemaskEq)[l] = 1u << l;
    row(Special::kLanemaskLt)[l] = (1u << l) - 1;
    row(Special::kLanemaskLe)[l] = ((1u << l) - 1) | 1u << l;
    row(Special::kLanemaskGt)[l] = ~(((1u << l) - 1) | 1u << l);
    row(Special::kLanemaskGe)[l] = ~((1u << l) - 1);
  }
  fill3(Special::kNtidX, b);
  fill3(Special::kCtaidX, at);
  fill3(Special::kNctaidX, g);
  fill(Special::kWarpid, index);
  fill(Special::kNwarpid, (threads_per_cta + kWarpSize - 1) / kWarpSize);
  fill(Special::kSmid, cta.linear % 4);
  fill(Special::kNsmid, 4);
  fill3(Special::kClusteridX, {at.x / c.x, at.y / c.y, at.z / c.z});
  fill3(Special::kNclusteridX, {g.x / c.x, g.y / c.y, g.z / c.z});
  fill3(Special::kClusterCtaidX, {at.x % c.x, at.y % c.y, at.z % c.z});
  fill3(Special::kClusterNctaidX, c);
  fill(Special::kClusterCtarank, cta.rank);
  fill(Special::kClusterNctarank, c.count());
  fill(Special::kDynamicSmemSize, config.dynamic_shared);
  fill(Special::kTotalSmemSize, cta.shared.size());
  fill(Special::kDynamicSharedBase, dynamic_base);
  cta.warps.push_back(std::move(made));
}

void Machine::notice(const std::string& text) {
  if (std::find(stats.notices.begin(), stats.notices.end(), text) == stats.notices.end())
    stats.notices.push_back(text);
}

std::string Machine::place(const Cluster& cluster, u32 agent) const {
  const auto thread = [&](u32 t) {
    const Cta& cta = *cluster.ctas[t / threads_per_cta];
    return "thread " + triple(unlinear(t % threads_per_cta, config.block)) + " of CTA " +
           triple(cta.index);
  };
  if (agent < agents.threads) return thread(agent);
  if (agent < agents.bulk) return "a cp.async copy of " + thread(agent - agents.async);
  if (agent < agents.wgmma) return "a bulk copy of " + thread(agent - agents.bulk);
  if (agent < agents.transfers) {
    const u32 warps = (threads_per_cta + kWarpSize - 1) / kWarpSize;
    const u32 warp = agent - agents.wgmma;
    return "wgmma of warp " + std::to_string(warp % warps) + " of CTA " +
           triple(cluster.ctas[warp / warps]->index);
  }
  return "a bulk copy to shared memory";
}

std::string Machine::place(const Warp& warp, u32 lane, const Instruction& i) const {
  const std::string source = module.source(i.location);
  return readable(kernel.name) + ", " +
         place(*warp.cta->cluster, warp.cta->first_thread + warp.index * kWarpSize + lane) +
         ", PTX line " + std::to_string(i.ptx_line) + " `" + i.short_text() + "`" +
         (source.empty() ? "" : " (" + source + ")");
}

}  // namespace ptxemu
