# SPDX-License-Identifier: Apache-2.0
"""The gates on what the compiler makes of CUDA kernels, and a kernel that spills."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ptxemu_tools import NVCC_REASON, nvcc

SCRIPT = Path(__file__).parents[1] / "tools" / "gates" / "gates.py"


def load():
    spec = importlib.util.spec_from_file_location("gates", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gates"] = module
    spec.loader.exec_module(module)
    return module


gates = load()


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "blocks"),
    [
        (168, 49152, 128, 3),  # as cudaOccMaxActiveBlocksPerMultiprocessor says of sm_80
        (128, 0, 128, 4),
        (255, 80 * 1024, 128, 2),
        (255, 82 * 1024, 128, 1),
        (32, 0, 1024, 2),
        (16, 0, 32, 32),
    ],
)
def test_occupancy(registers, shared, threads, blocks):
    assert gates.blocks_per_sm(registers, shared, threads) == blocks


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R20, R4 ;
        /*0020*/               @P1 FSEL R2, R3, R4, P0 ;
        /*0030*/              @!P0 BRA 0x10 ;
        /*0040*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0050*/               @P2 BRA 0x0 ;
"""


def test_only_innermost_loops_count():
    (loop,) = gates.tensor_loops(SASS)
    assert loop == {"HMMA": 1, "FSEL": 1, "BRA": 1}


def measured(**changes):
    kernel = gates.Kernel(100, 0, 4096, 3, 50, 10, 2)
    return {"k": {**gates.row(kernel), **changes}}


@pytest.mark.parametrize(
    "changes",
    [
        {"registers": 101},
        {"local_bytes": 8},
        {"shared_bytes": 4097},
        {"blocks_per_sm": 2},
        {"tensor_share": 0.19},
        {"loop_select": 3},
    ],
)
def test_what_is_worse_breaks_a_limit(changes):
    (change,) = gates.differences(measured(**changes), measured())
    assert change.worse and change.field == next(iter(changes))
    assert "BROKEN" in gates.change_table([change])


def test_what_is_better_is_told_and_what_is_new_needs_a_limit():
    assert gates.differences(measured(), measured()) == []
    changes = gates.differences(measured(registers=90), measured())
    assert changes == [gates.Change("k", "registers", 100, 90, worse=False)]
    assert gates.differences(measured(), {}) == [gates.Change("k", "kernel", "none", "there", True)]
    assert not gates.differences({}, measured())[0].worse
    head, line = gates.change_table(changes).splitlines()
    assert head.split() == ["kernel", "what", "limit", "now"]
    assert line.split() == ["k", "registers", "100", "90"]


def test_the_goals_are_in_the_limits():
    """Nothing spills, two blocks fit at head_dim 128, 18 % are tensor-core instructions."""
    limits = json.loads(gates.LIMITS.read_text())["kernels"]
    assert all(limit["local_bytes"] == 0 for limit in limits.values())
    assert limits["prefill_kernel 128"]["tensor_share"] >= 0.18
    assert all(
        limits[f"{name}_kernel 128{rows}"]["blocks_per_sm"] >= 2
        for name, rows in (("prefill", ""), ("decode", " x 16"), ("decode", " x 64"))
    )


SPILLS = """
__global__ void spills(const float* in, float* out, int n) {
  float x[192];
  for (int i = 0; i < 192; ++i) x[i] = in[threadIdx.x + i * 128];
  for (int j = 0; j < n; ++j) {
#pragma unroll
    for (int i = 0; i < 192; ++i) x[i] = fmaf(x[(i + 7) % 192], x[i], in[j]);
  }
#pragma unroll
  for (int i = 0; i < 192; ++i) out[threadIdx.x + i * 128] = x[i];
}
"""


@pytest.mark.skipif(nvcc() is None, reason=NVCC_REASON)
def test_a_kernel_that_spills_is_found(tmp_path):
    try:
        gates.tool("cuobjdump")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    source, binary = tmp_path / "spills.cu", tmp_path / "spills.cubin"
    source.write_text(SPILLS)
    command = [nvcc(), "-cubin", "-arch=sm_80", "-maxrregcount=64", str(source), "-o", str(binary)]
    subprocess.run(command, check=True)
    (kernel,) = gates.measure(binary, {"spills": 1024}).values()
    assert kernel.local_bytes > 0 and kernel.registers <= 64 and kernel.shared_bytes == 1024
    (change,) = gates.differences({"k": gates.row(kernel)}, {"k": gates.row(kernel)})
    assert change.worse and change.field == "local_bytes"
