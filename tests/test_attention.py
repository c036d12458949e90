# SPDX-License-Identifier: Apache-2.0
"""The kernels against the oracle: every feature on odd shapes, within the bound of `bounds`."""

from dataclasses import replace

import pytest
import torch
from bounds import assert_matches_oracle, plain_attention
from cases import (
    CAPABILITIES,
    Case,
    build,
    capabilities,
    check,
    compare,
    expected,
    forced_capability,
    make_index,
    missing_capability,
    same_bits,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_attn
from sparse_attn import SparseIndex, ops, reference

ALL_KINDS = ("dense", "streaming", "listed", "blocks", "columns", "empty")
MIXED = Case(kinds=ALL_KINDS)


@pytest.mark.parametrize("name", CAPABILITIES)
def test_capability_runs_where_the_cpu_can(name):
    reason = missing_capability(name)
    if reason is not None:
        pytest.skip(reason)
    with forced_capability(name):
        assert ops.cpu_capability() == name


def test_capabilities_give_different_bits():
    """Forcing an instruction set has an effect: else all the tests here run one kernel."""
    problem = build(replace(MIXED, dtype=torch.bfloat16, head_dim=128))
    results = []
    for name in capabilities():
        with forced_capability(name):
            results.append(sparse_attn.attention(problem.q, problem.k, problem.v, problem.index))
    assert len(results) == 1 or not all(same_bits(results[0], x) for x in results[1:])


# -------------------------------------------------------------------- shapes

SHAPES = [
    *[(1, 1), (1, 2), (2, 1), (2, 2), (1, 1000), (63, 1), (63, 64), (64, 63), (64, 64), (65, 65)],
    *[(64, 129), (65, 128), (127, 127), (127, 1000), (128, 128), (128, 65), (129, 64), (129, 129)],
    *[(2, 1000), (1000, 1), (1000, 65), (1000, 1000)],
]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), SHAPES)
def test_shape(seqlen_q, seqlen_k, causal):
    kinds = ALL_KINDS if seqlen_q * seqlen_k < 10**5 else ALL_KINDS[:3]
    case = Case(seqlen_q, seqlen_k, causal=causal, kinds=kinds, heads=len(kinds))
    check(replace(case, heads_kv=len(kinds), sinks=seqlen_q % 2 == 0, seed=seqlen_q + seqlen_k))


# -------------------------------------------------------------------- features

FEATURES = {
    "dense": {"kinds": ("dense",), "heads": 2, "heads_kv": 2},
    "streaming": {"kinds": ("streaming",)},
    "streaming-full": {"kinds": ("streaming",), "causal": False, "seed": 1},
    "blocks": {"kinds": ("blocks",)},
    "columns": {"kinds": ("columns",)},
    "empty": {"kinds": ("empty",)},
    "empty-sinks": {"kinds": ("empty",), "sinks": True},
    "bias": {"kinds": ("columns", "listed"), "bias": "finite"},
    "bias-large": {"kinds": ("columns", "listed"), "bias": "large"},
    "bias-minus-inf": {"kinds": ("columns", "listed"), "bias": "-inf"},
    "bits": {"kinds": ("blocks", "listed"), "bits": 0.7},
    "bits-bias": {"kinds": ("listed",), "bits": 0.5, "bias": "finite"},
    "bits-m128": {"kinds": ("blocks",), "bits": 0.7, "block_m": 128, "block_n": 8},
    "bits-m80": {"kinds": ("blocks",), "bits": 0.7, "block_m": 80, "block_n": 16},
    "bits-m1": {"kinds": ("listed",), "bits": 0.7, "block_m": 1, "block_n": 16},
    **{f"block_m-{m}": {"block_m": m, "block_n": 16} for m in (1, 16, 32, 48, 80, 128)},
    **{f"block_n-{n}": {"block_n": n, "kinds": ("blocks", "listed")} for n in (8, 16, 48, 128)},
    "full": {"causal": False, "kinds": ALL_KINDS},
    "offset-0": {"q_offset": 0},
    "offset-negative": {"q_offset": -30},
    "offset-before-all-keys": {"q_offset": -300},
    "offset-past-all-keys": {"q_offset": 500},
    "offset-full": {"q_offset": 17, "causal": False, "kinds": ("streaming",)},
    "softcap": {"softcap": 1.5, "magnitude": 3.0},
    "softcap-bias": {"softcap": 1.5, "kinds": ("listed",), "bias": "finite", "magnitude": 3.0},
    "sinks": {"sinks": True, "kinds": ALL_KINDS},
    "scale": {"softmax_scale": 0.7},
    "scale-negative": {"softmax_scale": -0.4, "kinds": ALL_KINDS},
    "scale-zero": {"softmax_scale": 0.0, "kinds": ALL_KINDS},
    "scale-negative-softcap": {"softmax_scale": -0.9, "softcap": 2.0},
    "transposed": {"layout": "transposed", "batch": 2},
    "gaps": {"layout": "gaps", "batch": 2, "heads_kv": 3},
    "expanded": {"layout": "expanded", "batch": 2, "kinds": ALL_KINDS},
    "batch-of-indexes": {"batch": 3, "index_batch": 3, "heads": 3, "heads_kv": 3},
    "one-index-for-a-batch": {"batch": 3, "heads": 3, "heads_kv": 3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 200), (7, 65), (130, 64), (150, 190)])
