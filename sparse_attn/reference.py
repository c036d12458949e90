# SPDX-License-Identifier: Apache-2.0
"""The fp64 oracle: what every kernel and every index builder of the package is tested against.

Two halves that know nothing of each other, and of nothing else in the package:

* attention over a given boolean mask (`attention`, `attention_varlen`, `merge_states`);
* the mask of each pattern, restated from its written rule (`dense_mask`, `streaming_mask`,
  `block_sparse_mask`, `vertical_slash_mask`, ...).

Written to be read, not to be fast: masks are dense, selection loops over batch, heads and rows.
The masks never contain causality unless the rule itself does; `attention(causal=True)` adds it.

Vocabulary: row ``i`` of q stands at position ``p = i + q_offset`` of the key axis, and q_offset is
``seqlen_k - seqlen_q`` unless given (bottom-right alignment). Causal: key ``j`` is visible iff
``j <= p``. Selections order candidates by score descending, then by index ascending.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "attention",
    "attention_varlen",
    "block_sparse_blocks",
    "block_sparse_mask",
    "dense_mask",
    "mean_pooled_block_scores",
    "merge_states",
    "streaming_mask",
    "vertical_slash_mask",
    "vertical_slash_selection",
    "vertical_slash_tile_mask",
]

Selection = Sequence[Sequence[Sequence[int]]]
"""Chosen indices, nested [batch][heads][chosen]."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    q_offset: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact softmax attention over the keys that a mask allows, in fp64.

    With ``x = softmax_scale * q_i . k_j`` the logit is ``softcap * tanh(x / softcap) + bias_ij``
    (``x + bias_ij`` without softcap), and over the visible keys of row i

        lse_i = ln(exp(sink) + sum_j exp(logit_ij)),   out_i = sum_j exp(logit_ij - lse_i) v_j.

    A row that sees no key gives out 0 and lse -inf (lse = sink with sinks). Differentiable in q,
    k, v, bias and sinks; such rows have gradient 0, not NaN.

    Args:
        q: [batch, num_heads, seqlen_q, head_dim], any floating dtype.
        k: [batch, num_heads_kv, seqlen_k, head_dim]; query head h reads KV head
            ``h // (num_heads // num_heads_kv)``.
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        mask: bool, broadcastable to [batch, num_heads, seqlen_q, seqlen_k]; True is visible.
            None: every key.
        bias: added to the logit after softcap (natural-log units), same broadcasting. -inf hides
            a key.
        causal: hide keys past the row's position.
        softmax_scale: default ``1 / sqrt(head_dim)``.
        q_offset: position of row 0 on the key axis, tokens; default ``seqlen_k - seqlen_q``.
        softcap: cap of the scaled score; None or 0: none.
        sinks: [num_heads], a logit per head that has no value.

    Returns:
        out: float64 [batch, num_heads, seqlen_q, head_dim_v].
        lse: float64 [batch, num_heads, seqlen_q], natural logarithm.

    Raises:
        ValueError: the mask is not bool, or num_heads is no multiple of num_heads_kv.

    Example:
        >>> q, k = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8)
        >>> v = torch.tensor([[[[1.0], [3.0]]]])
        >>> out, lse = attention(q, k, v)  # row 0 sees key 0, row 1 sees both
        >>> out.flatten().tolist(), lse.exp().flatten().tolist()
        ([1.0, 2.0], [1.0, 2.0])

    Source: Vaswani et al. 2017 (arXiv 1706.03762), Eq. 1; grouped heads: Ainslie et al. 2023
    (arXiv 2305.13245), section 2; softcap: Gemma 2 report (arXiv 2408.00118), section 2; sinks:
    Xiao et al. 2023 (arXiv 2309.17453), Eq. 2 with a learned logit in place of 0.
    """
    num_heads, seqlen_q, head_dim = q.shape[1:]
    num_heads_kv, seqlen_k = k.shape[1:3]
    if num_heads % num_heads_kv != 0:
        raise ValueError(
            f"sparse_attn.reference.attention: num_heads={num_heads} is not a multiple of "
            f"num_heads_kv={num_heads_kv}; every KV head must serve the same number of heads."
        )
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(
            f"sparse_attn.reference.attention: mask has dtype {mask.dtype}, not torch.bool; "
            "pass logit offsets as bias."
        )
    group = num_heads // num_heads_kv
    q64 = q.double()
    k64 = k.double().repeat_interleave(group, dim=1)
    v64 = v.double().repeat_interleave(group, dim=1)

    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    logits = scale * (q64 @ k64.transpose(-1, -2))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.double()

    visible = torch.ones_like(logits, dtype=torch.bool)
    if mask is not None:
        visible = visible & mask
    if causal:
        p = _positions(seqlen_q, seqlen_k, q_offset, q.device)
        visible = visible & (torch.arange(seqlen_k, device=q.device) <= p[:, None])
    logits = logits.masked_fill(~visible, -math.inf)

    # A sink is one more key, whose value is zero; -inf where there is none.
    sink = logits.new_full((num_heads,), -math.inf) if sinks is None else sinks.double()
    sink_column = sink[None, :, None, None].expand(*logits.shape[:3], 1)
    logits = torch.cat([logits, sink_column], dim=-1)

    # -inf - (-inf) would be NaN: rows without keys subtract 0 and divide by 1 instead.
    row_max = logits.detach().amax(dim=-1, keepdim=True)
    row_max = torch.where(row_max == -math.inf, 0.0, row_max)
    weights = torch.exp(logits - row_max)
    total = weights.sum(dim=-1, keepdim=True)
    empty = total == 0
    safe_total = torch.where(empty, 1.0, total)
    out = (weights[..., :-1] / safe_total) @ v64
    lse = torch.where(empty, -math.inf, row_max + torch.log(safe_total))
    return out, lse.squeeze(-1)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    mask: Sequence[Tensor | None] | None = None,
    *,
    bias: Sequence[Tensor | None] | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    q_offset: int | Sequence[int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention` of every sequence of a packed batch, one after the other.

    Args:
        q: [total_q, num_heads, head_dim].
        k: [total_k, num_heads_kv, head_dim].
        v: [total_k, num_heads_kv, head_dim_v].
        cu_seqlens_q: int [num_sequences + 1], ascending from 0: sequence s owns rows
            ``cu_seqlens_q[s]`` to ``cu_seqlens_q[s + 1]``.
        cu_seqlens_k: the same for keys.
        mask: one entry per sequence, bool broadcastable to [num_heads, seqlen_q, seqlen_k] or None.
        bias: one entry per sequence, likewise.
        causal: bottom-right aligned within each sequence.
        softmax_scale: see `attention`.
        q_offset: one for all sequences, or one per sequence; default: each its own
            ``seqlen_k - seqlen_q``.
        softcap: see `attention`.
        sinks: see `attention`.

    Returns:
        out: float64 [total_q, num_heads, head_dim_v]. Rows outside every sequence are 0.
        lse: float64 [num_heads, total_q]. Rows outside every sequence are -inf.

    Source: the packed layout of FlashAttention (arXiv 2205.14135) implementations.
    """
    out = q.new_zeros((q.shape[0], q.shape[1], v.shape[2]), dtype=torch.float64)
    lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float64)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for s in range(len(starts_q) - 1):
        rows = slice(starts_q[s], starts_q[s + 1])
        keys = slice(starts_k[s], starts_k[s + 1])
        out_s, lse_s = attention(
            q[rows].transpose(0, 1)[None],
            k[keys].transpose(0, 1)[None],
            v[keys].transpose(0, 1)[None],
            None if mask is None else mask[s],
            bias=None if bias is None else bias[s],
            causal=causal,
            softmax_scale=softmax_scale,
            q_offset=q_offset if q_offset is None or isinstance(q_offset, int) else q_offset[s],
            softcap=softcap,
            sinks=sinks,
        )
        out[rows] = out_s[0].transpose(0, 1)
        lse[:, rows] = lse_s[0]
    return out, lse


def merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over disjoint key sets, joined into attention over their union, in fp64.

    ``lse = ln(sum_t exp(lse_t))`` and ``out = sum_t exp(lse_t - lse) out_t``. A part with
    lse -inf counts for nothing whatever its out holds; all parts -inf: out 0, lse -inf. A sink
    must have taken part in one of the parts only.

    Args:
        outs: parts, each [..., seqlen_q, head_dim_v].
        lses: their lse, each [..., seqlen_q], natural logarithm.

    Returns:
        out: float64 [..., seqlen_q, head_dim_v].
        lse: float64 [..., seqlen_q].

    Raises:
        ValueError: no part, or not as many outs as lses.

    Source: Milakov & Gimelshein 2018 (arXiv 1805.02867), section 3.1; for attention: Rabe & Staats
    2021 (arXiv 2112.05682), section 2.
    """
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(
            f"sparse_attn.reference.merge_states: {len(outs)} outs and {len(lses)} lses; "
            "pass one lse per out, and at least one of each."
        )
    part_lse = torch.stack([lse.double() for lse in lses])
    part_out = torch.stack([out.double() for out in outs])
    largest = part_lse.detach().amax(dim=0)
    largest = torch.where(largest == -math.inf, 0.0, largest)
    weights = torch.exp(part_lse - largest)
    total = weights.sum(dim=0)
    empty = total == 0
    safe_total = torch.where(empty, 1.0, total)
    shares = (weights / safe_total)[..., None]
    out = torch.where(shares > 0, shares * part_out, 0.0).sum(dim=0)
    return out, torch.where(empty, -math.inf, largest + torch.log(safe_total))


def dense_mask(seqlen_q: int, seqlen_k: int) -> Tensor:
    """Every key visible.

    Returns:
        bool [seqlen_q, seqlen_k], all True.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), Eq. 1.
    """
    return torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)


def streaming_mask(
    seqlen_q: int,
    seqlen_k: int,
    sink: int,
    window: int,
    dense_tail: int = 0,
    q_offset: int | None = None,
) -> Tensor:
    """Sink and window (A-shape); with `dense_tail` the tri-shape.

    Key j is visible to the row at position p iff ``j < sink`` or ``|p - j| < window``; the last
    `dense_tail` rows see every key. Not causal: under causality the window is the `window` keys
    that end with the row's own.

    Args:
        seqlen_q: rows.
        seqlen_k: keys.
        sink: first keys that every row sees, tokens.
        window: tokens, own key included; 0: no window.
        dense_tail: last rows that see every key.
        q_offset: position of row 0; default ``seqlen_k - seqlen_q``.

    Returns:
        bool [seqlen_q, seqlen_k].

    Example:
        >>> streaming_mask(4, 4, sink=1, window=1).int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]

    Source: Xiao et al. 2023 (arXiv 2309.17453), section 3.2; A-shape: Jiang et al. 2024
    (arXiv 2407.02490), section 3; tri-shape: Li et al. 2024 (arXiv 2412.10319).
    """
    i = torch.arange(seqlen_q)[:, None]
    j = torch.arange(seqlen_k)
    p = _positions(seqlen_q, seqlen_k, q_offset)[:, None]
    return (j < sink) | ((p - j).abs() < window) | (i >= seqlen_q - dense_tail)


def mean_pooled_block_scores(
    q: Tensor,
    k: Tensor,
    block_m: int = 64,
    block_n: int = 64,
    softmax_scale: float | None = None,
    causal: bool = True,
    q_offset: int | None = None,
) -> Tensor:
    """Scaled dot product of the mean row of each tile and the mean key of each block, in fp64.

    Means are over the rows and keys that exist: a last tile or block that is not full is not
    padded. Causal: a pair is allowed iff the position of the tile's last existing row is at or
    past the block's first key.

    Args:
        q: [batch, num_heads, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        block_m: rows per tile.
        block_n: keys per block.
        softmax_scale: default ``1 / sqrt(head_dim)``.
        causal: give pairs that are not allowed the score -inf.
        q_offset: position of row 0; default ``seqlen_k - seqlen_q``.

    Returns:
        float64 [batch, num_heads, ceil(seqlen_q / block_m), ceil(seqlen_k / block_n)].

    Source: Jiang et al. 2024 (arXiv 2407.02490), section 3, block-sparse head; unlike its code,
    which leaves the scale out and zero-pads, scores are scaled and means are exact.
    """
    seqlen_q, head_dim = q.shape[2:]
    seqlen_k = k.shape[2]
    offset = seqlen_k - seqlen_q if q_offset is None else q_offset
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    k64 = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    num_tiles, num_blocks = _ceil_div(seqlen_q, block_m), _ceil_div(seqlen_k, block_n)
    scores = torch.full((*q.shape[:2], num_tiles, num_blocks), -math.inf, dtype=torch.float64)
    for m in range(num_tiles):
        mean_q = q[:, :, m * block_m : (m + 1) * block_m].double().mean(dim=2)
        last_position = min((m + 1) * block_m, seqlen_q) - 1 + offset
        for n in range(num_blocks):
            if not causal or n * block_n <= last_position:
                mean_k = k64[:, :, n * block_n : (n + 1) * block_n].mean(dim=2)
                # Not a matmul: equal keys must give bitwise equal scores for ties to be ties.
                scores[:, :, m, n] = scale * (mean_q * mean_k).sum(dim=-1)
    return scores


def block_sparse_blocks(
    q: Tensor,
    k: Tensor,
    *,
    top_k: int | None = None,
    density: float | None = None,
    threshold: float | None = None,
    block_m: int = 64,
    block_n: int = 64,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    causal: bool = True,
    softmax_scale: float | None = None,
    q_offset: int | None = None,
) -> Tensor:
    """The key blocks that each tile of rows keeps, by mean-pooled score.

    Among a tile's allowed blocks (all blocks, or the block-causal ones) the first `sink_blocks`
    blocks of the key axis and `local_blocks` blocks ending with the one that contains the position
    of the tile's last existing row are forced. With `top_k` or `density` there is a budget: forced
    blocks count towards it, the rest of it is filled by score descending then index ascending, and
    if there are more forced blocks than budget all forced ones stay. With `threshold` a block is
    kept iff it is forced or its share of the softmax over the tile's allowed blocks is above it.

    Args:
        q: [batch, num_heads, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        top_k: budget, blocks per tile.
        density: budget, ``ceil(density * allowed blocks of the tile)``, in (0, 1]. The product is
            taken as exact: 0.07 of 100 is 7 although the floating-point product is above 7.
        threshold: strict lower bound of the share, in [0, 1). One of the three must be given.
        block_m: rows per tile.
        block_n: keys per block.
        sink_blocks: forced first blocks.
        local_blocks: forced diagonal blocks. A position past the last key has no block of its own,
            and the blocks before it count on from there.
        causal: only block-causal pairs are allowed.
        softmax_scale: default ``1 / sqrt(head_dim)``.
        q_offset: position of row 0; default ``seqlen_k - seqlen_q``.

    Returns:
        bool [batch, num_heads, ceil(seqlen_q / block_m), ceil(seqlen_k / block_n)].

    Raises:
        ValueError: not exactly one of top_k, density and threshold.

    Source: Jiang et al. 2024 (arXiv 2407.02490), section 3, block-sparse head; forced blocks as in
    Xu et al. 2025 (XAttention, arXiv 2503.16428).
    """
    if sum(rule is not None for rule in (top_k, density, threshold)) != 1:
        raise ValueError(
            f"sparse_attn.reference.block_sparse_blocks: top_k={top_k}, density={density}, "
            f"threshold={threshold}; give exactly one of them."
        )
    seqlen_q = q.shape[2]
    offset = k.shape[2] - seqlen_q if q_offset is None else q_offset
    scores = mean_pooled_block_scores(q, k, block_m, block_n, softmax_scale, causal, q_offset)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for b, h, m in _indices(scores.shape[:3]):
        row = scores[b, h, m].tolist()
        last_position = min((m + 1) * block_m, seqlen_q) - 1 + offset
        allowed = [n for n in range(len(row)) if not causal or n * block_n <= last_position]
        diagonal = last_position // block_n
        forced = {n for n in allowed if n < sink_blocks or diagonal - local_blocks < n <= diagonal}
        by_score = sorted(set(allowed) - forced, key=lambda n: (-row[n], n))
        if threshold is not None:
            largest = max((row[n] for n in allowed), default=0.0)
            total = sum(math.exp(row[n] - largest) for n in allowed)
            chosen = [n for n in by_score if math.exp(row[n] - largest) / total > threshold]
        else:
            budget = top_k if density is None else _exact_ceil(density * len(allowed))
            assert budget is not None
            chosen = by_score[: max(0, budget - len(forced))]
        kept[b, h, m, sorted(forced.union(chosen))] = True
    return kept


def block_sparse_mask(
    q: Tensor,
    k: Tensor,
    *,
    top_k: int | None = None,
    density: float | None = None,
    threshold: float | None = None,
    block_m: int = 64,
    block_n: int = 64,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    causal: bool = True,
    softmax_scale: float | None = None,
    q_offset: int | None = None,
) -> Tensor:
    """The element mask of `block_sparse_blocks`, which explains the rule and the arguments.

    `causal` decides which blocks may be chosen; inside a chosen block every key is visible.

    Returns:
        bool [batch, num_heads, seqlen_q, seqlen_k]: ``mask[i, j] = blocks[i // block_m,
        j // block_n]``.

    Raises:
        ValueError: not exactly one of top_k, density and threshold.

    Source: see `block_sparse_blocks`.
    """
    blocks = block_sparse_blocks(
        q,
        k,
        top_k=top_k,
        density=density,
        threshold=threshold,
        block_m=block_m,
        block_n=block_n,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        causal=causal,
        softmax_scale=softmax_scale,
        q_offset=q_offset,
    )
    rows = torch.arange(q.shape[2]) // block_m
    keys = torch.arange(k.shape[2]) // block_n
    return blocks[:, :, rows][:, :, :, keys]


def vertical_slash_selection(
    q: Tensor,
    k: Tensor,
    vertical: int,
    slash: int,
    last_q: int = 64,
    sink: int = 30,
    local: int = 100,
    *,
    min_slash: int = 50,
    causal: bool = True,
    softmax_scale: float | None = None,
    q_offset: int | None = None,
) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
    """MInference's choice of vertical columns and slash diagonals, per query head, in fp64.

    The softmax rows A of the last ``L = min(last_q, seqlen_q)`` queries are summed by column,
    ``ver[j] = sum_p A[p, j]``, and by diagonal, ``sla[s] = sum_p A[p, p - s]`` with s in
    [0, D), ``D = max(seqlen_k, seqlen_q + q_offset)``. Columns below `sink` and diagonals below
    `local` get +inf. Then V is the top ``min(seqlen_k, max(vertical, sink))`` columns, S the top
    ``min(D, max(slash, min_slash))`` diagonals.

    Ties are broken by index ascending. It decides more than equal scores: with
    ``max(slash, min_slash) < local`` all candidates for S are the forced ones, which tie at +inf,
    and S is the nearest diagonals ``0 .. max(slash, min_slash) - 1``.

    Args:
        q: [batch, num_heads, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim]; each query head chooses for itself.
        vertical: budget, columns.
        slash: budget, diagonals.
        last_q: queries that vote.
        sink: forced first columns, and the least number of columns.
        local: forced nearest diagonals.
        min_slash: the least number of diagonals.
        causal: softmax over keys at or before each query only. Otherwise over all keys; diagonals
            with s < 0 still do not exist.
        softmax_scale: default ``1 / sqrt(head_dim)``.
        q_offset: position of row 0; default ``seqlen_k - seqlen_q``.

    Returns:
        V: ascending columns, lists nested [batch][num_heads].
        S: ascending distances s, likewise.

    Source: Jiang et al. 2024 (arXiv 2407.02490), section 3, vertical-slash head; forced sets and
    minimum budgets as in the authors' code, ties fixed here.
    """
    batch, num_heads, seqlen_q, head_dim = q.shape
    seqlen_k = k.shape[2]
    group = num_heads // k.shape[1]
    offset = seqlen_k - seqlen_q if q_offset is None else q_offset
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    columns: list[list[list[int]]] = [[] for _ in range(batch)]
    slashes: list[list[list[int]]] = [[] for _ in range(batch)]
    for b, h in _indices((batch, num_heads)):
        keys = k[b, h // group].double()
        ver = torch.zeros(seqlen_k, dtype=torch.float64)
        sla = torch.zeros(max(seqlen_k, seqlen_q + offset), dtype=torch.float64)
        for i in range(max(0, seqlen_q - last_q), seqlen_q):
            p = i + offset
            seen = min(seqlen_k, p + 1) if causal else seqlen_k
            if seen <= 0:
                continue
            # Not a matmul: equal keys must give bitwise equal scores for ties to be ties.
            logits = scale * (q[b, h, i].double() * keys[:seen]).sum(dim=-1)
            row = torch.softmax(logits, dim=-1)
            ver[:seen] += row
            j = torch.arange(seen)
            j = j[p - j >= 0]
            sla[p - j] += row[j]
        ver[:sink] = math.inf
        sla[:local] = math.inf
        columns[b].append(_top(ver.tolist(), max(vertical, sink)))
        slashes[b].append(_top(sla.tolist(), max(slash, min_slash)))
    return columns, slashes


def vertical_slash_mask(
    V: Selection,
    S: Selection,
    seqlen_q: int,
    seqlen_k: int,
    q_offset: int | None = None,
) -> Tensor:
    """The keys that vertical-slash means: ``M[i, j] = (j in V) or (p - j in S)``.

    A vertical is visible to every row; causality is for the caller to add. A slash s >= 0 only
    reaches keys at or before the row's position.

    Args:
        V: columns in [0, seqlen_k), nested [batch][heads], any order.
        S: distances >= 0 from the aligned diagonal, nested likewise, any order.
        seqlen_q: rows.
        seqlen_k: keys.
        q_offset: position of row 0; default ``seqlen_k - seqlen_q``.

    Returns:
        bool [batch, heads, seqlen_q, seqlen_k].

    Example:
        >>> vertical_slash_mask([[[1]]], [[[0]]], 3, 3)[0, 0].int().tolist()
        [[1, 1, 0], [0, 1, 0], [0, 1, 1]]

    Source: Jiang et al. 2024 (arXiv 2407.02490), section 3, vertical-slash head.
    """
    j = torch.arange(seqlen_k)
    distance = _positions(seqlen_q, seqlen_k, q_offset)[:, None] - j
    mask = torch.zeros(len(V), len(V[0]), seqlen_q, seqlen_k, dtype=torch.bool)
    for b, h in _indices(mask.shape[:2]):
        in_v = torch.isin(j, torch.tensor(V[b][h], dtype=torch.int64))
        in_s = torch.isin(distance, torch.tensor(S[b][h], dtype=torch.int64))
        mask[b, h] = in_v | (in_s & (distance >= 0))
    return mask


def vertical_slash_tile_mask(
    V: Selection,
    S: Selection,
    seqlen_q: int,
    seqlen_k: int,
    q_offset: int | None = None,
    *,
    block_m: int = 64,
    block_n: int = 64,
    merge_runs: bool = False,
) -> Tensor:
    """The keys that tiles of `block_m` rows visit for a vertical-slash selection.

    For the tile whose first row is at position a, slash s covers the keys [a - s, a - s + w), where
    w is `block_m` rounded up to whole blocks of `block_n`; it starts at key 0 if ``a - s < 0``, is
    clipped to the keys that exist, and covers nothing if it lies past the tile's last row
    (``s >= a + block_m``). Every row of the tile sees that, and every vertical. No vertical is ever
    dropped. The result contains `vertical_slash_mask`, and like it no causality.

    Args:
        V: columns in [0, seqlen_k), nested [batch][heads], any order.
        S: distances >= 0 from the aligned diagonal, nested likewise, any order.
        seqlen_q: rows.
        seqlen_k: keys.
        q_offset: position of row 0; default ``seqlen_k - seqlen_q``.
        block_m: rows per tile.
        block_n: keys per block.
        merge_runs: False: the union of what each slash covers. True: what a walk from the
            farthest slash to the nearest emits as disjoint blocks: a run that a slash overlaps or
            touches grows by whole blocks until it contains it, so up to ``block_n - 1`` keys past
            the slash's end are covered too.

    Returns:
        bool [batch, heads, seqlen_q, seqlen_k].

    Source: Jiang et al. 2024 (arXiv 2407.02490), section 3, vertical-slash head, and the authors'
    index conversion without its loss of verticals.
    """
    offset = seqlen_k - seqlen_q if q_offset is None else q_offset
    width = _ceil_div(block_m, block_n) * block_n
    mask = torch.zeros(len(V), len(V[0]), seqlen_q, seqlen_k, dtype=torch.bool)
    for b, h, t in _indices((len(V), len(V[0]), _ceil_div(seqlen_q, block_m))):
        a = offset + t * block_m
        tile = mask[b, h, t * block_m : (t + 1) * block_m]
        run_end = None
        for s in sorted(set(S[b][h]), reverse=True):
            if s < 0 or s >= a + block_m:
                continue
            start = max(0, a - s)
            end = start + width
            if merge_runs and run_end is not None and start <= run_end:
                start = run_end
                end = start + _ceil_div(max(0, end - start), block_n) * block_n
            tile[:, start:end] = True
            run_end = end
        for j in V[b][h]:
            tile[:, j] = True
    return mask


def _positions(
    seqlen_q: int, seqlen_k: int, q_offset: int | None, device: torch.device | None = None
) -> Tensor:
    offset = seqlen_k - seqlen_q if q_offset is None else q_offset
    return torch.arange(seqlen_q, device=device) + offset


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _exact_ceil(x: float) -> int:
    # A product like 0.07 * 100 lands just above the integer it stands for.
    return math.ceil(x - 1e-9)


def _top(scores: list[float], count: int) -> list[int]:
    """The `count` best indices by score descending, index ascending; returned ascending."""
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    return sorted(order[:count])


def _indices(shape: Sequence[int]) -> list[tuple[int, ...]]:
    indices: list[tuple[int, ...]] = [()]
    for size in shape:
        indices = [(*index, i) for index in indices for i in range(size)]
    return indices
