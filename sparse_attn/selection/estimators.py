# SPDX-License-Identifier: Apache-2.0
"""Estimators: cheap scores that stand for attention probabilities.

Here: an observation window (exact probabilities of the last few query rows, reduced along key
columns and along diagonals). Estimators are float32 whatever the input dtype, and never hold
seqlen_q x seqlen_k values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn import ops

MAX_BAND_ELEMENTS = 1 << 26
"""Most elements of one temporary; larger work is cut into bands of this size."""


def bands(
    outer: int, inner: int, width: int, limit: int = MAX_BAND_ELEMENTS
) -> Iterator[tuple[slice, slice]]:
    """Cuts a [outer, inner, width] piece of work into slices of at most `limit` elements.

    The slices come in row-major order, so results per slice concatenate to the whole. Whole outer
    entries go together while they fit; only when one is too large is its inner dimension cut.

    Args:
        outer: entries of the first dimension (for instance batch * heads).
        inner: entries of the second dimension (for instance query tiles).
        width: elements for each pair.
        limit: elements a slice may have (at least one pair goes through whatever its width).

    Yields:
        (slice of outer, slice of inner).
    """
    per_outer = max(1, inner * width)
    if per_outer <= limit:
        step = max(1, limit // per_outer)
        for start in range(0, outer, step):
            yield slice(start, min(start + step, outer)), slice(0, inner)
        return
    step = max(1, limit // max(1, width))
    for entry in range(outer):
        for start in range(0, inner, step):
            yield slice(entry, entry + 1), slice(start, min(start + step, inner))


def native_inputs(q: Tensor, k: Tensor) -> bool:
    """Whether the native CPU estimators take these tensors; others run in plain torch."""
    return (
        ops.on_cpu(q)
        and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and 0 < q.shape[-1] <= ops.MAX_HEAD_DIM
        and q.stride(-1) == 1
        and k.stride(-1) == 1
    )


def window_probs(
    q: Tensor, k: Tensor, *, softmax_scale: float, q_offset: int, causal: bool
) -> Tensor:
    """Exact attention probabilities of a few query rows.

    Args:
        q: [batch, heads, rows, head_dim].
        k: [batch, heads_kv, seqlen_k, head_dim]; query head h reads head h // (heads / heads_kv).
        softmax_scale: factor of the logits.
        q_offset: position of row 0 of `q` on the key axis.
        causal: whether row i sees only keys j <= i + q_offset.

    Returns:
        float32 [batch, heads, rows, seqlen_k]; a row that sees no key is all zero.
    """
    batch, heads, rows, _ = q.shape
    heads_kv, seqlen_k = k.shape[1], k.shape[2]
    grouped = (q.float() * softmax_scale).reshape(batch, heads_kv, -1, q.shape[-1])
    logits = torch.matmul(grouped, k.float().transpose(-1, -2)).view(batch, heads, rows, seqlen_k)
    if not causal:
        return torch.softmax(logits, dim=-1)
    last = torch.arange(q_offset, q_offset + rows, device=q.device)[:, None]
    hidden = torch.arange(seqlen_k, device=q.device) > last
    logits.masked_fill_(hidden, float("-inf"))
    probs = torch.softmax(logits, dim=-1)
    return probs.masked_fill_(hidden.all(-1, keepdim=True), 0.0) if q_offset < 0 else probs


def column_sums(probs: Tensor) -> Tensor:
    """Sum of every key column.

    Args:
        probs: float32 [..., rows, seqlen_k].

    Returns:
        float32 [..., seqlen_k].
    """
    return probs.sum(-2)


def diagonal_sums(probs: Tensor, *, q_offset: int, num_distances: int) -> Tensor:
    """Sum along every diagonal i + q_offset - j = s, for s in [0, num_distances).

    Args:
        probs: float32 [..., rows, seqlen_k]; row 0 sits at position q_offset.
        q_offset: position of row 0 on the key axis.
        num_distances: how many distances, from 0 up.

    Returns:
        float32 [..., num_distances]; entry s belongs to distance s.
    """
    return _along_diagonals(probs, q_offset, num_distances, maximum=False)


def diagonal_maxima(probs: Tensor, *, q_offset: int, num_distances: int) -> Tensor:
    """As `diagonal_sums`, the largest entry of every diagonal; the entries must not be negative."""
    return _along_diagonals(probs, q_offset, num_distances, maximum=True)


def _along_diagonals(probs: Tensor, q_offset: int, num_distances: int, *, maximum: bool) -> Tensor:
    rows, seqlen_k = probs.shape[-2:]
    if rows == 0:
        return probs.new_zeros(*probs.shape[:-2], num_distances)
    # Padding each row to `width` and re-reading the flat buffer with rows of width + 1 shifts row
    # r left by r, which turns diagonals into columns. Diagonal j - r = c lands in column
    # c + rows - 1, and the padding is wide enough that no row wraps into its neighbour's values.
    width = seqlen_k + 2 * (rows - 1)
    lead = probs.shape[:-2]
    flat = probs.new_zeros(*lead, rows * (width + 1))
    padded = flat[..., : rows * width].view(*lead, rows, width)
    padded[..., rows - 1 : rows - 1 + seqlen_k] = probs
    sheared = flat.view(*lead, rows, width + 1)
    sheared = sheared[..., : seqlen_k + rows - 1]
    by_shift = sheared.amax(-2) if maximum else sheared.sum(-2)
    # Distance s is j - r = q_offset - s: read the columns backwards from the one of s = 0, and
    # pad where a distance has no key at all.
    first = q_offset + rows - 1
    low = first - num_distances + 1
    span = by_shift.shape[-1]
    kept = by_shift[..., max(low, 0) : max(0, min(first + 1, span))]
    before = min(max(-low, 0), num_distances)
    after = num_distances - before - kept.shape[-1]
    return F.pad(kept, (before, after)).flip(-1)


def window_scores(
    q: Tensor,
    k: Tensor,
    *,
    last_q: int,
    num_distances: int,
    softmax_scale: float,
    q_offset: int,
    causal: bool,
    reduction: Literal["sum", "mean", "max"] = "sum",
) -> tuple[Tensor, Tensor]:
    """The probabilities of the last `last_q` query rows, reduced over columns and diagonals.

    With A the attention probabilities of the L = min(last_q, seqlen_q) rows, p a row's position:

        columns[j]   = reduction over rows of A[row, j]
        diagonals[s] = reduction over rows of A[row, p - s], 0 where there is no such key

    A mean divides by L in both; a NaN never becomes a maximum.

    Args:
        q: [batch, heads, seqlen_q, head_dim].
        k: [batch, heads_kv, seqlen_k, head_dim].
        last_q: rows of the observation window, clamped to seqlen_q.
        num_distances: distances 0 .. num_distances - 1 are summed.
        softmax_scale: factor of the logits.
        q_offset: position of query row 0 of `q` on the key axis.
        causal: whether row i sees only keys j <= i + q_offset.
        reduction: "sum" (MInference), "mean" (FlexPrefill) or "max" (KVzip and others that evict
            from a cache).

    Returns:
        (columns float32 [batch, heads, seqlen_k], diagonals float32 [batch, heads, num_distances]).

    Raises:
        ValueError: `reduction` is none of these.

    Example:
        >>> q, k = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8)
        >>> options = {"last_q": 2, "num_distances": 2, "softmax_scale": 1.0, "q_offset": 0}
        >>> columns, diagonals = window_scores(q, k, causal=True, **options)
        >>> columns.tolist(), diagonals.tolist()
        ([[[1.5, 0.5]]], [[[1.5, 0.5]]])

    Source:
        MInference 1.0 (Jiang et al. 2024, arXiv:2407.02490), algorithm 2, for any batch and GQA.
    """
    if reduction not in ("sum", "mean", "max"):
        raise ValueError(
            f"sparse_attn.window_scores: reduction={reduction!r} is unknown; "
            "pass 'sum', 'mean' or 'max'."
        )
    batch, heads, seqlen_q, head_dim = q.shape
    heads_kv, seqlen_k = k.shape[1], k.shape[2]
    rows = min(last_q, seqlen_q)
    if reduction == "mean":
        columns, diagonals = window_scores(
            q,
            k,
            last_q=rows,
            num_distances=num_distances,
            softmax_scale=softmax_scale,
            q_offset=q_offset,
            causal=causal,
        )
        return columns / max(rows, 1), diagonals / max(rows, 1)
    maximum = reduction == "max"
    if native_inputs(q, k):
        return ops.window_scores(
            q,
            k,
            last_q=rows,
            num_distances=num_distances,
            q_offset=q_offset,
            causal=causal,
            softmax_scale=softmax_scale,
            maximum=maximum,
        )
    group = heads // heads_kv
    # The KV head is the unit of work, so that K is read once a group: [batch * heads_kv, group].
    window = q[:, :, seqlen_q - rows :].reshape(batch * heads_kv, group, rows, head_dim)
    keys = k.flatten(0, 1).unsqueeze(1)
    parts: list[tuple[Tensor, Tensor]] = []
    for part, _ in bands(batch * heads_kv, 1, group * rows * (seqlen_k + 2 * rows)):
        probs = window_probs(
            window[part],
            keys[part],
            softmax_scale=softmax_scale,
            q_offset=q_offset + seqlen_q - rows,
            causal=causal,
        )
        distances = {"q_offset": q_offset + seqlen_q - rows, "num_distances": num_distances}
        if maximum:
            probs = probs.nan_to_num(nan=0.0)
            columns = F.pad(probs, (0, 0, 0, 1)).amax(-2)  # with no row at all, zeros
            parts.append((columns, diagonal_maxima(probs, **distances)))
        else:
            parts.append((column_sums(probs), diagonal_sums(probs, **distances)))
    columns, diagonals = (torch.cat(part) for part in zip(*parts, strict=True))
    return columns.view(batch, heads, seqlen_k), diagonals.view(batch, heads, num_distances)
