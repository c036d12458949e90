# SPDX-License-Identifier: Apache-2.0
"""Head plans: patterns as data, files and their errors, other projects' plans, use in a model."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from test_every_pattern import EVERY

import sparse_attn
from sparse_attn import AShape, Dense, HeadPlan, PerHead, PlannedHead, VerticalSlash
from sparse_attn.__main__ import main
from sparse_attn.heads import (
    config_hash,
    describe,
    read_plan,
    ready_plans,
    schema,
    undescribe,
)
from sparse_attn.heads.plan import SCHEMA_FILE
from sparse_attn.patterns import Pattern

# ------------------------------------------------------------------------------ patterns as data


def is_numbers(value: object) -> bool:
    """Whether a description is due: dataclasses of numbers all the way down, no PerHead."""
    if isinstance(value, PerHead) or callable(value) and not dataclasses.is_dataclass(value):
        return False
    if dataclasses.is_dataclass(value):
        parts = (getattr(value, field.name) for field in dataclasses.fields(value))
        return all(map(is_numbers, parts))
    if isinstance(value, tuple):
        return all(map(is_numbers, value))
    return value is None or isinstance(value, (bool, int, float, str))


@pytest.mark.parametrize("name", EVERY)
def test_every_pattern_survives_json_or_says_why(name):
    pattern = EVERY[name]()
    if not is_numbers(pattern):
        with pytest.raises(TypeError, match="cannot be written down|which a plan cannot hold"):
            describe(pattern)
        return
    text = json.dumps(describe(pattern))
    again = undescribe(json.loads(text))
    assert type(again) is type(pattern) and describe(again) == describe(pattern)
    if "CentroidLookup" not in text:  # two of these are equal only if they share their clusters
        assert again == pattern
    assert f'"type": "{type(pattern).__name__}"' in text


@dataclasses.dataclass(frozen=True)
class EveryThird(Pattern):
    """A user's own pattern."""

    first: int = 0

    def build(self, q, k, **options):
        raise NotImplementedError


def test_a_users_own_class_is_known_once_it_is_imported():
    assert undescribe({"type": "EveryThird", "first": 2}) == EveryThird(2)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"type": "AShap"}, r"type='AShap' is unknown; known are .*AShape"),
        ({"sink": 3}, "type=None is unknown"),
        ({"type": "PerHead"}, "type='PerHead' is unknown"),
        ({"type": "AShape", "sinks": 3}, "no field 'sinks'; it has sink, window, dense_tail"),
        ({"type": "SlidingWindow"}, "SlidingWindow needs window"),
        ({"type": "AShape", "sink": -1}, "sink=-1 is below 0"),
        ({"type": "AShape", "sink": "3"}, "sink='3' is a str"),
        ({"type": "HiPStage", "chunk": 8}, "a HiPStage is not a pattern"),
        (7, "a int is not a pattern"),
    ],
)
def test_descriptions_that_are_wrong(data, says):
    with pytest.raises(ValueError, match=says):
        undescribe(data)


# ------------------------------------------------------------------------------ files


def small_plan() -> HeadPlan:
    layers = [
        [PlannedHead(Dense()), PlannedHead(AShape(4, 32), 0.991, 1.25)],
        [PlannedHead(VerticalSlash(40, 60), 0.5), PlannedHead(VerticalSlash(40, 60))],
        [PlannedHead(sparse_attn.InfiniteHiP()), PlannedHead(sparse_attn.Adaptive(0.9))],
    ]
    return HeadPlan(layers, num_heads_kv=1, model_id="tiny", measured={"tokens": 64})


