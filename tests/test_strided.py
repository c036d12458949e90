# SPDX-License-Identifier: Apache-2.0
"""Dilated and strided patterns, and the presets over static ones, against their rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_attn
from sparse_attn import AShape, Dense, Dilated, PerHead, StridedBlocks, presets


def tensors(batch: int, heads: int, heads_kv: int, seqlen_q: int, seqlen_k: int):
    return torch.zeros(batch, heads, seqlen_q, 8), torch.zeros(batch, heads_kv, seqlen_k, 8)


def by_rule(sees, seqlen_q: int, seqlen_k: int, offset: int, causal: bool) -> torch.Tensor:
    """bool [seqlen_q, seqlen_k]: `sees(positions, keys)`, and causality."""
    p = (torch.arange(seqlen_q) + offset)[:, None].expand(seqlen_q, seqlen_k)
    j = torch.arange(seqlen_k).expand(seqlen_q, seqlen_k)
    return sees(p, j) & (j <= p) if causal else sees(p, j)


@st.composite
def call(draw):
    """Lengths, heads, offset, causality."""
    length = st.one_of(st.integers(1, 150), st.sampled_from([1, 63, 64, 65, 200, 513, 700]))
    seqlen_q, seqlen_k = draw(length), draw(length)
    offset = draw(st.one_of(st.none(), st.integers(-70, 170)))
    return seqlen_q, seqlen_k, offset, draw(st.booleans())


def visible(pattern, q, k, offset, causal) -> torch.Tensor:
    """The mask over all query heads, causality included."""
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    index = pattern.build(q, k, causal=causal, q_offset=offset).validate()
    mask = index.expand_heads(q.shape[1]).to_dense_mask()
    first = seqlen_k - seqlen_q if offset is None else offset
    limit = torch.arange(seqlen_q)[:, None] + first
    return mask & (torch.arange(seqlen_k) <= limit) if causal else mask


# --- dilated --------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    shape=call(),
    sink=st.integers(0, 90),
    local=st.integers(0, 90),
    window=st.integers(0, 150),
    stride=st.sampled_from([1, 2, 3, 70]),
)
def test_dilated_equals_its_rule(shape, sink, local, window, stride):
    seqlen_q, seqlen_k, offset, causal = shape
    first = seqlen_k - seqlen_q if offset is None else offset

    def sees(p, j):
        s = p - j
        dilated = (s < window) & (s % stride == 0)
        return (j < sink) | ((s >= 0) & ((s < local) | dilated))

    pattern = Dilated(sink=sink, local=local, window=window, stride=stride)
    found = visible(pattern, *tensors(2, 4, 2, seqlen_q, seqlen_k), offset, causal)
    expected = by_rule(sees, seqlen_q, seqlen_k, first, causal)
    assert torch.equal(found, expected.expand_as(found))


def test_dilated_by_hand():
    mask = visible(
        Dilated(sink=1, local=0, window=5, stride=2), *tensors(1, 1, 1, 6, 6), None, True
    )
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 0, 1, 0, 1, 0],
        [1, 1, 0, 1, 0, 1],
    ]


def test_dilated_with_stride_one_is_a_shape():
    q, k = tensors(1, 2, 1, 300, 300)
    found = visible(Dilated(sink=7, local=0, window=90, stride=1), q, k, None, True)
    assert torch.equal(found, visible(AShape(sink=7, window=90), q, k, None, True))


# --- strided blocks -------------------------------------------------------------------------------


@settings(max_examples=300)
@given(
    shape=call(),
    heads_kv=st.integers(1, 3),
    group=st.integers(1, 3),
    block=st.sampled_from([16, 32]),
    local_blocks=st.integers(1, 3),
    vert_stride=st.integers(1, 6),
    offset=st.integers(0, 5),
    head_step=st.sampled_from([None, 0, 1, 2]),
    dense_heads=st.integers(0, 2),
)
def test_strided_blocks_equal_their_rule(
    shape, heads_kv, group, block, local_blocks, vert_stride, offset, head_step, dense_heads
):
    seqlen_q, seqlen_k, q_offset, causal = shape
    first = seqlen_k - seqlen_q if q_offset is None else q_offset
    pattern = StridedBlocks(
        block=block,
        local_blocks=local_blocks,
        vert_stride=vert_stride,
        offset=offset,
        head_step=head_step,
        dense_heads=dense_heads,
    )
    q, k = tensors(1, heads_kv * group, heads_kv, seqlen_q, seqlen_k)
    found = visible(pattern, q, k, q_offset, causal)[0]
    step = max(1, vert_stride // heads_kv) if head_step is None else head_step
    for h in range(heads_kv * group):
        kv = h // group

        def sees(p, j, kv=kv):
            if kv >= heads_kv - dense_heads:
                return torch.ones_like(p, dtype=torch.bool)
            near = (p // block - j // block).abs() < local_blocks
            return near | ((j // block + kv * step + offset) % vert_stride == 0)

        assert torch.equal(found[h], by_rule(sees, seqlen_q, seqlen_k, first, causal))


def test_strided_blocks_by_hand():
    # Eight blocks of 16; two heads, columns 3 and 7 of head 0, 1 and 5 of head 1 (step 2).
    index = StridedBlocks(block=16, local_blocks=2, vert_stride=4, offset=1).build(
        *tensors(1, 2, 2, 128, 128)
    )
    starts = index.block_indptr[0, :, :]
    lists = [
        [(index.block_indices[a:b] // 16).tolist() for a, b in zip(row[:-1], row[1:], strict=True)]
        for row in starts
    ]
    assert lists == [
        [[0], [0, 1], [1, 2], [2, 3], [3, 4], [3, 4, 5], [3, 5, 6], [3, 6, 7]],
        [[0], [0, 1], [1, 2], [1, 2, 3], [1, 3, 4], [1, 4, 5], [1, 5, 6], [1, 5, 6, 7]],
    ]


def test_a_block_once_unseen_stays_unseen():
    """What lets a cache drop blocks."""
    pattern = StridedBlocks(block=16, local_blocks=2, vert_stride=4)
    mask = visible(pattern, *tensors(1, 2, 2, 200, 200), None, True)[0]
    for head in mask:
        for j in range(200):
            seen = head[j:, j]
            stopped = (~seen).nonzero()
            assert stopped.numel() == 0 or not seen[int(stopped[0]) :].any()


def test_heads_that_are_alike_share_one_list():
    q, k = tensors(1, 4, 4, 100, 100)
    assert StridedBlocks(block=16, vert_stride=4, head_step=0).build(q, k).num_heads == 1
    assert StridedBlocks(block=16, vert_stride=1).build(q, k).num_heads == 1
    assert StridedBlocks(block=16, vert_stride=4).build(q, k).num_heads == 4


def test_strided_blocks_in_bands_are_the_same(monkeypatch):
    q, k = tensors(1, 3, 3, 130, 150)
    whole = StridedBlocks(block=16, local_blocks=1, vert_stride=4).build(q, k)
    from sparse_attn.patterns import strided

    original = strided.bands
    monkeypatch.setattr(strided, "bands", lambda *shape: original(*shape[:3], limit=25))
    banded = StridedBlocks(block=16, local_blocks=1, vert_stride=4).build(q, k)
    for name in ("block_indptr", "block_indices", "block_bits_ids"):
        assert torch.equal(getattr(banded, name), getattr(whole, name))


# --- presets over static patterns -----------------------------------------------------------------


def test_presets_are_their_patterns():
    assert presets.dilated().pattern == Dilated(1024, 0, 8192, 2)
    assert presets.dilated(2).pattern == Dilated(1024, 2048, 4096, 2)
    assert presets.lm_infinite().pattern == AShape(sink=10, window=4096)
    assert presets.longgen().pattern.head_step == 0
    assert presets.s2(dense_heads=1).pattern == StridedBlocks(64, 32, 8, dense_heads=1)
    assert presets.qwen2_5_1m().pattern.chunk == 32768


def test_lm_infinite_equals_its_rule():
    found = visible(presets.lm_infinite(3, 20), *tensors(1, 1, 1, 60, 75), None, True)
    expected = by_rule(lambda p, j: (p - j < 20) | (j < 3), 60, 75, 15, True)
    assert torch.equal(found[0, 0], expected)


def test_duo_attention_equals_its_rule():
    pattern = presets.duo_attention([False, True, False], group=2, sink=4, recent=9)
    assert not pattern.data_dependent
    found = visible(pattern, *tensors(1, 6, 3, 40, 70), None, True)[0]
    for h in range(6):
        full = h // 2 == 1

        def sees(p, j, full=full):
            return (j < 4) | (p - j < (1000 if full else 9))

        assert torch.equal(found[h], by_rule(sees, 40, 70, 30, True))


def test_windows_of_their_own_for_each_head():
    """MoA: sinks, and a window per head."""
    spans = [12, 40, 25, 70]
    pattern = PerHead([AShape(sink=4, window=span - 4) for span in spans])
    found = visible(pattern, *tensors(1, 4, 2, 80, 80), None, True)[0]
    for mask, span in zip(found, spans, strict=True):
        expected = by_rule(lambda p, j, w=span - 4: (j < 4) | (p - j < w), 80, 80, 0, True)
        assert torch.equal(mask, expected)


# --- what they share ------------------------------------------------------------------------------

SHARED = {
    "dilated": Dilated(sink=5, local=9, window=90, stride=3),
    "strided": StridedBlocks(block=16, local_blocks=2, vert_stride=4),
    "dense heads": StridedBlocks(block=16, local_blocks=2, vert_stride=4, dense_heads=1),
    "duo": presets.duo_attention([True, False], group=2),
}


@pytest.mark.parametrize("pattern", SHARED.values(), ids=SHARED)
def test_they_compile_into_one_graph(pattern):
    def attend(q, k, v):
        return sparse_attn.attention(q, k, v, pattern)

    q, k, v = torch.randn(1, 4, 130, 16), torch.randn(1, 2, 197, 16), torch.randn(1, 2, 197, 16)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), attend(q, k, v))


@pytest.mark.parametrize("pattern", SHARED.values(), ids=SHARED)
def test_they_read_no_data(pattern):
    assert not pattern.data_dependent
    q, k = tensors(1, 4, 2, 130, 197)
    mask = pattern.build(q, k).to_dense_mask()
    assert torch.equal(
        pattern.build(torch.randn_like(q), torch.randn_like(k)).to_dense_mask(), mask
    )


@pytest.mark.parametrize("pattern", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_no_rows_or_no_keys(pattern, lengths):
    index = pattern.build(*tensors(1, 4, 2, *lengths)).validate()
    assert index.block_indices.numel() == index.column_indices.numel() == 0


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Dilated(sink=-1), ValueError, "Dilated: sink=-1 is below 0"),
        (lambda: Dilated(local=-1), ValueError, "Dilated: local=-1 is below 0"),
        (lambda: Dilated(window=1.0), TypeError, "Dilated: window=1.0 is a float"),
        (lambda: Dilated(stride=0), ValueError, "Dilated: stride=0 is below 1"),
        (lambda: StridedBlocks(block=24), ValueError, "block=24 is not a multiple of 16"),
        (lambda: StridedBlocks(local_blocks=0), ValueError, "local_blocks=0 is below 1"),
        (lambda: StridedBlocks(vert_stride=0), ValueError, "vert_stride=0 is below 1"),
        (lambda: StridedBlocks(offset=-1), ValueError, "offset=-1 is below 0"),
        (lambda: StridedBlocks(head_step=-1), ValueError, "head_step=-1 is below 0"),
        (lambda: StridedBlocks(dense_heads=True), TypeError, "dense_heads=True is a bool"),
        (lambda: presets.dilated(3), ValueError, "presets.dilated: variant=3 is unknown"),
        (lambda: presets.duo_attention([]), ValueError, "presets.duo_attention: mask is empty"),
        (lambda: presets.duo_attention([0.5]), TypeError, "mask holds a float, 0.5; pass bools"),
        (lambda: presets.duo_attention([True], group=0), ValueError, "group=0 is below 1"),
        (
            lambda: PerHead([Dense(), presets.duo_attention([True])]),
            ValueError,
            "PerHead: the pattern of head 1 is a PerHead itself",
        ),
    ],
)
def test_messages(make, error, text):
    with pytest.raises(error, match=rf"sparse_attn\..*{text}"):
        make()


@pytest.mark.parametrize("pattern", [Dilated(), StridedBlocks()], ids=lambda p: type(p).__name__)
def test_build_rejects_tensors_that_do_not_fit(pattern):
    with pytest.raises(ValueError, match=rf"sparse_attn\.{type(pattern).__name__}\.build: q has 3"):
        pattern.build(torch.zeros(4, 8, 8), torch.zeros(1, 4, 8, 8))
