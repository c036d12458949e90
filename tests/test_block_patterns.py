# SPDX-License-Identifier: Apache-2.0
"""Patterns that choose whole blocks, against their rules written as loops in float64."""

import math

import oracle_blocks as oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparse_attn import (
    BlockSparse,
    FlexPrefill,
    GatedBlocks,
    Quest,
    QuestState,
    SpargeAttention,
    XAttention,
    block_scores_index,
    presets,
)

MARGIN = 1e-4
"""Far above what float32 scores of these sizes can be off by."""


@st.composite
def problems(draw, *, most=300, heads_kv=2):
    """q, k and the keyword arguments of `build`."""
    seqlen_k = draw(st.integers(1, most))
    seqlen_q = draw(st.integers(1, seqlen_k))
    batch, kv = draw(st.integers(1, 3)), draw(st.integers(1, heads_kv))
    heads = kv * draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    q = torch.randn(batch, heads, seqlen_q, 16, generator=generator) * 2
    k = torch.randn(batch, kv, seqlen_k, 16, generator=generator)
    options = {
        "causal": draw(st.booleans()),
        "softmax_scale": 0.5,
        "q_offset": draw(st.sampled_from([None, None, 0, 7, seqlen_k])),
    }
    return q, k, options


def grid_of(q, k, options, block_m, block_n, sink, local) -> oracle.Grid:
    offset = options["q_offset"]
    offset = k.shape[2] - q.shape[2] if offset is None else offset
    return oracle.Grid(
        q.shape[2], k.shape[2], block_m, block_n, offset, options["causal"], sink, local
    )


