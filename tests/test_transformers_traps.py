# SPDX-License-Identifier: Apache-2.0
"""What goes wrong silently in other integrations with transformers: one test for each trap."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from test_transformers import (  # noqa: E402
    MODELS,
    assert_same,
    logits,
    model_for,
    tiny,
    tokens,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from sparse_attn import (  # noqa: E402
    AShape,
    CentroidIndex,
    HiP,
    HiPState,
    PerHead,
    Quest,
    QuestState,
    VerticalSlash,
)
from sparse_attn.integrations.transformers import enable  # noqa: E402


@pytest.fixture(autouse=True)
def run_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """These calls are short, and would run densely: a pattern that is not run tests nothing."""
    monkeypatch.setenv("SPARSE_ATTN_FALLBACK", "0")


NEW_TOKENS = 64
#: Patterns with a budget above every length here: they choose all keys, each by its own code.
FULL = {
    "dense": "dense",
    "a_shape": AShape(sink=0, window=512),
    "vertical_slash": VerticalSlash(vertical=512, slash=512),
    "per_head": [AShape(sink=0, window=512), "dense", VerticalSlash(512, 512), "dense"],
}


def padded(side: str, batch: int = 2, length: int = 37) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    if side == "left":
        mask[-1, :9] = 0
    return ids, mask


def generate(model: Any, name: str, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    model.set_attn_implementation(name)
    torch.manual_seed(7)  # the same draws for sampling
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | options
    return model.generate(ids, **options)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("pattern", FULL)
def test_full_budget_generates_the_tokens_of_sdpa(pattern: str, side: str, cache: str) -> None:
    model = tiny("Llama")
    ids, mask = padded(side)
    theirs = generate(model, "sdpa", ids, attention_mask=mask)
    with enable(FULL[pattern], decode=FULL[pattern]) as handle:
        ours = generate(model, handle.name, ids, attention_mask=mask, cache_implementation=cache)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"num_beams": 3},
        {"num_return_sequences": 3, "do_sample": True},
    ],
    ids=["sampling", "beam", "several"],
)
@pytest.mark.parametrize("index", range(len(MODELS)), ids=[m[0] for m in MODELS])
def test_every_way_to_generate(index: int, options: dict[str, Any]) -> None:
    kind, extra, peer = MODELS[index]
    model = model_for(kind, extra)
    ids, mask = padded("left", length=21)
    options = options | {"max_new_tokens": 8, "attention_mask": mask}
    with enable() as handle:
        ours = generate(model, handle.name, ids, **options)
    assert torch.equal(ours, generate(model, peer, ids, **options))


def test_one_call_of_generate_chooses() -> None:
    """As if its choice had been enabled; `generate` refuses the argument, and does not drop it."""
    model, ids = tiny("Llama"), tokens(2, 40)
    prompt, later = AShape(sink=2, window=6), AShape(sink=1, window=20)
    expected = {}
    for choice in (("dense", "dense"), (prompt, "dense"), (prompt, later)):
        with enable(choice[0], decode=choice[1]) as handle:
            expected[choice] = generate(model, handle.name, ids, max_new_tokens=24)
    assert len({tuple(x.flatten().tolist()) for x in expected.values()}) == 3
    with enable() as handle:
        for choice, found in expected.items():
            with handle.choosing(choice[0], decode=choice[1]):
                assert torch.equal(generate(model, handle.name, ids, max_new_tokens=24), found)
        with pytest.raises(RuntimeError), handle.choosing(prompt):
            raise RuntimeError
        plain = generate(model, handle.name, ids, max_new_tokens=24)
        assert torch.equal(plain, expected["dense", "dense"])
        with pytest.raises(ValueError, match="sparse_pattern"):
            generate(model, handle.name, ids, sparse_pattern=prompt)


def test_two_models_with_two_plans() -> None:
    first, second, ids = tiny("Llama"), tiny("Qwen3"), tokens(1, 40)
    narrow, wide = AShape(sink=2, window=4), AShape(sink=4, window=9)
    alone = []
    for model, plan in ((first, narrow), (second, wide)):
        with enable(plan) as handle:
            alone.append(logits(model, handle.name, ids))
    with enable(narrow, name="plan_a") as a, enable(wide, name="plan_b") as b:
        first.set_attn_implementation(a.name)
        second.set_attn_implementation(b.name)
        with torch.no_grad():
            together = [first(ids).logits, second(ids).logits, first(ids).logits]
    assert torch.equal(together[0], alone[0]) and torch.equal(together[2], alone[0])
    assert torch.equal(together[1], alone[1])


def test_training_step_through_a_sparse_pattern() -> None:
    """The gradient is that of sdpa under the same mask."""
    model, ids = tiny("Llama").train(), tokens(2, 40)
    p, j = torch.arange(40)[:, None], torch.arange(40)[None]
    mask = ((j <= p) & ((j < 4) | (p - j < 7)))[None, None]
    grads = []
    with enable(AShape(sink=4, window=7)) as handle:
        for name, given in (("sdpa", mask), (handle.name, None)):
            model.set_attn_implementation(name)
            model.zero_grad()
            model(ids, labels=ids, attention_mask=given).loss.backward()
            grads.append([p.grad.clone() for p in model.parameters()])
    for theirs, ours in zip(*grads, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * max(theirs.abs().max(), 1e-3)


def test_paged_cache_and_attention_weights_are_refused_or_none() -> None:
    model = tiny("Llama")
    with enable() as handle:
        # What continuous batching hands over, up to 5.23 through the model's own arguments.
        attend, q = ALL_ATTENTION_FUNCTIONS[handle.name], torch.zeros(1, 4, 20, 16)
        with pytest.raises(NotImplementedError, match="'cache' is not supported"):
            attend(model.model.layers[0].self_attn, q, q, q, None, cache=object())
        model.set_attn_implementation(handle.name)
        weights = model(tokens(1, 20), output_attentions=True).attentions
        assert all(w is None for w in weights or ())  # transformers 5.0 has no tuple at all


def test_a_disabled_name_fails_and_does_not_fall_back() -> None:
    model = tiny("Llama")
    with enable() as handle:
        model.set_attn_implementation(handle.name)
    with pytest.raises(KeyError):
        model(tokens(1, 20))


# ------------------------------------------------------------------------------ memories


class Log(QuestState):
    """A `QuestState` that tells how many keys it had seen before each call."""

    calls: list[tuple[int, int]] = []  # (keys seen before, keys of the call)

    def build(self, q: torch.Tensor, k: torch.Tensor, **options: Any) -> Any:
        Log.calls.append((self.length, k.shape[2]))
        return super().build(q, k, **options)


@pytest.fixture
def log() -> list[tuple[int, int]]:
    Log.calls = []
    return Log.calls


def step(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True).logits


def new_cache(model: Any, static: bool = False) -> Any:
    if static:
        return transformers.StaticCache(config=model.config, max_cache_len=128)
    return transformers.DynamicCache(config=model.config)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_memory_follows_its_cache(log: list[tuple[int, int]], static: bool) -> None:
    """Two caches of one model in turns: each layer of each has a memory that only grows."""
    model, ids = tiny("Llama"), tokens(1, 60)
    with enable(decode=Log(Quest(budget=16, page=8))) as handle:
        model.set_attn_implementation(handle.name)
        caches = [new_cache(model, static) for _ in range(2)]
        for cache, length in zip(caches, (30, 40), strict=True):
            step(model, ids[:, :length], cache)
        log.clear()
        for i in range(3):
            for cache, length in zip(caches, (30, 40), strict=True):
                step(model, ids[:, length + i : length + i + 1], cache)
    first = [(0, 31)] * 2 + [(0, 41)] * 2
    grown = [(n, n + 1) for i in (31, 32) for n in (i, i, i + 10, i + 10)]
    assert log == first + grown


def test_a_memory_equals_the_pattern_without_one() -> None:
    """Quest's bounds are exact: with or without them the same tokens, in every kind of search."""
    model, quest = tiny("Llama"), Quest(budget=16, page=8)
    ids, mask = padded("left")
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        options = options | {"attention_mask": mask, "max_new_tokens": 8}
        tokens_of = []
        for decode in (quest, QuestState(quest), PerHead([quest, QuestState(quest)] * 2)):
            with enable(decode=decode) as handle:
                tokens_of.append(generate(model, handle.name, ids, **options))
        assert torch.equal(tokens_of[0], tokens_of[1])
        assert torch.equal(tokens_of[0], tokens_of[2])


