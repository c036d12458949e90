# SPDX-License-Identifier: Apache-2.0
"""Attention in stages: parts of the keys, each with queries of its own, merged by log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_attn.attention import attention, merge_states
from sparse_attn.index import SparseIndex
from sparse_attn.patterns import resolve

if TYPE_CHECKING:
    from sparse_attn.attention import PatternLike

__all__ = ["Stage", "attention_stages", "dual_chunk_attention"]


@dataclass(frozen=True, eq=False)
class Stage:
    """One part of the keys, and the queries that look at it.

    Attributes:
        q: [batch, num_heads, seqlen_q, head_dim].
        k: [batch, num_heads_kv, keys, head_dim], this stage's keys; there may be none.
        v: [batch, num_heads_kv, keys, head_dim_v].
        pattern: as in `attention`, over these keys. A stage that lists no key for a row is fine.
        causal: whether row i sees only this stage's keys j <= i + q_offset.
        q_offset: position of row 0, counted from this stage's first key; default keys - seqlen_q.
        selection_q: what the pattern looks at in place of q, shaped as it; None: q.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: PatternLike = "dense"
    causal: bool = False
    q_offset: int | None = None
    selection_q: Tensor | None = None


def attention_stages(
    stages: Sequence[Stage],
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the keys of all stages, which must not share any.

    With S_t the keys that row i sees in stage t and q_t its query there,

        out_i = softmax over all t and all j in S_t of (softmax_scale * q_t,i . k_t,j) times v_t,j.

    So with equal queries it is ordinary attention over the union, and with different ones it is
    what dual chunk attention or a capped relative position needs. Each stage is exact attention
    over its own keys; their results are merged by their log-sum-exps.

    Args:
        stages: at least one; their q differ in values only.
        softmax_scale, softcap, backend: as in `attention`.
        return_lse: also return the log-sum-exp over all stages.

    Returns:
        out [batch, num_heads, seqlen_q, head_dim_v]; with return_lse also lse float32
        [batch, num_heads, seqlen_q]. A row without any key gives 0 and -inf.

    Raises:
        ValueError: no stage, queries of different shapes, or a `selection_q` beside a ready index.
        TypeError, ValueError, UnsupportedError: as `attention`.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 8, 16)
        >>> parts = [Stage(q, k[:, :, s], v[:, :, s]) for s in (slice(0, 5), slice(5, 8))]
        >>> whole = attention(q, k, v, causal=False)
        >>> torch.allclose(attention_stages(parts), whole, atol=1e-5)
        True

    Source:
        Dual chunk attention (An et al. 2024, arXiv:2402.17463), as Qwen2.5-1M (Yang et al. 2025,
        arXiv:2501.15383, section 5.2) joins it with sparse attention.
    """
    if not stages:
        raise ValueError("sparse_attn.attention_stages: no stage given; pass at least one.")
    outs, lses = [], []
    for number, stage in enumerate(stages):
        if stage.q.shape != stages[0].q.shape:
            raise ValueError(
                f"sparse_attn.attention_stages: q of stage {number} is {tuple(stage.q.shape)}, "
                f"that of stage 0 {tuple(stages[0].q.shape)}; pass queries of one shape."
            )
        out, lse = attention(
            stage.q,
            stage.k,
            stage.v,
            _choice(number, stage, softmax_scale),
            causal=stage.causal,
            softmax_scale=softmax_scale,
            q_offset=stage.q_offset,
            return_lse=True,
            softcap=softcap,
            backend=backend,
        )
        outs.append(out)
        lses.append(lse)
    if len(stages) > 1:
        out, lse = merge_states(outs, lses)
    return (out, lse) if return_lse else out


def _choice(number: int, stage: Stage, softmax_scale: float | None) -> PatternLike:
    """The stage's pattern, or the index that it builds from `selection_q`."""
    if stage.selection_q is None:
        return stage.pattern
    if isinstance(stage.pattern, SparseIndex) or hasattr(stage.pattern, "kv_num_blocks"):
        raise ValueError(
            f"sparse_attn.attention_stages: stage {number} has selection_q, but its pattern is a "
            "ready index, which looks at no query; pass one of the two."
        )
    if stage.selection_q.shape != stage.q.shape:
        raise ValueError(
            f"sparse_attn.attention_stages: selection_q of stage {number} is "
            f"{tuple(stage.selection_q.shape)}, q is {tuple(stage.q.shape)}; pass the same shape."
        )
    with torch.no_grad():
        return resolve(stage.pattern, stage.q.shape[1]).build(
            stage.selection_q,
            stage.k,
            causal=stage.causal,
            softmax_scale=softmax_scale,
            q_offset=stage.q_offset,
        )


