# SPDX-License-Identifier: Apache-2.0
"""BlockSparse: key blocks chosen a query tile by the score of their means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparse_attn.index import SparseIndex
from sparse_attn.patterns.base import (
    BlockPattern,
    check_qk,
    scale_or_default,
)
from sparse_attn.patterns.block_rule import BlockRule
from sparse_attn.selection import BlockGrid, bands, blocks_index, mean_pool, pooled_scores


@dataclass(frozen=True)
class BlockSparse(BlockPattern):
    """Key blocks whose mean key scores best against the mean query of a tile.

    score(tile, block) = softmax_scale * mean(q of the tile) . mean(k of the block), in float32, by
    query head (head h reads KV head h // group). A pair is allowed if the position of the tile's
    last row is at or past the block's first key (every pair, where attention is not causal). Of
    the allowed blocks of a tile these are kept:

    * forced: the first `sink_blocks` of the key axis, and `local_blocks` that end with the block
      of the position of the tile's last row;
    * with `top_k` or `density`, a budget of blocks: forced ones count towards it and all stay even
      if they exceed it; the rest goes by score descending, then index ascending;
    * with `top_p`, the fewest, forced ones first and then by the same order, that hold this share
      of the tile's probability (softmax over its allowed blocks);
    * with `threshold`, those whose probability is above.

    The original code leaves the scale out, averages zero padding into the last block, adds an
    empty block when the length is already a multiple, and does not force the diagonal, so a tile
    could lose its own keys. None of that is kept.

    Attributes:
        top_k: budget, in blocks.
        density: budget, as a share of the tile's allowed blocks, rounded up, in (0, 1].
        top_p: share of a tile's probability that its blocks hold, in (0, 1].
        threshold: probability above which a block is kept, in [0, 1).
        block_m: rows of a tile, 1 or a multiple of 16.
        block_n: keys of a block, a multiple of 8.
        sink_blocks: forced first blocks.
        local_blocks: forced diagonal blocks.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: not exactly one of top_k, density, top_p and threshold is given, or a number is
            out of range.

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
    top_p: float | None = None
    data_dependent: ClassVar[bool] = True
    approximates: ClassVar[bool] = True
    row_local: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._rule()
        self._check_fields()

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
        grid = self._grid(q, k, causal=causal, q_offset=q_offset)
        rule = self._rule()
        masks = [
            rule.choose(scores, grid, logits=True, first_tile=tiles.start)
            for _, tiles, scores in pooled_bands(q, k, grid, scale_or_default(q, softmax_scale))
        ]
        return blocks_index(masks, grid, q.shape[0], q.shape[1], q.device)

    def _rule(self) -> BlockRule:
        return BlockRule("BlockSparse", self.top_k, self.density, self.top_p, self.threshold)


def pooled_bands(
    q: Tensor, k: Tensor, grid: BlockGrid, scale: float
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Scores of the means of tiles and blocks, a band at a time.

    Args:
        q: [batch, heads, seqlen_q, head_dim].
        k: [batch, heads_kv, seqlen_k, head_dim].
        grid: tiles and blocks.
        scale: factor of the dot products.

    Yields:
        (slice of batch * heads, slice of tiles, scores float32 of these [..., tiles, blocks]).
    """
    q_means = mean_pool(q, grid.block_m).flatten(0, 1)
    # Means are small: repeating them for the heads of a group costs little.
    group = q.shape[1] // k.shape[1]
    k_means = mean_pool(k, grid.block_n).repeat_interleave(group, 1).flatten(0, 1)
    for outer, inner in bands(q_means.shape[0], grid.tiles, grid.blocks):
        yield outer, inner, pooled_scores(q_means[outer, inner], k_means[outer], scale)
