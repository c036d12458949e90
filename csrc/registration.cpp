// SPDX-License-Identifier: Apache-2.0
// Every schema of the package, one a line (those that two modules serve are in schemas.h). Loading
// the library registers them.
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "schemas.h"

using torch::stable::Tensor;

namespace sparse_attn::ops {

using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> attention_cpu(const Tensor, const Tensor, const Tensor, const Tensor,
                                         const Tensor, const Tensor, const OptionalTensor,
                                         const OptionalTensor, const Tensor, const Tensor,
                                         const OptionalTensor, int64_t, int64_t,
                                         const OptionalTensor, int64_t, bool, double, double,
                                         const OptionalTensor, const OptionalTensor);
std::tuple<Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor, const Tensor, const Tensor, const Tensor, const Tensor, const Tensor,
    const Tensor, const Tensor, const Tensor, const OptionalTensor, const OptionalTensor,
    const Tensor, const Tensor, const OptionalTensor, int64_t, int64_t, const OptionalTensor,
    int64_t, bool, double, double);
void check_index_cpu(const Tensor, const Tensor, const Tensor, const OptionalTensor,
                     const OptionalTensor, const Tensor, const Tensor, const OptionalTensor,
                     int64_t, int64_t, int64_t, int64_t);
std::tuple<Tensor, Tensor, Tensor, Tensor> adaptive_lists_cpu(const Tensor, const Tensor, double,
                                                              double, int64_t, int64_t, int64_t,
                                                              int64_t, bool, double);
std::tuple<Tensor, Tensor> window_scores_cpu(const Tensor, const Tensor, int64_t, int64_t, int64_t,
                                             bool, double, bool);
Tensor top_k_cpu(const Tensor, int64_t);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> vertical_slash_lists_cpu(
    const Tensor, const Tensor, int64_t, int64_t, int64_t, bool, int64_t, int64_t, int64_t, bool);
std::tuple<Tensor, Tensor> hip_tree_cpu(const Tensor, const Tensor, int64_t, double, int64_t,
                                        int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                                        int64_t, bool);
std::tuple<Tensor, Tensor> hip_stage_cpu(const Tensor, const Tensor, int64_t, double, int64_t,
                                         int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                                         int64_t, const OptionalTensor, const OptionalTensor,
                                         int64_t);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> leaf_lists_cpu(const Tensor,
                                                                          const Tensor, int64_t,
                                                                          int64_t, int64_t, int64_t,
                                                                          int64_t, int64_t, int64_t,
                                                                          int64_t);
Tensor pool_blocks_cpu(const Tensor, int64_t, std::string);
Tensor block_top_k_cpu(const Tensor, const Tensor, int64_t, int64_t, int64_t, int64_t, int64_t,
                       bool, int64_t, int64_t);
Tensor block_top_p_cpu(const Tensor, double, bool, bool, int64_t, int64_t, int64_t, int64_t,
                       int64_t, bool, int64_t, int64_t);
Tensor block_threshold_cpu(const Tensor, double, int64_t, int64_t, int64_t, int64_t, int64_t, bool,
                           int64_t, int64_t);
std::tuple<Tensor, Tensor> list_blocks_cpu(const Tensor, int64_t);
Tensor cell_block_sums_cpu(const Tensor, const Tensor, int64_t, int64_t, double);
std::tuple<Tensor, Tensor, Tensor, Tensor> anchor_lists_cpu(const Tensor, const Tensor, int64_t,
                                                            int64_t, int64_t, double, int64_t, bool,
                                                            double, int64_t);
std::tuple<Tensor, Tensor> nearest_centroids_cpu(const Tensor, const Tensor, const OptionalTensor,
                                                 const OptionalTensor, const OptionalTensor);
std::tuple<Tensor, Tensor> cluster_members_cpu(const Tensor, int64_t);
Tensor cluster_means_cpu(const Tensor, const OptionalTensor, const Tensor, const Tensor);
Tensor centroid_scores_cpu(const Tensor, const Tensor, const Tensor, const OptionalTensor,
                           const OptionalTensor, int64_t, double, bool);
