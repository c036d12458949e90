# SPDX-License-Identifier: Apache-2.0
"""The keys of anchor attention: native on CPU tensors, plain torch on any other device."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn import ops
from sparse_attn.lists import marked_positions


class _Superblock(NamedTuple):
    """Rows [first, end), and the keys they look at: [0, sink), [low, high), and up to `limit`."""

    first: int
    end: int
    sink: int
    low: int
    high: int
    limit: int


def anchor_lists(
    q: Tensor,
    k: Tensor,
    *,
    block: int,
    step: int,
    sink: int,
    theta: float,
    q_offset: int,
    causal: bool,
    softmax_scale: float,
    block_n: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blocks and columns of every superblock; `patterns.AnchorAttention` states the rule.

    Args:
        q: [batch, num_heads, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        block: rows of a tile.
        step: tiles of a superblock.
        sink: first keys in every anchor.
        theta: how far below the mean of the anchor's best logits a key may lie.
        q_offset: position of row 0 on the key axis.
        causal: whether row i sees only keys j <= i + q_offset.
        softmax_scale: factor of the logits.
        block_n: keys of a block of the lists.

    Returns:
        Block counts int64 [batch, num_heads, superblocks], block starts int32, column counts and
        columns likewise, all superblocks in order. On a device other than the CPU the starts and
        columns come in buffers of fixed size that the counts fill in part: nothing is read back.
    """
    if ops.on_cpu(q):
        return ops.anchor_lists(
            _native(q),
            _native(k),
            block=block,
            step=step,
            sink=sink,
            theta=theta,
            q_offset=q_offset,
            causal=causal,
            softmax_scale=softmax_scale,
            block_n=block_n,
        )
    supers = _superblocks(q.shape[2], k.shape[2], block * step, sink, q_offset, causal)
    return _anchor_lists_torch(q, k, supers, block, theta, q_offset, causal, softmax_scale, block_n)


def _superblocks(
    seqlen_q: int, seqlen_k: int, size: int, sink: int, q_offset: int, causal: bool
) -> list[_Superblock]:
    found = []
    for first in range(0, seqlen_q, size):
        end, start = min(first + size, seqlen_q), first + q_offset
        limit = max(0, min(end + q_offset, seqlen_k)) if causal else seqlen_k
        lead = min(sink, limit)
        low, high = (min(max(x, lead), limit) for x in (start // size * size, start + size))
        found.append(_Superblock(first, end, lead, low, high, limit))
    return found


def _anchor_lists_torch(
    q: Tensor,
    k: Tensor,
    supers: list[_Superblock],
    block: int,
    theta: float,
    q_offset: int,
    causal: bool,
    softmax_scale: float,
    block_n: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`anchor_lists` on any device."""
    batch, heads = q.shape[:2]
    heads_kv, seqlen_k = k.shape[1:3]
    rows = q.detach().float().mul(softmax_scale)
    rows = rows.reshape(batch, heads_kv, heads // heads_kv, *q.shape[2:])
    keys = k.detach().float().unsqueeze(2)
    starts = torch.zeros(len(supers), seqlen_k, dtype=torch.bool, device=q.device)
    columns = starts.new_zeros((batch, heads, len(supers), seqlen_k))
    for s, super_ in enumerate(supers):
        part = rows[:, :, :, super_.first : super_.end]
        sums, bounds = _tile_bounds(part, keys, super_, block, theta, q_offset, causal)
        for low, high in ((super_.sink, super_.low), (super_.high, super_.limit)):
            near = sums @ keys[..., low:high, :].transpose(-1, -2) >= bounds[..., None]
            columns[:, :, s, low:high] = near.any(-2).flatten(1, 2)
        for low, high in ((0, super_.sink), (super_.low, super_.high)):
            # A run as blocks; where nothing follows it, the last block may run past it.
            rest = high if high == super_.limit else low + (high - low) // block_n * block_n
            starts[s, low:rest:block_n] = True
            columns[:, :, s, rest:high] = True
    starts = starts.expand(batch, heads, -1, -1)
    return (starts.sum(-1), marked_positions(starts), columns.sum(-1), marked_positions(columns))


def _tile_bounds(
    rows: Tensor,
    keys: Tensor,
    super_: _Superblock,
    block: int,
    theta: float,
    q_offset: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Per tile, over its rows that see an anchor key: their sum, and what a key must reach.

    Sums instead of means: the same rule, and exact where the inputs are.
    """
    device = rows.device
    place = torch.arange(super_.high, device=device)
    anchor = torch.cat((place[: super_.sink], place[super_.low :]))
    scores = rows @ torch.cat(
        (keys[..., : super_.sink, :], keys[..., super_.low : super_.high, :]), -2
    ).transpose(-1, -2)
    if causal:
        position = torch.arange(super_.first, super_.end, device=device)[:, None] + q_offset
        scores = scores.masked_fill(anchor > position, -math.inf)
    scores = scores.masked_fill(scores.isnan(), -math.inf)
    # A column of -inf, for rows without an anchor key.
    top = F.pad(scores, (0, 1), value=-math.inf).amax(-1)
    seeing = top > -math.inf
    short = -rows.shape[-2] % block

    def of_tiles(x: Tensor) -> Tensor:
        x = F.pad(x, (0,) * 2 * (x.dim() - 4) + (0, short))
        return x.reshape(*x.shape[:3], x.shape[3] // block, block, *x.shape[4:]).sum(4)

    sums = of_tiles(rows.masked_fill(~seeing[..., None], 0.0))
    count = of_tiles(seeing.float())
    bounds = of_tiles(top.masked_fill(~seeing, 0.0)) - count * theta
    return sums, bounds.masked_fill(count == 0, math.inf)


def _native(x: Tensor) -> Tensor:
    """The tensor as the native operator takes it; a padded head_dim leaves products as they are."""
    x = x.detach()
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        x = x.float()
    if x.shape[-1] % 8 != 0:
        x = F.pad(x, (0, -x.shape[-1] % 8))
    return x if x.stride(-1) == 1 else x.contiguous()
