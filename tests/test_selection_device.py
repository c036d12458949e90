# SPDX-License-Identifier: Apache-2.0
"""Selection off the CPU: the plain torch forms choose as the native operators do, and read nothing
back, so that a call can be captured in a CUDA graph.

Tensors of the meta device have shapes and no data: whatever waits for a value raises on them. Whole
patterns are in tests/test_patterns_device.py.
"""

import pytest
import torch

import sparse_attn
from sparse_attn import ops, selection
from sparse_attn.lists import indptr_from_counts, list_blocks, marked_positions
from sparse_attn.selection import anchor, centroids
from sparse_attn.selection.blocks import BlockGrid, blocks_index


def integers(*shape: int, seed: int, most: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).float()


def rows_of(counts: torch.Tensor, values: torch.Tensor) -> list[list[int]]:
    """Lists laid end to end, one by one; what lies past the last one does not count."""
    ends = counts.flatten().cumsum(0).tolist()
    return [values[a:b].tolist() for a, b in zip([0, *ends[:-1]], ends, strict=True)]


# --- the same choice ---


@pytest.mark.parametrize("shape", [(3, 0), (0, 4), (1, 1), (2, 3, 17), (5, 64)])
def test_marked_positions_are_those_of_nonzero(shape, monkeypatch):
    monkeypatch.setattr(ops, "on_cpu", lambda x: False)
    generator = torch.Generator().manual_seed(len(shape))
    for share in (0.0, 0.3, 1.0):
        mask = torch.rand(shape, generator=generator) < share
        found = marked_positions(mask)
        marks = int(mask.sum())
        assert found.dtype == torch.int32 and found.shape == (mask.numel(),)
        assert torch.equal(found[:marks].long(), mask.nonzero()[:, -1])
        assert not bool(found[marks:].any())


ANCHORS = [(seed, causal) for seed in range(20) for causal in (True, False)]


@pytest.mark.parametrize(("seed", "causal"), ANCHORS)
def test_anchor_lists(seed, causal):
    """Small integers: every sum is exact in float32, whatever its order."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    heads_kv, group = draw(1, 2), draw(1, 3)
    seqlen_q, seqlen_k = draw(1, 150), draw(1, 260)
    q = integers(draw(1, 2), heads_kv * group, seqlen_q, 8, seed=seed)
    k = integers(q.shape[0], heads_kv, seqlen_k, 8, seed=seed + 100)
    if seed % 4 == 0:
        k[:, :, :: max(1, seqlen_k // 3)] = torch.nan
        q[:, :, ::7] = torch.nan
    block, step, sink = 16, draw(1, 4), draw(0, 70)
    offset = draw(-40, seqlen_k)
    numbers = {"q_offset": offset, "causal": causal, "softmax_scale": 0.5, "block_n": 64}
    theta = float(draw(-4, 8))
    native = ops.anchor_lists(q, k, block=block, step=step, sink=sink, theta=theta, **numbers)
    supers = anchor._superblocks(seqlen_q, seqlen_k, block * step, sink, offset, causal)
    found = anchor._anchor_lists_torch(q, k, supers, block, theta, offset, causal, 0.5, 64)
    for i in (0, 2):
        assert torch.equal(found[i], native[i])
        assert rows_of(found[i], found[i + 1]) == rows_of(native[i], native[i + 1])


@pytest.mark.parametrize("budget", [None, 1, 40])
@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_centroid_lists(threshold, budget):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (2, 3, 77), generator=generator).int()
    labels[labels == 4] = 5
    indptr, members = selection.cluster_members(labels, 9)
    scores = torch.randint(-1, 4, (2, 3, 5, 9), generator=generator).float() / 4
    scores[0, 0, 0] = torch.nan
    scores[1, 2, 3] = -1.0
    native = selection.centroid_lists(scores, indptr, members, threshold=threshold, budget=budget)
    found = centroids._centroid_lists_torch(scores, indptr, members, threshold, budget)
    assert torch.equal(found[0], native[0]) and torch.equal(found[1], native[1])
    assert rows_of(found[1], found[2]) == rows_of(native[1], native[2])


def test_clusters_of_places():
    labels = torch.tensor([[[2, 0, 2, 5, 0, 0]]], dtype=torch.int32)
    indptr, members = selection.cluster_members(labels, 6)
    assert centroids._cluster_of_places(indptr, members).tolist() == [[[0, 0, 0, 2, 2, 5]]]


# --- nothing is read back ---


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


GRID = BlockGrid(200, 331, 64, 64, q_offset=131, causal=True, sink_blocks=1, local_blocks=1)
SCORES = (2, 4, 4, 6)
OPERATIONS = {
    "pool": lambda: selection.pool(meta(2, 4, 331, 64), 64, "direction"),
    "top_k_indices": lambda: selection.top_k_indices(meta(2, 4, 331), 17),
    "block_top_k": lambda: selection.block_top_k(meta(*SCORES), 3, GRID),
    "block_top_p": lambda: selection.block_top_p(meta(*SCORES), 0.5, GRID, logits=True),
    "block_threshold": lambda: selection.block_threshold(meta(*SCORES), 0.1, GRID),
    "list_blocks": lambda: list_blocks(meta(*SCORES, dtype=torch.bool), 64),
    "blocks_index": lambda: blocks_index(
        [meta(2, 4, 2, 6, dtype=torch.bool)] * 2, GRID, 2, 4, torch.device("meta")
    ),
    "nearest_centroids": lambda: selection.nearest_centroids(
        meta(2, 3, 77, 64), meta(2, 3, 9, 64)
    ),
    "cluster_members": lambda: selection.cluster_members(meta(2, 3, 77, dtype=torch.int32), 9),
    "cluster_means": lambda: selection.cluster_means(
        meta(2, 3, 77, 64), None, meta(2, 3, 10, dtype=torch.int64),
        meta(2, 3, 77, dtype=torch.int32),
    ),
    "centroid_lists": lambda: selection.centroid_lists(
        meta(2, 3, 5, 9), meta(2, 3, 10, dtype=torch.int64), meta(2, 3, 77, dtype=torch.int32),
        threshold=0.1, budget=40,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_read_nothing_back(name):
    result = OPERATIONS[name]()
    tensors = result if isinstance(result, tuple) else [getattr(result, "block_indices", result)]
    assert all(x.device.type == "meta" for x in tensors)


def test_a_read_back_raises():
    """What these tests rest on."""
    with pytest.raises(RuntimeError, match="meta"):
        meta(3).sum().item()
    with pytest.raises(NotImplementedError):
        meta(3).nonzero()


def test_lists_with_spare_room_are_an_index(monkeypatch):
    """As a device builds them, on the CPU: validated, and the same keys as the tight lists."""
    mask = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(1)) < 0.4
    sizes = {"seqlen_q": 256, "seqlen_k": 384, "block_m": 64, "block_n": 64}
    counts, tight = list_blocks(mask, 64)
    indptr = indptr_from_counts(counts)
    monkeypatch.setattr(ops, "on_cpu", lambda x: False)
    masks = [
        sparse_attn.SparseIndex.from_lists(**sizes, block_indptr=indptr, block_indices=indices)
        .validate()
        .to_dense_mask()
        for indices in (tight, marked_positions(mask) * 64)
    ]
    assert torch.equal(*masks)
