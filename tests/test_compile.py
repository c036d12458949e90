# SPDX-License-Identifier: Apache-2.0
"""torch.compile of the public functions: one graph, one compilation for all lengths, same numbers.

Most tests stop at "aot_eager", which traces, differentiates and runs fake tensors as "inductor"
does but generates no code.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_attn import (
    AShape,
    BlockSparse,
    Dense,
    PerHead,
    SlidingWindow,
    SparseIndex,
    VerticalSlash,
    attention,
    attention_decode,
    attention_varlen,
    merge_states,
)
from sparse_attn.attention import attention_ranges

STATIC = {
    "dense": Dense(),
    "a_shape": AShape(sink=3, window=20),
    "tri_shape": AShape(sink=3, window=20, dense_tail=5),
    "sliding_window": SlidingWindow(9),
    "per_head": PerHead({1: AShape(sink=8, window=16), 3: SlidingWindow(5)}, default=Dense()),
    "list": [Dense(), "a_shape", Dense(), SlidingWindow(9)],
    "named_dense": "dense",
    "named_a_shape": "a_shape",
    "named_tri_shape": "tri_shape",
}
# Building these inside a graph works too: the lists become tensors of unknown length.
TRACEABLE = {
    "block_sparse_top_k": BlockSparse(top_k=2),
    "block_sparse_threshold": BlockSparse(threshold=0.7),
    "vertical_slash": VerticalSlash(20, 20),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def qkv(seqlen_q: int, seqlen_k: int, batch: int = 1) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seqlen_q)
    shapes = ((batch, 4, seqlen_q, 16), (batch, 2, seqlen_k, 16), (batch, 2, seqlen_k, 24))
    return [torch.randn(shape, generator=gen) for shape in shapes]


def assert_same(actual, expected) -> None:
    """Equal bit for bit: the compiled graph calls the same kernels on the same numbers."""
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y) and x.stride() == y.stride()


def with_pattern(pattern, **more):
    def call(q, k, v):
        return attention(q, k, v, pattern, return_lse=True, **more)

    return call


def compiled(function, **more):
    """The compiled function and a counter of its graphs (`frame_count`)."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, **{"fullgraph": True, **more}), counter


def each(patterns):
    return pytest.mark.parametrize("pattern", patterns.values(), ids=patterns)


# --- one graph ------------------------------------------------------------------------------------


@each({**STATIC, **TRACEABLE})
def test_a_pattern_in_one_graph(pattern):
    eager = with_pattern(pattern)
    call, counter = compiled(eager)
    inputs = qkv(130, 197)
    assert_same(call(*inputs), eager(*inputs))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"causal": False, "softcap": 3.0},
        {"q_offset": 5, "softmax_scale": 0.5, "backend": "cpu"},
        {"sinks": torch.linspace(-1, 1, 4)},
    ],
    ids=["full_softcap", "offset_scale", "sinks"],
)
def test_every_setting_in_one_graph(settings):
    eager = with_pattern("a_shape", **settings)
    call, _ = compiled(eager)
    inputs = qkv(33, 70, batch=2)
    assert_same(call(*inputs), eager(*inputs))


def ready_indexes() -> dict[str, SparseIndex]:
    q, k, _ = qkv(130, 197)
    return {
        "streaming": AShape(sink=3, window=20).build(q, k),
        "columns": VerticalSlash(20, 20).build(q, k),
        "blocks": BlockSparse(top_k=2).build(q, k),
    }


@pytest.mark.parametrize("name", ready_indexes())
def test_a_ready_index_closed_over(name):
    index, inputs = ready_indexes()[name], qkv(130, 197)
    eager = with_pattern(index)
    call, counter = compiled(eager)
    assert_same(call(*inputs), eager(*inputs))
    assert counter.frame_count == 1


def test_a_ready_index_as_an_argument():
    """Another index of the same lengths, with longer lists, is no reason to compile for ever."""
    q, k, v = qkv(130, 197)
    call, counter = compiled(attention)
    for columns in (20, 30, 40, 50):
        index = VerticalSlash(columns, 20).build(q, k)
        assert torch.equal(call(q, k, v, index), attention(q, k, v, index))
    assert counter.frame_count <= 2  # fixed list lengths first, then any


def test_build_outside_and_attend_inside():
    """What the documentation recommends for patterns that read the data."""
    pattern = VerticalSlash(20, 20)
    call, _ = compiled(attention)
    for seqlen in (130, 150):
        q, k, v = qkv(seqlen, 197)
        assert torch.equal(call(q, k, v, pattern.build(q, k)), attention(q, k, v, pattern))


@pytest.mark.parametrize("parts", [1, 3])
def test_merge_states_in_one_graph(parts):
    halves = [attention(*qkv(17, 40 + i), return_lse=True, causal=False) for i in range(parts)]
    outs, lses = ([half[i] for half in halves] for i in (0, 1))
    lses[0][..., 3] = -torch.inf
    call, counter = compiled(merge_states)
    for x, y in zip(call(outs, lses), merge_states(outs, lses), strict=True):
        assert torch.equal(x, y)
    assert counter.frame_count == 1


