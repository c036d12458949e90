# SPDX-License-Identifier: Apache-2.0
"""The benchmark: its arithmetic alone, the cases it makes, and small runs to the report."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_attn
from sparse_attn import ops
from sparse_attn.__main__ import main
from sparse_attn.bench import machine, peers, report, runner, suites, timing
from sparse_attn.bench.cases import Case, Choice, Keys, Problem

REPO = Path(__file__).resolve().parents[1]

# --- timing ---------------------------------------------------------------------------------------


class Clock:
    """Stands in for the time module: calls advance it by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return 2 * self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(timing, "time", fake)
    return fake


def test_calls_take_turns(clock: Clock) -> None:
    order: list[str] = []

    def call(name: str, seconds: float) -> Any:
        def run() -> None:
            order.append(name)
            clock.now += seconds

        return run

    prepared: list[str] = []
    times = timing.interleaved(
        {"a": call("a", 0.5), "b": call("b", 0.25)}, rounds=4, before=prepared.append
    )
    assert order == prepared == ["a", "b"] * 4
    assert times["a"].wall == [0.5] * 4
    assert times["b"].cpu == [0.5] * 4
    assert times["a"].number == 1


def test_short_calls_are_repeated_and_divided(clock: Clock) -> None:
    count = itertools.count()

    def call() -> None:
        next(count)
        clock.now += 0.25e-3

    times = timing.interleaved({"a": call}, rounds=3, min_sample=1e-3)["a"]
    assert times.number == 4
    assert next(count) == 1 + 3 * (1 + 4)  # an estimate, and one untimed in a round
    assert times.wall == pytest.approx([0.25e-3] * 3)


def test_rounds_end_when_the_time_is_up(clock: Clock) -> None:
    def call() -> None:
        clock.now += 1.0

    assert len(timing.interleaved({"a": call}, rounds=9, seconds=5.5)["a"].wall) == 6
    assert len(timing.interleaved({"a": call}, rounds=9, seconds=0.0)["a"].wall) == 3
    assert len(timing.interleaved({"a": call}, rounds=2, seconds=0.0)["a"].wall) == 2


def test_percentiles() -> None:
    values = torch.randperm(11).double().tolist()
    assert timing.spread(values, 10.0) == {"p20": 20.0, "p50": 50.0, "p80": 80.0}
    assert timing.spread([3.0]) == {"p20": 3.0, "p50": 3.0, "p80": 3.0}


def test_a_ratio_is_taken_inside_rounds() -> None:
    """A slowdown that hits both in some rounds leaves it; the ratio of medians would be 4."""
    assert timing.paired_ratio([2.0, 20.0, 20.0], [1.0, 5.0, 10.0]) == 2.0
    with pytest.raises(ValueError):
        timing.paired_ratio([1.0], [1.0, 2.0])


# --- cases ----------------------------------------------------------------------------------------


def test_work_of_a_problem() -> None:
    problem = Problem("bfloat16", 3, 5, 8, heads=4, heads_kv=2, batch=2)
    pairs = sum(min(5, row + 2 + 1) for row in range(3))
    assert problem.dense_flops == 2 * 4 * pairs * 8 * 4
    assert problem.dense_bytes == 2 * 2 * 2 * 5 * 8 * 2
    assert (problem.phase, Problem("float32", 5, 5, 8).phase) == ("decode", "prefill")
    assert all(torch.equal(a, b) for a, b in zip(problem.inputs(), problem.inputs(), strict=True))


PREFILL = Problem("float32", 1000, 1000, 16, heads=4, heads_kv=2)
DECODE = Problem("float32", 1, 1000, 16, heads=4, heads_kv=2)


