# SPDX-License-Identifier: Apache-2.0
"""Vertical-slash in chunks and at element level, against a slow oracle in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_attn
from sparse_attn import SparseIndex, VerticalSlash
from sparse_attn.patterns import slash_lists, vertical_slash_index

# --- the rule, key by key -------------------------------------------------------------------------


def best(scores: list[float], count: int) -> list[int]:
    """Score descending, then index ascending."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(order[: max(0, min(count, len(scores)))])


def choice_of_rows(q, keys, positions, pattern, *, causal, scale, distances):
    """(V, S) that rows at `positions` choose; q [rows, dim], keys [n, dim], float64."""
    columns, diagonals = [0.0] * keys.shape[0], [0.0] * distances
    for row, p in zip(q[-pattern.last_q :], positions[-pattern.last_q :], strict=True):
        seen = min(keys.shape[0], p + 1) if causal else keys.shape[0]
        if seen <= 0:
            continue
        # Not a matmul: equal keys must give equal scores for ties to be ties.
        probabilities = ((keys[:seen] * row).sum(-1) * scale).softmax(0).tolist()
        for j, x in enumerate(probabilities):
            columns[j] += x
            if 0 <= p - j < distances:
                diagonals[p - j] += x
    for scores, forced in ((columns, pattern.sink), (diagonals, pattern.local)):
        scores[:forced] = [math.inf] * min(forced, len(scores))
    chosen = best(columns, max(pattern.vertical, pattern.sink))
    return chosen, best(diagonals, max(pattern.slash, 50)), (columns, diagonals)


def near_tie(scores: list[float], chosen: list[int]) -> bool:
    """Whether float32 may order the last chosen and the first left-out score differently."""
    inside = set(chosen)
    out = [x for i, x in enumerate(scores) if i not in inside]
    if not out or not chosen:
        return False
    low, high = min(scores[i] for i in chosen), max(out)
    return low != high and low - high < 1e-5


