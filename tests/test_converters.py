# SPDX-License-Identifier: Apache-2.0
"""Converters from and to other libraries' formats, against those formats' rules in plain loops."""

import itertools
import random
import re

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import (
    BlockMask,
    create_block_mask,
    create_mask,
    flex_attention,
)

import sparse_attn
from sparse_attn import HeadKind, SparseIndex

SIZES = {"block_m": 16, "block_n": 8, "seqlen_q": 40, "seqlen_k": 30}  # 3 tiles, 4 blocks


def seen_keys(index: SparseIndex) -> torch.Tensor:
    """The index's mask, once its lists are known to be in order."""
    return index.validate().to_dense_mask()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# --- boolean masks --------------------------------------------------------------------------------


def patchwork(seed: int, shape: tuple[int, ...], block_m: int, block_n: int) -> torch.Tensor:
    """A mask whose every tile and block is all, nothing, columns, rows, noise or one element."""
    rng, mask = random.Random(seed), torch.zeros(shape, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    kinds = rng.choice([("all",), ("none",), ("columns", "none"), ("all", "columns"), KINDS, KINDS])
    for plane in mask.flatten(0, 1):
        for i, j in itertools.product(range(0, shape[2], block_m), range(0, shape[3], block_n)):
            block = plane[i : i + block_m, j : j + block_n]
            kind = rng.choice(kinds)
            rows, keys = block.shape
            if kind == "all":
                block[:] = True
            elif kind == "columns":
                block[:, torch.rand(keys, generator=generator) < 0.4] = True
            elif kind == "rows":
                block[torch.rand(rows, generator=generator) < 0.4] = True
            elif kind == "noise":
                block[:] = torch.rand(rows, keys, generator=generator) < rng.choice(
                    [0.05, 0.5, 0.9]
                )
            elif kind == "one":
                block[rng.randrange(rows), rng.randrange(keys)] = True
            elif kind == "all but one":
                block[:] = True
                block[rng.randrange(rows), rng.randrange(keys)] = False
    return mask


KINDS = ("all", "none", "columns", "rows", "noise", "one", "all but one")


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**31 - 1),
    outer=st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]),
    seqlen_q=st.integers(1, 200),
    seqlen_k=st.integers(1, 200),
    block_m=st.sampled_from([1, 16, 48, 64, 80, 128]),
    block_n=st.sampled_from([8, 16, 24, 64]),
)
def test_from_dense_mask_is_exact(seed, outer, seqlen_q, seqlen_k, block_m, block_n):
    mask = patchwork(seed, (*outer, seqlen_q, seqlen_k), block_m, block_n)
    index = SparseIndex.from_dense_mask(mask, block_m=block_m, block_n=block_n)
    assert (index.block_m, index.block_n) == (block_m, block_n)
    assert torch.equal(seen_keys(index), mask)
    assert_cheapest(index, mask)


def assert_cheapest(index: SparseIndex, mask: torch.Tensor) -> None:
    """Blocks only where columns cannot say it, bits only where blocks cannot, each mask once."""
    partial_blocks = 0
    for b, h in itertools.product(range(mask.shape[0]), range(mask.shape[1])):
        for t, i in enumerate(range(0, mask.shape[2], index.block_m)):
            blocks, columns = set(), set()
            for j in range(0, mask.shape[3], index.block_n):
                block = mask[b, h, i : i + index.block_m, j : j + index.block_n]
                whole, some = block.all(0), block.any(0)
                if not block.all() and torch.equal(whole, some):
                    columns |= {j + c for c in whole.nonzero()[:, 0].tolist()}
                elif some.any():
                    blocks.add(j)
                    partial_blocks += not block.all()
            listed = index.block_indices[slice(*index.block_indptr[b, h, t : t + 2].tolist())]
            assert listed.tolist() == sorted(blocks)
            listed = index.column_indices[slice(*index.column_indptr[b, h, t : t + 2].tolist())]
            assert listed.tolist() == sorted(columns)
    if partial_blocks == 0:
        assert index.block_bits is None
    else:
        assert (index.block_bits_ids >= 0).sum() == partial_blocks
        assert index.block_bits.unique(dim=0).shape == index.block_bits.shape


