# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ through nvcc: the stand-in for libcudart, a torch operator, wgmma and TMA."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ptxemu_tools import NVCC_REASON, build, finding, nvcc, ptxemu

pytestmark = pytest.mark.skipif(nvcc() is None, reason=NVCC_REASON)

SOURCES = Path(__file__).with_name("ptxemu_cuda")
FAT_BINARY = ["-gencode", "arch=compute_80,code=compute_80"]
FAT_BINARY += ["-gencode", "arch=compute_90a,code=compute_90a"]
FAT_BINARY += ["--compress-mode=none", "-cudart", "shared", "-lineinfo", "-std=c++17"]


def compile_cuda(source: str, output: Path, *flags) -> Path:
    """With ccache where there is one, so that only a changed file costs anything."""
    ccache = shutil.which("ccache")
    launcher = [ccache] if ccache and "-c" in flags else []
    command = [*launcher, nvcc(), *map(str, flags), str(SOURCES / source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=output.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def link_flags() -> list[str]:
    folder = build() / "cudart"
    return [f"-L{folder}", "-lcudart", f"-Wl,-rpath,{folder}"]


def environment(**settings) -> dict[str, str]:
    return {**os.environ, "LD_LIBRARY_PATH": str(build() / "cudart"), **settings}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ptxemu_cuda")


def test_runtime(folder):
    """Memory, symbols, streams, events, graphs, attributes, clusters; findings as error codes."""
    item = compile_cuda("runtime.cu", folder / "runtime.o", "-c", *FAT_BINARY)
    program = folder / "runtime"
    subprocess.run(["g++", str(item), *link_flags(), "-o", str(program)], check=True)
    for seed in ("0", "7"):
        done = subprocess.run(
            [str(program)], capture_output=True, text=True, env=environment(PTXEMU_SEED=seed)
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("ok: ") == 31


USE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
for dtype in (torch.float32, torch.bfloat16):
    for shape in ((1, 1), (3, 77), (5, 300)):
        x = torch.randint(-8, 9, shape).to(dtype)
        assert torch.equal(torch.ops.ptxemu_test.sums(x), x.float().sum(1)), (dtype, shape)
big = torch.ones(4, 500)
assert torch.equal(torch.ops.ptxemu_test.sums(big[:, 100:200]), torch.full((4,), 100.0))
try:
    torch.ops.ptxemu_test.sums(torch.ones(2, 96), 1)
except RuntimeError as error:
    assert "4 bytes past the end" in str(error) and "torch_op.cu" in str(error), error
else:
    raise SystemExit("the read past the end went unseen")
print("done")
"""


def test_a_torch_operator_runs_end_to_end(folder):
    """Its launcher with <<<>>>, on CPU tensors; the preloaded heap knows every tensor's bounds."""
    torch_folder = Path(torch.__file__).parent
    flags = ["-Xcompiler", "-fPIC", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]
    item = compile_cuda(
        "torch_op.cu",
        folder / "torch_op.o",
        "-c",
        *FAT_BINARY,
        *flags,
        f"-isystem={torch_folder / 'include'}",
    )
    library = folder / "torch_op.so"
    link = ["g++", "-shared", str(item), *link_flags(), f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    subprocess.run([*link, "-o", str(library)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", USE, str(library)],
        capture_output=True,
        text=True,
        env=environment(LD_PRELOAD=str(build() / "libptxemu_heap.so")),
    )
    assert done.returncode == 0 and "done" in done.stdout, done.stdout + done.stderr


# --- a kernel with wgmma and TMA, with and without its waits ---


@pytest.fixture(scope="module")
def gemm(folder):
    flags = ["-ptx", "-lineinfo", "-std=c++17", "-arch=compute_90a"]
    built = ptxemu().Module(
        compile_cuda("wgmma_tma.cu", folder / "wgmma_tma.ptx", *flags).read_text()
    )
    assert built.unsupported == []
    return built


def run_gemm(built, fault, seed):
    """D = A B^T of 64 x 320 operands, five tiles of K."""
    rng = np.random.default_rng(seed)
    a, b = (torch.tensor(rng.integers(-8, 9, (64, 320))).bfloat16() for _ in range(2))
    raw = [x.view(torch.int16).numpy() for x in (a, b)]
    maps = [ptxemu().tensor_map(x, (64, 64), data_type=9, swizzle=3) for x in raw]
    out = np.zeros((64, 64), np.float32)
    built.launch(
        built.find(f"gemmILi{fault}E"),
        block=160,
        shared=4 * 8192 + 32,
        args=[*maps, out, 5],
        buffers=raw,
        seed=seed,
    )
    return out, (a.double() @ b.double().T).numpy()


def test_wgmma_and_tma(gemm):
    for seed in range(4):
        out, expected = run_gemm(gemm, 0, seed)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [
        pytest.param(1, "race|uninitialised", id="no wait for the loads"),
        pytest.param(2, "race|mbarrier", id="no wait for the readers"),
        pytest.param(3, "race", id="stage released before wgmma is done"),
        pytest.param(4, "wgmma", id="no last wait_group"),
        pytest.param(5, "wgmma", id="no wgmma.fence"),
        pytest.param(6, "deadlock", id="wrong number of bytes"),
    ],
)
def test_wgmma_and_tma_without_a_wait(gemm, fault, kinds):
    for seed in range(4):
        message = finding(kinds, lambda seed=seed: run_gemm(gemm, fault, seed))
        assert "wgmma_tma.cu:" in message
