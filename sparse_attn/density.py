# SPDX-License-Identifier: Apache-2.0
"""How dense a SparseIndex is, counted from its lists (the definitions: `SparseIndex.density`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .lists import CHUNK, HeadKind, tile_entries

if TYPE_CHECKING:
    from .index import SparseIndex

__all__ = ["densities"]


def densities(index: SparseIndex, causal: bool, q_offset: int) -> tuple[Tensor, Tensor]:
    """Element and tile density of every head, float64 [batch, heads] each: `SparseIndex.density`.

    Memory grows with the lists and with heads x seqlen_q, never with seqlen_q x seqlen_k.
    """
    seqlen_k, block_m, device = index.seqlen_k, index.block_m, index.device
    shape = (index.batch_size, index.num_heads)
    position = torch.arange(index.seqlen_q, device=device) + q_offset
    # A row may see the keys below its limit, a tile those below the limit of its last row.
    limit = (position + 1).clamp(0, seqlen_k) if causal else torch.full_like(position, seqlen_k)
    first = torch.arange(index.num_tiles, device=device) * block_m
    last = (first + block_m).clamp(max=index.seqlen_q) - 1
    rows = last - first + 1

    kind = index.heads[:, 0]
    dense_pairs, dense_work = limit.sum(), (rows * limit[last]).sum()
    pairs, work = _listed_counts(index, causal, q_offset, rows, limit[last])
    stream_pairs = _streaming_keys(index, position, position, limit).sum(-1)
    keys = _streaming_keys(index, position[first], position[last], limit[last])
    stream_work = (rows * keys).sum(-1)
    result = []
    for listed, streaming, dense in (
        (pairs.view(shape), stream_pairs, dense_pairs),
        (work.view(shape), stream_work, dense_work),
    ):
        count = torch.where(kind == HeadKind.LISTED, listed, dense)
        count = torch.where(kind == HeadKind.STREAMING, streaming, count)
        result.append(count.double() / dense.clamp(min=1))
    return result[0], result[1]


def _streaming_keys(index: SparseIndex, first: Tensor, last: Tensor, limit: Tensor) -> Tensor:
    """How many keys below `limit` the rows at positions [first, last] see together.

    Args:
        index: whose heads are taken for streaming heads, all of them.
        first: int64 [n] positions.
        last: int64 [n] positions.
        limit: int64 [n] keys.

    Returns:
        int64 [heads, n].
    """
    _, sink, window, dense_tail = index.heads.long()[:, :, None].unbind(1)
    sinks = torch.minimum(sink, limit)
    low = torch.maximum(first - window + 1, sinks)
    high = torch.minimum(last + window, limit)
    local = torch.where(window > 0, (high - low).clamp(min=0), 0)
    in_tail = last >= first[:1] + index.seqlen_q - dense_tail
    return torch.where(in_tail, limit, sinks + local)


def _listed_counts(
    index: SparseIndex, causal: bool, q_offset: int, rows: Tensor, tile_limit: Tensor
) -> tuple[Tensor, Tensor]:
    """Visible pairs and kernel work of the lists, int64 [batch * heads] each.

    Args:
        index: the index.
        causal: whether row i may only see keys up to i + q_offset.
        q_offset: position of row 0.
        rows: int64 [num_tiles], rows of each tile.
        tile_limit: int64 [num_tiles], keys that a tile may see.
    """
    pairs = torch.zeros(index.batch_size * index.num_heads, dtype=torch.int64, device=index.device)
    work = torch.zeros_like(pairs)
    for indptr, indices, width in (
        (index.block_indptr, index.block_indices, index.block_n),
        (index.column_indptr, index.column_indices, 1),
    ):
        flat_tile, entry = tile_entries(indptr)
        if flat_tile.shape[0] == 0:
            continue
        head, tile = flat_tile // index.num_tiles, flat_tile % index.num_tiles
        start = indices[entry].long()
        length = (start + width).clamp(max=index.seqlen_k) - start
        # Limit (position + 1) of the tile's first row, on the key axis.
        first_limit = tile * index.block_m + q_offset + 1
        if causal:
            count = _keys_below(first_limit + rows[tile] - 1, start, length)
            count -= _keys_below(first_limit - 1, start, length)
        else:
            count = rows[tile] * length
        if width > 1 and index.block_bits is not None and index.block_bits_ids is not None:
            ids = index.block_bits_ids[entry].long()
            part = (ids >= 0).nonzero()[:, 0]
            if causal:
                hidden = start[part] - first_limit[part] + 1
            else:
                hidden = torch.full_like(part, -index.block_n)
            count[part] = _bit_counts(
                index.block_bits, ids[part], hidden, rows[tile[part]], length[part], causal
            )
        visited = torch.minimum(length, (tile_limit[tile] - start).clamp(min=0))
        pairs.index_add_(0, head, count)
        work.index_add_(0, head, rows[tile] * visited)
    return pairs, work


def _keys_below(limit: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """Keys of [start, start + length) below x, summed over all x <= limit."""
    depth = (limit - start).clamp(min=0)
    ramp = torch.minimum(depth, length)
    return ramp * (ramp + 1) // 2 + (depth - ramp) * length


def _bit_counts(
    bits: Tensor, ids: Tensor, hidden: Tensor, rows: Tensor, length: Tensor, causal: bool
) -> Tensor:
    """Visible pairs of partly visible blocks, int64 [n].

    Args:
        bits: int64 [num_masks, block_n, words].
        ids: int64 [n], the mask of each block.
        hidden: int64 [n], rows from which causality hides a block's first key (each next key is
            hidden from one row more).
        rows: int64 [n], rows of the block's tile.
        length: int64 [n], keys of the block before seqlen_k.
        causal: whether `hidden` counts.
    """
    _, block_n, words = bits.shape
    key = torch.arange(block_n, device=bits.device)[:, None]
    word_row = torch.arange(words, device=bits.device) * 64
    counts = []
    step = max(CHUNK // (block_n * words), 1)
    for i in range(0, ids.shape[0], step):
        part = slice(i, i + step)
        allowed = _low_bits(rows[part, None, None] - word_row)
        if causal:
            allowed = allowed & ~_low_bits(hidden[part, None, None] + key - word_row)
        count = _count_bits(bits[ids[part]] & allowed)
        counts.append(torch.where(key < length[part, None, None], count, 0).sum((1, 2)))
    return torch.cat(counts) if counts else ids


def _count_bits(words: Tensor) -> Tensor:
    """The number of set bits of each int64 (Hacker's Delight, figure 5-2)."""
    x = words - ((words >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (x * 0x0101010101010101) >> 56


def _low_bits(n: Tensor) -> Tensor:
    """int64 words whose n lowest bits are set; n is clamped to [0, 64]."""
    # A shift by 64 is undefined, so that case is taken apart.
    return torch.where(n >= 64, -1, (1 << n.clamp(0, 63)) - 1)
