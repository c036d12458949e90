# SPDX-License-Identifier: Apache-2.0
"""SparseIndex against its definition, spelt out in plain loops over rows, keys and list entries."""

import dataclasses
import inspect
import re

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparse_attn
from sparse_attn import HeadKind, SparseIndex

ALL_KINDS = ("dense", "streaming", "blocks", "columns", "listed", "empty")


# --- the definition -------------------------------------------------------------------------------


def entries(indptr: torch.Tensor, b: int, h: int, t: int) -> range:
    return range(int(indptr[b, h, t]), int(indptr[b, h, t + 1]))


def brute_mask(index: SparseIndex, q_offset: int | None = None) -> torch.Tensor:
    """bool [batch, heads, seqlen_q, seqlen_k] from the text of the class, entry by entry."""
    batch, num_heads = index.block_indptr.shape[:2]
    offset = index.seqlen_k - index.seqlen_q if q_offset is None else q_offset
    starts, columns = index.block_indices.tolist(), index.column_indices.tolist()
    ids = None if index.block_bits_ids is None else index.block_bits_ids.tolist()
    words = None if index.block_bits is None else index.block_bits.tolist()
    mask = [
        [[[False] * index.seqlen_k for _ in range(index.seqlen_q)] for _ in range(num_heads)]
        for _ in range(batch)
    ]
    for b in range(batch):
        for h, (kind, sink, window, dense_tail) in enumerate(index.heads.tolist()):
            for i in range(index.seqlen_q):
                row, t, r = mask[b][h][i], i // index.block_m, i % index.block_m
                if kind == 0:
                    row[:] = [True] * index.seqlen_k
                elif kind == 1:
                    tail = i >= index.seqlen_q - dense_tail
                    for j in range(index.seqlen_k):
                        row[j] = j < sink or abs(i + offset - j) < window or tail
                else:
                    for e in entries(index.block_indptr, b, h, t):
                        for c in range(min(index.block_n, index.seqlen_k - starts[e])):
                            hidden = ids is not None and ids[e] >= 0
                            word = words[ids[e]][c][r // 64] if hidden else -1
                            row[starts[e] + c] = bool(word >> (r % 64) & 1)
                    for e in entries(index.column_indptr, b, h, t):
                        row[columns[e]] = True
    return torch.tensor(mask, dtype=torch.bool).view(batch, num_heads, index.seqlen_q, -1)


def brute_density(index: SparseIndex, causal: bool, q_offset: int | None):
    """(element, tile) lists [batch][heads], by the definition of `SparseIndex.density`."""
    offset = index.seqlen_k - index.seqlen_q if q_offset is None else q_offset
    mask = brute_mask(index, q_offset).tolist()
    starts, columns = index.block_indices.tolist(), index.column_indices.tolist()

    def limit(i: int) -> int:
        return min(max(i + offset + 1, 0), index.seqlen_k) if causal else index.seqlen_k

    element, tile = [], []
    for b, of_heads in enumerate(mask):
        element.append([])
        tile.append([])
        for h, rows in enumerate(of_heads):
            allowed = sum(limit(i) for i in range(index.seqlen_q))
            visible = sum(sum(row[: limit(i)]) for i, row in enumerate(rows))
            work = dense_work = 0
            for t in range(index.num_tiles):
                first = t * index.block_m
                end = min(first + index.block_m, index.seqlen_q)
                below = range(limit(end - 1))
                visited = {j for j in below for i in range(first, end) if rows[i][j]}
                if index.heads[h, 0] == HeadKind.LISTED:
                    visited = {columns[e] for e in entries(index.column_indptr, b, h, t)}
                    for e in entries(index.block_indptr, b, h, t):
                        visited |= set(range(starts[e], starts[e] + index.block_n))
                    visited &= set(below)
                work += (end - first) * len(visited)
                dense_work += (end - first) * len(below)
            element[b].append(visible / allowed if allowed else 0.0)
            tile[b].append(work / dense_work if dense_work else 0.0)
    return element, tile


def random_index(seed: int = 0, **kwargs) -> SparseIndex:
    settled = {"seqlen_q": 77, "seqlen_k": 90, "block_m": 32, "block_n": 16, "kinds": ALL_KINDS}
    return cases.make_index(**{**settled, **kwargs}, seed=seed)


index_arguments = {
    "seed": st.integers(0, 2**31 - 1),
    "seqlen_q": st.integers(1, 140),
    "seqlen_k": st.integers(1, 140),
    "block_m": st.sampled_from([1, 16, 48, 64, 80, 128]),
    "block_n": st.sampled_from([8, 24, 64]),
    "batch": st.integers(1, 2),
    "fill": st.sampled_from([0.1, 0.5, 1.0]),
    "bits": st.sampled_from([0.0, 0.5, 1.0]),
    "kinds": st.lists(st.sampled_from(ALL_KINDS), min_size=1, max_size=3),
}
offsets = st.one_of(st.none(), st.integers(-150, 150))


# --- constructors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 1), (64, 64), (65, 30), (7, 129)])
def test_dense_constructor(seqlen_q, seqlen_k):
    index = SparseIndex.dense(seqlen_q, seqlen_k, num_heads=3, block_m=48, block_n=24)
    assert index.validate() is index
    assert index.heads.tolist() == [[0, 0, 0, 0]] * 3 and index.heads.dtype == torch.int32
    assert index.is_list_free and index.batch_size == 1 and index.num_heads == 3
    assert (index.seqlen_q, index.seqlen_k) == (seqlen_q, seqlen_k)
    assert (index.block_m, index.block_n) == (48, 24)
    assert index.num_tiles == index.block_indptr.shape[-1] - 1 == len(range(0, seqlen_q, 48))
    mask = index.to_dense_mask()
    assert mask.shape == (1, 3, seqlen_q, seqlen_k) and mask.dtype == torch.bool and mask.all()


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 1), (64, 64), (65, 30), (7, 129)])
@pytest.mark.parametrize("sink, window, tail", [(0, 0, 0), (3, 0, 0), (0, 5, 2), (200, 300, 400)])
@pytest.mark.parametrize("q_offset", [None, 0, -9, 11])
def test_streaming_constructor(seqlen_q, seqlen_k, sink, window, tail, q_offset):
    index = SparseIndex.streaming(
        seqlen_q, seqlen_k, sink=sink, window=window, dense_tail=tail, num_heads=2
    ).validate()
    assert index.heads.tolist() == [[1, sink, window, tail]] * 2
    assert index.is_list_free
    offset = seqlen_k - seqlen_q if q_offset is None else q_offset
    for i, row in enumerate(index.to_dense_mask(q_offset)[0, 1].tolist()):
        for j, seen in enumerate(row):
            rule = j < sink or abs(i + offset - j) < window or i >= seqlen_q - tail
            assert seen == rule, (i, j)


