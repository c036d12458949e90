# SPDX-License-Identifier: Apache-2.0
"""Attention over a clustered prefix that estimates what a lookup leaves out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_attn.attention import attention, merge_states
from sparse_attn.index import SparseIndex
from sparse_attn.lists import indptr_from_counts
from sparse_attn.patterns.centroid_lookup import CentroidLookup


def centroid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lookup: CentroidLookup,
    *,
    softmax_scale: float | None = None,
    q_offset: int | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` with a lookup, plus one estimated key for every cluster that was not kept.

    A cluster of N keys that the lookup leaves out takes part with its centroid as the key, its mean
    value as the value, and a logit higher by ln N: as if all its keys were the centroid. It is a
    second attention call over the centroids, with that bias, merged by the log-sum-exp. Where a
    cluster's keys are equal the result is dense attention.

    Args:
        q: [batch, num_heads, seqlen_q, head_dim], rows behind the prefix, causal.
        k: [batch, num_heads_kv, seqlen_k, head_dim], the prefix first.
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        lookup: with an index that was fitted with values, and no tile.
        softmax_scale: default 1 / sqrt(head_dim).
        q_offset: position of row 0 on the key axis, default seqlen_k - seqlen_q.
        return_lse: whether to return the log-sum-exp too, of kept and estimated keys.
        options: softcap and backend, as in `attention`.

    Returns:
        As `attention`.

    Raises:
        TypeError, ValueError: an argument is wrong; the text says what is allowed.

    Source: the estimation zone of RetroInfer (Chen et al. 2025, arXiv:2505.02922), with Squeezed
        Attention's choice.
    """
    owner = "sparse_attn.centroid_attention"
    if not isinstance(lookup, CentroidLookup):
        raise TypeError(f"{owner}: lookup is a {type(lookup).__name__}; pass a CentroidLookup.")
    index = lookup.index
    if index is None or index.mean_values is None or lookup.tile is not None:
        raise ValueError(
            f"{owner}: the lookup has no index, no mean values or a tile of its own; pass "
            "CentroidIndex.fit(keys, values=values).lookup(...) without a tile."
        )
    if not set(options) <= {"softcap", "backend"}:
        raise TypeError(f"{owner}: {sorted(options)}; softcap and backend are the options.")
    offset = k.shape[2] - q.shape[2] if q_offset is None else q_offset
    if offset < index.length:
        raise ValueError(
            f"{owner}: row 0 is at position {offset}, inside the prefix of {index.length} keys; "
            "pass rows behind it."
        )
    scale = 1.0 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale
    with torch.no_grad():
        kept, choice = lookup.build_choice(q, k, softmax_scale=scale, q_offset=offset)
        missing = (index.counts > 0) & ~choice.keep[:, :, 0]
        clusters = missing.nonzero()[:, 2].int()
        estimated = SparseIndex.from_lists(
            seqlen_q=q.shape[2],
            seqlen_k=index.clusters,
            block_m=kept.block_m,
            block_n=64,
            column_indptr=indptr_from_counts(missing.sum(-1, keepdim=True)),
            column_indices=clusters,
            column_bias=index.counts[missing].float().log(),
        )
    parts = [
        attention(q, k, v, kept, q_offset=offset, softmax_scale=scale, return_lse=True, **options),
        attention(
            q,
            index.centroids.to(q.dtype),
            index.mean_values.to(v.dtype),
            estimated,
            causal=False,
            softmax_scale=scale,
            return_lse=True,
            **options,
        ),
    ]
    out, lse = merge_states([part[0] for part in parts], [part[1] for part in parts])
    return (out, lse) if return_lse else out
