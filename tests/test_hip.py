# SPDX-License-Identifier: Apache-2.0
"""Hierarchical pruning against its rule written as loops (oracle_hip), and its properties."""

from __future__ import annotations

import random

import oracle_hip
import pytest
import torch
from cases import capabilities, forced_capability

import sparse_attn
from sparse_attn import ops
from sparse_attn.patterns import HiP, HiPStage, InfiniteHiP

SCALE = 0.25  # a power of two: scores of integers stay exact


def tensors(rng: random.Random, *, most: int = 700, high: int = 3):
    """q and k of small integers, whose scores are exact and often equal.

    q holds multiples of 12, so that means of up to four rows are exact too.
    """
    heads_kv = rng.choice([1, 1, 2])
    heads = heads_kv * rng.choice([1, 2, 3])
    batch = rng.choice([1, 1, 2, 3])
    seqlen_k = rng.randint(1, most)
    seqlen_q = rng.choice([seqlen_k, rng.randint(1, seqlen_k), 1, rng.randint(1, 200)])
    dim = rng.choice([8, 16, 24])
    gen = torch.Generator().manual_seed(rng.randrange(2**31))

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-high, high + 1, shape, generator=gen).float()

    q, k = 12 * integers(batch, heads, seqlen_q, dim), integers(batch, heads_kv, seqlen_k, dim)
    offset = rng.choice([None, None, None, rng.randint(-20, seqlen_k)])
    return q, k, offset


def random_hip(rng: random.Random) -> HiP:
    block_k = rng.choice([1, 2, 2, 3, 8, 16, 24, 64])
    block_m = rng.choice([1, 16, 32, 64, 64, 128])
    if rng.random() < 0.2:  # the paper's own shape, so that steps are many
        return HiP(mask_k=rng.choice([8, 16, 64]), window=rng.choice([20, 64]))
    return HiP(
        mask_k=block_k * rng.choice([1, 2, 3, 5, 8, 16]),
        block_k=block_k,
        block_m=block_m,
        stride_q=rng.choice([1, 2, 3, 8]),
        stride_k=rng.choice([1, 1, 2, 5, 64]),
        representative=rng.choice(["first", "center"]),
        sink=rng.choice([0, 1, 16, 40]),
        window=rng.choice([0, 1, 20, 64, 100, 256]),
        share=rng.choice(["none", "kv", "all"]),
    )


def random_infinite(rng: random.Random) -> InfiniteHiP:
    block_m = rng.choice([1, 16, 64, 64, 128])
    sizes = rng.choice([(64, 16, 4), (32, 8), (64, 8, 8), (16, 1), (128,), (8, 2, 1), (256, 32, 8)])
    stages = []
    for i, chunk in enumerate(sizes):
        k_in = None if i == 0 else sizes[i - 1] * rng.choice([1, 2, 4, 6])
        stages.append(HiPStage(chunk, rng.choice([1, 2, 3, 4]), k_in))
    return InfiniteHiP(
        stages=tuple(stages),
        k=sizes[-1] * rng.choice([1, 2, 3, 8]),
        block_m=block_m,
        sink=rng.choice([0, 5, 16, 64]),
        window=rng.choice([0, 1, 20, 64, 100, 256]),
        share=rng.choice(["none", "kv", "all"]),
    )


def built_mask(pattern, q, k, offset, **options) -> torch.Tensor:
    """The keys of every query head's rows, causality included, of a valid index."""
    index = pattern.build(q, k, softmax_scale=SCALE, q_offset=offset, **options).validate()
    start = k.shape[2] - q.shape[2] if offset is None else offset
    causal = torch.arange(k.shape[2]) <= (torch.arange(q.shape[2]) + start)[:, None]
    return index.expand_heads(q.shape[1]).to_dense_mask(q_offset=start) & causal


def expected_mask(pattern, q, k, offset) -> torch.Tensor:
    leaves = oracle_hip.hip_leaves if isinstance(pattern, HiP) else oracle_hip.infinite_leaves
    start = k.shape[2] - q.shape[2] if offset is None else offset
    leaf = pattern.block_k if isinstance(pattern, HiP) else pattern.stages[-1].chunk
    return oracle_hip.mask(pattern, leaves, leaf, q, k, scale=SCALE, offset=start)


@pytest.mark.parametrize("seed", range(250))
@pytest.mark.parametrize("make", [random_hip, random_infinite])
def test_equals_the_rule(make, seed):
    rng = random.Random(seed)
    pattern = make(rng)
    q, k, offset = tensors(rng)
    q = q[:, :, : 16 * pattern.block_m]  # the oracle is slow
    assert torch.equal(built_mask(pattern, q, k, offset), expected_mask(pattern, q, k, offset))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_the_rule_in_half_precision(dtype, seed):
    rng = random.Random(1000 + seed)
    pattern = (random_hip, random_infinite)[seed % 2](rng)
    q, k, offset = tensors(rng, most=300)
    expected = expected_mask(pattern, q, k, offset)
    for capability in capabilities():
        with forced_capability(capability):
            assert torch.equal(built_mask(pattern, q.to(dtype), k.to(dtype), offset), expected)


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_rule_whatever_the_strides(seed):
    rng = random.Random(2000 + seed)
    pattern = (random_hip, random_infinite)[seed % 2](rng)
    q, k, offset = tensors(rng, most=300)
    expected = expected_mask(pattern, q, k, offset)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    assert torch.equal(built_mask(pattern, q, k, offset), expected)


def rows_of(values) -> torch.Tensor:
    """[1, 1, n, 8] whose product with a row of ones is the value."""
    x = torch.zeros(1, 1, len(values), 8)
    x[0, 0, :, 0] = torch.tensor(values, dtype=torch.float32)
    return x


def test_the_published_toy_misses_the_maximum():
    """Walks see a few keys: the chunk of the greatest score loses, and must."""
    keys = [3, -1, 7, 2, 0, 5, -4, 6, 1, 1, 2, -3, 9, -8, 4, -2]
    walks = [oracle_hip.walk([float(x) for x in keys], s, s + 4, 4) for s in range(0, 16, 4)]
    assert walks == [(7.0, 2), (6.0, 7), (1.0, 9), (4.0, 14)]
    q, k = rows_of([1]), rows_of(keys)
    pattern = InfiniteHiP(stages=(HiPStage(4),), k=8, block_m=1, sink=0, window=0)
    mask = pattern.build(q, k, softmax_scale=1.0).to_dense_mask()
    assert mask[0, 0, 0].nonzero()[:, 0].tolist() == list(range(8))


def test_equal_halves_keep_the_right_one():
    q, k = rows_of([1]), rows_of([5, 5, 5, 5, 9, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 6])
    pattern = InfiniteHiP(stages=(HiPStage(8),), k=8, block_m=1, sink=0, window=0)
    # The walk through the first 8 keys goes right and right and right: it never meets the 9.
    mask = pattern.build(q, k, softmax_scale=1.0).to_dense_mask()
    assert mask[0, 0, 0].nonzero()[:, 0].tolist() == list(range(8, 16))


@pytest.mark.parametrize("rising", [True, False])
@pytest.mark.parametrize("representative", ["first", "center"])
def test_monotonic_scores_lead_to_the_extreme(rising, representative):
    keys = list(range(500)) if rising else list(range(500, 0, -1))
    q, k = rows_of([1]), rows_of(keys)
    tree = HiP(mask_k=8, block_k=1, block_m=1, sink=0, window=0, representative=representative)
    stages = InfiniteHiP(
        stages=(HiPStage(64), HiPStage(8, k_in=64)), k=8, block_m=1, sink=0, window=0
    )
    for pattern in (tree, stages):
        seen = pattern.build(q, k, softmax_scale=1.0).to_dense_mask()[0, 0, 0].nonzero()[:, 0]
        assert len(seen) in (4, 8)  # the last chunk may be a short one
        assert (499 if rising else 0) in seen


@pytest.mark.parametrize(
    "pattern",
    [
        HiP(mask_k=512, block_k=2, window=64),
        HiP(mask_k=512, block_k=64, window=5, sink=3),
        InfiniteHiP(stages=(HiPStage(64),), k=512, window=64),
        InfiniteHiP(stages=(HiPStage(256), HiPStage(8, k_in=512)), k=512, window=300, sink=0),
    ],
)
def test_enough_budget_is_dense(pattern):
    q, k = torch.randn(1, 2, 500, 16), torch.randn(1, 1, 500, 16)
    mask = built_mask(pattern, q, k, None)
    assert torch.equal(mask, torch.ones_like(mask).tril())


@pytest.mark.parametrize("make", [random_hip, random_infinite])
@pytest.mark.parametrize("seed", range(6))
def test_permuting_batch_or_heads_permutes_the_choice(make, seed):
    rng = random.Random(3000 + seed)
    pattern = make(rng)
    gen = torch.Generator().manual_seed(seed)
    q = torch.randn(3, 6, 300, 16, generator=gen)
    k = torch.randn(3, 3, 300, 16, generator=gen)
    mask = built_mask(pattern, q, k, None)
    assert torch.equal(built_mask(pattern, q.flip(0), k.flip(0), None), mask.flip(0))
    heads = torch.tensor([3, 2, 1, 0, 4, 5])  # two groups change places, each turned about
    moved = built_mask(pattern, q[:, heads], k[:, [1, 0, 2]], None)
    assert torch.equal(moved, mask[:, heads])


