# SPDX-License-Identifier: Apache-2.0
"""From vertical and slash indices to the blocks and columns of every query tile.

The rows of a tile that starts at position a lie at a .. a + block_m - 1, so its slash s covers the
keys [a - s, a - s + block_m). That depends on a only through a shift: on the axis

    u = key - a + origin,   origin = the largest distance,

slash s covers [origin - s, origin - s + block_m) whatever the tile. So bands are merged and cut
into blocks once a head (`_Layout`), and a tile's lists are that layout, shifted by a - origin and
clipped to the keys that exist (`_tile_lists`). Nothing walks the list of slashes key by key, and
no buffer has seqlen_q x seqlen_k elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn import ops
from sparse_attn.lists import ListBuffer
from sparse_attn.selection import bands
from sparse_attn.selection.estimators import MAX_BAND_ELEMENTS

# On a CPU, temporaries of this many elements stay in cache: up to 1.6 times as fast.
_CPU_BAND_ELEMENTS = 1 << 20
# Fills list ends: far above any key, and no int32 overflow when a shift is added.
_FAR = 1 << 30


@dataclass(frozen=True)
class SlashLists:
    """Ragged lists of all tiles, heads in order, tiles in order.

    Attributes:
        block_counts: int64 [heads, tiles].
        block_indices: int32 [sum of counts], first keys; ascending and disjoint in a tile.
        column_counts: int64 [heads, tiles].
        column_indices: int32 [sum of counts], keys; ascending in a tile, outside its blocks.
        block_bits_ids: int32 [sum of counts], each block's row of `block_bits`, -1 for a block that
            every row sees whole; None if all are.
        block_bits: int64 [masks, block_n, ceil(block_m / 64)], see `SparseIndex`; or None.
    """

    block_counts: Tensor
    block_indices: Tensor
    column_counts: Tensor
    column_indices: Tensor
    block_bits_ids: Tensor | None = None
    block_bits: Tensor | None = None


@dataclass(frozen=True)
class _Layout:
    """Where the slashes of each head lie on the u axis, cut into blocks and single keys.

    Attributes:
        origin: u of the key at a tile's first position.
        starts: int32 [heads, blocks], first u of every block, ascending, then _FAR.
        singles: int32 [heads, singles], covered u outside every block, ascending, then _FAR.
        last: int32 [heads, length], the last covered u that is not past each u; -1 if none.
        taken: bool [heads, length], u in a block or single.
    """

    origin: int
    starts: Tensor
    singles: Tensor
    last: Tensor
    taken: Tensor


def slash_lists(
    verticals: Tensor,
    slashes: Tensor,
    *,
    seqlen_q: int,
    seqlen_k: int,
    q_offset: int,
    causal: bool,
    block_m: int,
    block_n: int,
    chunk: int | None = None,
    exact: bool = False,
) -> SlashLists:
    """Lists that cover every vertical and every slash of every tile, and no key twice.

    * A maximal run of keys that slashes cover becomes blocks from its first key on. A rest shorter
      than block_n / 4 becomes columns; a longer one becomes a block that runs on past the end of
      the run (and, if the next run begins inside it, takes that part of it along).
    * A block that would start before key 0 becomes a block at 0 if the next one leaves room and at
      least block_n / 4 of its covered keys remain, and columns if not.
    * Every vertical outside the blocks becomes a column. None is lost, wherever the slashes are.

    With `exact`, every covered key is in a block, whose bits say which rows it is for.

    Args:
        verticals: int [heads * chunks, count], ascending key positions; entries >= seqlen_k are
            ignored.
        slashes: bool [heads * chunks, distances]; entry s says that distance s is chosen.
        seqlen_q: query rows.
        seqlen_k: keys.
        q_offset: position of row 0 on the key axis.
        causal: drop what lies past the last row of a tile.
        block_m: rows of a tile (any number here).
        block_n: keys of a block (any number here).
        chunk: rows that a selection serves, a multiple of block_m: chunks are
            ceil(seqlen_q / chunk), at least 1. None: all rows.
        exact: a row sees its verticals and slashes only, and nothing of its neighbours'.

    Returns:
        The lists. On a device other than the CPU, without `exact`, indices come in buffers of fixed
        size that the counts fill in part: nothing is read back.

    Source:
        What to cover: the vertical-slash head of MInference (Jiang et al. 2024,
        arXiv:2407.02490), whose serial conversion loses verticals past the last slash and reads
        out of bounds where all slashes lie past a row block.
    """
    options: dict[str, Any] = {
        "seqlen_k": seqlen_k,
        "causal": causal,
        "block_m": block_m,
        "block_n": block_n,
    }
    if not ops.on_cpu(slashes) and not exact:
        if chunk is None:
            return slash_lists_torch(
                verticals, slashes, seqlen_q=seqlen_q, q_offset=q_offset, **options
            )
        return _chunks_torch(
            verticals, slashes, seqlen_q=seqlen_q, q_offset=q_offset, chunk=chunk, **options
        )
    # Bits are packed on the CPU whatever the device; the lists go back to it. The room that masks
    # may need at most, 512 bytes a vertical and tile, is too much to set aside.
    rounded = max(block_m, -(-seqlen_q // block_m) * block_m)
    lists = ops.vertical_slash_lists(
        verticals.cpu().int().contiguous(),
        slashes.cpu().contiguous(),
        seqlen_q=seqlen_q,
        q_offset=q_offset,
        chunk=rounded if chunk is None else chunk,
        exact=exact,
        **options,
    )
    return SlashLists(*(x.to(slashes.device) for x in lists[: 6 if exact else 4]))


def _chunks_torch(
    verticals: Tensor,
    slashes: Tensor,
    *,
    seqlen_q: int,
    q_offset: int,
    chunk: int,
    **options: Any,
) -> SlashLists:
    """`slash_lists_torch` chunk by chunk, the lists of a head put side by side."""
    starts = range(0, max(seqlen_q, 1), chunk)
    parts = [
        slash_lists_torch(
            verticals[c :: len(starts)],
            slashes[c :: len(starts)],
            seqlen_q=min(chunk, seqlen_q - start),
            q_offset=q_offset + start,
            **options,
        )
        for c, start in enumerate(starts)
    ]
    block_counts, block_indices = _side_by_side(
        [part.block_counts for part in parts], [part.block_indices for part in parts]
    )
    column_counts, column_indices = _side_by_side(
        [part.column_counts for part in parts], [part.column_indices for part in parts]
    )
    return SlashLists(block_counts, block_indices, column_counts, column_indices)


def _side_by_side(counts: list[Tensor], values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Joins lists [heads, tiles] of several parts along their tiles, heads staying in order."""
    joined = torch.cat(counts, 1)
    ends = joined.flatten().cumsum(0).view(joined.shape)
    capacity = sum(part.shape[0] for part in values)
    out = values[0].new_zeros(capacity + 1)
    tile = 0
    for count, value in zip(counts, values, strict=True):
        first = (ends - joined)[:, tile : tile + count.shape[1]].flatten()
        tile += count.shape[1]
        if first.numel() == 0:
            continue
        own_ends = count.flatten().cumsum(0)
        place = torch.arange(value.shape[0], device=value.device)
        # What no list holds goes to one slot that is cut off.
        of = torch.searchsorted(own_ends, place, right=True).clamp(max=first.shape[0] - 1)
        place = place + (first - (own_ends - count.flatten()))[of]
        out.scatter_(0, torch.where(place < ends.flatten()[-1], place, capacity), value)
    return joined, out[:-1]


