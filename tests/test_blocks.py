# SPDX-License-Identifier: Apache-2.0
"""Selection on a grid of blocks: native ops and their torch forms against plain loops."""

import math
import random

import oracle_blocks as oracle
import pytest
import torch
from bounds import assert_matches_oracle
from cases import CAPABILITIES
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparse_attn import ops
from sparse_attn.lists import list_blocks
from sparse_attn.selection import (
    BlockGrid,
    antidiagonal_scores,
    block_similarity,
    block_threshold,
    block_top_k,
    block_top_p,
    blocks,
    group_to_kv,
    minmax_bound_scores,
    minmax_pool,
    pool,
    pooled,
)


@pytest.fixture(params=CAPABILITIES)
def capability(request, monkeypatch):
    monkeypatch.setenv("SPARSE_ATTN_CPU_CAPABILITY", request.param)
    try:
        ops.cpu_capability()
    except RuntimeError as error:
        pytest.skip(str(error))
    return request.param


@st.composite
def grids(draw):
    """(BlockGrid, oracle's grid)."""
    sizes = {
        "seqlen_q": draw(st.integers(1, 300)),
        "seqlen_k": draw(st.integers(1, 300)),
        "block_m": draw(st.sampled_from([1, 16, 32, 48])),
        "block_n": draw(st.sampled_from([8, 16, 40])),
    }
    assume(sizes["seqlen_q"] / sizes["block_m"] < 40)
    default = sizes["seqlen_k"] - sizes["seqlen_q"]
    sizes["q_offset"] = draw(st.one_of(st.just(default), st.integers(-60, 200)))
    sizes["causal"] = draw(st.booleans())
    sink, local = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    return (
        BlockGrid(**sizes, sink_blocks=sink, local_blocks=local),
        oracle.Grid(**sizes, sink=sink, local=local),
    )


def few_values(seed: int, shape: tuple[int, ...], *, special: bool = True) -> torch.Tensor:
    """Scores with many ties, and with NaN and infinities if `special`."""
    values = [-2.0, -1.0, -0.0, 0.0, 1.0, 2.0, 3.0, 5.0]
    values += [math.nan, -math.inf, math.inf] if special else []
    rng = random.Random(seed)
    return torch.tensor(rng.choices(values, k=math.prod(shape))).view(shape)


def expected(rule, scores, grid) -> tuple[torch.Tensor, float]:
    """rule(row of scores, number of the row) -> (chosen, margin), over all rows."""
    found = [rule(row, number) for number, row in enumerate(scores.tolist())]
    masks = [oracle.grid_mask(chosen, grid) for chosen, _ in found]
    return torch.stack(masks), min(margin for _, margin in found)


seeds = st.integers(0, 2**31 - 1)


@settings(max_examples=250, deadline=None)
@given(grids(), seeds, st.integers(0, 30))
def test_top_k_equals_the_rule(both, seed, k):
    grid, plain = both
    scores = few_values(seed, (3, plain.tiles, plain.blocks))
    want, _ = expected(lambda row, _: oracle.top_k(row, plain, lambda tile: k), scores, plain)
    assert torch.equal(block_top_k(scores, k, grid), want)
    assert torch.equal(blocks._top_k_torch(scores, k, grid, 0), want)


@settings(max_examples=100, deadline=None)
@given(grids(), seeds)
def test_top_k_by_head_and_tile(both, seed):
    grid, plain = both
    scores = few_values(seed, (3, plain.tiles, plain.blocks))
    budgets = torch.randint(-2, 25, (3, plain.tiles), generator=torch.Generator().manual_seed(seed))
    for k in (budgets, budgets[:, :1], budgets[:1]):
        full = k.expand(3, plain.tiles)
        want, _ = expected(
            lambda row, head, full=full: oracle.top_k(row, plain, lambda t: int(full[head, t])),
            scores,
            plain,
        )
        assert torch.equal(block_top_k(scores, k, grid), want)
        assert torch.equal(blocks._top_k_torch(scores, k, grid, 0), want)


