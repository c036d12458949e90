# SPDX-License-Identifier: Apache-2.0
"""Processors for diffusers, on a stand-in with the same protocol (diffusers 0.42).

`Layer` and `Model` do what diffusers' `Attention`, `AttnProcessor2_0` and `AttentionMixin` do with
a processor: set it, look its arguments up by `inspect.signature`, and call it.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sparse_attn import AShape, attention
from sparse_attn.integrations.diffusers import SparseProcessor, enable

PATTERN = AShape(sink=4, window=7)


class Processor:
    _attention_backend = None

    def __call__(
        self, attn: Any, hidden: torch.Tensor, text: torch.Tensor | None = None, scale: float = 1.0
    ) -> torch.Tensor:
        keys = hidden if text is None else text
        q, k, v = (x.unflatten(-1, (4, 16)).transpose(1, 2) for x in (hidden, keys, keys.flip(1)))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False
        )
        return out.transpose(1, 2).flatten(2) * scale


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.processor = Processor()

    def forward(self, hidden: torch.Tensor, text: Any = None, **options: Any) -> torch.Tensor:
        known = set(inspect.signature(self.processor.__call__).parameters)
        return self.processor(self, hidden, text, **{k: options[k] for k in options if k in known})


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = Layer(), Layer()

    @property
    def attn_processors(self) -> dict[str, Any]:
        return {f"{name}.processor": layer.processor for name, layer in self.named_children()}

    def set_attn_processor(self, processors: dict[str, Any]) -> None:
        for name, layer in self.named_children():
            layer.processor = processors.pop(f"{name}.processor")

    def forward(self, hidden: torch.Tensor, text: torch.Tensor, **options: Any) -> torch.Tensor:
        return self.cross_attn(self.self_attn(hidden, **options), text, **options)


def hidden(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, rows, 64, generator=torch.Generator().manual_seed(seed))


def expected(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """The stand-in's self-attention, by the pattern."""
    q, v = (y.unflatten(-1, (4, 16)).transpose(1, 2) for y in (x, x.flip(1)))
    out = attention(q, q, v, PATTERN, causal=False)
    assert isinstance(out, torch.Tensor)
    return out.transpose(1, 2).flatten(2) * scale


def test_self_attention_is_sparse_and_cross_attention_is_not() -> None:
    model, x, text = Model(), hidden(40), hidden(9, seed=1)
    with enable(model, PATTERN) as handle:
        out = model(x, text)
    assert handle.calls == {"sparse": 1, "cross-attention": 1}
    assert torch.equal(out, model.cross_attn(expected(x), text))


@pytest.mark.parametrize(
    "choice",
    [{"self_attn.processor": PATTERN}, lambda name: PATTERN if name.startswith("self") else None],
)
def test_layers_that_are_left_out_keep_their_processor(choice: Any) -> None:
    model = Model()
    untouched = model.cross_attn.processor
    with enable(model, choice) as handle:
        assert model.cross_attn.processor is untouched
        model(hidden(40), hidden(9))
    assert handle.calls == {"sparse": 1}


def test_arguments_and_attributes_reach_the_processor_inside() -> None:
    model, x = Model(), hidden(40)
    inner = model.self_attn.processor
    with enable(model, PATTERN):
        assert isinstance(model.self_attn.processor, SparseProcessor)
        out = model.self_attn(x, scale=0.5, unknown=3)  # as diffusers: what is unknown is dropped
        model.self_attn.processor._attention_backend = "native"
    assert torch.equal(out, expected(x, scale=0.5))
    assert inner._attention_backend == "native"


def test_the_same_processors_come_back() -> None:
    model, x, text = Model(), hidden(40), hidden(9)
    before, out = model.attn_processors, model(x, text)
    handle = enable(model, PATTERN)
    model(x, text)
    handle.disable()
    handle.disable()
    after = model.attn_processors
    assert after.keys() == before.keys() and all(after[n] is before[n] for n in before)
    assert torch.equal(model(x, text), out)


def test_gradients_and_grouped_heads() -> None:
    x = hidden(40).requires_grad_()
    with enable(model := Model(), PATTERN):
        model.self_attn(x).square().sum().backward()
    other = x.detach().clone().requires_grad_()
    expected(other).square().sum().backward()
    assert torch.equal(x.grad, other.grad)


def test_rejects() -> None:
    with pytest.raises(TypeError, match="a Linear without attn_processors"):
        enable(torch.nn.Linear(2, 2), PATTERN)
    with pytest.raises(ValueError, match="no layer 'attn'; its layers are cross_attn.processor"):
        enable(Model(), {"attn": PATTERN})
    model = Model()
    model.self_attn.processor = torch.nn.Identity()
    with pytest.raises(NotImplementedError, match=r"has weights of its own \(Identity\)"):
        enable(model, PATTERN)
