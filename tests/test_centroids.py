# SPDX-License-Identifier: Apache-2.0
"""Clustering and cluster shares: the operators and `spherical_kmeans` against float64 loops."""

import oracle_centroids as oracle
import pytest
import torch

from sparse_attn import ops
from sparse_attn.selection import (
    centroid_lists,
    centroid_scores,
    cluster_means,
    cluster_members,
    nearest_centroids,
    spherical_kmeans,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def clumps(n: int, dim: int, seed: int, *, heads=(2, 3), dtype=torch.float32) -> torch.Tensor:
    """Keys that drift, as those of a text do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*heads, n, dim, generator=generator)
    for shift in (1, 2, 4):
        x = 0.6 * x + 0.5 * x.roll(shift, 2)
    return (4 * x).to(dtype)


@pytest.mark.parametrize("seed", range(60))
def test_nearest_is_exact_with_ties(seed):
    """Small integers: products are exact in any dtype and order, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    n, clusters = (int(torch.randint(1, high, (), generator=generator)) for high in (300, 40))
    dim = (8, 16, 24, 40, 128)[seed % 5]
    keys = torch.randint(-2, 3, (2, 2, n, dim), generator=generator).to(DTYPES[seed % 3])
    centroids = torch.randint(-2, 3, (2, 2, clusters, dim), generator=generator).float()
    labels, scores = nearest_centroids(keys, centroids)
    for b in range(2):
        for h in range(2):
            expected = oracle.nearest(keys[b, h].double(), centroids[b, h].double())
            assert torch.equal(labels[b, h], expected)
            products = keys[b, h].double() @ centroids[b, h].double().T
            assert torch.equal(scores[b, h].double(), products.amax(1))
    # Another set of centroids, of which most are the same.
    changed = torch.rand(2, 2, clusters, generator=generator) < 0.3
    new = torch.randint(-2, 3, centroids.shape, generator=generator).float()
    new = torch.where(changed[..., None], new, centroids)
    again = nearest_centroids(keys, new, labels, scores, changed)
    for found, expected in zip(again, nearest_centroids(keys, new)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_an_earlier_answer_saves_work_and_changes_nothing(dim):
    keys = clumps(700, dim, dim)
    generator = torch.Generator().manual_seed(3)
    centroids = torch.nn.functional.normalize(
        torch.randn(2, 3, 90, dim, generator=generator), dim=-1
    )
    answer = nearest_centroids(keys, centroids)
    for share in (0.0, 0.05, 0.5, 1.0):
        changed = torch.rand(2, 3, 90, generator=generator) < share
        step = 0.1 * torch.randn(2, 3, 90, dim, generator=generator)
        centroids = torch.where(changed[..., None], centroids + step, centroids)
        answer = nearest_centroids(keys, centroids, *answer, changed)
        for found, expected in zip(answer, nearest_centroids(keys, centroids)):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 40, 20])  # the last goes through plain torch
def test_members_and_means(dtype, dim):
    generator = torch.Generator().manual_seed(dim)
    keys = torch.randint(-3, 4, (2, 3, 137, dim), generator=generator).to(dtype)
    labels = torch.randint(0, 9, (2, 3, 137), generator=generator, dtype=torch.int32)
    labels[labels == 4] = 5  # an empty one
    weights = 2.0 ** torch.randint(-1, 2, (2, 3, 137), generator=generator)
    indptr, members = cluster_members(labels, 9)
    plain = cluster_means(keys, None, indptr, members)
    weighted = cluster_means(keys, weights, indptr, members)
    for b in range(2):
        for h in range(3):
            for c in range(9):
                mine = (labels[b, h] == c).nonzero()[:, 0]
                at = slice(int(indptr[b, h, c]), int(indptr[b, h, c + 1]))
                assert torch.equal(members[b, h, at].long(), mine)
            rows, label = keys[b, h].double(), labels[b, h]
            expected, counts = oracle.means(rows, label, 9)
            assert torch.equal(indptr[b, h].diff(), counts)
            torch.testing.assert_close(plain[b, h].double(), expected, rtol=1e-6, atol=0)
            expected, _ = oracle.means(rows * weights[b, h, :, None].double(), label, 9)
            torch.testing.assert_close(weighted[b, h].double(), expected, rtol=1e-6, atol=0)


