# SPDX-License-Identifier: Apache-2.0
"""The transformers integration against transformers' own sdpa and eager, on tiny random models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from sparse_attn.integrations.transformers import MaskInfo, build_mask, enable  # noqa: E402
from sparse_attn.patterns import AShape  # noqa: E402

VOCAB = 97


def tiny(kind: str, **extra: Any) -> Any:
    """A two-layer fp32 model with 4 query and 2 KV heads of 16, random but always the same."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        # Large weights: logits that differ by rows, so a wrong mask cannot hide.
        "initializer_range": 0.3,
    }
    config = getattr(transformers, f"{kind}Config")(**(options | extra))
    model_class = transformers.AutoModelForCausalLM
    return model_class.from_config(config, dtype=torch.float32).eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def logits(model: Any, implementation: str, *args: Any, **kwargs: Any) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(*args, **kwargs).logits


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal up to fp32 rounding through two layers, relative to the size of the logits."""
    bound = 64 * torch.finfo(torch.float32).eps * theirs.abs().max().item()
    assert (ours - theirs).abs().max().item() <= bound


@pytest.fixture
def dense() -> Any:
    with enable() as handle:
        yield handle


SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
MODELS = [
    ("Llama", {}, "sdpa"),
    ("Qwen3", {}, "sdpa"),
    ("Mistral", {"sliding_window": 8}, "sdpa"),
    ("Gemma2", SLIDING | {"query_pre_attn_scalar": 16}, "eager"),  # sdpa drops the soft cap
    ("Gemma3Text", SLIDING | {"query_pre_attn_scalar": 16}, "sdpa"),
    ("GptOss", SLIDING | MOE, "eager"),  # sdpa has no sinks
]
EVERY_MODEL = pytest.mark.parametrize(("kind", "extra", "peer"), MODELS, ids=[m[0] for m in MODELS])


def model_for(kind: str, extra: dict[str, Any]) -> Any:
    model = tiny(kind, **extra)
    if kind == "GptOss":  # left uninitialised or zero by from_config: give every head a sink
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.sinks.copy_(torch.tensor([2.0, -1.0, 0.5, 3.0]))
    return model


@EVERY_MODEL
def test_prefill(dense: Any, kind: str, extra: dict[str, Any], peer: str) -> None:
    model = model_for(kind, extra)
    ids = tokens(2, 40)
    assert_same(logits(model, dense.name, ids), logits(model, peer, ids))


@EVERY_MODEL
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(dense: Any, kind: str, extra: dict[str, Any], peer: str, side: str) -> None:
    model = model_for(kind, extra)
    ids, mask = tokens(3, 40), torch.ones(3, 40, dtype=torch.long)
    for row, pad in enumerate((0, 5, 31)):
        mask[row, :pad] = 0
    if side == "right":
        mask = mask.flip(-1)
    ours = logits(model, dense.name, ids, attention_mask=mask)
    theirs = logits(model, peer, ids, attention_mask=mask)
    assert_same(ours[mask.bool()], theirs[mask.bool()])


@EVERY_MODEL
def test_generate_same_tokens(dense: Any, kind: str, extra: dict[str, Any], peer: str) -> None:
    model = model_for(kind, extra)
    ids, mask = tokens(2, 21), torch.ones(2, 21, dtype=torch.long)
    mask[1, :6] = 0
    options = {"max_new_tokens": 16, "do_sample": False, "attention_mask": mask}
    model.set_attn_implementation(peer)
    theirs = model.generate(ids, **options)
    model.set_attn_implementation(dense.name)
    assert torch.equal(model.generate(ids, **options), theirs)


@EVERY_MODEL
def test_generate_static_cache(dense: Any, kind: str, extra: dict[str, Any], peer: str) -> None:
    model = model_for(kind, extra)
    ids, mask = tokens(2, 21), torch.ones(2, 21, dtype=torch.long)
    mask[1, :6] = 0
    options = {"max_new_tokens": 16, "do_sample": False, "attention_mask": mask}
    model.set_attn_implementation(peer)
    theirs = model.generate(ids, **options)
    model.set_attn_implementation(dense.name)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), theirs)


def in_chunks(model: Any, name: str, ids: torch.Tensor, cache: Any, sizes: list[int]) -> Any:
    parts = [
        logits(model, name, chunk, past_key_values=cache, use_cache=True)
        for chunk in ids.split(sizes, dim=1)
    ]
    return torch.cat(parts, dim=1)


@EVERY_MODEL
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_chunked_prefill(
    dense: Any, kind: str, extra: dict[str, Any], peer: str, static: bool
) -> None:
    model = model_for(kind, extra)
    ids = tokens(2, 41)
    cache = transformers.DynamicCache(config=model.config)
    if static:
        cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    ours = in_chunks(model, dense.name, ids, cache, [20, 17, 1, 3])
    assert_same(ours, logits(model, peer, ids))


def test_static_cache_reads_no_unwritten_keys(dense: Any) -> None:
    """A static cache is longer than what it holds; pattern builders must not see the rest."""
    model = tiny("Llama")
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    seen: list[int] = []

    class Spy(AShape):
        data_dependent = True  # built at every call, as a pattern that reads the keys is

        def build(self, q: torch.Tensor, k: torch.Tensor, **options: Any) -> Any:
            seen.append(k.shape[2])
            return super().build(q, k, **options)

    kwargs = {"past_key_values": cache, "sparse_pattern": Spy(sink=4, window=64)}
    ids = tokens(1, 37)
    first = logits(model, dense.name, ids[:, :20], **kwargs)
    second = logits(model, dense.name, ids[:, 20:], **kwargs)
    assert seen == [20, 20, 37, 37]
    assert_same(torch.cat((first, second), 1), logits(model, "sdpa", ids))


def a_shape_mask(length: int, sink: int, window: int) -> torch.Tensor:
    p, j = torch.arange(length)[:, None], torch.arange(length)[None]
    return ((j <= p) & ((j < sink) | (p - j < window)))[None, None]


@pytest.mark.parametrize(
    "choice",
    [
        AShape(sink=4, window=7),
        [AShape(sink=4, window=7)] * 4,
        lambda layer: AShape(sink=4, window=7),
        {0: AShape(sink=4, window=7), 1: AShape(sink=4, window=7)},
    ],
    ids=["pattern", "per_head", "function", "dict"],
)
def test_sparse_prefill_is_sdpa_under_the_mask(choice: Any) -> None:
    model = tiny("Llama")
    ids = tokens(2, 40)
    theirs = logits(model, "sdpa", ids, attention_mask=a_shape_mask(40, 4, 7))
    with enable(pattern=choice) as handle:
        assert_same(logits(model, handle.name, ids), theirs)
    assert (theirs - logits(model, "sdpa", ids)).abs().max() > 0.1  # the mask does matter


def test_sparse_prefill_of_a_padded_batch() -> None:
    """Sink tokens are counted from the first real token, not from the padding."""
    model = tiny("Llama")
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :11] = 0
    with enable(pattern=AShape(sink=4, window=7)) as handle:
        padded = logits(model, handle.name, ids, attention_mask=mask)
        alone = logits(model, handle.name, ids[1:, 11:])
    assert_same(padded[1:, 11:], alone)


def test_per_head_and_per_layer_choices_reach_their_head() -> None:
    model = tiny("Llama")
    ids = tokens(1, 40)
    wide = AShape(sink=0, window=64)
    heads = [AShape(sink=4, window=7), wide, "dense", AShape(sink=0, window=3)]
    full = a_shape_mask(40, 0, 64)
    mask = torch.cat((a_shape_mask(40, 4, 7), full, full, a_shape_mask(40, 0, 3)), dim=1)
    theirs = logits(model, "sdpa", ids, attention_mask=mask)
    with enable(pattern=heads) as handle:
        assert_same(logits(model, handle.name, ids), theirs)
    with enable(pattern={0: heads}) as handle:
        only_first = logits(model, handle.name, ids)
    assert (only_first - theirs).abs().max() > 1e-3
    assert (only_first - logits(model, "sdpa", ids)).abs().max() > 1e-3


def test_call_overrides_and_decode_is_dense(dense: Any) -> None:
    model = tiny("Llama")
    ids = tokens(1, 40)
    theirs = logits(model, "sdpa", ids, attention_mask=a_shape_mask(40, 4, 7))
    assert_same(logits(model, dense.name, ids, sparse_pattern=AShape(4, 7)), theirs)
    with enable(pattern=AShape(sink=4, window=7), name="sparse_prefill") as handle:
        assert_same(
            logits(model, handle.name, ids, sparse_pattern="dense"), logits(model, "sdpa", ids)
        )
        caches = [transformers.DynamicCache(config=model.config) for _ in range(2)]
        for name, cache in zip(("sdpa", dense.name), caches, strict=True):
            logits(model, name, ids[:, :39], past_key_values=cache)
        step = [
            logits(model, name, ids[:, 39:], past_key_values=cache)
            for name, cache in zip(("sdpa", handle.name), caches, strict=True)
        ]
    assert_same(step[1], step[0])


def test_sliding_layers_keep_their_window() -> None:
    """The pattern is for layers that see everything; a window of the model's own is exact."""
    model = model_for("Mistral", {"sliding_window": 8})
    ids = tokens(1, 40)
    with enable(pattern=AShape(sink=4, window=3)) as handle:
        assert_same(logits(model, handle.name, ids), logits(model, "sdpa", ids))
    mixed = model_for("Gemma3Text", SLIDING | {"query_pre_attn_scalar": 16})
    theirs = logits(mixed, "sdpa", ids)
    with enable(pattern={1: AShape(sink=4, window=3)}) as handle:
        assert (logits(mixed, handle.name, ids) - theirs).abs().max() > 0.1
    with enable(pattern={0: AShape(sink=4, window=3)}) as handle:  # layer 0 is the sliding one
        assert_same(logits(mixed, handle.name, ids), theirs)


