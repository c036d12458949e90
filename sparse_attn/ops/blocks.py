# SPDX-License-Identifier: Apache-2.0
"""Operators of block-sparse selection on CPU tensors: their handles, and their shapes for tracing.

What they compute is written where they are used: `selection.blocks` and `selection.estimators`.
"""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor

from sparse_attn.ops.library import OPS


class GridArgs(TypedDict):
    """The numbers of a grid of query tiles x key blocks; see `selection.BlockGrid`."""

    first_tile: int
    seqlen_q: int
    block_m: int
    block_n: int
    q_offset: int
    causal: bool
    sink_blocks: int
    local_blocks: int


def pool_blocks(x: Tensor, block: int, kind: str) -> Tensor:
    """`selection.pool` on a CPU tensor [batch, heads, seqlen, dim], contiguous in dim."""
    pooled: Tensor = OPS.pool_blocks(x, block, kind)
    return pooled


def block_top_k(scores: Tensor, budget: Tensor, grid: GridArgs) -> Tensor:
    """`selection.block_top_k` on contiguous float32 scores [rows, tiles, blocks].

    `budget` is int32 [rows or 1, tiles or 1].
    """
    mask: Tensor = OPS.block_top_k(scores, budget, **grid)
    return mask


def block_top_p(
    scores: Tensor, share: float, *, logits: bool, whole: bool, grid: GridArgs
) -> Tensor:
    """`selection.block_top_p` on contiguous float32 scores [rows, tiles, blocks]."""
    mask: Tensor = OPS.block_top_p(scores, share, logits, whole, **grid)
    return mask


def block_threshold(scores: Tensor, threshold: float, grid: GridArgs) -> Tensor:
    """`selection.block_threshold` on contiguous float32 scores [rows, tiles, blocks]."""
    mask: Tensor = OPS.block_threshold(scores, threshold, **grid)
    return mask


def list_blocks(mask: Tensor, block_n: int) -> tuple[Tensor, Tensor]:
    """Marks of a contiguous bool mask [rows, blocks] as ragged lists of first keys.

    Returns:
        (counts int64 [rows], indices int32, rows one after the other, ascending).
    """
    counts, indices = OPS.list_blocks(mask, block_n)
    return counts, indices


def cell_block_sums(
    cells: Tensor, limits: Tensor, *, tile_cells: int, block_cells: int, scale: float
) -> Tensor:
    """Softmax of every row of float32 `cells` [rows, n, width], summed by tile and block.

    Row c sees the first limits[c] (int64 [n]) of its cells, scaled by `scale`.
    """
    sums: Tensor = OPS.cell_block_sums(cells, limits, tile_cells, block_cells, scale)
    return sums


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"sparse_attn::{name}")


@_fake("pool_blocks")  # type: ignore[untyped-decorator]
def _pool_blocks_fake(x: Tensor, block: int, kind: str) -> Tensor:
    batch, heads, seqlen, dim = x.shape
    return x.new_empty((batch, heads, -(-seqlen // block), dim), dtype=torch.float32)


@_fake("block_top_k")  # type: ignore[untyped-decorator]
@_fake("block_top_p")  # type: ignore[untyped-decorator]
@_fake("block_threshold")  # type: ignore[untyped-decorator]
def _mask_fake(scores: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


@_fake("list_blocks")  # type: ignore[untyped-decorator]
def _list_blocks_fake(mask: Tensor, block_n: int) -> tuple[Tensor, Tensor]:
    marks = torch.library.get_ctx().new_dynamic_size()
    counts = mask.new_empty(mask.shape[:1], dtype=torch.int64)
    return counts, mask.new_empty(marks, dtype=torch.int32)


@_fake("cell_block_sums")  # type: ignore[untyped-decorator]
def _cell_block_sums_fake(
    cells: Tensor, limits: Tensor, tile_cells: int, block_cells: int, scale: float
) -> Tensor:
    rows, n, width = cells.shape
    return cells.new_empty((rows, -(-n // tile_cells), -(-width // block_cells)))
