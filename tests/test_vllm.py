# SPDX-License-Identifier: Apache-2.0
"""Attention over a serving engine's pages, without the engine, against a loop in float64.

`benchmarks/vllm_cpu.py` runs the engine itself.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sparse_attn.integrations import vllm_plugin
from sparse_attn.integrations._pages import attend_batch, split_pages, write_pages
from sparse_attn.patterns import AShape, BlockSparse, Dense, PerHead

HEADS, HEADS_KV, DIM, PAGE = 4, 2, 16, 16


class Engine:
    """The pages of some requests, as vLLM lays out a layer's cache and fills it."""

    def __init__(self, seed: int, seq_lens: list[int], num_pages: int = 40) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.cache = torch.full((num_pages, HEADS_KV, PAGE, 2 * DIM), torch.nan)
        self.free = torch.randperm(num_pages, generator=self.random).tolist()
        most = -(-max(seq_lens) // PAGE)
        self.table = torch.full((len(seq_lens), most + 1), -7, dtype=torch.int32)
        self.seq_lens = seq_lens
        self.keys = [self.normal(n, HEADS_KV, DIM) for n in seq_lens]
        self.values = [self.normal(n, HEADS_KV, DIM) for n in seq_lens]
        for s, n in enumerate(seq_lens):
            for page in range(-(-n // PAGE)):
                self.table[s, page] = self.free.pop()

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random)

    def slots(self, request: int, first: int, last: int) -> torch.Tensor:
        places = torch.arange(first, last)
        return self.table[request, places // PAGE].long() * PAGE + places % PAGE

    def write(self, request: int, first: int, last: int) -> None:
        keys, values = self.keys[request][first:last], self.values[request][first:last]
        write_pages(self.cache, keys, values, self.slots(request, first, last))

    def run(self, rows: list[int], direct: bool, **options: Any) -> tuple[torch.Tensor, Any]:
        """The last rows[s] tokens of every request: (ours, the queries)."""
        for s, n in enumerate(self.seq_lens):
            self.write(s, 0, n)
        starts = [0, *torch.tensor(rows).cumsum(0).tolist()]
        query, out = self.normal(starts[-1], HEADS, DIM), self.normal(starts[-1], HEADS * DIM)
        tails = [
            (k[n - r :], v[n - r :])
            for k, v, n, r in zip(self.keys, self.values, self.seq_lens, rows, strict=True)
        ]
        new = tuple(torch.cat([t[i] for t in tails]) for i in (0, 1)) if direct else None
        options = {"pattern": "dense", "decode": "dense"} | options
        attend_batch(query, new, self.cache, out, starts, self.seq_lens, self.table, **options)
        return out.view(-1, HEADS, DIM), query

    def oracle(self, query: torch.Tensor, rows: list[int], visible: Any) -> torch.Tensor:
        """Row by row and head by head in float64; visible(p, j, h) says which keys are seen."""
        parts, start = [], 0
        for s, count in enumerate(rows):
            for i in range(count):
                p = self.seq_lens[s] - count + i
                for h in range(HEADS):
                    js = [j for j in range(self.seq_lens[s]) if visible(p, j, h)]
                    k = self.keys[s][js, h // (HEADS // HEADS_KV)].double()
                    v = self.values[s][js, h // (HEADS // HEADS_KV)].double()
                    weights = torch.softmax(k @ query[start + i, h].double() / DIM**0.5, 0)
                    parts.append(weights @ v)
            start += count
        return torch.stack(parts).view(-1, HEADS, DIM)


def assert_close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """float32 rounding of sums of at most a few hundred terms of size one."""
    assert (ours.double() - exact).abs().max() <= 256 * torch.finfo(torch.float32).eps


CASES = [
    ([70, 33, 5], [70, 33, 5]),  # whole prompts
    ([70, 33, 50], [1, 1, 1]),  # one token each
    ([70, 33, 50, 17, 64], [20, 1, 50, 1, 2]),  # a chunk, a prompt, and requests that decode
    ([40, 40], [20, 20]),  # equal chunks
    ([16, 32], [0, 5]),  # a request without rows; a length that fills its pages
]


@pytest.mark.parametrize("direct", [False, True], ids=["pages", "direct"])
@pytest.mark.parametrize(("seq_lens", "rows"), CASES)
def test_dense(seq_lens: list[int], rows: list[int], direct: bool) -> None:
    engine = Engine(1, seq_lens)
    ours, query = engine.run(rows, direct)
    assert_close(ours, engine.oracle(query, rows, lambda p, j, h: j <= p))


@pytest.mark.parametrize("direct", [False, True], ids=["pages", "direct"])
@pytest.mark.parametrize(("seq_lens", "rows"), CASES)
def test_patterns_of_long_and_short_passes(
    seq_lens: list[int], rows: list[int], direct: bool
) -> None:
    engine = Engine(2, seq_lens)
    heads = PerHead([AShape(sink=3, window=9), Dense(), AShape(sink=0, window=5), Dense()])
    options = {"pattern": heads, "decode": AShape(sink=2, window=6)}
    ours, query = engine.run(rows, direct, **options)
    limits = [(3, 9), (999, 0), (0, 5), (999, 0)]

    def long(p: int, j: int, h: int) -> bool:
        sink, window = limits[h]
        return j <= p and (j < sink or p - j < window)

    def short(p: int, j: int, h: int) -> bool:
        return j <= p and (j < 2 or p - j < 6)

    exact_long, exact_short = (engine.oracle(query, rows, rule) for rule in (long, short))
    is_long = torch.tensor([r > 16 for r in rows for _ in range(r)])
    assert_close(ours, torch.where(is_long[:, None, None], exact_long, exact_short))


@pytest.mark.parametrize(("seq_lens", "rows"), CASES)
def test_the_window_of_a_model_stands_above_patterns(seq_lens: list[int], rows: list[int]) -> None:
    engine = Engine(3, seq_lens)
    patterns = {"pattern": AShape(sink=1, window=2), "decode": AShape(sink=1, window=2)}
    ours, query = engine.run(rows, True, window=12, **patterns)
    assert_close(ours, engine.oracle(query, rows, lambda p, j, h: j <= p and p - j < 12))


def test_a_pattern_that_reads_keys_sees_those_of_its_request_alone() -> None:
    engine = Engine(4, [200, 130], num_pages=60)
    options = {"pattern": BlockSparse(top_k=1000, block_m=16, block_n=16)}
    ours, query = engine.run([60, 130], False, **options)  # pages elsewhere hold NaN
    assert_close(ours, engine.oracle(query, [60, 130], lambda p, j, h: j <= p))


def test_write_pages_leaves_padding_and_the_rest_alone() -> None:
    cache = torch.zeros(3, HEADS_KV, PAGE, 2 * DIM)
    key, value = torch.ones(4, HEADS_KV, DIM), torch.full((4, HEADS_KV, DIM), 2.0)
    write_pages(cache, key, value, torch.tensor([17, -1, 47, 0]))
    keys, values = split_pages(cache)
    assert keys.data_ptr() == cache.data_ptr()
    # Of a page and head the keys come first, then the values: what other code of vLLM's reads.
    flat = cache.view(3, HEADS_KV, 2 * PAGE * DIM)
    assert (flat[1, :, DIM : 2 * DIM] == 1).all()
    assert (flat[1, :, (PAGE + 1) * DIM : (PAGE + 2) * DIM] == 2).all()
    written = {(0, 0), (1, 1), (2, 15)}
    for page in range(3):
        for place in range(PAGE):
            full = (page, place) in written
            assert torch.equal(keys[page, :, place], torch.full((HEADS_KV, DIM), float(full)))
            assert torch.equal(values[page, :, place], torch.full((HEADS_KV, DIM), 2.0 * full))


class TestPlugin:
    def test_is_an_entry_point(self) -> None:
        line = 'sparse_attn = "sparse_attn.integrations.vllm_plugin:register"'
        group = '[project.entry-points."vllm.general_plugins"]'
        project = Path(__file__).resolve().parents[1] / "pyproject.toml"
        assert f"{group}\n{line}\n" in project.read_text()
        assert callable(vllm_plugin.register)

    def test_registers_any_number_of_times(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: dict[str, str] = {}
        registry: Any = ModuleType("vllm.v1.attention.backends.registry")
        registry.AttentionBackendEnum = SimpleNamespace(CPU_ATTN="CPU_ATTN")
        registry.register_backend = seen.__setitem__
        parents = ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backends")
        for name in parents:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, registry.__name__, registry)
        vllm_plugin.register()
        vllm_plugin.register()
        assert seen == {"CPU_ATTN": "sparse_attn.integrations.vllm.SparseAttnBackend"}

    def test_leaves_an_unknown_vllm_alone(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))  # no registry in it
        vllm_plugin.register()
        assert "vLLM runs without sparse_attn" in caplog.text
