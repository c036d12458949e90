# SPDX-License-Identifier: Apache-2.0
"""The NEON kernels: compiled by a cross-compiler, run under qemu, held to the oracle's bound.

The project's own CMakeLists.txt builds the kernels for aarch64; `neon/run_cases.cpp` runs them on
cases from a file, without a torch for that processor.
"""

import functools
import os
import platform
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bounds import assert_matches_oracle, plain_attention
from cases import Case, build, dense_bias, expected
from ptxemu_tools import program
from torch import Tensor

from sparse_attn import reference

REPO = Path(__file__).resolve().parents[1]
BUILD = REPO / "build" / "neon"
COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")

pytestmark = [
    pytest.mark.skipif(
        platform.machine() == "aarch64", reason="this CPU has NEON: all the other tests run it"
    ),
    pytest.mark.skipif(
        COMPILER is None or EMULATOR is None,
        reason="needs a cross-compiler and an emulator: "
        "apt-get install g++-aarch64-linux-gnu qemu-user",
    ),
]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def runner() -> Path:
    """The program, built; ninja and ccache only do what is left to do."""
    configure = [program("cmake"), "-S", str(REPO), "-B", str(BUILD), "-G", "Ninja"]
    configure += ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    configure += [f"-DCMAKE_CXX_COMPILER={COMPILER}", "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={program('ninja')}"]
    configure += [f"-DSPARSE_ATTN_TORCH_DIR={Path(torch.__file__).parent}"]
    target = [program("cmake"), "--build", str(BUILD), "--target", "sparse_attn_kernels"]
    for command in (configure, target):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    objects = sorted(map(str, BUILD.glob("CMakeFiles/sparse_attn_kernels.dir/**/*.o")))
    assert any("kernels_neon" in name for name in objects)
    assert not any("avx" in name for name in objects)
    path = BUILD / "run_cases"
    source = str(REPO / "tests" / "neon" / "run_cases.cpp")
    link = [COMPILER, "-std=gnu++20", "-O1", "-Wall", "-Wextra", "-Werror", "-static"]
    link += ["-Wno-psabi", f"-I{REPO / 'csrc'}", source, *objects, "-o", str(path)]
    done = subprocess.run(link, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def raw(x: Tensor | None) -> bytes:
    data = b"" if x is None else x.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return struct.pack("<q", len(data)) + data


def packed(problem, grad_out: Tensor | None, delta: Tensor | None) -> bytes:
    """A problem as run_cases.cpp reads it."""
    q, k, v, index = problem.q, problem.k, problem.v, problem.index
    settings = problem.kwargs
    offset, scale = settings["q_offset"], settings["softmax_scale"]
    lists = index.block_indices, index.column_indices
    numbers = [DTYPES[q.dtype], q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2]]
    numbers += [q.shape[3], v.shape[3], settings["causal"]]
    numbers += [k.shape[2] - q.shape[2] if offset is None else offset]
    numbers += [index.batch_size, index.num_heads, index.num_tiles, index.block_m, index.block_n]
    numbers += [0 if index.block_bits is None else len(index.block_bits), *map(len, lists)]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    head = struct.pack(f"<{len(numbers)}q2d", *numbers, scale, settings["softcap"] or 0.0)
    arrays = [q, k, v, index.heads, index.block_indptr, index.block_indices, index.block_bits_ids]
    arrays += [index.block_bits, index.column_indptr, index.column_indices, index.column_bias]
    return head + b"".join(map(raw, [*arrays, settings["sinks"], grad_out, delta]))