@pytest.mark.parametrize("block_n", [8, 16, 64])
@pytest.mark.parametrize("block_m", [16, 48, 64, 128])
@pytest.mark.parametrize("kind", ["none", "all", "causal", "one row", "last key", "noise"])
def test_from_dense_mask_of_odd_sizes(kind, block_m, block_n):
    row, key = torch.arange(129)[:, None], torch.arange(67)
    mask = {
        "none": row < 0,
        "all": row >= 0,
        "causal": key <= row - 62,
        "one row": row == 100,
        "last key": key == 66,
        "noise": torch.rand(129, 67, generator=torch.Generator().manual_seed(3)) < 0.3,
    }[kind]
    mask = mask.expand(1, 2, 129, 67)
    index = SparseIndex.from_dense_mask(mask, block_m=block_m, block_n=block_n)
    assert torch.equal(seen_keys(index), mask)
    assert (index.block_bits is None) == (kind in ("none", "all", "last key"))
    assert index.is_list_free == (kind == "none")


def test_from_dense_mask_rejects():
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    with pytest.raises(TypeError, match="from_dense_mask: mask is torch.float32; it must be torch"):
        SparseIndex.from_dense_mask(mask.float())
    with pytest.raises(ValueError, match=r"from_dense_mask: mask has shape \(1, 8, 8\); \[batch, "):
        SparseIndex.from_dense_mask(mask[0])
    with pytest.raises(ValueError, match="block_m=24"):
        SparseIndex.from_dense_mask(mask, block_m=24)
    with pytest.raises(ValueError, match="block_n=4"):
        SparseIndex.from_dense_mask(mask, block_n=4)


# --- grids of blocks ------------------------------------------------------------------------------


def spread(grid: torch.Tensor, block_m: int, block_n: int, seqlen_q: int, seqlen_k: int):
    """The mask of a grid [batch, heads, M, N] of cells of block_m rows and block_n keys."""
    tiles = [i // block_m for i in range(seqlen_q)]
    columns = [j // block_n for j in range(seqlen_k)]
    return grid[:, :, tiles][..., columns]


grid_arguments = {
    "seed": st.integers(0, 2**31 - 1),
    "outer": st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]),
    "seqlen_q": st.integers(1, 150),
    "seqlen_k": st.integers(1, 150),
    "block_m": st.sampled_from([1, 16, 48, 64]),
    "block_n": st.sampled_from([8, 24, 64]),
    "share": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
}


def random_grid(seed, outer, share, *, block_m, block_n, seqlen_q, seqlen_k) -> torch.Tensor:
    shape = (*outer, ceil_div(seqlen_q, block_m), ceil_div(seqlen_k, block_n))
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@settings(max_examples=100)
@given(**grid_arguments)
def test_from_blocks(seed, outer, share, **sizes):
    grid = random_grid(seed, outer, share, **sizes)
    index = SparseIndex.from_blocks(grid, **sizes)
    assert torch.equal(seen_keys(index), spread(grid, **sizes))
    assert index.block_indices.shape[0] == grid.sum() and index.column_indices.shape[0] == 0


@pytest.mark.parametrize("shape", [(3, 4), (1, 3, 4), (1, 1, 4, 3), (1, 1, 3, 5), (1, 1, 2, 4)])
def test_from_blocks_rejects_grids_that_do_not_fit(shape):
    text = f"from_blocks: block_mask has shape {shape}; [batch, heads, 3, 4] is needed for seqlen_q"
    with pytest.raises(ValueError, match=re.escape(text)):
        SparseIndex.from_blocks(torch.ones(shape, dtype=torch.bool), **SIZES)


def test_from_blocks_rejects():
    grid = torch.ones(1, 1, 3, 4)
    with pytest.raises(TypeError, match="from_blocks: block_mask is torch.float32; it must be"):
        SparseIndex.from_blocks(grid, **SIZES)
    with pytest.raises(ValueError, match="block_n=9"):
        SparseIndex.from_blocks(grid.bool(), **{**SIZES, "block_n": 9})


@settings(max_examples=100)
@given(dtype=st.sampled_from([torch.int32, torch.int64]), **grid_arguments)
def test_from_bsr(seed, outer, share, dtype, **sizes):
    """Batched: rows anywhere in `indices`, columns in any order, entries that no row uses."""
    grid, rng = random_grid(seed, outer, share, **sizes), random.Random(seed)
    indices = [999] * rng.randrange(3)
    indptr = []
    for plane in grid.flatten(0, 1).tolist():
        indptr.append([len(indices)])
        for row in plane:
            columns = [n for n, present in enumerate(row) if present]
            indices += rng.sample(columns, len(columns))
            indptr[-1].append(len(indices))
        indices += [-5] * rng.randrange(3)
    indptr = torch.tensor(indptr, dtype=dtype).view(*outer, -1)
    indices = torch.tensor(indices, dtype=dtype)
    index = SparseIndex.from_bsr(indptr, indices, **sizes)
    assert torch.equal(seen_keys(index), spread(grid, **sizes))
    # FlashInfer's form: one pattern for all.
    one = SparseIndex.from_bsr(indptr[-1, -1], indices, **sizes)
    assert one.batch_size == one.num_heads == 1
    assert torch.equal(seen_keys(one), spread(grid[-1:, -1:], **sizes))