def test_bidirectional_model(dense: Any) -> None:
    """A decoder told not to be causal, with and without padding."""
    model = tiny("Llama", is_causal=False)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    assert_same(
        logits(model, dense.name, ids, use_cache=False), logits(model, "sdpa", ids, use_cache=False)
    )
    mask[1, :9] = 0
    options = {"attention_mask": mask, "use_cache": False}
    ours, theirs = logits(model, dense.name, ids, **options), logits(model, "sdpa", ids, **options)
    assert_same(ours[mask.bool()], theirs[mask.bool()])
    assert (theirs - logits(tiny("Llama"), "sdpa", ids)).abs().max() > 0.1


def test_packed_sequences(dense: Any) -> None:
    model = tiny("Llama")
    ids = tokens(1, 40)
    positions = torch.cat((torch.arange(17), torch.arange(23)))[None]
    options = {"position_ids": positions, "use_cache": False}
    assert_same(logits(model, dense.name, ids, **options), logits(model, "sdpa", ids, **options))


@pytest.mark.parametrize("additive", [False, True])
def test_own_four_dimensional_mask(dense: Any, additive: bool) -> None:
    model = tiny("Llama")
    ids, mask = tokens(1, 40), a_shape_mask(40, 3, 5)
    if additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    ours = logits(model, dense.name, ids, attention_mask=mask)
    assert_same(ours, logits(model, "sdpa", ids, attention_mask=mask))
    with pytest.raises(NotImplementedError, match="4-D attention_mask together with a sparse"):
        logits(model, dense.name, ids, attention_mask=mask, sparse_pattern=AShape(4, 7))


