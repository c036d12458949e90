# SPDX-License-Identifier: Apache-2.0
"""Selectors on a grid of query tiles x key blocks: budgets, cumulative shares, thresholds.

Each takes float32 scores and gives a bool mask. Order is score descending, then index ascending;
a NaN counts as -inf. On the CPU they are native, elsewhere plain torch with the same result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn import ops
from sparse_attn.index import SparseIndex
from sparse_attn.lists import indptr_from_counts, list_blocks
from sparse_attn.selection.selectors import top_k_mask


@dataclass(frozen=True)
class BlockGrid:
    """Which pairs of a query tile and a key block may be chosen, and which must be.

    The diagonal of a tile is the block that holds the position of the tile's last row. Causal, the
    blocks up to it are allowed, else all are. Of the allowed ones the first `sink_blocks`, and the
    `local_blocks` that end with the diagonal, are forced.

    Attributes:
        seqlen_q: query rows.
        seqlen_k: keys.
        block_m: rows of a tile.
        block_n: keys of a block.
        q_offset: position of query row 0 on the key axis.
        causal: whether blocks past the diagonal are excluded.
        sink_blocks: forced first blocks.
        local_blocks: forced diagonal blocks.
    """

    seqlen_q: int
    seqlen_k: int
    block_m: int
    block_n: int
    q_offset: int
    causal: bool = True
    sink_blocks: int = 0
    local_blocks: int = 0

    @property
    def tiles(self) -> int:
        """Query tiles."""
        return -(-self.seqlen_q // self.block_m)

    @property
    def blocks(self) -> int:
        """Key blocks."""
        return -(-self.seqlen_k // self.block_n)

    def diagonal(
        self, first_tile: int = 0, tiles: int | None = None, device: torch.device | None = None
    ) -> Tensor:
        """Diagonal blocks, int64 [tiles]; below 0 or past the last one where a tile lies there."""
        end = self.tiles if tiles is None else first_tile + tiles
        last = torch.arange(first_tile + 1, end + 1, device=device) * self.block_m
        last = last.clamp(max=self.seqlen_q) - 1 + self.q_offset
        return last.div(self.block_n, rounding_mode="floor")

    def allowed_counts(self, first_tile: int, tiles: int, device: torch.device) -> Tensor:
        """How many blocks are allowed, int64 [tiles]: the first ones."""
        if not self.causal:
            return torch.full((tiles,), self.blocks, device=device)
        return (self.diagonal(first_tile, tiles, device) + 1).clamp(0, self.blocks)

    def masks(self, first_tile: int, tiles: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(allowed, forced), bool [tiles, blocks]."""
        number = torch.arange(self.blocks, device=device)
        diagonal = self.diagonal(first_tile, tiles, device).unsqueeze(-1)
        allowed = number < self.allowed_counts(first_tile, tiles, device).unsqueeze(-1)
        near = (number <= diagonal) & (number > diagonal - self.local_blocks)
        return allowed, allowed & (near | (number < self.sink_blocks))

    def arguments(self, first_tile: int) -> ops.GridArgs:
        """What the native selectors take."""
        return {
            "first_tile": first_tile,
            "seqlen_q": self.seqlen_q,
            "block_m": self.block_m,
            "block_n": self.block_n,
            "q_offset": self.q_offset,
            "causal": self.causal,
            "sink_blocks": self.sink_blocks,
            "local_blocks": self.local_blocks,
        }


def block_top_k(scores: Tensor, k: int | Tensor, grid: BlockGrid, *, first_tile: int = 0) -> Tensor:
    """Marks the forced blocks of every tile and the best others, up to a budget.

    Forced blocks count towards the budget and all stay even if they exceed it.

    Args:
        scores: float32 [..., tiles, blocks], tiles from `first_tile` of the grid on.
        k: budget in blocks: one number, or an integer tensor broadcastable to [..., tiles], for
            instance [heads, 1] for a budget per head.
        grid: what may and what must be chosen.
        first_tile: number of the scores' first tile.

    Returns:
        bool [..., tiles, blocks].
    """
    tiles, blocks = scores.shape[-2:]
    lead = scores.shape[:-2]
    if ops.on_cpu(scores):
        budget = torch.as_tensor(k).clamp(0, blocks).to(torch.int32)
        whole = (1, 1) if budget.dim() == 0 else (math.prod(lead), tiles)
        budget = budget.expand(*lead, tiles) if budget.dim() else budget
        rows = _rows(scores)
        return ops.block_top_k(
            rows, budget.reshape(whole).contiguous(), grid.arguments(first_tile)
        ).view(scores.shape)
    return _top_k_torch(scores, k, grid, first_tile)