@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature, seqlen_q, seqlen_k, dtype):
    check(replace(Case(seqlen_q, seqlen_k, dtype=dtype), **FEATURES[feature]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"),
    [(8, 8), (16, 256), (40, 72), (64, 8), (72, 40), (80, 96), (96, 80), (128, 128), (200, 16),
     (256, 200), (320, 512), (512, 264)],
)  # fmt: skip
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(3, 129), (100, 77)])
def test_head_dims(head_dim, head_dim_v, dtype, seqlen_q, seqlen_k):
    case = Case(seqlen_q, seqlen_k, heads=3, heads_kv=3, dtype=dtype, block_m=32, block_n=16)
    check(replace(case, head_dim=head_dim, head_dim_v=head_dim_v))
    check(replace(case, head_dim=head_dim, head_dim_v=head_dim_v, softcap=3.0, layout="gaps"))


@pytest.mark.parametrize("index_heads", [1, "kv", "all"])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("block_m", [1, 16, 48, 64])
@pytest.mark.parametrize("seqlen_q", [1, 5, 100])
def test_grouped_heads(group, index_heads, block_m, seqlen_q):
    """With shared lists the heads of a group share tiles; the kind decides tile sizes."""
    kinds = ("listed", "streaming", "dense", "blocks", "columns")
    for shift in range(3 if index_heads == 1 else 1):
        case = Case(seqlen_q, 90, batch=2, heads=3 * group, heads_kv=3, block_n=16, sinks=True)
        case = replace(case, kinds=kinds[shift:], index_heads=index_heads, block_m=block_m)
        check(replace(case, index_batch=2, bits=0.5, bias="finite", seed=group + shift))


# -------------------------------------------------------------------- random combinations


@st.composite
def random_cases(draw):
    group = draw(st.sampled_from([1, 2, 3, 4, 7]))
    heads_kv = draw(st.integers(1, 3))
    batch = draw(st.integers(1, 3))
    lengths = st.sampled_from([1, 2, 9, 16, 17, 63, 64, 65, 127, 128, 129, 200])
    dims = st.sampled_from([8, 16, 40, 64, 72, 80, 96, 128])
    kinds = st.lists(st.sampled_from(ALL_KINDS), min_size=1, max_size=6).map(tuple)
    return Case(
        seqlen_q=draw(lengths),
        seqlen_k=draw(lengths),
        batch=batch,
        heads=group * heads_kv,
        heads_kv=heads_kv,
        head_dim=draw(dims),
        head_dim_v=draw(dims),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        layout=draw(st.sampled_from(["contiguous", "transposed", "gaps", "expanded"])),
        causal=draw(st.booleans()),
        q_offset=draw(st.none() | st.integers(-150, 250)),
        softcap=draw(st.none() | st.sampled_from([0.5, 5.0, 30.0])),
        softmax_scale=draw(st.none() | st.sampled_from([-0.3, 0.0, 0.05, 1.0])),
        sinks=draw(st.booleans()),
        kinds=draw(kinds),
        index_heads=draw(st.sampled_from([1, "kv", "all"])),
        index_batch=draw(st.sampled_from([1, batch])),
        block_m=draw(st.sampled_from([1, 16, 32, 48, 64, 80, 128])),
        block_n=draw(st.sampled_from([8, 16, 48, 64, 128])),
        fill=draw(st.sampled_from([0.1, 0.5, 0.95])),
        bias=draw(st.sampled_from([None, "finite", "large", "-inf"])),
        bits=draw(st.sampled_from([0.0, 0.5, 1.0])),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=120)
