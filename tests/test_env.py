# SPDX-License-Identifier: Apache-2.0
"""`sparse_attn env` says what a report needs, also where things are broken."""

import importlib
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_attn import env, ops
from sparse_attn.__main__ import main


def test_what_it_says(capsys, monkeypatch, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(bytes(2048))
    monkeypatch.setenv("SPARSE_ATTN_CACHE", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert main(["env"]) == 0
    found = capsys.readouterr().out
    assert torch.__version__ in found and platform.python_version() in found
    assert "model (2 KiB)" in found and "SPARSE_ATTN_CACHE=" in found
    assert "OMP_NUM_THREADS=3" in found
    report = env.report()
    assert report["cpu kernels"] == ops.cpu_capability()
    assert report["self-test"].startswith("passes")
    assert "cpu" in report["backends"]
    assert not any(value.startswith("unknown") for value in report.values()), report


def broken(*args, **kwargs):
    raise RuntimeError("broken on purpose\nsecond line")


@pytest.mark.parametrize(
    ("owner", "name", "fact"),
    [
        (importlib, "import_module", "torch"),
        (importlib, "import_module", "cpu kernels"),
        (importlib.metadata, "version", "packages"),
        (platform, "platform", "system"),
        (Path, "read_text", "cpu"),
        (Path, "glob", "library"),
        (Path, "exists", "cache"),
        (torch, "get_num_threads", "threads"),
        (torch.nn.functional, "scaled_dot_product_attention", "self-test"),
    ],
)
def test_broken_pieces_are_told(monkeypatch, owner, name, fact):
    if (owner, name) == (platform, "platform"):
        monkeypatch.setitem(env._FACTS, "system", broken)
    else:
        monkeypatch.setattr(owner, name, broken)
    report = env.report()
    assert report[fact] == "unknown: RuntimeError: broken on purpose"
    assert list(report) == list(env._FACTS) and env.text()


def test_errors_without_a_text_and_exits(monkeypatch):
    monkeypatch.setitem(env._FACTS, "cpu", lambda: exit(3))
    monkeypatch.setitem(env._FACTS, "torch", lambda: {}["x"])
    report = env.report()
    assert report["cpu"] == "unknown: SystemExit: 3"
    assert report["torch"] == "unknown: KeyError: 'x'"


def test_nothing_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(env, "_HERE", tmp_path)
    monkeypatch.setenv("SPARSE_ATTN_CACHE", str(tmp_path / "none"))
    report = env.report()
    assert "the source tree is imported, or the build failed" in report["library"]
    assert report["cache"].endswith("(nothing there)")


def test_the_file_runs_where_the_package_does_not_import(tmp_path):
    """With a torch that fails to import, and so a package that does."""
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so is missing')")
    done = subprocess.run(
        [sys.executable, env.__file__],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr
    assert "torch              unknown: ImportError: libtorch.so is missing" in done.stdout
    assert "self-test          unknown: ImportError" in done.stdout
