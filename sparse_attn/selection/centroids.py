# SPDX-License-Identifier: Apache-2.0
"""Clusters of keys: spherical k-means, and the shares of clusters in a softmax.

Every head (batch entry and KV head) is clustered by itself, all heads in one call, and what a head
gets depends on its own keys alone. Where the native operators do not apply (another device, an odd
head_dim) the same is computed in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn import ops
from sparse_attn.lists import marked_positions
from sparse_attn.selection.estimators import bands, native_inputs
from sparse_attn.selection.selectors import top_k_indices

_START_ROUNDS = 8

#: progress(iteration, iterations, mean cosine of a key and its centroid's direction)
Progress = Callable[[int, int, float], None]


def nearest_centroids(
    keys: Tensor,
    centroids: Tensor,
    labels: Tensor | None = None,
    scores: Tensor | None = None,
    changed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The centroid with the greatest dot product for every key, ties towards the lower number.

    No keys x centroids buffer is made. With an earlier answer, only what can have changed is
    computed, and the result is the same as without: a key whose centroid did not change meets the
    changed ones only, and so does one that a changed centroid serves better than its old one did.

    Args:
        keys: [batch, heads, n, head_dim], any floating dtype.
        centroids: float32 [batch, heads, clusters, head_dim], at least one cluster.
        labels, scores: an earlier answer, for other values of the `changed` centroids; the labels
            of keys that had no answer may be any changed centroid.
        changed: bool [batch, heads, clusters], with labels and scores.

    Returns:
        (labels int32 [batch, heads, n], scores float32 [batch, heads, n], the products).
    """
    if native_inputs(keys, keys):
        return ops.nearest_centroids(keys, centroids.contiguous(), labels, scores, changed)
    batch, heads, n, _ = keys.shape
    flat_keys, flat = keys.flatten(0, 1), centroids.flatten(0, 1).transpose(-1, -2)
    numbers = torch.arange(flat.shape[-1], device=keys.device)
    found, best = [], []
    for part, rows in bands(batch * heads, n, flat.shape[-1]):
        products = torch.matmul(flat_keys[part, rows].float(), flat[part])
        products = products.nan_to_num(float("-inf"), float("inf"), float("-inf"))
        top = products.amax(-1)
        first = torch.where(products == top[..., None], numbers, flat.shape[-1]).amin(-1)
        found.append(first.flatten())
        best.append(top.flatten())
    return (
        torch.cat(found).view(batch, heads, n).int(),
        torch.cat(best).view(batch, heads, n),
    )


