# SPDX-License-Identifier: Apache-2.0
"""Calibration on tiny random models: what is measured, what is chosen, resuming, the command."""

import itertools
import json
import math
import threading
import time

import pytest
import torch

import sparse_attn
from sparse_attn import AShape, Dense, HeadPlan, PerHead, VerticalSlash, reference
from sparse_attn.__main__ import main
from sparse_attn.calibration import Trial, calibrate_with_trials, choose, default_candidates
from sparse_attn.calibration.calibrate import seconds_of
from sparse_attn.calibration.measure import TimeUp
from sparse_attn.calibration.report import write_report

transformers = pytest.importorskip("transformers", minversion="5.0")

CANDIDATES = (AShape(2, 8), AShape(4, 40), VerticalSlash(30, 50, sink=4, local=8))


def tiny(kind: str = "Llama", **extra):
    torch.manual_seed(0)
    options = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.5,
        "pad_token_id": 0,
    }
    config = getattr(transformers, f"{kind}Config")(**(options | extra))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tokens(count: int) -> torch.Tensor:
    return torch.randint(1, 97, (1, count), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------ choosing


def trial(milliseconds: float, recall: float, change: float) -> Trial:
    return Trial(Dense(), milliseconds, recall, change)


def test_the_cheapest_where_that_is_enough():
    heads = [[trial(9, 1, 0), trial(2, 0.95, 0.2), trial(1, 0.8, 0.4)]] * 2
    assert [t.milliseconds for t in choose(heads, recall=0.9, floor=0.9)] == [2, 2]
    assert [t.milliseconds for t in choose(heads, recall=0.8, floor=0.8)] == [1, 1]
    assert [t.milliseconds for t in choose(heads, recall=1.0, floor=0.0)] == [9, 9]


def test_who_loses_least_gives_up_first():
    """One of two equally dear heads must stay dense: the one whose output would change more."""
    quiet = [trial(9, 1, 0), trial(1, 0.92, 0.01)]
    loud = [trial(9, 1, 0), trial(1, 0.92, 0.5)]
    assert [t.milliseconds for t in choose([loud, quiet], recall=0.95)] == [9, 1]


def test_against_every_combination():
    """Nothing that reaches the recall is better in time and in change at once."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(60):
        heads = []
        for _ in range(4):
            cost, recall, change = torch.rand(3, 3, generator=generator).sort(-1).values.tolist()
            tried = [trial(c, r, x) for c, r, x in zip(cost, recall, reversed(change))]
            heads.append([trial(1.5, 1.0, 0.0), *tried])
        wanted = 0.5 + 0.45 * torch.rand(1, generator=generator).item()
        chosen = choose(heads, recall=wanted, floor=0.2)
        assert all(t.recall >= 0.2 for t in chosen)
        assert sum(t.recall for t in chosen) >= wanted * 4
        time, change = (sum(getattr(t, n) for t in chosen) for n in ("milliseconds", "change"))
        for other in itertools.product(*heads):
            if all(t.recall >= 0.2 for t in other):
                assert (
                    sum(t.milliseconds for t in other) >= time - 1e-9
                    or sum(t.change for t in other) >= change - 1e-9
                )


# ------------------------------------------------------------------------------ measuring


def test_recall_and_change_are_those_of_the_masks():
    """Against fp64 softmax over boolean masks, on the model's own q, k and v."""
    from sparse_attn.integrations.transformers import wrapped_attention

    model, ids = tiny(), tokens(90)
    caught = {}

    def look(function, module, q, k, v, *args, **kwargs):
        caught[module.layer_idx] = (module, q, k, v, kwargs["scaling"])
        return function(module, q, k, v, *args, **kwargs)

    with torch.no_grad(), wrapped_attention("sdpa", look):
        model.base_model(ids, use_cache=False)
    found = calibrate_with_trials(model, ids, candidates=CANDIDATES, budget=1000)
    assert list(found.trials) == [0, 1, 2]
    for number, (module, q, k, v, scale) in caught.items():
        causal = torch.ones(90, 90, dtype=torch.bool).tril()
        exact = [x.double() for x in (q, k, v)]
        whole, lse = reference.attention(*exact, causal[None, None], softmax_scale=scale)
        weight = module.o_proj.weight.detach().double().view(48, 6, 16)
        loud = torch.einsum("hrd,whd->hrw", whole[0], weight).square().sum(-1).mean(-1)
        for head in range(6):
            tried = {t.pattern: t for t in found.trials[number][head]}
            assert tried[Dense()].recall == 1 and tried[Dense()].change == 0
            for pattern in CANDIDATES:
                one = slice(head, head + 1), slice(head // 2, head // 2 + 1)
                mask = pattern.build(q[:, one[0]], k[:, one[1]]).to_dense_mask() & causal
                tensors = exact[0][:, one[0]], exact[1][:, one[1]], exact[2][:, one[1]]
                out, kept = reference.attention(*tensors, mask, softmax_scale=scale)
                recall = (kept[0, 0] - lse[0, head]).exp().mean()
                lost = torch.einsum("rd,wd->rw", out[0, 0] - whole[0, head], weight[:, head])
                change = lost.square().sum(-1).mean() / loud.sum()
                assert tried[pattern].recall == pytest.approx(recall.item(), rel=1e-4)
                assert tried[pattern].change == pytest.approx(change.item(), rel=1e-3, abs=1e-9)
                assert tried[pattern].milliseconds > 0


def test_the_plan_says_what_was_chosen_and_keeps_its_recall():
    model, ids = tiny(), tokens(120)
    before = model.config._attn_implementation, torch.get_num_threads()
    found = calibrate_with_trials(
        model, ids, candidates=CANDIDATES, recall=0.9, floor=0.6, model_id="x"
    )
    assert (model.config._attn_implementation, torch.get_num_threads()) == before
    plan = found.plan
    assert (plan.num_layers, plan.num_heads, plan.num_heads_kv, plan.model_id) == (3, 6, 3, "x")
    assert plan.check_model(model) is plan and HeadPlan.from_dict(plan.to_dict()) == plan
    recalls = [head.recall for layer in plan.layers for head in layer]
    assert min(recalls) >= 0.6 and sum(recalls) / len(recalls) >= 0.9 - 1e-5
    assert plan.measured["recall_mean"] == pytest.approx(sum(recalls) / len(recalls), abs=1e-4)
    assert plan.measured["attention_ms"] <= plan.measured["dense_ms"]
    for layer, heads in enumerate(plan.layers):
        for head, planned in enumerate(heads):
            tried = {t.pattern: t for t in found.trials[layer][head]}[planned.pattern]
            assert planned.recall == pytest.approx(tried.recall, abs=1e-5)


def test_everything_asked_for_is_dense_attention():
    model, ids = tiny(), tokens(60)
    plan = sparse_attn.calibrate(model, ids, candidates=(AShape(1, 4),), recall=1.0, floor=1.0)
    assert set(plan.counts()) == {"Dense()"}


def test_layers_with_a_window_of_their_own_stay():
    model = tiny(
        "Gemma3Text",
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=16,
        query_pre_attn_scalar=16,
    )
    told = []
    found = calibrate_with_trials(
        model,
        tokens(80),
        candidates=CANDIDATES,
        recall=0.5,
        floor=0.0,
        progress=lambda *args: told.append(args),
    )
    assert list(found.trials) == [1]
    assert told == [(1, 1, 0.0)]  # the time is for the layers that are measured
    for layer in (0, 2):
        assert {head.pattern for head in found.plan.layers[layer]} == {Dense()}


class Clock:
    """A clock that stands until somebody works."""

    def __init__(self):
        self.now, self.lock = 1000.0, threading.Lock()

    def __call__(self):
        return self.now

    def work(self, seconds):
        with self.lock:
            self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    """`time.monotonic`; a candidate on a head takes a second of it."""
    from sparse_attn.calibration import measure

    clock, attention = Clock(), measure.attention

    def attempt(*args, **options):
        clock.work(clock.cost)
        return attention(*args, **options)

    clock.cost = 1.0
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(measure, "attention", attempt)
    return clock


WINDOWS = [AShape(1, n) for n in range(2, 8)]  # none keeps enough to leave out the next


@pytest.mark.parametrize(
    ("budget", "tried"),
    [
        ("1h", [6, 6, 6]),
        (90, [4, 3, 3]),  # a layer takes 7 s for dense attention and 6 for each candidate
        (60, [3, 3]),  # fewer than three on the third
        (49, [3, 3]),  # the time is up before the third
        (1, []),
    ],
)
def test_the_budget_is_kept(clock, budget, tried, tmp_path):
    """But for the candidate that is under way; what was cut is said, and a state goes on there."""
    ids, state, begin = tokens(80), tmp_path / "state", clock()
    found = calibrate_with_trials(tiny(), ids, budget=budget, candidates=WINDOWS, state=state)
    assert clock() - begin <= seconds_of(budget) + 6
    for layer, count in zip(found.trials.values(), tried, strict=True):
        for head in layer:
            assert [trial.pattern for trial in head] == [Dense(), *WINDOWS[:count]]
    missing = 3 - len(tried)
    said = [f"no time for {missing} of 3 layers: they stay dense"]
    assert found.plan.measured.get("cut", []) == said * (missing > 0)
    for layer in found.plan.layers[len(tried) :]:
        assert {head.pattern for head in layer} == {Dense()}
    assert 0.9 <= found.plan.measured["recall_mean"] <= 1
    again = calibrate_with_trials(tiny(), ids, budget="1h", candidates=WINDOWS, state=state)
    assert len(again.trials) == 3 and "cut" not in again.plan.measured
    assert {n: again.trials[n] for n in found.trials} == found.trials


def test_a_report_of_nothing(clock, tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    found = calibrate_with_trials(tiny(), tokens(80), budget=1e-3, candidates=WINDOWS)
    write_report(str(tmp_path / "report.html"), found, "")
    assert "they stay dense" in (tmp_path / "report.html").read_text()


# ------------------------------------------------------------------------------ resuming


def test_a_run_that_was_cut_goes_on(tmp_path):
    model, ids, state = tiny(), tokens(90), tmp_path / "state"
    seen = []

    class Cut(Exception):
        pass

    def cut(done, total, seconds):
        seen.append((done, total))
        if done == 2:
            raise Cut

    with pytest.raises(Cut):
        calibrate_with_trials(model, ids, candidates=CANDIDATES, state=state, progress=cut)
    assert seen == [(1, 3), (2, 3)] and len(state.read_text().splitlines()) == 3
    first = state.read_text()

    def rest(done, total, seconds):
        seen.append((done, total))
        assert seconds >= 0

    whole = calibrate_with_trials(model, ids, candidates=CANDIDATES, state=state, progress=rest)
    assert seen[2:] == [(3, 3)] and state.read_text().startswith(first)
    model.base_model.forward = None  # nothing is missing: the text is not read again
    again = calibrate_with_trials(model, ids, candidates=CANDIDATES, state=state, progress=rest)
    assert again.trials == whole.trials and len(seen) == 3
    assert again.plan.layers == whole.plan.layers
    for other in (tokens(91), ids):
        with pytest.raises(ValueError, match="state is of another (candidates, )?text|candidates"):
            calibrate_with_trials(
                model, other, candidates=CANDIDATES[: other.shape[1] - 88], state=state
            )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"budget": "5 parsecs"}, "budget='5 parsecs' is no time"),
        ({"budget": 0}, "budget=0 is no time"),
        ({"recall": 1.5}, "recall=1.5 and floor=0.9"),
        ({"recall": 0.5}, "floor at most recall"),
        ({"ids": torch.ones(2, 5, dtype=torch.int64)}, r"ids is \(2, 5\); pass one text"),
    ],
)
def test_wrong_arguments(change, says):
    options = {"ids": tokens(20), **change}
    with pytest.raises(ValueError, match="sparse_attn.calibrate: .*" + says):
        sparse_attn.calibrate(tiny(), **options)


