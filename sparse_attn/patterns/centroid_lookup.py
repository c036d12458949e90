# SPDX-License-Identifier: Apache-2.0
"""CentroidLookup: keys of a fixed prefix by the score of their cluster."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sparse_attn import ops
from sparse_attn.index import HeadKind, SparseIndex
from sparse_attn.lists import indptr_from_counts
from sparse_attn.patterns.base import (
    Pattern,
    check_int,
    check_qk,
    offset_or_default,
    scale_or_default,
)
from sparse_attn.patterns.centroid_index import CentroidIndex, Group
from sparse_attn.selection import centroid_lists
from sparse_attn.selection.estimators import native_inputs


class Choice(NamedTuple):
    """What a lookup kept.

    Attributes:
        keep: bool [batch, num_heads_kv, tiles, clusters].
        counts: int64 [batch, num_heads_kv, tiles], kept clustered keys.
        indptr: int64 [batch, num_heads_kv, tiles + 1], offsets into keys.
        keys: int32 [sum of counts], ascending in every tile.
    """

    keep: Tensor
    counts: Tensor
    indptr: Tensor
    keys: Tensor


@dataclass(frozen=True, eq=False)
class CentroidLookup(Pattern):
    """Squeezed Attention: the clusters of a prefix's keys whose score is above a threshold.

    A cluster's score is the mean over all rows of the call (or of their tile) of
    S_k(q) = exp(q . c_k) / sum_j N_j exp(q . c_j), the share of one of its keys in the softmax over
    clusters. Kept are the keys of clusters above a threshold, the prefix's observation window, and
    every key behind the prefix; rows of the prefix itself see all keys. Heads of a group share a
    choice. The kernel then computes exact attention over what was kept.

    The threshold is one of: a value; the quantile of the keys' scores over all heads and batch
    entries of the call (`calibrate_threshold` gives one for all layers, to be passed as a value);
    or a budget of keys per head and tile, spent on the best whole clusters (always at least one).

    With a coarse threshold or percentile, a two-level index is searched from the top: clusters are
    scored only under coarse clusters that pass, and only these are in the denominator.

    Attributes:
        index: clusters of the prefix, for the batch and KV heads of the call. None: the keys in
            front of the call's first row are the prefix and are clustered at every call. That
            costs far more than it saves, and is for trying the method out.
        threshold: of the score, strict; at 0 everything is kept.
        percentile: share of the clustered keys to leave out, in [0, 1).
        budget: clustered keys to keep at most.
        coarse_threshold: threshold of the coarse clusters' scores.
        coarse_percentile: or share of the clustered keys that coarse clusters leave out.
        group: "mean" or "max" of the scores of a group's query heads.
        tile: rows that choose for themselves, a multiple of 16; None: all rows of the call choose
            together, as in the paper. A tile that holds a row of the prefix sees all keys.
        ratio, observation_window, seed: of the clustering, without an index; see
            `CentroidIndex.fit`.

    Raises:
        TypeError, ValueError: a value is out of range, or not exactly one threshold is given.

    Example:
        >>> import torch, sparse_attn
        >>> k, v = torch.randn(2, 1, 2, 1000, 64)
        >>> index = sparse_attn.CentroidIndex.fit(k[:, :, :900], ratio=0.05)
        >>> question = torch.randn(1, 4, 100, 64)
        >>> out = sparse_attn.attention(question, k, v, index.lookup(percentile=0.7))

    Source: Hooper et al. 2024, arXiv:2411.09688; the lookup in two steps is the paper's
        hierarchical one, carried out.
    """

    data_dependent: ClassVar[bool] = True
    index: CentroidIndex | None = None
    threshold: float | None = None
    percentile: float | None = None
    budget: int | None = None
    coarse_threshold: float | None = None
    coarse_percentile: float | None = None
    group: Group = "mean"
    tile: int | None = None
    ratio: float = 0.05
    observation_window: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        owner = "CentroidLookup"
        given = [x is not None for x in (self.threshold, self.percentile, self.budget)]
        if sum(given) != 1:
            raise ValueError(
                f"sparse_attn.{owner}: {sum(given)} of threshold, percentile and budget are given; "
                "pass exactly one."
            )
        if self.coarse_threshold is not None and self.coarse_percentile is not None:
            raise ValueError(
                f"sparse_attn.{owner}: coarse_threshold and coarse_percentile are given; pass one."
            )
        for name in ("percentile", "coarse_percentile"):
            _check_percentile(owner, name, getattr(self, name))
        for name in ("threshold", "coarse_threshold"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"sparse_attn.{owner}: {name}={value}; pass a finite number.")
        if self.budget is not None:
            check_int(owner, "budget", self.budget, 1)
        _check_group(owner, self.group)
        if self.tile is not None:
            check_int(owner, "tile", self.tile, 16)
            if self.tile % 16 != 0:
                raise ValueError(
                    f"sparse_attn.{owner}: tile={self.tile} is not a multiple of 16; pass for "
                    "instance 64."
                )
        if self._two_level and (self.index is None or self.index.levels == 1):
            raise ValueError(
                f"sparse_attn.{owner}: a coarse threshold or percentile needs an index with two "
                "levels; pass one fitted with levels=2."
            )

    @property
    def _two_level(self) -> bool:
        return self.coarse_threshold is not None or self.coarse_percentile is not None

    def of_sequence(self, sequence: int) -> Pattern:
        """See `Pattern.of_sequence`: the lookup in one batch entry of the index."""
        if self.index is None:
            return self
        return replace(self, index=self.index.select(batch=sequence))

    def of_heads_kv(self, heads: Sequence[int]) -> Pattern:
        """See `Pattern.of_heads_kv`: the lookup in those heads of the index."""
        if self.index is None:
            return self
        return replace(self, index=self.index.select(heads=heads))

    def build(
        self,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool = True,
        softmax_scale: float | None = None,
        q_offset: int | None = None,
    ) -> SparseIndex:
        """See `Pattern.build`; the index has every KV head, in one tile or tiles of `tile` rows.

        Raises:
            ValueError: k cannot be the keys that the index was fitted to, and those behind.
        """
        return self.build_choice(q, k, softmax_scale=softmax_scale, q_offset=q_offset)[0]

    def build_choice(
        self,
        q: Tensor,
        k: Tensor,
        *,
        softmax_scale: float | None = None,
        q_offset: int | None = None,
    ) -> tuple[SparseIndex, Choice]:
        """As `build`, with the clusters that were kept for the tiles behind the prefix."""
        check_qk("CentroidLookup", q, k)
        offset = offset_or_default(q, k, q_offset)
        index = self._index_of(k, offset)
        seqlen_q, seqlen_k = q.shape[2], k.shape[2]
        first = min(max(0, index.length - offset), seqlen_q)  # the rows before are the prefix's own
        block_m = self.tile or (64 if first > 0 else _power(seqlen_q))
        tiles = -(-seqlen_q // block_m)
        dense = -(-first // block_m)
        rows = q[:, :, dense * block_m if self.tile else first :]
        scale = scale_or_default(q, softmax_scale)
        choice = self._choose(index, rows, scale, tiles - dense, self.tile)
        block_n = min(_power(seqlen_k), 1 << 20)
        lead = (k.shape[0], k.shape[1])
        heads, block_indptr, block_indices = _blocks(
            *lead,
            tiles,
            dense,
            index.clustered,
            -(-seqlen_k // block_n),
            -(-(seqlen_k - index.clustered) // block_n),
            block_n,
            k.device,
        )
        column_indptr = choice.indptr
        if dense:
            counts = torch.cat([choice.counts.new_zeros(*lead, dense), choice.counts], -1)
            column_indptr = indptr_from_counts(counts)
        built = SparseIndex.from_lists(
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            block_m=block_m,
            block_n=block_n,
            heads=heads,
            block_indptr=block_indptr,
            block_indices=block_indices,
            column_indptr=column_indptr,
            column_indices=choice.keys,
        )
        return built, choice

    def _index_of(self, k: Tensor, q_offset: int) -> CentroidIndex:
        if self.index is not None:
            self.index.check_keys("CentroidLookup", k)
            return self.index
        return CentroidIndex.fit(
            k[:, :, : max(0, min(q_offset, k.shape[2]))],
            ratio=self.ratio,
            observation_window=self.observation_window,
            seed=self.seed,
        )

    def _choose(
        self, index: CentroidIndex, q: Tensor, scale: float, tiles: int, tile: int | None
    ) -> Choice:
        """`tiles` choices: of the rows of each tile, or the same choice of all rows for each."""
        rows = tile or max(1, q.shape[2])
        by_value = self.percentile is None and self.coarse_percentile is None
        if by_value and (tile is not None or tiles == 1) and native_inputs(q, q):
            return Choice(*self._look_up(index, q, scale, rows))
        coarse_keep = None
        if self._two_level:
            scores = index.coarse_scores(q, tile_rows=rows, softmax_scale=scale, group=self.group)
            limit: float | Tensor | None = self.coarse_threshold
            assert index.coarse_counts is not None
            if limit is None:
                assert self.coarse_percentile is not None
                limit = _quantile([(scores, index.coarse_counts)], self.coarse_percentile)
            coarse_keep = _above(scores, limit)
        scores = index.scores(
            q, tile_rows=rows, softmax_scale=scale, group=self.group, coarse_keep=coarse_keep
        )
        if tile is None:
            scores = scores.expand(-1, -1, tiles, -1)
        threshold: float | Tensor = self.threshold or 0.0
        if self.percentile is not None:
            threshold = _quantile([(scores, index.counts)], self.percentile)
        keep, counts, keys = centroid_lists(
            scores, index.indptr, index.members, threshold=threshold, budget=self.budget
        )
        return Choice(keep, counts, indptr_from_counts(counts), keys)

    def _look_up(
        self, index: CentroidIndex, q: Tensor, scale: float, rows: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same in one operator, for thresholds that are known: what decoding does a token."""
        two_level = self._two_level
        return ops.centroid_lookup(
            q,
            index.centroids,
            index.counts,
            index.indptr,
            index.members,
            parents=index.parents if two_level else None,
            coarse_centroids=index.coarse_centroids if two_level else None,
            coarse_counts=index.coarse_counts if two_level else None,
            tile_rows=rows,
            softmax_scale=scale,
            reduce_max=self.group == "max",
            threshold=self.threshold or 0.0,
            budget=-1 if self.budget is None else self.budget,
            coarse_threshold=self.coarse_threshold or 0.0,
        )


