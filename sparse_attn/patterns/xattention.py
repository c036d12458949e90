# SPDX-License-Identifier: Apache-2.0
"""XAttention: blocks by the sums of their antidiagonals, up to a share of the mass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparse_attn.index import SparseIndex
from sparse_attn.patterns.base import (
    BlockPattern,
    check_int,
    check_qk,
    scale_or_default,
)
from sparse_attn.patterns.block_rule import check_share
from sparse_attn.selection import antidiagonal_scores, block_top_p, blocks_index


@dataclass(frozen=True)
class XAttention(BlockPattern):
    """The fewest blocks that hold a share of the mass that antidiagonals estimate.

    Rows and keys are seen in cells of `stride`; a cell's logit is the mean of the scaled q . k over
    its antidiagonal, which every row and every key of the cell takes part in. A row of cells is
    normalised (softmax) over the cells up to its own, and the probabilities are summed by block.
    Of each tile, the first blocks and the diagonal ones are kept; then, by mass, the fewest others,
    a block being added while the mass kept before it is below `threshold` of the tile's.

    Attributes:
        stride: rows and keys of a cell (tokens); a divisor of block_m and block_n. The estimate
            costs seqlen_q * seqlen_k * head_dim / (2 * stride) multiply-adds.
        threshold: share of a tile's estimated mass, in (0, 1]; 1 keeps all blocks.
        block_m: rows of a tile, a multiple of 16.
        block_n: keys of a block, a multiple of 8.
        sink_blocks: forced first blocks.
        local_blocks: forced diagonal blocks.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, or stride does not divide the blocks.

    Example:
        >>> XAttention(stride=8).threshold
        0.9

    Source:
        Xu et al. 2025, arXiv:2503.16428, written from the paper's text.
    """

    stride: int = 16
    threshold: float = 0.9
    block_m: int = 128
    block_n: int = 128
    sink_blocks: int = 1
    local_blocks: int = 1
    data_dependent: ClassVar[bool] = True
    approximates: ClassVar[bool] = True
    row_local: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_int("XAttention", "stride", self.stride, 1)
        check_share("XAttention", "threshold", self.threshold)
        self._check_fields()
        for name, block in (("block_m", self.block_m), ("block_n", self.block_n)):
            if block % self.stride:
                raise ValueError(
                    f"sparse_attn.XAttention: stride={self.stride} does not divide {name}={block}; "
                    "pass a divisor of both blocks, for instance 8 or 16."
                )

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
        check_qk("XAttention", q, k)
        grid = self._grid(q, k, causal=causal, q_offset=q_offset)
        scores = antidiagonal_scores(
            q,
            k,
            stride=self.stride,
            block_m=self.block_m,
            block_n=self.block_n,
            softmax_scale=scale_or_default(q, softmax_scale),
            q_offset=grid.q_offset,
            causal=causal,
        )
        mask = block_top_p(scores, self.threshold, grid, logits=False)
        return blocks_index([mask], grid, q.shape[0], q.shape[1], q.device)