def _top_k_torch(scores: Tensor, k: int | Tensor, grid: BlockGrid, first_tile: int) -> Tensor:
    """`block_top_k` on any device."""
    lead, (tiles, blocks) = scores.shape[:-2], scores.shape[-2:]
    allowed, forced = grid.masks(first_tile, tiles, scores.device)
    ranked = scores.masked_fill(scores.isnan(), -math.inf)
    # A finite substitute: an allowed -inf still comes before what is not allowed.
    ranked = ranked.clamp(torch.finfo(torch.float32).min, torch.finfo(torch.float32).max)
    ranked = ranked.masked_fill(~allowed, -math.inf).masked_fill(forced, math.inf)
    # A number is filled in on the device: a copy would wait for it.
    budget = k if isinstance(k, Tensor) else torch.full((), k, device=scores.device)
    budget = budget.to(scores.device).expand(*lead, tiles)
    return forced | (allowed & top_k_mask(ranked, budget, k_max=blocks))


def block_top_p(
    scores: Tensor,
    share: float,
    grid: BlockGrid,
    *,
    logits: bool,
    whole: bool = False,
    first_tile: int = 0,
) -> Tensor:
    """Marks the forced blocks, then the fewest others, best first, that cover a share of the mass.

    A block is added while the mass marked before it is below share * total. Sums are float64.

    Args:
        scores: float32 [..., tiles, blocks].
        share: in (0, 1]; 1 marks all allowed blocks.
        grid: what may and what must be chosen.
        logits: whether a block's mass is the softmax of the scores over its tile's allowed blocks;
            else it is the score itself (a negative one counts as 0).
        whole: whether the share is of all tiles together, so that a tile with flat scores may keep
            less than another. Masses are then rounded to float32 before they are ordered, and
            `scores` holds all tiles of the grid.
        first_tile: number of the scores' first tile.

    Returns:
        bool [..., tiles, blocks].
    """
    if ops.on_cpu(scores):
        return ops.block_top_p(
            _rows(scores), share, logits=logits, whole=whole, grid=grid.arguments(first_tile)
        ).view(scores.shape)
    return _top_p_torch(scores, share, grid, logits, whole, first_tile)


def _top_p_torch(
    scores: Tensor, share: float, grid: BlockGrid, logits: bool, whole: bool, first_tile: int
) -> Tensor:
    """`block_top_p` on any device."""
    allowed, forced = grid.masks(first_tile, scores.shape[-2], scores.device)
    if share >= 1:
        return allowed.expand(scores.shape).clone()
    if logits:
        mass = _softmax(scores, allowed)
    else:
        mass = scores.double().nan_to_num(0.0, posinf=math.inf).clamp(min=0.0)
        mass = mass.masked_fill(~allowed, 0.0)
    order_by = scores.masked_fill(scores.isnan(), -math.inf) if logits else mass
    if whole:
        mass = mass.float().double()
        order_by = mass.flatten(-2)
        mass = mass.flatten(-2)
        allowed, forced = (x.flatten() for x in (allowed, forced))
    free = allowed & ~forced
    order_by = order_by.masked_fill(~free, -math.inf)
    order = order_by.sort(dim=-1, descending=True, stable=True).indices
    ordered = mass.masked_fill(~free, 0.0).gather(-1, order)
    before = ordered.cumsum(-1) - ordered + mass.masked_fill(~forced, 0.0).sum(-1, keepdim=True)
    taken = before < share * mass.sum(-1, keepdim=True)
    marked = torch.zeros_like(taken).scatter_(-1, order, taken)
    return (forced | (free & marked)).view(scores.shape)


