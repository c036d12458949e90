# SPDX-License-Identifier: Apache-2.0
"""Bank conflicts of the CUDA kernels' shared memory, counted where tools/ptxemu executes them."""

import json
import re
from pathlib import Path

import pytest
import torch
from cuda_emulation import bank_use
from ptxemu_tools import NVCC_REASON, nvcc

LIMITS = Path(__file__).parents[1] / "tools" / "gates" / "limits.json"

pytestmark = pytest.mark.skipif(nvcc() is None, reason=NVCC_REASON)


@pytest.mark.parametrize("rows", [100, 1])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_conflicts(head_dim, rows):
    """The limits are the wavefronts that may be taken for each that the accesses need.

    Loads of matrices and stores meet no bank twice, nor do copies and other loads
    but at head_dim 96, whose rows of Q and of the result are no multiple of all banks.
    """
    limits = json.loads(LIMITS.read_text())["bank_wavefronts"]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 8, rows, head_dim, generator=generator).bfloat16()
    k, v = torch.randn(2, 1, 1, 300, head_dim, generator=generator).bfloat16()
    found = bank_use("attention", q, k, v)
    kernel = "prefill_kernel" if rows > 16 else "decode_kernel"
    of_call = re.compile(rf"{kernel}.*bfloat16_tELi{head_dim}E")
    (use,) = (use for name, use in found.items() if of_call.search(name))
    assert use["ldmatrix"]["accesses"] > 0 and use["cp"]["accesses"] > 0
    for opcode, counts in use.items():
        assert counts["wavefronts"] <= limits[opcode] * counts["least"], (opcode, counts)
