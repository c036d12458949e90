# SPDX-License-Identifier: Apache-2.0
"""An index as a picture: the share of each cell of a coarse grid that rows see."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .lists import HeadKind, unpack_bits

if TYPE_CHECKING:
    from .index import Density, SparseIndex

MAX_HEADS = 4
GRID = 32  # columns of characters; half as many rows, since a character is twice as high as wide
_SHADES = " ░▒▓█"


def row_keys(index: SparseIndex, batch: int, head: int, row: int, q_offset: int) -> Tensor:
    """bool [seqlen_k]: the keys that one row of one head sees; causality is not applied."""
    kind, sink, window, dense_tail = index.heads[head].tolist()
    key = torch.arange(index.seqlen_k)
    if kind == HeadKind.DENSE or (
        kind == HeadKind.STREAMING and row >= index.seqlen_q - dense_tail
    ):
        return torch.ones(index.seqlen_k, dtype=torch.bool)
    if kind == HeadKind.STREAMING:
        near: Tensor = (row + q_offset - key).abs() < window
        near |= key < sink
        return near
    # Room for a last block that runs past the end, cut off below.
    seen = torch.zeros(index.seqlen_k + index.block_n, dtype=torch.bool)
    tile, within = divmod(row, index.block_m)
    first, last = index.column_indptr[batch, head, tile : tile + 2].tolist()
    seen[index.column_indices[first:last].long().cpu()] = True
    first, last = index.block_indptr[batch, head, tile : tile + 2].tolist()
    starts = index.block_indices[first:last].long().cpu()
    visible = torch.ones(len(starts), index.block_n, dtype=torch.bool)
    if index.block_bits is not None and index.block_bits_ids is not None:
        ids = index.block_bits_ids[first:last].long().cpu()
        partly = ids >= 0
        bits = unpack_bits(index.block_bits.cpu()[ids[partly]], index.block_m)
        visible[partly] = bits[:, within]
    keys = starts[:, None] + torch.arange(index.block_n)
    seen[keys[visible]] = True
    return seen[: index.seqlen_k]


def grid(
    index: SparseIndex,
    head: int,
    *,
    batch: int = 0,
    rows: int,
    columns: int,
    causal: bool = True,
    q_offset: int | None = None,
) -> Tensor:
    """The picture of one head.

    Args:
        index: what is drawn.
        head: of the index.
        batch: of the index.
        rows: of the grid at most; each shows the row in the middle of its part.
        columns: of the grid at most.
        causal: whether keys after a row's own are hidden.
        q_offset: position of row 0, default seqlen_k - seqlen_q.

    Returns:
        float32 [rows, columns], the share of the cell's keys that its row sees.
    """
    offset = index.seqlen_k - index.seqlen_q if q_offset is None else q_offset
    rows, columns = min(rows, index.seqlen_q), min(columns, index.seqlen_k)
    key = torch.arange(index.seqlen_k)
    cell = key * columns // max(1, index.seqlen_k)
    sizes = torch.bincount(cell, minlength=columns).clamp(min=1)
    picture = torch.zeros(rows, columns)
    for place in range(rows):
        row = (2 * place + 1) * index.seqlen_q // (2 * rows)
        seen = row_keys(index, batch, head, row, offset)
        if causal:
            seen &= key <= row + offset
        picture[place] = torch.bincount(cell[seen], minlength=columns) / sizes
    return picture


def text(index: SparseIndex, *, causal: bool = True, q_offset: int | None = None) -> str:
    """What `print(index)` shows: sizes, and a picture of each head, or of the first few."""
    density = index.density(causal=causal, q_offset=q_offset)
    lines = [
        repr(index),
        f"{density.element:.1%} of the pairs, {density.tile:.1%} of the work in tiles"
        + (" (causal)" if causal else ""),
    ]
    shown = min(index.num_heads, MAX_HEADS)
    if index.seqlen_q == 0 or index.seqlen_k == 0:
        return "\n".join(lines)
    pictures = [_picture(index, head, density, causal, q_offset) for head in range(shown)]
    for first in range(0, shown, 2):
        pair = pictures[first : first + 2]
        lines += ["  ".join(parts).rstrip() for parts in zip(*pair, strict=True)]
    left = index.num_heads - shown
    more = [f"{left} more heads"] * (left > 0)
    more += [f"batch entry 0 of {index.batch_size}"] * (index.batch_size > 1)
    return "\n".join(lines + [", ".join(more)] * bool(more))


def _picture(
    index: SparseIndex, head: int, density: Density, causal: bool, q_offset: int | None
) -> list[str]:
    """The lines of one head, equally long."""
    share = grid(index, head, rows=GRID // 2, columns=GRID, causal=causal, q_offset=q_offset)
    kind = HeadKind(int(index.heads[head, 0])).name.lower()
    title = f"head {head}: {kind}, {float(density.element_per_head[0, head]):.0%}"
    body = ["".join(map(_shade, row)) for row in share.tolist()]
    return [line.ljust(GRID) for line in (title, *body)]


def _shade(share: float) -> str:
    """A blank for nothing; any key that is seen shows."""
    return " " if share == 0 else _SHADES[min(4, 1 + int(share * 4))]
