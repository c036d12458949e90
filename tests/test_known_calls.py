# SPDX-License-Identifier: Apache-2.0
"""Calls that were made before skip the checks, never a difference between two calls."""

import pytest
import torch
from cases import same_bits

import sparse_attn
from sparse_attn import AShape, SlidingWindow, SparseIndex, known_calls


@pytest.fixture(autouse=True)
def nothing_known():
    known_calls._known.clear()


def qkv(seqlen_q=20, seqlen_k=30, heads=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    lengths = (seqlen_q, seqlen_k, seqlen_k)
    return [torch.randn(1, heads, n, 16, generator=generator).to(dtype) for n in lengths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["dense", AShape(4, 8, 2), SlidingWindow(5)])
def test_what_is_given_is_what_runs(pattern, dtype):
    """Options one after another, twice: every call gives what it gives with nothing known."""
    q, k, v = qkv(dtype=dtype)
    options = [
        {},
        {"causal": False},
        {"softmax_scale": 0.5},
        {"q_offset": 3},
        {"softcap": 1.0},
        {"sinks": torch.ones(2)},
        {"backend": "cpu"},
    ]
    inputs = [(q, k, v), (q, k[:, :, 3:], v[:, :, 3:]), (q[:, :, 1:], k, v), (q, k, v[..., :8])]
    calls = [(tensors, option) for tensors in inputs for option in options]
    first = []
    for tensors, option in calls:
        known_calls._known.clear()
        first.append(sparse_attn.attention(*tensors, pattern, return_lse=True, **option))
    for _ in range(2):
        for (tensors, option), (out, lse) in zip(calls, first, strict=True):
            again = sparse_attn.attention(*tensors, pattern, return_lse=True, **option)
            assert same_bits(again[0], out) and same_bits(again[1], lse)
            assert same_bits(sparse_attn.attention(*tensors, pattern, **option), out)
    assert len(known_calls._known) == 4 * len(inputs)


def test_wrong_calls_are_refused_after_right_ones():
    q, k, v = qkv()
    sparse_attn.attention(q, k, v)
    strided = torch.randn(1, 2, 30, 32)[..., ::2]
    for bad in ((q, strided, v), (q, k, strided)):
        with pytest.raises(ValueError, match="stride 2; pass"):
            sparse_attn.attention(*bad)
    with pytest.raises(ValueError, match="float16"):
        sparse_attn.attention(q, k, v.half())
    with pytest.raises(ValueError, match="meta"):
        sparse_attn.attention(q, k.to("meta"), v)
    for wrong in ({"causal": 1}, {"q_offset": 10.0}):
        with pytest.raises((TypeError, ValueError)):
            sparse_attn.attention(q, k, v, **wrong)


def test_gradients_of_a_known_call():
    q, k, v = qkv()
    sparse_attn.attention(q, k, v)
    q.requires_grad_()
    (known,) = torch.autograd.grad(sparse_attn.attention(q, k, v).sum(), q)
    known_calls._known.clear()
    (new,) = torch.autograd.grad(sparse_attn.attention(q, k, v).sum(), q)
    assert same_bits(known, new)


def test_what_is_not_kept():
    """An index, patterns that read q and k, and lists; and no more than a few calls."""
    q, k, v = qkv()
    index = SparseIndex.dense(20, 30)
    for pattern in (index, "adaptive", ["dense", AShape(4, 8)], sparse_attn.Dilated()):
        sparse_attn.attention(q, k, v, pattern)
    assert not known_calls._known
    for n in range(known_calls._MAX_KNOWN + 1):
        sparse_attn.attention(q, k, v, softmax_scale=1.0 + n)
    assert len(known_calls._known) <= known_calls._MAX_KNOWN


def test_under_a_trace_nothing_is_kept():
    q, k, v = qkv()
    graph = torch.compile(
        lambda q, k, v: sparse_attn.attention(q, k, v), fullgraph=True, backend="eager"
    )
    out = graph(q, k, v)
    assert not known_calls._known
    assert same_bits(out, sparse_attn.attention(q, k, v))