@settings(max_examples=250, deadline=None)
@given(grids(), seeds, st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.booleans())
def test_top_p_of_masses_equals_the_rule(both, seed, share, whole):
    grid, plain = both  # small integers: all sums are exact
    scores = few_values(seed, (2, plain.tiles, plain.blocks), special=False)
    want, _ = expected(
        lambda row, _: oracle.top_p(row, plain, share, logits=False, whole=whole), scores, plain
    )
    assert torch.equal(block_top_p(scores, share, grid, logits=False, whole=whole), want)
    assert torch.equal(blocks._top_p_torch(scores, share, grid, False, whole, 0), want)


@settings(max_examples=250, deadline=None)
@given(grids(), seeds, st.floats(0.05, 0.99), st.booleans())
def test_top_p_of_logits_equals_the_rule(both, seed, share, whole):
    grid, plain = both
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, plain.tiles, plain.blocks, generator=generator) * 3
    want, margin = expected(
        lambda row, _: oracle.top_p(row, plain, share, logits=True, whole=whole), scores, plain
    )
    # A tile's sums are float64; over all tiles each probability is rounded to float32.
    assume(margin > (1e-6 if whole else 1e-13))
    assert torch.equal(block_top_p(scores, share, grid, logits=True, whole=whole), want)
    assert torch.equal(blocks._top_p_torch(scores, share, grid, True, whole, 0), want)


@settings(max_examples=200, deadline=None)
@given(grids(), seeds, st.sampled_from([0.0, 0.01, 0.1, 0.5]))
def test_threshold_equals_the_rule(both, seed, level):
    grid, plain = both
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, plain.tiles, plain.blocks, generator=generator) * 3
    want, margin = expected(lambda row, _: oracle.threshold(row, plain, level), scores, plain)
    assume(margin > 1e-13)
    assert torch.equal(block_threshold(scores, level, grid), want)
    assert torch.equal(blocks._threshold_torch(scores, level, grid, 0), want)


def test_scores_without_any_finite_one_leave_the_forced_blocks():
    grid = BlockGrid(64, 64, 16, 8, 0, True, sink_blocks=1, local_blocks=1)
    forced = grid.masks(0, 4, torch.device("cpu"))[1]
    for value in (math.nan, -math.inf):
        scores = torch.full((1, 4, 8), value)
        for logits in (True, False):
            assert torch.equal(block_top_p(scores, 0.9, grid, logits=logits)[0], forced)
        assert torch.equal(block_threshold(scores, 0.0, grid)[0], forced)


def test_bands_of_tiles_choose_what_the_whole_chooses():
    grid = BlockGrid(500, 600, 16, 8, 100, True, sink_blocks=1, local_blocks=2)
    scores = torch.randn(2, grid.tiles, grid.blocks, generator=torch.Generator().manual_seed(0))
    for choose in (
        lambda x, first: block_top_k(x, 9, grid, first_tile=first),
        lambda x, first: block_top_p(x, 0.6, grid, logits=True, first_tile=first),
        lambda x, first: block_threshold(x, 0.02, grid, first_tile=first),
    ):
        parts = [choose(scores[:, i : i + 7], i) for i in range(0, grid.tiles, 7)]
        assert torch.equal(torch.cat(parts, 1), choose(scores, 0))


def test_choices_do_not_depend_on_threads():
    grid = BlockGrid(700, 700, 16, 8, 0, True, sink_blocks=1, local_blocks=1)
    scores = few_values(3, (4, grid.tiles, grid.blocks))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(
                (
                    block_top_k(scores, 7, grid),
                    block_top_p(scores, 0.5, grid, logits=False),
                    block_threshold(scores, 0.01, grid),
                    *list_blocks(block_top_k(scores, 7, grid), 8),
                )
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(0, 5), st.integers(0, 130), st.sampled_from([0.0, 0.03, 0.5, 1.0]))
def test_lists_are_the_marks(seed, rows, n, share):
    mask = torch.rand(rows, n, generator=torch.Generator().manual_seed(seed)) < share
    counts, indices = list_blocks(mask, 8)
    assert counts.tolist() == [sum(row) for row in mask.tolist()]
    assert indices.tolist() == [8 * j for row in mask.tolist() for j, x in enumerate(row) if x]