def calibrate_threshold(
    indexes: CentroidIndex | Sequence[CentroidIndex],
    queries: Tensor | Sequence[Tensor],
    percentile: float,
    *,
    level: str = "fine",
    coarse_threshold: float | None = None,
    group: Group = "mean",
    softmax_scale: float | None = None,
) -> float:
    """One threshold for all layers and heads: the quantile of all their clustered keys' scores.

    The scores are those a lookup of all these queries at once computes, by the same rule: in two
    levels, clusters under a coarse cluster that does not pass are not scored, their keys count as
    0, and they are not in the denominator. So at these queries a lookup with the result keeps a
    share of 1 - percentile of the clustered keys, and heads share it as their scores demand.

    Args:
        indexes: of one or several layers.
        queries: for each index [batch, num_heads, n, head_dim]; the paper takes the prefix's last
            100 queries.
        percentile: share of the keys to leave out, in [0, 1).
        level: "fine", or "coarse" for a coarse threshold.
        coarse_threshold: of the lookup that the fine threshold is for; None for a flat one.
        group: as in the lookup.
        softmax_scale: default 1 / sqrt(head_dim).

    Returns:
        The threshold for `CentroidIndex.lookup`: a number, so a device is waited for, once.

    Raises:
        TypeError, ValueError: an argument is wrong; the text says what is allowed.

    Source: Hooper et al. 2024, arXiv:2411.09688, section 3.2.
    """
    owner = "calibrate_threshold"
    indexes = [indexes] if isinstance(indexes, CentroidIndex) else list(indexes)
    queries = [queries] if isinstance(queries, Tensor) else list(queries)
    if len(indexes) != len(queries) or not indexes:
        raise ValueError(
            f"sparse_attn.{owner}: {len(indexes)} indexes and {len(queries)} queries; pass one "
            "tensor of queries for every index, at least one."
        )
    _check_percentile(owner, "percentile", percentile)
    _check_group(owner, group)
    if level not in ("fine", "coarse"):
        raise ValueError(f"sparse_attn.{owner}: level={level!r}; pass 'fine' or 'coarse'.")
    parts = []
    for index, q in zip(indexes, queries, strict=True):
        heads = q.shape[1] if q.dim() == 4 else 0
        if heads == 0 or heads % max(1, index.num_heads_kv) != 0 or q.shape[2] == 0:
            raise ValueError(
                f"sparse_attn.{owner}: queries are {tuple(q.shape)} for an index with "
                f"{index.num_heads_kv} KV heads; pass [batch, a multiple of these heads, n, "
                "head_dim]."
            )
        scale = scale_or_default(q, softmax_scale)
        rows = q.shape[2]
        keep = None
        if level == "coarse" or coarse_threshold is not None:
            scores = index.coarse_scores(q, tile_rows=rows, softmax_scale=scale, group=group)
            assert index.coarse_counts is not None
            if level == "coarse":
                parts.append((scores, index.coarse_counts))
                continue
            assert coarse_threshold is not None
            keep = _above(scores, coarse_threshold)
        scores = index.scores(q, tile_rows=rows, softmax_scale=scale, group=group, coarse_keep=keep)
        parts.append((scores, index.counts))
    return float(_quantile(parts, percentile))


