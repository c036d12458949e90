# SPDX-License-Identifier: Apache-2.0
"""Which calls run densely: the two questions over a made-up table, and that asking is cheap."""

import importlib
import json
import time
from statistics import median

import pytest
import torch

import sparse_attn
from sparse_attn import Adaptive, AShape, PerHead, dispatch, tune
from sparse_attn.__main__ import main as command
from sparse_attn.dispatch import Call, Costs
from sparse_attn.patterns import PatternState, presets

# A pair takes 1 microsecond, a gathered one 1.25; choosing takes 5 ms and 0.1 microseconds a pair.
COSTS = Costs(
    lengths=(64, 1024),
    dense=(1e-6, 1e-6),
    sparse=((0.125, 0.3125, 0.625, 0.9375, 1.25),) * 2,
    selection={"Adaptive": (5e-3, 1e-7, 1e-7), "XAttention": (5e-3, 1e-6, 1e-6)},
)

SPARSE = Adaptive(recall=0.5, block_m=16, window=0)


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    """The table above for every dtype, and the environment as users have it."""
    table = dict.fromkeys(("float32", "bfloat16", "float16"), COSTS)
    monkeypatch.setattr(dispatch, "table", lambda: table)
    monkeypatch.delenv("SPARSE_ATTN_FALLBACK", raising=False)


def inputs(seqlen_q: int, seqlen_k: int | None = None, heads: int = 2):
    generator = torch.Generator().manual_seed(seqlen_q)
    q = torch.randn(1, heads, seqlen_q, 32, generator=generator)
    k, v = torch.randn(2, 1, 2, seqlen_k or seqlen_q, 32, generator=generator)
    return q, k, v


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one, other)


def outputs(q, k, v, pattern):
    """(what attention gives, the pattern's own, dense attention's)."""
    own = sparse_attn.attention(q, k, v, pattern, fallback=False)
    return sparse_attn.attention(q, k, v, pattern), own, sparse_attn.attention(q, k, v)


def test_pairs_are_counted_as_a_loop_counts_them():
    for rows, keys, offset in ((5, 5, 0), (5, 9, 4), (7, 4, -3), (3, 4, 9), (6, 4, -9), (1, 1, 0)):
        q, k = torch.empty(2, 3, rows, 8), torch.empty(2, 3, keys, 8)
        for causal in (True, False):
            limits = [min(max(i + offset + 1, 0), keys) if causal else keys for i in range(rows)]
            call = dispatch.shape_of(q, k, causal, offset)
            assert (call.heads, call.pairs) == (6, sum(limits)), (rows, keys, offset, causal)


def test_short_calls_run_densely_and_long_ones_as_asked():
    # All keys of 64 rows are near them: reading them takes longer than dense attention.
    found, own, dense = outputs(*inputs(64), SPARSE)
    assert same(found, dense) and not same(own, dense)
    found, own, dense = outputs(*inputs(512), SPARSE)
    assert same(found, own) and not same(own, dense)


