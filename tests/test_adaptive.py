# SPDX-License-Identifier: Apache-2.0
"""Adaptive: its lists against the written rule, its contract, and calls in bands of rows."""

import math

import numpy as np
import pytest
import torch
from cases import capabilities, forced_capability

import sparse_attn
from sparse_attn import Adaptive, PerHead, SparseIndex, ops
from sparse_attn.patterns import adaptive, presets
from sparse_attn.patterns.adaptive import adaptive_lists

# ------------------------------------------------------------------------------ the rule


def rule(q, k, *, mass, guard, block_m, sink, window, q_offset, causal, softmax_scale):
    """The kept keys of every tile as the class states them, one key at a time.

    Integers of q and k make S . k exact in float32; the two roundings that the rule names (the
    factor's product and the difference to the best) are done in float32 by numpy.
    """
    batch, heads, seqlen_q, dim = q.shape
    heads_kv, seqlen_k = k.shape[1], k.shape[2]
    kept = {}
    for b in range(batch):
        for h in range(heads):
            keys = k[b, h // (heads // heads_kv)].tolist()
            for tile, first in enumerate(range(0, seqlen_q, block_m)):
                rows = q[b, h, first : first + block_m].tolist()
                total_row = [sum(row[d] for row in rows) for d in range(dim)]
                last = first + len(rows) - 1 + q_offset
                limit = min(max(last + 1, 0), seqlen_k) if causal else seqlen_k
                x = scores(
                    total_row, keys[:limit], 4 * math.log2(math.e) * softmax_scale / len(rows)
                )
                checks = []
                for at in (len(rows) // 4, 3 * len(rows) // 4):
                    row = scores(rows[at], keys[:limit], 4 * math.log2(math.e) * softmax_scale)
                    seen = max(first + at + q_offset + 1, 0) if causal else limit
                    checks.append(row[:seen])
                near = range(first + q_offset - window, last + 1)
                kept[b, h, tile] = keep(x, checks, mass, guard, sink, near)
    return kept


def scores(query, keys, factor):
    """x of every key, two roundings: product and factor."""
    products = (np.array(keys).reshape(-1, len(query)) * np.array(query)).sum(1)
    return list(np.float32(factor) * products.astype(np.float32))


def levels_of(x):
    """The level of every key, or None if the best is no finite number."""
    numbers = [value for value in x if not np.isnan(value)]
    if not numbers or not np.isfinite(max(numbers)):
        return None
    gaps = [np.float32(max(numbers)) - value for value in x]
    return [125 if np.isnan(gap) or gap >= 125 else int(math.floor(gap)) for gap in gaps]


def keep(x, rows, mass, guard, sink, near):
    """The kept keys of one tile, ascending."""
    weights = [round(2 ** (31 - level / 4)) for level in range(125)] + [0]
    everything = set(range(len(x)))
    levels = levels_of(x)
    if levels is None:
        return sorted(everything)
    weight = [weights[level] for level in levels]
    checks = []
    for row in rows:
        check = [weights[level] for level in levels_of(row) or []]
        checks.append(check + [0] * (len(x) - len(check)))
    chosen = {j for j in everything if j < sink or j in near}
    others = sorted(everything - chosen, key=lambda j: (levels[j], j))
    target = math.ceil(mass * sum(weight))
    check_targets = [math.ceil(guard * sum(check)) for check in checks]
    total = sum(weight[j] for j in chosen)
    check_totals = [sum(check[j] for j in chosen) for check in checks]
    entered, too_little = -1, False
    for j in others:
        if levels[j] != entered:
            entered = levels[j]
            too_little = any(t < g for t, g in zip(check_totals, check_targets, strict=True))
        if too_little or total < target:
            chosen.add(j)
            total += weight[j]
            check_totals = [t + check[j] for t, check in zip(check_totals, checks, strict=True)]
    return sorted(chosen)


def listed(kept, limit_of):
    """(blocks, columns) of every tile: granules of 16 with 12 kept keys, or all there are."""
    lists = {}
    for place, keys in kept.items():
        blocks, columns = [], []
        for start in range(0, limit_of(place), 16):
            inside = [j for j in keys if start <= j < start + 16]
            there = min(16, limit_of(place) - start)
            if len(inside) >= min(12, there):
                blocks.append(start)
            else:
                columns += inside
        lists[place] = (blocks, columns)
    return lists


def lists_of(result, shape):
    """The four tensors of the operator as the same dictionary."""
    block_counts, blocks, column_counts, columns = (t.tolist() for t in result)
    found, at_block, at_column = {}, 0, 0
    for b in range(shape[0]):
        for h in range(shape[1]):
            for tile, (nb, nc) in enumerate(
                zip(block_counts[b][h], column_counts[b][h], strict=True)
            ):
                found[b, h, tile] = (
                    blocks[at_block : at_block + nb],
                    columns[at_column : at_column + nc],
                )
                at_block, at_column = at_block + nb, at_column + nc
    assert (at_block, at_column) == (len(blocks), len(columns))
    return found


def random_case(seed):
    """A small problem of integers, and the arguments of the rule."""
    draw = np.random.default_rng(seed)
    batch, heads_kv, group = (int(draw.integers(1, high)) for high in (4, 3, 4))
    seqlen_q = int(draw.integers(1, 200)) if seed % 4 else int(draw.integers(1, 20))
    seqlen_k = seqlen_q + int(draw.integers(0, 300)) if seed % 3 else int(draw.integers(1, 701))
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    spread = int(draw.integers(1, 4))

    def integers(heads, seqlen):
        values = draw.integers(-spread, spread + 1, (batch, heads, seqlen, 8))
        return torch.from_numpy(values).to(dtype)

    arguments = {
        "mass": float(draw.choice([0.0, 0.3, 0.7, 0.9, 0.98, 0.999, 1.0])),
        "guard": float(draw.choice([0.0, 0.5, 0.9, 0.99, 1.0])),
        "block_m": int(draw.choice([1, 16, 48, 64, 128])) if seqlen_q < 60 else 64,
        "sink": int(draw.choice([0, 1, 4, 40])),
        "window": int(draw.choice([0, 3, 16, 100])),
        "q_offset": seqlen_k - seqlen_q if seed % 5 else int(draw.integers(-30, 60)),
        "causal": bool(seed % 7),
        "softmax_scale": float(draw.choice([0.35, 1.0, -0.2, 0.01])),
    }
    return integers(heads_kv * group, seqlen_q), integers(heads_kv, seqlen_k), arguments


def expected(q, k, arguments):
    """The lists by the rule."""

    def limit_of(place):
        last = min((place[2] + 1) * arguments["block_m"], q.shape[2]) + arguments["q_offset"]
        return min(max(last, 0), k.shape[2]) if arguments["causal"] else k.shape[2]

    return listed(rule(q, k, **arguments), limit_of)


@pytest.mark.parametrize("part", range(10))
def test_lists_follow_the_rule_exactly(part):
    for seed in range(part * 21, part * 21 + 21):
        q, k, arguments = random_case(seed)
        found = lists_of(ops.adaptive_lists(q, k, **arguments), q.shape)
        assert found == expected(q, k, arguments), (seed, arguments)


def test_lists_without_forced_keys_and_without_guard():
    for seed in range(20):
        q, k, arguments = random_case(seed)
        arguments |= {"sink": 0, "window": 0, "q_offset": k.shape[2] + 5, "guard": 0.0, "mass": 0.6}
        found = lists_of(ops.adaptive_lists(q, k, **arguments), q.shape)
        assert found == expected(q, k, arguments), (seed, arguments)


@pytest.mark.parametrize("part", range(4))
def test_plain_torch_gives_the_same_lists(part):
    for seed in range(part * 9, part * 9 + 9):
        q, k, arguments = random_case(seed)
        native = lists_of(ops.adaptive_lists(q, k, **arguments), q.shape)
        assert lists_of(adaptive_lists(q, k, **arguments), q.shape) == native, (seed, arguments)


@pytest.mark.parametrize("capability", capabilities())
def test_every_instruction_set_gives_the_same_lists(capability):
    for seed in range(12):
        q, k, arguments = random_case(seed)
        with forced_capability(capability):
            found = lists_of(ops.adaptive_lists(q, k, **arguments), q.shape)
        assert found == expected(q, k, arguments)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers(bad):
    q, k, arguments = random_case(8)
    k[0, 0, 3] = bad  # inf * 0 and sums of both infinities give NaN
    q, k = q.float(), k.float()
    found = lists_of(ops.adaptive_lists(q, k, **arguments), q.shape)
    with np.errstate(all="ignore"):
        assert found == expected(q, k, arguments)
    k[:] = math.nan
    found = lists_of(ops.adaptive_lists(q, k, **arguments), q.shape)
    assert found == expected(q, k, arguments)
    assert lists_of(adaptive_lists(q, k, **arguments), q.shape) == found


def test_example_by_hand():
    # One row, scale ln 2: keys 0 to 3 weigh 8, 4, 2, 1; the row is key 3, kept in any case.
    q = torch.zeros(1, 1, 1, 8)
    q[..., 0] = 1
    k = torch.zeros(1, 1, 4, 8)
    k[0, 0, :, 0] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    numbers = {"block_m": 1, "sink": 0, "window": 0, "q_offset": 3, "causal": True}
    wanted = {0.5: [0, 3], 0.61: [0, 1, 3], 0.86: [0, 1, 3], 0.87: [0, 1, 2, 3]}
    # One row is its own check: a guard alone chooses the same.
    both = [(mass, 0.0) for mass in wanted] + [(0.0, guard) for guard in wanted]
    for mass, guard in both:
        keys = wanted[max(mass, guard)]
        result = ops.adaptive_lists(
            q, k, mass=mass, guard=guard, softmax_scale=math.log(2), **numbers
        )
        blocks, columns = lists_of(result, q.shape)[0, 0, 0]
        assert (blocks == [0]) if len(keys) == 4 else (columns == keys), (mass, guard)


def test_rows_that_disagree_widen_their_tile():
    # Every row looks at a key of its own, far back, and the rows' sum is 0: it tells nothing.
    q = (64 * torch.eye(64) - 1)[None, None]
    k = torch.zeros(1, 1, 4096, 64)
    k[0, 0, 7 : 7 + 64 * 50 : 50] = torch.eye(64)
    numbers = {
        "block_m": 64,
        "sink": 4,
        "window": 0,
        "q_offset": 4032,
        "causal": True,
        "softmax_scale": 1.0,
    }
    for guard, kept in ((0.0, 0.1), (0.9, 1.0)):
        counts = ops.adaptive_lists(q, k, mass=0.1, guard=guard, **numbers)
        keys = 16 * int(counts[0].sum()) + int(counts[2].sum())
        assert abs(keys / 4096 - kept) < 0.02


def test_what_the_sink_holds_counts():
    # Key 0 weighs 2 ** 20, key 100 weighs 8 and key 101 weighs 1.
    q = torch.zeros(1, 1, 1, 8)
    q[..., 0] = 1
    k = torch.full((1, 1, 400, 8), -40.0)
    k[0, 0, [0, 100, 101], 0] = torch.tensor([20.0, 3.0, 0.0])
    numbers = {"block_m": 1, "sink": 1, "window": 8, "q_offset": 399, "causal": True}
    for mass, far in ((0.99999, []), (1 - 8e-6, [100]), (1 - 5e-7, [100, 101])):
        result = ops.adaptive_lists(
            q, k, mass=mass, guard=0.0, softmax_scale=math.log(2), **numbers
        )
        blocks, columns = lists_of(result, q.shape)[0, 0, 0]
        assert blocks == [] and columns == [0, *far, *range(391, 400)]


@pytest.mark.parametrize("at", [16, 48])
def test_either_checking_row_is_served(at):
    # One row alone looks at key 300; the mean of its tile of 64 looks at key 10.
    q = torch.zeros(1, 1, 64, 8)
    q[..., 0] = 8
    q[0, 0, at] = torch.tensor([0.0, 30, 0, 0, 0, 0, 0, 0])
    k = torch.zeros(1, 1, 1064, 8)
    k[0, 0, 10, 0], k[0, 0, 300, 1] = 4, 0.5
    numbers = {"block_m": 64, "sink": 1, "window": 8, "q_offset": 1000, "causal": True}
    numbers |= {"mass": 0.5, "softmax_scale": 1.0}
    for guard, kept in ((0.0, False), (0.9, True)):
        result = ops.adaptive_lists(q, k, guard=guard, **numbers)
        blocks, columns = lists_of(result, q.shape)[0, 0, 0]
        assert (300 in columns or 288 in blocks) == kept and 10 in columns + [
            b + 10 for b in blocks
        ]


# ------------------------------------------------------------------------------ the contract


def heads(seed=0, seqlen=700, batch=2, num_heads=6, heads_kv=2, dim=32):
    """q, k and v; the query rows of a head lie around a direction of its own, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, n, seqlen, dim, generator=generator)
        for n in (num_heads, heads_kv, heads_kv)
    )
    return [q + 2.0 * torch.randn(batch, num_heads, 1, dim, generator=generator), k, v]


def same(one: SparseIndex, other: SparseIndex) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("block_indptr", "block_indices", "column_indptr", "column_indices")
    )


def test_lists_are_valid_and_hold_what_is_forced():
    q, k, _ = heads()
    index = Adaptive(recall=0.5, sink=5).build(q, k).validate()
    assert 0 < index.density().element < 0.9
    mask = index.to_dense_mask()
    rows = torch.arange(700)
    assert mask[..., rows, rows].all() and mask[..., :5].all()
    assert mask[..., rows[128:], rows[:-128]].all()  # the window


def test_threads_and_runs_agree():
    q, k, _ = heads()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = Adaptive().build(q, k)
        torch.set_num_threads(2)
        assert all(same(alone, Adaptive().build(q, k)) for _ in range(3))
    finally:
        torch.set_num_threads(before)


def test_permuting_batch_and_heads_permutes_the_choice():
    q, k, _ = heads()
    mask = Adaptive().build(q, k).to_dense_mask()
    permuted = Adaptive().build(q[[1, 0]][:, [3, 4, 5, 0, 1, 2]], k[[1, 0]][:, [1, 0]])
    assert torch.equal(permuted.to_dense_mask(), mask[[1, 0]][:, [3, 4, 5, 0, 1, 2]])


def test_chunks_of_whole_tiles_choose_what_one_call_does():
    q, k, _ = heads()
    whole = Adaptive().build(q, k).to_dense_mask()
    for first in range(0, 700, 256):
        part = Adaptive().build(q[:, :, first : first + 256], k, q_offset=first)
        assert torch.equal(part.to_dense_mask(), whole[:, :, first : first + 256])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bands_give_exactly_the_whole(monkeypatch, dtype):
    q, k, v = (x.to(dtype) for x in heads())
    pattern = Adaptive()
    whole = sparse_attn.attention(q, k, v, pattern.build(q, k), return_lse=True)
    monkeypatch.setattr(adaptive, "MAX_INDEX_BYTES", 2 * 12 * 700 * 4)
    assert pattern.band_rows(q, k) == 256
    built = []
    build = Adaptive.build
    monkeypatch.setattr(
        Adaptive, "build", lambda *args, **kw: built.append(args[1].shape[2]) or build(*args, **kw)
    )
    for chosen in (pattern, "adaptive", presets.Preset("a", pattern, "", ()), [pattern] * 6):
        found = sparse_attn.attention(q, k, v, chosen, return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    assert built == 4 * [256, 256, 188]


def test_bands_have_gradients(monkeypatch):
    q, k, v = (x.requires_grad_() for x in heads(seqlen=200))
    parts = []
    for first in range(0, 200, 128):
        out = sparse_attn.attention(q[:, :, first : first + 128], k, v, Adaptive(), q_offset=first)
        parts.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    monkeypatch.setattr(adaptive, "MAX_INDEX_BYTES", 1)
    out = sparse_attn.attention(q, k, v, Adaptive())
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    for total, terms in zip(found, zip(*parts, strict=True), strict=True):
        terms = torch.stack(terms).double()
        bound = len(parts) * torch.finfo(torch.float32).eps * terms.abs().sum(0)
        assert ((total - terms.sum(0)).abs() <= bound).all()


def test_bands_of_mixed_heads():
    q, k, _ = heads()
    q = q[:, :, :1].expand(-1, -1, 1 << 20, -1)
    k = k[:, :, :1].expand(-1, -1, 1 << 20, -1)
    rows = Adaptive().band_rows(q, k)
    assert rows is not None and rows % 128 == 0
    mixed = PerHead({0: Adaptive(), 1: Adaptive(block_m=48)}, default=sparse_attn.Dense())
    assert mixed.band_rows(q, k) % 384 == 0
    # What depends on all rows cannot be cut.
    mixed = PerHead({0: Adaptive()}, default=sparse_attn.VerticalSlash())
    assert mixed.band_rows(q, k) is None
    assert PerHead({0: sparse_attn.Dense()}, default=sparse_attn.AShape()).band_rows(q, k) is None


def test_index_of_131072_tokens_stays_below_64_mib():
    q = torch.empty(1, 8, 131072, 128, device="meta")
    rows = Adaptive().band_rows(q, q)
    # No tile can list more: 11 columns in every granule.
    assert rows // 128 * 8 * (131072 // 16) * 11 * 4 <= 64 << 20


def test_recall_is_what_was_asked_for_on_random_heads():
    q, k, v = heads(seqlen=2048, batch=1)
    dense = sparse_attn.attention(q, k, v, return_lse=True)[1]
    recalls = []
    for recall in (0.8, 0.9, 0.95, 1.0):
        lse = sparse_attn.attention(q, k, v, Adaptive(recall=recall), return_lse=True)[1]
        recalls.append(torch.exp(lse - dense).mean().item())
    assert recalls == sorted(recalls)
    assert recalls[-1] > 0.9999


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"recall": "high"}, TypeError, "recall='high' is a str"),
        ({"recall": True}, TypeError, "recall=True is a bool"),
        ({"recall": 0.0}, ValueError, r"recall=0.0 is outside \(0, 1\]"),
        ({"recall": 1.5}, ValueError, r"recall=1.5 is outside \(0, 1\]"),
        ({"recall": math.nan}, ValueError, r"recall=nan is outside \(0, 1\]"),
        ({"block_m": 20}, ValueError, "block_m=20 is neither 1 nor a multiple of 16"),
        ({"sink": -1}, ValueError, "sink=-1 is below 0"),
        ({"window": -1}, ValueError, "window=-1 is below 0"),
        ({"window": 1.0}, TypeError, "window=1.0 is a float"),
    ],
)
def test_wrong_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        Adaptive(**arguments)


def test_operator_refuses_what_it_cannot_read():
    q, k, arguments = random_case(1)
    for name, value in (
        ("mass", 1.5),
        ("mass", math.nan),
        ("guard", -0.1),
        ("block_m", 0),
        ("sink", -1),
        ("window", -1),
        ("q_offset", 1 << 40),
    ):
        with pytest.raises(RuntimeError, match=name):
            ops.adaptive_lists(q, k, **{**arguments, name: value})
    with pytest.raises(RuntimeError, match="differ"):
        ops.adaptive_lists(q, torch.cat((k, k), 3), **arguments)


def test_operator_is_registered_soundly():
    q, k, arguments = random_case(2)
    torch.library.opcheck(torch.ops.sparse_attn.adaptive_lists, (q, k, *arguments.values()))


def test_empty_calls():
    q, k, v = heads(seqlen=0)
    assert sparse_attn.attention(q, k, v, Adaptive()).shape == q.shape
    for lists in (ops.adaptive_lists, adaptive_lists):
        arguments = random_case(1)[2] | {"block_m": 64}
        assert [t.numel() for t in lists(q, k, **arguments)] == [0, 0, 0, 0]
        some, none, _ = heads(seqlen=70)[0], k, v
        counts = lists(some, none, **arguments)
        assert [int(t.sum()) for t in counts] == [0, 0, 0, 0]
