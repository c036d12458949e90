# SPDX-License-Identifier: Apache-2.0
"""pytest-benchmark suites over the cases of `python -m sparse_attn bench`.

    pytest benchmarks --benchmark-group-by=group --benchmark-autosave

They time one contestant after another, to compare commits on one quiet machine. To compare
contestants, use the command: it takes turns. The default test run does not collect them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sparse_attn.bench import peers
from sparse_attn.bench.cases import Case, Keys
from sparse_attn.bench.machine import Unavailable


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--vllm", help="vLLM's CPU kernels: its wheel, its folder or the .so")
    parser.addoption("--shorter", type=int, default=1, help="divides the lengths")


@pytest.fixture
def run(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Callable[[Case], None]]:
    """Times a case on its threads; one that cannot run is skipped with the reason."""
    peers.use_vllm(request.config.getoption("--vllm"))
    threads = torch.get_num_threads()

    def timed(case: Case) -> None:
        torch.set_num_threads(case.threads)
        keys = Keys(case.problem, case.choice)
        try:
            prepared = peers.IMPLEMENTATIONS[case.by](case, case.problem.inputs(), keys)
        except Unavailable as error:
            pytest.skip(str(error))
        density = keys.index.density()
        benchmark.group = f"{case.problem}, {case.choice}"
        benchmark.extra_info.update(
            element_density=density.element,
            tile_density=density.tile,
            flop=case.problem.dense_flops * density.element,
            bytes=case.problem.dense_bytes * density.tile,
        )
        prepared.call()
        with torch.no_grad():
            benchmark(prepared.call)

    yield timed
    torch.set_num_threads(threads)


@pytest.fixture
def shorter(request: pytest.FixtureRequest) -> int:
    divisor: int = request.config.getoption("--shorter")
    return divisor
