// SPDX-License-Identifier: Apache-2.0
// Backward. The tiles of one sequence and KV head, of all query heads of the group, are cut into
// parts of about equal work; a part is a task with float32 accumulators of its own for dK and dV,
// and whoever finishes the last part of a KV head adds them up, part by part. The cut depends on
// the call alone, so the sum's order, and with it the result, never depends on the number of
// threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "../core/key_stream.h"
#include "attention.h"
#include "kernels.h"
#include "schedule.h"

namespace sparse_attn::cpu {
namespace {

constexpr int64_t kTasksPerCall = 16;  // enough for a few threads to end together
constexpr int64_t kMaxParts = 4;       // of a KV head; each costs accumulators of all its keys
constexpr int64_t kMinPartTiles = 16;  // fewer would cost more in adding up than they gain
constexpr int64_t kMaxPartBytes = 64 << 20;  // of a part's accumulators, where there are several

struct Workspace {
  BackwardTile tile;
  KeyChunk chunks[2];
};

struct BackwardTask {
  size_t first_unit, last_unit;   // units of the KV head
  int64_t first_tile, last_tile;  // counted through these units
  int64_t part, parts;
  size_t first_task;  // of the KV head
};

// A task's dK and dV, [keys, pitch]; only the keys that its rows may see.
struct Accumulators {
  std::unique_ptr<float[]> grad_k, grad_v;
  int64_t keys = 0;
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

// Keys that rows below `last_row` of a sequence may see.
int64_t visible_keys(const AttentionParams& p, const Sequence& s, int64_t last_row) {
  return p.causal ? std::clamp<int64_t>(last_row + s.q_offset, 0, s.k_len) : s.k_len;
}

void run_tile(const BackwardParams& b, const Kernels& kernels, const Unit& unit,
              const TileShape& shape, Workspace& space) {
  set_rows(b, unit, shape, space.tile);
  KeyStream stream = key_stream(b.forward, unit, shape);
  kernels.backward_begin(space.tile);
  KeyChunk* chunk = &space.chunks[0];
  KeyChunk* next = &space.chunks[1];
  bool more = stream.next(*chunk);
  while (more) {
    more = stream.next(*next);
    kernels.backward_attend(space.tile, *chunk, more ? next : nullptr);
    std::swap(chunk, next);
  }
  kernels.backward_finish(space.tile);
}

// The tiles of one task; false stops at a fault.
bool run_part(const BackwardParams& b, const Kernels& kernels, const Schedule& schedule,
              const BackwardTask& task, Accumulators& sums, FaultBox& faults) {
  const AttentionParams& p = b.forward;
  const auto for_tiles = [&](auto use) {
    int64_t number = 0;
    for (size_t u = task.first_unit; u < task.last_unit; ++u) {
      const Unit& unit = schedule.units()[u];
      for (int64_t t = 0; t < unit.tiles; ++t, ++number) {
        if (number < task.first_tile || number >= task.last_tile) continue;
        const TileShape shape = schedule.shape(unit, t);
        if (shape.rows_per_head > 0 && !use(unit, shape)) return false;
      }
    }
    return true;
  };
  const Sequence& s = p.sequences[schedule.units()[task.first_unit].sequence];
  for_tiles([&](const Unit&, const TileShape& shape) {
    sums.keys = std::max(sums.keys, visible_keys(p, s, shape.first_row + shape.rows_per_head));
    return true;
  });
  sums.grad_k.reset(new float[sums.keys * grad_pitch(p.head_dim)]());
  sums.grad_v.reset(new float[sums.keys * grad_pitch(p.head_dim_v)]());
  const auto space = std::make_unique<Workspace>();
  space->tile.grad_k = sums.grad_k.get();
  space->tile.grad_v = sums.grad_v.get();
  return for_tiles([&](const Unit& unit, const TileShape& shape) {
    if (const IndexFault fault = check_unit_tile(p, unit, shape)) {
      faults.put(fault);
      return false;
    }
    run_tile(b, kernels, unit, shape, *space);
    return true;
  });
}

// Writes the sum of a KV head's parts, in their order.
void write_sum(const AttentionParams& p, const Kernels& kernels, const Unit& unit,
               Accumulators* parts, int64_t num_parts, const TensorView& to, int dim,
               std::unique_ptr<float[]> Accumulators::* of) {
  const Sequence& s = p.sequences[unit.sequence];
  const int64_t head_kv = unit.first_head / (p.num_heads / p.num_heads_kv);
  const int64_t width = element_size(p.dtype);
  const int pitch = grad_pitch(dim);
  float sum[kMaxHeadDim];
  for (int64_t key = 0; key < s.k_len; ++key) {
    std::fill(sum, sum + dim, 0.0f);
    const float* row = sum;
    for (int64_t i = 0; i < num_parts; ++i) {
      if (key >= parts[i].keys) continue;
      const float* part = (parts[i].*of).get() + key * pitch;
      if (num_parts == 1) {
        row = part;
      } else {
        for (int d = 0; d < dim; ++d) sum[d] += part[d];
      }
    }
    char* at = const_cast<char*>(row_pointer(to, s.batch, head_kv, s.k_start + key, width));
    kernels.narrow(row, at, dim, p.dtype);
  }
}

// Cuts each (sequence, KV head) into parts: equal numbers of keys under causality, else of tiles.
std::vector<BackwardTask> cut(const AttentionParams& p, const Schedule& schedule) {
  const std::vector<Unit>& units = schedule.units();
  const int64_t group = p.num_heads / p.num_heads_kv;
  std::vector<size_t> starts;  // units of one (sequence, KV head) are neighbours
  for (size_t u = 0; u < units.size(); ++u)
    if (units[u].first_head % group == 0) starts.push_back(u);
  starts.push_back(units.size());
  const int64_t heads = static_cast<int64_t>(starts.size()) - 1;

  std::vector<BackwardTask> tasks;
  for (int64_t h = 0; h < heads; ++h) {
    const size_t first = starts[h], last = starts[h + 1];
    const Sequence& s = p.sequences[units[first].sequence];
    std::vector<int64_t> work{0};  // before each tile, in visible keys
    for (size_t u = first; u < last; ++u) {
      for (int64_t t = 0; t < units[u].tiles; ++t) {
        const TileShape shape = schedule.shape(units[u], t);
        work.push_back(work.back() + visible_keys(p, s, shape.first_row + shape.rows_per_head));
      }
    }
    const int64_t tiles = static_cast<int64_t>(work.size()) - 1;
    const int64_t bytes = s.k_len * 4 * (grad_pitch(p.head_dim) + grad_pitch(p.head_dim_v));
    int64_t parts = std::min({kMaxParts, kTasksPerCall / heads, tiles / kMinPartTiles});
    if (bytes > kMaxPartBytes) parts = 1;
    parts = std::max<int64_t>(parts, 1);
    const size_t first_task = tasks.size();
    int64_t begin = 0;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t share = work.back() / parts * (i + 1);
      const int64_t end =
          i + 1 == parts ? tiles
                         : std::upper_bound(work.begin(), work.end(), share) - work.begin() - 1;
      tasks.push_back({first, last, begin, std::max(begin, end), i, parts, first_task});
      begin = std::max(begin, end);
    }
  }
  return tasks;
}

}  // namespace

IndexFault attention_backward(const BackwardParams& params, const Executor& executor) {
  const AttentionParams& p = params.forward;
  if (const IndexFault fault = check_heads(p.index)) return fault;
  const Kernels& table = kernels();
  const Schedule schedule(p);
  const std::vector<BackwardTask> tasks = cut(p, schedule);
  std::vector<Accumulators> sums(tasks.size());
  std::vector<std::atomic<int64_t>> done(tasks.size());  // parts of the KV head of a first task

  FaultBox faults;
  deal(executor, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const BackwardTask& task = tasks[i];
    if (!faults.empty() || !run_part(params, table, schedule, task, sums[i], faults)) return false;
    if (done[task.first_task].fetch_add(1) + 1 < task.parts) return true;
    const Unit& unit = schedule.units()[task.first_unit];
    Accumulators* parts = &sums[task.first_task];
    write_sum(p, table, unit, parts, task.parts, params.grad_k, p.head_dim, &Accumulators::grad_k);
    write_sum(p, table, unit, parts, task.parts, params.grad_v, p.head_dim_v,
              &Accumulators::grad_v);
    std::for_each(parts, parts + task.parts, [](Accumulators& x) { x = {}; });
    return true;
  });
  return faults.take();
}

}  // namespace sparse_attn::cpu