def block_threshold(
    scores: Tensor, threshold: float, grid: BlockGrid, *, first_tile: int = 0
) -> Tensor:
    """Marks the forced blocks, and those whose share of their tile's softmax is above a threshold.

    Args:
        scores: float32 [..., tiles, blocks], logits; the softmax (float64) runs over a tile's
            allowed blocks.
        threshold: probability in [0, 1).
        grid: what may and what must be chosen.
        first_tile: number of the scores' first tile.

    Returns:
        bool [..., tiles, blocks].
    """
    if ops.on_cpu(scores):
        return ops.block_threshold(_rows(scores), threshold, grid.arguments(first_tile)).view(
            scores.shape
        )
    return _threshold_torch(scores, threshold, grid, first_tile)


def _threshold_torch(scores: Tensor, threshold: float, grid: BlockGrid, first_tile: int) -> Tensor:
    """`block_threshold` on any device."""
    allowed, forced = grid.masks(first_tile, scores.shape[-2], scores.device)
    return forced | (allowed & (_softmax(scores, allowed) > threshold))


def group_to_kv(x: Tensor, heads_kv: int, how: str) -> Tensor:
    """One grid per KV head out of those of its query heads.

    Args:
        x: [batch, heads, tiles, blocks], scores or a bool mask.
        heads_kv: heads of the result; a divisor of heads.
        how: "union" of masks; "sum", "max" or "mean" of scores.

    Returns:
        [batch, heads_kv, tiles, blocks], of x's dtype.

    Raises:
        ValueError: `how` does not fit the dtype, or the heads do not divide.
    """
    if (how == "union") != (x.dtype == torch.bool) or how not in ("union", "sum", "max", "mean"):
        raise ValueError(
            f"sparse_attn.selection.group_to_kv: how={how!r} for {x.dtype}; pass 'union' for a "
            "bool mask, or 'sum', 'max' or 'mean' for scores."
        )
    if heads_kv < 1 or x.shape[1] % heads_kv:
        raise ValueError(
            f"sparse_attn.selection.group_to_kv: {x.shape[1]} heads do not divide into {heads_kv}; "
            "pass a divisor."
        )
    grouped = x.reshape(x.shape[0], heads_kv, x.shape[1] // heads_kv, *x.shape[2:])
    if how == "union":
        return grouped.any(2)
    if how == "max":
        return grouped.amax(2)
    return grouped.sum(2) if how == "sum" else grouped.mean(2)


def blocks_index(
    masks: Sequence[Tensor], grid: BlockGrid, batch: int, heads: int, device: torch.device
) -> SparseIndex:
    """The index of a grid that comes in bands.

    Args:
        masks: bool [..., tiles, blocks], in the order of `selection.bands`: together they are
            [batch, heads, grid.tiles, grid.blocks].
        grid: the lengths and block sizes.
        batch: entries of the index.
        heads: heads of the index.
        device: where the index goes, also without a mask.
    """
    if len(masks) > 1 and not ops.on_cpu(masks[0]):  # there, lists of parts come with spare room
        masks = [torch.cat([mask.flatten(0, -2) for mask in masks])]
    parts = [list_blocks(mask, grid.block_n) for mask in masks]
    if not parts:
        parts = [list_blocks(torch.empty(0, 0, dtype=torch.bool, device=device), grid.block_n)]
    counts, indices = (
        part[0] if len(part) == 1 else torch.cat([x.flatten() for x in part])
        for part in zip(*parts, strict=True)
    )
    return SparseIndex.from_lists(
        seqlen_q=grid.seqlen_q,
        seqlen_k=grid.seqlen_k,
        block_m=grid.block_m,
        block_n=grid.block_n,
        block_indptr=indptr_from_counts(counts.view(batch, heads, grid.tiles)),
        block_indices=indices,
    )


def _rows(scores: Tensor) -> Tensor:
    return scores.reshape(math.prod(scores.shape[:-2]), *scores.shape[-2:]).contiguous()


def _softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """float64; a tile without a finite score is all zero."""
    logits = scores.masked_fill(scores.isnan(), -math.inf).double()
    return torch.softmax(logits.masked_fill(~allowed, -math.inf), dim=-1).nan_to_num(0.0)