def test_group_to_kv():
    x = torch.tensor([[0, 1, 0, 0], [2, 3, 0, 1], [5, 0, 0, 1], [1, 1, 1, 1]])
    scores = x.view(1, 4, 2, 2).float()
    assert group_to_kv(scores, 2, "sum")[0, 0].tolist() == [[2, 4], [0, 1]]
    assert group_to_kv(scores, 2, "max")[0, 1].tolist() == [[5, 1], [1, 1]]
    assert group_to_kv(scores, 2, "mean")[0, 0].tolist() == [[1, 2], [0, 0.5]]
    assert group_to_kv(scores > 2, 2, "union")[0].tolist() == [
        [[False, True], [False, False]],
        [[True, False], [False, False]],
    ]
    for how, like in (("union", scores), ("sum", scores > 0), ("best", scores)):
        with pytest.raises(ValueError, match="pass 'union' for a bool mask"):
            group_to_kv(like, 2, how)
    with pytest.raises(ValueError, match="4 heads do not divide into 3"):
        group_to_kv(scores, 3, "sum")


# ------------------------------------------------------------------------------ estimators


@pytest.mark.parametrize("kind", ["mean", "min", "max", "direction"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((2, 3, 70, 24), 16), ((1, 2, 333, 128), 64), ((1, 1, 5, 8), 8), ((2, 1, 400, 40), 150)],
)
def test_pools_equal_the_rule(capability, kind, dtype, shape, block):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0, 0, 3] = 0.0  # a row without a direction
    wide = x.double()
    if kind == "direction":
        wide = wide / wide.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    starts = range(0, shape[2], block)
    how = {"min": lambda b: b.amin(2), "max": lambda b: b.amax(2)}.get(kind, lambda b: b.mean(2))
    want = torch.stack([how(wide[:, :, i : i + block]) for i in starts], 2)
    plain = pooled._pool_torch(x, block, kind)
    tokens_first = x.transpose(1, 2).contiguous().transpose(1, 2)
    every_other = x.repeat_interleave(2, 2)[:, :, ::2]
    for laid_out in (x, tokens_first, every_other):
        assert_matches_oracle(pool(laid_out, block, kind), want, plain)
    assert_matches_oracle(plain, want, pool(x, block, kind))


def test_pooled_integers_are_exact(capability):
    x = torch.randint(-9, 9, (1, 2, 320, 16), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(pool(x, 64).double(), x.double().view(1, 2, 5, 64, 16).mean(3))


def test_similarity_equals_the_gram_matrix():
    x = torch.randn(1, 2, 75, 16, generator=torch.Generator().manual_seed(0))
    x[0, 1, 16:32] = torch.linspace(1, 2, 16)[:, None] * x[0, 1, 16]  # one direction
    found = block_similarity(x, 16)
    want = [[oracle.self_similarity(head.double(), 16) for head in x[0]]]
    plain = pooled._pool_torch(x, 16, "direction").square().sum(-1)
    assert_matches_oracle(found, torch.tensor(want, dtype=torch.float64), plain)
    assert found[0, 1, 1] == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [0.5, -0.25])
