# SPDX-License-Identifier: Apache-2.0
"""Operators that choose keys: their handles, and their shapes for tracing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn.ops.library import OPS


def window_scores(
    q: Tensor,
    k: Tensor,
    *,
    last_q: int,
    num_distances: int,
    q_offset: int,
    causal: bool,
    softmax_scale: float,
    maximum: bool = False,
) -> tuple[Tensor, Tensor]:
    """`selection.window_scores` on CPU tensors: sums, or maxima."""
    columns, diagonals = OPS.window_scores(
        q, k, last_q, num_distances, q_offset, causal, softmax_scale, maximum
    )
    return columns, diagonals


def top_k(scores: Tensor, k: int) -> Tensor:
    """`selection.top_k_indices` on a contiguous float32 CPU tensor [rows, n], 0 <= k <= n."""
    indices: Tensor = OPS.top_k(scores, k)
    return indices


def vertical_slash_lists(
    verticals: Tensor,
    slashes: Tensor,
    *,
    seqlen_q: int,
    seqlen_k: int,
    q_offset: int,
    causal: bool,
    block_m: int,
    block_n: int,
    chunk: int,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`patterns.slash_lists.slash_lists` on CPU tensors: its tensors, in their order.

    Without `exact` the last two are empty.
    """
    lists: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = OPS.vertical_slash_lists(
        verticals, slashes, seqlen_q, seqlen_k, q_offset, causal, block_m, block_n, chunk, exact
    )
    return lists


@torch.library.register_fake("sparse_attn::window_scores")  # type: ignore[untyped-decorator]
def _window_scores_fake(
    q: Tensor, k: Tensor, last_q: int, num_distances: int, *_: Any
) -> tuple[Tensor, Tensor]:
    columns = q.new_empty((*q.shape[:2], k.shape[2]), dtype=torch.float32)
    return columns, q.new_empty((*q.shape[:2], num_distances), dtype=torch.float32)


@torch.library.register_fake("sparse_attn::top_k")  # type: ignore[untyped-decorator]
def _top_k_fake(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty((scores.shape[0], k), dtype=torch.int32)


@torch.library.register_fake("sparse_attn::vertical_slash_lists")  # type: ignore[untyped-decorator]
def _vertical_slash_lists_fake(
    verticals: Tensor,
    slashes: Tensor,
    seqlen_q: int,
    seqlen_k: int,
    q_offset: int,
    causal: bool,
    block_m: int,
    block_n: int,
    chunk: int,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    chunks = max(1, (seqlen_q + chunk - 1) // chunk)
    counts = (verticals.shape[0] // chunks, (seqlen_q + block_m - 1) // block_m)
    context = torch.library.get_ctx()
    blocks, columns = context.new_dynamic_size(), context.new_dynamic_size()
    masks = context.new_dynamic_size() if exact else 0
    words = (block_m + 63) // 64
    return (
        verticals.new_empty(counts, dtype=torch.int64),
        verticals.new_empty(blocks),
        verticals.new_empty(counts, dtype=torch.int64),
        verticals.new_empty(columns),
        verticals.new_empty(blocks if exact else 0),
        verticals.new_empty((masks, block_n, words), dtype=torch.int64),
    )
