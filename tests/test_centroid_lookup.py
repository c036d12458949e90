# SPDX-License-Identifier: Apache-2.0
"""CentroidIndex, CentroidLookup and centroid_attention against the rule in float64."""

import builtins
import math

import oracle_centroids as oracle
import pytest
import torch
from bounds import assert_matches_oracle, plain_attention

import sparse_attn
from sparse_attn import CentroidIndex, CentroidLookup, PerHead, calibrate_threshold, ops, reference
from sparse_attn.lists import indptr_from_counts
from sparse_attn.patterns import presets
from sparse_attn.selection import centroid_lists


class Draw:
    """Numbers of one case."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def number(self, low, high):
        """In [low, high]."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator)


def gaps(values):
    """Thresholds between neighbouring scores that no rounding can bridge: at 0, then rising."""
    values = sorted({float(v) for v in values if v >= 0})
    return [0.0] + [
        math.sqrt(a * b) for a, b in zip(values, values[1:]) if b > a * (1 + 1e-3) and a > 1e-30
    ]


def exact_choice(index, q, scale, group, coarse_threshold=None):
    """Oracle scores of one tile: float64 [batch, heads_kv, clusters], -1 where not scored."""
    batch, heads_kv = index.batch_size, index.num_heads_kv
    per = q.shape[1] // heads_kv
    scores = torch.empty(batch, heads_kv, index.clusters, dtype=torch.float64)
    coarse = []
    for b in range(batch):
        for h in range(heads_kv):
            rows = q[b, h * per : (h + 1) * per].double()
            allowed = torch.ones(index.clusters, dtype=torch.bool)
            if coarse_threshold is not None:
                every = torch.ones(index.coarse_counts.shape[2], dtype=torch.bool)
                above = oracle.tile_scores(
                    rows,
                    index.coarse_centroids[b, h].double(),
                    index.coarse_counts[b, h],
                    every,
                    scale,
                    group,
                )
                coarse.append(above)
                sizes = index.coarse_counts[b, h]
                kept = oracle.keep_clusters(above, sizes, coarse_threshold, None)
                allowed = kept.repeat_interleave(index.parents[b, h].diff().long())
            centroids = index.centroids[b, h].double()
            scores[b, h] = oracle.tile_scores(
                rows, centroids, index.counts[b, h], allowed, scale, group
            )
    return scores, coarse


def exact_mask(index, scores, threshold, budget, rows, seqlen_k, offset):
    """bool [batch, heads_kv, rows, seqlen_k], causal."""
    labels = index.labels()
    masks = []
    for b in range(index.batch_size):
        for h in range(index.num_heads_kv):
            keep = oracle.keep_clusters(scores[b, h], index.counts[b, h], threshold, budget)
            for r in range(rows):
                masks.append(
                    oracle.row_mask(
                        keep, labels[b, h], index.clustered, index.length, seqlen_k, offset + r
                    )
                )
    return torch.stack(masks).view(index.batch_size, index.num_heads_kv, rows, seqlen_k)


def causal_mask(index, rows, offset):
    mask = index.to_dense_mask()
    keys = torch.arange(index.seqlen_k)
    return mask & (keys <= torch.arange(rows)[:, None] + offset)