def test_times():
    assert [seconds_of(x) for x in (3, "2.5", "90s", "5m", "1h")] == [3, 2.5, 90, 300, 3600]


def test_default_candidates_scale_with_the_text():
    large, small = default_candidates(8192), default_candidates(2048)
    assert AShape(64, 1024) in large and AShape(64, 256) in small
    assert len(set(large)) == len(large) and len(set(small)) == len(small)


# ------------------------------------------------------------------------------ the command


@pytest.fixture
def saved(tmp_path):
    """A model on disk whose tokenizer has a word per letter, and a text."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: number for number, word in enumerate(["<unk>", *map(chr, range(97, 123))])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    tiny().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    letters = torch.randint(97, 123, (1000,), generator=torch.Generator().manual_seed(2))
    (tmp_path / "text").write_text("".join(map(chr, letters.tolist())))
    return tmp_path


def command(folder, *more: str) -> int:
    output = str(folder / "plan.json")
    options = ["--text", str(folder / "text"), "--tokens", "100", "--output", output]
    return main(["calibrate", str(folder / "model"), *options, *more])


def test_the_command(saved, capsys):
    pytest.importorskip("matplotlib").use("agg")
    for report in ("report.html", "report.png"):
        assert command(saved, "--report", str(saved / report)) == 0
    printed = capsys.readouterr().out
    assert "layer 3 of 3" in printed and ".enable(model)" in printed
    plan = HeadPlan.load(saved / "plan.json")
    model = transformers.AutoModelForCausalLM.from_pretrained(saved / "model")
    plan.check_model(model)
    found = plan.measured["check"]
    assert found["tokens"] == 100 and math.isfinite(found["plan_perplexity"])
    page = (saved / "report.html").read_text()
    assert page.count("<svg") == 2 and ".enable(model)" in page and "model" in page
    assert (saved / "report.png").read_bytes().startswith(b"\x89PNG")
    # the lines that it says to paste
    exec(printed[printed.rindex("from sparse_attn import HeadPlan") :], {"model": model})
    assert model.config._attn_implementation.startswith("sparse_attn_plan_")


@pytest.mark.parametrize(
    ("slow", "cut"),
    [
        (0.1, []),
        (1, []),
        (1.6, ["the check read"]),
        (2.6, ["no time for 1 of 3 layers", "the check read"]),
        (3, ["no time for 1 of 3 layers", "no time for the check"]),
        (3.6, ["no time for 2 of 3 layers", "no time for the check"]),
    ],
)
def test_the_command_ends_within_its_budget(saved, monkeypatch, capsys, clock, slow, cut):
    """On machines of any speed, loading and the check included."""
    from sparse_attn.calibration import command as module

    load, begin, budget = module._load, clock(), 300
    clock.cost = slow

    def slowly(*args):
        model, tokenizer = load(*args)
        clock.work(5 * slow)
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(
                lambda _, given: clock.work(0.1 * slow * given[0].shape[1])
            )
        return model, tokenizer

    monkeypatch.setattr(module, "_load", slowly)
    assert command(saved, "--budget", "5m") == 0
    assert clock() - begin <= budget
    measured = HeadPlan.load(saved / "plan.json").measured
    said = measured.get("cut", [])
    assert [sentence[: len(start)] for sentence, start in zip(said, cut, strict=True)] == cut
    printed = capsys.readouterr().out
    assert all(sentence in printed for sentence in said)
    assert ("check" in measured) == ("no time for the check" not in cut)
    if "check" in measured:
        assert (measured["check"]["tokens"] == 100) == (not cut)


def test_a_reading_ends_where_the_machine_became_slower(clock):
    from sparse_attn.calibration.command import reading

    model, begin = tiny(), clock()
    before = model.config._attn_implementation
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: clock.work(10))
    with pytest.raises(TimeUp):
        reading(model, tokens(50), "dense", end=begin + 15)
    assert clock() == begin + 20 and model.config._attn_implementation == before
    assert math.isfinite(reading(model, tokens(50), "dense", end=clock() + 35)[0])


def test_dry_run_writes_nothing(saved, capsys):
    assert command(saved, "--dry-run", "--threads", "1") == 0
    printed = capsys.readouterr().out
    assert "3 layers of 6 heads" in printed and "together, on 1 threads" in printed
    assert not (saved / "plan.json").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--budget", "soon"], "budget='soon' is no time"),
        (["--report", "x.pdf"], "report 'x.pdf' is neither .html nor .png"),
        (["--recall", "0.1"], "floor at most recall"),
    ],
)
def test_what_the_command_refuses(saved, capsys, more, says):
    pytest.importorskip("matplotlib")
    assert command(saved, *more) == 1
    assert says in capsys.readouterr().out


def test_a_plan_in_a_model_is_its_layers_patterns():
    """A plan, a dict and a function of the layer are the same choice."""
    from sparse_attn.integrations.transformers import enable

    model, ids = tiny(), tokens(120)
    plan = sparse_attn.calibrate(model, ids, candidates=CANDIDATES, recall=0.7, floor=0.3)
    assert any(isinstance(plan(layer), PerHead) for layer in range(3))
    outputs = []
    for choice in (plan, {layer: plan(layer) for layer in range(3)}):
        with enable(choice) as handle, torch.no_grad():
            model.set_attn_implementation(handle.name)
            outputs.append(model(ids).logits)
    assert torch.equal(*outputs)
    assert json.loads(plan.to_json())["model"]["num_layers"] == 3
