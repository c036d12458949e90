# SPDX-License-Identifier: Apache-2.0
"""The door through torch's registry: against torch's own attention under a mask, and back again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.attention as torch_attention
import torch.nn.functional as F

from sparse_attn import AShape, BlockSparse
from sparse_attn.integrations import sdpa


@pytest.fixture(autouse=True)
def run_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """These calls are short, and would run densely: a pattern that is not run tests nothing."""
    monkeypatch.setenv("SPARSE_ATTN_FALLBACK", "0")


OP = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
PATTERN = AShape(sink=4, window=7)


def inputs(
    rows: int = 90, keys: int = 90, heads_kv: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 4, rows, 16), (2, heads_kv, keys, 16), (2, heads_kv, keys, 16))
    q, k, v = (torch.randn(s, generator=g).to(dtype) for s in shapes)
    return q, k, v


def a_shape(rows: int, keys: int, offset: int) -> torch.Tensor:
    p, j = torch.arange(rows)[:, None] + offset, torch.arange(keys)[None]
    return (j <= p) & ((j < 4) | (p - j < 7))


def masked(q: Any, k: Any, v: Any, mask: torch.Tensor) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    with torch_attention.sdpa_kernel(torch_attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def assert_within_bound(ours: torch.Tensor, tensors: Any, mask: torch.Tensor) -> None:
    """Twice the error of torch's plain kernel in the same precision, as in tests/bounds.py."""
    oracle = masked(*(x.double() for x in tensors), mask)
    eps = torch.finfo(ours.dtype).eps + torch.finfo(torch.float32).eps
    plain = (masked(*tensors, mask) - oracle).abs().max()
    assert (ours - oracle).abs().max() <= 2 * (plain + eps * oracle.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads_kv", [4, 2])
def test_self_attention_is_torch_under_the_mask(heads_kv: int, dtype: torch.dtype) -> None:
    tensors = inputs(heads_kv=heads_kv, dtype=dtype)
    with sdpa.enable(PATTERN) as handle:
        out = F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=heads_kv < 4)
    assert handle.calls == {"sparse": 1}
    assert_within_bound(out, tensors, a_shape(90, 90, 0))


@pytest.mark.parametrize(("rows", "keys"), [(40, 90), (90, 40), (1, 90)])
def test_causality_is_aligned_at_the_top_left(rows: int, keys: int) -> None:
    """torch's rule, and not this library's: row i sees keys j <= i."""
    tensors = inputs(rows, keys)
    with sdpa.enable(PATTERN) as handle:
        out = F.scaled_dot_product_attention(*tensors, is_causal=True)
    assert handle.calls == {"sparse": 1}
    mask = a_shape(rows, keys, 0)
    seen = mask.any(1)  # of a row without keys torch's plain kernel makes NaN; ours is 0
    q, k, v = tensors
    assert_within_bound(out[:, :, seen], (q[:, :, seen], k, v), mask[seen])
    assert not out[:, :, ~seen].any()


def test_decoding_has_a_pattern_of_its_own() -> None:
    tensors = inputs(1, 90)
    theirs = F.scaled_dot_product_attention(*tensors)
    with sdpa.enable(PATTERN) as handle:
        assert torch.equal(F.scaled_dot_product_attention(*tensors), theirs)
    assert handle.calls == {"decoding without a pattern for it": 1}
    with sdpa.enable("dense", decode=AShape(sink=4, window=7)) as handle:
        out = F.scaled_dot_product_attention(*tensors)
    assert handle.calls == {"sparse": 1}
    assert_within_bound(out, tensors, a_shape(1, 90, 89))


@pytest.mark.parametrize("pattern", [PATTERN, BlockSparse(top_k=2, block_m=16, block_n=16)])
def test_gradients_are_those_of_the_sparse_attention(pattern: Any) -> None:
    from sparse_attn import attention

    grads = []
    for run in (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda q, k, v: attention(q, k, v, pattern, q_offset=0),
    ):
        tensors = [x.requires_grad_() for x in inputs()]
        with sdpa.enable(pattern) as handle:
            run(*tensors).square().sum().backward()
        grads.append([x.grad for x in tensors])
    assert handle.calls == {}  # the second run did not come by torch
    assert all(torch.equal(a, b) for a, b in zip(*grads))


