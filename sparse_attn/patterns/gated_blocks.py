# SPDX-License-Identifier: Apache-2.0
"""Blocks chosen from scores that someone else computes: a learned gate's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparse_attn.index import SparseIndex
from sparse_attn.patterns.base import (
    BlockPattern,
    check_blocks,
    check_int,
    check_qk,
    offset_or_default,
)
from sparse_attn.patterns.block_rule import BlockRule
from sparse_attn.selection import BlockGrid, blocks_index


def block_scores_index(
    scores: Tensor,
    *,
    seqlen_q: int,
    seqlen_k: int,
    block_m: int,
    block_n: int,
    top_k: int | None = None,
    density: float | None = None,
    top_p: float | None = None,
    threshold: float | None = None,
    logits: bool = True,
    causal: bool = True,
    q_offset: int | None = None,
    sink_blocks: int = 0,
    local_blocks: int = 1,
) -> SparseIndex:
    """The index of the best blocks of every tile, by given scores.

    Exactly one of top_k, density, top_p and threshold is the budget, as in `BlockSparse`.

    Args:
        scores: [batch, heads or heads_kv, ceil(seqlen_q / block_m), ceil(seqlen_k / block_n)], any
            floating dtype; taken as float32, a NaN as -inf.
        seqlen_q: query rows.
        seqlen_k: keys.
        block_m: rows of a tile; 1 for a choice per row.
        block_n: keys of a block.
        top_k: blocks, forced ones included.
        density: share of a tile's allowed blocks.
        top_p: share of a tile's mass.
        threshold: mass above which a block is kept.
        logits: whether a block's mass is the softmax of the scores over the tile's allowed blocks;
            else the scores are masses themselves, probabilities for instance.
        causal: whether blocks past a tile's last row are left out.
        q_offset: position of row 0, default seqlen_k - seqlen_q.
        sink_blocks: forced first blocks.
        local_blocks: forced blocks that end with the diagonal.

    Returns:
        An index with the heads of the scores.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the scores do not fit the lengths, or a number is out of range.

    Example:
        >>> import torch
        >>> scores = torch.randn(1, 2, 4, 4)
        >>> options = {"seqlen_q": 256, "seqlen_k": 256, "block_m": 64, "block_n": 64}
        >>> block_scores_index(scores, **options, top_k=2).block_indptr[0, 0].tolist()
        [0, 1, 3, 5, 7]
    """
    owner = "block_scores_index"
    rule = BlockRule(owner, top_k, density, top_p, threshold)
    check_blocks(owner, block_m, block_n)
    check_int(owner, "sink_blocks", sink_blocks, 0)
    check_int(owner, "local_blocks", local_blocks, 0)
    offset = seqlen_k - seqlen_q if q_offset is None else q_offset
    grid = BlockGrid(
        seqlen_q, seqlen_k, block_m, block_n, offset, causal, sink_blocks, local_blocks
    )
    if not scores.is_floating_point():
        raise TypeError(
            f"sparse_attn.{owner}: scores are {scores.dtype}; pass a floating dtype, or a bool "
            "mask to SparseIndex.from_blocks."
        )
    if scores.dim() != 4 or tuple(scores.shape[2:]) != (grid.tiles, grid.blocks):
        raise ValueError(
            f"sparse_attn.{owner}: scores have shape {tuple(scores.shape)}; [batch, heads, "
            f"{grid.tiles}, {grid.blocks}] is needed for seqlen_q={seqlen_q}, "
            f"seqlen_k={seqlen_k}, block_m={block_m}, block_n={block_n}."
        )
    mask = rule.choose(scores.detach().float(), grid, logits=logits, first_tile=0)
    return blocks_index([mask], grid, scores.shape[0], scores.shape[1], scores.device)


@dataclass(frozen=True)
class GatedBlocks(BlockPattern):
    """Blocks by the scores of a gate: SeerAttention's, NSA's compressed attention, one's own.

    Exactly one of top_k, density, top_p and threshold is the budget, as in `BlockSparse`.

    Attributes:
        gate: called with (q, k) as `build` gets them; returns the scores that
            `block_scores_index` takes, by query head or by KV head.
        top_k, density, top_p, threshold, logits: as there.
        block_m: rows of a tile that the gate scores; 1 for a choice per row.
        block_n: keys of a block that the gate scores.
        sink_blocks: forced first blocks.
        local_blocks: forced blocks that end with the diagonal.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: not exactly one budget is given, or a number is out of range.

    Example:
        >>> from sparse_attn.selection import mean_pool, pooled_scores
        >>> def gate(q, k):  # as many heads in k as in q
        ...     return pooled_scores(mean_pool(q, 64), mean_pool(k, 64), 1.0)
        >>> GatedBlocks(gate, top_k=8).block_n
        64

    Source:
        SeerAttention (Gao et al. 2024, arXiv:2410.13276), NSA (Yuan et al. 2025,
        arXiv:2502.11089): the selection that follows their gates.
    """

    gate: Callable[[Tensor, Tensor], Tensor]
    top_k: int | None = None
    density: float | None = None
    top_p: float | None = None
    threshold: float | None = None
    logits: bool = True
    block_m: int = 64
    block_n: int = 64
    sink_blocks: int = 0
    local_blocks: int = 1
    data_dependent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not callable(self.gate):
            raise TypeError(
                f"sparse_attn.GatedBlocks: gate is a {type(self.gate).__name__}; pass a function "
                "of (q, k), or ready scores to block_scores_index."
            )
        BlockRule("GatedBlocks", self.top_k, self.density, self.top_p, self.threshold)
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
        """See `Pattern.build`; the index has the heads of the gate's scores.

        Raises:
            ValueError: the gate's scores do not fit q and k.
        """
        check_qk("GatedBlocks", q, k)
        scores = self.gate(q, k)
        if (
            scores.dim() != 4
            or scores.shape[0] != q.shape[0]
            or scores.shape[1]
            not in (
                q.shape[1],
                k.shape[1],
            )
        ):
            raise ValueError(
                f"sparse_attn.GatedBlocks.build: the gate gave scores {tuple(scores.shape)}; "
                f"[{q.shape[0]}, {q.shape[1]} or {k.shape[1]}, tiles, blocks] is needed."
            )
        return block_scores_index(
            scores,
            seqlen_q=q.shape[2],
            seqlen_k=k.shape[2],
            block_m=self.block_m,
            block_n=self.block_n,
            top_k=self.top_k,
            density=self.density,
            top_p=self.top_p,
            threshold=self.threshold,
            logits=self.logits,
            causal=causal,
            q_offset=offset_or_default(q, k, q_offset),
            sink_blocks=self.sink_blocks,
            local_blocks=self.local_blocks,
        )