# --- k-means --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_lloyd_iterations_are_those_of_the_plain_algorithm(seed):
    keys = clumps(150 + 7 * seed, 16, seed)
    clusters = 5 + seed
    start = spherical_kmeans(keys, clusters, iterations=0, seed=seed)
    compared = 0
    for iterations in (1, 2, 5):
        found = spherical_kmeans(keys, clusters, iterations=iterations, tolerance=0.0, seed=seed)
        for b in range(2):
            for h in range(3):
                expected = oracle.lloyd(keys[b, h].double(), start[b, h], clusters, iterations)
                if expected is not None:
                    assert torch.equal(found[b, h].long(), expected)
                    compared += 1
    assert compared > 12


def test_converges_to_a_fixed_point():
    keys = clumps(400, 32, 5)
    steps = []
    labels = spherical_kmeans(
        keys, 20, iterations=200, tolerance=0.0, progress=lambda *step: steps.append(step)
    )
    assert len(steps) < 200 and steps[0][:2] == (1, 200)
    cosines = [step[2] for step in steps]
    assert all(b >= a - 1e-6 for a, b in zip(cosines, cosines[1:]))
    for b in range(2):
        for h in range(3):
            assert torch.equal(
                oracle.lloyd(keys[b, h].double(), labels[b, h], 20, 1), labels[b, h].long()
            )


def test_as_good_as_sequential_plus_plus():
    keys = clumps(1500, 64, 9, heads=(1, 2))
    labels = spherical_kmeans(keys, 75, iterations=10)
    for h in range(2):
        rows = keys[0, h].double()
        ours = oracle.mean_cosine(rows, labels[0, h], 75)
        theirs = []
        for seed in range(3):
            start = oracle.plus_plus(rows, 75, torch.Generator().manual_seed(seed))
            theirs.append(oracle.mean_cosine(rows, oracle.lloyd(rows, start, 75, 10), 75))
        assert 1 - ours <= 1.01 * (1 - sum(theirs) / 3)


def test_a_head_depends_on_itself_alone():
    keys = clumps(333, 24, 1)
    labels = spherical_kmeans(keys, 17, seed=4)
    assert torch.equal(spherical_kmeans(keys.flip(0), 17, seed=4), labels.flip(0))
    assert torch.equal(spherical_kmeans(keys[1:, 2:], 17, seed=4), labels[1:, 2:])
    assert not torch.equal(spherical_kmeans(keys, 17, seed=5), labels)
    strided = keys.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(spherical_kmeans(strided, 17, seed=4), labels)


def test_threads_do_not_matter():
    keys = clumps(1000, 64, 2)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(spherical_kmeans(keys, 60))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_empty_clusters_are_filled_while_keys_differ():
    keys = torch.eye(16).repeat(5, 1)[None, None]  # sixteen directions
    for clusters, used in ((16, 16), (12, 12), (40, 16)):
        labels = spherical_kmeans(keys, clusters, iterations=20)
        assert len(labels.unique()) == used
    same = torch.ones(1, 2, 30, 8)
    assert (spherical_kmeans(same, 4) == spherical_kmeans(same, 4)[..., :1]).all()
    zero = torch.zeros(1, 1, 30, 8)
    assert spherical_kmeans(zero, 4).shape == (1, 1, 30)


def test_every_key_its_own_cluster():
    keys = clumps(50, 16, 8)
    labels = spherical_kmeans(keys, 50)
    assert torch.equal(labels.sort(-1).values, torch.arange(50).int().expand(2, 3, 50))