def slash_lists_torch(
    verticals: Tensor,
    slashes: Tensor,
    *,
    seqlen_q: int,
    seqlen_k: int,
    q_offset: int,
    causal: bool,
    block_m: int,
    block_n: int,
) -> SlashLists:
    """`slash_lists` of one chunk in plain torch, for devices without a native operator."""
    heads, tiles = verticals.shape[0], -(-seqlen_q // block_m)
    device = slashes.device
    first = torch.arange(tiles, device=device, dtype=torch.int32) * block_m + q_offset
    limit = torch.full_like(first, seqlen_k - 1)
    if causal:
        limit = (first + block_m - 1).clamp(max=min(seqlen_q - 1 + q_offset, seqlen_k - 1))
    verticals = verticals.int().contiguous()
    # Distances past the last row's position reach no key; at least one keeps the axis non-empty.
    slashes = slashes[:, : max(1, seqlen_q + q_offset)]
    if slashes.shape[1] == 0:
        slashes = F.pad(slashes, (0, 1))
    most = _CPU_BAND_ELEMENTS if device.type == "cpu" else MAX_BAND_ELEMENTS
    blocks, columns = (
        ListBuffer(heads * sum(room), device)
        for room in _room(seqlen_q, seqlen_k, q_offset, causal, block_m, block_n, verticals)
    )
    block_counts, column_counts = [], []
    for outer, _ in bands(heads, 1, slashes.shape[1] + 2 * block_m, most):
        layout = _layout(slashes[outer], block_m, block_n)
        keys = verticals[outer]
        width = keys.shape[1] + layout.starts.shape[1] + layout.singles.shape[1] + block_n
        for inner, tile in bands(keys.shape[0], tiles, width, most):
            part = _Layout(
                layout.origin,
                layout.starts[inner],
                layout.singles[inner],
                layout.last[inner],
                layout.taken[inner],
            )
            kept, starts, listed, singles = _tile_lists(
                part, keys[inner], first[tile], limit[tile], block_n
            )
            blocks.append(kept, starts)
            columns.append(listed, singles)
            block_counts.append(kept.sum(-1).flatten())
            column_counts.append(listed.sum(-1).flatten())
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return SlashLists(
        torch.cat([none, *block_counts]).view(heads, tiles),
        blocks.values,
        torch.cat([none, *column_counts]).view(heads, tiles),
        columns.values,
    )


def _room(
    seqlen_q: int,
    seqlen_k: int,
    q_offset: int,
    causal: bool,
    block_m: int,
    block_n: int,
    verticals: Tensor,
) -> tuple[list[int], list[int]]:
    """The most blocks, and the most columns, that each tile of a head can list."""
    blocks, columns = [], []
    for row in range(0, seqlen_q, block_m):
        keys = seqlen_k
        if causal:
            keys = max(0, min(seqlen_k, min(row + block_m, seqlen_q) + q_offset))
        cuts = keys // block_n + 2
        blocks.append(cuts)
        # Single keys are rests that follow blocks, where a slash is no shorter than a block may be.
        rests = cuts * (_short(block_n) - 1) if block_m >= _short(block_n) else keys
        columns.append(min(keys, verticals.shape[1] + rests + block_n))
    return blocks, columns


def _layout(slashes: Tensor, block_m: int, block_n: int) -> _Layout:
    """Cuts the union of the slashes into blocks and single keys, on the u axis.

    Args:
        slashes: bool [heads, distances].
        block_m: rows of a tile: a slash covers that many u.
        block_n: keys of a block.
    """
    heads, distances = slashes.shape
    length = distances + block_m - 1
    covered = _spread(slashes.flip(-1), block_m)
    at = torch.arange(length, device=slashes.device).expand(heads, length)
    next_on = _next(covered, at)
    next_off = _next(~covered, at)
    # The layout is a chain: each block or rest decides where the following one starts. `follow`
    # is one step for every u; doubling it marks a whole chain in a logarithmic number of steps.
    rest = next_off[:, :length] - at
    is_block = rest >= _short(block_n)
    past = torch.where(is_block, at + block_n, next_off[:, :length]).clamp(max=length)
    follow = F.pad(next_on.gather(1, past), (0, 1), value=length)
    visited = torch.zeros(heads, length + 1, dtype=torch.bool, device=slashes.device)
    visited.scatter_(1, next_on[:, :1], True)
    steps = length // block_n + length // block_m + 2
    for _ in range(steps.bit_length()):
        visited.scatter_(1, torch.where(visited, follow, length), True)
        follow = follow.gather(1, follow)
    blocks = visited[:, :length] & is_block
    inside = _spread(blocks, block_n)
    covered = F.pad(covered, (0, block_n - 1))
    cuts = length // block_n + 1
    rests = cuts * (_short(block_n) - 1) if block_m >= _short(block_n) else length
    at = torch.arange(covered.shape[1], dtype=torch.int32, device=slashes.device)
    last = torch.where(covered, at, -1).cummax(-1).values
    singles = covered & ~inside
    return _Layout(
        distances - 1,
        _compact(blocks, cuts),
        _compact(singles, min(rests, length)),
        last,
        inside | covered,
    )


def _tile_lists(
    layout: _Layout, verticals: Tensor, first: Tensor, limit: Tensor, block_n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The blocks and the columns of some tiles: bool [heads, tiles, n], and int32 like it, keys.

    Args:
        layout: of these heads.
        verticals: int32 [heads, count], ascending.
        first: int32 [tiles], position of each tile's first row.
        limit: int32 [tiles], last key each tile may list.
        block_n: keys of a block.
    """
    shift = (first - layout.origin)[:, None]
    limit = limit[:, None]
    starts = layout.starts[:, None, :] + shift
    # At most one block of a tile straddles key 0. `edge` is where it ends, `head` where what the
    # slashes cover of it ends (keys between are not covered unless it stays a block).
    straddles = (starts < 0) & (starts > -block_n)
    edge = (straddles * (starts + block_n)).sum(-1, keepdim=True, dtype=torch.int32)
    u = (torch.minimum(edge - 1, limit) - shift).clamp(0, layout.last.shape[1] - 1)
    head = layout.last.gather(1, u.squeeze(-1).long()).unsqueeze(-1) + 1 + shift
    head = torch.minimum(head, limit + 1).clamp(min=0).masked_fill(edge == 0, 0)
    whole = (starts >= 0) & (starts <= limit)
    room = ~(whole & (starts < block_n)).any(-1, keepdim=True)
    as_block = (head >= _short(block_n)) & room
    kept = whole | (straddles & as_block)
    prefix = head.masked_fill(as_block, 0)  # leading keys 0 .. prefix - 1 become columns
    front = torch.where(as_block, block_n, head)  # keys below are in that block or that prefix
    columns = _columns(
        layout, verticals, shift, limit, prefix=prefix, front=front, edge=edge, most=block_n
    )
    return kept, starts.clamp(min=0), *columns


def _columns(
    layout: _Layout,
    verticals: Tensor,
    shift: Tensor,
    limit: Tensor,
    *,
    prefix: Tensor,
    front: Tensor,
    edge: Tensor,
    most: int,
) -> tuple[Tensor, Tensor]:
    """The columns: the prefix, of `most` keys at most, then verticals and singles merged.

    Both sources are ascending, so a column's place is the number of kept columns of each source
    before it, which prefix counts give without a sort.
    """
    heads, tiles = prefix.shape[:2]
    keys = verticals[:, None, :].expand(heads, tiles, -1)
    u = keys - shift
    in_slash = _lookup(layout.taken, u)
    keep = (keys <= limit) & (keys >= front) & ~(in_slash & (keys >= edge))
    before = keep.cumsum(-1, dtype=torch.int32)
    counts = prefix + before[..., -1:] if keep.shape[-1] else prefix
    places = prefix + before - 1
    parts = [(keys, keep, places)]

    if layout.singles.shape[-1]:
        more = layout.singles[:, None, :] + shift
        keep_more = (more <= limit) & (more >= front)
        before_more = keep_more.cumsum(-1, dtype=torch.int32)
        counts = counts + before_more[..., -1:]
        # Singles below each vertical, and verticals below each single: ranks of sorted lists.
        singles_below = torch.searchsorted(
            layout.singles, (u.flatten(1)).contiguous(), out_int32=True
        ).view(u.shape)
        rank = F.pad(before_more, (1, 0)).gather(-1, singles_below.long())
        parts[0] = (keys, keep, places + rank)
        verticals_below = torch.searchsorted(
            verticals, more.flatten(1).contiguous(), out_int32=True
        ).view(more.shape)
        rank = F.pad(before, (1, 0)).gather(-1, verticals_below.long())
        parts.append((more, keep_more, prefix + before_more - 1 + rank))

    lead = torch.arange(most, dtype=torch.int32, device=shift.device).expand(heads, tiles, -1)
    parts.append((lead, lead < prefix, lead))
    width = sum(values.shape[-1] for values, _, _ in parts)
    out = verticals.new_zeros(heads, tiles, width + 1)
    for values, chosen, place in parts:
        out.scatter_(-1, torch.where(chosen, place, width).long(), values)
    return torch.arange(width, device=shift.device) < counts, out[..., :-1]


def _short(block_n: int) -> int:
    """Fewer covered keys than this are cheaper as columns than as a block."""
    return max(1, block_n // 4)


def _spread(marks: Tensor, width: int) -> Tensor:
    """bool [heads, n + width - 1] with [i, i + width) set for every mark i of bool [heads, n]."""
    total = F.pad(marks.int(), (width, width - 1)).cumsum(-1, dtype=torch.int32)
    return total[:, width:] > total[:, :-width]


def _next(marks: Tensor, at: Tensor) -> Tensor:
    """int64 [heads, n + 1]: the first mark at or after each place, n if there is none."""
    length = marks.shape[-1]
    found = torch.where(marks, at, length).flip(-1).cummin(-1).values.flip(-1)
    return F.pad(found, (0, 1), value=length)


def _compact(marks: Tensor, count: int) -> Tensor:
    """int32 [heads, count]: places of the marks, at most `count`, ascending, then _FAR."""
    ranks = marks.cumsum(-1)
    out = torch.full((marks.shape[0], count + 1), _FAR, dtype=torch.int32, device=marks.device)
    places = torch.arange(marks.shape[1], dtype=torch.int32, device=marks.device)
    out.scatter_(1, torch.where(marks, ranks - 1, count), places.expand(marks.shape))
    return out[:, :count].contiguous()


def _lookup(table: Tensor, u: Tensor) -> Tensor:
    """table[head, u], False outside; table bool [heads, n], u int32 [heads, tiles, count]."""
    length = table.shape[-1]
    inside = (u >= 0) & (u < length)
    found = table.gather(1, u.clamp(0, length - 1).flatten(1).long()).view(u.shape)
    return found & inside