@pytest.mark.parametrize("name", ["sink", "window", "dense_tail"])
def test_streaming_rejects_negative_values(name):
    sizes = {"sink": 1, "window": 2, "dense_tail": 3, name: -1}
    with pytest.raises(ValueError, match=rf"SparseIndex: {name}=-1 is negative; pass 0"):
        SparseIndex.streaming(9, 9, **sizes)


@pytest.mark.parametrize(
    "make",
    [
        lambda **sizes: SparseIndex.dense(40, 40, **sizes),
        lambda **sizes: SparseIndex.streaming(40, 40, sink=1, window=1, **sizes),
        lambda **sizes: SparseIndex.from_lists(**{**list_arguments(), **sizes}),
        lambda **sizes: random_index().with_tiles(**sizes),
    ],
    ids=["dense", "streaming", "from_lists", "with_tiles"],
)
@pytest.mark.parametrize(
    "sizes, text",
    [
        *(({"block_m": m}, f"block_m={m}; it must be 1 or a mul") for m in (-16, 0, 2, 8, 17, 72)),
        *(({"block_n": n}, f"block_n={n}; it must be a multiple of 8") for n in (-8, 0, 1, 4, 12)),
    ],
)
def test_tile_sizes(make, sizes, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        make(**sizes)


def list_arguments() -> dict:
    """Two heads, three tiles: blocks 0 and 40 of which one has bits, columns 20 and 33."""
    return {
        "seqlen_q": 40,
        "seqlen_k": 45,
        "block_m": 16,
        "block_n": 8,
        "block_indptr": torch.tensor([[[0, 1, 1, 2], [2, 2, 2, 2]]]),
        "block_indices": torch.tensor([0, 40], dtype=torch.int32),
        "column_indptr": torch.tensor([[[0, 0, 0, 1], [1, 1, 2, 2]]]),
        "column_indices": torch.tensor([20, 33], dtype=torch.int32),
        "column_bias": torch.tensor([0.5, -torch.inf]),
        "block_bits_ids": torch.tensor([-1, 0], dtype=torch.int32),
        "block_bits": torch.tensor([[[1 << (c % 8)] for c in range(8)]]),
    }


def test_from_lists_keeps_its_tensors():
    arguments = list_arguments()
    index = SparseIndex.from_lists(**arguments).validate()
    assert all(getattr(index, name) is value for name, value in arguments.items())
    assert index.heads.tolist() == [[2, 0, 0, 0]] * 2 and index.heads.dtype == torch.int32
    seen = {(h, i, j) for _, h, i, j in index.to_dense_mask().nonzero().tolist()}
    assert seen == {
        *((0, i, j) for i in range(16) for j in range(8)),
        *((0, 32 + c, 40 + c) for c in range(5)),  # the block's last three keys do not exist
        *((0, i, 20) for i in range(32, 40)),
        *((1, i, 33) for i in range(16, 32)),
    }
    heads = torch.tensor([[2, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.int32)
    assert SparseIndex.from_lists(**arguments, heads=heads).heads is heads


@pytest.mark.parametrize("left_out", ["block", "column"])
def test_from_lists_without_blocks_or_columns(left_out):
    arguments = {k: v for k, v in list_arguments().items() if not k.startswith(left_out + "_i")}
    if left_out == "block":
        del arguments["block_bits_ids"], arguments["block_bits"]
    else:
        del arguments["column_bias"]
    index = SparseIndex.from_lists(**arguments).validate()
    assert getattr(index, f"{left_out}_indices").shape == (0,)
    assert not getattr(index, f"{left_out}_indptr").any()
    assert torch.equal(index.to_dense_mask(), brute_mask(index))


def int32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def int64(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"block_indices": None}, ValueError, "block_indptr and block_indices go together"),
        ({"block_indptr": None}, ValueError, "block_indptr and block_indices go together"),
        ({"column_indices": None}, ValueError, "column_indptr and column_indices go together"),
        ({"column_indptr": None}, ValueError, "column_indptr and column_indices go together"),
        (
            dict.fromkeys(
                ["block_indptr", "block_indices", "column_indptr", "column_indices", "column_bias"]
                + ["block_bits_ids", "block_bits"]
            ),
            ValueError,
            "blocks or columns are needed",
        ),
        ({"block_bits": None}, ValueError, "block_bits and block_bits_ids go together"),
        ({"block_bits_ids": None}, ValueError, "block_bits and block_bits_ids go together"),
        ({"heads": int64(2, 4)}, TypeError, "heads is torch.int64; it must be torch.int32"),
        ({"block_indptr": int32(1, 2, 4)}, TypeError, "block_indptr is torch.int32; it must be"),
        ({"column_indptr": int32(1, 2, 4)}, TypeError, "column_indptr is torch.int32; it must be"),
        ({"block_indices": int64(2)}, TypeError, "block_indices is torch.int64; it must be"),
        ({"column_indices": int64(2)}, TypeError, "column_indices is torch.int64; it must be"),
        ({"column_bias": torch.zeros(2).double()}, TypeError, "column_bias is torch.float64; it"),
        ({"block_bits_ids": int64(2)}, TypeError, "block_bits_ids is torch.int64; it must be"),
        ({"block_bits": int32(1, 8, 1)}, TypeError, "block_bits is torch.int32; it must be"),
        ({"heads": int32(2, 3)}, ValueError, "heads has shape (2, 3); [heads, 4] = (2, 4)"),
        ({"heads": int32(3, 4)}, ValueError, "block_indptr has shape (1, 2, 4); [batch, heads, "),
        ({"block_indptr": int64(1, 2, 3)}, ValueError, "num_tiles + 1] = (1, 2, 4) is needed"),
        ({"block_indptr": int64(2, 4)}, ValueError, "block_indptr has shape (2, 4)"),
        ({"block_indptr": int64(4)}, ValueError, "block_indptr has shape (4,)"),
        ({"column_indptr": int64(1, 2, 5)}, ValueError, "column_indptr has shape (1, 2, 5)"),
        ({"column_indptr": int64(2, 2, 4)}, ValueError, "column_indptr has shape (2, 2, 4)"),
        ({"block_indices": int32(1, 2)}, ValueError, "block_indices has shape (1, 2); [capacity]"),
        ({"block_indices": int32()}, ValueError, "block_indices has shape (); [capacity] = (1,)"),
        ({"column_indices": int32(2, 1)}, ValueError, "column_indices has shape (2, 1)"),
        ({"column_bias": torch.zeros(3)}, ValueError, "column_bias has shape (3,); [column capac"),
        ({"block_bits_ids": int32(1)}, ValueError, "block_bits_ids has shape (1,); [block capaci"),
        ({"block_bits": int64(1, 16, 1)}, ValueError, "block_bits has shape (1, 16, 1); [masks"),
        ({"block_bits": int64(1, 8, 2)}, ValueError, "block_bits has shape (1, 8, 2); [masks"),
        ({"block_bits": int64(8, 1)}, ValueError, "block_bits has shape (8, 1); [masks"),
        ({"seqlen_q": 49}, ValueError, "block_indptr has shape (1, 2, 4); [batch, heads, num_ti"),
        (
            {"column_bias": torch.zeros(2, device="meta")},
            ValueError,
            "column_bias is on meta and heads on cpu; move the index as a whole with to()",
        ),
    ],
)
def test_from_lists_rejects(change, error, text):
    with pytest.raises(error, match=re.escape(text)) as caught:
        SparseIndex.from_lists(**{**list_arguments(), **change})
    assert str(caught.value).startswith("sparse_attn.SparseIndex: ")