def test_one_cluster():
    assert (spherical_kmeans(clumps(50, 16, 8), 1) == 0).all()


def test_plain_torch_form_agrees():
    """head_dim 20 has no native form; padded with zeros it has one, and products are the same."""
    keys = clumps(200, 20, 6)
    padded = torch.nn.functional.pad(keys, (0, 4))
    assert torch.equal(spherical_kmeans(keys, 11), spherical_kmeans(padded, 11))


# --- shares of clusters ---------------------------------------------------------------------------

TOY = torch.tensor([2.0, 1.0, 0.0, -1.0])
TOY_COUNTS = torch.tensor([1, 2, 4, 8], dtype=torch.int32)


def toy_scores(queries, dim, tile_rows):
    centroids = torch.zeros(1, 1, 4, dim)
    centroids[..., 0] = TOY
    q = torch.zeros(1, 1, len(queries), dim)
    q[..., 0] = torch.tensor(queries)
    counts = TOY_COUNTS.view(1, 1, 4)
    return centroid_scores(q, centroids, counts, tile_rows=tile_rows, softmax_scale=1.0)


@pytest.mark.parametrize("dim", [1, 8])
def test_toy(dim):
    single = toy_scores([1.0, -1.0], dim, 1)[0, 0]
    expected = [[0.37378, 0.13750, 0.05059, 0.01861], [0.00508, 0.01382, 0.03757, 0.10212]]
    torch.testing.assert_close(single, torch.tensor(expected), rtol=0, atol=5e-6)
    both = toy_scores([1.0, -1.0], dim, 2)[0, 0, 0]
    expected = torch.tensor([0.18943, 0.07566, 0.04408, 0.06037])
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-5)
    indptr = torch.nn.functional.pad(TOY_COUNTS.cumsum(0), (1, 0)).view(1, 1, 5)
    members = torch.arange(15, dtype=torch.int32).view(1, 1, 15)
    keep, counts, _ = centroid_lists(single[None, None, :1], indptr, members, threshold=0.05)
    assert keep.flatten().tolist() == [True, True, True, False] and counts.item() == 7
    keep, counts, keys = centroid_lists(both.view(1, 1, 1, 4), indptr, members, threshold=0.05)
    assert keep.flatten().tolist() == [True, True, False, True] and counts.item() == 11
    assert keys.tolist() == [0, 1, 2, *range(7, 15)]