@pytest.mark.parametrize("pattern", [HiP(mask_k=64, window=32), InfiniteHiP(k=64, window=20)])
def test_the_choice_does_not_depend_on_threads(pattern):
    q, k = torch.randn(2, 4, 700, 32), torch.randn(2, 2, 700, 32)
    found = []
    threads = torch.get_num_threads()
    for number in (1, 2, 2):
        torch.set_num_threads(number)
        index = pattern.build(q, k)
        found.append((index.block_indices, index.block_bits_ids, index.column_indices))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("pattern", [HiP(mask_k=64, window=32), InfiniteHiP(k=64, window=20)])
def test_prefill_in_chunks_chooses_what_one_call_does(pattern):
    q, k = torch.randn(1, 4, 700, 16), torch.randn(1, 2, 700, 16)
    whole = built_mask(pattern, q, k, None)
    for first in range(0, 700, 192):
        last = min(first + 192, 700)
        part = built_mask(pattern, q[:, :, first:last], k[:, :, :last], None)
        assert torch.equal(part, whole[:, :, first:last, :last])


def test_not_a_number_counts_as_the_lowest_score():
    q, k = rows_of([1, 1]), rows_of([float("nan")] * 8 + list(range(8)) + [float("nan")] * 8)
    pattern = HiP(mask_k=4, block_k=1, block_m=16, sink=0, window=2)
    seen = built_mask(pattern, q, k, None)[0, 0, 1]
    scores = [-float("inf")] * 8 + [float(x) for x in range(8)] + [-float("inf")] * 8
    rule = {"begin": 0, "end": 22, "groups": 4, "leaf": 1, "stride_k": 1, "center": True}
    assert seen.nonzero()[:, 0].tolist() == [*oracle_hip.tree(scores, **rule), 22, 23]


def test_sharing_shows_in_the_heads_of_the_index():
    q, k = torch.randn(1, 6, 100, 16), torch.randn(1, 3, 100, 16)
    for share, heads in (("none", 6), ("kv", 3), ("all", 1)):
        assert HiP(share=share).build(q, k).num_heads == heads
        assert InfiniteHiP(share=share).build(q, k).num_heads == heads


# ------------------------------------------------------------------------------ messages


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: HiP(mask_k=0), ValueError, "mask_k=0 is below 1"),
        (lambda: HiP(mask_k=2.0), TypeError, "mask_k=2.0 is a float"),
        (lambda: HiP(mask_k=100, block_k=64), ValueError, "not a multiple of block_k=64"),
        (lambda: HiP(stride_q=0), ValueError, "stride_q=0 is below 1"),
        (lambda: HiP(block_m=24), ValueError, "block_m=24 is neither"),
        (lambda: HiP(window=-1), ValueError, "window=-1 is below 0"),
        (lambda: HiP(sink=-1), ValueError, "sink=-1 is below 0"),
        (lambda: HiP(share="group"), ValueError, "share='group'; pass one of none, kv, all"),
        (lambda: HiP(representative="last"), ValueError, "representative='last'"),
        (lambda: HiPStage(chunk=24), ValueError, "chunk=24 is not a power of two"),
        (lambda: HiPStage(chunk=8, k_in=0), ValueError, "k_in=0 is below 1"),
        (lambda: InfiniteHiP(k=12), ValueError, "k=12 is not a multiple of the last chunk=8"),
        (lambda: InfiniteHiP(stages=()), ValueError, "no stages"),
        (lambda: InfiniteHiP(stages=(8,)), TypeError, "a stage is a int"),
        (lambda: InfiniteHiP(stages=(HiPStage(8, k_in=8),)), ValueError, "of the first stage"),
        (
            lambda: InfiniteHiP(stages=(HiPStage(8), HiPStage(4))),
            ValueError,
            "k_in=None after chunk=8",
        ),
        (
            lambda: InfiniteHiP(stages=(HiPStage(8), HiPStage(16, k_in=16))),
            ValueError,
            "no larger a chunk",
        ),
    ],
)
def test_wrong_parameters_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("pattern", [HiP(), InfiniteHiP()])
def test_wrong_calls_raise(pattern):
    q = torch.randn(1, 2, 20, 16)
    with pytest.raises(ValueError, match="causal=False; the method searches"):
        pattern.build(q, q, causal=False)
    with pytest.raises(ValueError, match="q has 3 heads and k 2"):
        pattern.build(torch.randn(1, 3, 20, 16), q)