def test_from_bsr_by_hand():
    indptr = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    index = SparseIndex.from_bsr(indptr, torch.tensor([3, 0, 1], dtype=torch.int32), **SIZES)
    assert index.validate().block_indices.tolist() == [0, 24, 8]
    assert index.block_indptr.tolist() == [[[0, 2, 2, 3]]]


@pytest.mark.parametrize(
    "indptr, indices, text",
    [
        ([0, 1, 2], [0, 1], "indptr has shape (3,) and indices (2,); [4] or [batch, heads, 4]"),
        ([[0, 1, 2, 2]], [0, 1], "indptr has shape (1, 4)"),
        ([0, 1, 2, 2], [[0, 1]], "indices (1, 2)"),
        ([0, 2, 1, 2], [0, 1], "indptr must ascend within [0, 2]"),
        ([0, 1, 2, 3], [0, 1], "indptr must ascend within [0, 2]"),
        ([-1, 1, 2, 2], [0, 1], "indptr must ascend within [0, 2]"),
        ([0, 1, 2, 2], [0, 4], "indices has 4; it must be in [0, 4)"),
        ([0, 1, 2, 2], [-1, 3], "indices has -1; it must be in [0, 4)"),
        ([0, 3, 3, 3], [2, 1, 2], "a row lists a block column twice; drop the repeats"),
    ],
)
def test_from_bsr_rejects(indptr, indices, text):
    with pytest.raises(ValueError, match=r"SparseIndex.from_bsr: .*" + re.escape(text)):
        SparseIndex.from_bsr(torch.tensor(indptr), torch.tensor(indices), **SIZES)


# --- Block-Sparse-Attention -----------------------------------------------------------------------


