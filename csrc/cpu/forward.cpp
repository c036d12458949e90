// SPDX-License-Identifier: Apache-2.0
// Forward. Long queries run one tile a task over all its keys. Short ones (decode) also split the
// keys, into pieces that depend on the call's sizes alone, never on the number of threads, so that
// results are the same on any number of them; pieces are merged by their log-sum-exp.
#include <cmath>
#include <cstring>
#include <memory>

#include "../core/key_stream.h"
#include "attention.h"
#include "kernels.h"
#include "schedule.h"

namespace sparse_attn::cpu {
namespace {

constexpr int64_t kShortQuery = 16;      // rows up to which keys are split
constexpr int64_t kMinPieceKeys = 1024;  // shorter pieces cost more in merging than they gain
constexpr int64_t kPiecesPerCall = 64;   // enough for the threads of a large machine

// A tile, or a piece of its keys.
struct Task {
  const Unit* unit;
  TileShape shape;
  int64_t key_begin = 0;
  int64_t key_count = INT64_MAX;
  int64_t piece = -1;  // slot of the partial result; -1: the tile is whole
};

// Partial results of split tiles: row r of piece p is at out[(p * kTileRows + r) * head_dim_v].
struct Pieces {
  std::unique_ptr<float[]> out;
  std::unique_ptr<float[]> lse;
};

struct SplitTile {
  const Unit* unit;
  TileShape shape;
  int64_t first_piece;
  int64_t pieces;
};

struct Workspace {
  Tile tile;
  KeyChunk chunks[2];
};

// Kept by each thread from call to call: page faults on a fresh one would cost more than a short
// call's arithmetic.
Workspace& workspace() {
  thread_local std::unique_ptr<Workspace> space;
  if (!space) space.reset(new Workspace);
  return *space;
}

float* lse_pointer(const AttentionParams& p, int64_t batch, int64_t head, int64_t row) {
  return p.lse + (batch * p.num_heads + head) * p.seqlen_q + row;
}

void set_rows(const AttentionParams& p, const Task& task, const Pieces& pieces, Tile& tile) {
  const Sequence& s = p.sequences[task.unit->sequence];
  const int64_t width = element_size(p.dtype);
  tile.dtype = p.dtype;
  tile.out_dtype = task.piece < 0 ? p.dtype : DType::kFloat32;
  tile.rows = task.shape.rows();
  tile.head_dim = p.head_dim;
  tile.head_dim_v = p.head_dim_v;
  tile.softmax_scale = p.softmax_scale;
  tile.softcap = p.softcap;
  tile.has_sink = p.sinks != nullptr && task.piece < 0;  // pieces meet the sink when merged
  for (int r = 0; r < tile.rows; ++r) {
    const int64_t head = task.unit->first_head + r / task.shape.rows_per_head;
    const int64_t row = s.q_start + task.shape.first_row + r % task.shape.rows_per_head;
    tile.q_rows[r] = row_pointer(p.q, s.batch, head, row, width);
    if (tile.has_sink) tile.sink[r] = p.sinks[head];
    if (task.piece < 0) {
      tile.out_rows[r] = const_cast<char*>(row_pointer(p.out, s.batch, head, row, width));
      tile.lse_rows[r] = lse_pointer(p, s.batch, head, row);
    } else {
      const int64_t slot = task.piece * kTileRows + r;
      tile.out_rows[r] = reinterpret_cast<char*>(pieces.out.get() + slot * p.head_dim_v);
      tile.lse_rows[r] = pieces.lse.get() + slot;
    }
  }
}

void run_task(const AttentionParams& p, const Kernels& kernels, const Task& task,
              const Pieces& pieces) {
  Workspace& space = workspace();
  Tile& tile = space.tile;
  set_rows(p, task, pieces, tile);
  const bool by_dim = tile.rows <= kernels.max_dim_rows;
  const auto begin = by_dim ? kernels.dim_begin : kernels.row_begin;
  const auto attend = by_dim ? kernels.dim_attend : kernels.row_attend;
  const auto finish = by_dim ? kernels.dim_finish : kernels.row_finish;

  KeyStream stream = key_stream(p, *task.unit, task.shape);
  stream.restrict_to(task.key_begin, task.key_count);
  begin(tile);
  KeyChunk* chunk = &space.chunks[0];
  KeyChunk* next = &space.chunks[1];
  bool more = stream.next(*chunk);
  while (more) {
    more = stream.next(*next);
    attend(tile, *chunk, more ? next : nullptr);
    std::swap(chunk, next);
  }
  finish(tile);
}

IndexFault run_whole_tiles(const AttentionParams& p, const Kernels& kernels,
                           const Schedule& schedule, const Executor& executor) {
  FaultBox faults;
  const Pieces none;
  deal(executor, schedule.tiles(), [&](int64_t i) {
    const Unit& unit = schedule.unit_of_tile(i);
    // Causal tiles grow with their number: dealing them longest first leaves no long tail.
    const int64_t tile = unit.tiles - 1 - (i - unit.first_tile);
    const Task task{&unit, schedule.shape(unit, tile)};
    if (task.shape.rows_per_head == 0) return true;
    if (const IndexFault fault = check_unit_tile(p, unit, task.shape)) {
      faults.put(fault);
      return false;
    }
    run_task(p, kernels, task, none);
    return faults.empty();
  });
  return faults.take();
}

// Merges the pieces of one row (Rabe & Staats, arXiv 2112.05682) and lets the sink take part.
void merge_row(const AttentionParams& p, const Kernels& kernels, const Pieces& pieces,
               const SplitTile& split, int r, float* sum) {
  const Sequence& s = p.sequences[split.unit->sequence];
  const int64_t head = split.unit->first_head + r / split.shape.rows_per_head;
  const int64_t row = s.q_start + split.shape.first_row + r % split.shape.rows_per_head;
  const auto slot = [&](int64_t i) { return (split.first_piece + i) * kTileRows + r; };
  const float sink = p.sinks != nullptr ? p.sinks[head] : -INFINITY;
  float top = sink;
  for (int64_t i = 0; i < split.pieces; ++i) top = std::max(top, pieces.lse[slot(i)]);
  std::memset(sum, 0, sizeof(float) * p.head_dim_v);
  double weights = top > -INFINITY ? std::exp(double{sink} - top) : 0.0;
  for (int64_t i = 0; i < split.pieces; ++i) {
    const float lse = pieces.lse[slot(i)];
    if (lse == -INFINITY) continue;
    const double weight = std::exp(double{lse} - top);
    weights += weight;
    const float* from = pieces.out.get() + slot(i) * p.head_dim_v;
    for (int d = 0; d < p.head_dim_v; ++d) sum[d] += static_cast<float>(weight) * from[d];
  }
  // A NaN among the pieces makes `weights` one, and so the whole row.
  const float factor = weights == 0.0 ? 0.0f : static_cast<float>(1.0 / weights);
  for (int d = 0; d < p.head_dim_v; ++d) sum[d] *= factor;
  kernels.narrow(sum,
                 const_cast<char*>(row_pointer(p.out, s.batch, head, row, element_size(p.dtype))),
                 p.head_dim_v, p.dtype);
  *lse_pointer(p, s.batch, head, row) =
      weights == 0.0 ? -INFINITY : static_cast<float>(top + std::log(weights));
}

IndexFault run_split_tiles(const AttentionParams& p, const Kernels& kernels,
                           const Schedule& schedule, const Executor& executor) {
  std::vector<SplitTile> tiles;
  std::vector<int64_t> keys;
  int64_t all_keys = 0;
  for (const Unit& unit : schedule.units()) {
    for (int64_t t = 0; t < unit.tiles; ++t) {
      const TileShape shape = schedule.shape(unit, t);
      if (shape.rows_per_head == 0) continue;
      if (const IndexFault fault = check_unit_tile(p, unit, shape)) return fault;
      keys.push_back(key_stream(p, unit, shape).count_keys());
      all_keys += keys.back();
      tiles.push_back({&unit, shape, 0, 1});
    }
  }
  int64_t piece_keys = std::max(kMinPieceKeys, all_keys / kPiecesPerCall);
  piece_keys = (piece_keys + kChunkKeys - 1) / kChunkKeys * kChunkKeys;

  std::vector<Task> tasks;
  std::vector<SplitTile> split_tiles;
  int64_t num_pieces = 0;
  for (size_t i = 0; i < tiles.size(); ++i) {
    SplitTile& tile = tiles[i];
    tile.pieces = std::max<int64_t>(1, (keys[i] + piece_keys - 1) / piece_keys);
    if (tile.pieces == 1) {
      tasks.push_back({tile.unit, tile.shape});
      continue;
    }
    tile.first_piece = num_pieces;
    for (int64_t j = 0; j < tile.pieces; ++j)
      tasks.push_back({tile.unit, tile.shape, j * piece_keys, piece_keys, num_pieces++});
    split_tiles.push_back(tile);
  }
  Pieces pieces;
  if (num_pieces > 0) {
    pieces.out.reset(new float[num_pieces * kTileRows * p.head_dim_v]);
    pieces.lse.reset(new float[num_pieces * kTileRows]);
  }
  deal(executor, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    run_task(p, kernels, tasks[i], pieces);
    return true;
  });
  float sum[kMaxHeadDim];
  for (const SplitTile& tile : split_tiles)
    for (int r = 0; r < tile.shape.rows(); ++r) merge_row(p, kernels, pieces, tile, r, sum);
  return {};
}

}  // namespace

IndexFault attention_forward(const AttentionParams& params, const Executor& executor) {
  if (const IndexFault fault = check_heads(params.index)) return fault;
  const Kernels& table = kernels();
  const Schedule schedule(params);
  int64_t longest = 0;
  for (int64_t s = 0; s < params.num_sequences; ++s)
    longest = std::max(longest, params.sequences[s].q_len);
  return longest <= kShortQuery ? run_split_tiles(params, table, schedule, executor)
                                : run_whole_tiles(params, table, schedule, executor);
}

}  // namespace sparse_attn::cpu