@functools.lru_cache(maxsize=64)
def _blocks(
    batch: int,
    heads: int,
    tiles: int,
    dense: int,
    clustered: int,
    all_blocks: int,
    tail_blocks: int,
    block_n: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """(heads, block_indptr, block_indices): all keys for the first tiles, the tail for the others.

    Kept, since decode asks for the same thousands of times: nobody changes an index's tensors.
    """
    with torch.inference_mode(False):
        every = torch.arange(all_blocks, dtype=torch.int32, device=device) * block_n
        tail = clustered + torch.arange(tail_blocks, dtype=torch.int32, device=device) * block_n
        lengths = torch.full((tiles,), tail_blocks, device=device)
        lengths[:dense] = all_blocks
        blocks = torch.cat([every.repeat(dense), tail.repeat(tiles - dense)])
        kinds = torch.zeros(heads, 4, dtype=torch.int32, device=device)
        kinds[:, 0] = int(HeadKind.LISTED)
        indptr = indptr_from_counts(lengths.expand(batch, heads, tiles))
        return kinds, indptr, blocks.repeat(batch * heads)


def _above(scores: Tensor, threshold: float | Tensor) -> Tensor:
    """The rule of `centroid_lists` without a budget."""
    above = scores.double() > threshold
    return (scores >= 0) & (above | (threshold <= 0))


def _quantile(parts: Sequence[tuple[Tensor, Tensor]], share: float) -> Tensor:
    """Quantile of the scores of single keys, linear between neighbours as `torch.quantile` is.

    Args:
        parts: scores [batch, heads, tiles, clusters] (not scored counts as 0) with the keys of each
            cluster, int [batch, heads, clusters].
        share: in [0, 1].

    Returns:
        float64 [], on the scores' device; 0 where no cluster has a key.
    """
    scores = torch.cat([s.clamp(min=0).flatten() for s, _ in parts])
    weights = torch.cat([c[:, :, None].expand_as(s).flatten() for s, c in parts])
    scores, order = scores.nan_to_num(0.0).sort()
    last = weights[order].long().cumsum(0)
    if len(last) == 0:
        return scores.new_zeros((), dtype=torch.float64)
    most = (last[-1:] - 1).clamp(min=0)
    place = share * most.double()
    low = place.floor().long()
    at = torch.searchsorted(last, torch.cat((low, torch.minimum(low + 1, most))), right=True)
    below, above = scores[at.clamp(max=len(last) - 1)].double()
    # Without a key every score is 0: of clusters that are not scored, or have none.
    return torch.where(last[-1] > 0, below + (above - below) * (place[0] - low[0]), 0.0)


def _power(n: int) -> int:
    """The least 64 * 2^i that is n or more: indexes of different calls can be brought together."""
    return 64 << max(0, (n - 1) // 64).bit_length()


def _check_percentile(owner: str, name: str, value: float | None) -> None:
    if value is not None and not 0.0 <= value < 1.0:
        raise ValueError(
            f"sparse_attn.{owner}: {name}={value} is not in [0, 1); pass the share of the keys to "
            "leave out, for instance 0.7."
        )


def _check_group(owner: str, group: str) -> None:
    if group not in ("mean", "max"):
        raise ValueError(f"sparse_attn.{owner}: group={group!r}; pass 'mean' or 'max'.")