@pytest.mark.parametrize("problem", [PREFILL, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize("kind", ["blocks", "columns", "streaming", "ragged"])
def test_density_is_what_was_asked_for(problem: Problem, kind: str) -> None:
    found = Keys(problem, Choice(kind, 0.5)).index.density()
    # Tiles hold whole blocks of 64: 16 of them, the own one always.
    assert found.element == pytest.approx(0.5, abs=0.07)
    if kind == "ragged":
        assert found.element_per_head[0, 0] > 2 * found.element_per_head[0, 1]


def test_columns_are_as_many_keys_as_the_blocks_hold() -> None:
    blocks, columns = (Keys(PREFILL, Choice(kind, 0.3)).index for kind in ("blocks", "columns"))
    causal = torch.ones(1000, 1000, dtype=torch.bool).tril()
    counts = [(index.to_dense_mask() & causal).sum(-1) for index in (blocks, columns)]
    assert torch.equal(*counts)
    assert columns.column_indptr[0, 0, -1] > 0


def test_finer_tiles_see_the_same_keys() -> None:
    coarse, fine = (Keys(PREFILL, Choice("blocks", 0.3, block_m=m)).index for m in (64, 16))
    assert (coarse.block_m, fine.block_m) == (64, 16)
    assert torch.equal(coarse.to_dense_mask(), fine.to_dense_mask())


def test_peak_is_that_of_the_instructions_used() -> None:
    assert machine.peak_name(torch.bfloat16, "avx512_bf16") == "bf16_512"
    assert machine.peak_name(torch.bfloat16, "avx512") == "fp32_512"
    assert machine.peak_name(torch.float16, "avx512_bf16") == "fp32_512"
    assert machine.peak_name(torch.float32, "avx2") == "fp32_256"


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_limits_of_the_machine() -> None:
    one, two = machine.Machine(), machine.Machine(threads=2)
    for name in (*machine.FMA_BITS, *machine.READ_BYTES):
        limit, shared = one.limit(name), two.limit(name)
        assert (limit is None) == (shared is None)
        if limit is None or shared is None:  # not on this CPU
            continue
        # Threads do as much each; main memory and L3 they share.
        assert shared.amount / limit.amount == pytest.approx(2 if limit.unit == "flop" else 1)
    assert one.limit(machine.peak_name(torch.float32)) is not None


def test_without_a_compiler_shares_are_unknown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda _: None)
    file = tmp_path / "bench.json"
    command = "bench --seqlen 64 --head-dim 32 --density 1 --peers --rounds 1 --seconds 0"
    assert main([*command.split(), "--json", str(file)]) == 0
    assert "no C++ compiler is found" in capsys.readouterr().out
    (record,) = json.loads(file.read_text())["records"]
    assert record["share_of_peak"] is None and record["ratio_to_best_dense_peer"] is None


# --- peers ----------------------------------------------------------------------------------------


def test_every_instruction_set_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_ATTN_CPU_CAPABILITY", "none")
    with pytest.raises(RuntimeError) as error:
        ops.cpu_capability()
    known = str(error.value).splitlines()[0].split("known: ")[1].split(", ")
    assert "scalar" in known and set(known) <= set(suites.CAPABILITIES)


def test_backward_is_timed_alone() -> None:
    """What is timed gives the gradients of the case's own keys, call after call."""
    problem, choice = Problem("float32", 96, 96, 32, heads=2, heads_kv=2), Choice("blocks", 0.4)
    case, keys = Case(problem, choice), Keys(problem, choice)
    with torch.no_grad():  # as under the command
        prepared = peers.IMPLEMENTATIONS[peers.BACKWARD](case, problem.inputs(), keys)
        prepared.call()
        found = prepared.call()
    q, k, v = (x.requires_grad_() for x in problem.inputs())
    mask = keys.index.to_dense_mask() & torch.ones(96, 96, dtype=torch.bool).tril()
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    expected = torch.autograd.grad(out.sum(), (q, k, v))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prepared.output(found), out.detach(), rtol=1e-4, atol=1e-5)


def test_work_of_backward_is_five_products() -> None:
    case = Case(SMALL)
    density = Keys(SMALL, Choice()).index.density()
    forward, backward = (
        runner._work(c, density)["flop"] for c in (case, case.with_(by=peers.BACKWARD))
    )
    assert backward == 2.5 * forward