def cluster_members(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Keys by cluster.

    Args:
        labels: int32 [batch, heads, n] in [0, clusters).
        clusters: their number.

    Returns:
        (indptr int64 [batch, heads, clusters + 1], members int32 [batch, heads, n]): the keys of
        cluster c are members[indptr[c] : indptr[c + 1]], ascending.
    """
    if ops.on_cpu(labels):
        return ops.cluster_members(labels.contiguous(), clusters)
    members = torch.argsort(labels, dim=-1, stable=True).int()
    ones = torch.ones_like(labels, dtype=torch.int64)
    shape = (*labels.shape[:2], clusters)
    counts = torch.zeros(shape, dtype=torch.int64, device=labels.device)
    counts.scatter_add_(-1, labels.long(), ones)
    return F.pad(counts.cumsum(-1), (1, 0)), members


def cluster_means(keys: Tensor, weights: Tensor | None, indptr: Tensor, members: Tensor) -> Tensor:
    """Weighted sum of a cluster's keys over their number, 0 for an empty cluster.

    Args:
        keys: [batch, heads, n, head_dim], any floating dtype.
        weights: float32 [batch, heads, n], or None for ones.
        indptr, members: as `cluster_members` returns them.

    Returns:
        float32 [batch, heads, clusters, head_dim]; keys are added in ascending order.
    """
    if native_inputs(keys, keys):
        return ops.cluster_means(keys, weights, indptr, members)
    counts = indptr.diff(dim=-1)
    of = _cluster_of_places(indptr, members).flatten(0, 1)
    order = members.flatten(0, 1).long()
    rows = keys.float() if weights is None else keys.float() * weights[..., None]
    rows = rows.flatten(0, 1).gather(1, order[..., None].expand(-1, -1, keys.shape[-1]))
    sums = rows.new_zeros(rows.shape[0], counts.shape[-1], keys.shape[-1])
    sums.scatter_add_(1, of[..., None].expand_as(rows), rows)
    return sums.view(*counts.shape, keys.shape[-1]) / counts.clamp(min=1)[..., None]


def centroid_scores(
    q: Tensor,
    centroids: Tensor,
    counts: Tensor,
    *,
    tile_rows: int,
    softmax_scale: float,
    reduce_max: bool = False,
    parents: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """Share of one key of each cluster in the softmax over clusters, averaged over queries.

    S_k(q) = exp(scale q . c_k) / sum_j N_j exp(scale q . c_j), so that sum_k N_k S_k = 1; empty
    clusters take no part. The score of cluster k for a tile of rows is the mean of S_k over those
    rows and over the query heads of the group, or the largest of the heads' means.

    Args:
        q: [batch, num_heads, seqlen_q, head_dim], any floating dtype.
        centroids: float32 [batch, num_heads_kv, clusters, head_dim].
        counts: int32 [batch, num_heads_kv, clusters], keys of each.
        tile_rows: query rows that share a score.
        softmax_scale: factor of the dot products.
        reduce_max: take the largest over the heads of a group instead of their mean.
        parents: int32 [batch, num_heads_kv, p + 1]; cluster c lies under parent i iff parents[i]
            <= c < parents[i + 1]. None: every cluster is scored.
        kept: bool [batch, num_heads_kv, tiles, p], with parents: only clusters under a kept parent
            are scored, and only these are in the sum of the denominator.

    Returns:
        float32 [batch, num_heads_kv, ceil(seqlen_q / tile_rows), clusters]; -1 where not scored.

    Source:
        Squeezed Attention (Hooper et al. 2024, arXiv:2411.09688), equation 2, for any group.
    """
    if native_inputs(q, q):
        return ops.centroid_scores(
            q,
            centroids.contiguous(),
            counts,
            parents=parents,
            kept=kept,
            tile_rows=tile_rows,
            softmax_scale=softmax_scale,
            reduce_max=reduce_max,
        )
    batch, heads_kv, clusters, head_dim = centroids.shape
    group = q.shape[1] // heads_kv
    scores = []
    for tile, first in enumerate(range(0, q.shape[2], tile_rows)):
        rows = q[:, :, first : first + tile_rows].float()
        rows = rows.reshape(batch, heads_kv, -1, head_dim)
        used = counts > 0
        if parents is not None:
            assert kept is not None
            numbers = torch.arange(clusters, device=q.device).expand(batch, heads_kv, clusters)
            parent = torch.searchsorted(parents[..., 1:].contiguous(), numbers.int(), right=True)
            inside = (numbers >= parents[..., :1]) & (parent < kept.shape[-1])
            parent = parent.clamp(max=max(0, kept.shape[-1] - 1))
            used = used & inside & kept[:, :, tile].gather(-1, parent)
        logits = torch.matmul(rows, centroids.transpose(-1, -2)) * softmax_scale
        logits = logits.masked_fill(~used[:, :, None], float("-inf"))
        mass = torch.softmax(logits + counts.clamp(min=1)[:, :, None].log(), dim=-1)
        shares = mass / counts.clamp(min=1)[:, :, None]
        by_head = shares.view(batch, heads_kv, group, rows.shape[2] // group, clusters).mean(3)
        reduced = by_head.amax(2) if reduce_max else by_head.mean(2)
        scores.append(torch.where(used, reduced, -1.0))
    if not scores:
        return q.new_empty((batch, heads_kv, 0, clusters), dtype=torch.float32)
    return torch.stack(scores, dim=2)


def centroid_lists(
    scores: Tensor,
    indptr: Tensor,
    members: Tensor,
    *,
    threshold: float | Tensor = 0.0,
    budget: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The keys of the clusters that are kept, in order.

    Kept are the scored clusters strictly above the threshold (all of them at 0 or less); with a
    budget, only the best of these whose keys together do not exceed it, by score descending, then
    number ascending, but always the best one. NaN is never kept.

    Args:
        scores: float32 [batch, heads, tiles, clusters]; negative where not scored.
        indptr, members: as `cluster_members` returns them.
        threshold: of the score; one number, or a float64 tensor [] of the scores' device.
        budget: keys a tile may have, None for any number.

    Returns:
        (keep bool like scores, counts int64 [batch, heads, tiles], keys int32 [sum of counts]: the
        kept keys of every tile, ascending). On a device other than the CPU `keys` is a buffer that
        the counts fill in part, so that nothing is read back.
    """
    limit = -1 if budget is None else budget
    if ops.on_cpu(scores):
        return ops.centroid_lists(
            scores.contiguous(), indptr, members, threshold=float(threshold), budget=limit
        )
    return _centroid_lists_torch(scores, indptr, members, threshold, budget)


def _cluster_of_places(indptr: Tensor, members: Tensor) -> Tensor:
    """Cluster of every entry of `members`, int64 like it."""
    places = torch.arange(members.shape[-1], device=members.device).expand_as(members).contiguous()
    return torch.searchsorted(indptr[..., 1:].contiguous(), places, right=True)


def _centroid_lists_torch(
    scores: Tensor, indptr: Tensor, members: Tensor, threshold: float | Tensor, budget: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`centroid_lists` on any device."""
    keep = (scores >= 0) & ((scores.double() > threshold) | (threshold <= 0))
    sizes = indptr.diff(dim=-1)[:, :, None].expand_as(scores)
    if budget is not None:
        order = scores.masked_fill(~keep, -1.0).argsort(dim=-1, descending=True, stable=True)
        taken = torch.where(keep, sizes, 0).gather(-1, order).cumsum(-1)
        fits = taken <= budget
        fits[..., :1] = True
        keep = keep & torch.zeros_like(keep).scatter_(-1, order, fits.cummin(-1).values)
    cluster = _cluster_of_places(indptr, members)
    cluster = cluster.clamp(max=max(0, scores.shape[-1] - 1))
    labels = torch.zeros_like(cluster).scatter_(-1, members.long(), cluster)
    mask = keep.gather(-1, labels[:, :, None].expand(-1, -1, scores.shape[2], -1))
    return keep, mask.sum(-1), marked_positions(mask)


def spherical_kmeans(
    keys: Tensor,
    clusters: int,
    *,
    iterations: int = 10,
    tolerance: float = 0.001,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Labels of a spherical k-means: clusters of directions, by cosine.

    Start: k-means++ in eight rounds. A round draws its part of the centroids among the keys, all at
    once and without repetition, with probabilities proportional to 1 - cosine to the nearest one
    drawn before (half the squared distance of unit vectors). All rounds together cost one pass of
    keys x clusters, whose labels the first iteration begins with. An iteration of Lloyd's
    algorithm takes the mean direction of every cluster and labels the keys anew. An empty cluster
    moves to a key that its own centroid serves worst. All heads draw the same random numbers, and
    each stops by itself. On the CPU the work ends with the last of them; elsewhere all iterations
    run, which changes nothing, so that no flag is read back.

    Args:
        keys: [batch, heads, n, head_dim], any floating dtype; lengths do not matter.
        clusters: 1 to n.
        iterations: at most, after the start.
        tolerance: a head stops when no more than this share of its keys changed cluster.
        seed: of the start.
        progress: called after every iteration.

    Returns:
        int32 [batch, heads, n]. A cluster may be empty only if keys point the same way.
    """
    inverse = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)
    inverse = torch.where(inverse > 0, 1.0 / inverse, 0.0)
    directions, labels, scores = _start(keys, inverse, clusters, seed)
    active = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
    for iteration in range(iterations):
        indptr, members = cluster_members(labels, clusters)
        new = F.normalize(cluster_means(keys, inverse, indptr, members), dim=-1)
        new = _fill_empty(new, indptr, keys, inverse, scores)
        new = torch.where(active[..., None, None], new, directions)
        changed = (new != directions).any(-1)
        before, directions = labels, new
        labels, scores = nearest_centroids(keys, directions, labels, scores, changed)
        moved = (labels != before).float().mean(-1)
        active = active & (moved > tolerance)
        if progress is not None:
            progress(iteration + 1, iterations, (scores * inverse).mean().item())
        # Elsewhere the answer would be waited for; heads that have stopped stay as they are.
        if ops.on_cpu(keys) and not bool(active.any()):
            break
    return labels


def _start(
    keys: Tensor, inverse: Tensor, clusters: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(directions, labels, scores) of the start that `spherical_kmeans` describes."""
    batch, heads, n, head_dim = keys.shape
    generator = torch.Generator().manual_seed(seed)
    directions = torch.zeros(batch, heads, clusters, head_dim, device=keys.device)
    labels = torch.zeros(batch, heads, n, dtype=torch.int32, device=keys.device)
    scores = torch.full((batch, heads, n), float("-inf"), device=keys.device)
    # The first round must not look at a distance yet, so it is one draw.
    sizes = [1, *(len(part) for part in torch.arange(1, clusters).chunk(_START_ROUNDS))]
    done = 0
    for size in sizes:
        if size == 0:
            continue
        # The first arrivals of exponential clocks with rates w are a weighted draw without
        # repetition.
        clock = torch.empty(n).exponential_(generator=generator).to(keys.device)
        distance = (1.0 - scores * inverse).clamp(0.0, 2.0)
        drawn = top_k_indices(distance / clock, size).long()
        rows = keys.gather(2, drawn[..., None].expand(-1, -1, -1, head_dim)).float()
        rows = rows * inverse.gather(-1, drawn)[..., None]
        directions[:, :, done : done + size] = rows
        changed = torch.zeros(batch, heads, clusters, dtype=torch.bool, device=keys.device)
        changed[:, :, done : done + size] = True
        done += size
        if done == size:  # nothing is known of the other clusters, which are zeros for now
            labels, scores = nearest_centroids(keys, directions[:, :, :size])
        else:
            labels, scores = nearest_centroids(
                keys, directions[:, :, :done], labels, scores, changed[:, :, :done].contiguous()
            )
    return directions, labels, scores


def _fill_empty(
    directions: Tensor, indptr: Tensor, keys: Tensor, inverse: Tensor, scores: Tensor
) -> Tensor:
    """Gives each empty cluster the direction of one of the keys that are served worst."""
    empty = indptr.diff(dim=-1) == 0
    # Elsewhere their number would be waited for.
    most = int(empty.sum(-1).max()) if ops.on_cpu(keys) else empty.shape[-1]
    if most == 0:
        return directions
    worst = torch.argsort(scores * inverse, dim=-1, stable=True)[..., :most]
    rows = keys.gather(2, worst[..., None].expand(-1, -1, -1, keys.shape[-1])).float()
    rows = rows * inverse.gather(-1, worst)[..., None]
    rank = (empty.cumsum(-1) - 1).clamp(0, most - 1)
    chosen = rows.gather(2, rank[..., None].expand_as(directions))
    return torch.where(empty[..., None], chosen, directions)