@pytest.mark.parametrize("seed", range(40))
def test_scores_are_the_formula(seed):
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    batch, heads_kv, group = number(1, 4), number(1, 4), number(1, 5)
    rows, clusters, dim = number(1, 150), number(1, 200), (8, 16, 40, 64, 20)[seed % 5]
    dtype = DTYPES[seed % 3]
    tile = rows if seed % 2 else number(1, rows + 1)
    reduce = "max" if seed % 4 == 1 else "mean"
    q = (2 * torch.randn(batch, heads_kv * group, rows, dim, generator=generator)).to(dtype)
    centroids = torch.randn(batch, heads_kv, clusters, dim, generator=generator)
    counts = torch.randint(0, 5, (batch, heads_kv, clusters), generator=generator).int()
    counts[..., 0] = 1
    tiles = -(-rows // tile)
    parents = kept = None
    allowed = torch.ones(batch, heads_kv, tiles, clusters, dtype=torch.bool)
    if seed % 3 == 0:
        cuts = torch.randint(0, clusters + 1, (batch, heads_kv, 6), generator=generator).int()
        parents = torch.nn.functional.pad(cuts, (1, 0)).sort(-1).values
        kept = torch.rand(batch, heads_kv, tiles, 6, generator=generator) < 0.5
        allowed &= False
        for b, h, t, p in kept.nonzero().tolist():
            allowed[b, h, t, int(parents[b, h, p]) : int(parents[b, h, p + 1])] = True
    found = centroid_scores(
        q,
        centroids,
        counts,
        tile_rows=tile,
        softmax_scale=0.3,
        reduce_max=reduce == "max",
        parents=parents,
        kept=kept,
    )
    assert found.shape == (batch, heads_kv, tiles, clusters)
    b, h = number(0, batch), number(0, heads_kv)
    for t in range(tiles):
        part = q[b, h * group : (h + 1) * group, t * tile : (t + 1) * tile].double()
        exact = oracle.tile_scores(
            part, centroids[b, h].double(), counts[b, h], allowed[b, h, t], 0.3, reduce
        )
        assert torch.equal(found[b, h, t] < 0, exact < 0)
        torch.testing.assert_close(found[b, h, t].double(), exact, rtol=2e-5, atol=1e-7)
        if reduce == "mean" and bool((exact >= 0).any()):
            total = (found[b, h, t].clamp(min=0).double() * counts[b, h]).sum()
            assert abs(total.item() - 1) < 1e-5


def test_far_away_logits_do_not_overflow():
    centroids = 100 * torch.randn(1, 1, 30, 64, generator=torch.Generator().manual_seed(0))
    counts = torch.ones(1, 1, 30, dtype=torch.int32)
    q = 100 * torch.randn(1, 2, 9, 64, generator=torch.Generator().manual_seed(1))
    for scale in (1.0, -1.0, 0.0):
        scores = centroid_scores(q, centroids, counts, tile_rows=9, softmax_scale=scale)
        assert torch.isfinite(scores).all() and abs(scores.sum().item() - 1) < 1e-5


@pytest.mark.parametrize("seed", range(30))
def test_lists_are_the_rule(seed):
    """Scores are small multiples of 1/8, so ties abound."""
    generator = torch.Generator().manual_seed(seed)
    n, clusters = (int(torch.randint(1, high, (), generator=generator)) for high in (200, 30))
    labels = torch.randint(0, clusters, (2, 2, n), generator=generator, dtype=torch.int32)
    indptr, members = cluster_members(labels, clusters)
    scores = torch.randint(-1, 6, (2, 2, 3, clusters), generator=generator) / 8.0
    scores[0, 0, 0, 0] = torch.nan
    threshold = float(torch.randint(-1, 5, (), generator=generator)) / 8.0
    budget = None if seed % 3 == 0 else int(torch.randint(1, n + 1, (), generator=generator))
    keep, counts, keys = centroid_lists(scores, indptr, members, threshold=threshold, budget=budget)
    lists = keys.split(counts.flatten().tolist())
    for i, (b, h, t) in enumerate((b, h, t) for b in range(2) for h in range(2) for t in range(3)):
        sizes = indptr[b, h].diff()
        expected = oracle.keep_clusters(scores[b, h, t], sizes, threshold, budget)
        assert torch.equal(keep[b, h, t], expected)
        mask = expected[labels[b, h].long()]
        assert lists[i].tolist() == mask.nonzero()[:, 0].tolist()


# --- the operators guard memory -------------------------------------------------------------------


def wrong_calls():
    keys, centroids = torch.randn(1, 2, 10, 8), torch.randn(1, 2, 3, 8)
    labels = torch.zeros(1, 2, 10, dtype=torch.int32)
    scores, changed = torch.zeros(1, 2, 10), torch.zeros(1, 2, 3, dtype=torch.bool)
    indptr = torch.tensor([0, 4, 10]).expand(1, 2, 3).contiguous()
    members = torch.arange(10, dtype=torch.int32).expand(1, 2, 10).contiguous()
    counts = torch.ones(1, 2, 3, dtype=torch.int32)
    lookup = {"tile_rows": 1, "softmax_scale": 1.0, "reduce_max": False}
    cluster_scores = torch.zeros(1, 2, 1, 2)
    bad_parents = torch.tensor([0, 9], dtype=torch.int32).expand(1, 2, 2).contiguous()
    kept = torch.ones(1, 2, 10, 1, dtype=torch.bool)
    lists = {"threshold": 0.0, "budget": -1}
    return [
        (lambda: ops.nearest_centroids(keys, centroids[:, :1].contiguous()), "centroids has size"),
        (lambda: ops.nearest_centroids(keys, centroids[:, :, :0]), "0 centroids"),
        (lambda: ops.nearest_centroids(keys, centroids, labels), "come together"),
        (
            lambda: ops.nearest_centroids(keys, centroids, labels + 3, scores, changed),
            "labels hold 3",
        ),
        (lambda: ops.nearest_centroids(keys[..., :7], centroids[..., :7]), "multiple of 8"),
        (lambda: ops.cluster_members(labels - 1, 3), "a label is not in"),
        (lambda: ops.cluster_members(labels.long(), 3), "right dtype"),
        (lambda: ops.cluster_means(keys, None, indptr + 1, members), "indptr of head 0"),
        (lambda: ops.cluster_means(keys, None, indptr, members + 1), "members hold 10"),
        (lambda: ops.cluster_means(keys, scores[..., :5], indptr, members), "contiguous"),
        (
            lambda: ops.centroid_scores(
                keys, centroids, counts, parents=bad_parents, kept=kept, **lookup
            ),
            "parents of head 0",
        ),
        (
            lambda: ops.centroid_scores(
                keys, centroids, counts, parents=bad_parents, kept=None, **lookup
            ),
            "come together",
        ),
        (
            lambda: ops.centroid_scores(
                keys, centroids, counts, parents=None, kept=None, **{**lookup, "tile_rows": 0}
            ),
            "tile_rows=0",
        ),
        (
            lambda: ops.centroid_scores(
                keys, centroids, counts[:, :1].contiguous(), parents=None, kept=None, **lookup
            ),
            "counts has size",
        ),
        (lambda: ops.centroid_lists(cluster_scores, indptr, members - 1, **lists), "distinct"),
        (lambda: ops.centroid_lists(cluster_scores, indptr, members * 0, **lists), "distinct"),
        (lambda: ops.centroid_lists(cluster_scores, indptr * 2, members, **lists), "indptr"),
        (
            lambda: ops.centroid_lookup(
                keys,
                centroids,
                counts,
                indptr,
                members,
                parents=bad_parents,
                coarse_centroids=centroids,
                coarse_counts=None,
                coarse_threshold=0.0,
                **lookup,
                **lists,
            ),
            "come together",
        ),
    ]


@pytest.mark.parametrize("case", range(len(wrong_calls())))
def test_wrong_arguments_raise(case):
    call, message = wrong_calls()[case]
    with pytest.raises(RuntimeError, match=message):
        call()


def test_opcheck():
    keys, centroids = torch.randn(1, 2, 30, 16), torch.randn(1, 2, 5, 16)
    labels, scores = nearest_centroids(keys, centroids)
    changed = torch.ones(1, 2, 5, dtype=torch.bool)
    indptr, members = cluster_members(labels, 5)
    counts = indptr.diff(dim=-1).int()
    q = torch.randn(1, 4, 7, 16)
    found = centroid_scores(q, centroids, counts, tile_rows=3, softmax_scale=0.25)
    calls = {
        "nearest_centroids": (keys, centroids, labels, scores, changed),
        "cluster_members": (labels, 5),
        "cluster_means": (keys, None, indptr, members),
        "centroid_scores": (q, centroids, counts, None, None, 3, 0.25, True),
        "centroid_lists": (found, indptr, members, 0.02, -1),
        "centroid_lookup": (
            *(q, centroids, counts, indptr, members, None, None, None),
            *(3, 0.25, True, 0.02, -1, 0.0),
        ),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(
            getattr(torch.ops.sparse_attn, name).default,
            arguments,
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )
