# SPDX-License-Identifier: Apache-2.0
"""Hierarchical search: native on CPU tensors, plain torch on any other device.

The rules are those of `patterns.HiP` and `patterns.InfiniteHiP`. A tile's choice depends on its own
rows alone, so the torch forms run over a band of tiles at a time; nothing is read back.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn import ops
from sparse_attn.lists import ListBuffer, pack_bits
from sparse_attn.ops.hip import Pieces
from sparse_attn.selection.estimators import MAX_BAND_ELEMENTS, bands


def hip_tree(q: Tensor, k: Tensor, *, block_m: int, **options: Any) -> Pieces:
    """The leaves that a tree search keeps; arguments as `ops.hip_tree`."""
    if ops.on_cpu(q):
        return ops.hip_tree(q, k, block_m=block_m, **options)
    per_leaf = -(-options["leaf"] // options["stride_k"])
    return _by_bands(_tree, q, k, 2 * options["groups"] * per_leaf, block_m, None, options)


def hip_stage(
    q: Tensor, k: Tensor, *, block_m: int, parents: Pieces | None, **options: Any
) -> Pieces:
    """The chunks that one stage of pruning keeps; arguments as `ops.hip_stage`."""
    if ops.on_cpu(q):
        return ops.hip_stage(q, k, block_m=block_m, parents=parents, **options)
    chunks = k.shape[2] // options["chunk"]
    if parents is not None:
        chunks = parents[0].shape[-1] * (options["parent_chunk"] // options["chunk"])
    return _by_bands(_stage, q, k, 2 * (chunks + 1), block_m, parents, options)


def _by_bands(
    search: Any,
    q: Tensor,
    k: Tensor,
    keys: int,
    block_m: int,
    parents: Pieces | None,
    options: dict[str, Any],
) -> Pieces:
    """`search` over a band of tiles at a time, that score up to `keys` keys a list and step."""
    batch, heads, seqlen_q, dim = q.shape
    tiles = -(-seqlen_q // block_m)
    q_offset = options.pop("q_offset")
    found = []
    for _, band in bands(1, tiles, batch * heads * keys * (dim + block_m), MAX_BAND_ELEMENTS):
        first = band.start * block_m
        rows = q[:, :, first : band.stop * block_m]
        if parents is not None:
            options["parents"] = (parents[0][:, :, band], parents[1][:, :, band])
        found.append(search(rows, k, block_m=block_m, q_offset=q_offset + first, **options))
    if not found:
        shape = (batch, options["lists"], 0)
        room = options.get("groups", options.get("keep", 0))
        none = torch.zeros(shape, dtype=torch.int32, device=q.device)
        return none.new_zeros((*shape, room)), none
    starts, counts = zip(*found, strict=True)
    return torch.cat(starts, 2), torch.cat(counts, 2)


class _Rows:
    """The scored rows of every tile, and the scores of keys against them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        *,
        lists: int,
        block_m: int,
        stride_q: int,
        softmax_scale: float,
        averaged: bool,
    ) -> None:
        """Of every stride_q-th row, or of the means of stride_q rows; heads of a list together."""
        batch, heads, seqlen_q, dim = q.shape
        self.k, self.lists = k, lists
        # A unit is what shares both a list and a KV head.
        self.units = max(lists, k.shape[1])
        tiles = -(-seqlen_q // block_m)
        rows = F.pad(q.float() * softmax_scale, (0, 0, 0, tiles * block_m - seqlen_q))
        rows = rows.view(batch, heads, tiles, block_m, dim)
        there = torch.arange(tiles * block_m, device=q.device).view(tiles, block_m) < seqlen_q
        short = -block_m % stride_q
        steps = (block_m + short) // stride_q
        there = F.pad(there, (0, short)).view(tiles, steps, stride_q)
        rows = F.pad(rows, (0, 0, 0, short)).view(batch, heads, tiles, steps, stride_q, dim)
        if averaged:
            rows = rows.sum(4) / there.sum(-1).clamp(min=1)[..., None]
        else:
            rows = rows[:, :, :, :, 0]
        rows = rows.view(batch, self.units, -1, *rows.shape[2:]).transpose(2, 3)
        self.rows = rows.flatten(3, 4)  # [batch, units, tiles, heads * rows, head_dim]
        self.there = there[..., 0].repeat(1, heads // self.units)

    def scores(self, keys: Tensor) -> Tensor:
        """Best softmax_scale * q . k over the rows; keys int64 [batch, lists, tiles, n], clamped.

        Returns:
            float32 like keys; NaN counts as -inf.
        """
        batch, _, tiles, n = keys.shape
        heads_kv, seqlen_k, dim = self.k.shape[1:]
        wanted = keys.clamp(0, seqlen_k - 1).repeat_interleave(self.units // self.lists, 1)
        wanted = wanted.view(batch, heads_kv, -1, 1).expand(-1, -1, -1, dim)
        chosen = self.k.gather(2, wanted).view(batch, self.units, tiles, n, dim).float()
        products = torch.matmul(self.rows, chosen.transpose(-1, -2))
        hidden = products.isnan() | ~self.there[:, :, None]
        best = products.masked_fill(hidden, -math.inf).amax(-2)
        return best.view(batch, self.lists, -1, tiles, n).amax(2)


def _best(scores: Tensor, there: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Numbers of the `count` best that are there, ascending, and which of the places are taken."""
    n = scores.shape[-1]
    order = scores.masked_fill(~there, -math.inf).argsort(dim=-1, descending=True, stable=True)
    # A score of -inf still comes before what is not there.
    absent = (~there).gather(-1, order).to(torch.uint8)
    order = order.gather(-1, absent.argsort(dim=-1, stable=True))[..., :count]
    order = order.masked_fill(~there.gather(-1, order), n)
    order = F.pad(order, (0, count - order.shape[-1]), value=n).sort(-1).values
    return order.clamp(max=max(n - 1, 0)), order < n


def _tile_ends(seqlen_q: int, block_m: int, q_offset: int, device: torch.device) -> Tensor:
    """Position after every tile's last row, int64 [tiles]."""
    tiles = -(-seqlen_q // block_m)
    return (torch.arange(1, tiles + 1, device=device) * block_m).clamp(max=seqlen_q) + q_offset


def _tree(
    q: Tensor,
    k: Tensor,
    *,
    q_offset: int,
    softmax_scale: float,
    block_m: int,
    stride_q: int,
    lists: int,
    sink: int,
    window: int,
    groups: int,
    leaf: int,
    stride_k: int,
    center: bool,
) -> Pieces:
    seqlen_q, seqlen_k, device = q.shape[2], k.shape[2], q.device
    limit = (_tile_ends(seqlen_q, block_m, q_offset, device) - window).clamp(max=seqlen_k)[:, None]
    leaves = -((sink - limit).clamp(max=0) // leaf)
    pieces = leaves.clamp(max=groups)
    number = torch.arange(groups, device=device)
    shape = (q.shape[0], lists, limit.shape[0], groups)
    begin, end = ((x * leaves // pieces.clamp(min=1)).expand(shape) for x in (number, number + 1))
    there = (number < pieces).expand(shape)
    rows = _Rows(
        q,
        k,
        lists=lists,
        block_m=block_m,
        stride_q=stride_q,
        softmax_scale=softmax_scale,
        averaged=False,
    )
    most = -(min(sink - min(seqlen_q + q_offset - window, seqlen_k), 0) // leaf)
    widest = -(-most // groups)
    for _ in range((widest - 1).bit_length() if widest > 1 else 0):
        middle = begin + (end - begin) // 2
        there = torch.stack((there & (middle > begin), there), -1).flatten(-2)
        begin, end = (torch.stack(x, -1).flatten(-2) for x in ((begin, middle), (middle, end)))
        first = sink + (begin + (end - begin) // 2 if center else begin) * leaf
        keys = first[..., None] + torch.arange(0, leaf, stride_k, device=device)
        scores = rows.scores(keys.flatten(-2)).view(keys.shape)
        scores = scores.masked_fill(keys >= limit[..., None], -math.inf).amax(-1)
        order, there = _best(scores, there, groups)
        begin, end = begin.gather(-1, order), end.gather(-1, order)
    starts = (sink + begin * leaf).masked_fill(~there, -1)
    return starts.int(), there.sum(-1, dtype=torch.int32)


def _stage(
    q: Tensor,
    k: Tensor,
    *,
    q_offset: int,
    softmax_scale: float,
    block_m: int,
    stride_q: int,
    lists: int,
    sink: int,
    window: int,
    chunk: int,
    keep: int,
    overlap: int,
    parent_chunk: int,
    parents: Pieces | None = None,
) -> Pieces:
    batch, heads, seqlen_q, _ = q.shape
    device = q.device
    end = _tile_ends(seqlen_q, block_m, q_offset, device)[:, None]
    first = torch.arange(end.shape[0], device=device)[:, None] * block_m + q_offset
    inner = max(0, window - overlap)
    limit = (end - inner).clamp(max=k.shape[2])
    if parents is None:
        last = seqlen_q + q_offset - window
        start = torch.arange(sink, max(sink, last), chunk, device=device)
        there = start < end - window
    else:
        within = torch.arange(0, parent_chunk, chunk, device=device)
        start = (parents[0].long()[..., None] + within).flatten(-2)
        there = torch.arange(parents[0].shape[-1], device=device) < parents[1][..., None]
        there = there.repeat_interleave(within.shape[0], -1)
    there = there & (start >= 0) & (start <= first - inner) & (start < limit)
    shape = (batch, lists, end.shape[0], start.shape[-1])
    start, there = start.expand(shape), there.expand(shape)
    rows = _Rows(
        q,
        k,
        lists=heads,
        block_m=block_m,
        stride_q=stride_q,
        softmax_scale=softmax_scale,
        averaged=True,
    )
    # Every head walks by itself.
    left = start.repeat_interleave(heads // lists, 1)
    right = torch.minimum(left + chunk, limit)
    best = torch.full(left.shape, -math.inf, device=device)
    for _ in range(max(1, chunk.bit_length() - 1) if start.shape[-1] else 0):
        middle = left + (right - left) // 2
        keys = torch.stack(((left + middle) // 2, (middle + right) // 2), -1)
        scores = rows.scores(keys.flatten(-2)).view(keys.shape)
        left_wins = scores[..., 0] > scores[..., 1]
        best = torch.maximum(best, torch.where(left_wins, scores[..., 0], scores[..., 1]))
        left, right = torch.where(left_wins, left, middle), torch.where(left_wins, middle, right)
    scores = best.view(batch, lists, heads // lists, *shape[2:]).amax(2)
    order, kept = _best(scores, there, keep)
    if start.shape[-1] == 0:
        start = start.new_zeros((*shape[:3], 1))
    starts = start.gather(-1, order).masked_fill(~kept, -1)
    return starts.int(), kept.sum(-1, dtype=torch.int32)


# ------------------------------------------------------------------------------ lists


def leaf_lists(
    leaves: Pieces, **shape: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.leaf_lists`; off the CPU in buffers of fixed size, and masks of every tile's own."""
    return ops.leaf_lists(leaves, **shape) if ops.on_cpu(leaves[0]) else _lists(leaves, **shape)


def _lists(
    leaves: Pieces,
    *,
    seqlen_q: int,
    seqlen_k: int,
    q_offset: int,
    block_m: int,
    block_n: int,
    leaf: int,
    sink: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, lists, tiles, most = leaves[0].shape
    starts, counts = (x.flatten(0, 1) for x in leaves)
    device = starts.device
    # Keys that only the first rows of a tile have in their window: blocks with bits of their own.
    edges = -(-(block_m - 1) // block_n) if window > 0 else 0
    singles = min(seqlen_k, sink + most * leaf)
    cuts = min(singles + window, seqlen_k) // block_n + 2 + edges
    blocks, ids = (ListBuffer(batch * lists * tiles * cuts, device) for _ in range(2))
    columns = ListBuffer(batch * lists * tiles * singles, device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    block_counts, column_counts, masks = [none], [none], [none]
    width = seqlen_k + edges * block_n * block_m
    for outer, inner in bands(batch * lists, tiles, 8 * max(1, width)):
        tile = torch.arange(inner.start, inner.stop, device=device)[:, None]
        first = tile * block_m + q_offset
        last = ((tile + 1) * block_m).clamp(max=seqlen_q) - 1 + q_offset
        end = (last + 1).clamp(0, seqlen_k)
        edge, near = (
            torch.minimum((p - window + 1).clamp(min=0), end) if window > 0 else end
            for p in (first, last)
        )
        after = edge + -((edge - near) // block_n) * block_n
        key = torch.arange(seqlen_k, device=device)
        there = torch.arange(most, device=device) < counts[outer, inner, None]
        there = there & (starts[outer, inner] >= 0) & (starts[outer, inner] < near)
        covered = _in_leaves(starts[outer, inner], there, leaf, seqlen_k)
        covered = (covered | (key < sink) | (key >= near)) & (key < end)
        in_edge = (key >= edge) & (key < after)
        whole, single = _cut(covered & ~in_edge, end, block_n)
        part = in_edge & ((key - edge) % block_n == 0)
        list_ = torch.arange(outer.start, outer.stop, device=device)[:, None, None]
        number = torch.where(part, (list_ * tiles + tile) * edges + (key - edge) // block_n, -1)
        blocks.append(whole | part, key.int())
        ids.append(whole | part, number.int())
        columns.append(single, key.int())
        block_counts.append((whole | part).sum(-1).flatten())
        column_counts.append(single.sum(-1).flatten())
        if edges and seqlen_k:
            at = edge + torch.arange(edges * block_n, device=device)
            every = covered.gather(-1, at.clamp(max=seqlen_k - 1).expand(*covered.shape[:2], -1))
            seen_by = at - first + window  # rows of the tile that see a key by their window
            row = torch.arange(block_m, device=device)[:, None]
            split = (edges, 1, block_n)
            visible = every.view(*every.shape[:2], *split) | (row < seen_by.view(-1, *split))
            masks.append(pack_bits(visible.flatten(0, 2)).flatten())
    shape = (batch, lists, tiles)
    return (
        torch.cat(block_counts).view(shape),
        blocks.values,
        ids.values,
        torch.cat(masks),
        torch.cat(column_counts).view(shape),
        columns.values,
    )


def _in_leaves(starts: Tensor, there: Tensor, leaf: int, seqlen_k: int) -> Tensor:
    """bool [..., seqlen_k]: keys [start, start + leaf) of the leaves that are there."""
    depth = torch.zeros((*starts.shape[:-1], seqlen_k + 1), dtype=torch.int32, device=starts.device)
    begin = starts.long().masked_fill(~there, seqlen_k).clamp(max=seqlen_k)
    one = torch.ones_like(begin, dtype=torch.int32)
    depth.scatter_add_(-1, begin, one)
    depth.scatter_add_(-1, (begin + leaf).clamp(max=seqlen_k), -one)
    return depth[..., :-1].cumsum(-1) > 0


def _cut(runs: Tensor, end: Tensor, block_n: int) -> tuple[Tensor, Tensor]:
    """First keys of blocks, and single keys, of runs of keys.

    Every run of bool [..., tiles, seqlen_k] is cut into blocks from its begin on. A rest that is
    shorter becomes single keys, unless it reaches `end` [tiles, 1], past which no row sees a key.
    """
    if runs.shape[-1] == 0:
        return runs, runs
    key = torch.arange(runs.shape[-1], device=runs.device)
    begins = runs & ~F.pad(runs, (1, 0))[..., :-1]
    begin = torch.where(begins, key, -1).cummax(-1).values
    run_end = torch.where(runs, runs.shape[-1], key).flip(-1).cummin(-1).values.flip(-1)
    within = (key - begin) % block_n
    whole = (key - within + block_n <= run_end) | (run_end == end)
    return runs & whole & (within == 0), runs & ~whole
