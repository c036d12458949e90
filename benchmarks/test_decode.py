# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable

import pytest

from sparse_attn.bench.cases import Case, Choice, Problem

PEERS = ("sparse_attn", "torch SDPA", "vLLM", "ORT GroupQueryAttention")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("by", PEERS)
def test_dense(run: Callable[[Case], None], shorter: int, by: str, group: int, dtype: str) -> None:
    run(Case(Problem(dtype, 1, 32768 // shorter, 128, 8 * group, 8), by=by))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["streaming", "blocks", "columns"])
def test_lists(run: Callable[[Case], None], shorter: int, kind: str, dtype: str) -> None:
    run(Case(Problem(dtype, 1, 32768 // shorter, 128, 32, 8), Choice(kind, 0.5)))