@given(random_cases())
def test_random_combination(case):
    check(case)


# -------------------------------------------------------------------- special rows


@pytest.mark.parametrize("seqlen_q", [1, 16, 100])
@pytest.mark.parametrize("sink", [None, 1.25])
def test_rows_without_keys(seqlen_q, sink):
    """Out is exactly 0, lse exactly -inf or the sink, for whatever reason a row is empty."""
    q, k, v = (torch.randn(2, 3, n, 16) for n in (seqlen_q, 50, 50))
    sinks = None if sink is None else torch.full((3,), sink)
    empty_lists = make_index(seqlen_q, 50, kinds=["empty"])
    no_window = SparseIndex.streaming(seqlen_q, 50, sink=0, window=0)
    dense = SparseIndex.dense(seqlen_q, 50)
    for index, kwargs in (
        (empty_lists, {}),
        (no_window, {}),
        (no_window, {"causal": False}),
        (dense, {"q_offset": -200}),
    ):
        out, lse = sparse_attn.attention(q, k, v, index, return_lse=True, sinks=sinks, **kwargs)
        assert torch.equal(out, torch.zeros_like(q))
        wanted = torch.full((2, 3, seqlen_q), -torch.inf if sink is None else sink)
        torch.testing.assert_close(lse, wanted, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_column_gives_its_value(dtype):
    """The share of a single key is 1: out is its value."""
    case = Case(40, 60, kinds=("columns",), dtype=dtype, causal=False)
    problem = build(case)
    index = SparseIndex.from_lists(
        seqlen_q=40,
        seqlen_k=60,
        block_m=16,
        block_n=8,
        column_indptr=torch.tensor([[[0, 1, 2, 3]]]),
        column_indices=torch.tensor([59, 0, 31], dtype=torch.int32),
    )
    for name in capabilities():
        with forced_capability(name):
            out = sparse_attn.attention(problem.q, problem.k, problem.v, index, causal=False)
        wanted = problem.v[:, :, [59] * 16 + [0] * 16 + [31] * 8]
        assert_matches_oracle(out, wanted.double(), wanted, name=name)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 5), (5, 0), (0, 0)])
def test_no_rows_or_no_keys(seqlen_q, seqlen_k):
    q, k, v = torch.ones(2, 4, seqlen_q, 8), *torch.ones(2, 2, 2, seqlen_k, 8).unbind(0)
    out, lse = sparse_attn.attention(q, k, v, return_lse=True)
    assert torch.equal(out, torch.zeros(2, 4, seqlen_q, 8))
    assert torch.equal(lse, torch.full((2, 4, seqlen_q), -torch.inf))


def test_without_lse_only_out_is_returned():
    problem = build(MIXED)
    args = (problem.q, problem.k, problem.v, problem.index)
    assert same_bits(sparse_attn.attention(*args), sparse_attn.attention(*args, return_lse=True)[0])