@pytest.mark.parametrize("change", ["reorder", "crop", "reset", "sdpa"])
def test_a_memory_ends_where_its_cache_changes(log: list[tuple[int, int]], change: str) -> None:
    model, ids = tiny("Llama"), tokens(2, 60)
    with enable(decode=Log(Quest(budget=16, page=8))) as handle:
        model.set_attn_implementation(handle.name)
        cache = new_cache(model, static=change == "reset")
        step(model, ids[:, :30], cache)
        step(model, ids[:, 30:31], cache)
        if change == "reorder":
            cache.reorder_cache(torch.tensor([1, 0]))
        elif change == "crop":
            cache.crop(-3)
        elif change == "reset":  # a new prompt exactly as long as all there was
            cache.reset()
            step(model, ids[:, :31], cache)
        else:
            model.set_attn_implementation("sdpa")
            step(model, ids[:, 31:32], cache)
            model.set_attn_implementation(handle.name)
        log.clear()
        step(model, ids[:, 31:32], cache)
    assert [before for before, _ in log] == [0, 0]


def test_hip_refreshes_by_its_intervals_within_generate() -> None:
    """The whole generation equals one that calls each layer's states by hand; twice the same."""
    model, ids = tiny("Llama"), tokens(1, 48)
    hip = HiP(mask_k=16, block_k=8, window=16, sink=8)
    with enable(decode=HiPState(hip, [4])) as handle:
        first = generate(model, handle.name, ids, max_new_tokens=20)
        again = generate(model, handle.name, ids, max_new_tokens=20)
        assert torch.equal(again, first)
    states = [HiPState(hip, [4]) for _ in range(2)]
    with enable() as handle:
        model.set_attn_implementation(handle.name)
        cache = new_cache(model)
        out, result = step(model, ids, cache), [ids]
        for _ in range(20):
            result.append(out[:, -1:].argmax(-1))
            with torch.no_grad():
                by_layer = {"sparse_pattern": _Unwatched(states)}
                out = model(result[-1], past_key_values=cache, **by_layer).logits
    assert torch.equal(torch.cat(result, 1), first)