def test_decode_in_one_graph():
    """The lengths of a cache are data: they change between calls of one graph."""
    q, k, v = qkv(1, 64, batch=2)
    call, counter = compiled(
        lambda q, k, v, lens: attention_decode(q, k, v, "a_shape", cache_seqlens=lens)
    )
    for lens in ([40, 7], [41, 8], [64, 1]):
        lens = torch.tensor(lens, dtype=torch.int32)
        expected = attention_decode(q, k, v, "a_shape", cache_seqlens=lens)
        assert torch.equal(call(q, k, v, lens), expected)
    assert counter.frame_count == 1


def test_ranges_in_one_graph():
    q, k, v = qkv(20, 30, batch=2)
    call, _ = compiled(
        lambda q, k, v, ranges: attention_ranges(q, k, v, "dense", ranges, return_lse=True)
    )
    for rows in ([[0, 20, 0, 30, 10], [3, 9, 2, 20, 11]], [[1, 5, 0, 30, 0], [0, 20, 0, 1, 0]]):
        ranges = torch.tensor(rows, dtype=torch.int32)
        expected = attention_ranges(q, k, v, "dense", ranges, return_lse=True)
        assert_same(call(q, k, v, ranges), expected)


def test_varlen_may_break_the_graph():
    """It reads cu_seqlens on the host to check them."""
    q, k, v = (x[0].transpose(0, 1) for x in qkv(30, 40))
    cu_q = torch.tensor([0, 11, 30], dtype=torch.int32)
    cu_k = torch.tensor([0, 15, 40], dtype=torch.int32)
    call, _ = compiled(attention_varlen, fullgraph=False)
    assert torch.equal(
        call(q, k, v, cu_q, cu_k, 19, 25, "a_shape"),
        attention_varlen(q, k, v, cu_q, cu_k, 19, 25, "a_shape"),
    )


# --- one compilation ------------------------------------------------------------------------------


@each(STATIC)
def test_dynamic_lengths_compile_once(pattern):
    eager = with_pattern(pattern)
    call, counter = compiled(eager, dynamic=True)
    for seqlen_q, seqlen_k in ((130, 197), (61, 61), (300, 301)):
        inputs = qkv(seqlen_q, seqlen_k)
        assert_same(call(*inputs), eager(*inputs))
    assert counter.frame_count == 1


def test_dynamic_lengths_of_a_data_dependent_pattern():
    eager = with_pattern(BlockSparse(top_k=2))
    call, counter = compiled(eager, dynamic=True)
    for seqlen in (130, 300):
        inputs = qkv(seqlen, seqlen + 60)
        assert_same(call(*inputs), eager(*inputs))
    assert counter.frame_count <= 2


def test_a_second_length_makes_the_graph_dynamic():
    """Without dynamic=True: the first length is compiled for itself, the second for any."""
    eager = with_pattern("a_shape")
    call, counter = compiled(eager)
    for seqlen in (64, 130, 257, 300):
        inputs = qkv(seqlen, seqlen)
        assert_same(call(*inputs), eager(*inputs))
    assert counter.frame_count == 2


def test_the_counter_sees_recompilation():
    call, counter = compiled(lambda q, k, v, window: attention(q, k, v, SlidingWindow(window)))
    with torch._dynamo.config.patch(assume_static_by_default=True, automatic_dynamic_shapes=False):
        for seqlen in (32, 33, 34):
            call(*qkv(seqlen, seqlen), 7)
    assert counter.frame_count == 3


# --- gradients ------------------------------------------------------------------------------------


def gradients(function, inputs: list[Tensor], sinks: Tensor | None = None) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = function(*leaves)
    (out.square().sum() + lse.sin().sum()).backward()
    assert all(x.grad is not None for x in leaves)
    return [out.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", ["per_head", "named_tri_shape"])
def test_gradients_in_one_graph(name, layout):
    eager = with_pattern(STATIC[name])
    call, counter = compiled(eager, dynamic=True)
    for seqlen in (33, 70):
        inputs = qkv(seqlen, seqlen + 9)
        if layout == "bshd":
            inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
        for x, y in zip(gradients(call, inputs), gradients(eager, inputs), strict=True):
            torch.testing.assert_close(x, y)
    assert counter.frame_count == 1


def test_gradients_of_sinks_with_a_ready_index():
    inputs = [*qkv(130, 197), torch.linspace(-1, 1, 4)]
    index = ready_indexes()["columns"]

    def eager(q, k, v, sinks):
        return attention(q, k, v, index, sinks=sinks, return_lse=True)

    call, _ = compiled(eager)
    for x, y in zip(gradients(call, inputs), gradients(eager, inputs), strict=True):
        torch.testing.assert_close(x, y)


# --- generated code -------------------------------------------------------------------------------


def test_inductor_forward_and_backward():
    """What surrounds the call is fused; the op still gets the strides that it was traced with."""

    def layer(x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, 16)).transpose(1, 2) for y in x.split((64, 32, 32), -1))
        out = attention(q * 2, k, v, PerHead({1: SlidingWindow(9)}, default=Dense()))
        return torch.relu(out.transpose(1, 2).flatten(2))

    def run(function, x):
        x = x.clone().requires_grad_()
        out = function(x)
        out.square().sum().backward()
        return out.detach(), x.grad

    call = torch.compile(layer, fullgraph=True, backend="inductor")
    x = torch.randn(2, 77, 128, generator=torch.Generator().manual_seed(0))
    for actual, expected in zip(run(call, x), run(layer, x), strict=True):
        torch.testing.assert_close(actual, expected)
