# SPDX-License-Identifier: Apache-2.0
"""Operators of hierarchical pruning: their handles, and their shapes for tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_attn.ops.library import OPS

# The starts of pieces that a search keeps, int32 [batch, lists, tiles, n], ascending, -1 past
# their counts, int32 [batch, lists, tiles].
Pieces = tuple[Tensor, Tensor]


def hip_tree(
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
    """The leaves that a tree search keeps: the rule is in `patterns.HiP`.

    Args:
        q: [batch, num_heads, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        q_offset: position of query row 0 on the key axis.
        softmax_scale: factor of q . k.
        block_m: rows of a tile.
        stride_q: every how many rows of a tile one is scored.
        lists: how many lists there are; num_heads / lists neighbouring heads share one.
        sink: keys at the start that are no candidates (tokens).
        window: keys up to a tile's last row that are no candidates (tokens).
        groups: pieces kept at every step.
        leaf: keys of the smallest piece (tokens).
        stride_k: every how many keys of a leaf one is scored.
        center: whether a piece is represented by its middle leaf instead of its first.

    Raises:
        RuntimeError: a number is out of range, or shapes do not fit.
    """
    starts, counts = OPS.hip_tree(
        q,
        k,
        q_offset,
        softmax_scale,
        block_m,
        stride_q,
        lists,
        sink,
        window,
        groups,
        leaf,
        stride_k,
        center,
    )
    return starts, counts


def hip_stage(
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
    parents: Pieces | None,
    parent_chunk: int,
) -> Pieces:
    """The chunks that one stage of pruning keeps: the rule is in `patterns.InfiniteHiP`.

    Args:
        q, k, q_offset, softmax_scale, block_m, lists, sink, window: as in `hip_tree`.
        stride_q: how many neighbouring rows are averaged into one.
        chunk: keys of a chunk, a power of two (tokens).
        keep: chunks kept.
        overlap: keys of the window, at its start, that are candidates all the same (tokens).
        parents: chunks that the stage before kept; None for those of the whole key axis.
        parent_chunk: their keys, if any (tokens).

    Raises:
        RuntimeError: a number is out of range, or shapes do not fit.
    """
    before = (None, None) if parents is None else parents
    starts, counts = OPS.hip_stage(
        q,
        k,
        q_offset,
        softmax_scale,
        block_m,
        stride_q,
        lists,
        sink,
        window,
        chunk,
        keep,
        overlap,
        *before,
        parent_chunk,
    )
    return starts, counts


def leaf_lists(
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
    """Lists of key < sink, of the keys of a tile's leaves, and of (p - window, p] for a row at p.

    Args:
        leaves: what the search kept.
        seqlen_q, seqlen_k, q_offset: as in an index.
        block_m: rows of a tile.
        block_n: keys of a block.
        leaf: keys of a leaf (tokens).
        sink: keys at the start (tokens).
        window: keys back from a row, itself included (tokens).

    Returns:
        block counts int64 [batch, lists, tiles], block starts int32, their row of the masks or -1
        int32, masks int64 [masks * block_n * ceil(block_m / 64)], column counts int64 and columns
        int32.

    Raises:
        RuntimeError: a number is out of range, or shapes do not fit.
    """
    starts, counts = leaves
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = OPS.leaf_lists(
        starts, counts, seqlen_q, seqlen_k, q_offset, block_m, block_n, leaf, sink, window
    )
    return result


def _pieces_fake(capacity: int) -> Callable[..., Pieces]:
    """Fake of a search; which argument after `lists`, from 0, says how many pieces a tile keeps."""

    def fake(
        q: Tensor,
        k: Tensor,
        q_offset: int,
        softmax_scale: float,
        block_m: int,
        stride_q: int,
        lists: int,
        *rest: Any,
    ) -> Pieces:
        shape = (q.shape[0], lists, (q.shape[2] + block_m - 1) // block_m)
        starts = q.new_empty((*shape, rest[capacity]), dtype=torch.int32)
        return starts, q.new_empty(shape, dtype=torch.int32)

    return fake


torch.library.register_fake("sparse_attn::hip_tree", _pieces_fake(2))  # sink, window, groups
torch.library.register_fake("sparse_attn::hip_stage", _pieces_fake(3))  # sink, window, chunk, keep


@torch.library.register_fake("sparse_attn::leaf_lists")  # type: ignore[untyped-decorator]
def _leaf_lists_fake(
    starts: Tensor, counts: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    context = torch.library.get_ctx()
    blocks, masks, columns = (context.new_dynamic_size() for _ in range(3))
    return (
        counts.new_empty(counts.shape, dtype=torch.int64),
        counts.new_empty(blocks),
        counts.new_empty(blocks),
        counts.new_empty(masks, dtype=torch.int64),
        counts.new_empty(counts.shape, dtype=torch.int64),
        counts.new_empty(columns),
    )
