# SPDX-License-Identifier: Apache-2.0
"""SparseIndex: its meaning, its densities and its checks, against loops in plain Python."""

import random
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

import sparse_attn  # noqa: F401 - loads the operators that validate() calls
from sparse_attn.index import HeadKind, SparseIndex

# --- random indexes and the loops that they are held against --------------------------------------


def random_lists(rng, seqlen_k, block_n):
    """One tile's blocks and columns, as sorted Python lists that keep the rules."""
    free = list(range(seqlen_k))
    blocks, next_free = [], 0
    while rng.random() < 0.7:
        start = next_free + rng.randrange(2 * block_n)
        if start >= seqlen_k:
            break
        blocks.append(start)
        next_free = start + block_n
    covered = {start + i for start in blocks for i in range(block_n)}
    columns = [key for key in free if key not in covered and rng.random() < 0.1]
    return blocks, columns


def random_index(seed, *, bits=True, max_len=150):
    """A random index and its mask, built row by row: bool [batch, heads, seqlen_q, seqlen_k]."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, heads = rng.randint(1, 3), rng.randint(1, 4)
    seqlen_q, seqlen_k = rng.randint(1, max_len), rng.randint(1, max_len)
    block_m, block_n = rng.choice([1, 16, 32, 64, 80]), rng.choice([8, 16, 24, 64])
    if block_m == 1:
        seqlen_q = min(seqlen_q, 9)
    tiles = -(-seqlen_q // block_m)
    offset = seqlen_k - seqlen_q
    table = [
        (rng.choice(list(HeadKind)), rng.randrange(30), rng.randrange(60), rng.choice([0, 0, 7]))
        for _ in range(heads)
    ]
    table = [row if row[0] == HeadKind.STREAMING else (row[0], 0, 0, 0) for row in table]
    words = -(-block_m // 64)
    masks = (
        torch.randint(-(2**63), 2**63 - 1, (3, block_n, words), generator=generator)
        if bits
        else None
    )
    mask = torch.zeros(batch, heads, tiles * block_m, seqlen_k, dtype=torch.bool)
    indptr, indices, ids = [[], []], [[], []], []
    for b in range(batch):
        for h, (kind, sink, window, tail) in enumerate(table):
            for list_of, pointers in zip(indices, indptr):
                # A gap, as a list with spare capacity has it.
                list_of += [-5] * rng.randrange(3)
                pointers.append(len(list_of))
            ids += [77] * (len(indices[0]) - len(ids))
            for t in range(tiles):
                blocks, columns = random_lists(rng, seqlen_k, block_n)
                if kind != HeadKind.LISTED:
                    blocks, columns = [], []
                for start in blocks:
                    ids.append(rng.randint(-1, 2) if bits else -1)
                    for i in range(min(block_n, seqlen_k - start)):
                        for r in range(block_m):
                            word = int(masks[ids[-1], i, r // 64]) if ids[-1] >= 0 else -1
                            mask[b, h, t * block_m + r, start + i] = word >> (r % 64) & 1
                for key in columns:
                    mask[b, h, t * block_m : (t + 1) * block_m, key] = True
                for list_of, pointers, more in zip(indices, indptr, (blocks, columns)):
                    list_of += more
                    pointers.append(len(list_of))
            if kind == HeadKind.DENSE:
                mask[b, h] = True
            if kind == HeadKind.STREAMING:
                for i in range(seqlen_q):
                    for j in range(seqlen_k):
                        local = abs(i + offset - j) < window
                        mask[b, h, i, j] = j < sink or local or i >= seqlen_q - tail
    index = SparseIndex.from_lists(
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        block_m=block_m,
        block_n=block_n,
        heads=torch.tensor([[int(x) for x in row] for row in table], dtype=torch.int32),
        block_indptr=torch.tensor(indptr[0]).view(batch, heads, tiles + 1),
        block_indices=torch.tensor(indices[0], dtype=torch.int32),
        block_bits_ids=torch.tensor(ids, dtype=torch.int32) if bits else None,
        block_bits=masks,
        column_indptr=torch.tensor(indptr[1]).view(batch, heads, tiles + 1),
        column_indices=torch.tensor(indices[1], dtype=torch.int32),
    )
    return index, mask[:, :, :seqlen_q]


def causal_mask(seqlen_q, seqlen_k, offset):
    return torch.arange(seqlen_k) <= torch.arange(seqlen_q)[:, None] + offset


seeds = st.integers(0, 2**32)


# --- meaning --------------------------------------------------------------------------------------


@given(seeds, st.booleans())
def test_dense_mask_is_what_the_lists_say(seed, bits):
    index, mask = random_index(seed, bits=bits)
    assert torch.equal(index.to_dense_mask(), mask)
    assert index.validate() is index


@given(st.integers(1, 40), st.integers(1, 40), st.integers(-50, 50), st.integers(0, 20))
def test_streaming_mask_follows_q_offset(seqlen_q, seqlen_k, offset, window):
    index = SparseIndex.streaming(seqlen_q, seqlen_k, sink=3, window=window, dense_tail=2)
    mask = index.validate().to_dense_mask(offset)
    for i in range(seqlen_q):
        for j in range(seqlen_k):
            seen = j < 3 or abs(i + offset - j) < window or i >= seqlen_q - 2
            assert mask[0, 0, i, j] == seen


def test_list_free_constructors():
    dense = SparseIndex.dense(70, 100, num_heads=3)
    assert dense.is_list_free and dense.to_dense_mask().all()
    assert (dense.batch_size, dense.num_heads, dense.num_tiles) == (1, 3, 2)
    assert dense.device == torch.device("cpu")
    assert dense.validate().heads.tolist() == [[0, 0, 0, 0]] * 3
    streaming = SparseIndex.streaming(70, 100, sink=4, window=9, dense_tail=1, num_heads=2)
    assert streaming.validate().heads.tolist() == [[1, 4, 9, 1]] * 2
    assert SparseIndex.dense(0, 0).validate().num_tiles == 0


def test_op_args_follow_the_schema():
    index, _ = random_index(3)
    names = [
        "heads block_indptr block_indices block_bits_ids block_bits".split(),
        "column_indptr column_indices column_bias block_m block_n".split(),
    ]
    assert all(a is getattr(index, n) for a, n in zip(index.op_args(), sum(names, []), strict=True))
    schema = torch.ops.sparse_attn.check_index.default._schema
    assert [argument.name for argument in schema.arguments][:10] == sum(names, [])


def test_an_index_is_frozen_and_prints_in_one_line():
    index = SparseIndex.cat_heads(
        [SparseIndex.dense(70, 100), SparseIndex.streaming(70, 100, sink=4, window=9, num_heads=2)]
    )
    with pytest.raises(FrozenInstanceError):
        index.block_m = 3
    assert repr(index) == (
        "SparseIndex(batch_size=1, heads=[1 dense, 2 streaming], seqlen_q=70, seqlen_k=100, "
        "block_m=64, block_n=64, blocks<=0, columns<=0, device='cpu')"
    )


def test_to_moves_every_tensor():
    index, _ = random_index(5)
    moved = index.to("meta")
    assert moved.device == moved.block_bits.device == torch.device("meta")
    assert moved.block_indptr.shape == index.block_indptr.shape and moved.column_bias is None


def plan(q, k):
    dense = SparseIndex.dense(q.shape[2], k.shape[2], num_heads=q.shape[1], device=q.device)
    stream = SparseIndex.streaming(q.shape[2], k.shape[2], sink=4, window=9, device=q.device)
    both = SparseIndex.cat_heads([dense, stream]).with_tiles(block_m=32)
    return both.expand_heads(2 * both.num_heads).op_args()[:3]


def test_list_free_indexes_trace_in_one_graph():
    torch._dynamo.reset()
    compiles = CompileCounter()
    traced = torch.compile(plan, fullgraph=True, dynamic=True, backend=compiles)
    for length in (33, 100, 228):
        q, k = torch.empty(1, 4, length, 8), torch.empty(1, 2, length + 5, 8)
        for got, expected in zip(traced(q, k), plan(q, k), strict=True):
            assert torch.equal(got, expected)
    assert compiles.frame_count == 1


# --- densities ------------------------------------------------------------------------------------


def tile_density(index, mask, causal, offset):
    """The definition of tile density by loops, from the mask with its partial blocks filled."""
    whole = replace(index, block_bits=None, block_bits_ids=None).to_dense_mask(offset)
    work = torch.zeros(mask.shape[:2], dtype=torch.float64)
    dense = 0
    for first in range(0, index.seqlen_q, index.block_m):
        last = min(first + index.block_m, index.seqlen_q) - 1
        limit = min(max(last + offset + 1, 0), index.seqlen_k) if causal else index.seqlen_k
        work += (last - first + 1) * whole[:, :, first : last + 1, :limit].any(2).sum(-1)
        dense += (last - first + 1) * limit
    return work / max(dense, 1)


@given(seeds, st.booleans(), st.booleans(), st.sampled_from([None, -20, 0, 13]))
def test_densities_follow_their_definitions(seed, bits, causal, q_offset):
    index, _ = random_index(seed, bits=bits)
    offset = index.seqlen_k - index.seqlen_q if q_offset is None else q_offset
    mask = index.to_dense_mask(offset)
    allowed = causal_mask(index.seqlen_q, index.seqlen_k, offset) | torch.tensor(not causal)
    element = (mask & allowed).sum((2, 3)).double() / allowed.sum().clamp(min=1)
    tile = tile_density(index, mask, causal, offset)
    density = index.density(causal=causal, q_offset=q_offset)
    torch.testing.assert_close(density.element_per_head, element, rtol=0, atol=0)
    torch.testing.assert_close(density.tile_per_head, tile, rtol=1e-14, atol=0)
    assert density.element == pytest.approx(element.mean().item(), rel=1e-14)
    assert density.tile == pytest.approx(tile.mean().item(), rel=1e-14)


def test_density_of_a_long_sequence_needs_no_matrix():
    n = 131_072
    index = SparseIndex.streaming(n, n, sink=128, window=1024, num_heads=2)
    pairs = sum(min(p + 1, 1024) + min(max(p + 1 - 1024, 0), 128) for p in range(n))
    density = index.density()
    assert density.element == pytest.approx(pairs / (n * (n + 1) // 2), rel=1e-14)
    assert density.element < density.tile < 1.2 * density.element
    assert SparseIndex.dense(n, n).density().element == SparseIndex.dense(n, n).density().tile == 1


def test_density_where_nothing_is_allowed_is_zero():
    density = SparseIndex.dense(10, 10).density(q_offset=-10)
    assert density.element == density.tile == 0.0


# --- heads, batches and tiles ---------------------------------------------------------------------


@given(seeds, st.data())
def test_heads_are_selected_and_expanded(seed, data):
    index, mask = random_index(seed, max_len=70)
    which = data.draw(st.lists(st.integers(0, index.num_heads - 1), min_size=1, max_size=5))
    assert torch.equal(index.select_heads(which).validate().to_dense_mask(), mask[:, which])
    doubled = index.expand_heads(2 * index.num_heads).validate()
    assert torch.equal(doubled.to_dense_mask(), mask.repeat_interleave(2, dim=1))


@given(seeds, st.booleans(), st.booleans())
def test_cat_heads_keeps_every_head(seed, bits, bias):
    index, mask = random_index(seed, bits=bits, max_len=70)
    sizes = {"block_m": index.block_m, "block_n": index.block_n}
    if bias:
        index = replace(index, column_bias=torch.rand(index.column_indices.shape))
    dense = SparseIndex.dense(index.seqlen_q, index.seqlen_k, **sizes)
    stream = SparseIndex.streaming(index.seqlen_q, index.seqlen_k, sink=1, window=5, **sizes)
    other = SparseIndex.from_dense_mask(~mask[:1], **sizes)
    parts = [dense, index, stream, other, index]
    joined = SparseIndex.cat_heads(parts).validate()
    expected = [part.to_dense_mask().expand(index.batch_size, -1, -1, -1) for part in parts]
    assert torch.equal(joined.to_dense_mask(), torch.cat(expected, 1))
    if bias:
        assert torch.equal(joined.column_bias[: index.column_bias.shape[0]], index.column_bias)
        assert torch.equal(
            joined.column_bias[-index.column_bias.shape[0] or 10**9 :], index.column_bias
        )


@given(st.lists(seeds, min_size=1, max_size=3))
def test_stack_keeps_every_sequence(some_seeds):
    rng = random.Random(some_seeds[0])
    torch.manual_seed(some_seeds[0])
    masks = [
        torch.rand(1, 2, rng.randint(1, 70), rng.randint(1, 70)) < rng.random() for _ in some_seeds
    ]
    parts = [SparseIndex.from_dense_mask(mask, block_m=16, block_n=8) for mask in masks]
    stacked = SparseIndex.stack(parts).validate()
    assert stacked.batch_size == len(parts)
    dense = stacked.to_dense_mask()
    for b, mask in enumerate(masks):
        assert torch.equal(dense[b : b + 1, :, : mask.shape[2], : mask.shape[3]], mask)
        # Whole tiles past a sequence's end are empty.
        assert not dense[b, :, -(-mask.shape[2] // 16) * 16 :].any()


def test_stack_spells_out_dense_heads_where_they_differ():
    mask = torch.rand(1, 3, 40, 50) < 0.5
    listed = SparseIndex.from_dense_mask(mask)
    mixed = SparseIndex.cat_heads([listed.select_heads([0, 1]), SparseIndex.dense(40, 50)])
    dense = SparseIndex.dense(20, 30)
    stacked = SparseIndex.stack([mixed, dense]).validate()
    assert stacked.heads[:, 0].tolist() == [HeadKind.LISTED, HeadKind.LISTED, HeadKind.DENSE]
    assert torch.equal(stacked.to_dense_mask()[0, :2], mask[0, :2])
    assert stacked.to_dense_mask()[1, :, :20, :30].all()
    streams = [SparseIndex.streaming(20, 20, sink=s, window=4) for s in (1, 2)]
    assert SparseIndex.stack([streams[0]] * 2).heads.tolist() == [[1, 1, 4, 0]]
    with pytest.raises(ValueError, match=r"stack: head 0 streams with different rules"):
        SparseIndex.stack(streams)


@given(seeds, st.booleans(), st.data())
def test_with_tiles_changes_no_key(seed, bits, data):
    index, mask = random_index(seed, bits=bits, max_len=70)
    block_m = data.draw(st.sampled_from([m for m in (1, 16, 32, 80) if index.block_m % m == 0]))
    block_n = data.draw(st.sampled_from([n for n in (8, 16) if index.block_n % n == 0]))
    finer = index.with_tiles(block_m=block_m, block_n=block_n).validate()
    assert (finer.block_m, finer.block_n) == (block_m, block_n)
    assert torch.equal(finer.to_dense_mask(), mask)


def test_with_tiles_keeps_each_bias_with_its_column():
    index = SparseIndex.from_lists(
        seqlen_q=64,
        seqlen_k=20,
        block_m=32,
        block_n=8,
        column_indptr=torch.tensor([[[0, 2, 3]]]),
        column_indices=torch.tensor([3, 9, 4], dtype=torch.int32),
        column_bias=torch.tensor([0.5, 1.5, 2.5]),
    )
    finer = index.with_tiles(block_m=16).validate()
    assert finer.column_indices.tolist() == [3, 9, 3, 9, 4, 4]
    assert finer.column_bias.tolist() == [0.5, 1.5, 0.5, 1.5, 2.5, 2.5]


def test_with_tiles_takes_any_size_without_lists():
    index = SparseIndex.streaming(70, 70, sink=1, window=3).with_tiles(block_m=48, block_n=128)
    assert (index.block_m, index.block_n, index.num_tiles) == (48, 128, 2)
    assert index.validate().is_list_free


# --- errors ---------------------------------------------------------------------------------------


def small(**changes):
    """A valid index of one head and two tiles, with some fields replaced: a corrupt one."""
    fields = {
        "seqlen_q": 32,
        "seqlen_k": 40,
        "block_m": 16,
        "block_n": 8,
        "heads": torch.tensor([[2, 0, 0, 0]], dtype=torch.int32),
        "block_indptr": torch.tensor([[[0, 2, 3]]]),
        "block_indices": torch.tensor([0, 8, 35], dtype=torch.int32),
        "column_indptr": torch.tensor([[[0, 2, 4]]]),
        "column_indices": torch.tensor([16, 39, 1, 2], dtype=torch.int32),
        "block_bits_ids": torch.tensor([-1, 0, -1], dtype=torch.int32),
        "block_bits": torch.zeros(1, 8, 1, dtype=torch.int64),
    }
    return SparseIndex(**{**fields, **changes})


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_the_small_index_is_valid():
    assert small().validate().to_dense_mask().sum() == 16 * (8 + 0 + 2) + 16 * (5 + 2)


CORRUPT = {
    "block out of range": ({"block_indices": ints(0, 8, 40)}, "past the keys"),
    "block negative": ({"block_indices": ints(-1, 8, 35)}, "negative"),
    "blocks unsorted": ({"block_indices": ints(8, 0, 35)}, "ascending and disjoint"),
    "blocks overlap": ({"block_indices": ints(0, 7, 35)}, "ascending and disjoint"),
    "block twice": ({"block_indices": ints(8, 8, 35)}, "ascending and disjoint"),
    "column out of range": ({"column_indices": ints(16, 40, 1, 2)}, "past the keys"),
    "column negative": ({"column_indices": ints(-1, 39, 1, 2)}, "negative"),
    "columns unsorted": ({"column_indices": ints(39, 16, 1, 2)}, "strictly ascending"),
    "column twice": ({"column_indices": ints(16, 16, 1, 2)}, "strictly ascending"),
    "column in a block": ({"column_indices": ints(15, 39, 1, 2)}, "inside a block"),
    "indptr past the end": ({"block_indptr": torch.tensor([[[0, 2, 4]]])}, "past the capacity"),
    "column indptr past it": ({"column_indptr": torch.tensor([[[0, 2, 5]]])}, "past the capacity"),
    "indptr decreases": ({"block_indptr": torch.tensor([[[0, 2, 1]]])}, "decreases"),
    "indptr negative": ({"block_indptr": torch.tensor([[[-1, 2, 3]]])}, "negative"),
    "entries on a dense head": ({"heads": ints(0, 0, 0, 0)[None]}, "carries list entries"),
    "entries on a streaming head": ({"heads": ints(1, 2, 2, 0)[None]}, "carries list entries"),
    "bad kind": ({"heads": ints(3, 0, 0, 0)[None]}, "unknown head kind"),
    "negative window": ({"heads": ints(1, 0, -1, 0)[None]}, "negative"),
    "bits id too large": ({"block_bits_ids": ints(-1, 1, -1)}, "block_bits_ids is out of range"),
    "bits id too small": ({"block_bits_ids": ints(-1, -2, -1)}, "block_bits_ids is out of range"),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_validate_names_what_is_corrupt(name):
    changes, message = CORRUPT[name]
    with pytest.raises(ValueError, match=rf"^sparse_attn\.SparseIndex: .*{message}") as error:
        small(**changes).validate()
    assert "\n" not in str(error.value) and "::" not in str(error.value)


MISSHAPEN = {
    "block_indptr int32": ({"block_indptr": ints(0, 2, 3)[None, None]}, TypeError, "torch.int64"),
    "block_indices int64": (
        {"block_indices": torch.tensor([0, 8, 35])},
        TypeError,
        "block_indices is torch.int64; it must be torch.int32",
    ),
    "too few tiles": ({"block_indptr": torch.tensor([[[0, 3]]])}, ValueError, r"= \(1, 1, 3\)"),
    "column indptr of other heads": (
        {"column_indptr": torch.zeros(1, 2, 3, dtype=torch.int64)},
        ValueError,
        "column_indptr has shape",
    ),
    "heads": ({"heads": ints(2, 0, 0)[None]}, ValueError, r"\[heads, 4\]"),
    "bias capacity": ({"column_bias": torch.zeros(3)}, ValueError, "column_bias has shape"),
    "bits without ids": ({"block_bits_ids": None}, ValueError, "go together"),
    "bits of other blocks": (
        {"block_bits": torch.zeros(1, 16, 1, dtype=torch.int64)},
        ValueError,
        "block_bits has shape",
    ),
    "block_m": ({"block_m": 24}, ValueError, "block_m=24; it must be 1 or a multiple of 16"),
    "block_n": ({"block_n": 12}, ValueError, "block_n=12; it must be a multiple of 8"),
    "device": (
        {"block_indptr": torch.zeros(1, 1, 3, dtype=torch.int64, device="meta")},
        ValueError,
        "is on meta",
    ),
}


@pytest.mark.parametrize("name", MISSHAPEN)
def test_shapes_and_dtypes_are_checked(name):
    changes, error, message = MISSHAPEN[name]
    for check in (SparseIndex.validate, lambda index: SparseIndex.from_lists(**vars(index))):
        with pytest.raises(error, match=rf"^sparse_attn\.SparseIndex: .*{message}"):
            check(small(**changes))


def test_from_lists_needs_whole_pairs():
    sizes = {"seqlen_q": 16, "seqlen_k": 16, "block_m": 16, "block_n": 8}
    for given_lists in ({}, {"block_indptr": torch.zeros(1, 1, 2)}, {"column_indices": ints(1)}):
        with pytest.raises(ValueError, match="go together"):
            SparseIndex.from_lists(**sizes, **given_lists)


dense = SparseIndex.dense(64, 64)
ARGUMENT_ERRORS = {
    "negative window": (
        lambda: SparseIndex.streaming(8, 8, sink=0, window=-1),
        r"SparseIndex: window=-1 is negative; pass 0 for none\.",
    ),
    "sizes": (lambda: SparseIndex.dense(8, 8, block_m=8), r"block_m=8; it must be 1 or"),
    "select_heads": (
        lambda: dense.select_heads([0, 1]),
        r"select_heads: head 1 is not in \[0, 1\)",
    ),
    "expand_heads": (
        lambda: SparseIndex.dense(8, 8, num_heads=2).expand_heads(3),
        r"expand_heads: num_heads=3 is not a multiple of the index's 2 heads",
    ),
    "cat nothing": (lambda: SparseIndex.cat_heads([]), r"cat_heads: no parts"),
    "stack nothing": (lambda: SparseIndex.stack([]), r"stack: no parts"),
    "cat tiles": (
        lambda: SparseIndex.cat_heads([dense, SparseIndex.dense(64, 64, block_m=16)]),
        r"cat_heads: the parts have different block_m, \[64, 16\]; .*with_tiles",
    ),
    "cat lengths": (
        lambda: SparseIndex.cat_heads([dense, SparseIndex.dense(64, 65)]),
        r"cat_heads: the parts have different seqlen_k, \[64, 65\]\.",
    ),
    "cat batches": (
        lambda: SparseIndex.cat_heads(
            [SparseIndex.from_dense_mask(torch.ones(b, 1, 8, 8).bool()) for b in (2, 3)]
        ),
        r"cat_heads: batch sizes 2 and 3 differ",
    ),
    "coarser": (
        lambda: small().with_tiles(block_n=16),
        r"with_tiles: block_n=16 does not divide 8",
    ),
}


@pytest.mark.parametrize("name", ARGUMENT_ERRORS)
def test_wrong_arguments_are_named(name):
    call, message = ARGUMENT_ERRORS[name]
    with pytest.raises(ValueError, match=r"^sparse_attn\.SparseIndex" + r".*" + message):
        call()