def dual_chunk_attention(
    q_intra: Tensor,
    q_succ: Tensor,
    q_inter: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: PatternLike = "dense",
    *,
    chunk: int,
    pattern_succ: PatternLike | None = None,
    pattern_inter: PatternLike | None = None,
    selection_q: tuple[Tensor, Tensor, Tensor] | None = None,
    q_offset: int | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention whose queries depend on how many chunks back a key lies.

    A row at position p is in chunk c = p // chunk. It looks with q_intra at the keys of its own
    chunk up to itself, with q_succ at those of chunk c - 1, and with q_inter at all before. The
    pattern chooses in every stage of every chunk anew: its own columns and diagonals, from that
    chunk's last rows if it is `VerticalSlash`, with distances p - j as always. In the two stages
    before the own chunk attention is not causal, and a `VerticalSlash` forces its first columns and
    nearest diagonals there too; pass other patterns for those stages to spare that.

    Rotating the queries is the caller's: by position p % chunk for q_intra, and by the capped
    positions of the paper for the others; the keys are rotated by p % chunk.

    Args:
        q_intra, q_succ, q_inter: [batch, num_heads, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        pattern: as in `attention`, no ready index; for the stage intra, and for those without one.
        chunk: keys of a chunk (tokens). Qwen2.5-1M: its chunk size less its local size, 7,168.
        pattern_succ: for the stage succ.
        pattern_inter: for the stage inter.
        selection_q: queries that the three stages' patterns look at instead, for instance rotated
            by the true distances; default the three queries.
        q_offset: position of row 0, default seqlen_k - seqlen_q.
        softmax_scale, return_lse, backend: as in `attention`.

    Returns:
        As `attention`.

    Raises:
        ValueError: `chunk` is below 1, q_offset negative, or a pattern a ready index.
        TypeError, ValueError, UnsupportedError: as `attention`.

    Source:
        An et al. 2024, arXiv:2402.17463; with sparse stages Yang et al. 2025, arXiv:2501.15383,
        section 5.2.
    """
    function = "sparse_attn.dual_chunk_attention"
    if chunk < 1:
        raise ValueError(f"{function}: chunk={chunk} is below 1; pass a number of tokens.")
    seqlen_q, seqlen_k = q_intra.shape[2], k.shape[2]
    offset = seqlen_k - seqlen_q if q_offset is None else q_offset
    if offset < 0:
        raise ValueError(
            f"{function}: row 0 is at position {offset}, before the first key; pass at least as "
            "many keys as rows, or a q_offset of 0 or more."
        )
    patterns = (pattern, pattern_succ or pattern, pattern_inter or pattern)
    for given in patterns:
        if isinstance(given, SparseIndex) or hasattr(given, "kv_num_blocks"):
            raise ValueError(
                f"{function}: a pattern is a ready index, which fits one stage of one chunk only; "
                "pass a Pattern, or run attention_stages yourself."
            )
    queries = (q_intra, q_succ, q_inter)
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    first = 0
    while first < seqlen_q or not outs:
        own = (first + offset) // chunk * chunk
        end = min(own + chunk - offset, seqlen_q)
        # Keys of the three stages; in the own chunk only those that are there by its last row.
        bounds = ((own, min(end + offset, seqlen_k)), (own - chunk, own), (0, own - chunk))
        stages = []
        for i, (low, high) in enumerate(bounds):
            keys = slice(min(max(low, 0), seqlen_k), min(max(high, 0), seqlen_k))
            if i > 0 and keys.start >= keys.stop:
                continue
            stages.append(
                Stage(
                    queries[i][:, :, first:end],
                    k[:, :, keys],
                    v[:, :, keys],
                    patterns[i],
                    causal=i == 0,
                    q_offset=first + offset - max(low, 0),
                    selection_q=None if selection_q is None else selection_q[i][:, :, first:end],
                )
            )
        out, lse = attention_stages(
            stages, softmax_scale=softmax_scale, return_lse=True, backend=backend
        )
        outs.append(out)
        lses.append(lse)
        first = max(end, first + 1)
    out, lse = torch.cat(outs, 2), torch.cat(lses, 2)
    return (out, lse) if return_lse else out
