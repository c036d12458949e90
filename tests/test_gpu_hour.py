# SPDX-License-Identifier: Apache-2.0
"""tools/gpu_hour.sh and the programs that it runs, as far as a machine without a GPU can tell."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
SCRIPT = REPO / "tools" / "gpu_hour.sh"


def program(name: str):
    spec = importlib.util.spec_from_file_location(name, REPO / "tools" / "gpu" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dry_run_names_every_step_and_what_it_runs():
    done = subprocess.run(["bash", str(SCRIPT), "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert [*steps] == "build environment suite graph bench compare sanitizer".split()
    for command in steps.values():
        for word in command.split():
            if word.startswith(("tools/", "tests/")):
                assert (REPO / word).exists(), word


def test_an_unknown_step_is_refused():
    done = subprocess.run(["bash", str(SCRIPT), "lunch"], capture_output=True, text=True)
    assert done.returncode == 2 and "no step lunch; steps: build" in done.stderr


@pytest.mark.parametrize("name", ["graph_replay", "benchmark"])
def test_programs_run(name, tmp_path, monkeypatch, capsys):
    file = tmp_path / "found.json"
    arguments = ["--json", str(file), "--device", "cpu"]
    arguments += ["--rounds", "1"] if name == "benchmark" else []
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    assert program(name).main() == 0
    records = json.loads(file.read_text())["records"]
    assert len(records) >= 5
    for record in records:
        assert record.get("passed", True) and "error" not in record, record


def test_a_replay_that_reads_stale_lists_is_seen(monkeypatch):
    graph = program("graph_replay")
    name, problem, choice = graph.cases(short=True)[1]
    monkeypatch.setattr(graph, "overwrite", lambda index, other: None)
    assert not graph.check(name, problem, choice, "cpu")["passed"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_distance_in_units_of_the_last_place(dtype):
    ulps = program("compare").ulps
    x = torch.tensor([1.0, -1.0, 0.0, -torch.inf], dtype=dtype)
    assert ulps(x, x.clone()) == 0
    assert ulps(torch.tensor([0.0], dtype=dtype), torch.tensor([-0.0], dtype=dtype)) == 0
    one = torch.ones(1, dtype=dtype)
    assert ulps(one, one + torch.finfo(dtype).eps) == 1
    assert ulps(-one, -one - torch.finfo(dtype).eps) == 1
    assert ulps(x, x.nan_to_num(neginf=-3.0)) > 1000
