# SPDX-License-Identifier: Apache-2.0
"""Native selection ops against the plain torch that other devices run."""

import pytest
import torch
from cases import CAPABILITIES
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn import ops
from sparse_attn.patterns import slash_lists
from sparse_attn.selection import estimators, top_k_indices, top_k_mask


@settings(max_examples=300)
@given(
    seed=st.integers(0, 2**31 - 1),
    seqlen_q=st.integers(1, 300),
    seqlen_k=st.integers(1, 400),
    offset=st.one_of(st.none(), st.integers(-60, 300)),
    block_m=st.sampled_from([1, 2, 16, 64]),
    block_n=st.sampled_from([2, 8, 16, 64]),
    causal=st.booleans(),
    share=st.sampled_from([0.0, 0.005, 0.02, 0.1, 0.5, 0.95, 1.0]),
    verticals=st.integers(0, 20),
)
def test_vertical_slash_lists_equal_torch(
    seed, seqlen_q, seqlen_k, offset, block_m, block_n, causal, share, verticals
):
    generator = torch.Generator().manual_seed(seed)
    slashes = torch.rand(2, seqlen_k, generator=generator) < share
    columns = torch.stack(
        [torch.randperm(seqlen_k + 20, generator=generator)[:verticals] for _ in range(2)]
    )
    columns = columns.sort(-1).values.int()  # some lie past the keys: to be ignored
    arguments = {
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
        "q_offset": seqlen_k - seqlen_q if offset is None else offset,
        "causal": causal,
        "block_m": block_m,
        "block_n": block_n,
    }
    native = slash_lists.slash_lists(columns, slashes, **arguments)
    plain = slash_lists.slash_lists_torch(columns, slashes, **arguments)
    for name in ("block_counts", "block_indices", "column_counts", "column_indices"):
        assert torch.equal(getattr(native, name), getattr(plain, name)), name


def plain_window_scores(
    q, k, *, last_q, num_distances, softmax_scale, q_offset, causal, reduction="sum"
):
    """Row by row, in float64."""
    rows = min(last_q, q.shape[2])
    batch, heads, seqlen_q, _ = q.shape
    group = heads // k.shape[1]
    columns = torch.zeros(batch, heads, k.shape[2], dtype=torch.float64)
    diagonals = torch.zeros(batch, heads, num_distances, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(max(0, seqlen_q - last_q), seqlen_q):
                logits = k[b, h // group].double() @ q[b, h, i].double() * softmax_scale
                seen = torch.arange(k.shape[2]) <= i + q_offset if causal else torch.ones(1) > 0
                logits = logits.masked_fill(~seen, -torch.inf)
                if not seen.any():
                    continue
                p = logits.softmax(0)
                distance = i + q_offset - torch.arange(k.shape[2])
                inside = (distance >= 0) & (distance < num_distances)
                along = torch.zeros(num_distances, dtype=torch.float64)
                along[distance[inside]] = p[inside]
                if reduction == "max":
                    columns[b, h] = torch.maximum(columns[b, h], p)
                    diagonals[b, h] = torch.maximum(diagonals[b, h], along)
                else:
                    columns[b, h] += p / (rows if reduction == "mean" else 1)
                    diagonals[b, h] += along / (rows if reduction == "mean" else 1)
    return columns, diagonals


@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "heads, heads_kv, seqlen_q, seqlen_k, head_dim, last_q, distances, offset, causal, scale",
    [
        (4, 2, 64, 64, 64, 64, 64, None, True, 0.125),
        (3, 1, 33, 150, 40, 17, 150, None, True, 0.2),
        (2, 2, 130, 129, 80, 100, 129, None, True, 0.1),  # more rows than a tile, and than keys
        (2, 1, 5, 70, 16, 5, 7, 0, True, 0.3),
        (2, 1, 9, 70, 8, 9, 200, 120, True, 0.3),
        (2, 1, 20, 70, 8, 20, 70, -12, True, 0.3),  # rows that see no key
        (2, 1, 64, 200, 64, 64, 200, None, False, 0.125),
        (1, 1, 40, 90, 64, 40, 90, None, True, -0.125),
        (1, 1, 40, 90, 64, 40, 90, None, True, 0.0),
    ],
)
def test_window_scores_equal_the_rule(
    monkeypatch,
    capability,
    dtype,
    heads,
    heads_kv,
    seqlen_q,
    seqlen_k,
    head_dim,
    last_q,
    distances,
    offset,
    causal,
    scale,
    reduction,
):
    monkeypatch.setenv("SPARSE_ATTN_CPU_CAPABILITY", capability)
    try:
        ops.cpu_capability()
    except RuntimeError as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads, seqlen_q, head_dim, generator=generator).to(dtype)
    k = torch.randn(2, heads_kv, seqlen_k, head_dim, generator=generator).to(dtype)
    arguments = {
        "last_q": last_q,
        "num_distances": distances,
        "softmax_scale": scale,
        "q_offset": seqlen_k - seqlen_q if offset is None else offset,
        "causal": causal,
        "reduction": reduction,
    }
    found = estimators.window_scores(q, k, **arguments)
    expected = plain_window_scores(q, k, **arguments)
    for name, x, y in zip(("columns", "diagonals"), found, expected, strict=True):
        # Sums of up to last_q probabilities whose logits carry a few float32 roundings.
        bound = 1e-6 * max(1.0, y.max().item()) * 4
        assert (x.double() - y).abs().max().item() <= bound, name


WINDOW = {"last_q": 20, "num_distances": 70, "softmax_scale": 0.3, "q_offset": 30}


