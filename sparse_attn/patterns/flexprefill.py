# SPDX-License-Identifier: Apache-2.0
"""FlexPrefill: every head chooses between pooled blocks and vertical-slash, block by block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn import ops
from sparse_attn.index import SparseIndex
from sparse_attn.patterns.base import (
    Pattern,
    check_blocks,
    check_int,
    check_qk,
    offset_or_default,
    scale_or_default,
)
from sparse_attn.patterns.block_rule import check_share
from sparse_attn.selection import (
    BlockGrid,
    bands,
    block_top_k,
    block_top_p,
    blocks_index,
    mean_pool,
    pooled_scores,
    window_scores,
)


@dataclass(frozen=True)
class FlexPrefill(Pattern):
    """Pooled blocks where they estimate well, else verticals and slashes; up to a share gamma.

    The last `block` rows of a head are attended exactly. If the distribution over key blocks that
    their mean and the blocks' means give is close to the true one (square root of the
    Jensen-Shannon divergence, natural logarithm, below `tau`), the head is query-aware:

    * query-aware: mean scores of all tiles and blocks, softmax by tile, and of the whole grid
      together the fewest pairs that hold a share `gamma` of the mass, forced ones first;
    * vertical-slash: the fewest keys, and the fewest distances, that hold a share `gamma` of the
      last rows' probability; count // block + 1 blocks of keys (best sums first), as many block
      distances accordingly, each at least min_budget and at most max_budget. A tile keeps a block
      if either its number or its distance from the tile's diagonal block is chosen.

    A query-aware head also keeps the best verticals and slashes of min_budget. The first block and
    the diagonal are always kept. The choice is made by the last rows, so a prefill in chunks
    chooses for every chunk anew.

    Attributes:
        gamma: share of the mass, in (0, 1]; 1 keeps all blocks.
        tau: distance below which a head is query-aware, at least 0 (0: none is).
        min_budget: fewest verticals and slashes, each, in tokens.
        max_budget: most of either, in tokens; None for no bound.
        block: rows of a tile, keys of a block and rows that are attended exactly; a multiple of 16.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range.

    Example:
        >>> FlexPrefill(gamma=0.95).block
        128

    Source:
        Lai et al. 2025, arXiv:2502.20766.
    """

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int | None = None
    block: int = 128
    data_dependent: ClassVar[bool] = True
    approximates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("FlexPrefill", "gamma", self.gamma)
        if isinstance(self.tau, bool) or not isinstance(self.tau, (int, float)):
            raise TypeError(
                f"sparse_attn.FlexPrefill: tau={self.tau!r} is a {type(self.tau).__name__}; "
                "pass a float."
            )
        if not self.tau >= 0:
            raise ValueError(
                f"sparse_attn.FlexPrefill: tau={self.tau} is negative; pass 0 or more."
            )
        check_int("FlexPrefill", "min_budget", self.min_budget, 0)
        check_blocks("FlexPrefill", self.block, self.block)
        if self.max_budget is not None:
            check_int("FlexPrefill", "max_budget", self.max_budget, self.min_budget)

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
        check_qk("FlexPrefill", q, k)
        offset = offset_or_default(q, k, q_offset)
        grid = BlockGrid(q.shape[2], k.shape[2], self.block, self.block, offset, causal, 1, 1)
        batch, heads = q.shape[:2]
        if grid.tiles == 0 or grid.blocks == 0 or batch * heads == 0:
            shape = (batch, heads, grid.tiles, grid.blocks)
            empty = torch.zeros(shape, dtype=torch.bool, device=q.device)
            return blocks_index([empty], grid, batch, heads, q.device)
        scale = scale_or_default(q, softmax_scale)
        columns, diagonals = (
            x.flatten(0, 1)
            for x in window_scores(
                q,
                k,
                last_q=self.block,
                num_distances=max(0, q.shape[2] + offset),
                softmax_scale=scale,
                q_offset=offset,
                causal=causal,
            )
        )
        k_means = mean_pool(k, self.block).repeat_interleave(heads // k.shape[1], 1).flatten(0, 1)
        last = q[:, :, -self.block :].mean(2, dtype=torch.float32).reshape(batch * heads, 1, -1)
        verticals, slashes = _block_sums(columns, self.block), _block_sums(diagonals, self.block)
        distance = _divergence(pooled_scores(last, k_means, scale)[:, 0], verticals, grid).sqrt()
        query_aware = distance < self.tau
        vertical = self._best(columns, verticals, query_aware)
        slash = self._best(diagonals, slashes, query_aware)
        # Only the query-aware heads need it; to know which they are, a device would have to wait.
        which = query_aware.nonzero()[:, 0] if ops.on_cpu(q) else None
        q_means = mean_pool(q, self.block).flatten(0, 1)
        masks = []
        for some, _ in bands(batch * heads, 1, grid.tiles * grid.blocks):
            mask = _vertical_slash_blocks(vertical[some], slash[some], grid)
            if which is None:
                scores = pooled_scores(q_means[some], k_means[some], scale)
                best = block_top_p(scores, self.gamma, grid, logits=True, whole=True)
                mask |= best & query_aware[some, None, None]
            elif (inside := which[(which >= some.start) & (which < some.stop)]).numel():
                scores = pooled_scores(q_means[inside], k_means[inside], scale)
                mask[inside - some.start] |= block_top_p(
                    scores, self.gamma, grid, logits=True, whole=True
                )
            masks.append(mask)
        return blocks_index(masks, grid, batch, heads, q.device)

    def _best(self, tokens: Tensor, sums: Tensor, query_aware: Tensor) -> Tensor:
        """Best blocks of keys, or of distances, bool like sums [heads, blocks].

        tokens float32 [heads, n] are the masses that sums is of, by block.
        """
        n = tokens.shape[-1]
        line = BlockGrid(1, n, 1, 1, 0, causal=False)
        needed = block_top_p(tokens.unsqueeze(1), self.gamma, line, logits=False).sum(-1)[:, 0]
        least = -(-self.min_budget // self.block)
        most = sums.shape[-1] if self.max_budget is None else -(-self.max_budget // self.block)
        budget = (needed // self.block + 1).clamp(least, max(least, most))
        budget = budget.masked_fill(query_aware, least)
        blocks = BlockGrid(1, sums.shape[-1], 1, 1, 0, causal=False)
        return block_top_k(sums.unsqueeze(1), budget.unsqueeze(-1), blocks)[:, 0]


def _block_sums(masses: Tensor, block: int) -> Tensor:
    """float32 [heads, n] summed in runs of `block`."""
    padded = F.pad(masses, (0, -masses.shape[-1] % block))
    return padded.view(masses.shape[0], padded.shape[-1] // block, block).sum(-1)


def _divergence(logits: Tensor, masses: Tensor, grid: BlockGrid) -> Tensor:
    """Jensen-Shannon divergence, float64 [heads], of two distributions over the key blocks.

    One is the softmax of logits over what the last tile may see, the other masses over their sum.
    """
    allowed, _ = grid.masks(grid.tiles - 1, 1, logits.device)
    estimate = torch.softmax(logits.double().masked_fill(~allowed, -math.inf), -1).nan_to_num(0.0)
    true = masses.double() / masses.double().sum(-1, keepdim=True).clamp(min=1e-300)
    middle = (estimate + true) / 2
    parts = [torch.xlogy(p, p) - torch.xlogy(p, middle) for p in (estimate, true)]
    return ((parts[0] + parts[1]).sum(-1) / 2).clamp(min=0.0)


def _vertical_slash_blocks(vertical: Tensor, slash: Tensor, grid: BlockGrid) -> Tensor:
    """Allowed blocks whose number is in `vertical` or distance in `slash`, and forced ones.

    bool [heads, blocks] and [heads, distances] in, [heads, tiles, blocks] out.
    """
    allowed, forced = grid.masks(0, grid.tiles, vertical.device)
    diagonal = grid.diagonal(device=vertical.device).unsqueeze(-1)
    distance = diagonal - torch.arange(grid.blocks, device=vertical.device)
    # Distances that are not there (negative ones where attention is not causal) read the padding.
    padded = F.pad(slash, (0, 1))
    number = distance.where((distance >= 0) & (distance < slash.shape[-1]), slash.shape[-1])
    return allowed & (forced | vertical.unsqueeze(1) | padded[:, number])
