# SPDX-License-Identifier: Apache-2.0
"""Attention in stages against dense attention over the union, each key with its own query."""

from __future__ import annotations

import pytest
import torch
from bounds import assert_matches_oracle

import sparse_attn
from sparse_attn import (
    AShape,
    BlockSparse,
    SparseIndex,
    Stage,
    VerticalSlash,
    attention_stages,
    dual_chunk_attention,
)


def tensors(seqlen_q: int, seqlen_k: int, *, seed: int = 0, queries: int = 1):
    gen = torch.Generator().manual_seed(seed)
    q = [torch.randn(2, 4, seqlen_q, 16, generator=gen) for _ in range(queries)]
    k, v = torch.randn(2, 2, 2, seqlen_k, 16, generator=gen)
    return *q, k, v


def attended(queries, masks, k, v, dtype, scale=0.25):
    """out and lse where a row looks through each mask with another query."""
    group = queries[0].shape[1] // k.shape[1]
    k, v = (x.to(dtype).repeat_interleave(group, 1) for x in (k, v))
    logits = torch.full((*queries[0].shape[:3], k.shape[2]), -torch.inf, dtype=dtype)
    for q, mask in zip(queries, masks, strict=True):
        logits = torch.where(mask, scale * q.to(dtype) @ k.transpose(-1, -2), logits)
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp().masked_fill((lse == -torch.inf)[..., None], 0.0)
    return weights @ v, lse


def check(found, queries, masks, k, v):
    """Against the same in float64, within twice the error of plain float32."""
    exact = attended(queries, masks, k, v, torch.float64)
    plain = attended(queries, masks, k, v, torch.float32)
    for name, x, y, z in zip(("out", "lse"), found, exact, plain, strict=True):
        assert_matches_oracle(x, y, z, name=name)


# --- any stages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(0, 90), (0, 30, 90), (0, 1, 64, 89, 90), (0, 0, 40, 40, 90)])
def test_equal_queries_are_one_attention(cuts):
    q, k, v = tensors(50, 90)
    stages = [
        Stage(q, k[:, :, a:b], v[:, :, a:b], causal=True, q_offset=40 - a)
        for a, b in zip(cuts[:-1], cuts[1:], strict=True)
    ]
    found = attention_stages(stages, return_lse=True)
    check(found, [q], [torch.ones(50, 90, dtype=torch.bool).tril(40)], k, v)
    assert torch.equal(attention_stages(stages), found[0])


def test_every_stage_has_queries_of_its_own():
    *queries, k, v = tensors(50, 90, queries=3)
    bounds = ((0, 20), (20, 65), (65, 90))
    at = torch.arange(90)
    masks = [((at >= a) & (at < b)).expand(2, 4, 50, 90) for a, b in bounds]
    stages = [
        Stage(q, k[:, :, a:b], v[:, :, a:b]) for q, (a, b) in zip(queries, bounds, strict=True)
    ]
    check(attention_stages(stages, return_lse=True), queries, masks, k, v)


def test_stages_without_keys_and_rows_without_keys():
    """No dummy entries: a stage may list nothing, and so may all of them."""
    q, k, v = tensors(20, 60)
    nothing = torch.zeros(1, 1, 20, 30, dtype=torch.bool)
    some = nothing.clone()
    some[..., 5:, 3] = True
    stages = [
        Stage(q, k[:, :, :30], v[:, :, :30], SparseIndex.from_dense_mask(nothing)),
        Stage(q, k[:, :, 30:], v[:, :, 30:], SparseIndex.from_dense_mask(some)),
        Stage(q, k[:, :, :0], v[:, :, :0]),
    ]
    out, lse = attention_stages(stages, return_lse=True)
    masks = [torch.cat((nothing, some), -1).expand(2, 4, -1, -1)]
    check((out, lse), [q], masks, k, v)
    assert (out[:, :, :5] == 0).all() and (lse[:, :, :5] == -torch.inf).all()
    empty = attention_stages(stages[:1], return_lse=True)
    assert (empty[0] == 0).all() and (empty[1] == -torch.inf).all()