class _Unwatched:
    """A choice by layer whose states the integration does not recognise, so nothing is copied."""

    def __init__(self, states: list[HiPState]) -> None:
        self.states = states

    def __call__(self, layer: int) -> Any:
        return _Plain(self.states[layer])


class _Plain(AShape):
    data_dependent = True

    def __init__(self, state: HiPState) -> None:
        object.__setattr__(self, "state", state)

    def build(self, q: torch.Tensor, k: torch.Tensor, **options: Any) -> Any:
        return self.state.build(q, k, **options)


def test_a_template_that_was_used_before_starts_anew(log: list[tuple[int, int]]) -> None:
    model, ids, state = tiny("Llama"), tokens(1, 60), Log(Quest(budget=16, page=8))
    state.build(torch.ones(1, 4, 1, 16), torch.ones(1, 2, 25, 16))
    with enable(decode=state) as handle:
        model.set_attn_implementation(handle.name)
        cache = new_cache(model)
        step(model, ids[:, :30], cache)
        log.clear()
        step(model, ids[:, 30:31], cache)
    assert log == [(0, 31)] * 2 and state.length == 25


def test_disable_removes_every_hook() -> None:
    model = tiny("Llama")
    with enable(decode=QuestState()) as handle:
        generate(model, handle.name, tokens(1, 20), max_new_tokens=3)
        assert all(layer.self_attn._forward_pre_hooks for layer in model.model.layers)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_memory_cannot_be_compiled() -> None:
    model = tiny("Llama")
    with enable(decode=QuestState()) as handle:
        model.set_attn_implementation(handle.name)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with pytest.raises(Exception, match="a pattern with a memory cannot be compiled"):
            compiled(tokens(1, 20))
    torch._dynamo.reset()


