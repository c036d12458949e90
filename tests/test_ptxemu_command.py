# SPDX-License-Identifier: Apache-2.0
"""The simulator's command line."""

import json
import subprocess

import numpy as np
import pytest
from ptxemu_tools import SOURCE, build, kernel

AXPY = """
  ld.param.u64 %rd1, [px]; ld.param.u64 %rd2, [py];
  ld.param.f32 %f1, [a]; ld.param.u32 %r2, [n];
  mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ntid.x; mov.u32 %r5, %tid.x;
  mad.lo.u32 %r1, %r3, %r4, %r5;
  setp.ge.u32 %p1, %r1, %r2; @%p1 bra DONE;
  mad.wide.u32 %rd3, %r1, 4, %rd1; mad.wide.u32 %rd4, %r1, 4, %rd2;
  ld.global.f32 %f2, [%rd3]; ld.global.f32 %f3, [%rd4];
  fma.rn.f32 %f3, %f1, %f2, %f3;
  st.global.f32 [%rd4], %f3;
DONE:
"""
PARAMETERS = "u64 px, u64 py, f32 a, u32 n"


def command(*words):
    words = [str(build() / "ptxemu"), *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


@pytest.fixture
def axpy(tmp_path):
    file = tmp_path / "axpy.ptx"
    file.write_text(kernel(AXPY, PARAMETERS))
    return file


def test_run(axpy, tmp_path):
    out = tmp_path / "y.bin"
    words = ["--grid", "2", "--block", "64", "--arg", "f32[100]=iota:ro"]
    words += ["--arg", f"f32[100]=ones:print=3:out={out}", "--arg", "f32=2", "--arg", "u32=100"]
    done = command("run", axpy, *words)
    assert done.returncode == 0, done.stderr
    stats, printed = done.stdout.strip().split("\n")
    assert json.loads(stats)["opcodes"]["fma"] == 4
    assert printed == "1 3 5"
    np.testing.assert_array_equal(np.fromfile(out, np.float32), 2 * np.arange(100) + 1)


def test_a_finding_is_exit_status_1_and_names_the_place(axpy):
    words = ["--grid", "2", "--block", "64", "--arg", "f32[100]=iota", "--arg", "f32[100]=ones"]
    done = command("run", axpy, *words, "--arg", "f32=2", "--arg", "u32=101")
    assert done.returncode == 1
    assert "bounds" in done.stderr and "past the end of px" in done.stderr
    assert "thread (36,0,0) of CTA (1,0,0)" in done.stderr and "ld.global.f32" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arg", "f32[8]=iota"], "takes 4 arguments; 1 were given"),
        (["--kernel", "nothing"], "0 kernels fit"),
        (["--wrong", "1"], "unknown option"),
        (["--arg", "q9=1", "--arg", "f32=1", "--arg", "f32=1", "--arg", "u32=1"], "unknown type"),
    ],
)
def test_wrong_use_is_explained(axpy, words, message):
    done = command("run", axpy, *words)
    assert done.returncode == 1 and message in done.stderr


def test_kernels_and_opcodes(axpy, tmp_path):
    described = json.loads(command("kernels", axpy).stdout)
    names = [p["name"] for p in described["kernels"][0]["parameters"]]
    assert names == ["px", "py", "a", "n"]
    assert command("opcodes", axpy).returncode == 0
    odd = tmp_path / "odd.ptx"
    odd.write_text(kernel("  tex.1d.v4.f32.s32 {%f1, %f2, %f3, %f4}, [%rd1, {%r1}];"))
    done = command("opcodes", odd)
    assert done.returncode == 1
    assert "unknown instruction tex" in done.stdout and "1 unsupported" in done.stdout


def test_the_readme_shows_the_usage():
    usage = command("--help")
    assert usage.returncode == 0
    assert "ptxemu opcodes FILE.ptx" in usage.stdout
    readme = (SOURCE / "README.md").read_text()
    for line in ("ptxemu kernels", "ptxemu opcodes", "ptxemu run"):
        assert line in readme