def expected_index(q, k, grid, rule) -> tuple[torch.Tensor, float]:
    """rule(q of a head, k of its KV head, float64) -> (chosen, margin), for all heads."""
    group = q.shape[1] // k.shape[1]
    masks, margin = [], math.inf
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            chosen, close = rule(q[b, h].double(), k[b, h // group].double())
            masks.append(oracle.grid_mask(chosen, grid))
            margin = min(margin, close)
    return torch.stack(masks).view(*q.shape[:2], grid.tiles, grid.blocks), margin


def block_grid(index) -> torch.Tensor:
    """The blocks of an index whose blocks are aligned, bool [batch, heads, tiles, blocks]."""
    index.validate()
    assert index.column_indices.numel() == 0
    mask = torch.zeros(
        index.batch_size,
        index.num_heads,
        index.num_tiles,
        -(-index.seqlen_k // index.block_n),
        dtype=torch.bool,
    )
    ends = index.block_indptr.tolist()
    for b in range(index.batch_size):
        for h in range(index.num_heads):
            for t in range(index.num_tiles):
                starts = index.block_indices[ends[b][h][t] : ends[b][h][t + 1]]
                assert bool((starts % index.block_n == 0).all())
                mask[b, h, t, starts.long() // index.block_n] = True
    return mask


BUDGETS = [{"top_k": 1}, {"top_k": 4}, {"density": 0.3}, {"top_p": 0.7}, {"threshold": 0.08}]


@settings(max_examples=250, deadline=None)
@given(
    problems(most=700),
    st.sampled_from(BUDGETS),
    st.sampled_from([16, 64]),
    st.sampled_from([8, 64]),
    st.integers(0, 2),
    st.integers(0, 2),
)
def test_block_sparse_equals_the_rule(problem, budget, block_m, block_n, sink, local):
    q, k, options = problem
    grid = grid_of(q, k, options, block_m, block_n, sink, local)
    assume(grid.tiles * grid.blocks * q.shape[0] * q.shape[1] < 20_000)

    def rule(queries, keys):
        scores = oracle.pooled_scores(queries, keys, block_m, block_n, 0.5)
        if "top_p" in budget:
            return oracle.top_p(scores, grid, budget["top_p"], logits=True)
        if "threshold" in budget:
            return oracle.threshold(scores, grid, budget["threshold"])

        def wanted(tile):
            share = budget.get("density", 0) * len(grid.allowed(tile))
            return budget.get("top_k") or math.ceil(share - 1e-9)

        return oracle.top_k(scores, grid, wanted)

    want, margin = expected_index(q, k, grid, rule)
    assume(margin > MARGIN / 10)
    pattern = BlockSparse(
        **budget, block_m=block_m, block_n=block_n, sink_blocks=sink, local_blocks=local
    )
    assert torch.equal(block_grid(pattern.build(q, k, **options)), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_block_sparse_of_half_precision_is_that_of_its_values(dtype):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 4, 333, 64, generator=generator).to(dtype) for _ in range(2))
    pattern = BlockSparse(top_p=0.8)
    assert torch.equal(
        pattern.build(q, k).block_indices, pattern.build(q.float(), k.float()).block_indices
    )


def test_top_p_of_one_keeps_every_allowed_block():
    q, k = torch.randn(1, 2, 200, 16) * 30, torch.randn(1, 1, 260, 16) * 30  # masses underflow
    mask = block_grid(BlockSparse(top_p=1.0).build(q, k))
    assert torch.equal(mask, torch.ones(4, 5).tril(1).bool().expand(1, 2, 4, 5))


# ------------------------------------------------------------------------------ XAttention


@settings(max_examples=220, deadline=None)
@given(
    problems(most=700),
    st.sampled_from([(4, 16, 16), (8, 16, 24), (16, 64, 32), (16, 128, 128), (8, 32, 8)]),
    st.sampled_from([0.3, 0.6, 0.9]),
)
def test_xattention_equals_the_rule(problem, sizes, share):
    q, k, options = problem
    stride, block_m, block_n = sizes
    assume(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] / stride < 50_000)
    grid = grid_of(q, k, options, block_m, block_n, 1, 1)
    offset = options["q_offset"]
    cells = {
        "stride": stride,
        "block_m": block_m,
        "block_n": block_n,
        "scale": 0.5,
        "q_offset": k.shape[2] - q.shape[2] if offset is None else offset,
        "causal": options["causal"],
    }
    want, margin = expected_index(
        q, k, grid, lambda queries, keys: oracle.xattention(queries, keys, grid, share, **cells)
    )
    assume(margin > MARGIN / 10)
    pattern = XAttention(stride, share, block_m=block_m, block_n=block_n)
    assert torch.equal(block_grid(pattern.build(q, k, **options)), want)


def whole_causal(index, q_offset: int) -> torch.Tensor:
    diagonal = (torch.arange(1, index.num_tiles + 1) * index.block_m).clamp(max=index.seqlen_q)
    diagonal = (diagonal - 1 + q_offset) // index.block_n
    return torch.arange(-(-index.seqlen_k // index.block_n)) <= diagonal[:, None]


@settings(max_examples=40, deadline=None)
@given(problems(most=300), st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_xattention_keeps_its_promises(problem, one, other):
    q, k, _ = problem
    offset = k.shape[2] - q.shape[2]
    low, high = (
        XAttention(8, share, block_m=32, block_n=32).build(q, k) for share in sorted((one, other))
    )
    everything = XAttention(8, 1.0, block_m=32, block_n=32).build(q, k)
    assert torch.equal(
        block_grid(everything), whole_causal(everything, offset).expand(*q.shape[:2], -1, -1)
    )
    small, large = block_grid(low), block_grid(high)
    assert not bool((small & ~large).any())  # monotone in the threshold
    assert bool(small[..., 0].all())
    diagonal = whole_causal(everything, offset).sum(-1) - 1
    assert bool(small.gather(-1, diagonal.expand(*small.shape[:-1])[..., None]).all())


def test_xattention_in_chunks_equals_one_shot():
    q, k, _ = (
        torch.randn(1, 4, 700, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    pattern = XAttention(stride=16, threshold=0.5)
    whole = block_grid(pattern.build(q, k))
    for start in range(0, 700, 256):
        part = pattern.build(q[:, :, start : start + 256], k, q_offset=start)
        assert torch.equal(block_grid(part), whole[:, :, start // 128 :][:, :, : part.num_tiles])


# ------------------------------------------------------------------------------ SpargeAttention


@settings(max_examples=220, deadline=None)
@given(
    problems(most=700),
    st.sampled_from([{"top_p": 0.5}, {"top_p": 0.9}, {"top_p": None, "density": 0.4}]),
    st.sampled_from([-0.5, 0.02, 0.05, 0.1, 0.9]),
    st.sampled_from([(16, 8), (128, 64), (32, 32)]),
)
def test_sparge_equals_the_rule(problem, budget, similarity, sizes):
    q, k, options = problem
    block_m, block_n = sizes
    grid = grid_of(q, k, options, block_m, block_n, 0, 2)
    assume(grid.tiles * grid.blocks * q.shape[0] * q.shape[1] < 10_000)
    want, margin = expected_index(
        q,
        k,
        grid,
        lambda queries, keys: oracle.sparge(
            queries,
            keys,
            grid,
            block_m=block_m,
            block_n=block_n,
            scale=0.5,
            similarity=similarity,
            top_p_share=budget["top_p"],
            density=budget.get("density"),
        ),
    )
    assume(margin > MARGIN / 10)
    pattern = SpargeAttention(**budget, similarity=similarity, block_m=block_m, block_n=block_n)
    assert torch.equal(block_grid(pattern.build(q, k, **options)), want)


def test_sparge_keeps_blocks_that_no_mean_stands_for():
    q, k = torch.ones(1, 1, 256, 16), torch.ones(1, 1, 256, 16)
    k[:, :, 64:128:2] = -1.0  # two opposite directions: similarity 0
    index = SpargeAttention(top_p=0.01, similarity=0.6, local_blocks=0).build(q, k)
    assert block_grid(index)[0, 0].tolist() == [
        [True, True, False, False],
        [True, True, False, False],
    ]
    q[:, :, :128:2] = -1.0
    index = SpargeAttention(top_p=0.01, similarity=0.6, local_blocks=0).build(q, k, causal=False)
    assert bool(block_grid(index)[0, 0, 0].all())


# ------------------------------------------------------------------------------ FlexPrefill


@settings(max_examples=220, deadline=None)
@given(
    problems(most=700),
    st.sampled_from([0.3, 0.6, 0.9, 1.0]),
    st.sampled_from([0.0, 0.15, 0.3, 1.0]),
    st.sampled_from([(0, None), (16, None), (32, 64), (0, 16)]),
    st.sampled_from([16, 32]),
)
def test_flexprefill_equals_the_rule(problem, gamma, tau, budgets, block):
    q, k, options = problem
    low, high = budgets
    grid = grid_of(q, k, options, block, block, 1, 1)
    assume(grid.tiles * grid.blocks * q.shape[0] * q.shape[1] < 4_000)
    offset = options["q_offset"]
    want, margin = expected_index(
        q,
        k,
        grid,
        lambda queries, keys: oracle.flexprefill(
            queries,
            keys,
            grid,
            gamma=gamma,
            tau=tau,
            low=math.ceil(low / block),
            high=None if high is None else math.ceil(high / block),
            block=block,
            scale=0.5,
            q_offset=k.shape[2] - q.shape[2] if offset is None else offset,
            causal=options["causal"],
        ),
    )
    assume(margin > MARGIN / 10)
    pattern = FlexPrefill(gamma, tau, min_budget=low, max_budget=high, block=block)
    assert torch.equal(block_grid(pattern.build(q, k, **options)), want)


@settings(max_examples=40, deadline=None)
@given(
    problems(most=300), st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.sampled_from([0.0, 0.2, 9.0])
)
def test_flexprefill_keeps_its_promises(problem, one, other, tau):
    q, k, _ = problem
    offset = k.shape[2] - q.shape[2]
    options = {"tau": tau, "min_budget": 0, "block": 32}
    low, high = (FlexPrefill(g, **options).build(q, k) for g in sorted((one, other)))
    everything = FlexPrefill(1.0, **options).build(q, k)
    causal = whole_causal(everything, offset)
    assert torch.equal(block_grid(everything), causal.expand(*q.shape[:2], -1, -1))
    small, large = block_grid(low), block_grid(high)
    assert not bool((small & ~large).any())  # monotone in gamma
    assert bool(small[..., 0].all())
    diagonal = (causal.sum(-1) - 1).expand(*small.shape[:-1])[..., None]
    assert bool(small.gather(-1, diagonal).all())


# ------------------------------------------------------------------------------ gates


@settings(max_examples=220, deadline=None)
@given(problems(most=700), st.sampled_from(BUDGETS), st.booleans(), st.sampled_from([1, 16, 64]))
def test_given_scores_equal_the_rule(problem, budget, by_kv_head, block_m):
    q, k, options = problem
    grid = grid_of(q, k, options, block_m, 16, 1, 1)
    heads = k.shape[1] if by_kv_head else q.shape[1]
    assume(grid.tiles * grid.blocks * q.shape[0] * heads < 10_000)
    scores = torch.randn(
        q.shape[0], heads, grid.tiles, grid.blocks, generator=torch.Generator().manual_seed(0)
    )

    def rule(row):
        if "top_p" in budget:
            return oracle.top_p(row, grid, budget["top_p"], logits=True)
        if "threshold" in budget:
            return oracle.threshold(row, grid, budget["threshold"])
        share = budget.get("density", 0)
        return oracle.top_k(
            row,
            grid,
            lambda t: budget.get("top_k") or math.ceil(share * len(grid.allowed(t)) - 1e-9),
        )

    found = [rule(row) for row in scores.flatten(0, 1).tolist()]
    assume(min(margin for _, margin in found) > 1e-13)
    want = torch.stack([oracle.grid_mask(chosen, grid) for chosen, _ in found])
    sizes = {"block_m": block_m, "block_n": 16, "sink_blocks": 1}
    pattern = GatedBlocks(lambda *_: scores, **budget, **sizes)
    del options["softmax_scale"]
    assert torch.equal(block_grid(pattern.build(q, k, **options)).flatten(0, 1), want)


def test_probabilities_as_masses():
    masses = torch.tensor([[[[0.1, 0.2, 0.3, 0.4]]]])
    options = {"seqlen_q": 16, "seqlen_k": 64, "block_m": 16, "block_n": 16, "local_blocks": 0}
    for budget, blocks in (({"threshold": 0.25}, [32, 48]), ({"top_p": 0.8}, [16, 32, 48])):
        index = block_scores_index(masses, **options, **budget, logits=False)
        assert index.block_indices.tolist() == blocks


def test_moba_is_its_gate():
    q, k = torch.randn(1, 2, 50, 16), torch.randn(1, 1, 50, 16)
    mask = block_grid(presets.moba(chunk_size=8, top_k=3).build(q, k))[0]
    for h in range(2):
        for i in range(50):
            gate = {
                j: float(q[0, h, i] @ k[0, 0, 8 * j : 8 * j + 8].mean(0)) for j in range(i // 8)
            }
            best = sorted(gate, key=lambda j: -gate[j])[:2]
            assert mask[h, i].nonzero().flatten().tolist() == sorted({*best, i // 8})


# ------------------------------------------------------------------------------ Quest


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**31 - 1),
    st.integers(1, 300),
    st.integers(1, 3),
    st.sampled_from([8, 16]),
    st.integers(1, 200),
    st.sampled_from([0, 0, 0, -5]),
)
def test_quest_equals_the_rule(seed, seqlen_k, group, page, budget, shift):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-3, 4, (2, 2 * group, 1, 8), generator=generator).float()
    k = torch.randint(-3, 4, (2, 2, seqlen_k, 8), generator=generator).float()
    offset = seqlen_k - 1 + shift
    index = Quest(budget=budget, page=page).build(q, k, softmax_scale=0.5, q_offset=offset)
    mask = block_grid(index)
    allowed = min(max(offset // page + 1, 0), math.ceil(seqlen_k / page))
    for b in range(2):
        for h in range(2 * group):
            want = oracle.quest(
                q[b, h, 0].double(),
                k[b, h // group].double(),
                page,
                max(3, budget // page),
                allowed,
            )
            assert set(mask[b, h, 0].nonzero().flatten().tolist()) == want


def test_quest_is_dense_over_several_rows():
    assert Quest().build(torch.randn(1, 4, 7, 16), torch.randn(1, 2, 90, 16)).is_list_free


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 2**31 - 1))
def test_a_state_chooses_what_the_pattern_chooses(steps, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, 1, 16, generator=generator)
    keys = torch.randn(2, 2, sum(steps), 16, generator=generator)
    pattern = Quest(budget=32, page=8)
    state, length = QuestState(pattern), 0
    for step in steps:
        length += step
        if length % 3 == 0:  # a saved and restored one goes on
            saved, state = state.state_dict(), QuestState(pattern)
            state.load_state_dict(saved)
        k = keys[:, :, :length]
        found, want = state.build(q, k), pattern.build(q, k)
        assert torch.equal(found.block_indptr, want.block_indptr)
        assert torch.equal(found.block_indices, want.block_indices)


def test_a_state_reads_new_keys_only_and_starts_anew():
    pattern = Quest(budget=24, page=8)
    k = torch.randn(1, 1, 100, 16, generator=torch.Generator().manual_seed(0))
    q = torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(1))
    state = QuestState(pattern)
    state.build(q, k[:, :, :90])
    hidden = k.clone()
    hidden[:, :, :88] = 1e6  # whole pages that were seen: their bounds are kept, not read
    assert torch.equal(state.build(q, hidden).block_indices, pattern.build(q, k).block_indices)
    shorter = torch.randn(1, 1, 40, 16)
    assert torch.equal(
        state.build(q, shorter).block_indices, pattern.build(q, shorter).block_indices
    )
    assert state.length == 40
    state.reset()
    assert state.length == 0
    assert torch.equal(state.build(q, k).block_indices, pattern.build(q, k).block_indices)


def test_a_state_keeps_sequences_apart_and_saves_them():
    state = QuestState(Quest(budget=24, page=8))
    q, k = torch.randn(1, 2, 1, 16), torch.randn(2, 1, 60, 16)
    for s in range(2):
        assert state.of_sequence(s) is state.of_sequence(s)
        state.of_sequence(s).build(q, k[s : s + 1])
    other = QuestState(Quest(budget=24, page=8))
    other.load_state_dict(state.state_dict())
    assert other.of_sequence(1).length == 60
    for wrong in ({}, {"length": torch.tensor(9), "bounds": torch.zeros(1, 1, 5, 32)}):
        with pytest.raises(ValueError, match="not what a state of"):
            other.load_state_dict(wrong)


# ------------------------------------------------------------------------------ messages


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: XAttention(stride=12), ValueError, "stride=12 does not divide block_m=128"),
        (lambda: XAttention(stride=0), ValueError, "stride=0 is below 1"),
        (lambda: XAttention(threshold=0.0), ValueError, r"threshold=0.0 is outside \(0, 1\]"),
        (lambda: XAttention(threshold="all"), TypeError, "threshold='all' is a str"),
        (lambda: SpargeAttention(density=0.5), ValueError, "pass exactly one of"),
        (lambda: SpargeAttention(similarity=2.0), ValueError, r"outside \[-1, 1\]"),
        (lambda: SpargeAttention(similarity=None), TypeError, "NoneType; pass a float"),
        (lambda: FlexPrefill(gamma=1.5), ValueError, r"gamma=1.5 is outside \(0, 1\]"),
        (lambda: FlexPrefill(tau=-0.1), ValueError, "tau=-0.1 is negative"),
        (lambda: FlexPrefill(tau="0"), TypeError, "tau='0' is a str"),
        (lambda: FlexPrefill(max_budget=8), ValueError, "max_budget=8 is below 1024"),
        (lambda: BlockSparse(top_p=0.0), ValueError, r"top_p=0.0 is outside \(0, 1\]"),
        (lambda: GatedBlocks(3, top_k=1), TypeError, "gate is a int; pass a function"),
        (lambda: GatedBlocks(max), ValueError, "no budget given"),
        (lambda: Quest(page=12), ValueError, "block_n=12 is not a multiple of 8"),
        (lambda: Quest(budget=0), ValueError, "budget=0 is below 1"),
        (lambda: QuestState(BlockSparse(top_k=1)), TypeError, "pass a Quest"),
    ],
)
def test_argument_messages(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_scores_that_do_not_fit():
    options = {"seqlen_q": 64, "seqlen_k": 64, "block_m": 16, "block_n": 16, "top_k": 2}
    with pytest.raises(ValueError, match=r"\[batch, heads, 4, 4\] is needed"):
        block_scores_index(torch.zeros(1, 1, 4, 3), **options)
    with pytest.raises(TypeError, match="pass a floating dtype"):
        block_scores_index(torch.zeros(1, 1, 4, 4, dtype=torch.bool), **options)
    q, k = torch.randn(1, 4, 64, 16), torch.randn(1, 2, 64, 16)
    gate = GatedBlocks(lambda *_: torch.zeros(1, 3, 1, 1), top_k=1)
    with pytest.raises(ValueError, match=r"\[1, 4 or 2, tiles, blocks\] is needed"):
        gate.build(q, k)
