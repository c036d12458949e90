# SPDX-License-Identifier: Apache-2.0
"""What every public pattern and preset must do, wherever a user may pass one.

Each pattern's own rule is tested beside it; here only what holds for all. A pattern that is
exported and not listed here fails `test_none_is_left_out`.
"""

import inspect
from collections.abc import Callable

import pytest
import torch
from bounds import assert_matches_oracle, plain_attention

import sparse_attn
from sparse_attn import Pattern, PerHead, reference, selection
from sparse_attn.patterns import PatternState, presets


def gate(rows: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A stand-in for a learned gate: a tile's and group's mean query against block maxima."""

    def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        grouped = q.float().unflatten(1, (k.shape[1], -1)).mean(2)
        return selection.mean_pool(grouped, rows) @ selection.pool(k, 64, "max").mT

    return scores


# By name: how to make one small enough to drop keys at a few hundred tokens.
PATTERNS: dict[str, Callable[[], Pattern]] = {
    "Dense": lambda: sparse_attn.Dense(),
    "AShape": lambda: sparse_attn.AShape(sink=5, window=40),
    "AShape, tail": lambda: sparse_attn.AShape(sink=5, window=40, dense_tail=7),
    "SlidingWindow": lambda: sparse_attn.SlidingWindow(33),
    "BlockSparse": lambda: sparse_attn.BlockSparse(top_k=2, block_m=32, block_n=16),
    "BlockSparse, share": lambda: sparse_attn.BlockSparse(top_p=0.5),
    "FlexPrefill": lambda: sparse_attn.FlexPrefill(gamma=0.6, min_budget=16, block=16),
    "GatedBlocks": lambda: sparse_attn.GatedBlocks(gate(32), top_k=3, block_m=32),
    "Quest": lambda: sparse_attn.Quest(budget=64, page=8),
    "QuestState": lambda: sparse_attn.QuestState(sparse_attn.Quest(budget=64, page=8)),
    "SpargeAttention": lambda: sparse_attn.SpargeAttention(top_p=0.6, similarity=0.05),
    "XAttention": lambda: sparse_attn.XAttention(8, 0.6, block_m=32, block_n=32),
    "Adaptive": lambda: sparse_attn.Adaptive(recall=0.6, block_m=32),
    "VerticalSlash": lambda: sparse_attn.VerticalSlash(vertical=20, slash=110, last_q=32),
    "HiP": lambda: sparse_attn.HiP(mask_k=32, window=40, sink=3),
    "HiP, shared": lambda: sparse_attn.HiP(mask_k=64, block_k=16, window=40, share="kv"),
    "InfiniteHiP": lambda: sparse_attn.InfiniteHiP(
        stages=(sparse_attn.HiPStage(32, 4), sparse_attn.HiPStage(8, k_in=96)), k=32, window=40
    ),
    "VerticalSlash, chunk": lambda: sparse_attn.VerticalSlash(
        vertical=20, slash=110, last_q=32, chunk=64
    ),
    "VerticalSlash, exact": lambda: sparse_attn.VerticalSlash(
        vertical=20, slash=110, last_q=32, exact=True
    ),
    "AnchorAttention": lambda: sparse_attn.AnchorAttention(block=16, step=2, theta=1.5, sink=8),
    "Dilated": lambda: sparse_attn.Dilated(sink=5, local=9, window=90, stride=3),
    "StridedBlocks": lambda: sparse_attn.StridedBlocks(
        block=32, local_blocks=2, vert_stride=4, head_step=0
    ),
    "StridedBlocks, offset": lambda: sparse_attn.StridedBlocks(
        block=16, local_blocks=1, vert_stride=7, offset=2, dense_heads=1
    ),
    "HiPState": lambda: sparse_attn.HiPState(sparse_attn.HiP(mask_k=32, window=40, sink=3)),
    "CentroidLookup": lambda: sparse_attn.CentroidLookup(
        percentile=0.6, ratio=0.2, observation_window=12
    ),
    "PerHead": lambda: PerHead(
        {0: sparse_attn.Dense(), 2: sparse_attn.VerticalSlash(vertical=20, slash=110)},
        default=sparse_attn.AShape(sink=4, window=24),
    ),
}
PRESETS: dict[str, Callable[[], Pattern]] = {
    "a_shape": presets.a_shape,
    "hip": presets.hip,
    "infinite_hip": presets.infinite_hip,
    "anchor_attention": presets.anchor_attention,
    "dilated": presets.dilated,
    "duo_attention": lambda: presets.duo_attention([True, False, True], group=2),
    "lm_infinite": presets.lm_infinite,
    "longgen": presets.longgen,
    "minference": presets.minference,
    "qwen2_5_1m": presets.qwen2_5_1m,
    "s2": presets.s2,
    "flexprefill": presets.flexprefill,
    "minference_block_sparse": presets.minference_block_sparse,
    "moba": presets.moba,
    "quest": presets.quest,
    "seer": lambda: presets.seer(gate(64), threshold=0.1),
    "sparge": presets.sparge,
    "xattention": presets.xattention,
    "squeezed": presets.squeezed,
    "streaming_llm": presets.streaming_llm,
    "tri_shape": presets.tri_shape,
}
EVERY = {**PATTERNS, **{f"presets.{name}": make for name, make in PRESETS.items()}}
each = pytest.mark.parametrize("name", EVERY)


def tells_heads_apart(name: str) -> bool:
    """Whether a head's number decides what it sees."""
    pattern = EVERY[name]()
    pattern = getattr(pattern, "pattern", pattern)  # of a preset
    return isinstance(pattern, PerHead) or "offset" in name or name == "presets.s2"


def inputs(
    seqlen_q: int, seqlen_k: int, *, batch: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Six query and three KV heads; some keys matter much more than others."""
    generator = torch.Generator().manual_seed(seqlen_q + seqlen_k)
    q = torch.randn(batch, 6, seqlen_q, 32, generator=generator)
    k, v = torch.randn(2, batch, 3, seqlen_k, 32, generator=generator)
    k[:, :, :: max(1, seqlen_k // 9)] *= 3
    return q.to(dtype), k.to(dtype), v.to(dtype)


def check(q, k, v, mask, out, lse) -> None:
    oracle = reference.attention(q.double(), k.double(), v.double(), mask)
    plain = plain_attention(q, k, v, mask)
    for name, actual, exact, ordinary in zip(("out", "lse"), (out, lse), oracle, plain):
        assert_matches_oracle(actual, exact, ordinary, name=name)


def public_patterns() -> set[str]:
    found = {name: getattr(sparse_attn, name) for name in sparse_attn.__all__}
    return {
        name
        for name, thing in found.items()
        if inspect.isclass(thing) and issubclass(thing, Pattern) and not inspect.isabstract(thing)
    }


def test_none_is_left_out():
    made = {type(make()).__name__ for make in PATTERNS.values()}
    assert public_patterns() - made == set()
    assert set(presets.__all__) - set(PRESETS) - {"Preset"} == set()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_their_source_and_deviations(name):
    preset = PRESETS[name]()
    assert isinstance(preset, presets.Preset)
    assert preset.name == name
    assert preset.source and all(text.endswith(".") for text in preset.deviations)


@each
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(333, 333), (70, 301), (1, 129), (5, 5)])
def test_attention_is_exact_over_what_was_chosen(name, seqlen_q, seqlen_k):
    q, k, v = inputs(seqlen_q, seqlen_k)
    pattern = EVERY[name]()
    index = pattern.build(q, k)
    index.validate()
    assert index.num_heads in (1, 3, 6) and index.batch_size in (1, 2)
    mask = index.expand_heads(6).to_dense_mask()
    assert index.column_bias is None  # no public pattern biases a key of k
    if isinstance(pattern, PatternState):
        pattern.reset()
    out, lse = sparse_attn.attention(q, k, v, pattern, return_lse=True)
    check(q, k, v, mask, out, lse)


@each
@pytest.mark.parametrize("seqlen_q", [200, 1])
def test_the_largest_head_dim(name, seqlen_q):
    """Zeros behind 32 numbers of a head, up to 512, change no score and so no choice."""
    q, k, _ = ((4 * x).round() / 4 for x in inputs(seqlen_q, 260, batch=1))  # exact in any order
    wide = [torch.nn.functional.pad(x, (0, 480)) for x in (q, k)]
    narrow, found = (EVERY[name]().build(*x, softmax_scale=32**-0.5) for x in ((q, k), wide))
    assert torch.equal(found.to_dense_mask(), narrow.to_dense_mask())


@each
def test_half_precision_and_other_strides(name):
    q, k, v = (
        x.transpose(1, 2).contiguous().transpose(1, 2)
        for x in inputs(200, 260, dtype=torch.bfloat16)
    )
    mask = EVERY[name]().build(q, k).expand_heads(6).to_dense_mask()
    out, lse = sparse_attn.attention(q, k, v, EVERY[name](), return_lse=True)
    check(q, k, v, mask, out, lse)


@each
def test_packed_sequences_are_what_each_is_alone(name):
    q, k, v = inputs(240, 300, batch=1)
    lengths_q, lengths_k = [100, 1, 139], [120, 41, 139]
    cu_q, cu_k = (
        torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32)
        for x in (lengths_q, lengths_k)
    )
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    out = sparse_attn.attention_varlen(*packed, cu_q, cu_k, 139, 139, EVERY[name]())
    for s in range(3):
        rows, keys = slice(int(cu_q[s]), int(cu_q[s + 1])), slice(int(cu_k[s]), int(cu_k[s + 1]))
        alone = sparse_attn.attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], EVERY[name]())
        assert torch.equal(out[rows].transpose(0, 1), alone[0])


@each
def test_decoding_over_a_cache(name):
    q, k, v = inputs(1, 310)
    lengths = torch.tensor([310, 177], dtype=torch.int32)
    out = sparse_attn.attention_decode(q, k, v, EVERY[name](), cache_seqlens=lengths)
    for b, n in enumerate(lengths.tolist()):
        each_alone = (q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
        alone = sparse_attn.attention(*each_alone, EVERY[name]())
        torch.testing.assert_close(out[b : b + 1], alone, rtol=1e-6, atol=1e-6)


@each
def test_a_head_among_others(name):
    pattern = EVERY[name]()
    if isinstance(getattr(pattern, "pattern", pattern), PerHead):
        with pytest.raises((TypeError, ValueError), match="PerHead"):
            PerHead([pattern, pattern])
        return
    q, k, v = inputs(190, 190)
    mixed = PerHead({1: EVERY[name](), 4: sparse_attn.Dense()}, default=sparse_attn.AShape(3, 16))
    out = sparse_attn.attention(q, k, v, mixed)
    own = EVERY[name]().build(q[:, 1:2], k[:, 0:1])  # head 1 reads KV head 0
    alone = sparse_attn.attention(q[:, 1:2], k[:, :1], v[:, :1], own)
    torch.testing.assert_close(out[:, 1:2], alone, rtol=1e-5, atol=1e-5)


@each
def test_the_choice_does_not_depend_on_threads_or_order(name):
    q, k, _ = inputs(257, 257)
    threads = torch.get_num_threads()
    mask = EVERY[name]().build(q, k).expand_heads(6).to_dense_mask()
    mask = mask.expand(2, -1, -1, -1)
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        again = EVERY[name]().build(q, k).expand_heads(6).to_dense_mask().expand(2, -1, -1, -1)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(mask, again)
    swapped = EVERY[name]().build(q.flip(0), k.flip(0)).expand_heads(6).to_dense_mask()
    assert torch.equal(mask.flip(0), swapped.expand(2, -1, -1, -1))
    if tells_heads_apart(name):
        return
    heads = torch.tensor([2, 3, 0, 1, 4, 5])  # groups change places
    moved = EVERY[name]().build(q[:, heads], k[:, [1, 0, 2]]).expand_heads(6).to_dense_mask()
    assert torch.equal(mask[:, heads], moved.expand(2, -1, -1, -1))


@each
def test_row_local_patterns_choose_the_same_in_chunks(name):
    pattern = EVERY[name]()
    if not pattern.row_local or isinstance(pattern, PatternState):
        return
    q, k, _ = inputs(300, 340)
    whole = pattern.build(q, k).expand_heads(6)
    step = 2 * whole.block_m if whole.block_m > 1 else 64
    causal = torch.ones(300, 340, dtype=torch.bool).tril(40)
    mask = whole.to_dense_mask() & causal
    for first in range(0, 300, step):
        rows = slice(first, min(first + step, 300))
        part = pattern.build(q[:, :, rows], k, q_offset=40 + first).expand_heads(6)
        seen = part.to_dense_mask(q_offset=40 + first) & causal[rows]
        assert torch.equal(seen, mask[:, :, rows])


@each
def test_explain(name):
    q, k, v = inputs(130, 130, batch=1)
    found = sparse_attn.explain(q, k, v, EVERY[name]())
    assert len(found.kinds) == 6 and 0 < found.density.tile <= 1.0 and found.attention_ms > 0


@each
def test_in_a_model(name):
    transformers = pytest.importorskip("transformers")
    from sparse_attn.integrations.transformers import enable

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 97, (2, 75), generator=torch.Generator().manual_seed(1))
    with enable(EVERY[name](), decode=EVERY[name]()), torch.no_grad():
        model.set_attn_implementation("sparse_attn")
        first = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert first.shape == (2, 79)
