# SPDX-License-Identifier: Apache-2.0
"""Hierarchical pruning as loops over plain lists: the rule, and nothing of the package.

All of it works on `scores`: for one tile, what each key of the axis scores at best against the
tile's rows, as a list of floats.
"""

from __future__ import annotations

import torch
from torch import Tensor


def best(scored: list[tuple[float, int]], count: int) -> list[int]:
    """Numbers of the `count` best (score, number) pairs, ascending; equal scores: the lower."""
    return sorted(n for _, n in sorted(scored, key=lambda pair: (-pair[0], pair[1]))[:count])


def tree(scores, *, begin, end, groups, leaf, stride_k, center) -> list[int]:
    """First keys of the leaves that the tree search keeps of the candidates [begin, end)."""
    leaves = max(0, -(-(end - begin) // leaf))
    if leaves <= groups:
        return [begin + i * leaf for i in range(leaves)]

    def score(a: int, b: int) -> float:
        first = begin + ((a + b) // 2 if center else a) * leaf
        return max(scores[j] for j in range(first, min(first + leaf, end), stride_k))

    pieces = [(g * leaves // groups, (g + 1) * leaves // groups) for g in range(groups)]
    while max(b - a for a, b in pieces) > 1:
        halves = []
        for a, b in pieces:
            m = (a + b) // 2
            halves += [(a, b)] if b - a == 1 else [(a, m), (m, b)]
        kept = best([(score(a, b), i) for i, (a, b) in enumerate(halves)], groups)
        pieces = [halves[i] for i in kept]
    return [begin + a * leaf for a, _ in pieces]


def walk(scores, left: int, right: int, chunk: int) -> tuple[float, int]:
    """The best score met on the walk through [left, right), and the key it ends at."""
    top, size = -float("inf"), chunk
    while size >= 1:
        m = (left + right) // 2
        a, b = scores[(left + m) // 2], scores[(m + right) // 2]
        top = max(top, a, b)
        left, right = (left, m) if a > b else (m, right)
        size //= 2
    return top, left


def stage(scores_of_heads, starts, *, chunk, keep, last_start, end) -> list[int]:
    """The chunks of `starts` that one stage keeps."""
    starts = [s for s in starts if s <= last_start and s < end]
    scored = [
        max(walk(scores, s, min(s + chunk, end), chunk)[0] for scores in scores_of_heads)
        for s in starts
    ]
    return [starts[i] for i in best(list(zip(scored, range(len(starts)), strict=True)), keep)]


# ------------------------------------------------------------------------------ whole problems


def heads_of_lists(heads: int, heads_kv: int, share: str) -> list[list[int]]:
    """Query heads that share a list, for every list."""
    lists = {"none": heads, "kv": heads_kv, "all": 1}[share]
    return [list(range(i * heads // lists, (i + 1) * heads // lists)) for i in range(lists)]


def key_scores(q: Tensor, k: Tensor, head: int, scale: float, rows: Tensor) -> list[float]:
    """Best scaled score of every key of a head [seqlen_k] over `rows` [n, head_dim]."""
    keys = k[head // (q.shape[0] // k.shape[0])]
    logits = (rows.double() @ keys.double().T) * scale
    logits = torch.where(logits.isnan(), -torch.inf, logits)
    return logits.max(0).values.tolist()


def visible(leaves, *, leaf, sink, window, positions, seqlen_k) -> Tensor:
    """bool [rows, seqlen_k]: what rows at `positions` int64 [rows] see, causality included."""
    key = torch.arange(seqlen_k)
    chosen = torch.zeros(seqlen_k, dtype=torch.bool)
    for start in leaves:
        chosen[start : start + leaf] = True
    distance = positions[:, None] - key
    return (distance >= 0) & ((key < sink) | chosen | (distance < window))


def hip_leaves(p, q: Tensor, k: Tensor, heads: list[int], first: int, *, scale, offset):
    """Leaves of the tile that starts at row `first`, by HiP `p`, for one batch entry."""
    rows = q[:, first : first + p.block_m]
    end = first + rows.shape[1] + offset
    scored = [key_scores(q, k, h, scale, rows[h, :: p.stride_q]) for h in heads]
    return tree(
        [max(values) for values in zip(*scored, strict=True)],
        begin=p.sink,
        end=min(end - p.window, k.shape[1]),
        groups=p.mask_k // p.block_k,
        leaf=p.block_k,
        stride_k=p.stride_k,
        center=p.representative == "center",
    )


def infinite_stage(p, number, before, q, k, heads, first, *, scale, offset):
    """What stage `number` of InfiniteHiP `p` keeps; `before` is what the one before kept."""
    own = p.stages[number]
    rows = q[:, first : first + p.block_m]
    start, end = first + offset, first + rows.shape[1] + offset
    shrunk = max(0, p.window - p.stages[0].chunk)
    if number == 0:
        count = max(0, -(-(end - p.sink - p.window) // own.chunk))
        starts = [p.sink + c * own.chunk for c in range(count)]
    else:
        size = p.stages[number - 1].chunk
        starts = [s + i for s in before for i in range(0, size, own.chunk)]
    means = [
        torch.stack([part.double().mean(0) for part in rows[h].split(own.stride_q)]) for h in heads
    ]
    scored = [key_scores(q, k, h, scale, m) for h, m in zip(heads, means, strict=True)]
    left = p.k if number + 1 == len(p.stages) else p.stages[number + 1].k_in
    return stage(
        scored,
        starts,
        chunk=own.chunk,
        keep=left // own.chunk,
        last_start=start - shrunk,
        end=min(end - shrunk, k.shape[1]),
    )


def infinite_leaves(p, q, k, heads, first, *, scale, offset):
    """Leaves of the tile that starts at row `first`, by InfiniteHiP `p`, for one batch entry."""
    kept = None
    for number in range(len(p.stages)):
        kept = infinite_stage(p, number, kept, q, k, heads, first, scale=scale, offset=offset)
    return kept


def mask(p, leaves_of, leaf: int, q: Tensor, k: Tensor, *, scale, offset) -> Tensor:
    """bool [batch, num_heads, seqlen_q, seqlen_k]: every row's keys, causality included."""
    batch, heads, seqlen_q, _ = q.shape
    seqlen_k = k.shape[2]
    out = torch.zeros(batch, heads, seqlen_q, seqlen_k, dtype=torch.bool)
    for b in range(batch):
        for together in heads_of_lists(heads, k.shape[1], p.share):
            for first in range(0, seqlen_q, p.block_m):
                leaves = leaves_of(p, q[b], k[b], together, first, scale=scale, offset=offset)
                rows = torch.arange(first, min(first + p.block_m, seqlen_q))
                seen = visible(
                    leaves,
                    leaf=leaf,
                    sink=p.sink,
                    window=p.window,
                    positions=rows + offset,
                    seqlen_k=seqlen_k,
                )
                for head in together:
                    out[b, head, rows] = seen
    return out
