# SPDX-License-Identifier: Apache-2.0
"""Every pattern off the CPU: it chooses what it chooses on the CPU, and nothing is read back.

There is no GPU here. So the same code runs on CPU tensors with the native operators left out, under
a mode that refuses what would wait for a device; and on tensors of the meta device, which have no
data that could be read.
"""

import contextlib
import importlib

import pytest
import torch
from test_every_pattern import EVERY, PRESETS
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_attn
from sparse_attn import CentroidIndex, CentroidLookup, PerHead, SparseIndex, ops
from sparse_attn.lists import indptr_from_counts, unpack_bits
from sparse_attn.selection import hip, spherical_kmeans

WAITS = {
    "aten::_local_scalar_dense": "item, int, bool",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::repeat_interleave": "repeat_interleave by a tensor",
    "aten::bincount": "bincount",
    "aten::_unique2": "unique",
    "aten::equal": "equal",
    "aten::lift_fresh": "a tensor from Python's numbers, which is copied there",
}


class Waiting(TorchDispatchMode):
    """Refuses operations for which the host waits for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        by_mask = name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        static = name == "aten::repeat_interleave" and not func.name().endswith("Tensor")
        # x[...] = 2 makes a tensor of the 2, and fills with it.
        static = static or (name == "aten::lift_fresh" and args[0].dim() == 0)
        if (name in WAITS and not static) or by_mask:
            raise AssertionError(f"{func.name()} waits: {WAITS.get(name, 'indexing by a mask')}")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def off_cpu():
    """Plain torch in place of the native operators, and nothing may wait."""
    with pytest.MonkeyPatch.context() as patch, Waiting():
        patch.setattr(ops, "on_cpu", lambda x: False)
        yield


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum().item(),
        lambda x: int(x.sum()),
        lambda x: x if (x > 1).any() else -x,
        lambda x: x[x > 1],
        lambda x: x.masked_select(x > 1),
        lambda x: (x > 1).nonzero(),
        lambda x: torch.where(x > 1),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.unique(),
        lambda x: torch.tensor([1.0, 2.0]),
        lambda x: x[[0, 2]],
        lambda x: x.tolist(),
    ],
)
def test_what_waits_is_seen(call):
    with pytest.raises(AssertionError, match="waits"), off_cpu():
        call(torch.tensor([0.0, 1.0, 2.0]))


# --- the same choice ---

LIVE = (1, 2, 4, 8, 16, 32, 64, 128)


def inputs(seqlen_q, seqlen_k, seed=0, batch=2, heads=4, heads_kv=2, dim=8):
    """Scores that are exact in float32, whatever the order of sums.

    A query is one of the unit vectors, so that its logits are one coordinate of all keys: 0 for a
    number of keys that is a power of two, and far below 0 for all others.
    """
    generator = torch.Generator().manual_seed(seed)
    k = torch.full((batch, heads_kv, seqlen_k, dim), -(2.0**14))
    # No live key follows a row that looks for it: each row's softmax has as many as another's.
    past = max(1, seqlen_k - seqlen_q)
    for head in k.flatten(0, 1):
        for d, live in enumerate(LIVE):
            if live <= past:
                head[torch.randperm(past, generator=generator)[:live], d] = 0.0
    usable = sum(live <= past for live in LIVE)
    which = torch.randint(usable, (batch, heads, seqlen_q), generator=generator)
    return torch.nn.functional.one_hot(which, dim).float(), k


def whole_numbers(seqlen_q, seqlen_k, seed=0, batch=2, heads=4, heads_kv=2, dim=8):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-3, 4, (batch, heads, seqlen_q, dim), generator=generator).float()
    k = torch.randint(-3, 4, (batch, heads_kv, seqlen_k, dim), generator=generator).float()
    return q, k


def lists_of(index: SparseIndex):
    """Blocks with what their rows see, and columns, of every tile."""
    found = []
    for indptr, indices in (
        (index.block_indptr, index.block_indices),
        (index.column_indptr, index.column_indices),
    ):
        begins, ends = indptr[..., :-1].flatten().tolist(), indptr[..., 1:].flatten().tolist()
        found.append([indices[b:e].tolist() for b, e in zip(begins, ends, strict=True)])
        if indices is index.block_indices and index.block_bits is not None:
            rows = unpack_bits(index.block_bits, index.block_m)
            entries = [index.block_bits_ids[b:e].tolist() for b, e in zip(begins, ends)]
            found.append([[rows[i] if i >= 0 else None for i in tile] for tile in entries])
    return found


def assert_same(native: SparseIndex, found: SparseIndex, rows: int) -> None:
    for name in ("seqlen_q", "seqlen_k", "block_m", "block_n", "batch_size", "num_heads"):
        assert getattr(native, name) == getattr(found, name), name
    found.validate()
    assert torch.equal(native.heads, found.heads)
    ours, theirs = lists_of(native), lists_of(found)
    assert ours[0] == theirs[0] and ours[-1] == theirs[-1]
    assert len(ours) == len(theirs)
    if len(ours) == 3:
        tiles = native.num_tiles
        for number, (own, other) in enumerate(zip(ours[1], theirs[1], strict=True)):
            # Rows past the end of a tile, and keys past the end of all, mean nothing.
            seen = min(native.block_m, rows - number % tiles * native.block_m)
            for start, a, b in zip(ours[0][number], own, other, strict=True):
                keys = min(native.block_n, native.seqlen_k - start)
                a, b = (torch.ones(seen, keys, dtype=torch.bool) if x is None else
                        x[:seen, :keys] for x in (a, b))  # fmt: skip
                assert torch.equal(a, b)


READS_BACK = {
    "VerticalSlash, exact": "the room that its masks may need is not bounded",
}
# Keys are clustered in the call itself, whose means are summed in another order: see below.
CLUSTERS = ("CentroidLookup", "presets.squeezed")
SHAPES = [(130, 301), (333, 333), (1, 129), (5, 5), (70, 71)]
NAMES = [name for name in EVERY if name not in READS_BACK]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in CLUSTERS])
def test_patterns_choose_the_same(name, causal):
    for seed, (seqlen_q, seqlen_k) in enumerate(SHAPES):
        heads = 6 if isinstance(getattr(EVERY[name](), "pattern", EVERY[name]()), PerHead) else 4
        for make in (inputs, whole_numbers):
            softmax = any(x in name for x in ("Slash", "lex", "minf", "qwen", "PerHead"))
            if softmax and make is whole_numbers:
                continue  # its sums of probabilities are rounded
            q, k = make(seqlen_q, seqlen_k, seed, heads=heads)
            options = {"causal": causal, "softmax_scale": 0.25}
            try:
                native = EVERY[name]().build(q, k, **options)
            except ValueError as error:
                assert not causal and "causal" in str(error)
                return
            with off_cpu():
                found = EVERY[name]().build(q, k, **options)
            assert_same(native, found, seqlen_q)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize(
    "options",
    [{"percentile": 0.6}, {"threshold": 0.01}, {"budget": 40}, {"percentile": 0.5, "tile": 16}],
)
def test_centroid_lookup(options, levels):
    q, k = inputs(70, 301)
    index = CentroidIndex.fit(k[:, :, :200], ratio=0.2, observation_window=12, levels=levels)
    coarse = {"coarse_percentile": 0.3} if levels == 2 else {}
    lookup = CentroidLookup(index=index, **options, **coarse)
    native = lookup.build(q, k)
    with off_cpu():
        found = lookup.build(q, k)
    assert_same(native, found, 70)


@pytest.mark.parametrize("name", CLUSTERS)
def test_keys_are_clustered_in_the_call(name):
    for seqlen_q, seqlen_k in SHAPES:
        q, k = whole_numbers(seqlen_q, seqlen_k)
        with off_cpu():
            found = EVERY[name]().build(q, k, softmax_scale=0.25)
        found.validate()


@pytest.mark.parametrize("seed", range(6))
def test_clusters_are_the_same(seed):
    """Keys along the axes, whose sums are exact; fewer clusters than axes, or more."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randint(8, (2, 3, 90), generator=generator)
    lengths = torch.randint(-3, 4, (2, 3, 90, 1), generator=generator)
    keys = torch.nn.functional.one_hot(axes, 8) * torch.exp2(lengths)
    options = {"iterations": 1 + seed, "seed": seed, "tolerance": 0.0}
    native = spherical_kmeans(keys, (3, 5, 12)[seed % 3], **options)
    with off_cpu():
        found = spherical_kmeans(keys, (3, 5, 12)[seed % 3], **options)
    assert torch.equal(native, found)