def test_registries_are_restored() -> None:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    registries = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    before = [dict(r) for r in registries]
    handle = enable(name="sdpa")  # a name that exists comes back as it was
    assert registries[0]["sdpa"] is not before[0]["sdpa"]
    handle.disable()
    handle.disable()
    with enable("a_shape"), enable("a_shape", name="another"):
        assert "sparse_attn" in registries[0] and "another" in registries[1]
    assert [dict(r) for r in registries] == before
    assert [list(r) for r in registries] == [list(b) for b in before]


@pytest.mark.parametrize("model_kind", [0, 3], ids=["Llama", "Gemma2"])
def test_compiles_without_graph_breaks(dense: Any, model_kind: int) -> None:
    model = model_for(*MODELS[model_kind][:2])
    ids = tokens(1, 40)
    expected = logits(model, dense.name, ids, sparse_pattern=AShape(4, 7))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same(compiled(ids, sparse_pattern=AShape(4, 7)).logits, expected)


def test_gradients_flow(dense: Any) -> None:
    model = tiny("Llama").train()
    ids = tokens(1, 24)
    grads = []
    for name in ("sdpa", dense.name):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert (grads[0] - grads[1]).abs().max() <= 1e-4 * grads[0].abs().max()


def test_no_attention_weights(dense: Any) -> None:
    model = tiny("Llama")
    model.set_attn_implementation(dense.name)
    layer = model.model.layers[0].self_attn
    hidden = torch.randn(1, 20, 64)
    rotary = model.model.rotary_emb(hidden, torch.arange(20)[None])
    assert layer(hidden, position_embeddings=rotary, attention_mask=None)[1] is None