def test_centroids_of_a_fixed_prefix() -> None:
    """A prefix is read once; its centroids, one index per layer, serve every question about it."""
    model, ids = tiny("Llama"), tokens(1, 60)
    with enable() as handle:
        model.set_attn_implementation(handle.name)
        cache = new_cache(model)
        step(model, ids[:, :40], cache)
        lookups = {
            layer: CentroidIndex.fit(
                cache.layers[layer].keys, num_clusters=6, observation_window=8
            ).lookup(threshold=0.0)
            for layer in range(2)
        }
        with torch.no_grad():  # nothing lies below threshold 0: the answer of dense attention
            options = {"past_key_values": cache, "sparse_pattern": lookups}
            ours = model(ids[:, 40:], **options).logits
    assert_same(ours, logits(model, "sdpa", ids)[:, 40:])


# ------------------------------------------------------------------------------ kvpress


def mask_heads(model: Any, indices: tuple[torch.Tensor, ...] | None) -> None:
    """What a head-wise press leaves on the modules."""
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = indices


@pytest.mark.parametrize("rows", [1, 20], ids=["decode", "question"])
@pytest.mark.parametrize("replaced", [False, True], ids=["own", "fake_keys"])
def test_keys_that_kvpress_masks_are_left_out(rows: int, replaced: bool) -> None:
    """Whether kvpress wrapped the function (it replaces keys) or not (it does not)."""
    model, ids = tiny("Llama"), tokens(2, 30 + rows)
    masked = (torch.tensor([0, 0, 1]), torch.tensor([1, 0, 1]), torch.tensor([3, 17, 20]))
    results = {}
    with enable() as handle:
        for name in ("eager", handle.name):
            model.set_attn_implementation(name)
            mask_heads(model, None)
            cache = new_cache(model)
            step(model, ids[:, :30], cache)
            keys = [layer.keys.clone() for layer in cache.layers]
            if name == "eager":
                results["all keys"] = step(model, ids[:, 30:], cache)
                results[name] = _eager_without(model, ids, keys, cache, masked)
                continue
            if replaced:
                for layer in cache.layers:
                    layer.keys[masked] = 1e5
            mask_heads(model, masked)
            results[name] = step(model, ids[:, 30:], cache)
            with pytest.raises(NotImplementedError, match="kvpress press that masks keys"):
                model(ids[:, -2:], past_key_values=cache, sparse_pattern=AShape(4, 7))
    assert_same(results[handle.name], results["eager"])
    assert (results["eager"] - results["all keys"]).abs().max() > 0.01


def _eager_without(
    model: Any, ids: torch.Tensor, keys: list[torch.Tensor], cache: Any, masked: Any
) -> torch.Tensor:
    """eager attention with minus infinity in place of the masked keys' logits."""
    from transformers.modeling_utils import AttentionInterface

    def without(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> Any:
        visible = torch.ones(*k.shape[:2], k.shape[2], dtype=torch.bool)
        visible[masked] = False
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        rows, length = q.shape[2], k.shape[2]
        causal = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
        seen = visible.repeat_interleave(group, 1)[:, :, None] & causal
        weights = (q @ k.transpose(2, 3) * scaling).masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights @ v).transpose(1, 2).contiguous(), None

    rows = ids.shape[1] - 30
    cache.crop(-rows)
    before = dict(AttentionInterface._global_mapping)
    AttentionInterface.register("oracle_without", without)
    try:
        model.set_attn_implementation("oracle_without")
        return step(model, ids[:, 30:], cache)
    finally:
        AttentionInterface._global_mapping.clear()
        AttentionInterface._global_mapping.update(before)


def test_a_press_that_drops_keys() -> None:
    """A cache that a press has made shorter than the text: rows stand behind what is left."""
    model, ids = tiny("Llama"), tokens(1, 40)
    results = []
    with enable() as handle:
        for name in ("sdpa", handle.name):
            model.set_attn_implementation(name)
            cache = new_cache(model)
            step(model, ids[:, :30], cache)
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]
            positions = torch.arange(30, 40)[None]
            with torch.no_grad():
                out = model(ids[:, 30:], past_key_values=cache, position_ids=positions)
            results.append(out.logits)
    assert_same(results[1], results[0])
