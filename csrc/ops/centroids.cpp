// SPDX-License-Identifier: Apache-2.0
// sparse_attn::nearest_centroids, cluster_members, cluster_means, centroid_scores, centroid_lists
// and centroid_lookup on the CPU.
#include "../cpu/centroids.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <numeric>
#include <tuple>

#include "common.h"

namespace sparse_attn::ops {
namespace {

// Checks a contiguous CPU tensor and its shape; -1 for any size.
void check_tensor(const char* op, const Tensor& x, const char* name, ScalarType dtype,
                  std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == dtype, "sparse_attn::", op,
                  ": ", name, " is not a contiguous CPU tensor of the right dtype");
  STD_TORCH_CHECK(x.dim() == static_cast<int64_t>(shape.size()), "sparse_attn::", op, ": ", name,
                  " has ", x.dim(), " dimensions, expected ", shape.size());
  int64_t d = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(size < 0 || x.size(d) == size, "sparse_attn::", op, ": ", name, " has size ",
                    x.size(d), " in dimension ", d, ", expected ", size);
    ++d;
  }
}

template <class T>
T* written(Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

cpu::KeysView keys_view(const Tensor& keys) {
  const AttentionParams p = query_key_params(keys, keys);  // the same rules
  return {p.k, p.dtype, keys.size(0), keys.size(1), keys.size(2), p.head_dim};
}

// Ranges of clusters' members: within [0, n] and not descending, for every head.
void check_ranges(const char* op, const Tensor& indptr, int64_t n) {
  const int64_t width = indptr.size(indptr.dim() - 1);
  const auto* at = data<int64_t>(indptr);
  const int64_t heads = width == 0 ? 0 : indptr.numel() / width;
  for (int64_t h = 0; h < heads; ++h, at += width) {
    bool valid = at[0] == 0 && at[width - 1] <= n;
    for (int64_t c = 1; c < width; ++c) valid = valid && at[c] >= at[c - 1];
    STD_TORCH_CHECK(valid, "sparse_attn::", op, ": indptr of head ", h,
                    " does not ascend from 0 to at most ", n);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> nearest_centroids_cpu(const Tensor keys, const Tensor centroids,
                                                 const std::optional<Tensor> labels,
                                                 const std::optional<Tensor> scores,
                                                 const std::optional<Tensor> changed) {
  const char* op = "nearest_centroids";
  cpu::NearestParams p;
  p.keys = keys_view(keys);
  const int64_t batch = p.keys.batch, heads = p.keys.heads, n = p.keys.n;
  check_tensor(op, centroids, "centroids", ScalarType::Float, {batch, heads, -1, p.keys.dim});
  p.clusters = centroids.size(2);
  p.centroids = data<float>(centroids);
  STD_TORCH_CHECK((p.clusters > 0 || n == 0) && p.clusters < INT32_MAX, "sparse_attn::", op, ": ",
                  p.clusters, " centroids for ", n, " keys");
  STD_TORCH_CHECK(
      labels.has_value() == scores.has_value() && labels.has_value() == changed.has_value(),
      "sparse_attn::", op, ": labels, scores and changed come together or not at all");
  Tensor new_labels = torch::stable::new_empty(keys, {batch, heads, n}, ScalarType::Int);
  Tensor new_scores = torch::stable::new_empty(keys, {batch, heads, n}, ScalarType::Float);
  p.labels = written<int32_t>(new_labels);
  p.scores = written<float>(new_scores);
  if (labels.has_value()) {
    check_tensor(op, *labels, "labels", ScalarType::Int, {batch, heads, n});
    check_tensor(op, *scores, "scores", ScalarType::Float, {batch, heads, n});
    check_tensor(op, *changed, "changed", ScalarType::Bool, {batch, heads, p.clusters});
    const int64_t count = batch * heads * n;
    const auto* label = data<int32_t>(*labels);
    for (int64_t i = 0; i < count; ++i)
      STD_TORCH_CHECK(label[i] >= 0 && label[i] < p.clusters, "sparse_attn::", op, ": labels hold ",
                      label[i], ", expected [0, ", p.clusters, ")");
    if (count > 0) {
      std::memcpy(p.labels, label, count * sizeof(int32_t));
      std::memcpy(p.scores, data<float>(*scores), count * sizeof(float));
    }
    p.changed = data<bool>(*changed);
  }
  cpu::nearest_centroids(p, torch_threads());
  return {new_labels, new_scores};
}

std::tuple<Tensor, Tensor> cluster_members_cpu(const Tensor labels, int64_t clusters) {
  const char* op = "cluster_members";
  check_tensor(op, labels, "labels", ScalarType::Int, {-1, -1, -1});
  STD_TORCH_CHECK(clusters >= 0 && clusters < INT32_MAX, "sparse_attn::", op,
                  ": clusters=", clusters, " is out of range");
  const int64_t batch = labels.size(0), heads = labels.size(1), n = labels.size(2);
  Tensor indptr = torch::stable::new_empty(labels, {batch, heads, clusters + 1}, ScalarType::Long);
  Tensor members = torch::stable::new_empty(labels, {batch, heads, n});
  const bool valid =
      cpu::cluster_members(data<int32_t>(labels), batch * heads, n, clusters,
                           written<int64_t>(indptr), written<int32_t>(members), torch_threads());
  STD_TORCH_CHECK(valid, "sparse_attn::", op, ": a label is not in [0, ", clusters, ")");
  return {indptr, members};
}

Tensor cluster_means_cpu(const Tensor keys, const std::optional<Tensor> weights,
                         const Tensor indptr, const Tensor members) {
  const char* op = "cluster_means";
  const cpu::KeysView view = keys_view(keys);
  check_tensor(op, indptr, "indptr", ScalarType::Long, {view.batch, view.heads, -1});
  check_tensor(op, members, "members", ScalarType::Int, {view.batch, view.heads, view.n});
  STD_TORCH_CHECK(indptr.size(2) > 0, "sparse_attn::", op, ": indptr is empty");
  check_ranges(op, indptr, view.n);
  const auto* member = data<int32_t>(members);
  for (int64_t i = 0; i < members.numel(); ++i)
    STD_TORCH_CHECK(member[i] >= 0 && member[i] < view.n, "sparse_attn::", op, ": members hold ",
                    member[i], ", expected [0, ", view.n, ")");
  if (weights.has_value())
    check_tensor(op, *weights, "weights", ScalarType::Float, {view.batch, view.heads, view.n});
  const int64_t clusters = indptr.size(2) - 1;
  Tensor means = torch::stable::new_empty(keys, {view.batch, view.heads, clusters, view.dim},
                                          ScalarType::Float);
  cpu::cluster_means(view, weights.has_value() ? data<float>(*weights) : nullptr,
                     data<int64_t>(indptr), member, clusters, written<float>(means),
                     torch_threads());
  return means;
}

Tensor centroid_scores_cpu(const Tensor q, const Tensor centroids, const Tensor counts,
                           const std::optional<Tensor> parents, const std::optional<Tensor> kept,
                           int64_t tile_rows, double softmax_scale, bool reduce_max) {
  const char* op = "centroid_scores";
  const cpu::KeysView rows = keys_view(q);
  cpu::ShareParams p;
  p.q = rows.keys;
  p.dtype = rows.dtype;
  p.batch = rows.batch;
  p.num_heads = rows.heads;
  p.seqlen_q = rows.n;
  p.dim = rows.dim;
  check_tensor(op, centroids, "centroids", ScalarType::Float, {p.batch, -1, -1, p.dim});
  p.num_heads_kv = centroids.size(1);
  p.clusters = centroids.size(2);
  STD_TORCH_CHECK(p.num_heads_kv > 0 && p.num_heads % p.num_heads_kv == 0 && p.clusters < INT32_MAX,
                  "sparse_attn::", op, ": ", p.num_heads, " query heads do not divide into ",
                  p.num_heads_kv, " KV heads");
  check_tensor(op, counts, "counts", ScalarType::Int, {p.batch, p.num_heads_kv, p.clusters});
  STD_TORCH_CHECK(tile_rows > 0, "sparse_attn::", op, ": tile_rows=", tile_rows,
                  " is not positive");
  p.centroids = data<float>(centroids);
  p.counts = data<int32_t>(counts);
  p.tile_rows = tile_rows;
  p.tiles = (p.seqlen_q + tile_rows - 1) / tile_rows;
  p.scale = static_cast<float>(softmax_scale);
  p.reduce_max = reduce_max;
  STD_TORCH_CHECK(parents.has_value() == kept.has_value(), "sparse_attn::", op,
                  ": parents and kept come together or not at all");
  if (parents.has_value()) {
    check_tensor(op, *parents, "parents", ScalarType::Int, {p.batch, p.num_heads_kv, -1});
    p.num_parents = parents->size(2) - 1;
    STD_TORCH_CHECK(p.num_parents >= 0, "sparse_attn::", op, ": parents is empty");
    check_tensor(op, *kept, "kept", ScalarType::Bool,
                 {p.batch, p.num_heads_kv, p.tiles, p.num_parents});
    p.parents = data<int32_t>(*parents);
    p.kept = data<bool>(*kept);
    for (int64_t h = 0; h < p.batch * p.num_heads_kv; ++h) {
      const int32_t* range = p.parents + h * (p.num_parents + 1);
      bool valid = range[0] >= 0 && range[p.num_parents] <= p.clusters;
      for (int64_t c = 0; c < p.num_parents; ++c) valid = valid && range[c] <= range[c + 1];
      STD_TORCH_CHECK(valid, "sparse_attn::", op, ": parents of head ", h,
                      " are not ascending ranges in [0, ", p.clusters, "]");
    }
  }
  Tensor out = torch::stable::new_empty(q, {p.batch, p.num_heads_kv, p.tiles, p.clusters},
                                        ScalarType::Float);
  p.out = written<float>(out);
  cpu::centroid_scores(p, torch_threads());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> centroid_lists_cpu(const Tensor scores, const Tensor indptr,
                                                      const Tensor members, double threshold,
                                                      int64_t budget) {
  const char* op = "centroid_lists";
  check_tensor(op, scores, "scores", ScalarType::Float, {-1, -1, -1, -1});
  const int64_t batch = scores.size(0), heads = scores.size(1);
  const int64_t tiles = scores.size(2), clusters = scores.size(3);
  check_tensor(op, indptr, "indptr", ScalarType::Long, {batch, heads, clusters + 1});
  check_tensor(op, members, "members", ScalarType::Int, {batch, heads, -1});
  const int64_t n = members.size(2);
  check_ranges(op, indptr, n);
  Tensor keep = torch::stable::new_empty(scores, {batch, heads, tiles, clusters}, ScalarType::Bool);
  Tensor counts = torch::stable::new_empty(scores, {batch, heads, tiles}, ScalarType::Long);
  auto* kept = written<bool>(keep);
  auto* count = written<int64_t>(counts);
  const auto* range = data<int64_t>(indptr);
  const cpu::Executor executor = torch_threads();
  cpu::keep_clusters(data<float>(scores), range, batch * heads, tiles, clusters, threshold, budget,
                     kept, count, executor);
  const int64_t total = std::accumulate(count, count + batch * heads * tiles, int64_t{0});
  Tensor indices = torch::stable::new_empty(members, {total});
  const bool valid = cpu::kept_members(kept, count, range, data<int32_t>(members), batch * heads,
                                       tiles, clusters, n, written<int32_t>(indices), executor);
  STD_TORCH_CHECK(valid, "sparse_attn::", op, ": members of a head are not distinct keys in [0, ",
                  n, ")");
  return {keep, counts, indices};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> centroid_lookup_cpu(
    const Tensor q, const Tensor centroids, const Tensor counts, const Tensor indptr,
    const Tensor members, const std::optional<Tensor> parents,
    const std::optional<Tensor> coarse_centroids, const std::optional<Tensor> coarse_counts,
    int64_t tile_rows, double softmax_scale, bool reduce_max, double threshold, int64_t budget,
    double coarse_threshold) {
  STD_TORCH_CHECK(parents.has_value() == coarse_centroids.has_value() &&
                      parents.has_value() == coarse_counts.has_value(),
                  "sparse_attn::centroid_lookup: parents, coarse_centroids and coarse_counts come "
                  "together or not at all");
  std::optional<Tensor> kept;
  if (parents.has_value()) {
    const Tensor scores = centroid_scores_cpu(q, *coarse_centroids, *coarse_counts, std::nullopt,
                                              std::nullopt, tile_rows, softmax_scale, reduce_max);
    kept = torch::stable::new_empty(scores, scores.sizes(), ScalarType::Bool);
    std::transform(data<float>(scores), data<float>(scores) + scores.numel(), written<bool>(*kept),
                   [&](float score) { return cpu::keeps_cluster(score, coarse_threshold); });
  }
  const Tensor scores = centroid_scores_cpu(q, centroids, counts, parents, kept, tile_rows,
                                            softmax_scale, reduce_max);
  auto [keep, sizes, indices] = centroid_lists_cpu(scores, indptr, members, threshold, budget);
  const int64_t tiles = scores.size(2), lists = scores.size(0) * scores.size(1);
  Tensor ranges = torch::stable::new_empty(sizes, {scores.size(0), scores.size(1), tiles + 1});
  auto* to = written<int64_t>(ranges);
  const auto* size = data<int64_t>(sizes);
  int64_t end = 0;
  for (int64_t i = 0; i < lists; ++i) {
    *to++ = end;
    for (int64_t t = 0; t < tiles; ++t) *to++ = end += *size++;
  }
  return {keep, sizes, ranges, indices};
}

}  // namespace sparse_attn::ops
