# SPDX-License-Identifier: Apache-2.0
"""SpargeAttention's choice of blocks: means, where a mean stands for its block."""

from __future__ import annotations

import math
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
from sparse_attn.patterns.block_sparse import pooled_bands
from sparse_attn.selection import block_similarity, blocks_index


@dataclass(frozen=True)
class SpargeAttention(BlockPattern):
    """Blocks by the scores of their means, and all of those whose rows are not alike.

    The self-similarity of a run of rows is the mean cosine over all its pairs. A key block below
    `similarity` is kept by every tile and takes no part in the choice of others; a query tile below
    it keeps every allowed block. The other tiles choose among the other blocks by mean scores:
    the fewest with `top_p` of the softmax, or a share `density` of the allowed blocks.

    Attributes:
        top_p: share of a tile's probability, in (0, 1]; the paper's cdf threshold.
        density: share of a tile's allowed blocks, rounded up, in (0, 1]; pass top_p=None with it.
        similarity: cosine below which a block is not stood for by its mean, in [-1, 1].
        block_m: rows of a tile, 1 or a multiple of 16.
        block_n: keys of a block, a multiple of 8.
        sink_blocks: forced first blocks.
        local_blocks: forced blocks that end with the diagonal.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, or not exactly one of top_p and density is given.

    Example:
        >>> SpargeAttention(top_p=None, density=0.5, similarity=-0.1).density
        0.5

    Source:
        Zhang et al. 2025, arXiv:2502.18137, without its quantisation and its skipped products.
    """

    top_p: float | None = 0.98
    density: float | None = None
    similarity: float = 0.6
    block_m: int = 128
    block_n: int = 64
    sink_blocks: int = 0
    local_blocks: int = 2
    data_dependent: ClassVar[bool] = True
    approximates: ClassVar[bool] = True
    row_local: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._rule()
        if isinstance(self.similarity, bool) or not isinstance(self.similarity, (int, float)):
            raise TypeError(
                f"sparse_attn.SpargeAttention: similarity={self.similarity!r} is a "
                f"{type(self.similarity).__name__}; pass a float."
            )
        if not -1 <= self.similarity <= 1:
            raise ValueError(
                f"sparse_attn.SpargeAttention: similarity={self.similarity} is outside [-1, 1]; "
                "pass a cosine."
            )
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
        check_qk("SpargeAttention", q, k)
        grid = self._grid(q, k, causal=causal, q_offset=q_offset)
        rule = self._rule()
        mixed_rows = (block_similarity(q, self.block_m) < self.similarity).flatten(0, 1)
        mixed_keys = block_similarity(k, self.block_n) < self.similarity
        mixed_keys = mixed_keys.repeat_interleave(q.shape[1] // k.shape[1], 1).flatten(0, 1)
        masks = []
        for some, tiles, scores in pooled_bands(q, k, grid, scale_or_default(q, softmax_scale)):
            always = mixed_keys[some].unsqueeze(-2)
            chosen = rule.choose(
                scores.masked_fill(always, -math.inf), grid, logits=True, first_tile=tiles.start
            )
            allowed, _ = grid.masks(tiles.start, scores.shape[-2], q.device)
            masks.append(allowed & (chosen | always | mixed_rows[some, tiles].unsqueeze(-1)))
        return blocks_index(masks, grid, q.shape[0], q.shape[1], q.device)

    def _rule(self) -> BlockRule:
        return BlockRule("SpargeAttention", density=self.density, top_p=self.top_p)