# --- what an index is -----------------------------------------------------------------------------


def test_frozen_and_compared_by_identity():
    index = random_index()
    with pytest.raises(dataclasses.FrozenInstanceError):
        index.seqlen_q = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        index.density().element = 0.5
    copy = dataclasses.replace(index)
    assert index == index and index != copy and len({index, copy}) == 2


def test_repr_and_sizes():
    index = random_index(kinds=("dense", "listed", "listed", "streaming"), batch=2)
    blocks, columns = index.block_indices.shape[0], index.column_indices.shape[0]
    assert repr(index) == (
        "SparseIndex(batch_size=2, heads=[1 dense, 1 streaming, 2 listed], seqlen_q=77, "
        f"seqlen_k=90, block_m=32, block_n=16, blocks<={blocks}, columns<={columns}, device='cpu')"
    )
    assert (index.batch_size, index.num_heads, index.num_tiles) == (2, 4, 3)
    assert index.device == torch.device("cpu")
    assert repr(SparseIndex.dense(1, 1)).startswith("SparseIndex(batch_size=1, heads=[1 dense], ")


@pytest.mark.parametrize("bits", [0.0, 0.5])
@pytest.mark.parametrize("bias", [None, "finite"])
def test_to_moves_every_tensor(bits, bias):
    index = random_index(bits=bits, bias=bias)
    moved = index.to("meta")
    assert moved.device.type == "meta"
    for field in dataclasses.fields(index):
        old, new = getattr(index, field.name), getattr(moved, field.name)
        if isinstance(old, torch.Tensor):
            assert new.device.type == "meta" and new.shape == old.shape and new.dtype == old.dtype
        else:
            assert new == old
    same = index.to("cpu")
    assert all(getattr(same, f.name) is getattr(index, f.name) for f in dataclasses.fields(index))