def run(cases: list[bytes], capability: str, folder: Path) -> bytes:
    (folder / "cases").write_bytes(b"".join(cases))
    environment = {**os.environ, "SPARSE_ATTN_CPU_CAPABILITY": capability}
    command = [EMULATOR, str(runner()), str(folder / "cases"), str(folder / "results")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return (folder / "results").read_bytes()


class Results:
    """Takes tensors from what the program wrote, in its order."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        count = like.numel()
        x = torch.frombuffer(bytearray(self.data), dtype=dtype, count=count, offset=self.at)
        self.at += count * x.element_size()
        return x.view(like.shape)


FORWARD = {
    "mixed": Case(kinds=("dense", "streaming", "listed", "blocks", "columns", "empty")),
    "one-query": Case(1, 200),
    "long-keys": Case(2, 3000, kinds=("dense", "listed"), heads=2, heads_kv=2, block_m=16),
    "gqa": Case(33, 70, heads=6, heads_kv=2, index_heads="kv", sinks=True),
    "one-index": Case(7, 65, batch=2, heads=4, heads_kv=1, index_heads=1, head_dim=64),
    "full": Case(130, 64, causal=False, kinds=("streaming", "blocks")),
    "softcap-bias": Case(softcap=1.5, kinds=("listed",), bias="finite", magnitude=3.0),
    "bits": Case(kinds=("blocks", "listed"), bits=0.7, block_m=80, block_n=16),
    "offset": Case(q_offset=-30, kinds=("dense", "listed")),
    "head_dim-80": Case(40, 90, head_dim=80, head_dim_v=80, heads=2, heads_kv=1),
    "head_dim-128": Case(70, 140, head_dim=128, head_dim_v=128, heads=2, heads_kv=2),
    "head_dim-256": Case(20, 66, head_dim=256, head_dim_v=256, heads=2, heads_kv=2),
    "head_dim-odd": Case(20, 66, head_dim=7, head_dim_v=13, heads=2, heads_kv=2),
}


@pytest.mark.parametrize("dtype", list(DTYPES), ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("capability", ["neon", "scalar"])
def test_forward(capability, dtype, tmp_path):
    problems = {name: build(replace(case, dtype=dtype)) for name, case in FORWARD.items()}
    results = Results(run([packed(p, None, None) for p in problems.values()], capability, tmp_path))
    for name, problem in problems.items():
        oracle, plain = expected(problem)
        for kind, o, p, as_dtype in zip(
            ("out", "lse"), oracle, plain, (dtype, torch.float32), strict=True
        ):
            assert_matches_oracle(results.take(o, as_dtype), o, p, name=f"{kind} of {name}")
    assert results.at == len(results.data)


BACKWARD = ("mixed", "gqa", "one-index", "full", "softcap-bias", "bits", "head_dim-80")


def gradients(function, inputs, dtype: torch.dtype, grad_out: Tensor, *args, **kwargs):
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out, _ = function(*leaves, *args, **kwargs)
    return out, torch.autograd.grad(out, leaves, grad_out.to(out.dtype))


@pytest.mark.parametrize("dtype", list(DTYPES), ids=["fp32", "bf16", "fp16"])
def test_backward(dtype, tmp_path):
    cases, wanted = [], []
    for name in BACKWARD:
        problem = build(replace(FORWARD[name], dtype=dtype))
        index, inputs = problem.index, (problem.q, problem.k, problem.v)
        group = problem.q.shape[1] // index.num_heads
        mask = index.to_dense_mask(problem.kwargs["q_offset"]).repeat_interleave(group, 1)
        bias = dense_bias(index)
        bias = None if bias is None else bias.repeat_interleave(group, 1)
        shape = (*problem.q.shape[:3], problem.v.shape[3])
        grad_out = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)
        out, oracle = gradients(
            reference.attention,
            inputs,
            torch.float64,
            grad_out.double(),
            mask,
            bias=bias,
            **problem.kwargs,
        )
        _, plain = gradients(plain_attention, inputs, dtype, grad_out, mask, bias, **problem.kwargs)
        delta = (grad_out.double() * out.detach()).sum(-1).float()
        cases.append(packed(problem, grad_out, delta))
        wanted.append((name, out, oracle, plain))
    results = Results(run(cases, "neon", tmp_path))
    for name, out, oracle, plain in wanted:
        results.take(out, dtype)
        results.take(out[..., 0], torch.float32)
        for kind, o, p in zip(("grad_q", "grad_k", "grad_v"), oracle, plain, strict=True):
            assert_matches_oracle(results.take(o, dtype), o, p, name=f"{kind} of {name}")
    assert results.at == len(results.data)
