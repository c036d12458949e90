# SPDX-License-Identifier: Apache-2.0
"""Builds the simulator once for the tests, and writes small kernels for them."""

import functools
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
SOURCE = REPO / "tools" / "ptxemu"
BUILD = REPO / "build" / "ptxemu"


def program(name: str) -> str:
    """Its path: beside the interpreter, where pip puts it, or on the search path."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise FileNotFoundError(f"{name} is needed to build tools/ptxemu: pip install {name}")
    return found


@functools.cache
def build() -> Path:
    """The folder with the built simulator; ninja only does what is left to do."""
    configure = [program("cmake"), "-S", str(SOURCE), "-B", str(BUILD), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={program('ninja')}"]
    for command in (configure, [program("cmake"), "--build", str(BUILD)]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return BUILD


@functools.cache
def ptxemu():
    """The Python module of the simulator."""
    library = build() / "libptxemu.so"
    spec = importlib.util.spec_from_file_location("ptxemu", SOURCE / "python" / "ptxemu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.library(library)
    return module


def nvcc() -> str | None:
    found = shutil.which("nvcc")
    return found or next(iter(map(str, Path("/usr/local").glob("cuda*/bin/nvcc"))), None)


NVCC_REASON = "nvcc is not there, and these tests compile CUDA C++ (install the CUDA toolkit)"

HEADER = """
.version 9.0
.target {target}
.address_size 64
"""

REGISTERS = """
  .reg .pred %p<16>;
  .reg .b16 %h<16>;
  .reg .b32 %r<64>;
  .reg .f32 %f<64>;
  .reg .b64 %rd<32>;
  .reg .f64 %fd<16>;
"""


def kernel(body: str, parameters: str = "", *, target: str = "sm_80", before: str = "") -> str:
    """PTX of one kernel `k` with the usual registers; parameters as "u64 a, u32 n"."""
    declared = ", ".join(f".param .{p.strip()}" for p in parameters.split(",") if p.strip())
    return (
        HEADER.format(target=target)
        + before
        + f"\n.visible .entry k({declared})\n{{{REGISTERS}{body}\n  ret;\n}}\n"
    )


def module(*args, **kwargs):
    return ptxemu().Module(kernel(*args, **kwargs))


def finding(kind: str, run) -> str:
    """Runs, expects a finding of this kind ("a|b": either), and returns its message."""
    try:
        run()
    except ptxemu().Finding as found:
        assert found.kind in kind.split("|"), f"{found.kind} instead of {kind}: {found}"
        return str(found)
    raise AssertionError(f"no finding; {kind} was expected")
