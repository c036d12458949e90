// SPDX-License-Identifier: Apache-2.0
// Backward. A task is one sequence and one KV head: it runs the tiles of all query heads of the
// group one after the other into float32 accumulators of its own, so that the sum's order, and with
// it the result, never depends on the number of threads.
#include <cstring>
#include <memory>
#include <vector>

#include "../core/key_stream.h"
#include "attention.h"
#include "kernels.h"
#include "schedule.h"

namespace sparse_attn::cpu {
namespace {

struct Workspace {
  BackwardTile tile;
  KeyChunk chunk;
};

void set_rows(const BackwardParams& b, const Unit& unit, const TileShape& shape,
              BackwardTile& tile) {
  const AttentionParams& p = b.forward;
  const Sequence& s = p.sequences[unit.sequence];
  const int64_t width = element_size(p.dtype);
  tile.fwd.dtype = p.dtype;
  tile.fwd.rows = shape.rows();
  tile.fwd.head_dim = p.head_dim;
  tile.fwd.head_dim_v = p.head_dim_v;
  tile.fwd.softmax_scale = p.softmax_scale;
  tile.fwd.softcap = p.softcap;
  for (int r = 0; r < shape.rows(); ++r) {
    const int64_t head = unit.first_head + r / shape.rows_per_head;
    const int64_t row = s.q_start + shape.first_row + r % shape.rows_per_head;
    const int64_t statistic = (s.batch * p.num_heads + head) * p.seqlen_q + row;
    tile.fwd.q_rows[r] = row_pointer(p.q, s.batch, head, row, width);
    tile.grad_out_rows[r] = row_pointer(b.grad_out, s.batch, head, row, width);
    tile.grad_q_rows[r] = const_cast<char*>(row_pointer(b.grad_q, s.batch, head, row, width));
    tile.lse[r] = p.lse[statistic];
    tile.delta[r] = b.delta[statistic];
  }
}

// All tiles of the units [first, last) of one KV head; false stops at a fault.
bool run_kv_head(const BackwardParams& b, const Kernels& kernels, const Schedule& schedule,
                 size_t first, size_t last, FaultBox& faults) {
  const AttentionParams& p = b.forward;
  const Sequence& s = p.sequences[schedule.units()[first].sequence];
  const int64_t head_kv = schedule.units()[first].first_head / (p.num_heads / p.num_heads_kv);
  const int64_t width = element_size(p.dtype);
  const int pitch_k = grad_pitch(p.head_dim), pitch_v = grad_pitch(p.head_dim_v);
  std::vector<float> grad_k(s.k_len * pitch_k), grad_v(s.k_len * pitch_v);
  const auto space = std::make_unique<Workspace>();
  space->tile.grad_k = grad_k.data();
  space->tile.grad_v = grad_v.data();
  for (size_t u = first; u < last; ++u) {
    const Unit& unit = schedule.units()[u];
    for (int64_t t = 0; t < unit.tiles; ++t) {
      const TileShape shape = schedule.shape(unit, t);
      if (shape.rows_per_head == 0) continue;
      if (const IndexFault fault = check_unit_tile(p, unit, shape)) {
        faults.put(fault);
        return false;
      }
      set_rows(b, unit, shape, space->tile);
      KeyStream stream = key_stream(p, unit, shape);
      kernels.backward_begin(space->tile);
      while (stream.next(space->chunk)) kernels.backward_attend(space->tile, space->chunk);
      kernels.backward_finish(space->tile);
    }
  }
  const auto write = [&](const TensorView& to, const float* from, int pitch, int dim) {
    for (int64_t key = 0; key < s.k_len; ++key)
      kernels.narrow(from + key * pitch,
                     const_cast<char*>(row_pointer(to, s.batch, head_kv, s.k_start + key, width)),
                     dim, p.dtype);
  };
  write(b.grad_k, grad_k.data(), pitch_k, p.head_dim);
  write(b.grad_v, grad_v.data(), pitch_v, p.head_dim_v);
  return true;
}

}  // namespace

IndexFault attention_backward(const BackwardParams& params, const Executor& executor) {
  const AttentionParams& p = params.forward;
  if (const IndexFault fault = check_heads(p.index)) return fault;
  const Kernels& table = kernels();
  const Schedule schedule(p);
  // Units of one (sequence, KV head) are neighbours.
  const int64_t group = p.num_heads / p.num_heads_kv;
  std::vector<size_t> starts;
  for (size_t u = 0; u < schedule.units().size(); ++u)
    if (schedule.units()[u].first_head % group == 0) starts.push_back(u);
  starts.push_back(schedule.units().size());

  FaultBox faults;
  deal(executor, static_cast<int64_t>(starts.size()) - 1, [&](int64_t i) {
    return faults.empty() && run_kv_head(params, table, schedule, starts[i], starts[i + 1], faults);
  });
  return faults.take();
}

}  // namespace sparse_attn::cpu
