# SPDX-License-Identifier: Apache-2.0
"""Index builders against the boolean-matrix oracle, and every message they can raise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn import reference
from sparse_attn.index import SparseIndex
from sparse_attn.patterns import (
    AnchorAttention,
    AShape,
    BlockSparse,
    Dense,
    Dilated,
    Pattern,
    PerHead,
    SlidingWindow,
    StridedBlocks,
    VerticalSlash,
    pattern_names,
    resolve,
    vertical_slash_index,
)
from sparse_attn.patterns.slash_lists import SlashLists, slash_lists
from sparse_attn.selection import bands, diagonal_sums, mean_pool, top_k_indices, top_k_mask

# (batch, heads, heads_kv, seqlen_q, seqlen_k, q_offset): GQA, odd lengths, chunks, decode, and
# rows that stand before the first key or past the last one.
SHAPES = [
    (1, 1, 1, 64, 64, None),
    (2, 4, 2, 100, 130, None),
    (1, 6, 2, 33, 200, None),
    (2, 2, 1, 130, 130, None),
    (1, 2, 2, 1, 77, None),
    (1, 2, 1, 96, 160, 10),
    (1, 2, 1, 70, 50, -20),
    (1, 2, 1, 40, 60, 45),
]


def _qk(shape: tuple, head_dim: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, heads_kv, seqlen_q, seqlen_k, _ = shape
    gen = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, seqlen_q, head_dim, generator=gen)
    k = torch.randn(batch, heads_kv, seqlen_k, head_dim, generator=gen)
    return q, k


def _offset(seqlen_q: int, seqlen_k: int, q_offset: int | None) -> int:
    return seqlen_k - seqlen_q if q_offset is None else q_offset


def _causal(seqlen_q: int, seqlen_k: int, q_offset: int | None) -> torch.Tensor:
    rows = torch.arange(seqlen_q) + _offset(seqlen_q, seqlen_k, q_offset)
    return torch.arange(seqlen_k) <= rows[:, None]


# ------------------------------------------------------------------------------ static patterns


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("pattern", "rule"),
    [
        (AShape(sink=5, window=20), (5, 20, 0)),
        (AShape(sink=5, window=20, dense_tail=7), (5, 20, 7)),
        (AShape(sink=0, window=1), (0, 1, 0)),
        (AShape(), (128, 3968, 0)),
        (SlidingWindow(9), (0, 9, 0)),
    ],
)
def test_streaming_patterns_equal_the_oracle(shape, pattern, rule):
    q, k = _qk(shape)
    seqlen_q, seqlen_k, q_offset = shape[3:]
    mask = pattern.build(q, k, q_offset=q_offset).to_dense_mask(q_offset=q_offset)
    expected = reference.streaming_mask(seqlen_q, seqlen_k, *rule, q_offset=q_offset)
    assert torch.equal(mask, expected.expand_as(mask))


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_sees_everything_and_holds_no_list(shape):
    q, k = _qk(shape)
    index = Dense().build(q, k)
    assert index.to_dense_mask().all()
    assert index.is_list_free and not Dense.data_dependent


@pytest.mark.parametrize(
    "pattern", [Dense(), AShape(4, 8, 2), PerHead([Dense(), SlidingWindow(8)])]
)
def test_static_builds_compile_as_one_graph(pattern):
    def build(q, k):
        return pattern.build(q, k).heads

    q, k = _qk((1, 2, 1, 40, 40, None))
    compiled = torch.compile(build, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k), build(q, k))


# ------------------------------------------------------------------------------ block-sparse

BLOCK_RULES = [
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 3, "sink_blocks": 2, "local_blocks": 2},
    {"top_k": 1, "sink_blocks": 2, "local_blocks": 3},
    {"top_k": 2, "sink_blocks": 0, "local_blocks": 0},
    {"top_k": 1000},
    {"density": 0.3},
    {"density": 1.0},
    {"density": 0.07, "sink_blocks": 0, "local_blocks": 0},
    {"threshold": 0.0},
    {"threshold": 0.2},
    {"threshold": 0.2, "sink_blocks": 0, "local_blocks": 0},
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rule", BLOCK_RULES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_block_sparse_equals_the_oracle(shape, rule, causal):
    q, k = _qk(shape)
    pattern = BlockSparse(**rule, block_m=16, block_n=8)
    options = {"causal": causal, "q_offset": shape[5], "softmax_scale": 1.0}
    mask = pattern.build(q, k, **options).to_dense_mask(q_offset=shape[5])
    full = {"sink_blocks": 1, "local_blocks": 1, **rule}
    expected = reference.block_sparse_mask(q, k, **full, block_m=16, block_n=8, **options)
    assert torch.equal(mask, expected)


def test_block_sparse_default_scale_matters_only_to_thresholds():
    q, k = _qk((1, 2, 1, 128, 128, None))
    rule = {"threshold": 0.1, "block_m": 16, "block_n": 16}
    expected = reference.block_sparse_mask(q, k, **rule, sink_blocks=1, local_blocks=1)
    assert torch.equal(BlockSparse(**rule).build(q, k).to_dense_mask(), expected)


def test_block_sparse_breaks_ties_by_index():
    q, k = torch.ones(1, 1, 32, 8), torch.ones(1, 1, 64, 8)
    pattern = BlockSparse(top_k=3, block_m=16, block_n=8, sink_blocks=0, local_blocks=1)
    index = pattern.build(q, k)
    assert index.block_indices.tolist() == [0, 8, 40, 0, 8, 56]


def test_density_rounds_up_the_exact_product():
    # 0.07 * 100 is above 7 in floating point.
    q, k = _qk((1, 1, 1, 16, 800, None))
    pattern = BlockSparse(density=0.07, block_m=16, block_n=8)
    assert pattern.build(q, k).block_indices.numel() == 7


def test_block_sparse_in_bands_is_the_same(monkeypatch):
    q, k = _qk((2, 3, 1, 130, 130, None))
    pattern = BlockSparse(density=0.4, block_m=16, block_n=16)
    whole = pattern.build(q, k)
    for limit in (1, 20, 100):
        _limit_bands(monkeypatch, limit)
        banded = pattern.build(q, k)
        assert torch.equal(banded.block_indptr, whole.block_indptr)
        assert torch.equal(banded.block_indices, whole.block_indices)


# ------------------------------------------------------------------------------ vertical-slash


def _limit_bands(monkeypatch, limit):
    for module in ("block_sparse", "slash_lists"):
        monkeypatch.setattr(
            f"sparse_attn.patterns.{module}.bands",
            lambda outer, inner, width, most=0: bands(outer, inner, width, limit),
        )


def _per_tile(lists: SlashLists, head: int) -> list[tuple[list[int], list[int]]]:
    """(blocks, columns) of each tile of a head."""
    tiles = lists.block_counts.shape[1]
    out = []
    ends_b = lists.block_counts.flatten().cumsum(0).tolist()
    ends_c = lists.column_counts.flatten().cumsum(0).tolist()
    for at in range(head * tiles, (head + 1) * tiles):
        first_b, first_c = ([0, *ends_b][at], [0, *ends_c][at])
        out.append(
            (
                lists.block_indices[first_b : ends_b[at]].tolist(),
                lists.column_indices[first_c : ends_c[at]].tolist(),
            )
        )
    return out


def _lists(verticals, slashes, **kwargs) -> SlashLists:
    """`slash_lists` of plain Python lists, one entry a head."""
    width = max((len(v) for v in verticals), default=0)
    padded = [sorted(v) + [kwargs["seqlen_k"]] * (width - len(v)) for v in verticals]
    distances = max(1, kwargs["seqlen_q"] + kwargs["q_offset"])
    marks = torch.zeros(len(slashes), distances, dtype=torch.bool)
    for row, chosen in zip(marks, slashes, strict=True):
        for s in chosen:
            if s < distances:
                row[s] = True
    keys = torch.tensor(padded, dtype=torch.int32).view(len(verticals), width)
    return slash_lists(keys, marks, **kwargs)


def _check_contract(lists, verticals, slashes, *, seqlen_q, seqlen_k, q_offset, causal, block_m,
                    block_n):  # fmt: skip
    """Everything required and nothing foreign, no key twice, ascending, in range."""
    for head, (chosen_v, chosen_s) in enumerate(zip(verticals, slashes, strict=True)):
        for t, (blocks, columns) in enumerate(_per_tile(lists, head)):
            rows = range(t * block_m, min((t + 1) * block_m, seqlen_q))
            first, last = rows[0] + q_offset, rows[-1] + q_offset
            assert all(0 <= b < seqlen_k for b in blocks)
            assert all(y >= x + block_n for x, y in itertools.pairwise(blocks))
            assert columns == sorted(set(columns))
            in_blocks = {key for b in blocks for key in range(b, b + block_n)}
            assert not in_blocks.intersection(columns)
            limit = min(last, seqlen_k - 1) if causal else seqlen_k - 1
            reached = {key for s in chosen_s for key in range(first - s, first - s + block_m)}
            slash_keys = {key for key in reached if 0 <= key < seqlen_k}
            # Everything required: every vertical, every slash of every row of the tile.
            needed = {v for v in chosen_v if v <= limit}
            needed |= {p - s for p in range(first, last + 1) for s in chosen_s}
            needed = {key for key in needed if 0 <= key <= limit}
            assert needed <= in_blocks.union(columns)
            # Nothing foreign: a column is a vertical or covered by a slash (or in the block that
            # straddled key 0), and every block holds a key that some slash covers.
            assert all(slash_keys.intersection(range(b, b + block_n)) for b in blocks)
            near = {key for key in range(block_n) if reached.intersection(range(key, block_n))}
            assert set(columns) <= slash_keys.union(chosen_v).union(near)
            assert all(column <= limit for column in columns)
            assert all(block <= limit for block in blocks)


@pytest.mark.parametrize(
    ("n", "verticals", "slashes", "expected"),
    [
        (
            8,
            [0, 5],
            [0, 3],
            [([0], []), ([0, 2], []), ([1, 4], [0]), ([3, 6], [0, 5])],
        ),
        (4, [1, 3], [2], [([], [1]), ([0], [3])]),
    ],
)
def test_slash_lists_of_the_hand_made_toys(n, verticals, slashes, expected):
    lists = _lists(
        [verticals], [slashes], seqlen_q=n, seqlen_k=n, q_offset=0, causal=True, block_m=2,
        block_n=2,
    )  # fmt: skip
    assert _per_tile(lists, 0) == expected


def test_verticals_survive_without_near_slashes():
    # The original conversion drops verticals past the last slash and reads past its array when all
    # slashes lie beyond a row block.
    index = vertical_slash_index(
        torch.tensor([[[0, 70, 100, 127]]]),
        torch.tensor([[[120]]]),
        seqlen_q=128,
        seqlen_k=128,
    )
    # Tile 0: slash 120 lies past it. Tile 1, from 64: it covers keys [-56, 8), a short rest.
    assert index.block_indices.tolist() == []
    assert index.column_indices.tolist() == [0, *range(8), 70, 100, 127]


def test_a_block_may_straddle_key_zero():
    # Slash 40 in tile 0 covers [-40, 24) which makes a block at 0; verticals inside it are dropped
    # and those past what it covers, but inside the block, too: they are visible already.
    index = vertical_slash_index(
        torch.tensor([[[3, 40, 63]]]), torch.tensor([[[40]]]), seqlen_q=64, seqlen_k=64
    )
    assert index.block_indices.tolist() == [0]
    assert index.column_indices.tolist() == []


SMALL = st.integers(1, 40)


@st.composite
def _slash_problem(draw):
    block_m, block_n = draw(st.sampled_from([(1, 8), (2, 2), (4, 8), (8, 4), (8, 8), (16, 8)]))
    seqlen_q, seqlen_k = draw(SMALL), draw(SMALL)
    q_offset = draw(st.one_of(st.just(seqlen_k - seqlen_q), st.integers(-20, 30)))
    heads = draw(st.integers(1, 3))
    key = st.integers(0, seqlen_k - 1)
    distance = st.integers(0, 50)
    # Runs of neighbours next to lone slashes: what merging has to get right.
    run = st.tuples(distance, st.integers(1, 20)).map(lambda r: set(range(r[0], r[0] + r[1])))
    chosen = st.lists(run, max_size=3).map(lambda runs: set().union(*runs))
    verticals = [draw(st.sets(key, max_size=10)) for _ in range(heads)]
    slashes = [draw(st.one_of(st.sets(distance, max_size=8), chosen)) for _ in range(heads)]
    options = {
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
        "q_offset": q_offset,
        "causal": draw(st.booleans()),
        "block_m": block_m,
        "block_n": block_n,
    }
    return verticals, slashes, options


@settings(max_examples=300, deadline=None)
@given(_slash_problem())
def test_slash_lists_keep_their_contract(problem):
    verticals, slashes, options = problem
    lists = _lists(verticals, slashes, **options)
    _check_contract(lists, verticals, slashes, **options)


@settings(max_examples=30, deadline=None)
@given(_slash_problem(), st.integers(1, 300))
def test_slash_lists_in_bands_are_the_same(problem, limit):
    verticals, slashes, options = problem
    whole = _lists(verticals, slashes, **options)
    with pytest.MonkeyPatch.context() as patch:
        _limit_bands(patch, limit)
        banded = _lists(verticals, slashes, **options)
    for field in ("block_counts", "block_indices", "column_counts", "column_indices"):
        assert torch.equal(getattr(banded, field), getattr(whole, field))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(1, 200),
    st.sets(st.integers(0, 199), max_size=12),
    st.sets(st.integers(0, 199), max_size=12),
    st.booleans(),
)
def test_vertical_slash_index_contains_the_spec_mask(
    seqlen_q, seqlen_k, chosen_v, chosen_s, causal
):
    chosen_v = {v for v in chosen_v if v < seqlen_k}
    index = vertical_slash_index(
        torch.tensor([[[*chosen_v, -1]]], dtype=torch.int32),
        torch.tensor([[[*chosen_s, -1]]], dtype=torch.int32),
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        causal=causal,
        block_m=16,
        block_n=16,
    )
    mask = index.to_dense_mask()
    selection = ([[sorted(chosen_v)]], [[sorted(chosen_s)]], seqlen_q, seqlen_k)
    spec = reference.vertical_slash_mask(*selection)
    visible = _causal(seqlen_q, seqlen_k, None) if causal else torch.ones_like(mask)
    assert not (spec & visible & ~mask).any()
    # A merged run rounds up to whole blocks at most, like the serial walk's.
    tile = reference.vertical_slash_tile_mask(*selection, block_m=16, block_n=16)
    rounded = tile.clone()
    for shift in range(1, 16):
        rounded[..., shift:] |= tile[..., :-shift] if shift < seqlen_k else False
        rounded[..., : max(0, seqlen_k - shift)] |= tile[..., shift:]
    assert not (mask & visible & ~rounded).any()


def _gap_at(scores: list[float], count: int) -> float:
    """How far apart the last chosen and the first left-out score are."""
    ranked = sorted(scores, reverse=True)
    return math.inf if count >= len(ranked) else ranked[count - 1] - ranked[count]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "pattern",
    [
        VerticalSlash(vertical=10, slash=60, last_q=16, sink=3, local=10),
        VerticalSlash(vertical=0, slash=0, last_q=8, sink=5, local=60),
        VerticalSlash(vertical=40, slash=70, last_q=64, sink=0, local=0),
        VerticalSlash(),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_vertical_slash_selects_and_covers_like_the_oracle(shape, pattern, causal):
    q, k = _qk(shape)
    seqlen_q, seqlen_k, q_offset = shape[3:]
    options = {"causal": causal, "q_offset": q_offset}
    numbers = (pattern.vertical, pattern.slash, pattern.last_q, pattern.sink, pattern.local)
    wanted_v, wanted_s = reference.vertical_slash_selection(q, k, *numbers, **options)
    chosen_v, chosen_s = pattern.select(q, k, **options)
    assert chosen_v.tolist() == wanted_v
    assert chosen_s.tolist() == wanted_s

    index = pattern.build(q, k, **options)
    again = vertical_slash_index(
        chosen_v, chosen_s, seqlen_q=seqlen_q, seqlen_k=seqlen_k, q_offset=q_offset, causal=causal
    )
    assert torch.equal(index.to_dense_mask(), again.to_dense_mask())
    spec = reference.vertical_slash_mask(wanted_v, wanted_s, seqlen_q, seqlen_k, q_offset)
    if causal:
        spec = spec & _causal(seqlen_q, seqlen_k, q_offset)
    assert not (spec & ~index.to_dense_mask()).any()


def test_vertical_slash_is_exact_where_blocks_fit():
    # Slashes 0 .. 64 of a 64-row tile cover 128 keys: two blocks and nothing beyond.
    slashes = torch.arange(65).view(1, 1, -1)
    index = vertical_slash_index(torch.tensor([[[0]]]), slashes, seqlen_q=256, seqlen_k=256)
    tiles = reference.vertical_slash_tile_mask([[[0]]], [[list(range(65))]], 256, 256)
    causal = _causal(256, 256, None)
    assert torch.equal(index.to_dense_mask() & causal, tiles & causal)
    assert index.block_indices.tolist() == [0, 0, 64, 64, 128, 128, 192]


def test_long_runs_are_blocks_and_short_rests_columns():
    # Slashes 0 .. 260 of the tile at 448 cover keys 188 .. 511: five blocks, and four keys over.
    index = vertical_slash_index(
        torch.tensor([[[-1]]]), torch.arange(261).view(1, 1, -1), seqlen_q=512, seqlen_k=512
    )
    first_block, first_column = index.block_indptr[0, 0, 7], index.column_indptr[0, 0, 7]
    assert index.block_indices[first_block:].tolist() == [188, 252, 316, 380, 444]
    assert index.column_indices[first_column:].tolist() == [508, 509, 510, 511]


def test_repeated_indices_count_once():
    index = vertical_slash_index(
        torch.tensor([[[5, 70, 5, -1, 70]]]), torch.tensor([[[0, 0]]]), seqlen_q=128, seqlen_k=128
    )
    assert index.block_indices.tolist() == [0, 64]
    assert index.column_indices.tolist() == [5]


# ------------------------------------------------------------------------------ what all share

BATCHED = [
    BlockSparse(top_k=3, block_m=16, block_n=8),
    BlockSparse(threshold=0.05, block_m=16, block_n=8),
    VerticalSlash(vertical=10, slash=60, last_q=16, sink=3, local=10),
    PerHead(
        {1: BlockSparse(top_k=2, block_m=16, block_n=16)}, default=VerticalSlash(9, 50, 8, 2, 3)
    ),
]


@pytest.mark.parametrize("pattern", BATCHED, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("shape", SHAPES[1:3] + SHAPES[5:])
def test_built_indexes_are_lawful(pattern, shape):
    q, k = _qk(shape)
    for causal in (True, False):
        pattern.build(q, k, causal=causal, q_offset=shape[5]).validate()


@pytest.mark.parametrize("pattern", [*BATCHED, AShape(4, 9, 2), Dense()], ids=str)
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_no_rows_or_no_keys(pattern, lengths):
    index = pattern.build(*_qk((2, 4, 2, *lengths, None)))
    assert index.num_tiles == min(lengths[0], 1)
    assert index.block_indices.numel() == index.column_indices.numel() == 0


@pytest.mark.parametrize("pattern", BATCHED, ids=lambda p: type(p).__name__)
def test_permuting_the_batch_permutes_the_index(pattern):
    q, k = _qk((3, 4, 2, 70, 90, None))
    mask = pattern.build(q, k).to_dense_mask()
    order = [2, 0, 1]
    assert torch.equal(pattern.build(q[order], k[order]).to_dense_mask(), mask[order])


@pytest.mark.parametrize("pattern", BATCHED[:3], ids=lambda p: type(p).__name__)
def test_permuting_heads_permutes_the_index(pattern):
    q, k = _qk((2, 6, 3, 70, 90, None))
    mask = pattern.build(q, k).to_dense_mask()
    kv = [2, 0, 1]
    heads = [5, 4, 0, 1, 3, 2]
    assert torch.equal(pattern.build(q[:, heads], k[:, kv]).to_dense_mask(), mask[:, heads])


@pytest.mark.parametrize("pattern", BATCHED, ids=lambda p: type(p).__name__)
def test_strides_and_repetition_change_nothing(pattern):
    q, k = _qk((2, 4, 2, 70, 90, None))
    index = pattern.build(q, k)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    other = pattern.build(*strided)
    for name in ("block_indptr", "block_indices", "column_indptr", "column_indices"):
        assert torch.equal(getattr(index, name), getattr(other, name))


@pytest.mark.parametrize("pattern", BATCHED, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_float32_whatever_the_inputs(pattern, dtype):
    q, k = (x.to(dtype) for x in _qk((1, 4, 2, 70, 90, None)))
    upcast = pattern.build(q.float(), k.float())
    assert torch.equal(pattern.build(q, k).to_dense_mask(), upcast.to_dense_mask())


@pytest.mark.parametrize("pattern", [*BATCHED, AShape(4, 9, 2), Dense()], ids=str)
def test_patterns_are_values(pattern):
    assert pattern == pattern and hash(pattern) == hash(pattern)
    with pytest.raises(AttributeError):
        pattern.sink = 3


@pytest.mark.parametrize("pattern", BATCHED[:3], ids=lambda p: type(p).__name__)
def test_nan_inputs_still_give_a_lawful_index(pattern):
    q, k = _qk((1, 2, 1, 70, 90, None))
    q[0, 0, -1], k[0, 0, 3] = torch.nan, torch.nan
    mask = pattern.build(q, k).to_dense_mask()
    assert (mask & _causal(70, 90, None)).any(-1).all()


@pytest.mark.parametrize(
    "pattern",
    [Dense(), AShape(), SlidingWindow(3), *BATCHED],
    ids=lambda p: type(p).__name__,
)
@pytest.mark.parametrize(
    ("shape_q", "shape_k", "text"),
    [
        ((4, 8, 8), (1, 4, 8, 8), "has 3 dimensions"),
        ((1, 4, 8, 8), (1, 4, 8, 16), "differ in batch or head_dim"),
        ((2, 4, 8, 8), (1, 4, 8, 8), "differ in batch or head_dim"),
        ((1, 4, 8, 8), (1, 3, 8, 8), "multiple of the heads of k"),
    ],
)
def test_build_rejects_tensors_that_do_not_fit(pattern, shape_q, shape_k, text):
    with pytest.raises(
        ValueError, match=rf"sparse_attn\.{type(pattern).__name__}\.build: .*{text}"
    ):
        pattern.build(torch.zeros(shape_q), torch.zeros(shape_k))


# ------------------------------------------------------------------------------ per head


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(2, 6, 2, 70, 90, None), (1, 4, 1, 40, 60, 5)])
def test_per_head_is_each_pattern_on_its_head(shape, causal):
    q, k = _qk(shape)
    heads, group = shape[1], shape[1] // shape[2]
    choices = [
        BlockSparse(top_k=2, block_m=32, block_n=8),
        AShape(sink=3, window=9, dense_tail=2),
        VerticalSlash(vertical=10, slash=50, last_q=16, sink=3, local=10),
        Dense(),
        BlockSparse(top_k=2, block_m=32, block_n=8),
        SlidingWindow(5),
    ][:heads]
    options = {"causal": causal, "q_offset": shape[5]}
    index = PerHead(choices).build(q, k, **options)
    assert (index.block_m, index.block_n, index.num_heads) == (32, 8, heads)
    mask = index.to_dense_mask(q_offset=shape[5])
    for h, pattern in enumerate(choices):
        kv = h // group
        alone = pattern.build(q[:, h : h + 1], k[:, kv : kv + 1], **options)
        expected = alone.to_dense_mask(q_offset=shape[5])[:, 0]
        assert torch.equal(mask[:, h], expected.expand_as(mask[:, h]))


def test_per_head_builds_equal_patterns_once(monkeypatch):
    q, k = _qk((1, 6, 2, 70, 70, None))
    calls = []
    original = BlockSparse.build

    def spy(self, q, k, **kwargs):
        calls.append((q.shape[1], k.shape[1]))
        return original(self, q, k, **kwargs)

    monkeypatch.setattr(BlockSparse, "build", spy)
    first, second = BlockSparse(top_k=2), BlockSparse(top_k=3)
    # Two heads of each KV head: their group structure survives. Then three of one and one of the
    # other: KV heads are repeated.
    PerHead({0: first, 1: first, 3: first, 4: first}, default=Dense()).build(q, k)
    PerHead(dict.fromkeys(range(4), second), default=AShape()).build(q, k)
    PerHead([second] * 6).build(q, k)
    assert calls == [(4, 2), (4, 4), (6, 2)]


def test_per_head_without_lists_has_none_and_reads_no_data():
    pattern = PerHead([Dense(), AShape(1, 2), Dense(), SlidingWindow(4)])
    assert not pattern.data_dependent
    assert PerHead([Dense(), BlockSparse(top_k=1)]).data_dependent
    index = pattern.build(*_qk((1, 4, 2, 40, 40, None)))
    assert index.is_list_free and index.heads[:, 0].tolist() == [0, 1, 0, 1]


def test_per_head_forms_are_equal_values():
    a, b = AShape(1, 2), Dense()
    assert PerHead([a, b]) == PerHead({1: b, 0: a}) != PerHead({1: b}, default=a)
    assert hash(PerHead([a, b])) == hash(PerHead((a, b)))
    assert PerHead({1: b}, default=a).pattern_of(7) == a


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: PerHead(3), TypeError, "patterns is a int"),
        (lambda: PerHead("dense"), TypeError, "patterns is a str"),
        (lambda: PerHead([]), ValueError, "no pattern given"),
        (lambda: PerHead({"a": Dense()}), TypeError, "head 'a' is not an int"),
        (lambda: PerHead({-1: Dense()}), ValueError, "head -1 is negative"),
        (lambda: PerHead([Dense(), "dense"]), TypeError, "the pattern of head 1 is a str"),
        (lambda: PerHead({}, default=3), TypeError, "default is a int"),
        (lambda: PerHead([PerHead([Dense()])]), ValueError, "head 0 is a PerHead itself"),
        (lambda: PerHead([Dense()]).pattern_of(1), ValueError, "head 1 has no pattern"),
        (lambda: PerHead([Dense()] * 3).check_num_heads(2), ValueError, "head 2 has a pattern"),
        (lambda: PerHead([Dense()]).check_num_heads(2), ValueError, "1 of 2 heads have"),
    ],
)
def test_per_head_messages(make, error, text):
    with pytest.raises(error, match=rf"sparse_attn\.PerHead: .*{text}"):
        make()


# ------------------------------------------------------------------------------ names, arguments


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dense", Dense()),
        ("a_shape", AShape(128, 3968)),
        ("tri_shape", AShape(128, 3968, 100)),
        ("block_sparse", BlockSparse(top_k=100)),
        ("vertical_slash", VerticalSlash(1000, 6096, 64, 30, 100)),
        ("anchor_attention", AnchorAttention(128, 16, 12.0, 128)),
        ("dilated", Dilated(1024, 0, 8192, 2)),
        ("strided_blocks", StridedBlocks(64, 32, 8)),
    ],
)
def test_names(name, expected):
    assert resolve(name, 4) == expected
    assert name in pattern_names()


def test_resolve_lists_and_objects():
    assert resolve(Dense(), 4) == Dense()
    assert resolve(["dense", AShape()], 2) == PerHead([Dense(), AShape()])
    assert resolve(["dense", Dense()], 2) == Dense()
    assert resolve({1: "dense", 0: AShape()}, 2) == PerHead([AShape(), Dense()])
    pattern = PerHead({0: AShape()}, default=Dense())
    assert resolve(pattern, 2) is pattern


@pytest.mark.parametrize(
    ("pattern", "error", "text"),
    [
        ("densest", ValueError, "pattern='densest' is unknown; known names are 'a_shape', 'ada"),
        ("sliding_window", ValueError, r"needs arguments; pass SlidingWindow\(\.\.\.\)"),
        ("per_head", ValueError, r"needs arguments; pass PerHead\(\.\.\.\)"),
        (3, TypeError, "pattern is a int"),
        (AShape, TypeError, r"pattern is the class AShape; pass an instance, AShape\(\.\.\.\)"),
        (torch.ones(2, 2), TypeError, r"a tensor \(2, 2\); for a boolean mask pass SparseIndex"),
        (["dense", 3], TypeError, "3 is a int"),
        (["dense"], ValueError, "1 patterns for 2 query heads"),
        (PerHead([Dense()]), ValueError, "1 of 2 heads have a pattern"),
        ({1: Dense()}, ValueError, "1 of 2 heads have a pattern"),
        ({}, ValueError, "no pattern given"),
    ],
)
def test_resolve_messages(pattern, error, text):
    with pytest.raises(error, match=text):
        resolve(pattern, 2)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: AShape(sink=-1), ValueError, "AShape: sink=-1 is below 0"),
        (lambda: AShape(window=1.5), TypeError, "AShape: window=1.5 is a float"),
        (lambda: AShape(dense_tail=True), TypeError, "AShape: dense_tail=True is a bool"),
        (lambda: SlidingWindow(0), ValueError, "SlidingWindow: window=0 is below 1"),
        (lambda: BlockSparse(), ValueError, "BlockSparse: no budget given; pass exactly one"),
        (
            lambda: BlockSparse(top_k=1, density=0.5),
            ValueError,
            "BlockSparse: top_k=1 and density=0.5 given",
        ),
        (lambda: BlockSparse(top_k=0), ValueError, "BlockSparse: top_k=0 is below 1"),
        (lambda: BlockSparse(top_k=0.5), TypeError, "BlockSparse: top_k=0.5 is a float"),
        (lambda: BlockSparse(density=0), ValueError, r"density=0 is outside \(0, 1\]"),
        (lambda: BlockSparse(density="a"), TypeError, "density='a' is a str"),
        (lambda: BlockSparse(threshold=1.0), ValueError, r"threshold=1.0 is outside \[0, 1\)"),
        (lambda: BlockSparse(threshold=math.nan), ValueError, "threshold=nan is outside"),
        (lambda: BlockSparse(top_k=1, block_m=24), ValueError, "block_m=24 is neither 1 nor"),
        (lambda: BlockSparse(top_k=1, block_n=12), ValueError, "block_n=12 is not a multiple"),
        (lambda: BlockSparse(top_k=1, sink_blocks=-1), ValueError, "sink_blocks=-1 is below 0"),
        (lambda: BlockSparse(top_k=1, local_blocks=-1), ValueError, "local_blocks=-1 is below"),
        (lambda: VerticalSlash(vertical=-1), ValueError, "VerticalSlash: vertical=-1 is below 0"),
        (lambda: VerticalSlash(slash=0.5), TypeError, "VerticalSlash: slash=0.5 is a float"),
        (lambda: VerticalSlash(last_q=0), ValueError, "VerticalSlash: last_q=0 is below 1"),
        (lambda: VerticalSlash(sink=-1), ValueError, "VerticalSlash: sink=-1 is below 0"),
        (lambda: VerticalSlash(local=-1), ValueError, "VerticalSlash: local=-1 is below 0"),
    ],
)
def test_argument_messages(make, error, text):
    with pytest.raises(error, match=rf"sparse_attn\..*{text}"):
        make()


@pytest.mark.parametrize(
    ("verticals", "slashes", "options", "error", "text"),
    [
        (torch.zeros(1, 1, 1), torch.zeros(1, 1, 1).int(), {}, TypeError, "is torch.float32"),
        (torch.zeros(1, 1).int(), torch.zeros(1, 1, 1).int(), {}, ValueError, "2 dimensions"),
        (torch.zeros(1, 2, 1).int(), torch.zeros(1, 1, 1).int(), {}, ValueError, "differ in"),
        (torch.full((1, 1, 1), 8), torch.zeros(1, 1, 1).int(), {}, ValueError, "hold 8; pass keys"),
        (torch.full((1, 1, 1), -2), torch.zeros(1, 1, 1).int(), {}, ValueError, "hold -2; pass k"),
        (torch.zeros(1, 1, 1).int(), torch.full((1, 1, 1), -2), {}, ValueError, "hold -2; pass d"),
        (
            torch.zeros(1, 1, 1).int(),
            torch.zeros(1, 1, 1).int(),
            {"block_m": 8},
            ValueError,
            "block_m=8 is neither 1 nor",
        ),
    ],
)
def test_vertical_slash_index_messages(verticals, slashes, options, error, text):
    with pytest.raises(error, match=rf"sparse_attn\.vertical_slash_index: .*{text}"):
        vertical_slash_index(verticals, slashes, seqlen_q=8, seqlen_k=8, **options)


# ------------------------------------------------------------------------------ selection


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, math.inf, -math.inf]), min_size=1, max_size=12),
    st.integers(0, 14),
)
def test_top_k_is_score_descending_then_index_ascending(row, k):
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    expected = sorted(order[:k])
    scores = torch.tensor([row])
    assert top_k_indices(scores, k).tolist() == [expected]
    assert top_k_mask(scores, torch.tensor([k])).nonzero()[:, 1].tolist() == expected


def test_top_k_puts_nan_last():
    assert top_k_indices(torch.tensor([torch.nan, 1.0, torch.nan, 2.0]), 3).tolist() == [0, 1, 3]


def test_top_k_takes_a_budget_per_row():
    scores = torch.tensor([[3.0, 1.0, 2.0]] * 4)
    mask = top_k_mask(scores, torch.tensor([0, 1, 2, 9]), k_max=3)
    assert mask.int().tolist() == [[0, 0, 0], [1, 0, 0], [1, 0, 1], [1, 1, 1]]


def test_mean_pool_averages_a_ragged_tail_over_its_real_rows():
    x = torch.arange(5.0).view(5, 1)
    assert mean_pool(x, 2).flatten().tolist() == [0.5, 2.5, 4.0]
    assert mean_pool(x, 8).flatten().tolist() == [2.0]
    assert mean_pool(x.bfloat16(), 5).dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(-9, 14), st.integers(0, 16))
def test_diagonal_sums_by_definition(rows, seqlen_k, q_offset, distances):
    probs = torch.arange(1.0, rows * seqlen_k + 1).view(1, rows, seqlen_k)
    expected = torch.zeros(distances)
    for i, j in itertools.product(range(rows), range(seqlen_k)):
        if 0 <= i + q_offset - j < distances:
            expected[i + q_offset - j] += probs[0, i, j]
    sums = diagonal_sums(probs, q_offset=q_offset, num_distances=distances)
    assert torch.equal(sums[0], expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.integers(1, 40))
def test_bands_cover_all_work_once_and_in_order(outer, inner, width, limit):
    grid = torch.arange(outer * inner).view(outer, inner)
    parts = list(bands(outer, inner, width, limit))
    seen = [x for o, i in parts for x in grid[o, i].flatten().tolist()]
    assert seen == list(range(outer * inner))
    for o, i in parts:
        pairs = grid[o, i].numel()
        assert pairs <= 1 or pairs * width <= limit


def test_patterns_share_one_base():
    assert all(isinstance(p, Pattern) for p in BATCHED)
    assert isinstance(Dense().build(*_qk(SHAPES[0])), SparseIndex)