def test_is_list_free():
    blocks, columns = random_index(kinds=("blocks",)), random_index(kinds=("columns",))
    assert not blocks.is_list_free and not columns.is_list_free
    dense = SparseIndex.dense(77, 90, block_m=32, block_n=16)
    assert not SparseIndex.cat_heads([dense, blocks]).is_list_free
    assert SparseIndex.streaming(5, 5, sink=1, window=1).is_list_free


def test_op_args_are_in_the_order_of_the_schema():
    index = random_index(bits=0.5, bias="finite")
    schema = torch.ops.sparse_attn.check_index.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[-2:] == ["seqlen_q", "seqlen_k"]
    for name, value in zip(names[:-2], index.op_args(), strict=True):
        assert value is getattr(index, name)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"block_indices": [0, 45]}, "45"),
        ({"column_indices": [20, -1]}, "-1"),
        ({"column_indices": [42, 33]}, "42"),
        ({"heads": [[2, 0, 0, 0], [3, 0, 0, 0]]}, "3"),
    ],
)
def test_validate_reads_the_lists(change, text):
    arguments = list_arguments()
    for name, value in change.items():
        arguments[name] = torch.tensor(value, dtype=torch.int32)
    index = SparseIndex.from_lists(**arguments)
    with pytest.raises(ValueError, match=rf"sparse_attn.SparseIndex: .*{text}"):
        index.validate()


def test_validate_checks_shapes_of_an_index_made_by_hand():
    index = dataclasses.replace(random_index(), block_indptr=int64(1, 6, 9))
    with pytest.raises(ValueError, match=r"block_indptr has shape \(1, 6, 9\)"):
        index.validate()


# --- to_dense_mask and density --------------------------------------------------------------------


@settings(max_examples=150)
@given(q_offset=offsets, **index_arguments)
def test_to_dense_mask_is_the_definition(q_offset, **arguments):
    index = cases.make_index(**arguments)
    mask = index.to_dense_mask(q_offset)
    assert mask.dtype == torch.bool and torch.equal(mask, brute_mask(index, q_offset))


def test_dense_tail_and_offset_of_one_streaming_head():
    index = SparseIndex.streaming(4, 6, sink=1, window=2, dense_tail=1)
    rows = ["".join("01"[x] for x in row) for row in index.to_dense_mask()[0, 0].tolist()]
    assert rows == ["111100", "101110", "100111", "111111"]
    rows = ["".join("01"[x] for x in row) for row in index.to_dense_mask(-1)[0, 0].tolist()]
    assert rows == ["100000", "110000", "111000", "111111"]