def case(seed):
    """(index, q, k, draw) of random sizes; head_dim 12 has no native form."""
    draw = Draw(seed)
    batch, heads_kv, group = draw.number(1, 3), draw.number(1, 3), draw.number(1, 4)
    window = draw.number(0, 20)
    length = draw.number(window + 1, 200)
    rows = draw.number(1, 9) if seed % 3 else draw.number(1, 90)
    dim = 12 if seed % 11 == 10 else (8, 16, 32)[seed % 3]
    k = draw.randn(batch, heads_kv, length + draw.number(rows, rows + 30), dim)
    q = 2 * draw.randn(batch, heads_kv * group, rows, dim)
    index = CentroidIndex.fit(
        k[:, :, :length],
        draw.number(1, max(1, (length - window) // 3)),
        observation_window=window,
        levels=1 + seed % 2,
        coarse_ratio=0.3,
        iterations=2,
        seed=seed,
    )
    return index, q, k, draw


@pytest.mark.parametrize("seed", range(200))
def test_lookup_is_the_rule(seed):
    index, q, k, draw = case(seed)
    rows, seqlen_k = q.shape[2], k.shape[2]
    scale, group = 1 / math.sqrt(q.shape[3]), ("mean", "max")[draw.number(0, 1)]
    coarse_threshold = None
    if index.levels == 2:
        _, coarse = exact_choice(index, q, scale, group, coarse_threshold=0.0)
        limits = gaps(torch.cat(coarse))
        coarse_threshold = limits[draw.number(0, len(limits) - 1)]
    scores, _ = exact_choice(index, q, scale, group, coarse_threshold)
    limits = gaps(scores.flatten())
    threshold, budget = limits[draw.number(0, len(limits) - 1)], None
    if seed % 4 == 3:  # distinct scores only, so that rounding cannot change their order
        threshold = None
        order = scores.flatten().sort().values
        budget = draw.number(1, index.clustered)
        near = (order.diff() < 1e-4 * order[1:]) & (order[1:] > 0)
        if bool(near.any()):
            budget = index.clustered  # room for everything
    lookup = index.lookup(
        threshold=threshold, budget=budget, coarse_threshold=coarse_threshold, group=group
    )
    built = lookup.build(q, k)
    built.validate()
    expected = exact_mask(index, scores, threshold or 0.0, budget, rows, seqlen_k, seqlen_k - rows)
    assert torch.equal(causal_mask(built, rows, seqlen_k - rows), expected)


@pytest.mark.parametrize("seed", range(12))
def test_tiles_choose_for_themselves(seed):
    index, _, k, draw = case(3 * seed)
    rows, tile = 70, 16
    k = torch.cat([k, draw.randn(*k.shape[:2], rows, k.shape[3])], 2)
    q = draw.randn(k.shape[0], k.shape[1] * 2, rows, k.shape[3])
    scale, offset = 0.5, k.shape[2] - rows
    whole = [exact_choice(index, q[:, :, i : i + tile], scale, "mean")[0] for i in range(0, 70, 16)]
    threshold = gaps(torch.stack(whole).flatten())[-1]
    built = index.lookup(threshold=threshold, tile=tile).build(q, k, softmax_scale=scale)
    built.validate()
    mask = causal_mask(built, rows, offset)
    for t, scores in enumerate(whole):
        at = slice(t * tile, min((t + 1) * tile, rows))
        expected = exact_mask(
            index, scores, threshold, None, at.stop - at.start, k.shape[2], offset + at.start
        )
        assert torch.equal(mask[:, :, at], expected)


@pytest.mark.parametrize("seed", range(24))
def test_one_operator_is_scores_and_lists(seed):
    """What decoding calls, against the operators that it stands for, at a head_dim they take."""
    cases = map(case, range(seed, 9999, 24))
    index, q, _, draw = next(found for found in cases if found[1].shape[3] % 8 == 0)
    group, rows = ("mean", "max")[seed // 2 % 2], draw.number(1, q.shape[2])
    by = {"tile_rows": rows, "softmax_scale": 0.3, "group": group}
    keep, coarse_threshold = None, 0.0
    if index.levels == 2:
        coarse = index.coarse_scores(q, **by)
        coarse_threshold = float(coarse.median()) if seed % 3 else 0.0
        keep = (coarse >= 0) & ((coarse.double() > coarse_threshold) | (coarse_threshold == 0))
    scores = index.scores(q, coarse_keep=keep, **by)
    threshold, budget = float(scores.median()), 40 if seed % 5 == 0 else None
    kept, counts, keys = centroid_lists(
        scores, index.indptr, index.members, threshold=threshold, budget=budget
    )
    two = index.levels == 2
    found = ops.centroid_lookup(
        q,
        index.centroids,
        index.counts,
        index.indptr,
        index.members,
        parents=index.parents if two else None,
        coarse_centroids=index.coarse_centroids if two else None,
        coarse_counts=index.coarse_counts if two else None,
        tile_rows=rows,
        softmax_scale=0.3,
        reduce_max=group == "max",
        threshold=threshold,
        budget=-1 if budget is None else budget,
        coarse_threshold=coarse_threshold,
    )
    expected = (kept, counts, indptr_from_counts(counts), keys)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("tile", [None, 16])
def test_rows_of_the_prefix_see_everything(tile):
    k = Draw(1).randn(1, 2, 300, 16)
    index = CentroidIndex.fit(k[:, :, :200], 20, observation_window=10)
    q = Draw(2).randn(1, 4, 300, 16)
    built = index.lookup(threshold=0.01, tile=tile).build(q, k)
    built.validate()
    mask = causal_mask(built, 300, 0)
    first = -(-200 // built.block_m) * built.block_m  # rows of a tile with a prefix row see all
    assert torch.equal(mask[:, :, :first], torch.ones_like(mask[:, :, :first]).tril())
    if tile is None:
        behind = exact_choice(index, q[:, :, 200:], 0.25, "mean")[0]
        expected = exact_mask(index, behind, 0.01, None, 300 - first, 300, first)
        assert torch.equal(mask[:, :, first:], expected)
    all_prefix = index.lookup(threshold=0.5).build(q[:, :, :200], k, q_offset=0)
    assert torch.equal(causal_mask(all_prefix, 200, 0)[..., :200].sum(), torch.tensor(2 * 20100))


def test_threshold_zero_is_dense():
    index, q, k, _ = case(2)
    out = sparse_attn.attention(q, k, k, index.lookup(threshold=0.0))
    dense = sparse_attn.attention(q, k, k)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)


def test_a_cluster_a_key_is_the_exact_softmax():
    draw = Draw(3)
    k, q = draw.randn(1, 2, 60, 16), 3 * draw.randn(1, 4, 1, 16)
    index = CentroidIndex.fit(k[:, :, :59], 59, observation_window=0)
    assert (index.counts == 1).all()
    logits = q.double().view(1, 2, 2, 16) @ k[:, :, :59].double().transpose(-1, -2) / 4
    exact = torch.softmax(logits, -1).mean(2)
    scores = index.scores(q, tile_rows=1, softmax_scale=0.25)[:, :, 0]
    by_key = scores.gather(-1, index.labels().long())
    torch.testing.assert_close(by_key.double(), exact, rtol=1e-5, atol=1e-9)
    keys = index.lookup(budget=7).build(q, k).to_dense_mask()[..., 0, :59]
    best = torch.zeros_like(keys).scatter_(-1, exact.topk(7).indices, True)
    assert torch.equal(keys, best)


@pytest.mark.parametrize("budget", [None, 20])
def test_one_coarse_cluster_is_flat(budget):
    index, q, k, _ = case(5)
    one = CentroidIndex.fit(
        k[:, :, : index.length],
        12,
        observation_window=5,
        levels=2,
        coarse_ratio=0.01,
    )
    assert one.coarse_counts.shape[2] == 1
    threshold = None if budget else 0.004
    flat = one.lookup(threshold=threshold, budget=budget).build(q, k)
    both = one.lookup(threshold=threshold, budget=budget, coarse_threshold=1e-9).build(q, k)
    assert torch.equal(flat.column_indices, both.column_indices)
    assert torch.equal(flat.column_indptr, both.column_indptr)


# --- thresholds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("percentile", [0.0, 0.3, 0.7, 0.9])
def test_calibration_is_the_quantile_over_layers_heads_and_keys(seed, percentile):
    cases = [case(2 * seed + 1 + layer * 100) for layer in range(3)]  # levels 2
    indexes, queries = [c[0] for c in cases], [c[1] for c in cases]
    # Layers share a head_dim in a model, not here: pass the scale.
    found = calibrate_threshold(indexes, queries, percentile, softmax_scale=0.3)
    scores = [exact_choice(i, q, 0.3, "mean")[0] for i, q in zip(indexes, queries)]
    by_key = [s.gather(-1, i.labels().long()).flatten() for i, s in zip(indexes, scores)]
    exact = torch.quantile(torch.cat(by_key), percentile).item()
    assert found == pytest.approx(exact, rel=1e-4)
    above = [exact_choice(i, q, 0.3, "mean", 0.0)[1] for i, q in zip(indexes, queries)]
    keys = [
        torch.repeat_interleave(s, c)
        for i, part in zip(indexes, above)
        for s, c in zip(part, i.coarse_counts.flatten(0, 1))
    ]
    coarse = calibrate_threshold(indexes, queries, percentile, level="coarse", softmax_scale=0.3)
    exact = torch.quantile(torch.cat(keys), percentile).item()
    assert coarse == pytest.approx(exact, rel=1e-4)
    coarse = gaps(torch.cat([s for part in above for s in part]))[1]
    found = calibrate_threshold(
        indexes, queries, percentile, coarse_threshold=coarse, softmax_scale=0.3
    )
    below = [exact_choice(i, q, 0.3, "mean", coarse)[0] for i, q in zip(indexes, queries)]
    by_key = [
        s.clamp(min=0).gather(-1, i.labels().long()).flatten() for i, s in zip(indexes, below)
    ]
    exact = torch.quantile(torch.cat(by_key), percentile).item()
    assert found == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("two_level", [False, True])
def test_a_percentile_leaves_out_that_share(two_level):
    draw = Draw(4)
    k, q = draw.randn(2, 4, 1000, 32), draw.randn(2, 8, 20, 32)
    index = CentroidIndex.fit(k[:, :, :950], ratio=0.1, observation_window=50, levels=2)
    coarse = 0.4 if two_level else None
    lookup = index.lookup(percentile=0.7, coarse_percentile=coarse)
    kept = lookup.build(q, k).column_indices.numel() / (2 * 4 * 900)
    assert 0.27 < kept <= 0.31
    first = None
    if two_level:
        first = calibrate_threshold(index, q, 0.4, level="coarse")
    threshold = calibrate_threshold(index, q, 0.7, coarse_threshold=first)
    again = index.lookup(threshold=threshold, coarse_threshold=first).build(q, k)
    assert torch.equal(again.column_indices, lookup.build(q, k).column_indices)


# --- fitting, growing, storing --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("levels", [1, 2])
def test_fit_is_consistent(dtype, levels):
    draw = Draw(5)
    keys, values = (draw.randn(2, 3, 500, 16).to(dtype) for _ in range(2))
    index = CentroidIndex.fit(keys, values=values, ratio=0.1, levels=levels)
    assert (index.length, index.clustered, index.clusters) == (500, 400, 40)
    labels = index.labels()
    for b in range(2):
        for h in range(3):
            for rows, stored in ((keys, index.centroids), (values, index.mean_values)):
                exact, counts = oracle.means(rows[b, h, :400].double(), labels[b, h], 40)
                assert torch.equal(index.counts[b, h].long(), counts)
                torch.testing.assert_close(stored[b, h].double(), exact, rtol=1e-5, atol=1e-5)
            if levels == 2:
                parents = index.parents[b, h].long()
                assert parents[0] == 0 and parents[-1] == 40
                above = torch.arange(8).repeat_interleave(parents.diff())[labels[b, h].long()]
                exact, counts = oracle.means(keys[b, h, :400].double(), above, 8)
                assert torch.equal(index.coarse_counts[b, h].long(), counts)
                torch.testing.assert_close(
                    index.coarse_centroids[b, h].double(), exact, rtol=1e-5, atol=1e-5
                )
    assert "clusters=40" in repr(index)


@pytest.mark.parametrize("levels", [1, 2])
def test_append_joins_the_nearest_cluster(levels):
    draw = Draw(6)
    keys, values = draw.randn(2, 2, 420, 16), draw.randn(2, 2, 420, 8)
    old = CentroidIndex.fit(
        keys[:, :, :300], 30, values=values[:, :, :300], observation_window=50, levels=levels
    )
    new = old.append(keys, values)
    assert (new.length, new.clustered) == (420, 370)
    labels = new.labels()
    assert torch.equal(labels[..., :250], old.labels())
    for b in range(2):
        for h in range(2):
            rows = keys[b, h, :370].double()
            directions = old.centroids[b, h].double()
            directions = directions / directions.norm(dim=1, keepdim=True)
            assert torch.equal(labels[b, h, 250:], oracle.nearest(rows[250:], directions))
            exact, counts = oracle.means(rows, labels[b, h], 30)
            assert torch.equal(new.counts[b, h].long(), counts)
            torch.testing.assert_close(new.centroids[b, h].double(), exact, rtol=1e-5, atol=1e-5)
            exact, _ = oracle.means(values[b, h, :370].double(), labels[b, h], 30)
            torch.testing.assert_close(new.mean_values[b, h].double(), exact, rtol=1e-5, atol=1e-5)
    q = draw.randn(2, 4, 3, 16)
    mask = new.lookup(budget=40).build(q, torch.cat([keys, keys[:, :, :5]], 2))
    mask.validate()
    assert torch.equal(old.append(keys[:, :, :300], values[:, :, :300]).members, old.members)


def test_append_never_fills_an_empty_cluster():
    keys = torch.zeros(1, 1, 60, 8)
    keys[0, 0, :, 0] = -1.0
    index = CentroidIndex.fit(keys[:, :, :40], 5, observation_window=0)
    assert int((index.counts == 0).sum()) == 4  # all keys are equal
    keys[0, 0, 40:, 0] = 1.0  # points away from the only cluster
    assert torch.equal(index.append(keys).counts > 0, index.counts > 0)


def test_save_and_load(tmp_path):
    pytest.importorskip("safetensors")
    keys = Draw(7).randn(1, 2, 300, 16)
    for levels, values in ((1, None), (2, keys)):
        index = CentroidIndex.fit(keys, 20, values=values, levels=levels)
        index.save(tmp_path / "index.safetensors")
        again = CentroidIndex.load(tmp_path / "index.safetensors")
        assert (again.length, again.levels) == (300, levels)
        for name in ("centroids", "counts", "indptr", "members", "mean_values", "parents"):
            before, after = getattr(index, name), getattr(again, name)
            assert (before is None) == (after is None)
            assert before is None or torch.equal(before, after)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a saved CentroidIndex"):
        CentroidIndex.load(tmp_path / "other.safetensors")


def test_safetensors_is_optional(tmp_path, monkeypatch):
    index = CentroidIndex.fit(torch.randn(1, 1, 120, 8), 2)
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install safetensors"):
        index.save(tmp_path / "x")
    with pytest.raises(ImportError, match="pip install safetensors"):
        CentroidIndex.load(tmp_path / "x")


def test_to_and_select():
    index, q, k, _ = case(1)
    assert torch.equal(index.to("cpu").members, index.members)
    last = index.select(batch=index.batch_size - 1, heads=[index.num_heads_kv - 1])
    assert torch.equal(last.centroids[0, 0], index.centroids[-1, -1])


def test_short_prefixes_have_nothing_to_cluster():
    k = torch.randn(1, 2, 60, 16)
    index = CentroidIndex.fit(k[:, :, :50])
    assert (index.clustered, index.clusters) == (0, 0)
    out = sparse_attn.attention(k[:, :, 50:], k, k, index.lookup(percentile=0.7))
    dense = sparse_attn.attention(k[:, :, 50:], k, k)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)


# --- where it is used -----------------------------------------------------------------------------


def prompt(dtype=torch.float32):
    draw = Draw(8)
    k, v = draw.randn(2, 3, 330, 32).to(dtype), draw.randn(2, 3, 330, 32).to(dtype)
    index = CentroidIndex.fit(k[:, :, :280], 25, observation_window=30, values=v[:, :, :280])
    return index, draw.randn(2, 6, 40, 32).to(dtype), k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 40])
