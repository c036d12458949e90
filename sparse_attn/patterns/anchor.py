# SPDX-License-Identifier: Apache-2.0
"""AnchorAttention: sinks and a superblock, and the single keys that come near their scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

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
from sparse_attn.selection.anchor import anchor_lists

_BLOCK_N = 64


@dataclass(frozen=True)
class AnchorAttention(Pattern):
    """The first keys and a row's own superblock, and stripes of single keys chosen by difference.

    The rows of a call are cut into superblocks of block * step rows, these into tiles of `block`.
    With a the position of a superblock's first row, rounded down to a multiple of block * step, and
    b that of its first row plus block * step, its anchor is the keys j < sink and a <= j < b. With

        m_i = max over the anchor keys that row i sees of softmax_scale * q_i . k_j,

    every other key j (before the anchor, where attention is causal) is kept for all rows of the
    superblock iff, for one of its tiles,

        softmax_scale * mean(q_i) . k_j + theta >= mean(m_i),

    where both means are over the tile's rows that see an anchor key; products in float32, a NaN
    keeps nothing. The rows see the anchor and the kept keys.

    Attributes:
        block: rows of a tile, a multiple of 16.
        step: tiles of a superblock.
        theta: how far below the mean of the anchor's best logits a key may lie, in logits.
        sink: first keys in every anchor, in tokens.

    Raises:
        TypeError: a number has the wrong type.
        ValueError: a number is out of range.

    Example:
        >>> AnchorAttention(theta=8.0)
        AnchorAttention(block=128, step=16, theta=8.0, sink=128)

    Source:
        AnchorAttention (Zhang et al. 2025, arXiv:2505.23520).
    """

    block: int = 128
    step: int = 16
    theta: float = 12.0
    sink: int = 128
    data_dependent: ClassVar[bool] = True
    approximates: ClassVar[bool] = True
    row_local: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_int("AnchorAttention", "block", self.block, 16)
        check_blocks("AnchorAttention", self.block, _BLOCK_N)
        check_int("AnchorAttention", "step", self.step, 1)
        check_int("AnchorAttention", "sink", self.sink, 0)
        if isinstance(self.theta, bool) or not isinstance(self.theta, (int, float)):
            raise TypeError(
                f"sparse_attn.AnchorAttention: theta={self.theta!r} is a "
                f"{type(self.theta).__name__}; pass a number of logits."
            )
        if math.isnan(self.theta):
            raise ValueError(
                "sparse_attn.AnchorAttention: theta is NaN; pass a number of logits, for instance "
                "12.0."
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
        """See `Pattern.build`; every query head, with a tile per superblock.

        On a device other than the CPU, in plain torch and without a read-back.
        """
        check_qk("AnchorAttention", q, k)
        block_counts, blocks, column_counts, columns = anchor_lists(
            q,
            k,
            block=self.block,
            step=self.step,
            sink=self.sink,
            theta=float(self.theta),
            q_offset=offset_or_default(q, k, q_offset),
            causal=causal,
            softmax_scale=scale_or_default(q, softmax_scale),
            block_n=_BLOCK_N,
        )
        return SparseIndex.from_lists(
            seqlen_q=q.shape[2],
            seqlen_k=k.shape[2],
            block_m=self.block * self.step,
            block_n=_BLOCK_N,
            block_indptr=indptr_from_counts(block_counts),
            block_indices=blocks,
            column_indptr=indptr_from_counts(column_counts),
            column_indices=columns,
        )
