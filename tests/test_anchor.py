# SPDX-License-Identifier: Apache-2.0
"""AnchorAttention against its rule in exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from bounds import assert_matches_oracle, plain_attention
from cases import CAPABILITIES
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import sparse_attn
from sparse_attn import AnchorAttention, ops, reference


def kept_of_superblock(q, k, positions, pattern, *, scale, causal):
    """(anchor keys, kept keys) of the rows q [rows, dim], ints, at `positions`; k [n, dim]."""
    size = pattern.block * pattern.step
    low = positions[0] // size * size
    high = positions[0] + size
    n = k.shape[0]
    last = min(n, positions[-1] + 1) if causal else n
    anchor = {j for j in range(max(0, last)) if j < pattern.sink or low <= j < high}
    logits = (q.long() @ k.long().T).tolist()
    bounds = []
    for first in range(0, len(positions), pattern.block):
        rows = []
        for r in range(first, min(first + pattern.block, len(positions))):
            seen = [logits[r][j] * scale for j in anchor if j <= positions[r] or not causal]
            if seen:
                rows.append((q[r].long(), max(seen)))
        if rows:
            total = sum(row for row, _ in rows)
            products = (k.long() @ total).tolist()
            bounds.append((products, len(rows), sum(top for _, top in rows) / len(rows)))
    kept = set()
    for j in set(range(max(0, last))) - anchor:
        for products, count, bound in bounds:
            if Fraction(products[j], count) * scale + Fraction(pattern.theta) >= bound:
                kept.add(j)
    return anchor, kept


def oracle(q, k, pattern, *, offset, causal, scale):
    """bool [batch, heads, seqlen_q, seqlen_k], causality included."""
    batch, heads, seqlen_q, _ = q.shape
    seqlen_k, group = k.shape[2], heads // k.shape[1]
    size = pattern.block * pattern.step
    mask = torch.zeros(batch, heads, seqlen_q, seqlen_k, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for first in range(0, seqlen_q, size):
                end = min(first + size, seqlen_q)
                anchor, kept = kept_of_superblock(
                    q[b, h, first:end],
                    k[b, h // group],
                    range(first + offset, end + offset),
                    pattern,
                    scale=Fraction(scale),
                    causal=causal,
                )
                mask[b, h, first:end, sorted(anchor | kept)] = True
    if causal:
        limit = torch.arange(seqlen_q)[:, None] + offset
        mask &= torch.arange(seqlen_k) <= limit
    return mask


def integers(*shape: int, seed: int, most: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).float()


def visible(index, heads, offset, causal):
    mask = index.validate().expand_heads(heads).to_dense_mask()
    limit = torch.arange(index.seqlen_q)[:, None] + offset
    return mask & (torch.arange(index.seqlen_k) <= limit) if causal else mask


@settings(max_examples=220, phases=(Phase.explicit, Phase.generate))  # shrinking takes minutes
@given(
    seed=st.integers(0, 2**31 - 1),
    batch=st.sampled_from([1, 1, 2, 3]),
    heads_kv=st.integers(1, 2),
    group=st.integers(1, 3),
    seqlen_q=st.one_of(*[st.integers(1, 130)] * 5, st.integers(1, 400)),  # the oracle is slow
    more=st.one_of(*[st.integers(0, 90)] * 5, st.integers(0, 300)),
    q_offset=st.one_of(st.none(), st.integers(-40, 120)),
    causal=st.booleans(),
    step=st.integers(1, 3),
    sink=st.sampled_from([0, 1, 7, 40, 64, 300]),
    theta=st.sampled_from([-1.0, 0.0, 0.25, 1.0, 3.5, 100.0]),
    scale=st.sampled_from([0.25, -0.5]),
)
def test_the_index_is_what_the_rule_says(
    seed, batch, heads_kv, group, seqlen_q, more, q_offset, causal, step, sink, theta, scale
):
    seqlen_k = seqlen_q + more
    q = integers(batch, heads_kv * group, seqlen_q, 8, seed=seed)
    k = integers(batch, heads_kv, seqlen_k, 8, seed=seed + 1)
    offset = more if q_offset is None else q_offset
    pattern = AnchorAttention(block=16, step=step, theta=theta, sink=sink)
    index = pattern.build(q, k, causal=causal, softmax_scale=scale, q_offset=q_offset)
    expected = oracle(q, k, pattern, offset=offset, causal=causal, scale=scale)
    assert torch.equal(visible(index, heads_kv * group, offset, causal), expected)


@pytest.mark.parametrize("seqlen", [127, 128, 129, 700])
def test_longer_ones(seqlen):
    q, k = integers(1, 2, seqlen, 8, seed=seqlen), integers(1, 1, seqlen, 8, seed=1)
    pattern = AnchorAttention(block=64, step=2, theta=0.5, sink=64)
    index = pattern.build(q, k, softmax_scale=0.25)
    expected = oracle(q, k, pattern, offset=0, causal=True, scale=0.25)
    assert torch.equal(visible(index, 2, 0, True), expected)


def test_more_tiles_in_a_superblock_than_a_kernel_tile_has_rows():
    # 80 tiles, of which only the last one asks for key 700.
    q, k = torch.zeros(1, 1, 1280, 8), integers(1, 1, 2560, 8, seed=6, most=1)
    q[0, 0, -16:, 0], k[0, 0, 700, 0], k[0, 0, 16:1280, 1:] = 4.0, 9.0, 0.0
    q[0, 0, :, 1], k[0, 0, 0, :2] = 4.0, torch.tensor([0.0, 9.0])  # all look at the sink
    pattern = AnchorAttention(block=16, step=80, theta=1.0, sink=16)
    index = pattern.build(q, k, softmax_scale=1.0)
    assert [key for key in index.column_indices.tolist() if key >= 16] == [700]


def test_by_hand():
    # Superblocks of 16 rows, one sink. Rows of the second all ask with q = 1; the best key of their
    # anchor is worth 5. theta 2 keeps what is worth 3 and more: keys 4 and 9, not key 6.
    q = torch.ones(1, 1, 32, 8) * torch.tensor([1.0] + [0.0] * 7)
    k = torch.zeros(1, 1, 32, 8)
    k[0, 0, :, 0] = 1.0
    k[0, 0, [0, 4, 6, 9, 16], 0] = torch.tensor([5.0, 3.0, 2.75, 4.0, 2.0])
    index = AnchorAttention(block=16, step=1, theta=2.0, sink=1).build(q, k, softmax_scale=1.0)
    mask = visible(index, 1, 0, True)[0, 0]
    assert mask[31].nonzero().flatten().tolist() == [0, 4, 9, *range(16, 32)]
    assert mask[:16].equal(torch.ones(16, 32, dtype=torch.bool).tril())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("head_dim", [8, 40, 12])
def test_dtypes_and_instruction_sets_choose_alike(monkeypatch, capability, dtype, head_dim):
    monkeypatch.setenv("SPARSE_ATTN_CPU_CAPABILITY", capability)
    try:
        ops.cpu_capability()
    except RuntimeError as error:
        pytest.skip(str(error))
    q, k = (integers(1, 2, 100, head_dim, seed=s).to(dtype) for s in (1, 2))
    pattern = AnchorAttention(block=16, step=2, theta=1.0, sink=4)
    expected = oracle(q, k, pattern, offset=0, causal=True, scale=0.25)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    for a, b in ((q, k), strided):
        index = pattern.build(a, b, softmax_scale=0.25)
        assert torch.equal(visible(index, 2, 0, True), expected)


def test_extremes_of_theta():
    q, k = torch.randn(1, 2, 100, 16), torch.randn(1, 1, 100, 16)
    everything = AnchorAttention(block=16, step=1, theta=math.inf, sink=0).build(q, k)
    assert visible(everything, 2, 0, True).equal(
        torch.ones(100, 100, dtype=torch.bool).tril().expand(1, 2, -1, -1)
    )
    nothing = AnchorAttention(block=16, step=1, theta=-math.inf, sink=16).build(q, k)
    assert (nothing.column_indices < 16).all()  # the sinks
    more = AnchorAttention(block=16, step=1, theta=4.0, sink=16).build(q, k).column_indices.numel()
    less = AnchorAttention(block=16, step=1, theta=1.0, sink=16).build(q, k).column_indices.numel()
    assert nothing.column_indices.numel() < less < more


def test_nan_keeps_nothing():
    q, k = integers(1, 1, 64, 8, seed=1), integers(1, 1, 64, 8, seed=2)
    k[0, 0, 20] = torch.nan
    mask = AnchorAttention(block=16, step=1, theta=100.0, sink=4).build(q, k).to_dense_mask()[0, 0]
    assert not mask[32:, 20].any() and mask[32:, 21].all()


def test_threads_and_order_change_nothing():
    q, k = torch.randn(2, 4, 700, 16), torch.randn(2, 2, 900, 16)
    pattern = AnchorAttention(block=32, step=4, theta=1.0, sink=32)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(pattern.build(q, k))
    names = ("block_indptr", "block_indices", "column_indptr", "column_indices")
    assert all(torch.equal(*(getattr(index, name) for index in found)) for name in names)
    mask = found[0].to_dense_mask()
    heads = [3, 2, 0, 1]
    moved = pattern.build(q[[1, 0]][:, heads], k[[1, 0]][:, [1, 0]]).to_dense_mask()
    assert torch.equal(moved, mask[[1, 0]][:, heads])


def test_superblocks_of_a_chunked_prefill():
    q, k = torch.randn(1, 2, 256, 16), torch.randn(1, 1, 300, 16)
    pattern = AnchorAttention(block=16, step=4, theta=1.0, sink=16)
    whole = pattern.build(q, k, q_offset=20).to_dense_mask()
    for first in range(0, 256, 64):
        rows = slice(first, first + 64)
        keys = 20 + first + 64
        part = pattern.build(q[:, :, rows], k[:, :, :keys]).to_dense_mask()
        seen = torch.arange(keys) <= torch.arange(first, first + 64)[:, None] + 20
        assert torch.equal(part & seen, whole[:, :, rows, :keys] & seen)


def test_attention_is_exact_over_what_was_chosen():
    q, k, v = torch.randn(2, 4, 300, 32), torch.randn(2, 2, 350, 32), torch.randn(2, 2, 350, 24)
    pattern = AnchorAttention(block=32, step=2, theta=1.0, sink=32)
    mask = visible(pattern.build(q, k), 4, 50, True)
    out, lse = sparse_attn.attention(q, k, v, pattern, return_lse=True)
    exact = reference.attention(q.double(), k.double(), v.double(), mask, causal=False)
    plain = plain_attention(q, k, v, mask, causal=False)
    for name, x, y, z in zip(("out", "lse"), (out, lse), exact, plain, strict=True):
        assert_matches_oracle(x, y, z, name=name)


def test_it_compiles_into_one_graph_and_passes_opcheck():
    def attend(q, k, v):
        return sparse_attn.attention(q, k, v, AnchorAttention(block=16, step=2, theta=1.0, sink=8))

    q, k, v = torch.randn(1, 4, 130, 16), torch.randn(1, 2, 197, 16), torch.randn(1, 2, 197, 16)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), attend(q, k, v))
    torch.library.opcheck(
        torch.ops.sparse_attn.anchor_lists.default,
        (q, k, 16, 2, 8, 1.0, 67, True, 0.25, 64),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_no_rows_or_no_keys(lengths):
    q, k = torch.randn(1, 2, lengths[0], 8), torch.randn(1, 1, lengths[1], 8)
    assert AnchorAttention().build(q, k).validate().num_tiles == min(1, lengths[0])


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: AnchorAttention(block=8), ValueError, "block=8 is below 16"),
        (lambda: AnchorAttention(block=24), ValueError, "block_m=24 is neither 1 nor a multiple"),
        (lambda: AnchorAttention(step=0), ValueError, "step=0 is below 1"),
        (lambda: AnchorAttention(sink=-1), ValueError, "sink=-1 is below 0"),
        (lambda: AnchorAttention(theta="a"), TypeError, "theta='a' is a str; pass a number"),
        (lambda: AnchorAttention(theta=math.nan), ValueError, "theta is NaN"),
    ],
)
def test_messages(make, error, text):
    with pytest.raises(error, match=rf"sparse_attn\.AnchorAttention: {text}"):
        make()


def test_the_operator_guards_its_sizes():
    q = torch.randn(1, 1, 4, 8)
    options = {"step": 1, "sink": 0, "theta": 1.0, "q_offset": 0, "causal": True}
    with pytest.raises(RuntimeError, match="anchor_lists: a size is out of range"):
        ops.anchor_lists(q, q, block=0, softmax_scale=1.0, block_n=64, **options)