def bsa_rule(kinds, streaming, grid, *, seqlen_q, seqlen_k, block, causal, exact):
    """bool [batch, heads, seqlen_q, seqlen_k] of the call, its causality included."""
    batch, offset = grid.shape[0], seqlen_k - seqlen_q
    width = ceil_div(seqlen_k, block)
    mask = torch.zeros(batch, len(kinds), seqlen_q, seqlen_k, dtype=torch.bool)
    for b, h, i in itertools.product(range(batch), range(len(kinds)), range(seqlen_q)):
        p, r = i + offset, i // block
        sink, local = streaming[2 * h], streaming[2 * h + 1]
        if kinds[h] == 0:
            seen = [True] * seqlen_k
        elif kinds[h] > 0:
            row = grid[b, kinds[: h + 1].count(1) - 1, r].tolist()
            seen = [row[j // block] for j in range(seqlen_k)]
        elif exact:
            seen = [j < sink or j >= p - (local - 1) for j in range(seqlen_k)]
        else:
            first = max((seqlen_q - seqlen_k) // block, 0) if causal else 0
            end = ceil_div(max(seqlen_k - seqlen_q, 0), block) + 1 + r - first
            if not causal:
                end = width
            blocks = set(range(sink)) | set(range(max(end - local, 0), end))
            seen = [r >= first and j // block in blocks for j in range(seqlen_k)]
        mask[b, h, i] = torch.tensor(seen)
        if causal:
            mask[b, h, i, max(p + 1, 0) :] = False
    return mask


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31 - 1),
    kinds=st.lists(st.sampled_from([0, -1, 1]), min_size=1, max_size=5),
    streaming=st.lists(st.integers(0, 4), min_size=10, max_size=10),
    batch=st.integers(1, 2),
    seqlen_q=st.integers(1, 110),
    seqlen_k=st.integers(1, 110),
    block=st.sampled_from([16, 32, 128]),
    causal=st.booleans(),
    exact=st.booleans(),
)
def test_from_block_sparse_attention(
    seed, kinds, streaming, batch, seqlen_q, seqlen_k, block, causal, exact
):
    causal, streaming = causal or exact, streaming[: 2 * len(kinds)]
    if exact:
        streaming = [7 * n for n in streaming]
    shape = (batch, kinds.count(1) + 1, ceil_div(seqlen_q, block), ceil_div(seqlen_k, block))
    grid = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "block": block, "causal": causal}
    index = SparseIndex.from_block_sparse_attention(
        torch.tensor(kinds, dtype=torch.int32),
        torch.tensor(streaming, dtype=torch.int32),
        grid,
        exact_streaming=exact,
        **sizes,
    )
    mask = seen_keys(index)
    kind_of = {0: HeadKind.DENSE, -1: HeadKind.STREAMING if exact else HeadKind.LISTED, 1: 2}
    assert index.heads[:, 0].tolist() == [kind_of[kind] for kind in kinds]
    if causal:  # which an index never holds, and a kernel adds
        mask = mask & torch.ones(seqlen_q, seqlen_k).tril(seqlen_k - seqlen_q).bool()
    assert torch.equal(mask, bsa_rule(kinds, streaming, grid, exact=exact, **sizes))


def test_from_block_sparse_attention_without_what_it_does_not_need():
    lengths = {"seqlen_q": 300, "seqlen_k": 300}
    convert = SparseIndex.from_block_sparse_attention
    index = convert(torch.tensor([0, 0]), None, None, **lengths).validate()
    assert (index.block_m, index.block_n) == (128, 128)
    assert index.heads.tolist() == [[0, 0, 0, 0]] * 2 and index.is_list_free
    index = convert(torch.tensor([0, 1]), None, torch.eye(3).bool()[None, None], **lengths)
    assert index.validate().block_indices.tolist() == [0, 128, 256]
    streaming = torch.tensor([0, 0, 1, 1])
    index = convert(torch.tensor([0, -1]), streaming, None, **lengths).validate()
    assert index.block_indices.tolist() == [0, 0, 128, 0, 256]
    index = convert(torch.tensor([0, -1]), streaming, None, exact_streaming=True, **lengths)
    assert index.validate().is_list_free and index.heads.tolist() == [[0] * 4, [1, 1, 1, 0]]


def test_from_block_sparse_attention_counts_only_ones():
    """What the library's replace_ones_with_count makes of it: other numbers name their mask."""
    grid = torch.eye(3, dtype=torch.bool)[None, :, :, None].expand(1, 3, 3, 1)  # mask n: row n
    kinds = torch.tensor([3, 1, 0, 2, 1, 1])
    index = SparseIndex.from_block_sparse_attention(
        kinds, None, grid, seqlen_q=48, seqlen_k=16, block=16
    )
    rows = [[2], [0], [0, 1, 2], [1], [1], [2]]
    mask = seen_keys(index)[0, :, ::16, 0]
    assert [row.nonzero()[:, 0].tolist() for row in mask] == rows


@pytest.mark.parametrize(
    "change, text",
    [
        ({"head_mask_type": torch.tensor([[0, 1]])}, "head_mask_type must be [heads] of 0 (dense)"),
        ({"head_mask_type": torch.tensor([0, -2])}, "head_mask_type must be [heads] of 0 (dense)"),
        ({"streaming_info": None}, "streaming_info is None; [6] is needed, a (sink, local) pair"),
        ({"streaming_info": torch.ones(4)}, "streaming_info is (4,); [6] is needed"),
        (
            {"base_blockmask": None},
            "base_blockmask has shape (1, 0, 3, 2) for 1 block-sparse heads",
        ),
        ({"base_blockmask": torch.ones(1, 3, 2).bool()}, "base_blockmask has shape (1, 3, 2)"),
        ({"base_blockmask": torch.ones(1, 1, 2, 3).bool()}, "[batch, sparse heads, 3, 2] is"),
        ({"base_blockmask": torch.ones(1, 1, 3, 2)}, "it must be torch.bool"),
        ({"causal": False, "exact_streaming": True}, "exact_streaming is causal only; pass causal"),
        ({"block": 24}, "block_m=24"),
        ({"block": 0}, "block_m=0"),
        ({"block": 32}, "[batch, sparse heads, 2, 1] is needed"),
        ({"head_mask_type": torch.tensor([1, 1, 0])}, "for 2 block-sparse heads; [batch, sparse "),
        ({"head_mask_type": torch.tensor([0, 2, 0])}, "for 1 block-sparse heads; [batch, sparse "),
    ],
)
def test_from_block_sparse_attention_rejects(change, text):
    arguments = {
        "head_mask_type": torch.tensor([0, 1, -1]),
        "streaming_info": torch.tensor([0, 0, 0, 0, 1, 1]),
        "base_blockmask": torch.ones(1, 1, 3, 2, dtype=torch.bool),
        "seqlen_q": 48,
        "seqlen_k": 32,
        "block": 16,
    }
    SparseIndex.from_block_sparse_attention(**arguments).validate()
    with pytest.raises((ValueError, TypeError), match=re.escape(text)):
        SparseIndex.from_block_sparse_attention(**{**arguments, **change})


# --- vertical-slash lists -------------------------------------------------------------------------


def padded(lists: list[list[int]], outer: tuple[int, ...], filler: int):
    """Counts [*outer] and entries [*outer, capacity] of lists; what lies past a count is filler."""
    capacity = max(map(len, lists)) + 1
    entries = [values + [filler] * (capacity - len(values)) for values in lists]
    counts = torch.tensor([len(values) for values in lists], dtype=torch.int32)
    return counts.view(outer), torch.tensor(entries, dtype=torch.int32).view(*outer, capacity)


@settings(max_examples=200)
@given(
    data=st.data(),
    seed=st.integers(0, 2**31 - 1),
    outer=st.sampled_from([(1, 1), (2, 2)]),
    seqlen_q=st.integers(1, 150),
    seqlen_k=st.integers(1, 200),
    block_m=st.sampled_from([16, 64]),
    block_n=st.sampled_from([8, 16, 64]),
)
def test_from_vertical_slash_lists_keeps_every_key(
    data, seed, outer, seqlen_q, seqlen_k, block_m, block_n
):
    """Unsorted, repeated, overlapping, touching; columns inside of blocks; garbage past the end."""
    rng, tiles = random.Random(seed), ceil_div(seqlen_q, block_m)
    count = outer[0] * outer[1] * tiles
    most = data.draw(st.sampled_from([0, 1, 4, 12]))
    step = data.draw(st.sampled_from([1, 3, block_n // 2, block_n]))  # aligned starts touch
    starts = range(0, seqlen_k, step)
    blocks = [rng.choices(starts, k=rng.randint(0, most)) for _ in range(count)]
    most = data.draw(st.sampled_from([0, 2, 30]))
    columns = [rng.choices(range(seqlen_k), k=rng.randint(0, most)) for _ in range(count)]
    index = SparseIndex.from_vertical_slash_lists(
        *padded(blocks, (*outer, tiles), -7),
        *padded(columns, (*outer, tiles), 10**6),
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        block_m=block_m,
        block_n=block_n,
    )
    mask = seen_keys(index)
    expected = torch.zeros_like(mask).flatten(0, 1)
    for n in range(count):
        keys = set(columns[n]) | {start + c for start in blocks[n] for c in range(block_n)}
        first = n % tiles * block_m
        for j in keys & set(range(seqlen_k)):
            expected[n // tiles, first : first + block_m, j] = True
    assert mask.shape[:2] == outer
    assert torch.equal(mask.flatten(0, 1), expected)
    assert index.block_bits is None


def test_from_vertical_slash_lists_leaves_lists_in_order_alone():
    blocks, columns = [[0, 64, 140], [5]], [[130, 139, 204], [0, 4, 69]]
    index = SparseIndex.from_vertical_slash_lists(
        *padded(blocks, (1, 1, 2), -1),
        *padded(columns, (1, 1, 2), -1),
        seqlen_q=100,
        seqlen_k=205,
    ).validate()
    assert (index.block_m, index.block_n) == (64, 64)
    assert index.block_indices.tolist() == [0, 64, 140, 5]
    assert index.column_indices.tolist() == [130, 139, 204, 0, 4, 69]
    assert index.block_indptr.tolist() == [[[0, 3, 4]]]
    assert index.column_indptr.tolist() == [[[0, 3, 6]]]


@pytest.mark.parametrize(
    "change, text",
    [
        ({"block_count": [[[1, 3]]]}, "block_count has 3; it must be in [0, 3)"),
        ({"block_count": [[[1, -1]]]}, "block_count has -1; it must be in [0, 3)"),
        ({"column_count": [[[2, 2]]]}, "column_count has 2; it must be in [0, 2)"),
        ({"block_offset": [[[[0, 9], [30, 9]]]]}, "block_offset has 30; it must be in [0, 30)"),
        ({"block_offset": [[[[-8, 9], [0, 9]]]]}, "block_offset has -8; it must be in [0, 30)"),
        ({"column_index": [[[[30], [3]]]]}, "column_index has 30; it must be in [0, 30)"),
        ({"column_index": [[[[3], [-1]]]]}, "column_index has -1; it must be in [0, 30)"),
        (
            {"block_count": [[[1]]]},
            "block lists have shapes (1, 1, 1) and (1, 1, 2, 2); [batch, he",
        ),
        ({"block_offset": [[[[0, 9]]]]}, "block lists have shapes (1, 1, 2) and (1, 1, 1, 2)"),
        ({"column_count": [[1, 1]]}, "column lists have shapes (1, 2) and (1, 1, 2, 1)"),
        (
            {"column_index": [[[[3], [4], [5]]]]},
            "column lists have shapes (1, 1, 2) and (1, 1, 3, 1)",
        ),
        ({"seqlen_q": 33}, "[batch, heads, 3] and [batch, heads, 3, entries] are needed"),
    ],
)
def test_from_vertical_slash_lists_rejects(change, text):
    arguments = {
        "block_count": [[[1, 1]]],
        "block_offset": [[[[0, 99], [8, 99]]]],
        "column_count": [[[1, 1]]],
        "column_index": [[[[29], [3]]]],
        **{"seqlen_q": 32, "seqlen_k": 30, "block_m": 16, "block_n": 8},
    }

    def convert(**given):
        tensors = {k: torch.tensor(v) for k, v in given.items() if isinstance(v, list)}
        return SparseIndex.from_vertical_slash_lists(**{**given, **tensors})

    convert(**arguments).validate()
    with pytest.raises(ValueError, match="from_vertical_slash_lists: .*" + re.escape(text)):
        convert(**{**arguments, **change})


# --- FlexAttention --------------------------------------------------------------------------------

RANDOM = torch.rand(2, 3, 400, 400, generator=torch.Generator().manual_seed(1)) < 0.5
DOCUMENT = torch.arange(400) // 37 % 5
PREFIX = torch.tensor([70, 130])


def patchy_random(b, h, i, j):
    """Random in a quarter of the 64 x 64 squares; of the others half are full."""
    square = (i // 64) * 3 + (j // 64) * 5 + h
    return torch.where(square % 4 == 0, RANDOM[b, h, i, j], square % 4 == 1)


# name: (the mask_mod as a user writes it, B, H, the same rule on whole tensors b, h, i, j)
MASK_MODS = {
    "causal": (lambda b, h, i, j: i >= j, None, None),
    "sliding window": (lambda b, h, i, j: (i >= j) & (i - j < 50), None, None),
    "document": (lambda b, h, i, j: DOCUMENT[i] == DOCUMENT[j], None, None),
    "prefix-LM": (lambda b, h, i, j: (j < PREFIX[b]) | (i >= j), 2, None),
    "random": (patchy_random, 2, 3),
    "random, a head": (lambda b, h, i, j: patchy_random(0, h, i, j), None, 3),
    "nothing": (lambda b, h, i, j: i < 0, None, None),
    "everything": (lambda b, h, i, j: i >= 0, None, 2),
}


def rule_of(name: str, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> torch.Tensor:
    """The rule of a mask_mod, written again on whole matrices."""
    b = torch.arange(batch)[:, None, None, None]
    h = torch.arange(heads)[:, None, None]
    i, j = torch.arange(seqlen_q)[:, None], torch.arange(seqlen_k)
    square = i // 64 * 3 + j // 64 * 5 + h
    noise = torch.where(square % 4 == 0, RANDOM[b, h, i, j], square % 4 == 1)
    ones = torch.ones(batch, heads, seqlen_q, seqlen_k, dtype=torch.bool)
    first = ones.tril()
    return {
        "causal": first,
        "sliding window": first & ~ones.tril(-50),
        "document": DOCUMENT[:seqlen_q, None].eq(DOCUMENT[:seqlen_k]).expand_as(ones),
        "prefix-LM": first | (j < PREFIX[:batch].view(-1, 1, 1, 1)),
        "random": noise,
        "random, a head": noise[:1].expand_as(ones),
        "nothing": ~ones,
        "everything": ones,
    }[name]


@pytest.mark.parametrize(
    "seqlen_q, seqlen_k, block",
    [(256, 256, 128), (200, 300, 128), (129, 65, (64, 32)), (40, 300, (128, 64)), (1, 20, 128)],
)
@pytest.mark.parametrize("name", MASK_MODS)
def test_from_block_mask(name, seqlen_q, seqlen_k, block):
    mask_mod, batch, heads = MASK_MODS[name]
    block_mask = create_block_mask(
        mask_mod, batch, heads, seqlen_q, seqlen_k, device="cpu", BLOCK_SIZE=block
    )
    index = SparseIndex.from_block_mask(block_mask)
    assert (index.seqlen_q, index.seqlen_k) == (seqlen_q, seqlen_k)
    block_m, block_n = (block, block) if isinstance(block, int) else block
    assert index.block_n == min(block_n, ceil_div(seqlen_k, 8) * 8)
    assert index.block_m == min(block_m, ceil_div(seqlen_q, 16) * 16)
    expected = rule_of(name, batch or 1, heads or 1, seqlen_q, seqlen_k)
    assert torch.equal(seen_keys(index), expected)
    if name in ("nothing", "everything"):  # an edge does not make a block partial
        assert index.block_bits is None
    # And back: the same keys, in the same kind of object.
    again = index.to_block_mask()
    assert torch.equal(seen_keys(SparseIndex.from_block_mask(again)), expected)
    assert_block_mask(again, expected)


def ordered_blocks(counts: torch.Tensor, indices: torch.Tensor, width: int) -> torch.Tensor:
    """The grid bool [batch, heads, rows, width] that counts and indices of a BlockMask list."""
    grid = torch.zeros(*counts.shape, width, dtype=torch.bool)
    for b, h, row in itertools.product(*map(range, counts.shape)):
        listed = indices[b, h, row, : counts[b, h, row]].tolist()
        assert len(set(listed)) == len(listed)
        grid[b, h, row, listed] = True
    return grid


def assert_block_mask(block_mask: BlockMask, expected: torch.Tensor, loose: bool = False) -> None:
    """Lists and mask_mod say the same: full blocks are whole, unlisted ones empty.

    loose: whether blocks may be listed as partial of which nothing is seen.
    """
    batch, heads, seqlen_q, seqlen_k = expected.shape
    assert tuple(block_mask.seq_lengths) == (seqlen_q, seqlen_k)
    told = create_mask(block_mask.mask_mod, batch, heads, seqlen_q, seqlen_k, device="cpu")
    assert torch.equal(told, expected)
    block_m, block_n = block_mask.BLOCK_SIZE
    width = ceil_div(seqlen_k, block_n)
    partial = ordered_blocks(block_mask.kv_num_blocks, block_mask.kv_indices, width)
    full = ordered_blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, width)
    assert not (partial & full).any()
    for b, h in itertools.product(range(batch), range(heads)):
        for m, n in itertools.product(range(ceil_div(seqlen_q, block_m)), range(width)):
            here = (slice(m * block_m, (m + 1) * block_m), slice(n * block_n, (n + 1) * block_n))
            block = expected[b, h][here]
            at = (b % partial.shape[0], h % partial.shape[1], m, n)
            if full[at]:
                # Nothing of a full block is looked up, so all of it must exist, too.
                assert block.all() and block.shape == (block_m, block_n)
            else:
                assert partial[at] == block.any() or (loose and partial[at])


def test_from_block_mask_made_of_lists():
    """Lists in any order and a mask_mod that is not asked about full blocks."""
    block_mask = BlockMask.from_kv_blocks(
        torch.tensor([[[2, 1]]], dtype=torch.int32),
        torch.tensor([[[[2, 0, 1], [1, 0, 0]]]], dtype=torch.int32),
        torch.tensor([[[1, 1]]], dtype=torch.int32),
        torch.tensor([[[[1, 0, 0], [2, 0, 0]]]], dtype=torch.int32),
        BLOCK_SIZE=(16, 32),
        mask_mod=lambda b, h, i, j: (i + j) % 3 == 0,
        seq_lengths=(30, 90),
    )
    index = SparseIndex.from_block_mask(block_mask)
    said = {(0, 0): "mask", (0, 1): "full", (0, 2): "mask", (1, 1): "mask", (1, 2): "full"}
    for i, row in enumerate(seen_keys(index)[0, 0].tolist()):
        for j, seen in enumerate(row):
            block = said.get((i // 16, j // 32))
            assert seen == (block == "full" or (block == "mask" and (i + j) % 3 == 0)), (i, j)


def test_from_block_mask_looks_up_nothing_outside():
    """A mask_mod that looks positions up is never asked about one that does not exist."""
    table = torch.rand(30, 90, generator=torch.Generator().manual_seed(0)) < 0.5
    block_mask = BlockMask.from_kv_blocks(
        torch.tensor([[[3, 3]]], dtype=torch.int32),
        torch.tensor([[[[2, 0, 1], [1, 2, 0]]]], dtype=torch.int32),
        BLOCK_SIZE=(16, 32),
        mask_mod=lambda b, h, i, j: table[i, j],
        seq_lengths=(30, 90),
    )
    assert torch.equal(seen_keys(SparseIndex.from_block_mask(block_mask))[0, 0], table)


def test_from_block_mask_rejects():
    def mask_mod(b, h, i, j):
        return i >= j

    odd = create_block_mask(mask_mod, None, None, 200, 200, device="cpu", BLOCK_SIZE=(24, 64))
    with pytest.raises(ValueError, match="block_m=24"):
        SparseIndex.from_block_mask(odd)
    odd = create_block_mask(mask_mod, None, None, 200, 200, device="cpu", BLOCK_SIZE=(64, 20))
    with pytest.raises(ValueError, match="block_n=20"):
        SparseIndex.from_block_mask(odd)
    longer = create_block_mask(mask_mod, None, None, 200, 200, device="cpu", BLOCK_SIZE=64)
    longer.seq_lengths = (300, 200)
    with pytest.raises(ValueError, match=r"from_block_mask: kv_indices has shape \(1, 1, 4, 4\)"):
        SparseIndex.from_block_mask(longer)


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**31 - 1),
    seqlen_q=st.integers(1, 120),
    seqlen_k=st.integers(1, 120),
    block_m=st.sampled_from([16, 48, 64]),
    block_n=st.sampled_from([8, 24, 64]),
    kinds=st.lists(
        st.sampled_from(["dense", "streaming", "blocks", "columns", "listed", "empty", "aligned"]),
        min_size=1,
        max_size=3,
    ),
    batch=st.integers(1, 2),
    bits=st.sampled_from([0.0, 0.0, 0.5]),
    causal=st.booleans(),
    q_offset=st.one_of(st.none(), st.integers(-90, 90)),
)
def test_to_block_mask(
    seed, seqlen_q, seqlen_k, block_m, block_n, kinds, batch, bits, causal, q_offset
):
    sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "block_m": block_m, "block_n": block_n}
    aligned = SparseIndex.from_blocks(random_grid(seed, (1, 1), 0.5, **sizes), **sizes)
    index = SparseIndex.cat_heads(
        [
            aligned
            if kind == "aligned"
            else cases.make_index(**sizes, kinds=[kind], batch=batch, bits=bits, seed=seed + h)
            for h, kind in enumerate(kinds)
        ]
    )
    block_mask = index.to_block_mask(causal=causal, q_offset=q_offset)
    expected = index.to_dense_mask(q_offset)
    if causal:
        offset = seqlen_k - seqlen_q if q_offset is None else q_offset
        for i in range(seqlen_q):
            expected[:, :, i, max(i + offset + 1, 0) :] = False
    assert_block_mask(block_mask, expected, loose=causal)
    again = SparseIndex.from_block_mask(block_mask)
    assert torch.equal(seen_keys(again), expected)


@pytest.mark.parametrize("q_offset", [-33, *range(-18, 19)])
def test_to_block_mask_at_every_offset_of_the_diagonal(q_offset):
    index = SparseIndex.dense(33, 40, block_m=16, block_n=8)
    expected = torch.ones(1, 1, 33, 40).tril(q_offset).bool()
    assert_block_mask(index.to_block_mask(causal=True, q_offset=q_offset), expected, loose=True)


def test_to_block_mask_rejects_a_bias():
    index = cases.make_index(20, 20, kinds=["listed"], bias="finite")
    with pytest.raises(ValueError, match="to_block_mask: the columns have a bias and a BlockMask"):
        index.to_block_mask()


def qkv(batch: int, heads: int, heads_kv: int, seqlen_q: int, seqlen_k: int):
    generator = torch.Generator().manual_seed(7)
    shapes = [(heads, seqlen_q), (heads_kv, seqlen_k), (heads_kv, seqlen_k)]
    return [torch.randn(batch, *shape, 32, generator=generator) for shape in shapes]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kinds", [("dense", "aligned"), ("streaming", "listed"), ("blocks",) * 2])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(100, 130), (64, 64)])
def test_flex_attention_with_our_mask_is_our_attention(kinds, seqlen_q, seqlen_k):
    q, k, v = qkv(2, 4, 2, seqlen_q, seqlen_k)
    sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "block_m": 32, "block_n": 16}
    aligned = SparseIndex.from_blocks(random_grid(3, (1, 1), 0.4, **sizes), **sizes)
    index = SparseIndex.cat_heads(
        [
            aligned
            if kind == "aligned"
            else cases.make_index(**sizes, kinds=[kind], batch=2, seed=5)
            for kind in kinds
        ]
    ).expand_heads(4)
    for causal in (False, True):
        ours = sparse_attn.attention(q, k, v, index, causal=causal)
        block_mask = index.to_block_mask(causal=causal)
        theirs = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        # The BlockMask itself is a pattern, too; its causality is its own.
        as_pattern = sparse_attn.attention(q, k, v, block_mask, causal=False)
        torch.testing.assert_close(as_pattern, theirs, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["sliding window", "prefix-LM", "random"])
def test_attention_takes_a_block_mask(name):
    q, k, v = qkv(2, 3, 3, 200, 200)
    mask_mod, batch, heads = MASK_MODS[name]
    block_mask = create_block_mask(mask_mod, batch, heads, 200, 200, device="cpu")
    ours = sparse_attn.attention(q, k, v, block_mask, causal=False)
    theirs = flex_attention(q, k, v, block_mask=block_mask)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
