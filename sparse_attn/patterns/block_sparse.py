# SPDX-License-Identifier: Apache-2.0
"""BlockSparse: key blocks chosen a query tile by the score of their means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_attn.index import SparseIndex
from sparse_attn.lists import indptr_from_counts
from sparse_attn.patterns.base import (
    Pattern,
    check_blocks,
    check_int,
    check_qk,
    offset_or_default,
    scale_or_default,
)
from sparse_attn.selection import bands, mean_pool, pooled_scores, threshold_mask, top_k_mask

# density * blocks is meant as exact: 0.07 * 100 is 7, though the float product lies above it.
_CEIL_SLACK = 1e-9


@dataclass(frozen=True)
class BlockSparse(Pattern):
    """Key blocks whose mean key scores best against the mean query of a tile.

    score(tile, block) = softmax_scale * mean(q of the tile) . mean(k of the block), in float32, by
    query head (head h reads KV head h // group). A pair is allowed if the position of the tile's
    last row is at or past the block's first key (every pair, where attention is not causal). Of
    the allowed blocks of a tile these are kept:

    * forced: the first `sink_blocks` of the key axis, and `local_blocks` that end with the block
      of the position of the tile's last row;
    * with `top_k` or `density`, a budget of blocks: forced ones count towards it and all stay even
      if they exceed it; the rest goes by score descending, then index ascending;
    * with `threshold`, those whose probability (softmax over the tile's allowed blocks) is above.

    The original code leaves the scale out, averages zero padding into the last block, adds an
    empty block when the length is already a multiple, and does not force the diagonal, so a tile
    could lose its own keys. None of that is kept.

    Attributes:
        top_k: budget, in blocks.
        density: budget, as a share of the tile's allowed blocks, rounded up, in (0, 1].
        threshold: probability above which a block is kept, in [0, 1).
        block_m: rows of a tile, 1 or a multiple of 16.
        block_n: keys of a block, a multiple of 8.
        sink_blocks: forced first blocks.
        local_blocks: forced diagonal blocks.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: not exactly one of top_k, density and threshold is given, or a number is out of
            range.

    Example:
        >>> BlockSparse(top_k=16).top_k
        16

    Source:
        MInference (Jiang et al. 2024, arXiv:2407.02490), block-sparse head.
    """

    top_k: int | None = None
    density: float | None = None
    threshold: float | None = None
    block_m: int = 64
    block_n: int = 64
    sink_blocks: int = 1
    local_blocks: int = 1
    data_dependent: ClassVar[bool] = True
    row_local: ClassVar[bool] = True

    def __post_init__(self) -> None:
        given = {"top_k": self.top_k, "density": self.density, "threshold": self.threshold}
        named = [f"{name}={value!r}" for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise ValueError(
                f"sparse_attn.BlockSparse: {' and '.join(named) or 'no budget'} given; "
                "pass exactly one of top_k, density and threshold."
            )
        if self.top_k is not None:
            check_int("BlockSparse", "top_k", self.top_k, 1)
        _check_share("density", self.density, low_open=True)
        _check_share("threshold", self.threshold, low_open=False)
        check_blocks("BlockSparse", self.block_m, self.block_n)
        check_int("BlockSparse", "sink_blocks", self.sink_blocks, 0)
        check_int("BlockSparse", "local_blocks", self.local_blocks, 0)

    def build(
        self,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool = True,
        softmax_scale: float | None = None,
        q_offset: int | None = None,
    ) -> SparseIndex:
        """See `Pattern.build`; the index has every query head and no columns."""
        check_qk("BlockSparse", q, k)
        batch, heads, seqlen_q, _ = q.shape
        heads_kv, seqlen_k = k.shape[1], k.shape[2]
        scale = scale_or_default(q, softmax_scale)
        offset = offset_or_default(q, k, q_offset)
        q_means = mean_pool(q, self.block_m).flatten(0, 1)
        # Means are small: repeating them for the heads of a group costs little.
        k_means = mean_pool(k, self.block_n).repeat_interleave(heads // heads_kv, 1).flatten(0, 1)
        tiles, blocks = q_means.shape[1], k_means.shape[1]
        last = torch.arange(1, tiles + 1, device=q.device) * self.block_m
        last = last.clamp(max=seqlen_q) - 1 + offset
        starts = torch.arange(0, blocks * self.block_n, self.block_n, device=q.device).int()
        counts, indices = [], []
        for outer, inner in bands(batch * heads, tiles, blocks):
            scores = pooled_scores(q_means[outer, inner], k_means[outer], scale)
            kept = self._choose(scores, last[inner], causal)
            counts.append(kept.sum(-1).flatten())
            indices.append(starts.expand(kept.shape)[kept])
        return SparseIndex.from_lists(
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            block_m=self.block_m,
            block_n=self.block_n,
            block_indptr=indptr_from_counts(_cat(counts, starts).view(batch, heads, tiles)),
            block_indices=_cat(indices, starts),
        )

    def _choose(self, scores: Tensor, last: Tensor, causal: bool) -> Tensor:
        """The kept blocks, bool like scores float32 [..., tiles, blocks].

        `last` int64 [tiles] holds the position of each tile's last row.
        """
        number = torch.arange(scores.shape[-1], device=scores.device)
        diagonal = last.div(self.block_n, rounding_mode="floor").unsqueeze(-1)
        allowed = number <= diagonal if causal else torch.ones_like(number <= diagonal)
        near = (number <= diagonal) & (number > diagonal - self.local_blocks)
        forced = allowed & (near | (number < self.sink_blocks))
        if self.threshold is not None:
            return forced | (allowed & threshold_mask(scores, allowed, self.threshold))
        scores = scores.masked_fill(~allowed, -math.inf).masked_fill(forced, math.inf)
        if self.top_k is not None:
            kept = top_k_mask(scores, self.top_k)
        else:
            assert self.density is not None
            budget = allowed.sum(-1).double() * self.density
            budget = (budget - _CEIL_SLACK).ceil().long()
            # No tile allows more than all blocks, so the largest budget is known without a read.
            k_max = math.ceil(scores.shape[-1] * self.density)
            kept = top_k_mask(scores, budget.expand(scores.shape[:-1]), k_max=k_max)
        return forced | (allowed & kept)


def _cat(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(parts) if parts else like[:0]


def _check_share(name: str, value: object, *, low_open: bool) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"sparse_attn.BlockSparse: {name}={value!r} is a {type(value).__name__}; pass a float."
        )
    inside = 0 < value <= 1 if low_open else 0 <= value < 1
    if not inside:
        interval = "(0, 1]" if low_open else "[0, 1)"
        raise ValueError(
            f"sparse_attn.BlockSparse: {name}={value} is outside {interval}; pass a value inside."
        )