SMALL = Problem("float32", 96, 96, 32, heads=4, heads_kv=2)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("torch SDPA", SMALL),
        ("torch SDPA", Problem("float32", 1, 96, 32, heads=4, heads_kv=2)),
        ("torch SDPA", Problem("float32", 3, 96, 32)),
        ("sparse_attn op", SMALL),
        ("ORT MultiHeadAttention", Problem("float32", 96, 96, 32, heads=2, heads_kv=2)),
        ("ORT GroupQueryAttention", SMALL),
        ("ORT GroupQueryAttention", Problem("float32", 1, 96, 32, heads=4, heads_kv=2)),
        ("ORT SparseAttention", Problem("float32", 300, 300, 32, heads=2, heads_kv=2)),
        ("vLLM", SMALL),
    ],
)
def test_peers_compute_the_same(name: str, problem: Problem) -> None:
    """Interfaces that are read wrongly would be timed on other work."""
    choice = Choice("blocks", 0.4) if name == "ORT SparseAttention" else Choice()
    inputs, keys = problem.inputs(), Keys(problem, choice)
    case = Case(problem, choice)
    ours = peers.IMPLEMENTATIONS["sparse_attn"](case, inputs, keys)
    try:
        theirs = peers.IMPLEMENTATIONS[name](case.with_(by=name), inputs, keys)
    except machine.Unavailable as error:
        pytest.skip(str(error))
    out = ours.output(ours.call())
    # A causal edge misplaced by one key is the smallest mistake that an interface invites.
    shifted = sparse_attn.attention(*inputs, q_offset=problem.offset - 1)
    mistake = (shifted - sparse_attn.attention(*inputs)).abs().max()
    assert (theirs.output(theirs.call()) - out).abs().max() < mistake / 100


def test_what_cannot_run_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> peers.Prepared:
        raise RuntimeError("of another version\nsecond line")

    monkeypatch.setitem(peers.IMPLEMENTATIONS, "vLLM", broken)
    case = Case(SMALL)
    decode = Case(Problem("float32", 1, 96, 32), by="FlexAttention")
    goal = runner.Goal("speed-up", case, over=case.with_(by="vLLM"))
    group = runner.Group("g", [case, case.with_(by="vLLM"), decode], [goal])
    results = runner.Results()
    runner.run_group(group, runner.Settings(None, rounds=2, seconds=0.0), results)
    assert [r["implementation"] for r in results.records] == ["sparse_attn"]
    assert results.goals == []
    assert results.skipped == {
        ("vLLM", "RuntimeError: of another version"): 1,
        ("FlexAttention", "compiled for prefill only"): 1,
    }


def test_a_failure_of_ours_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> peers.Prepared:
        raise RuntimeError("ours")

    monkeypatch.setitem(peers.IMPLEMENTATIONS, "sparse_attn", broken)
    with pytest.raises(RuntimeError, match="ours"):
        runner.run_group(runner.Group("g", [Case(SMALL)]), runner.Settings(None), runner.Results())


def test_capability_is_held_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSE_ATTN_CPU_CAPABILITY", raising=False)
    usual = ops.cpu_capability()
    with runner.capability("scalar"):
        assert ops.cpu_capability() == "scalar"
    assert ops.cpu_capability() == usual


# --- runs -----------------------------------------------------------------------------------------

