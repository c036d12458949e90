// SPDX-License-Identifier: Apache-2.0
// sparse_attn::hip_tree, hip_stage and leaf_lists on the CPU.
#include "../cpu/hip.h"

#include <cstring>
#include <tuple>

#include "../core/leaf_lists.h"
#include "../cpu/schedule.h"
#include "common.h"

namespace sparse_attn::ops {
namespace {

constexpr int64_t kMaxTokens = (int64_t{1} << 31) - 128;  // as query_key_params
constexpr int64_t kTilesOfTask = 64;

void check_range(const char* op, const char* name, int64_t value, int64_t low, int64_t high) {
  STD_TORCH_CHECK(value >= low && value <= high, "sparse_attn::", op, ": ", name, "=", value,
                  " is not in [", low, ", ", high, "]");
}

AttentionParams search_params(const char* op, const Tensor& q, const Tensor& k,
                              const cpu::HipSearch& s, double softmax_scale) {
  AttentionParams p = query_key_params(q, k);
  p.num_sequences = q.size(0);
  p.softmax_scale = static_cast<float>(softmax_scale);
  check_range(op, "q_offset", s.q_offset, -kMaxTokens, kMaxTokens);
  check_range(op, "block_m", s.block_m, 1, kMaxTokens);
  check_range(op, "stride_q", s.stride_q, 1, kMaxTokens);
  check_range(op, "sink", s.sink, 0, kMaxTokens);
  check_range(op, "window", s.window, 0, kMaxTokens);
  check_range(op, "lists", s.lists, 1, std::max<int64_t>(p.num_heads, 1));
  STD_TORCH_CHECK(p.num_heads % s.lists == 0 &&
                      (s.lists % p.num_heads_kv == 0 || p.num_heads_kv % s.lists == 0),
                  "sparse_attn::", op, ": ", p.num_heads, " query and ", p.num_heads_kv,
                  " KV heads do not divide into ", s.lists, " lists");
  return p;
}

const int32_t* starts_data(const char* op, const Tensor& x, int64_t dim, const char* name) {
  STD_TORCH_CHECK(
      x.is_cpu() && x.scalar_type() == ScalarType::Int && x.dim() == dim && x.is_contiguous(),
      "sparse_attn::", op, ": ", name, " is not a contiguous int32 CPU tensor of ", dim,
      " dimensions");
  return static_cast<const int32_t*>(x.const_data_ptr());
}

struct Choice {
  Tensor starts, counts;
  int32_t* starts_data() { return static_cast<int32_t*>(starts.mutable_data_ptr()); }
  int32_t* counts_data() { return static_cast<int32_t*>(counts.mutable_data_ptr()); }
};

Choice empty_choice(const Tensor& q, const cpu::HipSearch& s, int64_t capacity) {
  const int64_t tiles = (q.size(2) + s.block_m - 1) / s.block_m;
  return {torch::stable::new_empty(q, {q.size(0), s.lists, tiles, capacity}, ScalarType::Int),
          torch::stable::new_empty(q, {q.size(0), s.lists, tiles}, ScalarType::Int)};
}

}  // namespace

std::tuple<Tensor, Tensor> hip_tree_cpu(const Tensor q, const Tensor k, int64_t q_offset,
                                        double softmax_scale, int64_t block_m, int64_t stride_q,
                                        int64_t lists, int64_t sink, int64_t window, int64_t groups,
                                        int64_t leaf, int64_t stride_k, bool center) {
  const cpu::HipSearch search{q_offset, block_m, stride_q, lists, sink, window};
  const AttentionParams p = search_params("hip_tree", q, k, search, softmax_scale);
  check_range("hip_tree", "groups", groups, 1, kMaxTokens);
  check_range("hip_tree", "leaf", leaf, 1, kMaxTokens);
  check_range("hip_tree", "stride_k", stride_k, 1, kMaxTokens);
  Choice choice = empty_choice(q, search, groups);
  cpu::hip_tree(p, search, {groups, leaf, stride_k, center}, choice.starts_data(),
                choice.counts_data(), torch_threads());
  return {choice.starts, choice.counts};
}

std::tuple<Tensor, Tensor> hip_stage_cpu(const Tensor q, const Tensor k, int64_t q_offset,
                                         double softmax_scale, int64_t block_m, int64_t stride_q,
                                         int64_t lists, int64_t sink, int64_t window, int64_t chunk,
                                         int64_t keep, int64_t overlap,
                                         const std::optional<Tensor> parents,
                                         const std::optional<Tensor> parent_counts,
                                         int64_t parent_chunk) {
  const cpu::HipSearch search{q_offset, block_m, stride_q, lists, sink, window};
  const AttentionParams p = search_params("hip_stage", q, k, search, softmax_scale);
  check_range("hip_stage", "chunk", chunk, 1, kMaxTokens);
  STD_TORCH_CHECK((chunk & (chunk - 1)) == 0, "sparse_attn::hip_stage: chunk=", chunk,
                  " is not a power of two");
  check_range("hip_stage", "keep", keep, 1, kMaxTokens);
  check_range("hip_stage", "overlap", overlap, 0, kMaxTokens);
  cpu::HipStage stage{chunk, keep, overlap};
  Choice choice = empty_choice(q, search, keep);
  STD_TORCH_CHECK(parents.has_value() == parent_counts.has_value(),
                  "sparse_attn::hip_stage: parents and parent_counts come together or not at all");
  if (parents.has_value()) {
    check_range("hip_stage", "parent_chunk", parent_chunk, chunk, kMaxTokens);
    stage.parents = starts_data("hip_stage", *parents, 4, "parents");
    stage.parent_counts = starts_data("hip_stage", *parent_counts, 3, "parent_counts");
    for (int64_t d = 0; d < 3; ++d)
      STD_TORCH_CHECK(parents->size(d) == choice.counts.size(d) &&
                          parent_counts->size(d) == choice.counts.size(d),
                      "sparse_attn::hip_stage: parents or parent_counts has ", parents->size(d),
                      " or ", parent_counts->size(d), " entries in dimension ", d, ", expected ",
                      choice.counts.size(d));
    stage.num_parents = parents->size(3);
    stage.parent_chunk = parent_chunk;
  }
  cpu::hip_stage(p, search, stage, choice.starts_data(), choice.counts_data(), torch_threads());
  return {choice.starts, choice.counts};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> leaf_lists_cpu(
    const Tensor starts, const Tensor counts, int64_t seqlen_q, int64_t seqlen_k, int64_t q_offset,
    int64_t block_m, int64_t block_n, int64_t leaf, int64_t sink, int64_t window) {
  constexpr char op[] = "leaf_lists";
  check_range(op, "seqlen_q", seqlen_q, 0, kMaxTokens);
  check_range(op, "seqlen_k", seqlen_k, 0, kMaxTokens);
  check_range(op, "q_offset", q_offset, -kMaxTokens, kMaxTokens);
  check_range(op, "block_m", block_m, 1, int64_t{1} << 20);
  check_range(op, "block_n", block_n, 1, int64_t{1} << 20);
  check_range(op, "leaf", leaf, 1, kMaxTokens);
  check_range(op, "sink", sink, 0, kMaxTokens);
  check_range(op, "window", window, 0, kMaxTokens);
  const LeafShape shape{seqlen_q, seqlen_k, q_offset, block_m, block_n, leaf, sink, window};
  const int64_t tiles = shape.tiles();
  const int32_t* leaves = starts_data(op, starts, 4, "starts");
  const int32_t* leaf_counts = starts_data(op, counts, 3, "counts");
  const int64_t lists = starts.size(0) * starts.size(1), capacity = starts.size(3);
  STD_TORCH_CHECK(counts.size(0) == starts.size(0) && counts.size(1) == starts.size(1) &&
                      counts.size(2) == tiles && starts.size(2) == tiles,
                  "sparse_attn::leaf_lists: starts and counts are not [batch, lists, ", tiles,
                  " tiles]");
  Tensor block_counts =
      torch::stable::new_empty(counts, {starts.size(0), starts.size(1), tiles}, ScalarType::Long);
  Tensor column_counts =
      torch::stable::new_empty(counts, {starts.size(0), starts.size(1), tiles}, ScalarType::Long);
  auto* block_count = static_cast<int64_t*>(block_counts.mutable_data_ptr());
  auto* column_count = static_cast<int64_t*>(column_counts.mutable_data_ptr());
  const int64_t bands = (tiles + kTilesOfTask - 1) / kTilesOfTask;
  std::vector<LeafLists> parts(lists * bands);
  cpu::deal(torch_threads(), lists * bands, [&](int64_t part) {
    LeafLists& out = parts[part];
    std::vector<KeyRun> runs;
    const int64_t first = part % bands * kTilesOfTask;
    for (int64_t t = first; t < std::min(first + kTilesOfTask, tiles); ++t) {
      const int64_t at = part / bands * tiles + t;
      const size_t blocks = out.blocks.size(), columns = out.columns.size();
      append_leaf_tile(shape, t, leaves + at * capacity,
                       std::min<int64_t>(leaf_counts[at], capacity), runs, out);
      block_count[at] = static_cast<int64_t>(out.blocks.size() - blocks);
      column_count[at] = static_cast<int64_t>(out.columns.size() - columns);
    }
    return true;
  });
  const auto joined = [&](auto LeafLists::* member, size_t head, ScalarType dtype) {
    size_t total = head;
    for (const LeafLists& part : parts) total += (part.*member).size();
    return torch::stable::new_empty(counts, {static_cast<int64_t>(total)}, dtype);
  };
  const auto copy = [&](auto LeafLists::* member, auto* to) {
    for (const LeafLists& part : parts)
      to = std::copy((part.*member).begin(), (part.*member).end(), to);
  };
  Tensor block_indices = joined(&LeafLists::blocks, 0, ScalarType::Int);
  copy(&LeafLists::blocks, static_cast<int32_t*>(block_indices.mutable_data_ptr()));
  Tensor columns = joined(&LeafLists::columns, 0, ScalarType::Int);
  copy(&LeafLists::columns, static_cast<int32_t*>(columns.mutable_data_ptr()));
  // Own masks of a part are numbered from the end of the shared ones and of the parts before it.
  int64_t before = 0;
  for (LeafLists& part : parts) {
    for (int32_t& id : part.mask_ids)
      if (id >= shape.edge_blocks()) id += static_cast<int32_t>(before);
    before += static_cast<int64_t>(part.masks.size()) / (block_n * shape.words());
  }
  Tensor mask_ids = joined(&LeafLists::mask_ids, 0, ScalarType::Int);
  copy(&LeafLists::mask_ids, static_cast<int32_t*>(mask_ids.mutable_data_ptr()));
  const std::vector<int64_t> shared = shared_masks(shape);
  Tensor masks = joined(&LeafLists::masks, shared.size(), ScalarType::Long);
  auto* mask = static_cast<int64_t*>(masks.mutable_data_ptr());
  copy(&LeafLists::masks, std::copy(shared.begin(), shared.end(), mask));
  return {block_counts, block_indices, mask_ids, masks, column_counts, columns};
}

}  // namespace sparse_attn::ops
