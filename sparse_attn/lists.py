# SPDX-License-Identifier: Apache-2.0
"""The ragged lists of a SparseIndex: reading, counting, joining and checking them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops

if TYPE_CHECKING:
    from .index import SparseIndex

__all__ = [
    "HeadKind",
    "ListBuffer",
    "cat_lists",
    "check_same",
    "check_shapes",
    "check_tile_sizes",
    "densities",
    "indptr_from_counts",
    "keys_mask",
    "list_blocks",
    "marked_positions",
    "numbers",
    "pack_bits",
    "shifted_indptrs",
    "sort_lists",
    "tensors",
    "tile_entries",
    "unpack_bits",
]

# Row-validity bits are handled this many elements at a time, which bounds memory.
_CHUNK = 1 << 22


class HeadKind(IntEnum):
    """What column 0 of `SparseIndex.heads` says about a head."""

    DENSE = 0
    STREAMING = 1
    LISTED = 2


# -------------------------------------------------------------------- ragged lists


def indptr_from_counts(counts: Tensor) -> Tensor:
    """Offsets int64 [batch, heads, tiles + 1] of lists laid end to end, from their lengths."""
    counts = counts.to(torch.int64)
    if counts.shape[-1] == 0:
        return counts.new_zeros(*counts.shape[:-1], 1)
    ends = counts.flatten().cumsum(0).view(counts.shape)
    return torch.cat([ends[..., :1] - counts[..., :1], ends], -1)


class ListBuffer:
    """Lists laid end to end, to which more and more are appended.

    On the CPU they take the room that they need. Elsewhere their length is not known before the
    device is done, so the room is fixed, and nothing is read back.
    """

    def __init__(
        self, capacity: int, device: torch.device, dtype: torch.dtype = torch.int32
    ) -> None:
        """Of at most `capacity` entries; what goes beyond them is lost."""
        self._end = torch.zeros((), dtype=torch.int64, device=device)
        self._parts: list[Tensor] = []
        size = 0 if ops.on_cpu(self._end) else capacity + 1
        self._room = torch.zeros(size, dtype=dtype, device=device)

    @property
    def values(self) -> Tensor:
        """All entries, [their number], or [capacity] with zeros past the last one."""
        if ops.on_cpu(self._room):
            return torch.cat([self._room, *self._parts])
        return self._room[:-1]

    def append(self, mask: Tensor, values: Tensor) -> None:
        """Appends values, broadcastable to mask, where the bool mask is set, in order."""
        values = values.expand(mask.shape)
        if ops.on_cpu(mask):
            self._parts.append(values[mask])
            return
        marks, spare = mask.reshape(-1), self._room.shape[0] - 1
        # Each mark goes to its rank; what is not marked shares one slot that is cut off.
        rank = marks.cumsum(0) + (self._end - 1)
        place = torch.where(marks, rank.clamp(max=spare), spare)
        self._room.scatter_(0, place, values.reshape(-1))
        self._end = self._end + marks.sum()


def marked_positions(mask: Tensor) -> Tensor:
    """Where on the last axis the marks of bool [..., n] are, row after row: a `ListBuffer`'s."""
    found = ListBuffer(mask.numel(), mask.device)
    found.append(mask, torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device))
    return found.values


