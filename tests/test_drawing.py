# SPDX-License-Identifier: Apache-2.0
"""Pictures of an index, in characters and with matplotlib, against the index's boolean mask."""

import pytest
import torch
from test_every_pattern import EVERY, inputs

from sparse_attn import AShape, Dense, HeadPlan, PerHead, PlannedHead, SparseIndex, VerticalSlash
from sparse_attn.drawing import grid, row_keys


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(150, 150), (37, 120), (1, 90)])
def test_a_row_of_the_picture_is_a_row_of_the_mask(name, seqlen_q, seqlen_k):
    q, k, _ = inputs(seqlen_q, seqlen_k)
    index = EVERY[name]().build(q, k)
    mask = index.to_dense_mask()
    offset = seqlen_k - seqlen_q
    for head in range(index.num_heads):
        batch = index.batch_size - 1
        for row in {0, seqlen_q // 2, seqlen_q - 1}:
            assert torch.equal(row_keys(index, batch, head, row, offset), mask[batch, head, row])


def test_row_bits_of_partly_visible_blocks():
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(2, 3, 90, 101, generator=generator) < 0.3
    index = SparseIndex.from_dense_mask(mask, block_m=80, block_n=16)
    for row in (0, 63, 64, 79, 80, 89):
        assert torch.equal(row_keys(index, 1, 2, row, 0), mask[1, 2, row])


@pytest.mark.parametrize("causal", [True, False])
def test_cells_are_shares(causal):
    q, k, _ = inputs(40, 100)
    index = VerticalSlash(vertical=10, slash=60, last_q=16).build(q, k)
    mask = index.to_dense_mask()[0, 2]
    if causal:
        mask = mask & torch.ones(40, 100, dtype=torch.bool).tril(60)
    picture = grid(index, 2, rows=8, columns=25, causal=causal)
    middle = mask[2::5]  # rows 2, 7, ...: five rows and four keys a cell
    assert torch.equal(picture, middle.view(8, 25, 4).float().mean(-1))


def test_print_shows_the_triangle():
    index = PerHead([Dense(), AShape(sink=4, window=4)] * 3).build(*inputs(16, 16)[:2])
    lines = str(index).splitlines()
    assert lines[0] == repr(index) and lines[1].endswith("of the work in tiles (causal)")
    assert lines[2].split() == ["head", "0:", "dense,", "100%", "head", "1:", "streaming,", "74%"]
    assert lines[-1] == "2 more heads"
    dense = SparseIndex.dense(16, 16)
    triangle = [("█" * row).ljust(16).rstrip() for row in range(1, 17)]
    assert str(dense).splitlines()[3:] == triangle
    assert dense.draw(causal=False).splitlines()[3:] == ["█" * 16] * 16
    assert "batch entry 0 of 2" in str(EVERY["VerticalSlash"]().build(*inputs(70, 70)[:2]))


def test_print_of_large_and_empty_indexes():
    large = SparseIndex.streaming(100_000, 100_000, sink=100, window=5000, num_heads=40)
    lines = str(large).splitlines()
    assert len(lines) == 2 + 2 * 17 + 1 and max(map(len, lines[2:])) <= 66
    assert str(SparseIndex.dense(0, 7)).startswith("SparseIndex(")


# ------------------------------------------------------------------------------ matplotlib


@pytest.fixture
def viz():
    pytest.importorskip("matplotlib").use("agg")
    from sparse_attn import viz

    yield viz
    viz.require_matplotlib().close("all")


def test_plot(viz, tmp_path):
    index = AShape(sink=4, window=10).build(*inputs(50, 100)[:2])
    axes = viz.plot(index)
    picture = torch.tensor(axes.get_images()[0].get_array()) ** 2
    mask = index.to_dense_mask()[0, 0] & torch.ones(50, 100, dtype=torch.bool).tril(50)
    assert torch.equal(picture, mask.float())
    axes.figure.savefig(tmp_path / "index.png")
    assert viz.plot(index, axes=axes) is axes
    with pytest.raises(ValueError, match="head=1, batch=0; the index has 1 heads"):
        viz.plot(index, 1)


def test_heads(viz):
    layers = [[PlannedHead(Dense()), PlannedHead(AShape(4, 8))], [PlannedHead(AShape(4, 9))] * 2]
    axes = viz.heads(HeadPlan(layers, num_heads_kv=1, model_id="tiny"))
    assert axes.get_images()[0].get_array().tolist() == [[1, 2], [0, 0]]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["2 AShape(window=9)", "1 Dense()", "1 AShape(window=8)"]


def test_recall(viz):
    from sparse_attn.calibration import Trial

    heads = [[Trial(Dense(), 8.0, 1.0, 0.0), Trial(AShape(4, 8), 2.0, 0.75, 0.1)]]
    plan = HeadPlan([[PlannedHead(AShape(4, 8))]], num_heads_kv=1)
    axes = viz.recall({0: heads}, plan)
    drawn = {c.get_label(): c.get_offsets().tolist() for c in axes.collections}
    assert drawn == {"Dense": [[1.0, 1e-5]], "AShape": [[0.25, 0.25]], "chosen": [[0.25, 0.25]]}
    assert len(viz.recall([heads]).collections) == 2


def test_without_matplotlib(monkeypatch):
    from sparse_attn import viz

    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="needs matplotlib; install it with: pip install"):
        viz.plot(SparseIndex.dense(4, 4))
    with pytest.raises(ImportError, match="needs matplotlib"):
        viz.require_matplotlib()
