# SPDX-License-Identifier: Apache-2.0
"""Selectors: deterministic choices from scores.

All of them order by score descending, then by index ascending. `torch.topk` alone leaves ties
open (they change with device and version), so it only supplies the k-th value here and the ties
at that value are settled by counting.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_attn import ops


def top_k_mask(scores: Tensor, k: int | Tensor, *, k_max: int | None = None) -> Tensor:
    """Marks the k best entries of every row.

    The order is score descending, then index ascending; a NaN counts as -inf, so that
    a row always has exactly min(k, n) marks.

    Args:
        scores: [..., n], floating point. +inf forces an entry, -inf puts it last.
        k: entries to mark; one number, or an integer tensor [...] with one a row.
        k_max: an upper bound of a tensor `k` known on the host, which saves a device read.

    Returns:
        bool [..., n].
    """
    n = scores.shape[-1]
    scores = scores.masked_fill(scores.isnan(), float("-inf"))
    if isinstance(k, int):
        k = max(0, min(k, n))
        if k == n or k == 0:
            return torch.full_like(scores, k == n, dtype=torch.bool)
        worst = scores.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        budget: int | Tensor = k
    else:
        rows = k.clamp(0, n).unsqueeze(-1)
        if rows.numel() == 0 or n == 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        limit = int(rows.max()) if k_max is None else max(0, min(k_max, n))
        if limit == 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        best = scores.topk(limit, dim=-1, sorted=True).values
        worst = best.gather(-1, (rows.to(torch.int64) - 1).clamp(min=0).expand(*best.shape[:-1], 1))
        budget = rows
    above = scores > worst
    level = scores == worst
    spare = budget - above.sum(-1, keepdim=True, dtype=torch.int32)
    mask = above | (level & (level.cumsum(-1, dtype=torch.int32) <= spare))
    return mask if isinstance(budget, int) else mask & (budget > 0)


def top_k_indices(scores: Tensor, k: int) -> Tensor:
    """Indices of the k best entries of every row, in ascending index order.

    Args:
        scores: [..., n], floating point.
        k: entries to choose, clamped to [0, n].

    Returns:
        int32 [..., min(k, n)], ascending. Which ones: see `top_k_mask`.
    """
    n = scores.shape[-1]
    k = max(0, min(k, n))
    if ops.on_cpu(scores) and scores.dtype == torch.float32:
        rows = scores.reshape(math.prod(scores.shape[:-1]), n).contiguous()
        return ops.top_k(rows, k).view(*scores.shape[:-1], k)
    mask = top_k_mask(scores, k)
    # A scatter to each mark's rank lists the marks in order without a read-back of their number;
    # unmarked entries share one slot that is cut off.
    slot = torch.where(mask, mask.cumsum(-1) - 1, k)
    index = torch.arange(n, dtype=torch.int32, device=scores.device).expand(scores.shape)
    out = scores.new_zeros((*scores.shape[:-1], k + 1), dtype=torch.int32)
    return out.scatter_(-1, slot, index)[..., :k]