def chunked_mask(q, k, pattern, *, causal, scale, offset):
    """The element mask of one batch entry and every head, and whether a near-tie was met."""
    heads, seqlen_q, _ = q.shape
    seqlen_k, group = k.shape[1], q.shape[0] // k.shape[0]
    mask = torch.zeros(heads, seqlen_q, seqlen_k, dtype=torch.bool)
    chunk, tied = pattern.chunk or max(1, seqlen_q), False
    for h in range(heads):
        for start in range(0, seqlen_q, chunk):
            end = min(start + chunk, seqlen_q)
            keys = seqlen_k
            if pattern.chunk and causal:
                keys = max(0, min(seqlen_k, end + offset))
            v, s, scores = choice_of_rows(
                q[h, start:end].double(),
                k[h // group, :keys].double(),
                range(start + offset, end + offset),
                pattern,
                causal=causal,
                scale=scale,
                distances=max(keys, end + offset),
            )
            tied = tied or near_tie(scores[0], v) or near_tie(scores[1], s)
            for i in range(start, end):
                visible = set(v) | {i + offset - d for d in s}
                limit = min(seqlen_k - 1, i + offset) if causal else seqlen_k - 1
                for j in visible:
                    if 0 <= j <= limit:
                        mask[h, i, j] = True
    return mask, tied


def causal_mask(seqlen_q: int, seqlen_k: int, offset: int) -> torch.Tensor:
    return torch.arange(seqlen_k) <= torch.arange(seqlen_q)[:, None] + offset


@st.composite
def problem(draw):
    """Tensors and a pattern; lengths lean to the odd and the short, some to 700."""
    batch, heads_kv, group = (draw(st.integers(1, 3)) for _ in range(3))
    length = st.one_of(st.integers(1, 40), st.integers(41, 200), st.sampled_from([63, 64, 65, 700]))
    seqlen_k = draw(length)
    seqlen_q = draw(st.one_of(st.just(seqlen_k), st.integers(1, seqlen_k)))
    if seqlen_k > 200:
        batch = heads_kv = 1
    offset = draw(st.one_of(st.none(), st.none(), st.integers(-30, 90)))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    q = torch.randn(batch, heads_kv * group, seqlen_q, 8, generator=gen)
    k = torch.randn(batch, heads_kv, seqlen_k, 8, generator=gen)
    pattern = VerticalSlash(
        vertical=draw(st.integers(0, 30)),
        slash=draw(st.integers(0, 120)),
        last_q=draw(st.sampled_from([1, 5, 64, 100])),
        sink=draw(st.integers(0, 9)),
        local=draw(st.integers(0, 60)),
        chunk=draw(st.sampled_from([None, 64, 128, 192])),
        exact=draw(st.booleans()),
    )
    return q, k, pattern, offset, draw(st.booleans())


@settings(max_examples=250)
@given(problem())
def test_the_index_is_what_the_rule_says(case):
    q, k, pattern, q_offset, causal = case
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    offset = seqlen_k - seqlen_q if q_offset is None else q_offset
    index = pattern.build(q, k, causal=causal, softmax_scale=1.0, q_offset=q_offset).validate()
    mask = index.to_dense_mask()
    for b in range(q.shape[0]):
        expected, tied = chunked_mask(q[b], k[b], pattern, causal=causal, scale=1.0, offset=offset)
        if tied:
            continue
        found = mask[b] & causal_mask(seqlen_q, seqlen_k, offset) if causal else mask[b]
        if pattern.exact:
            assert torch.equal(found, expected)
        else:
            assert not (expected & ~found).any()


# --- chunks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(300, 300), (256, 300), (130, 700), (5, 77)])
def test_one_call_equals_a_call_for_each_chunk(seqlen_q, seqlen_k, exact):
    q, k = torch.randn(2, 4, seqlen_q, 16), torch.randn(2, 2, seqlen_k, 16)
    v = torch.randn(2, 2, seqlen_k, 24)
    pattern = VerticalSlash(vertical=9, slash=60, sink=2, local=8, chunk=64, exact=exact)
    whole = VerticalSlash(vertical=9, slash=60, sink=2, local=8, exact=exact)
    out, lse = sparse_attn.attention(q, k, v, pattern, return_lse=True)
    offset = seqlen_k - seqlen_q
    for start in range(0, seqlen_q, 64):
        end = min(start + 64, seqlen_q)
        keys = slice(0, offset + end)
        part, part_lse = sparse_attn.attention(
            q[:, :, start:end], k[:, :, keys], v[:, :, keys], whole, return_lse=True
        )
        assert torch.equal(out[:, :, start:end], part)
        assert torch.equal(lse[:, :, start:end], part_lse)
    # Without a chunk the last rows choose for all, and earlier rows get other keys.
    if seqlen_q > 128:
        assert not torch.equal(out, sparse_attn.attention(q, k, v, whole))


def test_a_chunk_as_long_as_the_call_changes_nothing():
    q, k = torch.randn(1, 2, 200, 16), torch.randn(1, 1, 330, 16)
    a = VerticalSlash(vertical=9, slash=60, chunk=256).build(q, k)
    b = VerticalSlash(vertical=9, slash=60).build(q, k)
    for name in ("block_indptr", "block_indices", "column_indptr", "column_indices"):
        assert torch.equal(getattr(a, name), getattr(b, name))


def test_select_lists_each_chunk():
    q, k = torch.randn(1, 2, 150, 16), torch.randn(1, 1, 150, 16)
    pattern = VerticalSlash(vertical=9, slash=100, sink=2, local=8, chunk=64)
    verticals, slashes = pattern.select(q, k)
    assert verticals.shape == (1, 2, 3, 9) and slashes.shape == (1, 2, 3, 100)
    for c, end in enumerate((64, 128, 150)):
        alone = VerticalSlash(vertical=9, slash=100, sink=2, local=8)
        v, s = alone.select(q[:, :, c * 64 : end], k[:, :, :end])
        assert torch.equal(verticals[:, :, c], v)
        assert torch.equal(slashes[:, :, c, : s.shape[-1]], s)
        assert (slashes[:, :, c, s.shape[-1] :] == -1).all()


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**31 - 1),
    seqlen_q=st.integers(0, 200),
    seqlen_k=st.integers(1, 200),
    block_m=st.sampled_from([1, 16, 32]),
    chunk_tiles=st.integers(1, 4),
    causal=st.booleans(),
    share=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)