def numbers(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 [len(values)] on `device`: filled in there, since a copy would wait for the device."""
    none = torch.empty(0, dtype=torch.int64, device=device)
    if ops.on_cpu(none):
        return torch.tensor(list(values), dtype=torch.int64)
    return torch.cat([none, *(torch.full((1,), x, device=device) for x in values)])


def list_blocks(mask: Tensor, block_n: int) -> tuple[Tensor, Tensor]:
    """Ragged lists of the marked blocks' first keys.

    Args:
        mask: bool [..., blocks].
        block_n: keys of a block.

    Returns:
        (counts int64 [...], indices int32, lists one after the other, ascending). On a device other
        than the CPU the indices come in a buffer of mask.numel() entries that the counts fill in
        part, so that nothing is read back.
    """
    if not ops.on_cpu(mask):
        return mask.sum(-1), marked_positions(mask) * block_n
    rows = mask.reshape(mask.shape[:-1].numel(), mask.shape[-1]).contiguous()
    counts, indices = ops.list_blocks(rows, block_n)
    return counts.view(mask.shape[:-1]), indices


def tile_entries(indptr: Tensor) -> tuple[Tensor, Tensor]:
    """Every (tile, list entry) pair of an indptr [batch, heads, tiles + 1], tiles in order.

    Heads may share entries and rows may leave gaps, so an entry can occur in any number of tiles.

    Returns:
        int64 [n] tile, counted over batch, heads and tiles together, and int64 [n] the entry's
        offset in the indices.
    """
    counts = (indptr[..., 1:] - indptr[..., :-1]).flatten()
    tile = torch.repeat_interleave(counts)
    before = counts.cumsum(0) - counts
    offset = torch.arange(tile.shape[0], device=indptr.device) - before[tile]
    return tile, indptr[..., :-1].flatten()[tile] + offset


def sort_lists(tile: Tensor, value: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Lays (tile, value) pairs out as lists that ascend in every tile.

    Args:
        tile: int64 [n], counted over batch, heads and tiles together.
        value: [n], non-negative integers.
        shape: batch, heads, tiles.

    Returns:
        indptr int64 [batch, heads, tiles + 1] and the order int64 [n] to bring the values in.
    """
    # Two stable sorts and no combined key: nothing can overflow.
    order = torch.argsort(value, stable=True)
    order = order[torch.argsort(tile[order], stable=True)]
    counts = torch.bincount(tile, minlength=shape[0] * shape[1] * shape[2])
    return indptr_from_counts(counts.view(shape)), order


def pack_bits(visible: Tensor) -> Tensor:
    """Row-validity words int64 [n, keys, ceil(rows / 64)] of a bool mask [n, rows, keys]."""
    n, rows, keys = visible.shape
    words = (rows + 63) // 64
    shift = torch.arange(64, device=visible.device)[:, None]
    packed = [
        # Bit 63 is the sign: the sum wraps to it, which is what is wanted.
        (F.pad(part, (0, 0, 0, words * 64 - rows)).view(-1, words, 64, keys).long() << shift)
        .sum(2)
        .transpose(1, 2)
        for part in torch.split(visible, max(_CHUNK // max(rows * keys, 1), 1))
    ]
    return torch.cat(packed) if n else visible.new_empty(0, keys, words, dtype=torch.int64)


def unpack_bits(bits: Tensor, rows: int) -> Tensor:
    """The bool mask [n, rows, keys] of row-validity words int64 [n, keys, words]."""
    shift = torch.arange(64, device=bits.device)
    visible = ((bits[..., None] >> shift) & 1).bool().flatten(2)
    return visible[..., :rows].transpose(1, 2)


# -------------------------------------------------------------------- the boolean mask


def keys_mask(index: SparseIndex, q_offset: int) -> Tensor:
    """bool [batch, heads, seqlen_q, seqlen_k] of the index's own batch and heads, not causal."""
    kind = index.heads[:, 0, None, None]
    mask = torch.where(kind == HeadKind.LISTED, _listed_mask(index), kind == HeadKind.DENSE)
    return torch.where(kind == HeadKind.STREAMING, _streaming_mask(index, q_offset), mask)


def _streaming_mask(index: SparseIndex, q_offset: int) -> Tensor:
    """bool [heads, seqlen_q, seqlen_k]: the rule of streaming heads, for every head."""
    _, sink, window, dense_tail = index.heads[:, :, None, None].unbind(1)
    row = torch.arange(index.seqlen_q, device=index.device)[:, None]
    key = torch.arange(index.seqlen_k, device=index.device)
    local = (row + q_offset - key).abs() < window
    return (key < sink) | local | (row >= index.seqlen_q - dense_tail)


def _listed_mask(index: SparseIndex) -> Tensor:
    """bool [batch, heads, seqlen_q, seqlen_k]: the keys in the lists of every head."""
    batch, heads, tiles = index.batch_size, index.num_heads, index.num_tiles
    # A last block may run past seqlen_k: room for it, cut off at the end.
    width = index.seqlen_k + index.block_n
    tile, entry = tile_entries(index.block_indptr)
    keys = index.block_indices[entry].long()[:, None] + torch.arange(
        index.block_n, device=index.device
    )
    column_tile, column = tile_entries(index.column_indptr)

    mask = torch.zeros(batch * heads * tiles, width, dtype=torch.bool, device=index.device)
    mask[column_tile, index.column_indices[column].long()] = True
    if index.block_bits is None or index.block_bits_ids is None:
        mask[tile[:, None], keys] = True
        mask = mask[:, None].expand(-1, index.block_m, -1)
    else:
        ids = index.block_bits_ids[entry].long()
        full = ids < 0
        mask[tile[full][:, None], keys[full]] = True
        mask = mask[:, None].repeat(1, index.block_m, 1)
        rows = unpack_bits(index.block_bits[ids[~full]], index.block_m)
        mask[tile[~full][:, None], :, keys[~full]] = rows.transpose(1, 2)
    mask = mask.reshape(batch, heads, tiles * index.block_m, width)
    return mask[:, :, : index.seqlen_q, : index.seqlen_k]


# -------------------------------------------------------------------- densities


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
    step = max(_CHUNK // (block_n * words), 1)
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


# -------------------------------------------------------------------- joining


def shifted_indptrs(parts: Sequence[SparseIndex]) -> tuple[list[Tensor], list[Tensor]]:
    """Block and column indptrs of the parts once their indices are concatenated."""
    blocks, columns, block_base, column_base = [], [], 0, 0
    for part in parts:
        blocks.append(part.block_indptr + block_base)
        columns.append(part.column_indptr + column_base)
        block_base += part.block_indices.shape[0]
        column_base += part.column_indices.shape[0]
    return blocks, columns


def cat_lists(parts: Sequence[SparseIndex]) -> dict[str, Any]:
    """The concatenated indices, biases and bits of the parts, as fields of an index."""
    bias, ids, bits = None, None, None
    if any(part.column_bias is not None for part in parts):
        bias = torch.cat(
            [
                torch.zeros_like(part.column_indices, dtype=torch.float32)
                if part.column_bias is None
                else part.column_bias
                for part in parts
            ]
        )
    if any(part.block_bits is not None for part in parts):
        all_ids, all_bits, base = [], [], 0
        for part in parts:
            if part.block_bits is None or part.block_bits_ids is None:
                all_ids.append(torch.full_like(part.block_indices, -1))
                continue
            old = part.block_bits_ids
            all_ids.append(torch.where(old < 0, old, old + base))
            all_bits.append(part.block_bits)
            base += part.block_bits.shape[0]
        ids, bits = torch.cat(all_ids), torch.cat(all_bits)
    return {
        "block_indices": torch.cat([part.block_indices for part in parts]),
        "column_indices": torch.cat([part.column_indices for part in parts]),
        "column_bias": bias,
        "block_bits_ids": ids,
        "block_bits": bits,
    }


# -------------------------------------------------------------------- checks


def tensors(index: SparseIndex) -> dict[str, Tensor]:
    """The fields of an index that are tensors."""
    return {name: value for name, value in vars(index).items() if isinstance(value, Tensor)}


def check_tile_sizes(block_m: int, block_n: int) -> None:
    """Raises ValueError for sizes that no kernel takes."""
    if block_m != 1 and (block_m < 16 or block_m % 16 != 0):
        raise ValueError(
            f"sparse_attn.SparseIndex: block_m={block_m}; it must be 1 or a multiple of 16."
        )
    if block_n < 8 or block_n % 8 != 0:
        raise ValueError(f"sparse_attn.SparseIndex: block_n={block_n}; it must be a multiple of 8.")


def check_shapes(index: SparseIndex) -> None:
    """Checks sizes, dtypes, shapes and devices; reads no data."""
    check_tile_sizes(index.block_m, index.block_n)
    if (index.block_bits is None) != (index.block_bits_ids is None):
        raise ValueError(
            "sparse_attn.SparseIndex: block_bits and block_bits_ids go together; pass both or none."
        )
    device = index.device
    ranges = (index.batch_size, index.num_heads, index.num_tiles + 1)
    blocks, columns = (index.block_indices.numel(),), (index.column_indices.numel(),)
    masks = 0 if index.block_bits is None else index.block_bits.shape[0]
    bits = (masks, index.block_n, (index.block_m + 63) // 64)
    # Names with their dtypes, layouts in words, and shapes. Decoding makes an index a token.
    for name, dtype, layout, shape in (
        ("heads", torch.int32, "[heads, 4]", (index.num_heads, 4)),
        ("block_indptr", torch.int64, "[batch, heads, num_tiles + 1]", ranges),
        ("block_indices", torch.int32, "[capacity]", blocks),
        ("column_indptr", torch.int64, "[batch, heads, num_tiles + 1]", ranges),
        ("column_indices", torch.int32, "[capacity]", columns),
        ("column_bias", torch.float32, "[column capacity]", columns),
        ("block_bits_ids", torch.int32, "[block capacity]", blocks),
        ("block_bits", torch.int64, "[masks, block_n, ceil(block_m / 64)]", bits),
    ):
        tensor = getattr(index, name)
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(
                f"sparse_attn.SparseIndex: {name} is {tensor.dtype}; it must be {dtype}."
            )
        if tensor.shape != shape:
            raise ValueError(
                f"sparse_attn.SparseIndex: {name} has shape {tuple(tensor.shape)}; "
                f"{layout} = {shape} is needed."
            )
        if tensor.device != device:
            raise ValueError(
                f"sparse_attn.SparseIndex: {name} is on {tensor.device} and heads on "
                f"{device}; move the index as a whole with to()."
            )


def check_same(parts: Sequence[SparseIndex], function: str, names: tuple[str, ...]) -> None:
    """Raises ValueError unless there are parts, equal in the named sizes."""
    if not parts:
        raise ValueError(f"sparse_attn.SparseIndex.{function}: no parts; pass at least one.")
    for name in names:
        values = [getattr(part, name) for part in parts]
        if any(value != values[0] for value in values):
            hint = "; bring them to one size with with_tiles" if name.startswith("block") else ""
            raise ValueError(
                f"sparse_attn.SparseIndex.{function}: the parts have different {name}, "
                f"{values}{hint}."
            )