std::tuple<Tensor, Tensor, Tensor> centroid_lists_cpu(const Tensor, const Tensor, const Tensor,
                                                      double, int64_t);
std::tuple<Tensor, Tensor, Tensor, Tensor> centroid_lookup_cpu(
    const Tensor, const Tensor, const Tensor, const Tensor, const Tensor, const OptionalTensor,
    const OptionalTensor, const OptionalTensor, int64_t, double, bool, double, int64_t, double);
std::string cpu_capability();

}  // namespace sparse_attn::ops

#define HIP_ARGS                                                                          \
  "Tensor q, Tensor k, SymInt q_offset, float softmax_scale, int block_m, int stride_q, " \
  "int lists, int sink, int window"
#define GRID_ARGS                                                                                \
  "SymInt first_tile, SymInt seqlen_q, int block_m, int block_n, SymInt q_offset, bool causal, " \
  "int sink_blocks, int local_blocks"

// clang-format off
STABLE_TORCH_LIBRARY(sparse_attn, m) {
  m.def(ATTENTION_SCHEMA);
  m.def("attention_backward(Tensor grad_out, Tensor delta, Tensor lse, Tensor q, Tensor k, Tensor v, " INDEX_ARGS ", " CALL_ARGS ") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def("adaptive_lists(Tensor q, Tensor k, float mass, float guard, int block_m, int sink, int window, SymInt q_offset, bool causal, float softmax_scale) -> (Tensor block_counts, Tensor block_indices, Tensor column_counts, Tensor column_indices)");
  m.def("check_index(" INDEX_ARGS ", int seqlen_q, int seqlen_k) -> ()");
  m.def("window_scores(Tensor q, Tensor k, SymInt last_q, SymInt num_distances, SymInt q_offset, bool causal, float softmax_scale, bool maximum) -> (Tensor columns, Tensor diagonals)");
  m.def("top_k(Tensor scores, SymInt k) -> Tensor");
  m.def("vertical_slash_lists(Tensor verticals, Tensor slashes, SymInt seqlen_q, SymInt seqlen_k, SymInt q_offset, bool causal, int block_m, int block_n, SymInt chunk, bool exact) -> (Tensor block_counts, Tensor block_indices, Tensor column_counts, Tensor column_indices, Tensor block_bits_ids, Tensor block_bits)");
  m.def("hip_tree(" HIP_ARGS ", int groups, int leaf, int stride_k, bool center) -> (Tensor starts, Tensor counts)");
  m.def("hip_stage(" HIP_ARGS ", int chunk, int keep, int overlap, Tensor? parents, Tensor? parent_counts, int parent_chunk) -> (Tensor starts, Tensor counts)");
  m.def("leaf_lists(Tensor starts, Tensor counts, SymInt seqlen_q, SymInt seqlen_k, SymInt q_offset, int block_m, int block_n, int leaf, int sink, int window) -> (Tensor block_counts, Tensor block_indices, Tensor mask_ids, Tensor masks, Tensor column_counts, Tensor column_indices)");
  m.def("pool_blocks(Tensor x, int block, str kind) -> Tensor");
  m.def("block_top_k(Tensor scores, Tensor budget, " GRID_ARGS ") -> Tensor");
  m.def("block_top_p(Tensor scores, float share, bool logits, bool whole, " GRID_ARGS ") -> Tensor");
  m.def("block_threshold(Tensor scores, float threshold, " GRID_ARGS ") -> Tensor");
  m.def("list_blocks(Tensor mask, int block_n) -> (Tensor counts, Tensor indices)");
  m.def("cell_block_sums(Tensor cells, Tensor limits, int tile_cells, int block_cells, float scale) -> Tensor");
  m.def("anchor_lists(Tensor q, Tensor k, int block, int step, int sink, float theta, SymInt q_offset, bool causal, float softmax_scale, int block_n) -> (Tensor block_counts, Tensor block_indices, Tensor column_counts, Tensor column_indices)");
  m.def("nearest_centroids(Tensor keys, Tensor centroids, Tensor? labels, Tensor? scores, Tensor? changed) -> (Tensor labels, Tensor scores)");
  m.def("cluster_members(Tensor labels, SymInt clusters) -> (Tensor indptr, Tensor members)");
  m.def("cluster_means(Tensor keys, Tensor? weights, Tensor indptr, Tensor members) -> Tensor");
  m.def("centroid_scores(Tensor q, Tensor centroids, Tensor counts, Tensor? parents, Tensor? kept, SymInt tile_rows, float softmax_scale, bool reduce_max) -> Tensor");
  m.def("centroid_lists(Tensor scores, Tensor indptr, Tensor members, float threshold, int budget) -> (Tensor keep, Tensor counts, Tensor indices)");
  m.def("centroid_lookup(Tensor q, Tensor centroids, Tensor counts, Tensor indptr, Tensor members, Tensor? parents, Tensor? coarse_centroids, Tensor? coarse_counts, SymInt tile_rows, float softmax_scale, bool reduce_max, float threshold, int budget, float coarse_threshold) -> (Tensor keep, Tensor counts, Tensor list_indptr, Tensor indices)");
  m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
  m.impl("attention", TORCH_BOX(&sparse_attn::ops::attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&sparse_attn::ops::attention_backward_cpu));
  m.impl("adaptive_lists", TORCH_BOX(&sparse_attn::ops::adaptive_lists_cpu));
  m.impl("check_index", TORCH_BOX(&sparse_attn::ops::check_index_cpu));
  m.impl("window_scores", TORCH_BOX(&sparse_attn::ops::window_scores_cpu));
  m.impl("top_k", TORCH_BOX(&sparse_attn::ops::top_k_cpu));
  m.impl("anchor_lists", TORCH_BOX(&sparse_attn::ops::anchor_lists_cpu));
  m.impl("vertical_slash_lists", TORCH_BOX(&sparse_attn::ops::vertical_slash_lists_cpu));
  m.impl("hip_tree", TORCH_BOX(&sparse_attn::ops::hip_tree_cpu));
  m.impl("hip_stage", TORCH_BOX(&sparse_attn::ops::hip_stage_cpu));
  m.impl("leaf_lists", TORCH_BOX(&sparse_attn::ops::leaf_lists_cpu));
  m.impl("pool_blocks", TORCH_BOX(&sparse_attn::ops::pool_blocks_cpu));
  m.impl("block_top_k", TORCH_BOX(&sparse_attn::ops::block_top_k_cpu));
  m.impl("block_top_p", TORCH_BOX(&sparse_attn::ops::block_top_p_cpu));
  m.impl("block_threshold", TORCH_BOX(&sparse_attn::ops::block_threshold_cpu));
  m.impl("list_blocks", TORCH_BOX(&sparse_attn::ops::list_blocks_cpu));
  m.impl("cell_block_sums", TORCH_BOX(&sparse_attn::ops::cell_block_sums_cpu));
  m.impl("nearest_centroids", TORCH_BOX(&sparse_attn::ops::nearest_centroids_cpu));
  m.impl("cluster_members", TORCH_BOX(&sparse_attn::ops::cluster_members_cpu));
  m.impl("cluster_means", TORCH_BOX(&sparse_attn::ops::cluster_means_cpu));
  m.impl("centroid_scores", TORCH_BOX(&sparse_attn::ops::centroid_scores_cpu));
  m.impl("centroid_lists", TORCH_BOX(&sparse_attn::ops::centroid_lists_cpu));
  m.impl("centroid_lookup", TORCH_BOX(&sparse_attn::ops::centroid_lookup_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&sparse_attn::ops::cpu_capability));
}
// clang-format on
