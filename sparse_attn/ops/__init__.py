# SPDX-License-Identifier: Apache-2.0
"""The compiled operators.

Everything else in the package calls the functions here, never torch.ops.
"""

from sparse_attn.ops.adaptive import adaptive_lists
from sparse_attn.ops.anchor import anchor_lists
from sparse_attn.ops.attention import attention
from sparse_attn.ops.blocks import (
    GridArgs,
    block_threshold,
    block_top_k,
    block_top_p,
    cell_block_sums,
    list_blocks,
    pool_blocks,
)
from sparse_attn.ops.centroids import (
    centroid_lists,
    centroid_lookup,
    centroid_scores,
    cluster_means,
    cluster_members,
    nearest_centroids,
)
from sparse_attn.ops.hip import hip_stage, hip_tree, leaf_lists
from sparse_attn.ops.library import (
    MAX_CUDA_HEAD_DIM,
    MAX_HEAD_DIM,
    cpu_capability,
    load_cuda,
    on_cpu,
)
from sparse_attn.ops.selection import top_k, vertical_slash_lists, window_scores

__all__ = [
    "MAX_CUDA_HEAD_DIM",
    "MAX_HEAD_DIM",
    "GridArgs",
    "adaptive_lists",
    "anchor_lists",
    "attention",
    "block_threshold",
    "block_top_k",
    "block_top_p",
    "cell_block_sums",
    "centroid_lists",
    "centroid_lookup",
    "centroid_scores",
    "cluster_means",
    "cluster_members",
    "cpu_capability",
    "hip_stage",
    "hip_tree",
    "leaf_lists",
    "list_blocks",
    "load_cuda",
    "nearest_centroids",
    "on_cpu",
    "pool_blocks",
    "top_k",
    "vertical_slash_lists",
    "window_scores",
]