@pytest.mark.parametrize("pattern", [VerticalSlash(5, 50, 16, 2, 4), BlockSparse(top_k=3)])
def test_selection_may_look_at_other_queries(pattern):
    q, other, k, v = tensors(70, 300, queries=2)
    found = attention_stages([Stage(q, k, v, pattern, causal=True, selection_q=other)])
    index = pattern.build(other, k)
    assert torch.equal(found, sparse_attn.attention(q, k, v, index))
    assert not torch.equal(found, sparse_attn.attention(q, k, v, pattern))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda q, k, v: [], "no stage given"),
        (
            lambda q, k, v: [Stage(q, k, v), Stage(q[:, :, 1:], k, v)],
            r"q of stage 1 is \(2, 4, 8, 16\)",
        ),
        (
            lambda q, k, v: [Stage(q, k, v, selection_q=q[:, :, 1:])],
            r"selection_q of stage 0 is \(2, 4, 8, 16\), q is",
        ),
        (
            lambda q, k, v: [Stage(q, k, v, SparseIndex.dense(9, 9), selection_q=q)],
            "stage 0 has selection_q, but its pattern is a ready index",
        ),
    ],
)
def test_messages(make, text):
    with pytest.raises(ValueError, match=rf"sparse_attn\.attention_stages: .*{text}"):
        attention_stages(make(*tensors(9, 9)))


# --- dual chunk attention -------------------------------------------------------------------------


def stage_masks(seqlen_q, seqlen_k, chunk, offset):
    """Which keys each of the three queries looks at, [seqlen_q, seqlen_k] each."""
    p = torch.arange(seqlen_q)[:, None] + offset
    j = torch.arange(seqlen_k)
    back = p // chunk - j // chunk
    return (back == 0) & (j <= p), back == 1, back > 1


SHAPES = [(300, 300, 64), (100, 300, 64), (1, 300, 100), (130, 130, 200), (33, 97, 7)]


@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "chunk"), SHAPES)
def test_dense_stages_are_the_dense_rule(seqlen_q, seqlen_k, chunk):
    *queries, k, v = tensors(seqlen_q, seqlen_k, queries=3)
    found = dual_chunk_attention(*queries, k, v, chunk=chunk, return_lse=True)
    check(found, queries, stage_masks(seqlen_q, seqlen_k, chunk, seqlen_k - seqlen_q), k, v)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "chunk"), SHAPES)
def test_equal_queries_are_causal_attention(seqlen_q, seqlen_k, chunk):
    q, k, v = tensors(seqlen_q, seqlen_k)
    found = dual_chunk_attention(q, q, q, k, v, chunk=chunk, return_lse=True)
    causal = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).tril(seqlen_k - seqlen_q)
    check(found, [q], [causal], k, v)


def selected_mask(pattern, q, k, *, low, causal, offset, seqlen_k):
    """What the pattern shows of keys from `low` on, on the whole key axis."""
    index = pattern.build(q, k, causal=causal, q_offset=offset)
    mask = index.expand_heads(q.shape[1]).to_dense_mask(q_offset=offset)
    mask = mask.expand(q.shape[0], -1, -1, -1)
    if causal:
        limit = torch.arange(q.shape[2])[:, None] + offset
        mask = mask & (torch.arange(k.shape[2]) <= limit)
    return torch.nn.functional.pad(mask, (low, seqlen_k - low - k.shape[2]))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("other_selection", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(300, 300), (170, 300)])