@pytest.mark.parametrize("seed", range(40))
def test_hierarchical_search(seed):
    """Scores with many ties; every stage on what the one before kept."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    heads_kv, group = draw(1, 2), draw(1, 2)
    seqlen_q, seqlen_k = draw(1, 90), draw(1, 400)
    q = torch.randint(-1, 2, (draw(1, 2), heads_kv * group, seqlen_q, 8), generator=generator)
    k = torch.randint(-1, 2, (q.shape[0], heads_kv, seqlen_k, 8), generator=generator).float()
    if seed % 5 == 0:
        k[:, :, :: draw(2, 9)] = torch.nan
    options = {
        "q_offset": draw(-20, seqlen_k),
        "softmax_scale": 0.5,
        "block_m": (1, 16, 32)[seed % 3],
        "sink": draw(0, 20),
        "window": draw(0, 60),
        "lists": (heads_kv * group, heads_kv, 1)[seed // 3 % 3],
    }
    leaf, stride_k = draw(1, 9), draw(1, 3)
    chunk, small = 1 << draw(1, 5), 1 << draw(0, 1)
    tree = {"stride_q": draw(1, 3), "groups": draw(1, 12), "leaf": leaf, "stride_k": stride_k}
    first = {"stride_q": 2, "chunk": chunk, "keep": draw(1, 9), "overlap": chunk}
    second = {"stride_q": 1, "chunk": small, "keep": draw(1, 9), "overlap": chunk}
    lists = {x: options[x] for x in ("q_offset", "block_m", "sink", "window")}
    lists.update(seqlen_q=seqlen_q, seqlen_k=seqlen_k, block_n=8)

    def search():
        found = [hip.hip_tree(q.float(), k, center=seed % 2 == 0, **tree, **options)]
        found.append(hip.hip_stage(q.float(), k, parents=None, parent_chunk=0, **first, **options))
        before = {"parents": found[-1], "parent_chunk": chunk}
        found.append(hip.hip_stage(q.float(), k, **before, **second, **options))
        return found

    native = search()
    with off_cpu():
        found = search()
        built = hip.leaf_lists(found[0], leaf=leaf, **lists)
    for ours, theirs in zip(native, found, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert_same(
        *(index_of_lists(x, lists) for x in (hip.leaf_lists(found[0], leaf=leaf, **lists), built)),
        seqlen_q,
    )


def index_of_lists(parts, lists) -> SparseIndex:
    block_counts, blocks, ids, masks, column_counts, columns = parts
    sizes = {x: lists[x] for x in ("seqlen_q", "seqlen_k", "block_m", "block_n")}
    return SparseIndex.from_lists(
        **sizes,
        block_indptr=indptr_from_counts(block_counts),
        block_indices=blocks,
        block_bits_ids=ids,
        block_bits=masks.view(-1, 8, 1),
        column_indptr=indptr_from_counts(column_counts),
        column_indices=columns,
    )


MIXED = {
    "sizes": lambda: PerHead(
        {0: sparse_attn.BlockSparse(top_k=2, block_m=64, block_n=64),
         1: sparse_attn.BlockSparse(top_k=3, block_m=32, block_n=16),
         2: sparse_attn.StridedBlocks(block=16, local_blocks=2, vert_stride=4, head_step=0),
         3: sparse_attn.Dilated(sink=5, local=9, window=90, stride=3)}
    ),
    "streaming": lambda: PerHead(
        {1: sparse_attn.AnchorAttention(block=16, step=2, sink=8), 3: sparse_attn.Dense()},
        default=sparse_attn.AShape(sink=4, window=24),
    ),
    "lists of a KV head": lambda: PerHead(
        {0: sparse_attn.HiP(mask_k=32, window=40, sink=3, share="kv")},
        default=sparse_attn.Adaptive(recall=0.6, block_m=32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_mixed_heads(name):
    for seqlen_q, seqlen_k in ((130, 301), (1, 129), (333, 333)):
        q, k = whole_numbers(seqlen_q, seqlen_k)
        native = MIXED[name]().build(q, k, softmax_scale=0.25)
        with off_cpu():
            found = MIXED[name]().build(q, k, softmax_scale=0.25)
        assert_same(native, found, seqlen_q)


@pytest.mark.parametrize("shared", [True, False])
def test_refined_lists(shared):
    """Biases, bits, gaps; and heads that share entries, where they are said to."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(2, 2, 130, 200, generator=generator) < 0.5
    index = SparseIndex.from_dense_mask(mask, block_m=64, block_n=32)
    columns = SparseIndex.from_lists(
        seqlen_q=130, seqlen_k=200, block_m=64, block_n=32,
        column_indptr=torch.tensor([0, 2, 2, 5]).expand(2, 1, 4),
        column_indices=torch.tensor([3, 199, 0, 7, 8, 0], dtype=torch.int32),
        column_bias=torch.tensor([0.5, 1.0, -1.0, 2.0, 0.25, 0.0]),
    )  # fmt: skip
    for whole in (index, columns) if shared else (index,):
        whole = whole.select_heads([0, whole.num_heads - 1, 0]) if shared else whole
        native = whole.with_tiles(block_m=32, block_n=8)
        with off_cpu():
            found = whole.with_tiles(block_m=32, block_n=8, shared=shared)
        assert_same(native, found, 130)
        if whole.column_bias is not None:
            n = native.column_bias.shape[0]
            assert torch.equal(native.column_bias, found.column_bias[:n])


