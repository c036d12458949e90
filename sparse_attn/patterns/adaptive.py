# SPDX-License-Identifier: Apache-2.0
"""Adaptive: the fewest single keys that keep a share of the attention, tile by tile."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn import ops
from sparse_attn.index import SparseIndex
from sparse_attn.lists import indptr_from_counts, list_blocks
from sparse_attn.patterns.base import (
    MAX_INDEX_BYTES,
    Pattern,
    check_blocks,
    check_int,
    check_qk,
    offset_or_default,
    scale_or_default,
)
from sparse_attn.selection.estimators import native_inputs

GRANULE = 16
"""Keys of a block in the lists."""
_SOLID = 12  # chosen keys that make a granule a block
_CHECKS = 2  # rows of a tile that check its choice: the middles of its halves
_LEVELS = 126  # quarter octaves that are told apart

# 1 - mass = _FACTOR * (1 - recall) ** _EXPONENT: estimated mass that realises a recall, for mean
# queries see less of a row's tail than is there; and likewise what a checking row may miss. Fitted
# on SmolLM2-135M and the help topics of Python (docs/adaptive.md).
_FACTOR, _EXPONENT = 5.4, 1.64
_GUARD_FACTOR, _GUARD_EXPONENT = 1.78, 1.08


@dataclass(frozen=True)
class Adaptive(Pattern):
    """The fewest keys that keep a share `recall` of the attention mass; nothing to calibrate.

    The mean query of a tile ranks single keys almost as their true mass in the tile does, for a
    small part of the work of q . k. What a tile takes follows from its own scores: a head that
    looks at a few keys gets a few, one that looks everywhere gets most. Two rows of the tile check
    the choice: rows that disagree (each row of a retrieval head looks somewhere else) have a mean
    that says nothing, and their tile grows until both rows are served. The first keys and those
    near the tile are kept in any case; where they hold more of the mass than was asked for, so much
    is kept. The first key often holds most and gives next to no value, and what is left must still
    make the output, so the default is high.

    For a tile of m rows of a head, with S the sum of its query rows, q_c each of its rows m // 4
    and 3 m // 4, and keys j below `limit` (the position of the last row plus 1 where attention is
    causal, clamped to the keys that exist), all in float32:

        x_j = (4 log2(e) softmax_scale / m) * (S . k_j)
        level_j = min(floor(max_i x_i - x_j), 125),  weight_j = round(2 ** (31 - level_j / 4)),

    level 125 weighing nothing. So a weight is the estimated softmax, rounded down to a quarter
    octave, in integers: sums of weights are exact. The check weights are the same of q_c alone
    (m = 1 in the factor), nothing for keys that this row does not see. Kept are:

    * forced: the first `sink` keys, the `window` keys before the position of the tile's first row,
      and those at the positions of its rows;
    * then levels of the other keys from the best on, whole, until the weight of all that is kept is
      at least ceil(mass * weight of all keys below the limit) and either check weight at least
      ceil(guard * that check weight of all of them); if the latter held before the last of these
      levels, that level gives only as many keys as the former needs, by index ascending. Here

          1 - mass = 5.4 (1 - recall) ** 1.64,    1 - guard = 1.78 (1 - recall) ** 1.08,

      each at least 0: what realises `recall` in the mean over rows, for a mean query sees less of
      the tail than its rows do;
    * all keys below the limit, if the largest x_j is not finite. A NaN has level 125.

    Aligned granules of 16 keys of which 12 or more (or all that are below the limit) are kept
    become blocks, and so wholly visible; all other kept keys are columns.

    Attributes:
        recall: share of the softmax mass that stays, in the mean over rows, in (0, 1].
        block_m: rows of a tile, 1 or a multiple of 16.
        sink: forced first keys, in tokens.
        window: forced keys before a tile, in tokens.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range.

    Example:
        >>> Adaptive().recall
        0.98

    Source:
        This project; docs/adaptive.md has the experiments.
    """

    recall: float = 0.98
    block_m: int = 128
    sink: int = 4
    window: int = 128
    data_dependent: ClassVar[bool] = True
    approximates: ClassVar[bool] = True
    row_local: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.recall, bool) or not isinstance(self.recall, (int, float)):
            raise TypeError(
                f"sparse_attn.Adaptive: recall={self.recall!r} is a "
                f"{type(self.recall).__name__}; pass a float."
            )
        if not 0 < self.recall <= 1:
            raise ValueError(
                f"sparse_attn.Adaptive: recall={self.recall} is outside (0, 1]; pass for instance "
                "0.98."
            )
        check_blocks("Adaptive", self.block_m, GRANULE)
        check_int("Adaptive", "sink", self.sink, 0)
        check_int("Adaptive", "window", self.window, 0)

    @property
    def mass(self) -> float:
        """The share of the estimated mass that a tile keeps."""
        missing: float = _FACTOR * (1.0 - self.recall) ** _EXPONENT
        return max(0.0, 1.0 - missing)

    @property
    def guard(self) -> float:
        """The share of its checking rows' mass that a tile keeps."""
        missing: float = _GUARD_FACTOR * (1.0 - self.recall) ** _GUARD_EXPONENT
        return max(0.0, 1.0 - missing)

    def band_rows(self, q: Tensor, k: Tensor) -> int | None:
        """See `Pattern.band_rows`: a tile lists at most 11 of 16 keys as columns."""
        tile_bytes = max(1, q.shape[0] * q.shape[1] * k.shape[2] * 4 * (_SOLID - 1) // GRANULE)
        return max(1, MAX_INDEX_BYTES // tile_bytes) * self.block_m

    def build(
        self,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool = True,
        softmax_scale: float | None = None,
        q_offset: int | None = None,
    ) -> SparseIndex:
        """See `Pattern.build`; the index has every query head."""
        check_qk("Adaptive", q, k)
        lists = ops.adaptive_lists if native_inputs(q, k) else adaptive_lists
        block_counts, blocks, column_counts, columns = lists(
            q,
            k,
            mass=self.mass,
            guard=self.guard,
            block_m=self.block_m,
            sink=self.sink,
            window=self.window,
            q_offset=offset_or_default(q, k, q_offset),
            causal=causal,
            softmax_scale=scale_or_default(q, softmax_scale),
        )
        return SparseIndex.from_lists(
            seqlen_q=q.shape[2],
            seqlen_k=k.shape[2],
            block_m=self.block_m,
            block_n=GRANULE,
            block_indptr=indptr_from_counts(block_counts),
            block_indices=blocks,
            column_indptr=indptr_from_counts(column_counts),
            column_indices=columns,
        )


def adaptive_lists(
    q: Tensor,
    k: Tensor,
    *,
    mass: float,
    guard: float,
    block_m: int,
    sink: int,
    window: int,
    q_offset: int,
    causal: bool,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The lists of `Adaptive` in plain torch, a row of tiles at a time; for any device and dtype.

    Args:
        q: [batch, num_heads, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        mass: share of the estimated mass to keep, in [0, 1].
        guard: share of a tile's checking rows' mass to keep, in [0, 1].
        block_m: rows of a tile.
        sink: forced first keys.
        window: forced keys before a tile.
        q_offset: position of query row 0.
        causal: whether a tile sees no key past its last row.
        softmax_scale: factor of q . k.

    Returns:
        Blocks a tile int64 [batch, num_heads, tiles], first keys of the blocks int32, columns a
        tile, columns int32; lists in the order of the tiles, ascending within one. On a device
        other than the CPU the counts fill the other two in part: nothing is read back.
    """
    batch, heads, seqlen_q, _ = q.shape
    heads_kv, seqlen_k = k.shape[1], k.shape[2]
    keys = k.float()
    position = torch.arange(seqlen_k, device=q.device)
    solid, single = [], []
    for first in range(0, seqlen_q, block_m):
        rows = min(block_m, seqlen_q - first)
        total = q[:, :, first : first + rows].sum(2, dtype=torch.float32)
        checking = [first + rows * (2 * c + 1) // (2 * _CHECKS) for c in range(_CHECKS)]
        probes = torch.stack((total, *(q[:, :, r].float() for r in checking)), 2)
        grouped = probes.view(batch, heads_kv, (1 + _CHECKS) * (heads // heads_kv), -1)
        scores = torch.matmul(grouped, keys.transpose(-1, -2)).view(
            batch, heads, 1 + _CHECKS, seqlen_k
        )
        own_end = min(max(first + rows + q_offset, 0), seqlen_k)
        below = position < (own_end if causal else seqlen_k)
        near = (position >= first + q_offset - window) & (position < own_end)
        seen = torch.stack([position <= r + q_offset if causal else below for r in checking])
        scale = 4 / math.log(2) * softmax_scale
        factor = torch.full((1 + _CHECKS, 1), scale, device=q.device)
        factor[0] = scale / rows
        scaled = scores * factor
        forced = below & (near | (position < sink))
        chosen = _choose(scaled[:, :, 0], scaled[:, :, 1:], below, seen, forced, mass, guard)
        count, full = (_by_granule(x) for x in (chosen, below))
        full = full.clamp(max=_SOLID)
        solid.append((count >= full) & (count > 0))
        single.append(chosen & ~solid[-1].repeat_interleave(GRANULE, -1)[..., :seqlen_k])
    if not solid:
        none = position[:0].int()
        return q.new_zeros((batch, heads, 0), dtype=torch.int64), none, none.long(), none
    blocks, columns = torch.stack(solid, 2), torch.stack(single, 2)
    return *list_blocks(blocks, GRANULE), *list_blocks(columns, 1)


def _by_granule(marks: Tensor) -> Tensor:
    """How many of bool [..., keys] are set in every granule, int64 [..., granules]."""
    padded = F.pad(marks, (0, -marks.shape[-1] % GRANULE))
    return padded.view(*marks.shape[:-1], padded.shape[-1] // GRANULE, GRANULE).sum(-1)


def _choose(
    x: Tensor,
    check: Tensor,
    below: Tensor,
    seen: Tensor,
    forced: Tensor,
    mass: float,
    guard: float,
) -> Tensor:
    """The kept keys of one tile of every head.

    Args:
        x: float32 [batch, heads, keys] of the tile's sum.
        check: float32 [batch, heads, checks, keys], the same of its checking rows.
        below: bool [keys], below the tile's limit.
        seen: bool [checks, keys], seen by a checking row.
        forced: bool [keys], kept in any case.
        mass: share of the estimated mass.
        guard: share of each checking row's mass.

    Returns:
        bool like x.
    """
    if x.shape[-1] == 0:
        return x.bool()
    level, weight, top = _levels(x, below)
    _, check_weight, _ = _levels(check, below & seen)
    target = (mass * weight.sum(-1, keepdim=True).double()).ceil().long()
    check_target = (guard * check_weight.sum(-1, keepdim=True).double()).ceil().long()
    level = level.masked_fill(forced, -1)
    # What all better keys weigh; a key is kept if that is too little.
    order = level.masked_fill(~below, _LEVELS).sort(dim=-1, stable=True)
    sorted_weight = weight.gather(-1, order.indices)
    before = torch.zeros_like(weight)
    before.scatter_(-1, order.indices, sorted_weight.cumsum(-1) - sorted_weight)
    # What better levels hold of the checking rows; place 0 is the forced keys.
    place = (level + 1).unsqueeze(2).expand(check_weight.shape)
    checked = check_weight.new_zeros((*check_weight.shape[:-1], _LEVELS + 1))
    checked = checked.scatter_add(-1, place, check_weight)
    checked_before = (checked.cumsum(-1) - checked).gather(-1, place)
    kept = (before < target) | (checked_before < check_target).any(2)
    return (kept | forced | ~top.isfinite()) & below


def _levels(x: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, weights (0 where not allowed) and the largest of x over the allowed keys."""
    x = x.masked_fill(~allowed, -math.inf)
    top = x.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).amax(-1, keepdim=True)
    gap = (top - x).nan_to_num(nan=math.inf, posinf=math.inf)
    level = gap.clamp(max=_LEVELS - 1).long()  # not below 0: truncation is the floor
    steps = torch.arange(_LEVELS, dtype=torch.float64, device=x.device)
    weights = (2.0 ** (31 - steps / 4)).round().long()
    weights[-1] = 0
    return level, weights[level].masked_fill(~allowed, 0), top