def test_the_break_even_is_where_the_table_puts_it():
    # rows^2 / 2 pairs: dense d, choosing 5 ms + d / 5 (nearly), reading 1.25 * 256 / rows of d.
    for rows, dense in ((400, True), (430, False)):
        call = Call(1, rows, rows, rows * (rows + 1) // 2, 64, 1)
        assert COSTS.before("Adaptive", call).dense == dense
    # Threads divide the work and not the fixed cost: dense attention wins for longer.
    assert COSTS.before("Adaptive", Call(1, 430, 430, 92665, 64, 4)).dense
    # A dearer choice never pays here; a class that was not measured costs what Adaptive does.
    assert COSTS.before("XAttention", Call(1, 4000, 4000, 8_002_000, 64, 1)).dense
    assert not COSTS.before("Unheard", Call(1, 430, 430, 92665, 64, 1)).dense


def test_full_indexes_run_densely(monkeypatch):
    q, k, v = inputs(512)
    for recall, gathers_most in ((1.0, True), (0.5, False)):
        index = Adaptive(recall=recall, block_m=16).build(q, k)
        assert dispatch.after(index, q, k, True, 0).dense == gathers_most
    built = []
    dense_build = sparse_attn.Dense.build
    monkeypatch.setattr(
        sparse_attn.Dense, "build", lambda *a, **kw: built.append(1) or dense_build(*a, **kw)
    )
    sparse_attn.attention(q, k[:, :, :509], v[:, :, :509], Adaptive(recall=1.0, block_m=16))
    assert built


@pytest.mark.parametrize("name", ["vertical_slash", "adaptive"])
def test_density_from_list_lengths_is_that_of_the_index(name):
    q, k, _ = inputs(1024)
    index = sparse_attn.patterns.resolve(name, 2).build(q, k)
    told = dispatch._listed_density(index, dispatch.shape_of(q, k, True, 0), True)
    tile = index.density().tile
    assert told == pytest.approx(tile, abs=0.1)


def test_what_is_a_models_own_always_runs():
    q, k, v = inputs(64)
    index = SPARSE.build(q, k)
    state = sparse_attn.HiPState(sparse_attn.HiP(mask_k=16, window=20, sink=3))
    per_head = PerHead({0: AShape(4, 8)}, default=AShape(4, 16))
    for pattern in (AShape(sink=2, window=8), index, state, per_head):
        assert same(sparse_attn.attention(q, k, v, pattern), outputs(q, k, v, index)[1]) == (
            pattern is index
        )
        assert not same(sparse_attn.attention(q, k, v, pattern), sparse_attn.attention(q, k, v))
    assert not PatternState.approximates and presets.xattention().approximates
    assert not presets.streaming_llm().approximates


def test_decoding_runs_as_asked():
    q, k, v = inputs(1, 200)
    found, own, _ = outputs(q, k, v, SPARSE)
    assert same(found, own)


def test_the_environment_and_the_argument_switch_it_off(monkeypatch):
    q, k, v = inputs(64)
    pattern = SPARSE
    _, own, dense = outputs(q, k, v, pattern)
    monkeypatch.setenv("SPARSE_ATTN_FALLBACK", "0")
    assert same(sparse_attn.attention(q, k, v, pattern), own)
    assert same(sparse_attn.attention(q, k, v, pattern, fallback=True), dense)


def test_packed_sequences_are_decided_one_by_one():
    pattern = SPARSE
    q, k, v = (x[0].transpose(0, 1) for x in inputs(576))
    starts = torch.tensor([0, 64, 576], dtype=torch.int32)
    out = sparse_attn.attention_varlen(q, k, v, starts, starts, 512, 512, pattern)
    for begin, end, dense in ((0, 64, True), (64, 576, False)):
        part = [x[begin:end].transpose(0, 1)[None] for x in (q, k, v)]
        expected = sparse_attn.attention(*part, "dense" if dense else pattern, fallback=False)
        assert same(out[begin:end].transpose(0, 1)[None], expected)


def test_calls_over_parts_take_the_argument():
    q, k, v = inputs(64)
    own = outputs(q, k, v, SPARSE)[1]
    ranges = torch.tensor([[0, 64, 0, 64, 0]], dtype=torch.int32)
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    starts = torch.tensor([0, 64], dtype=torch.int32)
    lens, no = torch.tensor([64]), {"fallback": False}
    found = sparse_attn.attention_varlen(*packed, starts, starts, 64, 64, SPARSE, **no)
    assert same(found.transpose(0, 1)[None], own)
    assert same(sparse_attn.attention_ranges(q, k, v, SPARSE, ranges, **no), own)
    assert same(sparse_attn.attention_decode(q, k, v, SPARSE, cache_seqlens=lens, **no), own)
    assert same(sparse_attn.attention_decode(q, k, v, SPARSE, **no), own)
    assert same(sparse_attn.attention_decode(q, k, v, SPARSE), sparse_attn.attention(q, k, v))


def test_pages_are_not_gathered_for_dense_attention(monkeypatch):
    attend = importlib.import_module("sparse_attn.attention")
    gather, gathered = attend.gather_pages, []
    monkeypatch.setattr(attend, "gather_pages", lambda *a: gathered.append(a[2]) or gather(*a))
    q, k, v = (x.expand(2, -1, -1, -1) for x in inputs(64, 512))
    pools = tuple(x.transpose(1, 2).reshape(-1, 16, 2, 32) for x in (k, v))
    lens, table = torch.tensor([512, 64]), torch.arange(64, dtype=torch.int32).view(2, 32)
    # 64 rows near 512 keys: reading a tenth pays; near 64 keys it never does.
    monkeypatch.setitem(COSTS.selection, "Adaptive", (0.0, 0.0, 0.0))
    paged = {"cache_seqlens": lens, "block_table": table}
    out = sparse_attn.attention_decode(q, *pools, SPARSE, **paged)
    assert gathered == [512]
    first = sparse_attn.attention(q[:1], k[:1], v[:1], SPARSE, fallback=False)
    last = sparse_attn.attention(q[1:], k[1:, :, :64], v[1:, :, :64])
    assert same(out, torch.cat((first, last)))
    sparse_attn.attention_decode(q, *pools, SPARSE, **paged, fallback=False)
    assert gathered == [512, 512, 64]


def test_explain_says_what_runs_and_why():
    short = sparse_attn.explain(*inputs(64), SPARSE)
    assert short.runs_dense and "choosing 5." in short.why
    long = sparse_attn.explain(*inputs(512), SPARSE)
    assert not long.runs_dense and "of the keys take" in long.why
    off = sparse_attn.explain(*inputs(64), SPARSE, fallback=False)
    assert not off.runs_dense and "fallback is off" in str(off)
    assert "always runs as asked" in sparse_attn.explain(*inputs(64), AShape(2, 8)).why
    told = json.loads(json.dumps(short.as_dict()))
    assert told["runs_dense"] and told["gain"] == pytest.approx(short.gain)
    assert len(told["tile_density_per_head"][0]) == 2
    assert "dense attention: choosing" in str(short)


def test_asking_costs_less_than_a_short_call():
    q, k, _ = inputs(300)
    pattern, index = SPARSE, SPARSE.build(q, k)

    def both():
        dispatch.before(pattern, q, k, True, 0)
        dispatch.after(index, q, k, True, 0)

    def seconds(call):
        start = time.thread_time()
        call()
        return time.thread_time() - start

    both()
    build = median(seconds(lambda: pattern.build(q, k)) for _ in range(31))
    assert median(seconds(both) for _ in range(31)) < build


# ------------------------------------------------------------------------------ the table


@pytest.fixture
def real_table(monkeypatch, tmp_path):
    """The table as it is read, from an empty cache folder."""
    monkeypatch.undo()
    monkeypatch.setenv("SPARSE_ATTN_CACHE", str(tmp_path))
    dispatch.table.cache_clear()
    yield tmp_path / "costs.json"
    dispatch.table.cache_clear()


def test_the_package_ships_a_table_of_every_pattern(real_table):
    names = {type(pattern).__name__ for pattern in tune.approximating()}
    for costs in dispatch.table().values():
        assert set(costs.selection) == names
        lengths = len(costs.lengths)
        assert len(costs.dense) == len(costs.sparse) == lengths
        assert all(len(row) == len(dispatch.DENSITIES) for row in costs.sparse)
        assert all(len(row) == lengths + 1 for row in costs.selection.values())
    assert set(dispatch.table()) == {str(d).removeprefix("torch.") for d in tune.DTYPES}


def test_a_kept_table_is_read_and_one_of_another_machine_is_not(real_table, monkeypatch):
    shipped = dispatch.table()
    made = dict.fromkeys(shipped, COSTS)
    dispatch.save(made, real_table)
    assert dispatch.table() == made
    for damage in ("", "[]", "{}", '{"machine": {}}'):
        real_table.write_text(damage)
        dispatch.table.cache_clear()
        assert dispatch.table() == shipped
    dispatch.save(made, real_table)
    monkeypatch.setattr(dispatch, "machine", lambda: {"format": -1})
    dispatch.table.cache_clear()
    assert dispatch.table() == shipped


def test_tune_measures_and_keeps_a_table(real_table, monkeypatch, capsys):
    monkeypatch.setattr(tune, "LENGTHS", (64, 128))
    monkeypatch.setattr(tune, "measure", lambda dtype: measure(dtype, (64, 128)))
    threads = torch.get_num_threads()
    assert command(["tune"]) == 0
    assert str(real_table) in capsys.readouterr().out
    assert torch.get_num_threads() == threads
    kept = dispatch.table()["float32"]
    assert kept.lengths == (64, 128) and min(kept.dense) > 0
    assert all(min(row) > 0 for row in kept.sparse)


measure = tune.measure
