# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable

import pytest

from sparse_attn.bench.cases import DTYPES, Case, Choice, Problem
from sparse_attn.bench.peers import IMPLEMENTATIONS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("by", [n for n in IMPLEMENTATIONS if n != "ORT SparseAttention"])
def test_dense(
    run: Callable[[Case], None], shorter: int, by: str, head_dim: int, dtype: str
) -> None:
    seqlen = 8192 // shorter
    run(Case(Problem(dtype, seqlen, seqlen, head_dim), by=by))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.25, 0.1, 0.05, 0.02])
@pytest.mark.parametrize("by", ["sparse_attn", "FlexAttention", "ORT SparseAttention"])
def test_blocks(
    run: Callable[[Case], None], shorter: int, by: str, density: float, dtype: str
) -> None:
    seqlen = 8192 // shorter
    run(Case(Problem(dtype, seqlen, seqlen, 128), Choice("blocks", density), by=by))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["columns", "streaming"])
def test_other_keys(run: Callable[[Case], None], shorter: int, kind: str, dtype: str) -> None:
    seqlen = 8192 // shorter
    run(Case(Problem(dtype, seqlen, seqlen, 128), Choice(kind, 0.1)))