@settings(max_examples=150)
@given(q_offset=offsets, causal=st.booleans(), **index_arguments)
def test_density_is_the_definition(q_offset, causal, **arguments):
    index = cases.make_index(**arguments)
    density = index.density(causal=causal, q_offset=q_offset)
    element, tile = brute_density(index, causal, q_offset)
    assert density.element_per_head.dtype == density.tile_per_head.dtype == torch.float64
    assert density.element_per_head.tolist() == element
    assert density.tile_per_head.tolist() == tile
    assert density.element == pytest.approx(torch.tensor(element).mean().item(), rel=1e-6)
    assert density.tile == pytest.approx(torch.tensor(tile).mean().item(), rel=1e-6)

    # The same from the package's own mask: visible pairs below the causal diagonal.
    mask = index.to_dense_mask(q_offset)
    offset = index.seqlen_k - index.seqlen_q if q_offset is None else q_offset
    row, key = torch.arange(index.seqlen_q)[:, None], torch.arange(index.seqlen_k)
    allowed = (key <= row + offset) | (not causal)
    pairs = (mask & allowed).sum((2, 3)).double() / allowed.sum().clamp(min=1)
    assert torch.equal(pairs, density.element_per_head)


def test_density_by_hand():
    # Rows 0..31 at positions 0..31, tiles of 16; one block [8, 16) and column 20 in tile 1.
    index = SparseIndex.from_lists(
        seqlen_q=32,
        seqlen_k=32,
        block_m=16,
        block_n=8,
        block_indptr=torch.tensor([[[0, 0, 1]]]),
        block_indices=torch.tensor([8], dtype=torch.int32),
        column_indptr=torch.tensor([[[0, 0, 1]]]),
        column_indices=torch.tensor([20], dtype=torch.int32),
    )
    density = index.density()
    assert density.element == (16 * 8 + 12) / (32 * 33 / 2)  # rows 20..31 see the column
    assert density.tile == 16 * 9 / (16 * 16 + 16 * 32)
    density = index.density(causal=False)
    assert density.element == 16 * 9 / 32**2 and density.tile == 16 * 9 / 32**2
    nothing = index.density(q_offset=-32)  # no row may see any key
    assert nothing.element == nothing.tile == 0.0
    assert SparseIndex.dense(32, 32).density(q_offset=-32).element == 0.0
    assert SparseIndex.dense(33, 65).density(q_offset=7).tile == 1.0


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that any op makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.size = max(self.size, leaf.untyped_storage().nbytes())
        return result