NUMBERS = {"p20", "p50", "p80"}


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The document of a tiny run without peers that compile."""
    file = tmp_path_factory.mktemp("bench") / "deep" / "bench.json"
    command = "bench --seqlen 256 --head-dim 32 --dtype float32 bfloat16 --density 1 0.25"
    command += " --heads 2 --peers sdpa --rounds 3 --seconds 0.1 --pattern blocks columns"
    assert main([*command.split(), "--json", str(file)]) == 0
    return json.loads(file.read_text()), file


def test_document(small_run: tuple[dict[str, Any], Path]) -> None:
    document, file = small_run
    assert document["command"].startswith("python -m sparse_attn bench --seqlen 256")
    assert document["env"]["torch"] == torch.__version__
    assert document["skipped"] == [] or not shutil.which("c++")
    limits = {x["limit"]: x["rate"] for x in document["machine"]["limits"]}
    assert all(rate > 0 for rate in limits.values())
    assert len(document["records"]) == 2 * 4


def test_records(small_run: tuple[dict[str, Any], Path]) -> None:
    document, _ = small_run
    for record in document["records"]:
        assert record["problem"]["seqlen_q"] == 256
        assert record["problem"]["phase"] == "prefill"
        assert record["rounds"] == 3
        for clock in ("cpu_ms", "wall_ms"):
            assert set(record[clock]) == NUMBERS
            assert 0 < record[clock]["p20"] <= record[clock]["p50"] <= record[clock]["p80"]
        assert 0 < record["element_density"] <= record["tile_density"] <= 1
        assert record["best_dense_peer"] == "torch SDPA"
        flop = 4 * 2 * 32 * (256 * 257 / 2) * record["element_density"]
        expected = flop / record["cpu_ms"]["p50"] / 1e6
        assert record["gflops_of_work_done"] == pytest.approx(expected)
        if document["machine"]["limits"]:
            assert 0 < record["share_of_peak"] < 1.5
        assert record["share_of_read"] is None
        assert record["max_difference_to_ours"] < 0.05
    dense = [r for r in document["records"] if r["implementation"] == "torch SDPA"]
    assert [r["ratio_to_best_dense_peer"] for r in dense] == [1.0, 1.0]
    ours = [r for r in document["records"] if r["implementation"] == "sparse_attn"]
    assert {r["pattern"] for r in ours} == {"dense", "blocks 25%", "columns 25%"}
    for r in ours:
        assert r["speedup_over"]["torch SDPA, dense"] == r["ratio_to_best_dense_peer"]


def test_markdown(
    small_run: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    document, file = small_run
    assert main(["bench", "--table", str(file)]) == 0
    text = capsys.readouterr().out
    assert main(["bench", "--table", str(file), str(file)]) == 0
    assert capsys.readouterr().out == f"{text}\n{text}"
    rows = [line for line in text.splitlines() if line.startswith(("| sparse", "| torch"))]
    assert len(rows) == len(document["records"])
    assert {row.count("|") for row in rows} == {9}
    assert f"`{document['command']}`" in text


def test_the_tables_in_the_docs_are_those_of_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (REPO / "docs" / "cpu_speed.md").read_text()
    tables = re.findall(r"<!-- table of (\S+) -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert len(tables) == 5
    for file, text in tables:
        assert main(["bench", "--table", str(REPO / file)]) == 0
        assert capsys.readouterr().out == text, file


def test_plots(small_run: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = report.plot(small_run[0], tmp_path / "plots")
    assert len(files) == 2
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_lines_of_a_plot_end_at_the_dense_point(small_run: tuple[dict[str, Any], Path]) -> None:
    lines = report._lines(small_run[0]["records"])
    assert [r["kind"] for r in lines["sparse_attn float32 blocks"]] == ["blocks", "dense"]
    assert [r["kind"] for r in lines["sparse_attn bfloat16 columns"]] == ["columns", "dense"]
    assert [r["kind"] for r in lines["torch SDPA float32"]] == ["dense"]


@pytest.mark.parametrize("suite", [*suites.SUITES, "accuracy"])
def test_suites_run(suite: str, tmp_path: Path) -> None:
    file = tmp_path / "suite.json"
    command = f"bench --suite {suite} --seqlen 128 --head-dim 32 --dtype float32 --heads-kv 1"
    command += " --peers sdpa --rounds 1 --seconds 0"
    assert main([*command.split(), "--json", str(file)]) == 0
    goals = json.loads(file.read_text())["goals"]
    assert goals or not shutil.which("c++")
    for goal in goals:
        assert math.isfinite(goal["value"])
        if goal["bound"] is not None:
            above = goal["value"] >= goal["bound"]
            assert goal["held"] == (above if goal["at_least"] else goal["value"] <= goal["bound"])
