# SPDX-License-Identifier: Apache-2.0
"""Bank conflicts that the simulator counts (CUDA C++ Programming Guide, "Shared Memory": 32 banks,
successive words of 4 bytes in successive banks)."""

import pytest
from ptxemu_tools import module

SHARED = ".shared .align 128 .b8 tile[16384];\n"
# %r2: 1024 times the lane's number; %r3: an address, `stride` bytes times the lane's number.
BODY = """
  mov.u32 %r1, %tid.x;
  mul.lo.u32 %r3, %r1, {stride};
  mov.u32 %r4, tile;
  add.u32 %r3, %r3, %r4;
  {instruction}
"""
STORE = {1: "st.shared.u8", 4: "st.shared.u32", 8: "st.shared.v2.u32", 16: "st.shared.v4.u32"}
VALUE = {1: "%r1", 4: "%r1", 8: "{%r1, %r1}", 16: "{%r1, %r1, %r1, %r1}"}


def counted(instruction: str, stride: int, options=None) -> dict[str, dict[str, int]]:
    body = BODY.format(stride=stride, instruction=instruction)
    return module(body, before=SHARED).launch(block=32, **(options or {}))["banks"]


@pytest.mark.parametrize(
    ("size", "stride", "wavefronts", "least"),
    [
        (4, 4, 1, 1),  # a row of banks
        (1, 1, 1, 1),  # four lanes a word
        (4, 8, 2, 1),
        (4, 128, 32, 1),  # all in one bank
        (4, 132, 1, 1),  # a padded row each
        (8, 8, 2, 2),
        (8, 128, 32, 2),
        (16, 16, 4, 4),
        (16, 128, 32, 4),
        (16, 144, 4, 4),
    ],
)
def test_stores(size, stride, wavefronts, least):
    store = f"{STORE[size]} [%r3], {VALUE[size]};"
    assert counted(store, stride) == {
        "st": {"accesses": 1, "wavefronts": wavefronts, "least": least}
    }


def test_loads_of_one_word():
    found = counted("ld.shared.u32 %r5, [%r3];", 0, {"check_initialised": False})
    assert found == {"ld": {"accesses": 1, "wavefronts": 1, "least": 1}}


@pytest.mark.parametrize(("stride", "wavefronts"), [(16, 4), (128, 32), (144, 4), (256, 32)])
def test_matrix_loads(stride, wavefronts):
    load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r3];"
    found = counted(load, stride, {"check_initialised": False})
    assert found == {"ldmatrix": {"accesses": 1, "wavefronts": wavefronts, "least": 4}}


@pytest.mark.parametrize(("lanes", "least"), [(32, 1), (8, 1), (0, None)])
def test_lanes_that_do_not_take_part(lanes, least):
    found = counted(f"setp.lt.u32 %p1, %r1, {lanes};\n  @%p1 st.shared.u32 [%r3], %r1;", 4)
    assert found == ({"st": {"accesses": 1, "wavefronts": 1, "least": 1}} if least else {})
