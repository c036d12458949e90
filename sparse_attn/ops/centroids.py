# SPDX-License-Identifier: Apache-2.0
"""Operators of clustering and centroid lookup: their handles, and their shapes for tracing.

What they compute is documented in `selection.centroids`, which also has their torch forms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn.ops.library import OPS


def nearest_centroids(
    keys: Tensor,
    centroids: Tensor,
    labels: Tensor | None = None,
    scores: Tensor | None = None,
    changed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selection.nearest_centroids` on CPU tensors."""
    labels, scores = OPS.nearest_centroids(keys, centroids, labels, scores, changed)
    return labels, scores


def cluster_members(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """`selection.cluster_members` on CPU tensors."""
    indptr, members = OPS.cluster_members(labels, clusters)
    return indptr, members


def cluster_means(keys: Tensor, weights: Tensor | None, indptr: Tensor, members: Tensor) -> Tensor:
    """`selection.cluster_means` on CPU tensors."""
    means: Tensor = OPS.cluster_means(keys, weights, indptr, members)
    return means


def centroid_scores(
    q: Tensor,
    centroids: Tensor,
    counts: Tensor,
    *,
    parents: Tensor | None,
    kept: Tensor | None,
    tile_rows: int,
    softmax_scale: float,
    reduce_max: bool,
) -> Tensor:
    """`selection.centroid_scores` on CPU tensors."""
    scores: Tensor = OPS.centroid_scores(
        q, centroids, counts, parents, kept, tile_rows, softmax_scale, reduce_max
    )
    return scores


def centroid_lists(
    scores: Tensor, indptr: Tensor, members: Tensor, *, threshold: float, budget: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`selection.centroid_lists` on CPU tensors; budget -1 for none."""
    keep, counts, indices = OPS.centroid_lists(scores, indptr, members, threshold, budget)
    return keep, counts, indices


def centroid_lookup(
    q: Tensor,
    centroids: Tensor,
    counts: Tensor,
    indptr: Tensor,
    members: Tensor,
    *,
    parents: Tensor | None,
    coarse_centroids: Tensor | None,
    coarse_counts: Tensor | None,
    tile_rows: int,
    softmax_scale: float,
    reduce_max: bool,
    threshold: float,
    budget: int,
    coarse_threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`selection.centroid_lists` of `selection.centroid_scores`, one call: decoding waits for it.

    With parents, first the coarse clusters are scored, and those that pass the coarse threshold are
    `kept`. Budget -1 for none.

    Returns:
        (keep, counts, offsets of the lists int64 [batch, heads, tiles + 1], keys).
    """
    keep, sizes, ranges, indices = OPS.centroid_lookup(
        q,
        centroids,
        counts,
        indptr,
        members,
        parents,
        coarse_centroids,
        coarse_counts,
        tile_rows,
        softmax_scale,
        reduce_max,
        threshold,
        budget,
        coarse_threshold,
    )
    return keep, sizes, ranges, indices


@torch.library.register_fake("sparse_attn::nearest_centroids")  # type: ignore[untyped-decorator]
def _nearest_centroids_fake(keys: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return (
        keys.new_empty(keys.shape[:3], dtype=torch.int32),
        keys.new_empty(keys.shape[:3], dtype=torch.float32),
    )


@torch.library.register_fake("sparse_attn::cluster_members")  # type: ignore[untyped-decorator]
def _cluster_members_fake(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    indptr = labels.new_empty((*labels.shape[:2], clusters + 1), dtype=torch.int64)
    return indptr, torch.empty_like(labels)


@torch.library.register_fake("sparse_attn::cluster_means")  # type: ignore[untyped-decorator]
def _cluster_means_fake(keys: Tensor, _: Tensor | None, indptr: Tensor, __: Tensor) -> Tensor:
    shape = (*keys.shape[:2], indptr.shape[2] - 1, keys.shape[3])
    return keys.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("sparse_attn::centroid_scores")  # type: ignore[untyped-decorator]
def _centroid_scores_fake(
    q: Tensor,
    centroids: Tensor,
    counts: Tensor,
    parents: Tensor | None,
    kept: Tensor | None,
    tile_rows: int,
    *_: Any,
) -> Tensor:
    tiles = (q.shape[2] + tile_rows - 1) // tile_rows
    shape = (*centroids.shape[:2], tiles, centroids.shape[2])
    return q.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("sparse_attn::centroid_lists")  # type: ignore[untyped-decorator]
def _centroid_lists_fake(
    scores: Tensor, indptr: Tensor, members: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.library.get_ctx().new_dynamic_size()
    return (
        torch.empty_like(scores, dtype=torch.bool),
        scores.new_empty(scores.shape[:3], dtype=torch.int64),
        members.new_empty(total),
    )


@torch.library.register_fake("sparse_attn::centroid_lookup")  # type: ignore[untyped-decorator]
def _centroid_lookup_fake(
    q: Tensor,
    centroids: Tensor,
    counts: Tensor,
    indptr: Tensor,
    members: Tensor,
    parents: Tensor | None,
    coarse_centroids: Tensor | None,
    coarse_counts: Tensor | None,
    tile_rows: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tiles = (q.shape[2] + tile_rows - 1) // tile_rows
    lead = counts.shape[:2]
    total = torch.library.get_ctx().new_dynamic_size()
    return (
        counts.new_empty((*lead, tiles, counts.shape[2]), dtype=torch.bool),
        indptr.new_empty((*lead, tiles)),
        indptr.new_empty((*lead, tiles + 1)),
        members.new_empty(total),
    )