def test_bounds_equal_the_rule_and_bound(scale):
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-4, 5, (2, 6, 3, 16), generator=generator).float()
    k = torch.randint(-4, 5, (2, 3, 50, 16), generator=generator).float()
    found = minmax_bound_scores(q, minmax_pool(k, 16), scale)
    for b in range(2):
        for h in range(6):
            for i in range(3):
                for page in range(4):
                    keys = k[b, h // 2, 16 * page : 16 * page + 16].double() * scale
                    row = q[b, h, i].double()
                    want = sum(
                        max(row[d] * keys[:, d].min(), row[d] * keys[:, d].max()) for d in range(16)
                    )
                    assert found[b, h, i, page] == want
                    assert want >= (keys @ row).max()


CELL_CASES = [
    # seqlen_q, seqlen_k, heads, heads_kv, stride, block_m, block_n, offset, causal
    (128, 128, 2, 1, 16, 64, 64, None, True),
    (131, 131, 2, 2, 8, 32, 16, None, True),
    (70, 250, 4, 2, 8, 32, 32, None, True),
    (33, 90, 1, 1, 4, 16, 8, 40, True),
    (50, 40, 1, 1, 8, 16, 16, -20, True),  # rows that see no key
    (60, 77, 2, 1, 8, 16, 24, None, False),
    (1, 300, 2, 1, 16, 64, 64, None, True),
    (700, 700, 1, 1, 16, 128, 128, None, True),
]


@pytest.mark.parametrize("case", CELL_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_antidiagonal_scores_equal_the_rule(capability, monkeypatch, case, dtype):
    seqlen_q, seqlen_k, heads, heads_kv, stride, block_m, block_n, offset, causal = case
    offset = seqlen_k - seqlen_q if offset is None else offset
    generator = torch.Generator().manual_seed(seqlen_q)
    q = torch.randn(2, heads, seqlen_q, 16, generator=generator).to(dtype)
    k = torch.randn(2, heads_kv, seqlen_k, 16, generator=generator).to(dtype)
    options = {"stride": stride, "block_m": block_m, "block_n": block_n, "q_offset": offset}
    want = torch.tensor(
        [
            [
                oracle.antidiagonal_scores(
                    q[b, h].double(),
                    k[b, h // (heads // heads_kv)].double(),
                    **options,
                    scale=0.5,
                    causal=causal,
                )
                for h in range(heads)
            ]
            for b in range(2)
        ],
        dtype=torch.float64,
    )
    found = antidiagonal_scores(q, k, **options, softmax_scale=0.5, causal=causal)
    monkeypatch.setattr(
        pooled,
        "_cell_block_sums",
        lambda x, n, **o: pooled._cell_block_sums_torch(x, n, *o.values()),
    )
    plain = antidiagonal_scores(q, k, **options, softmax_scale=0.5, causal=causal)
    assert_matches_oracle(found, want, plain)
    assert_matches_oracle(plain, want, found)


def test_antidiagonal_scores_are_the_same_in_bands(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 300, 16, generator=generator), torch.randn(2, 2, 300, 16)
    options = {"stride": 4, "block_m": 16, "block_n": 16, "softmax_scale": 0.3, "q_offset": 0}
    whole = antidiagonal_scores(q, k, **options, causal=True)
    monkeypatch.setattr(pooled, "_BAND_CELLS", 1)
    torch.testing.assert_close(antidiagonal_scores(q, k, **options, causal=True), whole)


def test_a_toy_of_antidiagonals():
    # Two cells of two rows: the antidiagonal pairs row 0 with key 1 and row 1 with key 0.
    q = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 4, 1).repeat(1, 1, 1, 8)
    k = torch.tensor([0.0, 1.0, 2.0, 0.0]).view(1, 1, 4, 1).repeat(1, 1, 1, 8)
    options = {"stride": 2, "block_m": 2, "block_n": 2, "softmax_scale": 0.125, "q_offset": 0}
    found = antidiagonal_scores(q, k, **options, causal=True)[0, 0]
    # Cell (1, 0): row 2 . key 1 + row 3 . key 0 = 0; (1, 1): row 2 . key 3 + row 3 . key 2 = 2.
    e = math.exp(1.0)
    assert found[0].tolist() == [1.0, 0.0]
    assert found[1].tolist() == pytest.approx([1 / (1 + e), e / (1 + e)], rel=1e-6)


# ------------------------------------------------------------------------------ the ops' own checks

GRID = {
    "first_tile": 0,
    "seqlen_q": 32,
    "block_m": 16,
    "block_n": 8,
    "q_offset": 0,
    "causal": True,
    "sink_blocks": 1,
    "local_blocks": 1,
}
SCORES = torch.zeros(1, 2, 4)
K1 = torch.ones(1, 1, dtype=torch.int32)
LIMITS = torch.ones(2, dtype=torch.int64)
CELLS = {"tile_cells": 1, "block_cells": 1, "scale": 1.0}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ops.block_top_k(SCORES.double(), K1, GRID), "not a contiguous float32"),
        (lambda: ops.block_top_k(SCORES.mT, K1, GRID), "not a contiguous float32"),
        (lambda: ops.block_top_k(SCORES, K1.long(), GRID), "budget is not"),
        (lambda: ops.block_top_k(SCORES, K1.repeat(1, 3), GRID), "budget is not"),
        (lambda: ops.block_threshold(SCORES, 0.1, GRID | {"block_n": 0}), "out of range"),
        (lambda: ops.block_threshold(SCORES, 0.1, GRID | {"q_offset": 2**62}), "out of range"),
        (lambda: ops.block_threshold(SCORES, 0.1, GRID | {"block_m": 2**62}), "out of range"),
        (lambda: ops.block_threshold(SCORES, 0.1, GRID | {"sink_blocks": -1}), "out of range"),
        (lambda: ops.block_threshold(SCORES, 0.1, GRID | {"first_tile": -1}), "out of range"),
        (lambda: ops.list_blocks(SCORES[0], 8), "not a contiguous bool"),
        (lambda: ops.list_blocks(SCORES[0] > 0, 2**30), "more than an index can address"),
        (lambda: ops.list_blocks(SCORES[0] > 0, 0), "more than an index can address"),
        (lambda: ops.pool_blocks(SCORES, 8, "mean"), "3 dimensions"),
        (lambda: ops.pool_blocks(SCORES[None], 0, "mean"), "out of range"),
        (lambda: ops.pool_blocks(SCORES[None], 8, "median"), "none of mean"),
        (lambda: ops.pool_blocks(SCORES[None].int(), 8, "mean"), "dtype"),
        (lambda: ops.cell_block_sums(SCORES, LIMITS.int(), **CELLS), "limits is not"),
        (lambda: ops.cell_block_sums(SCORES, LIMITS[:1], **CELLS), "limits is not"),
        (lambda: ops.cell_block_sums(SCORES, LIMITS, **CELLS | {"tile_cells": 0}), "out of range"),
    ],
)
def test_wrong_arguments_raise(call, text):
    with pytest.raises(RuntimeError, match=text):
        call()


def test_limits_past_the_cells_are_clamped():
    cells = torch.randn(1, 2, 4)
    wide = ops.cell_block_sums(cells, torch.tensor([9, -3]), **CELLS)
    assert torch.equal(wide, ops.cell_block_sums(cells, torch.tensor([4, 0]), **CELLS))


def test_opcheck():
    library = torch.ops.sparse_attn
    grid = tuple(GRID.values())
    torch.library.opcheck(library.pool_blocks, (torch.randn(1, 2, 20, 8), 8, "max"))
    torch.library.opcheck(library.block_top_k, (SCORES, K1, *grid))
    torch.library.opcheck(library.block_top_p, (SCORES, 0.5, True, False, *grid))
    torch.library.opcheck(library.block_threshold, (SCORES, 0.5, *grid))
    torch.library.opcheck(library.list_blocks, (SCORES[0] == 0, 8))
    torch.library.opcheck(library.cell_block_sums, (SCORES, LIMITS, 1, 1, 0.5))