def test_chunked_lists_in_plain_torch(
    seed, seqlen_q, seqlen_k, block_m, chunk_tiles, causal, share
):
    """What devices without the native operator run equals it, chunk by chunk."""
    gen = torch.Generator().manual_seed(seed)
    chunk = block_m * chunk_tiles
    selections = 2 * max(1, -(-seqlen_q // chunk))
    slashes = torch.rand(selections, seqlen_k, generator=gen) < share
    verticals = torch.stack([torch.randperm(seqlen_k + 5, generator=gen)[:4] for _ in slashes])
    verticals = verticals.sort(-1).values.int()
    options = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "q_offset": seqlen_k - seqlen_q}
    options |= {"causal": causal, "block_m": block_m, "block_n": 16, "chunk": chunk}
    native = slash_lists.slash_lists(verticals, slashes, **options)
    plain = slash_lists._chunks_torch(verticals, slashes, **options)
    for name in ("block_counts", "block_indices", "column_counts", "column_indices"):
        assert torch.equal(getattr(native, name), getattr(plain, name)), name


# --- element level --------------------------------------------------------------------------------


@st.composite
def selection(draw):
    seqlen_q, seqlen_k = draw(st.integers(1, 200)), draw(st.integers(1, 200))
    runs = st.tuples(st.integers(0, 220), st.integers(1, 90), st.integers(1, 3))
    slashes = draw(st.lists(runs, max_size=4))
    chosen = {d for first, count, step in slashes for d in range(first, first + count, step)}
    verticals = draw(st.sets(st.integers(0, seqlen_k - 1), max_size=12))
    offset = draw(st.one_of(st.just(seqlen_k - seqlen_q), st.integers(-80, 220)))
    sizes = draw(
        st.sampled_from([(1, 8), (16, 8), (16, 64), (48, 16), (64, 64), (80, 8), (128, 64)])
    )
    return seqlen_q, seqlen_k, offset, sorted(verticals), sorted(chosen), sizes


def spec_mask(seqlen_q, seqlen_k, offset, verticals, slashes):
    mask = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool)
    for i in range(seqlen_q):
        for j in [*verticals, *(i + offset - s for s in slashes)]:
            if 0 <= j < seqlen_k:
                mask[i, j] = True
    return mask


@settings(max_examples=400)
@given(selection(), st.booleans())
def test_exact_lists_are_the_spec_mask(case, causal):
    seqlen_q, seqlen_k, offset, verticals, slashes, (block_m, block_n) = case
    index = vertical_slash_index(
        torch.tensor([[[*verticals, -1]]]),
        torch.tensor([[[*slashes, -1]]]),
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        q_offset=offset,
        causal=causal,
        block_m=block_m,
        block_n=block_n,
        exact=True,
    ).validate()
    found, expected = index.to_dense_mask()[0, 0], spec_mask(*case[:5])
    if causal:
        visible = causal_mask(seqlen_q, seqlen_k, offset)
        found, expected = found & visible, expected & visible
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("n", "verticals", "slashes", "blocks", "columns"),
    [
        (8, [0, 5], [0, 3], [[0], [0, 2], [1, 4], [3, 6]], [[], [], [0], [0, 5]]),
        (4, [1, 3], [2], [[], [0]], [[1], [3]]),
    ],
)
def test_exact_lists_of_the_hand_made_toys(n, verticals, slashes, blocks, columns):
    marks = torch.zeros(1, n, dtype=torch.bool)
    marks[0, slashes] = True
    keys = torch.tensor([verticals], dtype=torch.int32)
    lists = slash_lists.slash_lists(
        keys, marks, seqlen_q=n, seqlen_k=n, q_offset=0, causal=True, block_m=2, block_n=2,
        exact=True,
    )  # fmt: skip
    split = lists.block_indices.split(lists.block_counts[0].tolist())
    assert [part.tolist() for part in split] == blocks
    split = lists.column_indices.split(lists.column_counts[0].tolist())
    assert [part.tolist() for part in split] == columns


def test_a_whole_band_needs_no_bits_and_tiles_share_masks():
    # 300 diagonals of 1,024 rows: whole blocks inside the band, one kind of block at its far edge.
    index = vertical_slash_index(
        torch.tensor([[[-1]]]), torch.arange(300).view(1, 1, -1), seqlen_q=1024, seqlen_k=1024,
        exact=True,
    )  # fmt: skip
    ids = index.block_bits_ids
    assert ids is not None and index.block_bits is not None
    assert (ids < 0).float().mean() > 0.5
    assert index.block_bits.shape[0] < 12