def test_a_file_says_what_the_plan_says(tmp_path):
    plan = small_plan()
    plan.save(tmp_path / "plan.json")
    assert HeadPlan.load(tmp_path / "plan.json") == plan
    assert hash(HeadPlan.load(tmp_path / "plan.json")) == hash(plan)
    assert plan(1) == VerticalSlash(40, 60)  # one pattern that the heads share, no PerHead
    assert plan(0) == PerHead([Dense(), AShape(4, 32)])
    assert str(plan).splitlines()[-3:] == [
        "    0  bc  recall 0.991 or more",
        "    1  aa  recall 0.500 or more",
        "    2  de",
    ]


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("data.pop('layers')", "file: layers missing"),
        ("data.update(schema='2')", r"schema is '2'; this version reads 'sparse_attn/head_plan/1'"),
        ("data.update(extra=1)", "file: unknown extra; allowed are schema, model, layers"),
        ("data['model'].update(num_heads='9')", "file: model: num_heads='9' is not an integer"),
        ("data['model'].update(num_heads=True)", "num_heads=True is not an integer"),
        ("data['model'].update(num_layers=4)", "3 layers; model.num_layers is 4"),
        ("data['model'].update(num_heads_kv=3)", "num_heads_kv=3 does not divide the 2"),
        ("data['layers'][2]['heads'].pop()", "file: layer 2: 1 heads; model.num_heads is 2"),
        ("data['layers'].__setitem__(1, [])", "file: layer 1: a list stands where an object"),
        ("data['layers'][1]['heads'][1].pop('pattern')", "layer 1, head 1: pattern missing"),
        ("data['layers'][1]['heads'][1].update(recall=1.5)", "layer 1, head 1: recall must be in"),
        ("data['layers'][1]['heads'][1].update(recall='x')", "recall='x' is not an integer or a"),
        (
            "data['layers'][0]['heads'][1]['pattern'].update(window=-2)",
            "file: layer 0, head 1: pattern: sparse_attn.AShape: window=-2 is below 0",
        ),
        (
            "data['layers'][0]['heads'][0]['pattern'].update(type='dense')",
            "layer 0, head 0: pattern: type='dense' is unknown; known are .*Dense",
        ),
    ],
)
def test_files_that_are_wrong_say_where(statement, says):
    data = copy.deepcopy(small_plan().to_dict())
    eval(statement, {"data": data})
    with pytest.raises(ValueError, match="sparse_attn.HeadPlan: .*" + says):
        HeadPlan.from_dict(data, where="file")


def test_not_json(tmp_path):
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ValueError, match="plan.json: not JSON"):
        HeadPlan.load(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="stands where an object belongs"):
        HeadPlan.from_dict([])


def test_plans_that_are_wrong():
    head = PlannedHead(Dense())
    with pytest.raises(ValueError, match="no heads given"):
        HeadPlan([], num_heads_kv=1)
    with pytest.raises(ValueError, match="layer 1 has 2 heads, layer 0 1"):
        HeadPlan([[head], [head, head]], num_heads_kv=1)
    with pytest.raises(TypeError, match="layer 0, head 0 is a Dense; pass a PlannedHead"):
        HeadPlan([[Dense()]], num_heads_kv=1)
    with pytest.raises(TypeError, match="layer 0, head 0 has a PerHead"):
        HeadPlan([[PlannedHead(PerHead([Dense()]))]], num_heads_kv=1)
    for layer in (3, -1, None):
        with pytest.raises(ValueError, match=f"layer {layer} is asked for.* 0 to 2"):
            small_plan()(layer)
    state = PlannedHead(sparse_attn.HiPState(sparse_attn.HiP()))
    with pytest.raises(TypeError, match="HiPState cannot be written down.*layer 0, head 0"):
        HeadPlan([[state]], num_heads_kv=1).to_dict()


def test_the_schema_that_ships_is_that_of_the_code():
    file = Path(sparse_attn.heads.__file__).with_name(SCHEMA_FILE)
    assert json.loads(file.read_text()) == schema(), (
        "write it anew: see CONTRIBUTING, Add a pattern"
    )
    assert set(schema()["$defs"]) >= {"pattern", "AShape", "HiPStage", "VerticalSlash"}


def test_the_schema_agrees_with_the_reader():
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(schema())
    check.validate(small_plan().to_dict())
    for change in (
        lambda data: data.pop("layers"),
        lambda data: data["layers"][0]["heads"][0].update(recall=2),
        lambda data: data["layers"][0]["heads"][0]["pattern"].update(sink=1),
        lambda data: data["layers"][0]["heads"][1]["pattern"].update(sink=1.5),
    ):
        data = copy.deepcopy(small_plan().to_dict())
        change(data)
        assert not check.is_valid(data)