# -------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seqlen_q", [1, 3, 80])
@pytest.mark.parametrize("sinks", [False, True])
def test_scores_of_ten_thousand(dtype, seqlen_q, sinks):
    """No overflow, and no loss to a maximum that is not subtracted."""
    case = Case(seqlen_q, 150, head_dim=64, dtype=dtype, kinds=ALL_KINDS, sinks=sinks)
    problem = build(replace(case, magnitude=10.0, softmax_scale=0.9))
    problem.k = problem.k * 100
    oracle, plain = expected(problem)
    assert oracle[1].isfinite().any() and oracle[1][oracle[1].isfinite()].abs().max() > 5e3
    args = (problem.q, problem.k, problem.v, problem.index)
    run = lambda: sparse_attn.attention(*args, return_lse=True, **problem.kwargs)  # noqa: E731
    compare(run, oracle, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_every_16_bit_number_passes_through_values(dtype, seqlen_q):
    """With one visible key out is its value, for every bit pattern: conversions are exact."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(dtype)
    # The bf16 dot instruction takes bf16's subnormals (below 1.2e-38) for 0.
    passes = numbers.isfinite() & (numbers.float().abs() >= torch.finfo(torch.float32).tiny)
    numbers = torch.where(passes, numbers, 0.0).to(dtype)
    v = numbers.view(1, 256, 1, 256)
    q = torch.zeros(1, 256, seqlen_q, 8, dtype=dtype)
    for name in capabilities():
        with forced_capability(name):
            out = sparse_attn.attention(q, torch.zeros(1, 256, 1, 8, dtype=dtype), v, causal=False)
        assert torch.equal(out, v.expand(-1, -1, seqlen_q, -1)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_results_are_rounded_to_nearest_even(dtype, seqlen_q):
    """Two keys of equal weight give midpoints, fp16's subnormal ones too."""
    finite = torch.arange(0, 2**15 - 1, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = finite[finite.isfinite()]
    count = len(finite) // 64 * 64
    # Neighbours: their mean lies halfway between two numbers.
    pairs = torch.stack((finite[: count - 64], finite[1 : count - 63])).view(1, 2, -1, 64)
    v = pairs.transpose(1, 2)  # [1, heads, 2 keys, 64]
    heads = v.shape[1]
    q, k = torch.zeros(1, heads, seqlen_q, 8, dtype=dtype), torch.zeros(1, heads, 2, 8, dtype=dtype)
    wanted = v.double().mean(2, keepdim=True).float().to(dtype)
    # Where the sum of both is a normal float32: everywhere in fp16.
    normal = (wanted.float() >= 2.0**-100) & (wanted.float() < 2.0**126)
    normal |= torch.tensor(dtype == torch.float16)
    for name in capabilities():
        with forced_capability(name):
            out = sparse_attn.attention(q, k, v, causal=False)
        wanted_rows = wanted.expand_as(out)
        relevant = normal.expand_as(out)
        assert torch.equal(out[relevant], wanted_rows[relevant]), name


def test_fp16_overflow_is_infinite():
    """As in torch, a result beyond 65504 becomes inf; a probability above 1 is never the cause."""
    v = torch.full((1, 1, 70, 16), 65504.0, dtype=torch.float16)
    q, k = torch.zeros(1, 1, 70, 16).half(), torch.zeros(1, 1, 70, 16).half()
    for name in capabilities():
        with forced_capability(name):
            out = sparse_attn.attention(q, k, v, causal=False)
            wide = sparse_attn.attention(q, k, v * torch.inf, causal=False)
        assert torch.equal(out, v), name
        assert bool((wide == torch.inf).all()), name


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("seqlen_q", [1, 100])
def test_nan_is_not_hidden(where, seqlen_q):
    """NaN inputs give NaN where they are visible.

    NaN in q and k reaches no other row. In v it may: a probability of 0 times NaN is NaN in torch,
    too.
    """
    q, k, v = (torch.randn(1, 1, n, 16) for n in (seqlen_q, 100, 100))
    {"q": q, "k": k, "v": v}[where][0, 0, -1] = torch.nan
    for name in capabilities():
        with forced_capability(name):
            out = sparse_attn.attention(q, k, v)
        assert bool(out[0, 0, -1].isnan().all()), name
        assert where == "v" or not bool(out[0, 0, :-1].isnan().any()), name


# -------------------------------------------------------------------- row bits of a mask


@pytest.mark.parametrize("block_m", [1, 16, 48, 64, 128])
@pytest.mark.parametrize("block_n", [8, 64])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 77), (130, 77), (65, 129)])
def test_any_dense_mask(block_m, block_n, seqlen_q, seqlen_k):
    """A mask in, the mask's attention out: the index's own idea of a mask is not asked."""
    generator = torch.Generator().manual_seed(block_m + seqlen_q)
    mask = torch.rand(2, 2, seqlen_q, seqlen_k, generator=generator) < 0.3
    mask[0, 0, : seqlen_q // 2] = False
    mask[1, :, :, 32:] = True
    index = SparseIndex.from_dense_mask(mask, block_m=block_m, block_n=block_n)
    q, k, v = (torch.randn(2, h, n, 16) for h, n in ((4, seqlen_q), (2, seqlen_k), (2, seqlen_k)))
    rows = mask.repeat_interleave(2, 1)
    for causal in (True, False):
        oracle = reference.attention(q, k, v, rows, causal=causal)
        plain = plain_attention(q, k, v, rows, causal=causal)
        compare(
            lambda c=causal: sparse_attn.attention(q, k, v, index, causal=c, return_lse=True),
            oracle,
            plain,
        )


# -------------------------------------------------------------------- long keys, split among tasks


@pytest.mark.parametrize("kind", ["dense", "streaming", "blocks", "columns", "listed"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 3000), (2, 5000), (9, 3001), (16, 5000)])
def test_short_queries_over_long_keys(kind, seqlen_q, seqlen_k):
    case = Case(seqlen_q, seqlen_k, kinds=(kind,), heads=4, heads_kv=2, block_m=16, fill=0.95)
    # Pieces of 1024 keys end inside blocks of 48.
    case = replace(case, block_n=48, bits=0.6, bias="finite", index_heads="kv", sinks=True)
    if kind == "streaming":
        problem = build(case)
        index = SparseIndex.streaming(
            seqlen_q, seqlen_k, sink=1500, window=1200, dense_tail=1, num_heads=2
        )
        problem.index = SparseIndex.cat_heads(
            [index.select_heads([0]), SparseIndex.streaming(seqlen_q, seqlen_k, sink=0, window=50)]
        )
    elif kind == "columns":
        problem = build(case)
        problem.index = _many_columns(seqlen_q, seqlen_k)
    else:
        problem = build(case)
    oracle, plain = expected(problem)
    args = (problem.q, problem.k, problem.v, problem.index)
    compare(lambda: sparse_attn.attention(*args, return_lse=True, **problem.kwargs), oracle, plain)