class TestErrors:
    def test_padding_in_the_middle(self, dense: Any) -> None:
        mask = torch.ones(2, 20, dtype=torch.long)
        mask[1, 7:9] = 0
        with pytest.raises(ValueError, match="row 1 has padding between real tokens"):
            logits(tiny("Llama"), dense.name, tokens(2, 20), attention_mask=mask)

    def test_dropout_while_training(self, dense: Any) -> None:
        model = tiny("Llama", attention_dropout=0.1).train()
        model.set_attn_implementation(dense.name)
        with pytest.raises(ValueError, match=r"dropout=0\.1 is not supported"):
            model(tokens(1, 20))

    def test_unknown_mask_function(self) -> None:
        from transformers.masking_utils import causal_mask_function, or_masks

        mask = or_masks(causal_mask_function, lambda b, h, q, k: q == k)
        with pytest.raises(NotImplementedError, match="composes its mask from or_masks"):
            build_mask(1, 20, 20, mask_function=mask)

    def test_chunked_attention(self) -> None:
        from transformers.masking_utils import chunked_causal_mask_function

        mask = chunked_causal_mask_function(16, torch.zeros(1, dtype=torch.long))
        assert build_mask(1, 16, 16, mask_function=mask) is None
        with pytest.raises(NotImplementedError, match="attention_chunk_size=16"):
            build_mask(1, 20, 20, mask_function=mask)

    def test_additive_bias(self, dense: Any) -> None:
        mask = torch.full((1, 1, 20, 20), 0.5)
        with pytest.raises(NotImplementedError, match="values other than 0 and -inf"):
            logits(tiny("Llama"), dense.name, tokens(1, 20), attention_mask=mask)

    def test_packed_batch(self) -> None:
        from transformers import masking_utils

        packed = torch.tensor([[0, 0, 1], [0, 1, 1]])
        mask = masking_utils.packed_sequence_mask_function(packed)
        with pytest.raises(NotImplementedError, match="pack them into one row"):
            build_mask(2, 3, 3, mask_function=mask)

    def test_position_bias_and_paged_cache(self, dense: Any) -> None:
        model = tiny("Llama")
        with pytest.raises(NotImplementedError, match="'position_bias' is not supported"):
            logits(model, dense.name, tokens(1, 20), position_bias=torch.zeros(1, 4, 20, 20))


class TestMaskInfo:
    def test_plain_causal_needs_none(self) -> None:
        ones = torch.ones(2, 20, dtype=torch.bool)
        assert build_mask(2, 20, 20, attention_mask=ones) is None
        assert build_mask(2, 4, 20, q_offset=16) is None

    def test_positions_as_the_first_releases_pass_them(self) -> None:
        """transformers 5.0 gives cache_position where later releases give q_length and q_offset."""
        old, new = {"cache_position": torch.arange(12, 20)}, {"q_length": 8, "q_offset": 12}
        assert build_mask(2, kv_length=20, **old) is None
        mask = torch.ones(2, 64, dtype=torch.bool)
        mask[0, :3] = False
        a, b = (build_mask(2, kv_length=64, attention_mask=mask, **how) for how in (old, new))
        assert a is not None and b is not None
        assert a.seq_ranges is not None and b.seq_ranges is not None
        assert torch.equal(a.seq_ranges, b.seq_ranges)
        for name in ("seqlen_q", "keys_used", "q_offset", "causal", "window"):
            assert getattr(a, name) == getattr(b, name)

    def test_padding_becomes_ranges(self) -> None:
        mask = torch.ones(2, 20, dtype=torch.bool)
        mask[0, :3], mask[1, 15:] = False, False
        info = build_mask(2, 8, 20, q_offset=12, attention_mask=mask)
        assert isinstance(info, MaskInfo) and info.seq_ranges is not None
        assert info.seq_ranges.tolist() == [[0, 8, 3, 17, 9], [0, 3, 0, 15, 12]]
        assert (info.ndim, info.shape) == (4, (2, 1, 8, 20))
        assert info.contiguous() is info

    def test_all_padding_row_is_empty(self) -> None:
        mask = torch.ones(2, 20, dtype=torch.bool)
        mask[1] = False
        info = build_mask(2, 20, 20, attention_mask=mask)
        assert info is not None and info.seq_ranges is not None
        assert info.seq_ranges[1, [1, 3]].tolist() == [0, 0]

    def test_static_cache_is_cropped(self) -> None:
        info = build_mask(1, 4, 64, q_offset=torch.tensor(10))
        assert info is not None and info.seq_ranges is None
        assert (info.keys_used, info.q_offset, info.seqlen_k) == (14, 10, 64)

    def test_sliding_cache_is_local(self) -> None:
        """Key 0 of a sliding cache is not token 0: everything counts from the keys it holds."""
        mask = torch.ones(1, 30, dtype=torch.bool)
        mask[0, :25] = False
        info = build_mask(1, 1, 8, q_offset=29, kv_offset=22, attention_mask=mask)
        assert info is not None and info.seq_ranges is not None
        assert info.seq_ranges.tolist() == [[0, 1, 3, 5, 4]]