TREE = {
    "q_offset": 0,
    "softmax_scale": 1.0,
    "block_m": 16,
    "stride_q": 1,
    "lists": 2,
    "sink": 0,
    "window": 0,
}
LISTS = {
    "seqlen_q": 20,
    "seqlen_k": 20,
    "q_offset": 0,
    "block_m": 16,
    "block_n": 8,
    "leaf": 2,
    "sink": 0,
    "window": 0,
}


def int32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 0}, "groups=0 is not in"),
        ({"leaf": 0}, "leaf=0 is not in"),
        ({"stride_k": 0}, "stride_k=0 is not in"),
        ({"block_m": 0}, "block_m=0 is not in"),
        ({"stride_q": 0}, "stride_q=0 is not in"),
        ({"lists": 3}, "lists=3 is not in"),
        ({"sink": -1}, "sink=-1 is not in"),
        ({"window": -1}, "window=-1 is not in"),
        ({"q_offset": 2**40}, "q_offset=1099511627776 is not in"),
    ],
)
def test_the_tree_operator_guards_its_memory(change, message):
    q = torch.randn(1, 2, 20, 16)
    rule = {**TREE, "groups": 2, "leaf": 2, "stride_k": 1, "center": True, **change}
    with pytest.raises(RuntimeError, match=message):
        ops.hip_tree(q, q, **rule)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 3}, "chunk=3 is not a power of two"),
        ({"keep": 0}, "keep=0 is not in"),
        ({"overlap": -1}, "overlap=-1 is not in"),
        ({"parents": (int32(1, 2, 3, 4), int32(1, 2, 3))}, "expected 2"),
        ({"parents": (int32(1, 2, 2, 4).long(), int32(1, 2, 2))}, "parents is not a contiguous"),
        ({"parents": (int32(1, 2, 2, 4), int32(1, 2, 2)), "parent_chunk": 2}, "parent_chunk=2"),
    ],
)
def test_the_stage_operator_guards_its_memory(change, message):
    q = torch.randn(1, 2, 20, 16)
    rule = {**TREE, "chunk": 4, "keep": 2, "overlap": 0, "parents": None, "parent_chunk": 8}
    with pytest.raises(RuntimeError, match=message):
        ops.hip_stage(q, q, **{**rule, **change})


def test_corrupt_parents_are_never_followed():
    q = torch.randn(1, 2, 20, 16)
    starts = torch.tensor([-8, 2**31 - 8, 4, 4, -1], dtype=torch.int32).expand(1, 2, 2, 5)
    for count in (-3, 5, 1000):
        parents = (starts.contiguous(), torch.full((1, 2, 2), count, dtype=torch.int32))
        kept, counts = ops.hip_stage(
            q, q, **TREE, chunk=4, keep=2, overlap=0, parents=parents, parent_chunk=4
        )
        assert int(counts.max()) <= 2 and int(kept.max()) <= 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seqlen_q": -1}, "seqlen_q=-1 is not in"),
        ({"block_n": 0}, "block_n=0 is not in"),
        ({"leaf": 0}, "leaf=0 is not in"),
        ({"seqlen_q": 40}, r"are not \[batch, lists, 3 tiles\]"),
    ],
)
def test_the_list_operator_guards_its_memory(change, message):
    with pytest.raises(RuntimeError, match=message):
        ops.leaf_lists((int32(1, 2, 2, 3), int32(1, 2, 2)), **{**LISTS, **change})


def test_opcheck():
    q, k = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 70, 16)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    numbers = (30, 0.25, 16, 2, 4, 4, 8)
    library = torch.ops.sparse_attn
    torch.library.opcheck(
        library.hip_tree.default, (q, k, *numbers, 4, 2, 1, True), test_utils=checks
    )
    torch.library.opcheck(
        library.hip_stage.default, (q, k, *numbers, 8, 2, 8, None, None, 8), test_utils=checks
    )
    torch.library.opcheck(
        library.leaf_lists.default,
        (int32(1, 4, 3, 5), int32(1, 4, 3), 40, 70, 30, 16, 8, 2, 4, 8),
        test_utils=checks,
    )


def test_attention_is_exact_over_the_chosen_keys():
    """Row bits, columns and blocks in one call, against a dense mask."""
    q, k, v = torch.randn(1, 2, 300, 16), torch.randn(1, 1, 300, 16), torch.randn(1, 1, 300, 16)
    for pattern in (HiP(mask_k=32, window=40, sink=3), InfiniteHiP(k=32, window=40, sink=3)):
        mask = pattern.build(q, k).expand_heads(2).to_dense_mask().expand(1, 2, -1, -1)
        out = sparse_attn.attention(q, k, v, pattern)
        exact = sparse_attn.reference.attention(q.double(), k.double(), v.double(), mask)[0]
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