def test_density_of_long_sequences():
    n, sink, window = 131072, 64, 1000
    index = SparseIndex.cat_heads(
        [SparseIndex.dense(n, n), SparseIndex.streaming(n, n, sink=sink, window=window)]
    )
    with LargestTensor() as largest:
        density = index.density()
    assert largest.size < 64 * n
    pairs = sum(min(i + 1, sink + window) for i in range(n))
    assert density.element_per_head.tolist() == [[1.0, pairs / (n * (n + 1) / 2)]]
    # The rows of a tile see its last row's sinks, and window - 1 keys before the first row's own.
    work = sum(min(p + 64, sink + 64 + window - 1) for p in range(0, n, 64)) * 64
    dense_work = sum(p + 64 for p in range(0, n, 64)) * 64
    assert density.tile_per_head.tolist() == [[1.0, work / dense_work]]

    listed = SparseIndex.from_lists(  # every tile: its own block and the first
        seqlen_q=n,
        seqlen_k=n,
        block_m=64,
        block_n=64,
        block_indptr=torch.arange(0, n // 32 + 1, 2).sub(1).clamp(min=0).view(1, 1, -1),
        block_indices=torch.stack([torch.zeros(n // 64), torch.arange(0, n, 64)], 1)
        .flatten()[1:]
        .int(),
    ).validate()
    with LargestTensor() as largest:
        density = listed.density()
    assert largest.size < 64 * n
    pairs = (n // 64) * (64 * 65 // 2) + (n // 64 - 1) * 64 * 64
    assert density.element == pairs / (n * (n + 1) / 2)
    assert density.tile == (2 * (n // 64) - 1) * 64 * 64 / dense_work


# --- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [[0], [5, 2, 2, 0], (4, 3), range(6), []])
def test_select_heads(heads):
    index = random_index(bits=0.4, bias="finite", batch=2)
    chosen = index.select_heads(heads).validate()
    assert chosen.num_heads == len(heads) and chosen.batch_size == 2
    assert torch.equal(chosen.to_dense_mask(), brute_mask(index)[:, list(heads)])
    assert torch.equal(cases.dense_bias(chosen), cases.dense_bias(index)[:, list(heads)])
    assert chosen.block_indices is index.block_indices


@pytest.mark.parametrize("heads, wrong", [([6], 6), ([0, -1], -1)])
def test_select_heads_rejects(heads, wrong):
    with pytest.raises(ValueError, match=rf"select_heads: head {wrong} is not in \[0, 6\)"):
        random_index().select_heads(heads)


def test_expand_heads():
    index = random_index(kinds=("listed", "streaming"), bits=0.4, batch=2)
    wide = index.expand_heads(6).validate()
    assert wide.num_heads == 6
    mask = brute_mask(index)
    for h in range(6):
        assert torch.equal(wide.to_dense_mask()[:, h], mask[:, h // 3])
    assert index.expand_heads(2) is index
    for wrong in (3, 1):
        with pytest.raises(ValueError, match=f"num_heads={wrong} is not a multiple of the index's"):
            index.expand_heads(wrong)


@pytest.mark.parametrize("batches", [(1, 1, 1), (1, 3, 1), (2, 1, 2)])
@pytest.mark.parametrize("bits", [(0.0, 0.0, 0.0), (0.0, 0.5, 0.5), (0.5, 0.0, 0.7)])
def test_cat_heads(batches, bits):
    biases = (None, "finite", None) if bits[0] else (None, None, None)
    kinds = (("listed", "dense"), ("streaming", "columns", "blocks"), ("listed",))
    parts = [
        random_index(seed, kinds=kinds[seed], batch=batches[seed], bits=bits[seed], bias=bias)
        for seed, bias in enumerate(biases)
    ]
    free = SparseIndex.streaming(77, 90, sink=2, window=9, num_heads=2, block_m=32, block_n=16)
    for all_parts in ([*parts, free], [free, *parts]):
        joined = SparseIndex.cat_heads(all_parts).validate()
        batch = max(batches)
        expected = [brute_mask(part).expand(batch, -1, -1, -1) for part in all_parts]
        assert torch.equal(joined.to_dense_mask(), torch.cat(expected, 1))
        assert torch.equal(brute_mask(joined), torch.cat(expected, 1))
        if bits[0]:
            none = torch.zeros(1, 1, 77, 90, dtype=torch.float64)
            expected = [
                (none if part.column_bias is None else cases.dense_bias(part)).expand(
                    batch, part.num_heads, -1, -1
                )
                for part in all_parts
            ]
            assert torch.equal(cases.dense_bias(joined), torch.cat(expected, 1))
        else:
            assert joined.column_bias is None
        assert (joined.block_bits is None) == (not any(bits))


@pytest.mark.parametrize("join, dim", [(SparseIndex.cat_heads, 1), (SparseIndex.stack, 0)])
def test_joining_keeps_fully_visible_blocks_of_later_parts(join, dim):
    """An id of -1 must not be shifted to the mask before a part's own, here one without any bit."""
    part = SparseIndex.from_lists(
        seqlen_q=16,
        seqlen_k=16,
        block_m=16,
        block_n=8,
        block_indptr=torch.tensor([[[0, 2]]]),
        block_indices=torch.tensor([0, 8], dtype=torch.int32),
        block_bits_ids=torch.tensor([-1, 0], dtype=torch.int32),
        block_bits=torch.zeros(1, 8, 1, dtype=torch.int64),
    )
    joined = join([part, part]).validate()
    assert joined.block_bits_ids.tolist() == [-1, 0, -1, 1]
    assert torch.equal(joined.to_dense_mask(), torch.cat([part.to_dense_mask()] * 2, dim))


def test_cat_heads_of_one_part_is_the_part():
    index = random_index()
    assert SparseIndex.cat_heads([index]) is index


@pytest.mark.parametrize(
    "change, text",
    [
        ({"seqlen_q": 78}, r"different seqlen_q, \[77, 78\]\."),
        ({"seqlen_k": 91}, r"different seqlen_k, \[90, 91\]\."),
        ({"block_m": 16}, r"different block_m, \[32, 16\]; bring them to one size with with_tiles"),
        ({"block_n": 8}, r"different block_n, \[16, 8\]; bring them to one size with with_tiles"),
        ({"batch": 3}, "batch sizes 2 and 3 differ; each part needs 1 or the same"),
    ],
)
def test_cat_heads_rejects(change, text):
    with pytest.raises(ValueError, match="SparseIndex.cat_heads: .*" + text):
        SparseIndex.cat_heads([random_index(batch=2), random_index(**change)])


# --- batches --------------------------------------------------------------------------------------


def assert_stacked(stacked: SparseIndex, parts: list[SparseIndex]) -> None:
    """Within a sequence's own lengths its keys are unchanged, and its missing tiles list none."""
    stacked.validate()
    assert stacked.seqlen_q == max(part.seqlen_q for part in parts)
    assert stacked.seqlen_k == max(part.seqlen_k for part in parts)
    assert stacked.batch_size == sum(part.batch_size for part in parts)
    b = 0
    for part in parts:
        group = stacked.num_heads // part.num_heads
        expected = brute_mask(part).repeat_interleave(group, 1)
        for of_entry in expected:
            # A streaming rule knows no list: it holds at the positions of the sequence itself.
            mine = stacked.to_dense_mask(part.seqlen_k - part.seqlen_q)[b]
            assert torch.equal(mine[:, : part.seqlen_q, : part.seqlen_k], of_entry)
            for indptr in (stacked.block_indptr[b], stacked.column_indptr[b]):
                lengths = indptr[:, part.num_tiles + 1 :] - indptr[:, part.num_tiles : -1]
                assert not lengths.any()
            b += 1


def test_stack_sequences_of_different_lengths():
    kinds = ("listed", "blocks", "columns", "empty")
    lengths = [(77, 90, 1), (10, 130, 2), (128, 33, 1)]
    for bits in (0.0, 0.5):
        parts = [
            random_index(seed, kinds=kinds, seqlen_q=q, seqlen_k=k, batch=b, bits=bits * (seed > 0))
            for seed, (q, k, b) in enumerate(lengths)
        ]
        assert_stacked(SparseIndex.stack(parts), parts)
    parts[1] = random_index(1, kinds=kinds, seqlen_q=10, seqlen_k=130, batch=2, bias="finite")
    stacked = SparseIndex.stack(parts)
    bias = cases.dense_bias(stacked)
    assert torch.equal(bias[1:3, :, :10, :130], cases.dense_bias(parts[1]))
    assert not bias[0].any() and not bias[3].any()


def test_stack_of_list_free_indexes_and_shared_heads():
    stream = {"sink": 3, "window": 9}
    parts = [
        SparseIndex.streaming(30, 70, num_heads=4, **stream),
        SparseIndex.streaming(90, 90, **stream),
    ]
    stacked = SparseIndex.stack(parts)
    assert_stacked(stacked, parts)
    assert stacked.is_list_free and stacked.num_heads == 4
    dense = [SparseIndex.dense(5, 9), SparseIndex.dense(99, 9, num_heads=2)]
    stacked = SparseIndex.stack(dense)
    assert_stacked(stacked, dense)
    assert stacked.is_list_free and stacked.heads[:, 0].tolist() == [0, 0]
    assert SparseIndex.stack(dense[:1]) is dense[0]


@pytest.mark.parametrize("bits", [0.0, 0.5])
def test_stack_lists_the_tiles_of_a_head_that_is_dense_in_one_sequence(bits):
    sizes = [(77, 90), (40, 70), (33, 121)]
    kinds = [("dense", "listed"), ("listed", "dense"), ("blocks", "empty")]
    parts = [
        random_index(seed, kinds=(*kinds[seed], "dense"), seqlen_q=q, seqlen_k=k, bits=bits)
        for seed, (q, k) in enumerate(sizes)
    ]
    stacked = SparseIndex.stack(parts)
    assert_stacked(stacked, parts)
    assert stacked.heads[:, 0].tolist() == [HeadKind.LISTED, HeadKind.LISTED, HeadKind.DENSE]


def test_stacked_sequences_attend_as_they_would_alone():
    parts = [
        random_index(seed, kinds=kinds, seqlen_q=q, seqlen_k=k, block_m=16)
        for seed, (kinds, q, k) in enumerate(
            [
                (("dense", "listed"), 30, 41),
                (("listed", "listed"), 1, 70),
                (("listed", "dense"), 50, 9),
            ]
        )
    ]
    generator = torch.Generator().manual_seed(0)
    tensors = [
        [
            torch.randn(1, 2, n, 16, generator=generator)
            for n in (part.seqlen_q, *[part.seqlen_k] * 2)
        ]
        for part in parts
    ]
    q, k, v = (torch.cat([x[0].transpose(0, 1) for x in xs]) for xs in zip(*tensors))
    ends = [torch.tensor(sizes).cumsum(0) for sizes in ([0, 30, 1, 50], [0, 41, 70, 9])]
    packed = sparse_attn.attention_varlen(
        q, k, v, *(end.int() for end in ends), 50, 70, SparseIndex.stack(parts)
    )
    alone = [sparse_attn.attention(*x, part) for x, part in zip(tensors, parts)]
    torch.testing.assert_close(packed, torch.cat([x[0].transpose(0, 1) for x in alone]))


@pytest.mark.parametrize(
    "heads",
    [
        lambda: SparseIndex.streaming(9, 9, sink=2, window=4),
        lambda: SparseIndex.streaming(9, 9, sink=1, window=5),
        lambda: SparseIndex.streaming(9, 9, sink=1, window=4, dense_tail=1),
        lambda: SparseIndex.dense(9, 9),
        lambda: cases.make_index(9, 9, kinds=["listed"]),
    ],
)
def test_stack_rejects_streaming_heads_that_differ(heads):
    stream = SparseIndex.streaming(20, 20, sink=1, window=4)
    for parts in ([stream, heads()], [heads(), stream]):
        with pytest.raises(ValueError, match="stack: head 0 streams with different rules"):
            SparseIndex.stack(parts)


def test_stack_rejects():
    with pytest.raises(ValueError, match="stack: the parts have different block_m"):
        SparseIndex.stack([random_index(), random_index(block_m=16)])
    with pytest.raises(ValueError, match="stack: the parts have different block_n"):
        SparseIndex.stack([random_index(), random_index(block_n=8)])
    with pytest.raises(ValueError, match="num_heads=3 is not a multiple of the index's 2 heads"):
        SparseIndex.stack([SparseIndex.dense(9, 9, num_heads=n) for n in (2, 3)])


@pytest.mark.parametrize("join", ["stack", "cat_heads"])
def test_nothing_to_join(join):
    with pytest.raises(ValueError, match=f"SparseIndex.{join}: no parts; pass at least one"):
        getattr(SparseIndex, join)([])


# --- granularity ----------------------------------------------------------------------------------


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**31 - 1),
    seqlen_q=st.integers(1, 200),
    seqlen_k=st.integers(1, 140),
    block_m=st.sampled_from([(48, 16), (128, 64), (128, 16), (64, 1), (32, 32), (160, 80)]),
    block_n=st.sampled_from([(8, 8), (48, 24), (64, 16), (24, 8)]),
    bits=st.sampled_from([0.0, 0.6]),
    bias=st.sampled_from([None, "finite"]),
    batch=st.integers(1, 2),
)
def test_with_tiles_keeps_every_key(block_m, block_n, **arguments):
    index = cases.make_index(
        **arguments,
        block_m=block_m[0],
        block_n=block_n[0],
        kinds=["listed", "streaming", "blocks", "columns"],
    )
    fine = index.with_tiles(block_m=block_m[1], block_n=block_n[1]).validate()
    assert (fine.block_m, fine.block_n) == (block_m[1], block_n[1])
    assert torch.equal(fine.to_dense_mask(), index.to_dense_mask())
    if arguments["bias"]:
        assert torch.equal(cases.dense_bias(fine), cases.dense_bias(index))
    else:
        assert fine.column_bias is None
    only_m = index.with_tiles(block_m=block_m[1])
    assert (only_m.block_m, only_m.block_n) == (block_m[1], block_n[0])
    assert torch.equal(only_m.validate().to_dense_mask(), index.to_dense_mask())


def test_with_tiles_of_the_same_size_is_the_index():
    index = random_index()
    assert index.with_tiles() is index and index.with_tiles(block_m=32, block_n=16) is index


@pytest.mark.parametrize(
    "sizes, text",
    [
        ({"block_m": 64}, "block_m=64 does not divide 48"),
        ({"block_m": 32}, "block_m=32 does not divide 48"),
        ({"block_n": 48}, "block_n=48 does not divide 24"),
        ({"block_n": 16}, "block_n=16 does not divide 24"),
    ],
)
def test_with_tiles_only_refines_lists(sizes, text):
    index = random_index(block_m=48, block_n=24)
    with pytest.raises(ValueError, match=f"with_tiles: {text}; lists can only be refined"):
        index.with_tiles(**sizes)


def test_with_tiles_takes_any_size_without_lists():
    rule = {"sink": 5, "window": 20, "dense_tail": 3}
    index = SparseIndex.streaming(77, 90, num_heads=2, block_m=16, block_n=24, **rule)
    coarse = index.with_tiles(block_m=128, block_n=40).validate()
    assert (coarse.num_tiles, coarse.block_n) == (1, 40)
    assert torch.equal(coarse.to_dense_mask(), index.to_dense_mask())
    empty = SparseIndex.from_dense_mask(torch.zeros(2, 3, 40, 40, dtype=torch.bool))
    stacked = SparseIndex.stack([index, index])
    for batched in (empty, stacked):
        fine = batched.with_tiles(block_m=16).validate()
        assert fine.batch_size == 2
        assert torch.equal(fine.to_dense_mask(), brute_mask(batched))


def test_every_public_method_has_a_test_here_or_with_the_converters():
    """A method added to SparseIndex should show up in this list, and so in a test."""
    members = inspect.getmembers(SparseIndex, lambda m: callable(m) or isinstance(m, property))
    fields = {field.name for field in dataclasses.fields(SparseIndex)}
    assert {name for name, _ in members if not name.startswith("_")} - fields == {
        *("dense", "streaming", "from_lists", "from_dense_mask", "from_blocks", "from_bsr"),
        *("from_block_mask", "from_block_sparse_attention", "from_vertical_slash_lists"),
        *("to_block_mask", "batch_size", "num_heads", "num_tiles", "device", "is_list_free"),
        *("op_args", "to", "validate", "to_dense_mask", "density", "select_heads"),
        *("expand_heads", "cat_heads", "stack", "with_tiles"),
        "draw",  # tests/test_drawing.py
    }
