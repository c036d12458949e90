# SPDX-License-Identifier: Apache-2.0
"""The lists of an index in smaller tiles and blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import ops
from .lists import ListBuffer, indptr_from_counts, pack_bits, sort_lists, tile_entries, unpack_bits

if TYPE_CHECKING:
    from .index import SparseIndex

_CHUNK = 1 << 24  # elements that are worked on at once on a device


def refined(index: SparseIndex, block_m: int, block_n: int, shared: bool) -> dict[str, Any]:
    """The lists of the same keys in tiles of `block_m` rows and blocks of `block_n` keys.

    Both sizes divide the old ones; `shared` as in `SparseIndex.with_tiles`. Returns fields of an
    index.
    """
    if not ops.on_cpu(index.heads):
        return _refined_in_place(index, block_m, block_n, shared)
    parts_m, parts_n = index.block_m // block_m, index.block_n // block_n
    tiles = (index.seqlen_q + block_m - 1) // block_m
    shape = (index.batch_size, index.num_heads, tiles)
    device = index.device

    def split_tiles(flat_tile: Tensor) -> Tensor:
        """New tiles [n, parts_m] of each old one; -1 for those past seqlen_q."""
        head, tile = flat_tile // index.num_tiles, flat_tile % index.num_tiles
        new = tile[:, None] * parts_m + torch.arange(parts_m, device=device)
        return torch.where(new < tiles, head[:, None] * tiles + new, -1)

    flat_tile, entry = tile_entries(index.block_indptr)
    part_m = torch.arange(parts_m, device=device)[:, None]
    part_n = torch.arange(parts_n, device=device)
    start = index.block_indices[entry].long()[:, None, None] + part_n * block_n
    new_tile = split_tiles(flat_tile)[:, :, None].expand(-1, -1, parts_n)
    start = start.expand_as(new_tile)
    keep = (new_tile >= 0) & (start < index.seqlen_k)
    bits, ids = index.block_bits, index.block_bits_ids
    new_ids = None
    if bits is not None and ids is not None:
        rows = unpack_bits(bits, index.block_m)
        rows = rows.view(-1, parts_m, block_m, parts_n, block_n).permute(0, 1, 3, 2, 4)
        bits = pack_bits(rows.reshape(-1, block_m, block_n))
        old = ids[entry].long()[:, None, None]
        new_ids = torch.where(old < 0, -1, (old * parts_m + part_m) * parts_n + part_n)[keep].int()
    block_indptr, order = sort_lists(new_tile[keep], start[keep], shape)

    flat_tile, entry = tile_entries(index.column_indptr)
    new_tile = split_tiles(flat_tile)
    entry = entry[:, None].expand_as(new_tile)[new_tile >= 0]
    key = index.column_indices[entry]
    column_indptr, column_order = sort_lists(new_tile[new_tile >= 0], key, shape)
    bias = index.column_bias
    return {
        "block_indptr": block_indptr,
        "block_indices": start[keep][order].int(),
        "block_bits_ids": None if new_ids is None else new_ids[order],
        "block_bits": bits,
        "column_indptr": column_indptr,
        "column_indices": key[column_order],
        "column_bias": None if bias is None else bias[entry][column_order],
    }


def _refined_in_place(
    index: SparseIndex, block_m: int, block_n: int, shared: bool
) -> dict[str, Any]:
    """`refined` on a device, without waiting for it: the lists come in buffers of fixed size."""
    parts_m, parts_n = index.block_m // block_m, index.block_n // block_n
    device = index.device
    part_m = torch.arange(parts_m, device=device)[:, None, None]
    part_n = torch.arange(parts_n, device=device)
    bits, ids = index.block_bits, index.block_bits_ids
    fields: list[tuple[Callable[[Tensor], Tensor], torch.dtype]]

    def starts(entry: Tensor) -> Tensor:
        return (index.block_indices[entry][:, None, :, None] + part_n * block_n).int()

    fields = [(starts, torch.int32)]
    if bits is not None and ids is not None:
        rows = unpack_bits(bits, index.block_m)
        rows = rows.view(-1, parts_m, block_m, parts_n, block_n).permute(0, 1, 3, 2, 4)
        bits = pack_bits(rows.reshape(-1, block_m, block_n))

        def new_ids(entry: Tensor) -> Tensor:
            old = ids[entry].long()[:, None, :, None]
            return torch.where(old < 0, -1, (old * parts_m + part_m) * parts_n + part_n).int()

        fields.append((new_ids, torch.int32))
    most = -(-index.seqlen_k // index.block_n)
    split = (parts_m, parts_n, shared)
    block_indptr, block_values = _split(index, index.block_indptr, most, fields, block_m, split)
    fields = [(lambda e: index.column_indices[e][:, None, :, None], torch.int32)]
    bias = index.column_bias
    if bias is not None:
        fields.append((lambda e: bias[e][:, None, :, None], torch.float32))
    split = (parts_m, 1, shared)
    column_indptr, column_values = _split(
        index, index.column_indptr, index.seqlen_k, fields, block_m, split
    )
    return {
        "block_indptr": block_indptr,
        "block_indices": block_values[0],
        "block_bits_ids": block_values[1] if len(block_values) > 1 else None,
        "block_bits": bits,
        "column_indptr": column_indptr,
        "column_indices": column_values[0],
        "column_bias": column_values[1] if len(column_values) > 1 else None,
    }


def _split(
    index: SparseIndex,
    indptr: Tensor,
    most: int,
    fields: list[tuple[Callable[[Tensor], Tensor], torch.dtype]],
    block_m: int,
    split: tuple[int, int, bool],
) -> tuple[Tensor, list[Tensor]]:
    """indptr and values of lists whose tiles and entries are split.

    Args:
        index: the index.
        indptr: int64 [batch, heads, tiles + 1] of these lists.
        most: entries of a tile at most.
        fields: what gives the new values [tiles, parts_m or 1, n, parts_n] of int64 [tiles, n]
            entries, the first key first; and their dtype.
        block_m: new rows of a tile.
        split: parts of a tile and of an entry, and whether heads may share entries.
    """
    parts_m, parts_n, shared = split
    capacity = (index.block_indices if indptr is index.block_indptr else index.column_indices).shape
    tiles = -(-index.seqlen_q // block_m)
    begins, ends = indptr[..., :-1].flatten(), indptr[..., 1:].flatten()
    lists = indptr.shape[0] * indptr.shape[1]
    room = min(capacity[0] * (lists if shared else 1), begins.shape[0] * most) * parts_m * parts_n
    buffers = [ListBuffer(room, indptr.device, dtype) for _, dtype in fields]
    counts = [begins[:0]]
    step = max(1, _CHUNK // max(1, most * parts_m * parts_n))
    number = torch.arange(most, device=indptr.device)
    part = torch.arange(parts_m, device=indptr.device)
    for first in range(0, begins.shape[0] if capacity[0] else 0, step):
        some = slice(first, min(first + step, begins.shape[0]))
        entry = begins[some, None] + number
        there = entry < ends[some, None]
        entry = entry.clamp(max=capacity[0] - 1)
        tile = torch.arange(some.start, some.stop, device=indptr.device) % index.num_tiles
        exists = tile[:, None] * parts_m + part < tiles
        keys = fields[0][0](entry)
        keep = there[:, None, :, None] & exists[:, :, None, None] & (keys < index.seqlen_k)
        for buffer, (values, _) in zip(buffers, fields, strict=True):
            buffer.append(keep, values(entry))
        counts.append(keep.sum((2, 3)).flatten())
    if capacity[0] == 0:
        counts = [begins.new_zeros(begins.shape[0] * parts_m)]
    shape = (*indptr.shape[:2], index.num_tiles * parts_m)
    by_tile = torch.cat(counts).view(shape)[..., :tiles]
    return indptr_from_counts(by_tile), [buffer.values for buffer in buffers]