@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
@pytest.mark.parametrize("causal", [True, False])
def test_window_scores_in_plain_torch(monkeypatch, reduction, causal):
    """What devices without the native operator run."""
    q, k = torch.randn(2, 4, 40, 16), torch.randn(2, 2, 70, 16)
    native = estimators.window_scores(q, k, causal=causal, reduction=reduction, **WINDOW)
    monkeypatch.setattr(estimators, "native_inputs", lambda q, k: False)
    plain = estimators.window_scores(q, k, causal=causal, reduction=reduction, **WINDOW)
    for x, y in zip(native, plain, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("native", [True, False])
def test_a_nan_row_never_becomes_a_maximum(monkeypatch, native):
    if not native:
        monkeypatch.setattr(estimators, "native_inputs", lambda q, k: False)
    q, k = torch.randn(1, 1, 40, 16), torch.randn(1, 1, 70, 16)
    clean, _ = estimators.window_scores(q, k, causal=False, reduction="max", **WINDOW)
    q[..., 35, :] = torch.nan
    columns, _ = estimators.window_scores(q, k, causal=False, reduction="max", **WINDOW)
    assert (columns > 0).all() and (columns <= clean).all()


def test_scores_past_the_kept_keys_are_computed_again():
    # The last 44 keys lie past the 2^17 whose probabilities are kept.
    q, k = torch.randn(1, 1, 5, 8), torch.randn(1, 1, (1 << 17) + 44, 8)
    arguments = {
        "last_q": 5,
        "num_distances": 100,
        "softmax_scale": 0.5,
        "q_offset": k.shape[2] - 5,
        "causal": True,
    }
    found = estimators.window_scores(q, k, **arguments)
    for x, y in zip(found, plain_window_scores(q, k, **arguments), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-9)


def test_window_scores_name_their_reductions():
    q = torch.randn(1, 1, 40, 16)
    with pytest.raises(ValueError, match=r"sparse_attn\.window_scores: reduction='min' is unknown"):
        estimators.window_scores(q, q, causal=True, reduction="min", **WINDOW)


def test_window_scores_do_not_depend_on_threads():
    q, k = torch.randn(2, 4, 64, 64), torch.randn(2, 2, 500, 64)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(
            estimators.window_scores(
                q, k, last_q=64, num_distances=500, softmax_scale=0.1, q_offset=436, causal=True
            )
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@given(
    rows=st.integers(1, 3),
    values=st.lists(
        st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, float("inf"), float("-inf"), float("nan")]),
        min_size=0,
        max_size=40,
    ),
    k=st.integers(0, 45),
)
def test_top_k_breaks_ties_by_index(rows, values, k):
    scores = torch.tensor([values] * rows, dtype=torch.float32).view(rows, len(values))
    clean = [float("-inf") if v != v else v for v in values]
    best = sorted(range(len(values)), key=lambda i: (-clean[i], i))
    expected = sorted(best[: min(k, len(values))])
    assert top_k_indices(scores, k).tolist() == [expected] * rows


def test_top_k_equals_the_mask():
    scores = torch.randint(0, 50, (3, 4, 1000)).float()  # many ties
    for k in (0, 1, 17, 500, 999, 1000):
        indices = top_k_indices(scores, k)
        marked = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, indices.long(), True)
        assert torch.equal(marked, top_k_mask(scores, k))


def lists_of(slashes, **options):
    """`ops.vertical_slash_lists` of 20 rows."""
    verticals = torch.zeros(slashes.shape[0], 1, dtype=torch.int32)
    shape = {"seqlen_q": 20, "seqlen_k": 20, "q_offset": 0, "block_m": 16, "block_n": 16}
    return ops.vertical_slash_lists(
        verticals, slashes.bool(), **{**shape, "causal": True, "exact": False, **options}
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.top_k(torch.zeros(2, 3), 4), "k=4 is not in"),
        (lambda: ops.top_k(torch.zeros(2, 3, dtype=torch.float64), 1), "float32"),
        (
            lambda: ops.window_scores(
                torch.zeros(1, 1, 4, 8),
                torch.zeros(1, 1, 4, 8),
                last_q=5,
                num_distances=4,
                q_offset=0,
                causal=True,
                softmax_scale=1.0,
            ),
            "last_q=5 is not in",
        ),
        (
            lambda: ops.vertical_slash_lists(
                torch.zeros(2, 3, dtype=torch.int32),
                torch.zeros(1, 3, dtype=torch.bool),
                seqlen_q=3,
                seqlen_k=3,
                q_offset=0,
                causal=True,
                block_m=16,
                block_n=16,
                chunk=16,
                exact=False,
            ),
            "slashes is not",
        ),
        (lambda: lists_of(torch.zeros(2, 3), chunk=24), "chunk=24 is not a multiple of 16"),
        (lambda: lists_of(torch.zeros(3, 3), chunk=16), "3 selections do not divide into 2"),
        (lambda: lists_of(torch.zeros(2, 3), chunk=16, block_n=0), "out of range"),
    ],
)
def test_wrong_arguments_raise(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_opcheck():
    q, k = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 70, 16)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.sparse_attn.window_scores.default,
        (q, k, 20, 70, 30, True, 0.25, False),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.sparse_attn.top_k.default, (torch.rand(3, 20), 7), test_utils=checks
    )
    for chunk, exact in ((48, False), (16, False), (48, True), (16, True)):
        selections = -(-40 // chunk)
        torch.library.opcheck(
            torch.ops.sparse_attn.vertical_slash_lists.default,
            (
                torch.tensor([[1, 5]] * selections, dtype=torch.int32),
                torch.rand(selections, 70) < 0.1,
                40,
                70,
                30,
                True,
                16,
                16,
                chunk,
                exact,
            ),
            test_utils=checks,
        )