def _many_columns(seqlen_q, seqlen_k):
    """All but every third key as columns with biases, twice for two heads."""
    keys = torch.arange(seqlen_k, dtype=torch.int32)
    keys = keys[keys % 3 != 1]
    count = len(keys)
    return SparseIndex.from_lists(
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        block_m=16,
        block_n=16,
        column_indptr=torch.tensor([[[0, count], [count // 2, count]]]),
        column_indices=keys,
        column_bias=torch.sin(keys.float()),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_queries_over_long_keys_16_bit(dtype):
    case = Case(4, 3000, dtype=dtype, kinds=("listed", "dense"), sinks=True, fill=0.9)
    check(replace(case, heads=4, heads_kv=4, head_dim=64, head_dim_v=72))


def test_pieces_grow_with_the_call():
    """Enough keys in a call that its pieces are longer than the least length."""
    case = Case(2, 5000, batch=2, heads=16, heads_kv=16, kinds=("dense", "streaming"))
    check(replace(case, head_dim=8, head_dim_v=8, sinks=True))


# -------------------------------------------------------------------- large strides


@pytest.mark.parametrize("seqlen_q", [1, 20])
@pytest.mark.parametrize("axis", [1, 2])
def test_offsets_beyond_32_bits(seqlen_q, axis):
    """Heads, or keys, that lie more than 2^31 elements apart; untouched memory costs nothing."""
    try:
        storage = torch.empty(2**31 + 2**16, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("4 GiB of address space cannot be had")
    keys = 9
    shape = (1, 2, keys, 16)
    strides = (0, 2**31, 16, 1) if axis == 1 else (0, 64, 2**31 // (keys - 1), 1)
    far = storage.as_strided(shape, strides)
    q, near = torch.randn(1, 4, seqlen_q, 16).bfloat16(), torch.randn(shape).bfloat16()
    far.copy_(near)
    for name in capabilities():
        with forced_capability(name):
            out = sparse_attn.attention(q, far, far, causal=False)
            wanted = sparse_attn.attention(q, near, near, causal=False)
        assert same_bits(out, wanted), name
