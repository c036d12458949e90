// SPDX-License-Identifier: Apache-2.0
// wgmma (PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions"; layouts
// from "Matrix descriptor format" and "Shared memory matrix layout").
//
// Each of the four warps computes its 16 rows when it executes the instruction. Until wait_group
// its accumulators are in flight and may not be touched, and its reads of shared memory count as
// reads of an agent of its own, so that refilling the operands too early is a race. The rounding
// model is that of mma.cpp.
#include <algorithm>
#include <vector>

#include "decode.h"
#include "mma_model.h"
#include "wgmma_registers.h"

namespace ptxemu {
namespace {

/// n[0]: N; n[1]: Format; n[4]: d is f16; n[5]: a is in registers
struct Descriptor {
  u32 start, leading, stride;  // bytes
  u32 layout;                  // 0: none, 1: 128-, 2: 64-, 3: 32-byte swizzle
  explicit Descriptor(u64 bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        layout(static_cast<u32>(bits >> 62)) {}

  u32 span() const { return layout == 0 ? 16 : 256u >> layout; }  // bytes of a swizzled row
  u32 swizzled(u32 address) const {
    const u32 mask = layout == 0 ? 0 : (8u >> (layout - 1)) - 1;
    return address ^ (address >> 7 & mask) << 4;
  }
  /// Address of the 16-byte chunk `chunk` along K of row `row` (K-major).
  u32 k_major(u32 row, u32 chunk) const {
    if (layout == 0) return start + row / 8 * stride + chunk * leading + row % 8 * 16;
    return swizzled(start + row / 8 * stride + row % 8 * span() + chunk * 16);
  }
  /// Address of the 16-byte chunk `chunk` along M or N of column `k` (MN-major).
  u32 mn_major(u32 chunk, u32 k) const {
    if (layout == 0) return start + chunk * stride + k / 8 * leading + k % 8 * 16;
    const u32 chunks = span() / 16;
    return swizzled(start + chunk % chunks * 16 + chunk / chunks * leading + k / 8 * stride +
                    k % 8 * span());
  }
};

u32 wgmma_agent(const Step& s) {
  const u32 warps = (s.machine.threads_per_cta + kWarpSize - 1) / kWarpSize;
  return s.machine.agents.wgmma + s.cta.rank * warps + s.warp.index;
}

class Operands {
 public:
  Operands(Step& s, u32 k, Format format) : s_(s), k_(k), format_(format) {
    bytes_ = format == Format::kTf32 ? 4 : 2;
    actor_ = s.actor(0);
    actor_.agent = wgmma_agent(s);
    actor_.clock = s.warp.wgmma_epoch;
    actor_.async_proxy = true;
  }

  /// Rows [first, first + rows) of a matrix in shared memory as [rows][k].
  std::vector<double> read(u64 bits, bool mn_major, u32 first, u32 rows) {
    const Descriptor descriptor(bits);
    if (bits >> 49 & 7) s_.fail("unsupported", "a matrix descriptor with a base offset", 0);
    std::vector<double> matrix(std::size_t{rows} * k_);
    const u32 per_chunk = 16 / bytes_;
    if (!mn_major) {
      for (u32 r = 0; r < rows; ++r)
        for (u32 c = 0; c < k_ / per_chunk; ++c)
          read_chunk(descriptor.k_major(first + r, c), &matrix[r * k_ + c * per_chunk], 1);
    } else {
      for (u32 k = 0; k < k_; ++k)
        for (u32 c = 0; c < rows / per_chunk; ++c)
          read_chunk(descriptor.mn_major(first / per_chunk + c, k),
                     &matrix[std::size_t{c} * per_chunk * k_ + k], k_);
    }
    return matrix;
  }

  /// A fragment in registers: as the a operand of mma.sync.m16n8k16 (or k8 in tf32).
  std::vector<double> read_registers(const Operand& operand) {
    std::vector<double> matrix(std::size_t{16} * k_);
    const int per_register = format_ == Format::kTf32 ? 1 : 2;
    for (std::size_t r = 0; r < operand.elements.size(); ++r) {
      const u64* row = s_.in(operand.elements[r]);
      for (int l = 0; l < kWarpSize; ++l)
        for (int e = 0; e < per_register; ++e)
          matrix[(l / 4 + 8 * (r % 2)) * k_ + (l % 4) * per_register + e +
                 4 * per_register * (r / 2)] = read_element(row[l], e, format_);
    }
    return matrix;
  }

 private:
  void read_chunk(u32 address, double* target, std::size_t step) {
    const Step::Place place = s_.shared(address, 16, false, 0, 16);
    s_.record(place, 16, actor_, false, 0);
    for (u32 e = 0; e < 16 / bytes_; ++e) {
      u64 bits = 0;
      std::memcpy(&bits, place.data + e * bytes_, bytes_);
      target[e * step] = read_element(bits, 0, format_);
    }
  }