@pytest.mark.parametrize("name", ready_plans())
def test_ready_plans_load(name):
    plan = HeadPlan.ready(name)
    assert plan.config_hash and plan.measured and plan.created_by
    recalls = [head.recall for layer in plan.layers for head in layer]
    assert all(recall is not None for recall in recalls)


@pytest.mark.parametrize("name", ready_plans())
def test_ready_plans_are_of_the_schema_and_run(name):
    """A layer gives every head what that head's pattern gives alone."""
    jsonschema = pytest.importorskip("jsonschema")
    plan = HeadPlan.ready(name)
    jsonschema.Draft202012Validator(schema()).validate(plan.to_dict())
    assert HeadPlan.from_dict(json.loads(plan.to_json())) == plan
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, plan.num_heads, 150, 16, generator=generator)
    k, v = torch.randn(2, 1, plan.num_heads_kv, 150, 16, generator=generator)
    group = plan.num_heads // plan.num_heads_kv
    for layer in (0, plan.num_layers - 1):
        out = sparse_attn.attention(q, k, v, plan(layer), fallback=False)
        for head, planned in enumerate(plan.layers[layer]):
            one, kv = slice(head, head + 1), slice(head // group, head // group + 1)
            alone = (q[:, one], k[:, kv], v[:, kv], planned.pattern)
            assert torch.allclose(
                out[:, one], sparse_attn.attention(*alone, fallback=False), atol=1e-5
            )


def test_an_unknown_ready_plan():
    with pytest.raises(ValueError, match="'none such' is unknown; there are"):
        HeadPlan.ready("none such")


# ------------------------------------------------------------------------------ other projects

# The form of MInference's file for Llama-3.1-8B, some heads of its kinds; one head is missing.
MINFERENCE = [
    {
        "0": ["vertical_and_slash", 30, 80, 0.9606457948684692],
        "1": ["vertical_and_slash", 100, 60, 1.0],
        "2": ["stream_llm", 10, 80, 0.96484375],
    },
    {
        "0": ["block_sparse", 3, 1, 0.5],
        "1": ["vertical_and_slash", 30, 80, 0.97],
        "2": ["vertical_and_slash", 50, 70, 0.99],
        "3": ["vertical_and_slash", 30, 80, 0.95],
    },
]


def llama(heads: int = 4, heads_kv: int = 2, layers: int = 2):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads_kv,
        initializer_range=0.3,
        pad_token_id=0,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def written(tmp_path):
    def write(data, name="plan.json"):
        text = data if isinstance(data, str) else json.dumps(data)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_minference_is_the_preset_built_by_hand(written):
    model = llama()
    plan = read_plan(written(MINFERENCE), config=model.config)
    minference, streaming = sparse_attn.presets.minference, sparse_attn.presets.a_shape
    by_hand = [
        [minference(30, 80), minference(100, 60), streaming(10, 80), minference()],
        [sparse_attn.presets.minference_block_sparse(3)]
        + [minference(30, 80), minference(50, 70), minference(30, 80)],
    ]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 400, 16, generator=generator)
    k = torch.randn(1, 2, 400, 16, generator=generator)
    for layer, heads in enumerate(by_hand):
        ours, theirs = plan(layer).build(q, k), PerHead(heads).build(q, k)
        for name in ("heads", "block_indptr", "column_indptr"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert torch.equal(ours.to_dense_mask(), theirs.to_dense_mask())
        for number, pattern in enumerate(heads):
            alone = pattern.build(q[:, number : number + 1], k[:, number // 2 : number // 2 + 1])
            mask = ours.to_dense_mask()[:, number : number + 1]
            assert torch.equal(mask, alone.to_dense_mask())


def test_minference_runs_in_a_model(written):
    from sparse_attn.integrations.transformers import enable

    model = llama()
    plan = read_plan(written(MINFERENCE), config=model)
    by_hand = {
        0: PerHead([VerticalSlash(30, 80), VerticalSlash(100, 60), AShape(10, 80), VerticalSlash()])
    }
    by_hand[1] = plan(1)
    ids = torch.randint(1, 97, (1, 300), generator=torch.Generator().manual_seed(1))
    logits = []
    for choice in (plan, by_hand, "dense"):
        with enable(choice) as handle, torch.no_grad():
            model.set_attn_implementation(handle.name)
            logits.append(model(ids).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], rtol=1e-3, atol=1e-3)  # it is sparse


def test_qwen(written):
    inner = {"sparse_attention_config": MINFERENCE, "sparse_attention_last_q": 32}
    for data, name, last_q in (
        (MINFERENCE, "sparse_attention_config.json", 64),
        ({"dual_chunk_attention_config": inner}, "config.json", 32),
        (inner, "x.json", 32),
    ):
        plan = read_plan(written(data, name), num_heads_kv=2)
        assert plan.layers[0][0].pattern == VerticalSlash(30, 80, last_q=last_q, chunk=32768)
        assert plan.layers[0][3].pattern == VerticalSlash(last_q=last_q, chunk=32768)
        assert plan.layers[0][2].pattern == AShape(10, 80)


DUO = "0.9\t0.1\n0.3\t0.8\n0.5\t0.0\n"


@pytest.mark.parametrize(
    ("sparsity", "full"),
    [
        (None, {(0, 0), (1, 1), (2, 0)}),
        (0.5, {(0, 0), (1, 1), (2, 0)}),
        (0.0, {(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)}),
        (0.6, {(0, 0), (1, 1), (2, 0)}),  # the quantile is 0.5 itself
        (0.61, {(0, 0), (1, 1)}),
        (1.0, set()),
    ],
)
def test_duo_attention(written, sparsity, full):
    file = written(DUO, "full_attention_heads.tsv")
    plan = read_plan(file, num_heads=4, sparsity=sparsity, sink=8, recent=16)
    assert (plan.num_layers, plan.num_heads, plan.num_heads_kv) == (3, 4, 2)
    for layer in range(3):
        flags = [(layer, head) in full for head in range(2)]
        preset = sparse_attn.presets.duo_attention(flags, group=2, sink=8, recent=16)
        assert [h.pattern for h in plan.layers[layer]] == [p for _, p in preset.pattern.patterns]


def test_duo_attention_breaks_ties_towards_the_first(written):
    plan = read_plan(written("1 1 1\n1 1 1\n", "x.tsv"), num_heads=3, sparsity=0.5)
    full = [[head.pattern == Dense() for head in layer] for layer in plan.layers]
    assert full == [[True, True, True], [False, False, False]]


def test_moa(written):
    data = {"alphas": [[0.0, -1024.0], [100.0, 0.0]], "betas": [[0.5, 0.875], [0.0, 1.0]]}
    plan = read_plan(written(data), tokens=1000, num_heads_kv=1)
    # 500 is rounded up to 512; -149 and 100 up to 128; the last keeps every token
    assert [[head.pattern for head in layer] for layer in plan.layers] == [
        [AShape(64, 448), AShape(64, 64)],
        [AShape(64, 64), Dense()],
    ]


@pytest.mark.parametrize(
    ("data", "options", "says"),
    [
        ("{]", {}, "neither JSON .* nor rows of numbers"),
        ([], {}, "no form is known by it"),
        (MINFERENCE, {}, "how many KV heads a layer has is not in it; pass config="),
        (MINFERENCE, {"num_heads": 2}, "head 3 is named, the model has 2 heads"),
        (MINFERENCE, {"form": "other"}, "form='other' is unknown; pass one of sparse_attn, minf"),
        ([{"0": ["no_such", 1, 2, 3]}], {"num_heads_kv": 1}, "layer 0, head 0: type 'no_such' is"),
        ([{"0": ["stream_llm"]}], {"num_heads_kv": 1}, "layer 0, head 0: .*not enough values"),
        ([{"0": ["stream_llm", -1, 2, 0]}], {"num_heads_kv": 1}, "head 0: .*sink=-1 is below 0"),
        ({"sparse_attention_config": 3}, {"num_heads_kv": 1}, "expected a list of layers"),
        (DUO, {}, "2 KV heads, and num_heads=None query heads; pass config="),
        ("1 2\n3\n", {"num_heads": 4}, "expected as many numbers in every row"),
        (DUO, {"num_heads": 4, "sparsity": 2.0}, "sparsity=2.0 is outside"),
        ({"alphas": [[1]], "betas": [[1]]}, {}, "pass tokens="),
        ({"alphas": [[1]], "betas": []}, {"tokens": 9}, "alphas and betas differ"),
    ],
)
def test_foreign_files_that_are_wrong(written, data, options, says):
    with pytest.raises(ValueError, match="sparse_attn.heads.read_plan: .*" + says):
        read_plan(written(data), **options)


# ------------------------------------------------------------------------------ models


def test_a_plan_knows_its_model():
    model = llama()
    plan = HeadPlan(
        [[PlannedHead(AShape(4, 16))] * 4] * 2,
        num_heads_kv=2,
        config_hash=config_hash(model.config),
    )
    assert plan.check_model(model) is plan and plan.check_model(model.config) is plan
    with pytest.raises(ValueError, match="num_layers=2 in the plan .* the model has 3"):
        plan.check_model(llama(layers=3))
    with pytest.raises(ValueError, match="num_heads_kv=2 in the plan .* the model has 4"):
        plan.check_model(llama(heads_kv=4))
    model.config.vocab_size = 98
    with pytest.raises(ValueError, match="the model's config is sha256:"):
        plan.check_model(model)


def test_two_models_with_two_plans():
    from transformers.modeling_utils import AttentionInterface

    models, before = [llama(), llama(heads_kv=4)], dict(AttentionInterface._global_mapping)
    plans = [
        HeadPlan([[PlannedHead(AShape(2, window))] * 4] * 2, num_heads_kv=heads_kv)
        for window, heads_kv in ((16, 2), (40, 4))
    ]
    ids = torch.randint(1, 97, (1, 90), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def logits(model):
        return model(ids).logits

    dense = [logits(model) for model in models]
    with plans[0].enable(models[0]):
        alone = logits(models[0])
        with plans[1].enable(models[1]):
            assert torch.equal(logits(models[0]), alone)
            assert not torch.equal(logits(models[1]), dense[1])
    assert not torch.equal(alone, dense[0])
    assert all(torch.equal(logits(model), x) for model, x in zip(models, dense))
    assert AttentionInterface._global_mapping == before
    with pytest.raises(ValueError, match="num_heads_kv=2 in the plan .* the model has 4"):
        plans[0].enable(models[1])
    assert AttentionInterface._global_mapping == before


def test_the_hash_is_that_of_the_config_file(tmp_path):
    model = llama()
    model.config.save_pretrained(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps(MINFERENCE))
    plan = read_plan(tmp_path / "plan.json", config=tmp_path / "config.json")
    assert plan.config_hash == config_hash(model.config)
    assert plan.check_model(model) is plan


# ------------------------------------------------------------------------------ the command


def test_the_command(written, tmp_path, capsys):
    source, target = written(MINFERENCE, "theirs.json"), tmp_path / "ours.json"
    assert main(["heads", "convert", str(source), str(target), "--num-heads-kv", "2"]) == 0
    assert "2 layers of 4 query heads (2 KV heads), 6 patterns" in capsys.readouterr().out
    assert HeadPlan.load(target) == read_plan(source, num_heads_kv=2)
    assert main(["heads", "validate", str(target)]) == 0
    assert "ours.json: valid" in capsys.readouterr().out
    assert main(["heads", "show", str(target)]) == 0
    assert "AShape(sink=10" in capsys.readouterr().out
    target.write_text(target.read_text().replace('"sink": 10', '"sink": "x"'))
    assert main(["heads", "validate", str(target)]) == 1
    assert "layer 0, head 2: pattern: sparse_attn.AShape: sink='x'" in capsys.readouterr().out
    assert main(["heads", "show", str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().out
