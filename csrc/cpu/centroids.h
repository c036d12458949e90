// SPDX-License-Identifier: Apache-2.0
// Clusters of keys on the CPU: spherical k-means, shares of clusters, and lists of kept keys. A
// "head" here is a pair (batch entry, KV head), numbered batch first.
#pragma once

#include <cstdint>

#include "attention.h"

namespace sparse_attn::cpu {

// The keys of all heads.
struct KeysView {
  TensorView keys;  // [batch, heads, n, dim]
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t n = 0;
  int32_t dim = 0;
};

struct NearestParams {
  KeysView keys;
  const float* centroids = nullptr;  // [batch, heads, clusters, dim]
  int64_t clusters = 0;
  const bool* changed = nullptr;  // [batch, heads, clusters]; null: all, and labels, scores are new
  int32_t* labels = nullptr;      // [batch, heads, n], updated
  float* scores = nullptr;        // [batch, heads, n], key . centroid, updated
};

// Labels become those of the greatest product, ties towards the lower cluster. Labels and scores on
// entry are the answer for the centroids before `changed` ones changed.
void nearest_centroids(const NearestParams& params, const Executor& executor);

// indptr [heads, clusters + 1] and members [heads, n]: keys by cluster, ascending in each.
// False if a label is outside [0, clusters).
bool cluster_members(const int32_t* labels, int64_t heads, int64_t n, int64_t clusters,
                     int64_t* indptr, int32_t* members, const Executor& executor);

// means [batch, heads, clusters, dim] = sum of weights * keys over the members / their number, 0
// for an empty cluster; weights [batch, heads, n] or null for ones.
void cluster_means(const KeysView& keys, const float* weights, const int64_t* indptr,
                   const int32_t* members, int64_t clusters, float* means,
                   const Executor& executor);

struct ShareParams {
  TensorView q;  // [batch, num_heads, seqlen_q, dim]
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t num_heads = 0;
  int64_t num_heads_kv = 0;
  int64_t seqlen_q = 0;
  int32_t dim = 0;
  const float* centroids = nullptr;  // [batch, num_heads_kv, clusters, dim]
  const int32_t* counts = nullptr;   // [batch, num_heads_kv, clusters] keys of each
  int64_t clusters = 0;
  const int32_t* parents = nullptr;  // [batch, num_heads_kv, parents + 1] children ranges, or null
  const bool* kept = nullptr;        // [batch, num_heads_kv, tiles, parents], with parents
  int64_t num_parents = 0;
  int64_t tile_rows = 0;
  int64_t tiles = 0;
  float scale = 1.0f;
  bool reduce_max = false;  // over the query heads of a group; else their mean
  float* out = nullptr;     // [batch, num_heads_kv, tiles, clusters], -1 where not scored
};

void centroid_scores(const ShareParams& params, const Executor& executor);

// Whether a cluster of this score stays: scored (not negative, no NaN), and strictly above the
// threshold, at which 0 or less keeps all.
inline bool keeps_cluster(float score, double threshold) {
  return score >= 0.0f && (threshold <= 0.0 || double{score} > threshold);
}

// keep[heads, tiles, clusters] from scores of the same shape (negative: not scored, never kept):
// strictly above the threshold, all scored ones if it is 0 or less; of those, if budget >= 0, the
// best clusters whose keys together do not exceed it, but always one. counts[heads, tiles] become
// the kept keys.
void keep_clusters(const float* scores, const int64_t* indptr, int64_t heads, int64_t tiles,
                   int64_t clusters, double threshold, int64_t budget, bool* keep, int64_t* counts,
                   const Executor& executor);

// indices: the members of kept clusters, ascending in every (head, tile), one list after the other;
// `counts` as keep_clusters wrote them. False if a member is outside [0, n) or stands twice.
bool kept_members(const bool* keep, const int64_t* counts, const int64_t* indptr,
                  const int32_t* members, int64_t heads, int64_t tiles, int64_t clusters, int64_t n,
                  int32_t* indices, const Executor& executor);

}  // namespace sparse_attn::cpu