  Step& s_;
  u32 k_;
  Format format_;
  u32 bytes_ = 2;
  Actor actor_;
};

double accumulator(Step& s, const Instruction& i, u32 row, u32 column) {
  const auto& d = i.operands[0].elements;
  const u32 lane = row % 8 * 4 + column % 8 / 2;
  if (i.n[4])
    return read_element(s.in(d[column / 8 * 2 + row / 8])[lane], column % 2, Format::kF16);
  return from_bits<float>(s.in(d[column / 8 * 4 + row / 8 * 2 + column % 2])[lane]);
}

void write_accumulators(Step& s, const std::vector<double>& sums, u32 n) {
  const Instruction& i = s.instruction;
  const auto& d = i.operands[0].elements;
  for (u32 row = 0; row < 16; ++row) {
    for (u32 column = 0; column < n; ++column) {
      const u32 lane = row % 8 * 4 + column % 8 / 2;
      const double sum = sums[row * n + column];
      if (!i.n[4]) {
        s.out(d[column / 8 * 4 + row / 8 * 2 + column % 2])[lane] = round_to_float(sum);
        continue;
      }
      u64& pair = s.out(d[column / 8 * 2 + row / 8])[lane];
      const int shift = 16 * (column % 2);
      pair = (pair & ~(u64{0xffff} << shift)) | u64{round_to_half(sum)} << shift;
    }
  }
}

// wgmma.mma_async d, a, b, scale-d, scale-a, scale-b [, transpose-a] [, transpose-b]
void multiply(Step& s) {
  if (!s.converge_full()) return;
  const Instruction& i = s.instruction;
  const Format format = static_cast<Format>(i.n[1]);
  const u32 n = static_cast<u32>(i.n[0]), k = format == Format::kTf32 ? 8 : 16;
  check_fenced(s, i.operands[0]);
  if (i.n[5]) check_fenced(s, i.operands[1]);

  // with a in registers there is no transpose-a; tf32 has neither
  const auto transposed = [&](std::size_t operand) {
    return operand < i.operands.size() && s.in(operand)[0] != 0;
  };
  const bool mn_major_a = i.n[5] == 0 && transposed(6), mn_major_b = transposed(i.n[5] ? 6 : 7);
  Operands operands(s, k, format);
  const std::vector<double> a =
      i.n[5] ? operands.read_registers(i.operands[1])
             : operands.read(s.in(1)[0], mn_major_a, s.warp.index % 4 * 16, 16);
  const std::vector<double> b = operands.read(s.in(2)[0], mn_major_b, 0, n);
  const double scale = static_cast<double>(static_cast<i32>(s.in(4)[0])) *
                       static_cast<double>(static_cast<i32>(s.in(5)[0]));
  const bool accumulate = s.predicate(i.operands[3], 0);
  std::vector<double> sums(std::size_t{16} * n);
  for (u32 row = 0; row < 16; ++row) {
    for (u32 column = 0; column < n; ++column) {
      double sum = 0;
      for (u32 kk = 0; kk < k; ++kk) sum += a[row * k + kk] * b[column * k + kk];
      sums[row * n + column] = scale * sum + (accumulate ? accumulator(s, i, row, column) : 0);
    }
  }
  write_accumulators(s, sums, n);
  put_in_flight(s, i.operands[0]);
}

void fence(Step& s) {
  if (!s.converge_all()) return;
  std::fill(s.frame.unfenced.begin(), s.frame.unfenced.end(), false);
}

void commit_group(Step& s) {
  if (!s.converge_all()) return;
  s.warp.wgmma_groups.push_back(std::move(s.warp.wgmma_open));
  s.warp.wgmma_open.clear();
  s.warp.wgmma_epoch++;
}

void wait_group(Step& s) {
  if (!s.converge_all()) return;
  const u64 keep = s.in(std::size_t{0})[s.first_lane()];
  while (s.warp.wgmma_groups.size() > keep) s.warp.wgmma_groups.pop_front();
  refresh_in_flight(s.warp, s.frame);
  const u32 committed = s.warp.wgmma_epoch - 1;
  if (committed <= keep || !s.machine.options.check_races) return;
  s.each([&](int l) {
    s.clocks().learn(s.thread(l), wgmma_agent(s), committed - static_cast<u32>(keep));
  });
}

}  // namespace

Handler decode_wgmma(Instruction& i, Modifiers& m) {
  const int kind = m.choice({"fence", "commit_group", "wait_group", "mma_async"});
  if (!m.flag("sync") || !m.flag("aligned") || kind < 0) return nullptr;
  if (kind == 0) return fence;
  if (kind == 1) return commit_group;
  if (kind == 2) return wait_group;
  const std::string shape = m.take_if([](const std::string& part) {
    return part.starts_with("m64n") && part.find('k') != std::string::npos;
  });
  const Type d = m.type(), a = m.type(), b = m.type();
  i.type = d;
  if (shape.empty() || a != b || !(d == Type::kF32 || (d == Type::kF16 && a == Type::kF16)))
    return nullptr;
  const std::size_t k_at = shape.find('k');
  i.n[0] = std::stoi(shape.substr(4, k_at - 4));
  const int k = std::stoi(shape.substr(k_at + 1));
  if (a == Type::kF16 || a == Type::kBf16)
    i.n[1] = static_cast<int>(a == Type::kF16 ? Format::kF16 : Format::kBf16);
  else if (a == Type::kTf32)
    i.n[1] = static_cast<int>(Format::kTf32);
  else
    return nullptr;
  if (k != (a == Type::kTf32 ? 8 : 16)) return nullptr;
  if (i.n[0] < 8 || i.n[0] > 256 || i.n[0] % 8 != 0 || i.operands.size() < 6) return nullptr;
  i.n[4] = d == Type::kF16;
  i.n[5] = i.operands[1].kind == OperandKind::kVector;
  if (i.operands[0].elements.size() != static_cast<std::size_t>(i.n[0]) / (i.n[4] ? 4 : 2))
    return nullptr;
  return multiply;
}

}  // namespace ptxemu