def test_sparse_stages_are_dense_attention_over_their_union(
    seqlen_q, seqlen_k, other_selection, exact
):
    chunk, offset = 64, seqlen_k - seqlen_q
    *queries, k, v = tensors(seqlen_q, seqlen_k, queries=3)
    looking = [torch.randn_like(q) for q in queries] if other_selection else queries
    patterns = (
        VerticalSlash(4, 50, 16, 2, 3, exact=exact),
        VerticalSlash(3, 50, 16, 0, 5, exact=exact),
        VerticalSlash(6, 50, 16, 4, 0, exact=exact),
    )
    masks = [torch.zeros(2, 4, seqlen_q, seqlen_k, dtype=torch.bool) for _ in range(3)]
    for c in range(-(-seqlen_k // chunk)):
        rows = slice(max(0, c * chunk - offset), min(max(0, c * chunk + chunk - offset), seqlen_q))
        if rows.start >= rows.stop:
            continue
        stop = min(rows.stop + offset, seqlen_k)
        parts = ((c * chunk, stop), ((c - 1) * chunk, c * chunk), (0, (c - 1) * chunk))
        for i, (low, high) in enumerate(parts):
            if low < 0 or high <= low:
                continue
            masks[i][:, :, rows] = selected_mask(
                patterns[i],
                looking[i][:, :, rows],
                k[:, :, low:high],
                low=low,
                causal=i == 0,
                offset=rows.start + offset - low,
                seqlen_k=seqlen_k,
            )
    found = dual_chunk_attention(
        *queries,
        k,
        v,
        patterns[0],
        chunk=chunk,
        pattern_succ=patterns[1],
        pattern_inter=patterns[2],
        selection_q=tuple(looking) if other_selection else None,
        return_lse=True,
    )
    check(found, queries, masks, k, v)
    # No stage reaches into another's keys, and each leaves something out.
    regions = stage_masks(seqlen_q, seqlen_k, chunk, offset)
    assert all(not (mask & ~region).any() for mask, region in zip(masks, regions, strict=True))
    if exact:  # tiles of 64 rows cover whole chunks of 64
        assert all((mask != region).any() for mask, region in zip(masks, regions, strict=True))


def test_succ_reaches_every_diagonal():
    """Rows stand past the keys of their stage: distances go up to two chunks."""
    q, k, v = tensors(64, 128)
    pattern = VerticalSlash(0, 128, 64, 0, 0)
    options = {"chunk": 64, "pattern_succ": pattern, "return_lse": True}
    found = dual_chunk_attention(q, q, q, k, v, "dense", **options)
    check(found, [q], [torch.ones(64, 128, dtype=torch.bool).tril(64)], k, v)


def test_calls_of_a_chunk_each_are_one_call():
    """Dual chunks are cut by position, so a prefill in whole chunks equals one call."""
    *queries, k, v = tensors(256, 256, queries=3)
    pattern = VerticalSlash(4, 50, 16, 2, 3)
    whole = dual_chunk_attention(*queries, k, v, pattern, chunk=64)
    for first in range(0, 256, 128):
        rows, keys = slice(first, first + 128), slice(0, first + 128)
        part = dual_chunk_attention(
            *(q[:, :, rows] for q in queries), k[:, :, keys], v[:, :, keys], pattern, chunk=64
        )
        assert torch.equal(part, whole[:, :, rows])


def test_static_patterns_and_no_rows():
    q, k, v = tensors(200, 200)
    window = AShape(sink=0, window=70)
    found = dual_chunk_attention(q, q, q, k, v, window, chunk=64, return_lse=True)
    check(found, [q], [torch.ones(200, 200, dtype=torch.bool).tril().triu(-69)], k, v)
    none = q[:, :, :0]
    assert dual_chunk_attention(none, none, none, k, v, chunk=64).shape == (2, 4, 0, 16)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"chunk": 0}, "chunk=0 is below 1"),
        ({"chunk": 4, "q_offset": -1}, "row 0 is at position -1, before the first key"),
        ({"chunk": 4, "pattern_inter": SparseIndex.dense(9, 9)}, "a pattern is a ready index"),
    ],
)
def test_messages_of_dual_chunks(options, text):
    q, k, v = tensors(9, 9)
    with pytest.raises(ValueError, match=rf"sparse_attn\.dual_chunk_attention: {text}"):
        dual_chunk_attention(q, q, q, k, v, **options)
