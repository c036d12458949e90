# SPDX-License-Identifier: Apache-2.0
"""How many blocks a tile keeps: the budgets that block-sparse patterns share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn.patterns.base import check_int
from sparse_attn.selection import BlockGrid, block_threshold, block_top_k, block_top_p

# density * blocks is meant as exact: 0.07 * 100 is 7, though the float product lies above it.
_CEIL_SLACK = 1e-9


@dataclass(frozen=True)
class BlockRule:
    """Exactly one budget of a tile.

    Attributes:
        owner: name of the pattern, for the texts of errors.
        top_k: blocks, forced ones included.
        density: share of the tile's allowed blocks, rounded up, forced ones included; in (0, 1].
        top_p: share of the tile's mass, in (0, 1]: the fewest blocks, forced ones first.
        threshold: probability above which a block is kept, in [0, 1).

    Raises:
        TypeError: a number has the wrong type.
        ValueError: not exactly one is given, or it is out of range.
    """

    owner: str
    top_k: int | None = None
    density: float | None = None
    top_p: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        given = {
            "top_k": self.top_k,
            "density": self.density,
            "top_p": self.top_p,
            "threshold": self.threshold,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            named = [f"{name}={value!r}" for name, value in given.items()]
            raise ValueError(
                f"sparse_attn.{self.owner}: {' and '.join(named) or 'no budget'} given; "
                "pass exactly one of top_k, density, top_p and threshold."
            )
        if self.top_k is not None:
            check_int(self.owner, "top_k", self.top_k, 1)
        if self.density is not None:
            check_share(self.owner, "density", self.density)
        if self.top_p is not None:
            check_share(self.owner, "top_p", self.top_p)
        if self.threshold is not None:
            check_share(self.owner, "threshold", self.threshold, low_open=False)

    def choose(self, scores: Tensor, grid: BlockGrid, *, logits: bool, first_tile: int) -> Tensor:
        """The kept blocks, bool like scores float32 [..., tiles, blocks].

        Args:
            scores: of tiles from `first_tile` on.
            grid: what may and what must be kept.
            logits: whether a block's mass is the softmax of the scores, or the score itself.
            first_tile: number of the scores' first tile.
        """
        if self.top_p is not None:
            return block_top_p(scores, self.top_p, grid, logits=logits, first_tile=first_tile)
        if self.threshold is not None:
            if logits:
                return block_threshold(scores, self.threshold, grid, first_tile=first_tile)
            allowed, forced = grid.masks(first_tile, scores.shape[-2], scores.device)
            return forced | (allowed & (scores > self.threshold))
        if self.top_k is not None:
            return block_top_k(scores, self.top_k, grid, first_tile=first_tile)
        assert self.density is not None
        allowed_counts = grid.allowed_counts(first_tile, scores.shape[-2], scores.device)
        budget = (allowed_counts.double() * self.density - _CEIL_SLACK).ceil().to(torch.int32)
        return block_top_k(scores, budget, grid, first_tile=first_tile)


def check_share(owner: str, name: str, value: object, *, low_open: bool = True) -> None:
    """Raises unless `value` is a number in (0, 1], or in [0, 1) if not `low_open`.

    Raises:
        TypeError: no number.
        ValueError: outside.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"sparse_attn.{owner}: {name}={value!r} is a {type(value).__name__}; pass a float."
        )
    inside = 0 < value <= 1 if low_open else 0 <= value < 1
    if not inside:
        interval = "(0, 1]" if low_open else "[0, 1)"
        raise ValueError(
            f"sparse_attn.{owner}: {name}={value} is outside {interval}; pass a value inside."
        )