# --- no data at all ---


@pytest.mark.parametrize("name", NAMES)
def test_tensors_without_data(name):
    q = torch.empty(2, 6, 200, 64, device="meta")
    k = torch.empty(2, 3, 331, 64, device="meta")
    index = EVERY[name]().build(q, k)
    assert index.block_indptr.device.type == "meta"


def call_without_data(name):
    """A public call whose tensors are on the meta device."""
    q, table = torch.empty(2, 4, 1, 64, device="meta"), torch.empty(2, 4, device="meta").int()
    k, pool = (torch.empty(*x, 64, device="meta") for x in ((2, 2, 300), (9, 16, 2)))
    lens = torch.empty(2, dtype=torch.int32, device="meta")
    if name == "lengths":
        return sparse_attn.attention_decode(q, k, k, cache_seqlens=lens)
    if name == "pages":
        return sparse_attn.attention_decode(q, pool, pool, cache_seqlens=lens, block_table=table)
    if name == "a number":  # which is known
        return sparse_attn.attention_decode(q, k, k, cache_seqlens=200)
    cu = torch.empty(3, dtype=torch.int32, device="meta")
    packed = [torch.empty(90, heads, 64, device="meta") for heads in (4, 2, 2)]
    return sparse_attn.attention_varlen(*packed, cu, cu, 60, 60)


@pytest.mark.parametrize("name", ["lengths", "pages", "a number", "packed"])
def test_lengths_are_not_read(name, monkeypatch):
    """They get to the operator on the device of q, which asks for that."""
    front = importlib.import_module("sparse_attn.attention")
    seen = []

    def attend(q, k, v, index, **call):
        seen.append(call["seq_ranges"])
        return q, q

    monkeypatch.setattr(front.ops, "attention", attend)
    monkeypatch.setattr(front.backends, "choose", lambda *problem: "cuda")
    call_without_data(name)
    (ranges,) = seen
    assert ranges.device.type == "meta" and ranges.shape == (2, 5) and ranges.dtype == torch.int32
    assert ranges.is_contiguous()


def test_nothing_is_left_out():
    assert {*READS_BACK, *CLUSTERS} <= {*EVERY} and PRESETS
