# SPDX-License-Identifier: Apache-2.0
"""CentroidIndex: the keys of a fixed prefix in clusters, which a few dot products can search."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn.patterns.base import check_int
from sparse_attn.selection import (
    centroid_scores,
    cluster_means,
    cluster_members,
    nearest_centroids,
    spherical_kmeans,
)
from sparse_attn.selection.centroids import Progress

if TYPE_CHECKING:
    from sparse_attn.patterns.centroid_lookup import CentroidLookup

Group = Literal["mean", "max"]


@dataclass(frozen=True, eq=False, repr=False)
class CentroidIndex:
    """Clusters of a prefix's keys, for every batch entry and KV head.

    Of the prefix's `length` keys the last few, the observation window, are in no cluster: a lookup
    always keeps them. A cluster's centroid is the mean of its keys as they are (not of unit
    vectors). With two levels, clusters that lie close together have a coarse cluster in common,
    whose centroid is the mean of all its keys.

    Make one with `fit`; choose keys with `lookup`. It never changes: `append` returns another.

    Attributes:
        length: keys of the prefix, observation window included.
        centroids: float32 [batch, num_heads_kv, clusters, head_dim]; 0 for an empty cluster.
        counts: int32 [batch, num_heads_kv, clusters], keys of each.
        indptr: int64 [batch, num_heads_kv, clusters + 1], offsets into members.
        members: int32 [batch, num_heads_kv, clustered], keys by cluster, ascending in each.
        mean_values: float32 [batch, num_heads_kv, clusters, head_dim_v], or None.
        parents: int32 [batch, num_heads_kv, coarse + 1]; coarse cluster i holds the clusters
            parents[i] to parents[i + 1]. None with one level.
        coarse_centroids: float32 [batch, num_heads_kv, coarse, head_dim], or None.
        coarse_counts: int32 [batch, num_heads_kv, coarse], keys of each, or None.
    """

    length: int
    centroids: Tensor
    counts: Tensor
    indptr: Tensor
    members: Tensor
    mean_values: Tensor | None = None
    parents: Tensor | None = None
    coarse_centroids: Tensor | None = None
    coarse_counts: Tensor | None = None

    # ---------------------------------------------------------------- construction

    @classmethod
    def fit(
        cls,
        keys: Tensor,
        num_clusters: int | None = None,
        *,
        ratio: float | None = None,
        values: Tensor | None = None,
        observation_window: int = 100,
        levels: int = 1,
        coarse_ratio: float = 0.2,
        iterations: int = 10,
        tolerance: float = 0.001,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> CentroidIndex:
        """Clusters the keys of a prefix by spherical k-means (`selection.spherical_kmeans`).

        Args:
            keys: [batch, num_heads_kv, length, head_dim], any floating dtype: the prefix's keys as
                attention sees them (rotated).
            num_clusters: clusters a head gets.
            ratio: or clusters a clustered key, rounded down, at least one cluster; default 0.05.
            values: [batch, num_heads_kv, length, head_dim_v]; keeps every cluster's mean value,
                which estimating what is not kept needs (`centroid_attention`).
            observation_window: last keys of the prefix that are not clustered but always kept.
            levels: 2 to cluster the centroids too, for a lookup in two steps.
            coarse_ratio: coarse clusters a cluster, rounded down, at least one.
            iterations: of Lloyd's algorithm at most.
            tolerance: a head stops when no more than this share of its keys changed cluster.
            seed: of the start. Every head draws the same numbers: what it gets depends on its own
                keys alone, not on the other heads, the batch or the number of threads.
            progress: called as progress(iteration, iterations, mean cosine) after every iteration
                over the keys.

        Raises:
            TypeError, ValueError: an argument is wrong; the text says what is allowed.

        Source: Squeezed Attention, Hooper et al. 2024, arXiv:2411.09688, section 3.1.
        """
        owner = "CentroidIndex.fit"
        _check_keys(owner, "keys", keys)
        for name, value, least in (
            ("observation_window", observation_window, 0),
            ("levels", levels, 1),
            ("iterations", iterations, 0),
        ):
            check_int(owner, name, value, least)
        if levels > 2:
            raise ValueError(f"sparse_attn.{owner}: levels={levels}; pass 1 or 2.")
        length = keys.shape[2]
        clustered = max(0, length - observation_window)
        clusters = _cluster_count(owner, num_clusters, ratio, clustered)
        _share(owner, "coarse_ratio", coarse_ratio)
        part = keys[:, :, :clustered]
        if clusters == 0:
            labels = torch.zeros((*keys.shape[:2], 0), dtype=torch.int32, device=keys.device)
        else:
            labels = spherical_kmeans(
                part,
                clusters,
                iterations=iterations,
                tolerance=tolerance,
                seed=seed,
                progress=progress,
            )
        if values is not None:
            _check_values(owner, values, keys)
            values = values[:, :, :clustered]
        if levels == 1 or clusters == 0:
            return cls._of_labels(length, part, values, labels, clusters, None)
        fine = cls._of_labels(length, part, None, labels, clusters, None)
        coarse = max(1, int(coarse_ratio * clusters))
        above = spherical_kmeans(
            fine.centroids, coarse, iterations=iterations, tolerance=tolerance, seed=seed
        )
        # Clusters of one coarse cluster get neighbouring numbers.
        parents, order = cluster_members(above, coarse)
        number = torch.empty_like(order).scatter_(
            -1, order.long(), torch.arange(clusters, device=order.device).int().expand_as(order)
        )
        labels = number.gather(-1, labels.long())
        return cls._of_labels(length, part, values, labels, clusters, parents.int())

    @classmethod
    def _of_labels(
        cls,
        length: int,
        keys: Tensor,
        values: Tensor | None,
        labels: Tensor,
        clusters: int,
        parents: Tensor | None,
    ) -> CentroidIndex:
        indptr, members = cluster_members(labels, clusters)
        index = cls(
            length=length,
            centroids=cluster_means(keys, None, indptr, members),
            counts=indptr.diff(dim=-1).int(),
            indptr=indptr,
            members=members,
            mean_values=None if values is None else cluster_means(values, None, indptr, members),
        )
        return index if parents is None else index._with_parents(parents)

    def _with_parents(self, parents: Tensor) -> CentroidIndex:
        """Coarse centroids and counts from the clusters under them."""
        weights = self.counts.float()[..., None]
        children = parents.diff(dim=-1)
        numbers = torch.arange(self.clusters, dtype=torch.int32, device=parents.device)
        members = numbers.expand(*parents.shape[:2], -1).contiguous()
        ranges = parents.long()
        # A mean over children's sums, times their number, is the sum over all keys below.
        sums = cluster_means(self.centroids * weights, None, ranges, members)
        keys_below = F.pad(self.counts.cumsum(-1), (1, 0)).gather(-1, ranges).diff(dim=-1)
        scale = children.float() / keys_below.clamp(min=1).float()
        return replace(
            self,
            parents=parents,
            coarse_centroids=sums * scale[..., None],
            coarse_counts=keys_below.int(),
        )

    def append(self, keys: Tensor, values: Tensor | None = None) -> CentroidIndex:
        """The index of a longer prefix, without clustering anew.

        The observation window moves to the end of the longer prefix. Keys that it leaves behind
        join the cluster whose centroid has the greatest cosine with them, and move its mean; their
        number does not grow. Fit anew when the text has changed its subject or doubled.

        Args:
            keys: [batch, num_heads_kv, new length, head_dim], all keys of the longer prefix; those
                that are clustered already are not read.
            values: the same for the values, where the index has mean values.

        Raises:
            ValueError: the shapes do not fit, or there is no cluster to join.
        """
        owner = "CentroidIndex.append"
        self.check_keys(owner, keys)
        if (self.mean_values is None) != (values is None):
            have = "no" if self.mean_values is None else "mean"
            raise ValueError(
                f"sparse_attn.{owner}: the index has {have} values; pass values exactly where it "
                "was fitted with values."
            )
        if self.clusters == 0:
            raise ValueError(
                f"sparse_attn.{owner}: nothing is clustered yet; fit an index to the longer prefix."
            )
        length = keys.shape[2]
        end = length - (self.length - self.clustered)
        part = keys[:, :, self.clustered : end]
        largest = self.counts.argmax(-1, keepdim=True)
        directions = F.normalize(self.centroids, dim=-1)
        empty = self.counts == 0
        labels, _ = nearest_centroids(part, directions.masked_fill(empty[..., None], 0.0))
        # A key that no centroid points towards must not end up in an empty cluster.
        numbers = torch.arange(self.clusters, device=keys.device).expand_as(empty)
        joined = torch.where(empty, largest, numbers).gather(-1, labels.long()).int()
        indptr, members = cluster_members(torch.cat([self.labels(), joined], -1), self.clusters)
        new_ranges, new_members = cluster_members(joined, self.clusters)
        grown = new_ranges.diff(dim=-1).float()[..., None]
        total = (self.counts[..., None] + grown).clamp(min=1)

        def moved(mean: Tensor, rows: Tensor) -> Tensor:
            arrived = cluster_means(rows, None, new_ranges, new_members)
            return mean + (arrived - mean) * (grown / total)

        index = CentroidIndex(
            length=length,
            centroids=moved(self.centroids, part),
            counts=indptr.diff(dim=-1).int(),
            indptr=indptr,
            members=members,
        )
        if self.mean_values is not None and values is not None:
            _check_values(owner, values, keys)
            mean_values = moved(self.mean_values, values[:, :, self.clustered : end])
            index = replace(index, mean_values=mean_values)
        return index if self.parents is None else index._with_parents(self.parents)

    # ---------------------------------------------------------------- what it is

    @property
    def batch_size(self) -> int:
        """Batch entries."""
        return self.centroids.shape[0]

    @property
    def num_heads_kv(self) -> int:
        """KV heads."""
        return self.centroids.shape[1]

    @property
    def clusters(self) -> int:
        """Clusters of a head, empty ones included."""
        return self.centroids.shape[2]

    @property
    def clustered(self) -> int:
        """Keys of the prefix that are in a cluster: all but the observation window."""
        return self.members.shape[2]

    @property
    def levels(self) -> int:
        """1, or 2 with coarse clusters."""
        return 1 if self.parents is None else 2

    def __repr__(self) -> str:
        coarse = "" if self.coarse_counts is None else f", coarse={self.coarse_counts.shape[2]}"
        return (
            f"CentroidIndex(batch={self.batch_size}, num_heads_kv={self.num_heads_kv}, "
            f"length={self.length}, clustered={self.clustered}, clusters={self.clusters}{coarse})"
        )

    def labels(self) -> Tensor:
        """Cluster of every clustered key, int32 [batch, num_heads_kv, clustered]."""
        places = torch.arange(self.clustered, device=self.members.device)
        places = places.expand_as(self.members).contiguous()
        of = torch.searchsorted(self.indptr[..., 1:].contiguous(), places, right=True)
        return torch.empty_like(self.members).scatter_(-1, self.members.long(), of.int())

    def check_keys(self, owner: str, k: Tensor) -> None:
        """Raises ValueError unless k can be the keys of this index's prefix and of what follows."""
        expected = (self.batch_size, self.num_heads_kv, self.centroids.shape[3])
        if k.dim() != 4 or (k.shape[0], k.shape[1], k.shape[3]) != expected:
            raise ValueError(
                f"sparse_attn.{owner}: k is {tuple(k.shape)}, the index has batch {expected[0]}, "
                f"{expected[1]} KV heads and head_dim {expected[2]}; pass the cache it was fitted "
                "to."
            )
        if k.shape[2] < self.length:
            raise ValueError(
                f"sparse_attn.{owner}: k has {k.shape[2]} keys, the index's prefix {self.length}; "
                "pass the whole cache, the prefix first."
            )

    # ---------------------------------------------------------------- use

    def scores(
        self,
        q: Tensor,
        *,
        tile_rows: int,
        softmax_scale: float,
        group: Group = "mean",
        coarse_keep: Tensor | None = None,
    ) -> Tensor:
        """`selection.centroid_scores` of the clusters; with coarse_keep of those it leaves."""
        return centroid_scores(
            q,
            self.centroids,
            self.counts,
            tile_rows=tile_rows,
            softmax_scale=softmax_scale,
            reduce_max=group == "max",
            parents=None if coarse_keep is None else self.parents,
            kept=coarse_keep,
        )

    def coarse_scores(
        self, q: Tensor, *, tile_rows: int, softmax_scale: float, group: Group = "mean"
    ) -> Tensor:
        """`selection.centroid_scores` of the coarse clusters.

        Raises:
            ValueError: the index has one level.
        """
        if self.coarse_centroids is None or self.coarse_counts is None:
            raise ValueError(
                "sparse_attn.CentroidIndex: it has one level; fit it with levels=2 for a lookup "
                "with a coarse threshold or percentile."
            )
        return centroid_scores(
            q,
            self.coarse_centroids,
            self.coarse_counts,
            tile_rows=tile_rows,
            softmax_scale=softmax_scale,
            reduce_max=group == "max",
        )

    def lookup(
        self,
        *,
        threshold: float | None = None,
        percentile: float | None = None,
        budget: int | None = None,
        coarse_threshold: float | None = None,
        coarse_percentile: float | None = None,
        group: Group = "mean",
        tile: int | None = None,
    ) -> CentroidLookup:
        """The pattern that looks keys up in this index; arguments as `CentroidLookup`."""
        from sparse_attn.patterns.centroid_lookup import CentroidLookup  # imports this module

        return CentroidLookup(
            index=self,
            threshold=threshold,
            percentile=percentile,
            budget=budget,
            coarse_threshold=coarse_threshold,
            coarse_percentile=coarse_percentile,
            group=group,
            tile=tile,
        )

    # ---------------------------------------------------------------- parts and places

    def _map(self, change: Any) -> CentroidIndex:
        changed = {
            field.name: change(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> CentroidIndex:
        """The same index on another device."""
        return self._map(lambda x: x.to(device))

    def select(
        self, *, batch: int | None = None, heads: Sequence[int] | None = None
    ) -> CentroidIndex:
        """The index of one batch entry, or of some KV heads in the order given.

        Raises:
            ValueError: there is no such batch entry or head.
        """
        if batch is not None and not 0 <= batch < self.batch_size:
            raise ValueError(
                f"sparse_attn.CentroidIndex.select: batch={batch}; the index has batch entries 0 "
                f"to {self.batch_size - 1}: fit it to as many as the call has sequences."
            )
        if heads is not None and not all(0 <= head < self.num_heads_kv for head in heads):
            raise ValueError(
                f"sparse_attn.CentroidIndex.select: heads={list(heads)}; the index has KV heads 0 "
                f"to {self.num_heads_kv - 1}."
            )
        index = self if batch is None else self._map(lambda x: x[batch : batch + 1])
        if heads is None:
            return index
        first = heads[0] if heads else 0
        consecutive = list(heads) == list(range(first, first + len(heads)))
        chosen = slice(first, first + len(heads)) if consecutive else list(heads)
        return index._map(lambda x: x[:, chosen].contiguous())  # no copy of one batch entry's run

    # ---------------------------------------------------------------- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the index to a safetensors file.

        Raises:
            ImportError: the package safetensors is missing.
        """
        tensors = {
            field.name: value.contiguous()
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        metadata = {"format": "sparse_attn.CentroidIndex.1", "length": str(self.length)}
        _safetensors("save").save_file(tensors, os.fspath(path), metadata)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], device: torch.device | str = "cpu"
    ) -> CentroidIndex:
        """Reads what `save` wrote.

        Raises:
            ImportError: the package safetensors is missing.
            ValueError: the file holds something else.
        """
        _safetensors("load")
        from safetensors import safe_open

        with safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            names = {field.name for field in fields(cls)} - {"length"}
            needed = {"centroids", "counts", "indptr", "members"}
            found = set(file.keys())
            if metadata.get("format") != "sparse_attn.CentroidIndex.1" or not (
                needed <= found <= names
            ):
                raise ValueError(
                    f"sparse_attn.CentroidIndex.load: {os.fspath(path)} is not a saved "
                    "CentroidIndex; pass a file that `save` wrote."
                )
            return cls(
                length=int(metadata["length"]), **{name: file.get_tensor(name) for name in found}
            )


def _safetensors(function: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"sparse_attn.CentroidIndex.{function}: needs the package safetensors; install it "
            "with: pip install safetensors"
        ) from error
    return safetensors.torch


def _check_keys(owner: str, name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"sparse_attn.{owner}: {name} is a {type(x).__name__}; pass a Tensor.")
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"sparse_attn.{owner}: {name} is {x.dtype} {tuple(x.shape)}; pass a floating dtype "
            "[batch, num_heads_kv, length, dim]."
        )


def _check_values(owner: str, values: Tensor, keys: Tensor) -> None:
    _check_keys(owner, "values", values)
    if values.shape[:3] != keys.shape[:3]:
        raise ValueError(
            f"sparse_attn.{owner}: values {tuple(values.shape)} and keys {tuple(keys.shape)} "
            "differ in batch, heads or length; these must be equal."
        )


def _share(owner: str, name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"sparse_attn.{owner}: {name}={value!r} is a {type(value).__name__}; pass a float."
        )
    if not (math.isfinite(value) and 0.0 < value <= 1.0):
        raise ValueError(
            f"sparse_attn.{owner}: {name}={value} is not in (0, 1]; pass for instance 0.05."
        )


def _cluster_count(
    owner: str, num_clusters: int | None, ratio: float | None, clustered: int
) -> int:
    if num_clusters is not None and ratio is not None:
        raise ValueError(f"sparse_attn.{owner}: num_clusters and ratio are given; pass one.")
    if num_clusters is None:
        share = 0.05 if ratio is None else ratio
        _share(owner, "ratio", share)
        return min(clustered, max(1, int(share * clustered)))
    check_int(owner, "num_clusters", num_clusters, 1)
    if num_clusters > clustered:
        raise ValueError(
            f"sparse_attn.{owner}: num_clusters={num_clusters} for {clustered} keys outside the "
            "observation window; pass at most as many."
        )
    return num_clusters
