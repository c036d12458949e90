# SPDX-License-Identifier: Apache-2.0
"""Faults seeded into the CUDA kernels: each is caught, and without them the same cases pass."""

import pytest
import torch
from bounds import assert_matches_oracle
from cases import Case, build, expected
from cuda_emulation import run
from ptxemu_tools import NVCC_REASON, nvcc

from sparse_attn import SparseIndex

pytestmark = pytest.mark.skipif(nvcc() is None, reason=NVCC_REASON)

NO_FAULT = 99  # of the build with faults, none seeded
PLAIN = Case(heads=2, heads_kv=2, kinds=("dense",), causal=False, seqlen_q=64, seqlen_k=330)
LISTED = Case(heads=2, heads_kv=2, kinds=("listed",), fill=0.9, bits=0.6, bias="finite")
WRONG = {
    1: ("no wait for copies", PLAIN),
    2: ("no barrier between tiles", PLAIN),
    3: ("a key too many under causality", Case(heads=2, heads_kv=2, kinds=("dense",))),
    4: ("heads mapped by h % num_heads_kv", Case(heads=4, heads_kv=2, kinds=("dense",))),
    5: ("masked chunks in the unmasked loop", Case(heads=2, heads_kv=2, kinds=("dense",))),
    6: ("no rescale for a new maximum", PLAIN),
    8: ("mask bits unread", LISTED),
    9: ("biases unread", LISTED),
    10: ("no sink", Case(heads=2, heads_kv=2, sinks=True, kinds=("dense",))),
    12: ("the last chunk lost", PLAIN),
    13: ("lse in base 2", PLAIN),
    15: ("masked pieces in runs", Case(heads=2, heads_kv=2, kinds=("dense",))),
    16: ("no barrier behind the plan of runs", Case(**{**vars(PLAIN), "seqlen_k": 2200})),
    17: ("a piece of a run from its neighbour", PLAIN),
}


def check(case: Case, fault: int) -> None:
    problem = build(
        Case(**{**vars(case), "head_dim": 64, "head_dim_v": 64, "dtype": torch.bfloat16})
    )
    oracle, plain = expected(problem)
    args = (problem.q, problem.k, problem.v, problem.index)
    call = {"return_lse": True, **problem.kwargs}
    for out, lse in run("attention", *args, seeds=(0,), fault=fault, **call):
        assert_matches_oracle(out, oracle[0], plain[0], name="out")
        assert_matches_oracle(lse, oracle[1], plain[1], name="lse")


@pytest.mark.parametrize("fault", WRONG, ids=lambda fault: WRONG[fault][0])
def test_it_is_caught(fault):
    case = WRONG[fault][1]
    check(case, NO_FAULT)
    with pytest.raises(
        (AssertionError, RuntimeError), match=r"above the bound|race|-inf|NaN|uninit"
    ):
        check(case, fault)


@pytest.mark.parametrize(
    ("fault", "name"), [(7, "block_indices"), (7, "column_indices"), (11, "block_bits_ids")]
)
def test_an_index_that_is_not_bounded_is_caught(fault, name):
    kind = "columns" if name == "column_indices" else "blocks"
    index = build(Case(kinds=(kind,), heads=1, heads_kv=1, seqlen_q=64, bits=0.5, fill=0.9)).index
    tensor = getattr(index, name).clone()
    tensor[1] = 2**20
    index = SparseIndex(**{**vars(index), name: tensor})
    q, k = (torch.ones(1, 1, rows, 64, dtype=torch.bfloat16) for rows in (64, 129))
    run("attention", q, k, k, index, seeds=(0,), fault=NO_FAULT)
    with pytest.raises(RuntimeError, match="bounds"):
        run("attention", q, k, k, index, seeds=(0,), fault=fault)
