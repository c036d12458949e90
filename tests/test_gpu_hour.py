# SPDX-License-Identifier: Apache-2.0
"""tools/gpu_hour.sh and the programs that it runs, as far as a machine without a GPU can tell."""

import ctypes
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ptxemu_tools import ptxemu

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
    assert [*steps] == "build environment suite graph bench compare opcodes sanitizer".split()
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


# --- the instruction tests on hardware, with a driver that is none ---


class Driver:
    """libcuda.so.1 as far as opcodes.py calls it, with the simulator for a GPU."""

    def __init__(self, spoil: str = "", refuse: str = "") -> None:
        self.spoil, self.refuse = spoil, refuse
        self.memory: dict[int, np.ndarray] = {}
        self.calls: list[str] = []

    def __getattr__(self, name):  # what only has to succeed
        self.calls.append(name)
        return lambda *args: 0

    def cuModuleLoadData(self, module, text):
        self.ptx = text.value.decode()
        return 218 if self.refuse and self.refuse in self.ptx else 0  # CUDA_ERROR_INVALID_PTX

    def cuMemAlloc_v2(self, address, size):
        array = np.full(size.value, 0xEE, np.uint8)
        address._obj.value = array.ctypes.data
        self.memory[array.ctypes.data] = array
        return 0

    def cuMemcpyHtoD_v2(self, to, source, size):
        ctypes.memmove(to.value, source.value, size.value)
        return 0

    def cuMemcpyDtoH_v2(self, to, source, size):
        return self.cuMemcpyHtoD_v2(to, source, size)

    def cuMemFree_v2(self, address):
        del self.memory[address.value]
        return 0

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, arguments, extra):
        assert (gx, gy, gz, by, bz, shared, stream, extra) == (1, 1, 1, 1, 1, 0, None, None)
        addresses = [ctypes.c_uint64.from_address(pointer).value for pointer in arguments]
        arrays = [self.memory[address] for address in addresses]
        ptxemu().Module(self.ptx).launch(block=bx, args=arrays)
        if self.spoil and self.spoil in self.ptx:
            arrays[-1][0] ^= 1
        return 0


def compare_opcodes(driver, tmp_path, monkeypatch):
    file = tmp_path / "opcodes.json"
    monkeypatch.setattr(sys, "argv", ["opcodes", "--json", str(file)])
    status = program("opcodes").main(driver)
    assert not driver.memory
    return status, json.loads(file.read_text())["records"]


def test_instructions_are_compared_with_the_hardware(tmp_path, monkeypatch, capsys):
    driver = Driver()
    status, records = compare_opcodes(driver, tmp_path, monkeypatch)
    assert status == 0 and len(records) > 100
    assert all(record["difference"] == 0 for record in records)
    assert driver.calls.count("cuModuleUnload") == len(records)
    assert driver.calls.count("cuCtxSynchronize") == len(records)


@pytest.mark.parametrize(
    ("spoil", "status"), [("popc.b64", 1), ("lg2.approx", 0), ("vote.sync.ballot", 1)]
)
def test_a_difference_is_reported(spoil, status, tmp_path, monkeypatch, capsys):
    got, records = compare_opcodes(Driver(spoil=spoil), tmp_path, monkeypatch)
    assert got == status
    differing = [record for record in records if record["difference"]]
    assert differing and all(spoil in record["instruction"] for record in differing)


def test_instructions_of_newer_gpus_are_no_failure(tmp_path, monkeypatch, capsys):
    status, records = compare_opcodes(Driver(refuse="redux.sync"), tmp_path, monkeypatch)
    refused = [record["instruction"] for record in records if "refused" in record]
    assert status == 0 and refused and all("redux.sync" in text for text in refused)
    assert compare_opcodes(Driver(refuse="add"), tmp_path, monkeypatch)[0] == 1
