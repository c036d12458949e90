# SPDX-License-Identifier: Apache-2.0
"""What patterns are composed of: estimators give scores, selectors turn scores into choices.

Every function is batched over its leading dimensions, deterministic, and runs where its inputs are:
natively on the CPU where that is what costs, else in plain torch. Scores are float32; ties are
broken by score descending, then index ascending.
"""

from sparse_attn.selection.blocks import (
    BlockGrid,
    block_threshold,
    block_top_k,
    block_top_p,
    blocks_index,
    group_to_kv,
)
from sparse_attn.selection.centroids import (
    centroid_lists,
    centroid_scores,
    cluster_means,
    cluster_members,
    nearest_centroids,
    spherical_kmeans,
)
from sparse_attn.selection.estimators import (
    bands,
    column_sums,
    diagonal_maxima,
    diagonal_sums,
    window_probs,
    window_scores,
)
from sparse_attn.selection.pooled import (
    antidiagonal_scores,
    block_similarity,
    mean_pool,
    minmax_bound_scores,
    minmax_pool,
    pool,
    pooled_scores,
)
from sparse_attn.selection.selectors import top_k_indices, top_k_mask

__all__ = [
    "BlockGrid",
    "antidiagonal_scores",
    "bands",
    "block_similarity",
    "block_threshold",
    "block_top_k",
    "block_top_p",
    "blocks_index",
    "centroid_lists",
    "centroid_scores",
    "cluster_means",
    "cluster_members",
    "column_sums",
    "diagonal_maxima",
    "diagonal_sums",
    "group_to_kv",
    "mean_pool",
    "minmax_bound_scores",
    "minmax_pool",
    "nearest_centroids",
    "pool",
    "pooled_scores",
    "spherical_kmeans",
    "top_k_indices",
    "top_k_mask",
    "window_probs",
    "window_scores",
]
