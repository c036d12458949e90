# SPDX-License-Identifier: Apache-2.0
"""explain: what it says must be what the call does."""

import sys

import pytest
import torch

import sparse_attn
from sparse_attn import AShape, Dense, PerHead, VerticalSlash, explain


def inputs(length: int, heads: int = 4, heads_kv: int = 2, dim: int = 32):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, heads, length, dim, generator=generator)
    k, v = torch.randn(2, 1, heads_kv, length, dim, generator=generator)
    return q, k, v


def test_it_tells_densities_and_kinds_of_the_index_that_runs():
    q, k, v = inputs(700)
    pattern = PerHead({0: Dense(), 1: VerticalSlash(vertical=60, slash=120)}, AShape(8, 64))
    found = explain(q, k, v, pattern)
    expected = pattern.build(q, k).density()
    assert found.kinds == ("dense", "listed", "streaming", "streaming")
    assert torch.equal(found.density.tile_per_head, expected.tile_per_head)
    assert torch.equal(found.density.element_per_head, expected.element_per_head)
    assert found.backend == "cpu"
    assert found.reasons == ("cuda: it runs tensors on cuda, these are on cpu",)


def test_times_hang_together():
    q, k, v = inputs(1024)
    found = explain(q, k, v, AShape(sink=8, window=32))
    total = found.selection_ms + found.attention_ms
    assert found.attention_ms > 0 and found.dense_ms > 0 and found.selection_ms > 0
    assert found.selection_share == pytest.approx(found.selection_ms / total)
    assert found.gain == pytest.approx(found.dense_ms / total)


def test_the_dense_probe_is_scaled_to_all_pairs(monkeypatch):
    """A kernel whose time is its number of pairs must be told exactly."""
    module = sys.modules["sparse_attn.explain"]  # the package's attribute is the function
    calls = []

    def pairs(q, k, v, pattern, *, q_offset, causal, **_):
        seen = (torch.arange(q.shape[2]) + q_offset + 1).clamp(0, k.shape[2])
        calls.append(int(seen.sum()) if causal else q.shape[2] * k.shape[2])

    def count(call, device):
        call()
        return float(calls[-1])

    monkeypatch.setattr(module, "attention", pairs)
    monkeypatch.setattr(module, "_milliseconds", count)
    for rows, keys, offset in ((1000, 1000, 0), (300, 900, 600), (5, 40, 35), (700, 400, -300)):
        q, k, v = torch.zeros(1, 1, rows, 8), torch.zeros(1, 1, keys, 8), torch.zeros(1, 1, keys, 8)
        for causal in (True, False):
            numerics = {"causal": causal, "softmax_scale": None}
            told = module._dense_milliseconds(q, k, v, offset, "auto", numerics)
            seen = (torch.arange(rows) + offset + 1).clamp(0, keys)
            assert told == pytest.approx(int(seen.sum()) if causal else rows * keys)


def test_bands_are_told_as_one_piece(monkeypatch):
    q, k, v = inputs(700)
    pattern = sparse_attn.Adaptive(recall=0.7, block_m=64)
    whole = explain(q, k, v, pattern)
    monkeypatch.setattr(sparse_attn.Adaptive, "band_rows", lambda *_: 128)
    banded = explain(q, k, v, pattern)
    assert 0 < whole.density.element < 1
    for name in ("element_per_head", "tile_per_head"):
        one, many = getattr(whole.density, name), getattr(banded.density, name)
        torch.testing.assert_close(many, one, rtol=1e-12, atol=0)
    assert banded.kinds == whole.kinds


def test_a_memory_is_left_as_it_was():
    _, k, v = inputs(500)
    q, _, _ = inputs(1)
    state = sparse_attn.HiPState(sparse_attn.HiP(mask_k=32, window=40), (4,))
    sparse_attn.attention(q, k, v, state)
    before = {name: x.clone() for name, x in state.state_dict().items()}
    explain(q, k, v, state)
    after = state.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_ready_index_has_no_selection():
    q, k, v = inputs(300)
    index = VerticalSlash(vertical=20, slash=100).build(q, k)
    found = explain(q, k, v, index)
    assert found.selection_ms == 0.0 and found.selection_share == 0.0


def test_the_table_names_what_matters():
    q, k, v = inputs(512)
    text = str(explain(q, k, v, "a_shape"))
    assert "'a_shape'" in text and "backend     cpu" in text and "selection" in text
    assert "cuda: it runs tensors on cuda, these are on cpu" in text
    assert len(text.splitlines()) == 8 + 4


def test_the_table_warns_when_dense_is_faster():
    density = AShape(8, 64).build(*inputs(64)[:2]).density()
    rest = (1, False, "it was asked for")
    told = sparse_attn.Explanation("p", "cpu", (), density, ("listed",), 5.0, 5.0, 5.0, *rest)
    assert told.gain == 0.5 and "dense is faster" in str(told)
    told = sparse_attn.Explanation("p", "cpu", (), density, ("listed",), 1.0, 1.0, 5.0, *rest)
    assert "dense is faster" not in str(told)


def test_bad_arguments_are_refused_as_by_attention():
    q, k, v = inputs(64)
    with pytest.raises(ValueError, match="backend='gpu' is unknown"):
        explain(q, k, v, backend="gpu")
    with pytest.raises(ValueError, match="do not fit"):
        explain(q, k[:, :, :10], v)