MASK = torch.randn(90, 90, generator=torch.Generator().manual_seed(1))
FALLBACKS = {
    "attn_mask": (inputs(), {"attn_mask": MASK}),
    "bool_mask": (inputs(), {"attn_mask": MASK > 0}),
    "cross-attention": (inputs(40, 90), {}),
    "head_dim not a multiple of 8": ([x[..., :12].contiguous() for x in inputs()], {}),
    "it runs float32, bfloat16 and float16, not torch.float64": (
        [x.double() for x in inputs()],
        {},
    ),
}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("reason", FALLBACKS)
def test_what_the_pattern_is_not_for_is_torch_as_before(reason: str, gradient: bool) -> None:
    tensors, options = FALLBACKS[reason]
    results = []
    for on in (False, True):
        own = [x.clone().requires_grad_(gradient) for x in tensors]
        handle = sdpa.enable(PATTERN) if on else None
        out = F.scaled_dot_product_attention(*own, **options)
        if gradient:
            out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in own if gradient)])
        if handle is not None:
            handle.disable()
            assert handle.calls == {reason.replace("bool_mask", "attn_mask"): 1}
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_dropout_and_odd_shapes_stay_with_torch() -> None:
    q, k, v = inputs()
    with sdpa.enable(PATTERN) as handle:
        torch.manual_seed(3)
        dropped = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        flat = F.scaled_dot_product_attention(q[0], k[0], v[0], is_causal=True)
    torch.manual_seed(3)
    assert torch.equal(dropped, F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    assert torch.equal(flat, F.scaled_dot_product_attention(q[0], k[0], v[0], is_causal=True))
    assert handle.calls["sparse"] == 0


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_calls(grad: bool) -> None:
    tensors = [x.requires_grad_(grad) for x in inputs()]

    def call(q: Any, k: Any, v: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2

    torch._dynamo.reset()
    with sdpa.enable(PATTERN), torch.set_grad_enabled(grad):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*tensors), call(*tensors))
    torch._dynamo.reset()


def test_a_graph_compiled_before_follows() -> None:
    def call(q: Any, k: Any, v: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    before = compiled(*inputs())
    with sdpa.enable(PATTERN) as handle:
        assert torch.equal(compiled(*inputs()), call(*inputs()))
        assert handle.calls == {"sparse": 2}
    assert torch.equal(compiled(*inputs()), before)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------ and back again


def state() -> list[Any]:
    from torch.nn.attention import _registry

    kernels = [repr(torch.library.get_kernel(OP, key)) for key in ("CPU", "AutogradCPU")]
    return [
        F.scaled_dot_product_attention,
        dict(_registry._FLASH_ATTENTION_IMPLS),
        torch_attention.current_flash_attention_impl(),
        kernels,
    ]


def test_torch_is_left_as_it_was() -> None:
    before, out = state(), F.scaled_dot_product_attention(*inputs(), is_causal=True)
    handle = sdpa.enable(PATTERN)
    assert F.scaled_dot_product_attention is before[0]  # nothing of Python's is replaced
    assert torch_attention.current_flash_attention_impl() == "sparse_attn"
    assert state()[3] != before[3]
    handle.disable()
    handle.disable()
    assert state() == before
    assert torch.equal(F.scaled_dot_product_attention(*inputs(), is_causal=True), out)


def test_an_error_inside_leaves_torch_as_it_was() -> None:
    before = state()
    with (
        pytest.raises(ValueError, match="3 patterns for 4 query heads"),
        sdpa.enable(["dense"] * 3),
    ):
        F.scaled_dot_product_attention(*inputs(), is_causal=True)
    assert state() == before


@pytest.mark.parametrize("outer_first", [False, True])
def test_several_at_once(outer_first: bool) -> None:
    """The newest is active; disabled in any order, nothing is left."""
    before = state()
    outer, inner = sdpa.enable("dense"), sdpa.enable(PATTERN)
    assert (outer.name, inner.name) == ("sparse_attn", "sparse_attn_2")
    F.scaled_dot_product_attention(*inputs(), is_causal=True)
    assert (outer.calls, inner.calls) == ({}, {"sparse": 1})
    first, second = (outer, inner) if outer_first else (inner, outer)
    first.disable()
    F.scaled_dot_product_attention(*inputs(), is_causal=True)
    assert second.calls["sparse"] == 1 + outer_first
    second.disable()
    assert state() == before


def test_another_implementation_comes_back() -> None:
    class Other:
        def remove(self) -> None:
            """Nothing to take out."""

    from torch.nn.attention import _registry

    torch_attention.register_flash_attention_impl("other", register_fn=Other)
    try:
        torch_attention.activate_flash_attention_impl("other")
        with sdpa.enable(PATTERN):
            assert torch_attention.current_flash_attention_impl() == "sparse_attn"
        assert torch_attention.current_flash_attention_impl() == "other"
    finally:
        torch_attention.restore_flash_attention_impl()
        del _registry._FLASH_ATTENTION_IMPLS["other"]


def test_rejects() -> None:
    with pytest.raises(TypeError, match="pattern is a int; pass a Pattern"):
        sdpa.enable(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="decode is a float; pass a Pattern"):
        sdpa.enable("dense", decode=0.5)  # type: ignore[arg-type]
    assert torch_attention.current_flash_attention_impl() is None


def test_a_vision_transformer_of_timm() -> None:
    """All of its attention goes by the pattern, and is torch's where that sees every key."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        exact = model(image)
        every = BlockSparse(top_k=13, block_m=16, block_n=16)  # 197 tokens
        for pattern in (every, "dense"):
            with sdpa.enable(pattern) as handle:
                torch.testing.assert_close(model(image), exact)
            assert handle.calls == {"sparse": len(model.blocks)}
        with sdpa.enable(BlockSparse(top_k=4, block_m=16, block_n=16)):
            assert not torch.allclose(model(image), exact)
        assert torch.equal(model(image), exact)