def test_attention_over_an_exact_index_is_attention_over_the_spec_mask():
    q, k, v = torch.randn(3, 1, 2, 200, 32)
    slashes, verticals = [0, 1, 2, 3, 40, 41, 150], [0, 7, 90]
    index = vertical_slash_index(
        torch.tensor([[verticals] * 2]), torch.tensor([[slashes] * 2]), seqlen_q=200, seqlen_k=200,
        exact=True,
    )  # fmt: skip
    out = sparse_attn.attention(q, k, v, index)
    mask = spec_mask(200, 200, 0, verticals, slashes) & causal_mask(200, 200, 0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


# --- what all options share -----------------------------------------------------------------------

OPTIONS = [
    VerticalSlash(vertical=9, slash=60, sink=2, local=8, chunk=64),
    VerticalSlash(vertical=9, slash=60, sink=2, local=8, exact=True),
    VerticalSlash(vertical=9, slash=60, sink=2, local=8, chunk=128, exact=True),
]


@pytest.mark.parametrize("pattern", OPTIONS, ids=["chunk", "exact", "both"])
def test_threads_and_repetition_change_nothing(pattern):
    q, k = torch.randn(2, 4, 700, 16), torch.randn(2, 2, 900, 16)
    indexes = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        indexes.append(pattern.build(q, k))
    names = ("block_indptr", "block_indices", "column_indptr", "column_indices")
    names += ("block_bits_ids", "block_bits") if pattern.exact else ()
    for other in indexes[1:]:
        assert all(torch.equal(getattr(indexes[0], n), getattr(other, n)) for n in names)


@pytest.mark.parametrize("pattern", OPTIONS, ids=["chunk", "exact", "both"])
def test_permuting_batch_or_heads_permutes_the_index(pattern):
    q, k = torch.randn(3, 6, 150, 16), torch.randn(3, 3, 190, 16)
    mask = pattern.build(q, k).to_dense_mask()
    batch, kv, heads = [2, 0, 1], [2, 0, 1], [5, 4, 0, 1, 3, 2]
    assert torch.equal(pattern.build(q[batch], k[batch]).to_dense_mask(), mask[batch])
    assert torch.equal(pattern.build(q[:, heads], k[:, kv]).to_dense_mask(), mask[:, heads])


@pytest.mark.parametrize("pattern", OPTIONS, ids=["chunk", "exact", "both"])
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_no_rows_or_no_keys(pattern, lengths):
    q, k = torch.randn(1, 2, lengths[0], 16), torch.randn(1, 1, lengths[1], 16)
    index = pattern.build(q, k).validate()
    assert index.to_dense_mask().shape == (1, 2, *lengths)


@pytest.mark.parametrize("pattern", OPTIONS, ids=["chunk", "exact", "both"])
def test_they_compile_into_one_graph(pattern):
    def call(q, k, v):
        return sparse_attn.attention(q, k, v, pattern)

    q, k, v = torch.randn(1, 4, 200, 16), torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16)
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), call(q, k, v))


@pytest.mark.parametrize("pattern", OPTIONS, ids=["chunk", "exact", "both"])
def test_per_head_varlen_and_decode(pattern):
    q, k, v = torch.randn(1, 4, 200, 16), torch.randn(1, 2, 200, 16), torch.randn(1, 2, 200, 16)
    out = sparse_attn.attention(q, k, v, pattern)
    mixed = sparse_attn.PerHead({1: sparse_attn.Dense()}, default=pattern)
    assert torch.equal(sparse_attn.attention(q, k, v, mixed)[:, 0], out[:, 0])
    lengths = torch.tensor([0, 70, 200], dtype=torch.int32)
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    ragged = sparse_attn.attention_varlen(*packed, lengths, lengths, 130, 130, pattern)
    first = sparse_attn.attention(*(x[:, :, :70] for x in (q, k, v)), pattern)
    torch.testing.assert_close(ragged[:70].transpose(0, 1), first[0])
    step = sparse_attn.attention_decode(q[:, :, -1:], k, v, pattern, cache_seqlens=150)
    alone = sparse_attn.attention(q[:, :, -1:], k[:, :, :150], v[:, :, :150], pattern)
    torch.testing.assert_close(step, alone)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"chunk": 100}, ValueError, "chunk=100 is not a multiple of 64"),
        ({"chunk": 0}, ValueError, "chunk=0 is below 64"),
        ({"chunk": 64.0}, TypeError, "chunk=64.0 is a float"),
        ({"exact": 1}, TypeError, "exact=1 is a int; pass a bool"),
    ],
)
def test_messages(options, error, text):
    with pytest.raises(error, match=rf"sparse_attn\.VerticalSlash: {text}"):
        VerticalSlash(**options)


def test_an_exact_index_is_a_sparse_index():
    assert isinstance(
        OPTIONS[1].build(torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 8)), SparseIndex
    )