def test_attention_and_decode(dtype, rows):
    index, q, k, v = prompt(dtype)
    lookup = index.lookup(percentile=0.6)
    q = q[:, :, :rows]
    mask = lookup.build(q, k).expand_heads(6).to_dense_mask()
    assert not mask.all()
    oracle64 = reference.attention(q.double(), k.double(), v.double(), mask)
    plain = plain_attention(q, k, v, mask)
    found = sparse_attn.attention(q, k, v, lookup, return_lse=True)
    for actual, exact, ordinary in zip(found, oracle64, plain):
        assert_matches_oracle(actual, exact, ordinary)
    cache = torch.nn.functional.pad(k, (0, 0, 0, 20)), torch.nn.functional.pad(v, (0, 0, 0, 20))
    with_cache = sparse_attn.attention_decode(
        q, *cache, index.lookup(threshold=0.003), cache_seqlens=330
    )
    at_once = sparse_attn.attention(q, k, v, index.lookup(threshold=0.003))
    torch.testing.assert_close(with_cache, at_once, rtol=1e-2, atol=1e-2)


def test_sequences_have_their_own_batch_entry():
    index, q, k, v = prompt()
    lookup = index.lookup(threshold=0.003)
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    cu_q, cu_k = (torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (40, 330))
    out = sparse_attn.attention_varlen(*packed, cu_q, cu_k, 40, 330, lookup)
    expected = sparse_attn.attention(q, k, v, lookup).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    mixed = PerHead({2: lookup, 3: lookup}, default=sparse_attn.Dense())
    out = sparse_attn.attention_varlen(*packed, cu_q, cu_k, 40, 330, mixed)
    expected = sparse_attn.attention(q, k, v, mixed).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_heads_of_a_mixture_look_in_their_own_clusters():
    index, q, k, v = prompt()
    lookup = presets.squeezed(index, threshold=0.003)
    mixed = PerHead({2: lookup, 3: lookup, 4: lookup}, default=sparse_attn.Dense())
    out = sparse_attn.attention(q, k, v, mixed)
    dense = sparse_attn.attention(q, k, v)
    torch.testing.assert_close(out[:, [0, 1, 5]], dense[:, [0, 1, 5]], rtol=1e-5, atol=1e-5)
    # Heads 2 to 4 are of unequal groups, so each looks in a copy of its KV head.
    for head in (2, 3, 4):
        kv = slice(head // 2, head // 2 + 1)
        own = index.select(heads=[head // 2]).lookup(threshold=0.003)
        expected = sparse_attn.attention(q[:, head : head + 1], k[:, kv], v[:, kv], own)
        torch.testing.assert_close(out[:, head : head + 1], expected, rtol=1e-5, atol=1e-5)
    own = index.select(heads=[1]).lookup(threshold=0.003)
    one = sparse_attn.attention(q[:, 2:4], k[:, 1:2], v[:, 1:2], own)
    pair = PerHead({2: lookup, 3: lookup}, default=sparse_attn.Dense())
    together = sparse_attn.attention(q, k, v, pair)
    torch.testing.assert_close(together[:, 2:4], one, rtol=1e-5, atol=1e-5)


def test_in_a_model_with_a_fixed_prefix():
    transformers = pytest.importorskip("transformers")
    from sparse_attn.integrations.transformers import enable

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 97, (1, 150), generator=generator)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        dense = model.generate(ids, max_new_tokens=5, do_sample=False)
        cache = model(ids[:, :130]).past_key_values
    indexes = [CentroidIndex.fit(layer.keys, 10, observation_window=20) for layer in cache.layers]
    seen = []

    def pattern(layer, **threshold):
        seen.append(layer)
        return indexes[layer].lookup(**threshold)

    for threshold in ({"threshold": 0.0}, {"budget": 30}):

        def choice(layer, threshold=threshold):
            return pattern(layer, **threshold)

        copied = transformers.DynamicCache()
        for number, layer in enumerate(cache.layers):
            copied.update(layer.keys.clone(), layer.values.clone(), number)
        with enable(choice, decode=choice), torch.no_grad():
            model.set_attn_implementation("sparse_attn")
            found = model.generate(ids, past_key_values=copied, max_new_tokens=5, do_sample=False)
            model.set_attn_implementation("sdpa")
        assert found.shape == (1, 155)
        if "threshold" in threshold:
            assert torch.equal(found, dense)  # everything is kept
    assert sorted(seen) == [0] * 4 + [1] * 4  # each layer's two choices once at each enable


@pytest.mark.parametrize("rows", [1, 40])
def test_estimates_are_the_dense_formula(rows):
    index, q, k, v = prompt()
    q, scale = q[:, :, :rows], 0.4
    lookup = index.lookup(percentile=0.6)
    found = sparse_attn.centroid_attention(q, k, v, lookup, softmax_scale=scale, return_lse=True)
    kept, choice = lookup.build_choice(q, k, softmax_scale=scale)
    mask = kept.expand_heads(6).to_dense_mask()
    left_out = (~choice.keep & (index.counts > 0)[:, :, None]).repeat_interleave(2, 1)
    assert left_out.any()
    # One call over the keys and, behind them, the centroids.
    mask = torch.cat([mask.expand(2, -1, -1, -1), left_out.expand(-1, -1, rows, -1)], -1)
    causal = torch.ones(rows, 330, dtype=torch.bool).tril(330 - rows)
    mask[..., :330] &= causal
    both = [torch.cat([x, means], 2) for x, means in ((k, index.centroids), (v, index.mean_values))]
    bias = torch.zeros(2, 6, rows, 355)
    bias[..., 330:] = index.counts.clamp(min=1).float().log().repeat_interleave(2, 1)[:, :, None]
    exact = reference.attention(
        q.double(),
        *(x.double() for x in both),
        mask,
        bias=bias.double(),
        causal=False,
        softmax_scale=scale,
    )
    plain = plain_attention(q, *both, mask, bias, causal=False, softmax_scale=scale)
    for actual, oracle64, ordinary in zip(found, exact, plain):
        assert_matches_oracle(actual, oracle64, ordinary)
    assert torch.equal(
        sparse_attn.centroid_attention(q, k, v, lookup, softmax_scale=scale), found[0]
    )


def test_estimates_are_exact_where_keys_of_a_cluster_are_equal():
    draw = Draw(9)
    ten, values = draw.randn(1, 1, 10, 16), draw.randn(1, 1, 10, 16)
    k, v = ten.repeat(1, 1, 20, 1), values.repeat(1, 1, 20, 1)
    index = CentroidIndex.fit(k, 10, values=v, observation_window=0, iterations=20)
    k, v = (torch.cat([x, draw.randn(1, 1, 3, 16)], 2) for x in (k, v))
    q = draw.randn(1, 2, 3, 16)
    out = sparse_attn.centroid_attention(q, k, v, index.lookup(budget=20))
    assert index.lookup(budget=20).build(q, k).column_indices.numel() == 20
    torch.testing.assert_close(out, sparse_attn.attention(q, k, v), rtol=1e-5, atol=1e-5)


# --- errors ---------------------------------------------------------------------------------------

INDEX = CentroidIndex.fit(torch.zeros(1, 2, 200, 16), 5)
K = torch.zeros(1, 2, 210, 16)
FIT = CentroidIndex.fit


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FIT([1]), TypeError, "keys is a list"),
        (lambda: FIT(K[0]), ValueError, "pass a floating dtype"),
        (lambda: FIT(K.int()), ValueError, "pass a floating dtype"),
        (lambda: FIT(K, 5, ratio=0.1), ValueError, "pass one"),
        (lambda: FIT(K, 200), ValueError, "num_clusters=200 for 110 keys"),
        (lambda: FIT(K, 0), ValueError, "num_clusters=0"),
        (lambda: FIT(K, ratio=2.0), ValueError, "ratio=2.0"),
        (lambda: FIT(K, ratio="x"), TypeError, "ratio='x'"),
        (lambda: FIT(K, levels=3), ValueError, "levels=3"),
        (lambda: FIT(K, levels=2, coarse_ratio=0.0), ValueError, "coarse_ratio=0.0"),
        (lambda: FIT(K, observation_window=-1), ValueError, "observation_window=-1"),
        (lambda: FIT(K, iterations=1.5), TypeError, "iterations=1.5"),
        (lambda: FIT(K, values=K[:, :1]), ValueError, "differ in batch, heads or length"),
        (lambda: INDEX.append(K, K), ValueError, "no values"),
        (lambda: INDEX.append(K[:, :, :100]), ValueError, "k has 100 keys"),
        (lambda: FIT(K[:, :, :50]).append(K), ValueError, "nothing is clustered"),
        (lambda: INDEX.lookup(), ValueError, "0 of threshold"),
        (lambda: INDEX.lookup(threshold=0.1, budget=3), ValueError, "2 of threshold"),
        (lambda: INDEX.lookup(percentile=1.0), ValueError, "percentile=1.0"),
        (lambda: INDEX.lookup(threshold=math.nan), ValueError, "threshold=nan"),
        (lambda: INDEX.lookup(budget=0), ValueError, "budget=0"),
        (lambda: INDEX.lookup(budget=3, group="sum"), ValueError, "group='sum'"),
        (lambda: INDEX.lookup(budget=3, tile=24), ValueError, "tile=24"),
        (lambda: INDEX.lookup(budget=3, coarse_percentile=0.5), ValueError, "two levels"),
        (
            lambda: FIT(K, levels=2).lookup(budget=3, coarse_percentile=0.5, coarse_threshold=0.1),
            ValueError,
            "coarse_threshold and coarse_percentile",
        ),
        (lambda: INDEX.lookup(budget=3).build(K[:, :, :1], K[:, :1]), ValueError, "2 KV heads"),
        (
            lambda: INDEX.lookup(budget=3).build(K[:, :, :1], K[:, :, :99]),
            ValueError,
            "prefix 200",
        ),
        (lambda: INDEX.select(batch=1), ValueError, "batch=1"),
        (lambda: INDEX.select(heads=[2]), ValueError, "heads="),
        (
            lambda: INDEX.coarse_scores(K, tile_rows=1, softmax_scale=1.0),
            ValueError,
            "one level",
        ),
        (lambda: calibrate_threshold([INDEX], [K, K], 0.5), ValueError, "1 indexes and 2"),
        (lambda: calibrate_threshold(INDEX, K, 2.0), ValueError, "percentile=2.0"),
        (lambda: calibrate_threshold(INDEX, K, 0.5, level="x"), ValueError, "level='x'"),
        (lambda: calibrate_threshold(INDEX, K[:, :1], 0.5), ValueError, "2 KV heads"),
        (
            lambda: sparse_attn.centroid_attention(K[:, :, :1], K, K, "dense"),
            TypeError,
            "pass a CentroidLookup",
        ),
        (
            lambda: sparse_attn.centroid_attention(K[:, :, :1], K, K, INDEX.lookup(budget=3)),
            ValueError,
            "no mean values",
        ),
        (
            lambda: sparse_attn.centroid_attention(
                K, K, K, FIT(K, 5, values=K).lookup(budget=3), q_offset=5
            ),
            ValueError,
            "inside the prefix",
        ),
        (
            lambda: sparse_attn.centroid_attention(
                K, K, K, FIT(K, 5, values=K).lookup(budget=3), sinks=None
            ),
            TypeError,
            "sinks",
        ),
    ],
)
def test_errors_say_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_lookups_are_told_apart_by_identity():
    a, b = INDEX.lookup(budget=3), INDEX.lookup(budget=3)
    assert a == a and a != b and len({a, b}) == 2
    assert isinstance(a, CentroidLookup)
