# SPDX-License-Identifier: Apache-2.0
"""Bank conflicts of the CUDA kernels' shared memory, counted where tools/ptxemu executes them."""

import json
import re
from pathlib import Path

import pytest
import torch
from cuda_emulation import bank_use, run
from ptxemu_tools import NVCC_REASON, nvcc

LIMITS = Path(__file__).parents[1] / "tools" / "gates" / "limits.json"

pytestmark = pytest.mark.skipif(nvcc() is None, reason=NVCC_REASON)


SWIZZLE_UNDONE, NO_FAULT = 18, 99  # of the build with faults


def tensors(head_dim, rows):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 8, rows, head_dim, generator=generator).bfloat16()
    k, v = torch.randn(2, 1, 1, 300, head_dim, generator=generator).bfloat16()
    return q, k, v


def check_conflicts(head_dim, rows, fault=0):
    limits = json.loads(LIMITS.read_text())["bank_wavefronts"]
    found = bank_use("attention", *tensors(head_dim, rows), fault=fault)
    kernel = "prefill_kernel" if rows > 16 else "decode_kernel"
    of_call = re.compile(rf"{kernel}.*bfloat16_tELi{head_dim}E")
    (use,) = (use for name, use in found.items() if of_call.search(name))
    assert use["ldmatrix"]["accesses"] > 0 and use["cp"]["accesses"] > 0
    for opcode, counts in use.items():
        assert counts["wavefronts"] <= limits[opcode] * counts["least"], (opcode, counts)


@pytest.mark.parametrize("rows", [100, 1])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_conflicts(head_dim, rows):
    """The limits are the wavefronts that may be taken for each that the accesses need.

    Loads of matrices and stores meet no bank twice, nor do copies and other loads
    but at head_dim 96, whose rows of Q and of the result are no multiple of all banks.
    """
    check_conflicts(head_dim, rows)


@pytest.mark.parametrize("rows", [100, 1])
def test_a_wrong_swizzle_is_caught(rows):
    """Its results are right to the last bit: that it is slow is all that is wrong."""
    (right,) = run("attention", *tensors(64, rows), seeds=(0,), fault=NO_FAULT)
    (wrong,) = run("attention", *tensors(64, rows), seeds=(0,), fault=SWIZZLE_UNDONE)
    assert torch.equal(right, wrong)
    check_conflicts(64, rows, NO_FAULT)
    with pytest.raises(AssertionError, match="ldmatrix"):
        check_conflicts(64, rows, SWIZZLE_UNDONE)
