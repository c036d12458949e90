# SPDX-License-Identifier: Apache-2.0
"""Instructions of the simulator, one at a time, against the PTX ISA (its sections are named)."""

import math

import numpy as np
import pytest
from ptxemu_tools import finding, kernel, module, ptxemu

# Loads a value per lane from `a`, `b`, `c` (64 bits each), runs the instruction, stores 64 bits.
LANES = """
  ld.param.u64 %rd1, [pa];
  ld.param.u64 %rd2, [pd];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd3, %r1, 32;
  add.u64 %rd1, %rd1, %rd3;
  mul.wide.u32 %rd4, %r1, 8;
  add.u64 %rd2, %rd2, %rd4;
  ld.global.v2.u64 {%rd10, %rd11}, [%rd1];
  ld.global.v2.u64 {%rd12, %rd13}, [%rd1+16];
  cvt.u32.u64 %r10, %rd10; cvt.u32.u64 %r11, %rd11;
  cvt.u32.u64 %r12, %rd12; cvt.u32.u64 %r13, %rd13;
  mov.b32 %f10, %r10; mov.b32 %f11, %r11; mov.b32 %f12, %r12;
  mov.b64 %fd10, %rd10; mov.b64 %fd11, %rd11; mov.b64 %fd12, %rd12;
  cvt.u16.u64 %h10, %rd10; cvt.u16.u64 %h11, %rd11; cvt.u16.u64 %h12, %rd12;
  setp.ne.u64 %p3, %rd12, 0;
  mov.u64 %rd20, 0;
  INSTRUCTION
  st.global.u64 [%rd2], %rd20;
"""
WRITE_BACK = {
    "r": "cvt.u64.u32 %rd20, %r20;",
    "h": "cvt.u64.u16 %rd20, %h9;",
    "f": "mov.b32 %r20, %f20; cvt.u64.u32 %rd20, %r20;",
    "fd": "mov.b64 %rd20, %fd9;",
    "rd": "",
    "p": "selp.u64 %rd20, 1, 0, %p9;",
}
RESULT = {"r": "%r20", "h": "%h9", "f": "%f20", "fd": "%fd9", "rd": "%rd20", "p": "%p9"}


def f32(x):
    return int(np.float32(x).view(np.uint32))


def f64(x):
    return int(np.float64(x).view(np.uint64))


def f16(x):
    return int(np.float16(x).view(np.uint16))


def bf16(x):
    """Round to nearest even."""
    bits = f32(x)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def run_lanes(instruction, kind, rows):
    """Results of `instruction` for up to 32 rows of operands."""
    operands = np.zeros((32, 4), np.uint64)
    for lane, row in enumerate(rows):
        for column, value in enumerate(row):
            operands[lane, column] = value & (2**64 - 1)
    result = np.zeros(32, np.uint64)
    body = LANES.replace("INSTRUCTION", instruction.replace("D", RESULT[kind]) + WRITE_BACK[kind])
    module(body, "u64 pa, u64 pd").launch(args=[operands, result])
    return [int(x) for x in result[: len(rows)]]


NAN32 = 0x7FFFFFFF
CASES = [
    # Integer Arithmetic Instructions
    ("add.s32 D, %r10, %r11;", "r", (0x7FFFFFFF, 1), 0x80000000),
    ("add.sat.s32 D, %r10, %r11;", "r", (0x7FFFFFFF, 1), 0x7FFFFFFF),
    ("sub.u16 D, %h10, %h11;", "h", (1, 2), 0xFFFF),
    ("mul.hi.s32 D, %r10, %r11;", "r", (-2, 3), 0xFFFFFFFF),
    ("mul.hi.u64 D, %rd10, %rd11;", "rd", (2**63, 6), 3),
    ("mul.wide.s32 D, %r10, %r11;", "rd", (-2, 3), 2**64 - 6),
    ("mul.wide.u16 D, %h10, %h11;", "r", (0xFFFF, 0xFFFF), 0xFFFE0001),
    ("mad.lo.s32 D, %r10, %r11, %r12;", "r", (5, -3, 7), 2**32 - 8),
    ("mad.wide.u32 D, %r10, %r11, %rd12;", "rd", (2**32 - 1, 2, 5), 2**33 + 3),
    ("div.s32 D, %r10, %r11;", "r", (-7, 2), 2**32 - 3),
    ("rem.s32 D, %r10, %r11;", "r", (-7, 2), 2**32 - 1),
    ("div.u64 D, %rd10, %rd11;", "rd", (2**64 - 1, 10), (2**64 - 1) // 10),
    ("min.s32 D, %r10, %r11;", "r", (-1, 1), 2**32 - 1),
    ("min.u32 D, %r10, %r11;", "r", (-1, 1), 1),
    ("abs.s32 D, %r10;", "r", (-9,), 9),
    ("sad.u32 D, %r10, %r11, %r12;", "r", (3, 10, 100), 107),
    ("dp4a.s32.s32 D, %r10, %r11, %r12;", "r", (0xFF020304, 0x01010101, 10), 18),
    # Logic and Shift Instructions: amounts beyond the width are clamped
    ("shl.b32 D, %r10, %r11;", "r", (1, 32), 0),
    ("shr.u32 D, %r10, %r11;", "r", (2**31, 31), 1),
    ("shr.s32 D, %r10, %r11;", "r", (-8, 99), 2**32 - 1),
    ("shr.s64 D, %rd10, %r11;", "rd", (-8, 1), 2**64 - 4),
    ("shf.l.wrap.b32 D, %r10, %r11, %r12;", "r", (0x80000000, 1, 33), 3),
    ("shf.r.clamp.b32 D, %r10, %r11, %r12;", "r", (1, 0xABCD, 32), 0xABCD),
    ("lop3.b32 D, %r10, %r11, %r12, 0x80;", "r", (0xF0, 0xCC, 0xAA), 0x80),
    ("lop3.b32 D, %r10, %r11, %r12, 0x96;", "r", (0xF0, 0xCC, 0xAA), 0x96),
    ("not.b32 D, %r10;", "r", (0,), 0xFFFFFFFF),
    ("cnot.b32 D, %r10;", "r", (0,), 1),
    # Bit fields: bfe, bfi, bfind, brev, popc, clz, fns, prmt
    ("bfe.u32 D, %r10, 4, 8;", "r", (0xABCD,), 0xBC),
    ("bfe.s32 D, %r10, 4, 8;", "r", (0xABCD,), 0xFFFFFFBC),
    ("bfe.s32 D, %r10, 28, 8;", "r", (0x80000000,), 0xFFFFFFF8),
    ("bfe.u32 D, %r10, 4, 0;", "r", (0xABCD,), 0),
    ("bfi.b32 D, %r10, %r11, 8, 4;", "r", (0x5, 0xFFFFFFFF), 0xFFFFF5FF),
    ("bfind.u32 D, %r10;", "r", (0,), 0xFFFFFFFF),
    ("bfind.u32 D, %r10;", "r", (0x1000,), 12),
    ("bfind.s32 D, %r10;", "r", (-1,), 0xFFFFFFFF),
    ("bfind.shiftamt.u32 D, %r10;", "r", (0x1000,), 19),
    ("brev.b32 D, %r10;", "r", (1,), 0x80000000),
    ("popc.b64 D, %rd10;", "r", (2**64 - 1,), 64),
    ("clz.b32 D, %r10;", "r", (0,), 32),
    ("fns.b32 D, %r10, 0, 2;", "r", (0b1010,), 3),
    ("prmt.b32 D, %r10, %r11, 0x7531;", "r", (0x33221100, 0x77665544), 0x77553311),
    ("prmt.b32 D, %r10, %r11, 0x0008;", "r", (0x80, 0), 0x808080FF),
    # Floating-Point Instructions: f32
    ("add.f32 D, %f10, %f11;", "f", (f32(1), f32(2**-24)), f32(1)),
    ("add.rp.f32 D, %f10, %f11;", "f", (f32(1), f32(2**-24)), f32(1) + 1),
    ("add.rz.f32 D, %f10, %f11;", "f", (f32(-1), f32(-(2**-24) * 1.5)), f32(-1)),
    ("mul.ftz.f32 D, %f10, %f11;", "f", (f32(1e-38), f32(0.1)), 0),
    ("mul.f32 D, %f10, %f11;", "f", (f32(2**-126), f32(0.5)), 0x400000),
    ("mul.sat.f32 D, %f10, %f11;", "f", (f32(3), f32(4)), f32(1)),
    (
        "fma.rn.f32 D, %f10, %f11, %f12;",
        "f",
        (f32(1 + 2**-12),) * 2 + (f32(-1),),
        f32(2**-11 + 2**-24),
    ),
    ("max.f32 D, %f10, %f11;", "f", (NAN32, f32(2)), f32(2)),
    ("max.NaN.f32 D, %f10, %f11;", "f", (NAN32, f32(2)), NAN32),
    ("min.f32 D, %f10, %f11;", "f", (f32(0.0), f32(-0.0)), f32(-0.0)),
    ("neg.f32 D, %f10;", "f", (f32(0.0),), f32(-0.0)),
    ("rcp.approx.ftz.f32 D, %f10;", "f", (f32(4),), f32(0.25)),
    ("rcp.approx.ftz.f32 D, %f10;", "f", (f32(-0.0),), f32(-math.inf)),
    ("sqrt.rn.f32 D, %f10;", "f", (f32(2),), f32(np.sqrt(np.float32(2)))),
    ("rsqrt.approx.f32 D, %f10;", "f", (f32(0.25),), f32(2)),
    ("ex2.approx.ftz.f32 D, %f10;", "f", (f32(-3),), f32(0.125)),
    ("ex2.approx.ftz.f32 D, %f10;", "f", (f32(-math.inf),), 0),
    ("lg2.approx.f32 D, %f10;", "f", (f32(8),), f32(3)),
    ("div.rn.f32 D, %f10, %f11;", "f", (f32(1), f32(3)), f32(np.float32(1) / np.float32(3))),
    ("sub.f32 D, %f10, %f11;", "f", (f32(math.inf), f32(math.inf)), NAN32),
    ("copysign.f32 D, %f10, %f11;", "f", (f32(-1), f32(5)), f32(-5)),
    ("testp.infinite.f32 D, %f10;", "p", (f32(-math.inf),), 1),
    # f64
    ("fma.rn.f64 D, %fd10, %fd11, %fd12;", "fd", (f64(3), f64(4), f64(5)), f64(17)),
    ("div.rn.f64 D, %fd10, %fd11;", "fd", (f64(1), f64(3)), f64(1 / 3)),
    # Half Precision Floating-Point Instructions
    ("add.f16 D, %h10, %h11;", "h", (f16(1), f16(2**-11)), f16(1)),
    ("fma.rn.f16 D, %h10, %h11, %h12;", "h", (f16(3), f16(5), f16(1)), f16(16)),
    ("fma.rn.bf16 D, %h10, %h11, %h12;", "h", (bf16(3), bf16(5), bf16(1)), bf16(16)),
    (
        "add.f16x2 D, %r10, %r11;",
        "r",
        (f16(1) << 16 | f16(2), f16(3) << 16 | f16(4)),
        f16(4) << 16 | f16(6),
    ),
    (
        "max.bf16x2 D, %r10, %r11;",
        "r",
        (bf16(1) << 16 | bf16(2), bf16(3) << 16 | bf16(-4)),
        bf16(3) << 16 | bf16(2),
    ),
    ("neg.f16x2 D, %r10;", "r", (f16(1) << 16 | f16(-2),), f16(-1) << 16 | f16(2)),
    # Comparison and Selection Instructions
    ("setp.lt.s32 D, %r10, %r11;", "p", (-1, 1), 1),
    ("setp.lo.u32 D, %r10, %r11;", "p", (-1, 1), 0),
    ("setp.ltu.f32 D, %f10, %f11;", "p", (NAN32, f32(1)), 1),
    ("setp.lt.f32 D, %f10, %f11;", "p", (NAN32, f32(1)), 0),
    ("setp.ne.f32 D, %f10, %f11;", "p", (NAN32, NAN32), 0),
    ("setp.nan.f32 D, %f10, %f11;", "p", (f32(1), NAN32), 1),
    ("setp.gt.and.s32 D, %r10, %r11, %p3;", "p", (2, 1, 0), 0),
    ("setp.gt.or.s32 D, %r10, %r11, !%p3;", "p", (0, 1, 0), 1),
    ("setp.eq.s32 %p8|D, %r10, %r11;", "p", (1, 2), 1),
    ("setp.gt.f16 D, %h10, %h11;", "p", (f16(2), f16(1)), 1),
    ("set.gt.u32.s32 D, %r10, %r11;", "r", (2, 1), 0xFFFFFFFF),
    ("selp.b32 D, %r10, %r11, %p3;", "r", (7, 8, 1), 7),
    ("slct.s32.s32 D, %r10, %r11, %r12;", "r", (7, 8, -1), 8),
    # Data Movement and Conversion Instructions: cvt
    ("cvt.rni.s32.f32 D, %f10;", "r", (f32(2.5),), 2),
    ("cvt.rzi.s32.f32 D, %f10;", "r", (f32(-2.9),), 2**32 - 2),
    ("cvt.rmi.s32.f32 D, %f10;", "r", (f32(-2.1),), 2**32 - 3),
    ("cvt.rpi.u32.f32 D, %f10;", "r", (f32(2.1),), 3),
    ("cvt.rzi.s32.f32 D, %f10;", "r", (f32(1e20),), 0x7FFFFFFF),
    ("cvt.rzi.u32.f32 D, %f10;", "r", (f32(-5),), 0),
    ("cvt.rzi.s32.f32 D, %f10;", "r", (NAN32,), 0),
    ("cvt.rn.f32.s32 D, %r10;", "f", (16777217,), f32(16777216)),
    ("cvt.rp.f32.s32 D, %r10;", "f", (16777217,), f32(16777218)),
    ("cvt.rn.f32.u64 D, %rd10;", "f", (2**64 - 1,), f32(2.0**64)),
    ("cvt.rn.f16.f32 D, %f10;", "h", (f32(1 + 2**-11),), f16(1)),
    ("cvt.rz.f16.f32 D, %f10;", "h", (f32(1 + 3 * 2**-12),), f16(1)),
    ("cvt.rn.bf16.f32 D, %f10;", "h", (f32(1 + 2**-8),), bf16(1)),
    ("cvt.rn.bf16.f32 D, %f10;", "h", (f32(1 + 3 * 2**-8),), bf16(1 + 2**-6)),
    ("cvt.rn.bf16x2.f32 D, %f10, %f11;", "r", (f32(1), f32(2)), bf16(1) << 16 | bf16(2)),
    ("cvt.rn.f16x2.f32 D, %f10, %f11;", "r", (f32(1), f32(70000)), f16(1) << 16 | f16(math.inf)),
    ("cvt.rn.relu.bf16x2.f32 D, %f10, %f11;", "r", (f32(-1), f32(2)), bf16(2)),
    ("cvt.rna.tf32.f32 D, %f10;", "r", (f32(1 + 2**-11),), f32(1 + 2**-10)),
    ("cvt.f32.f16 D, %h10;", "f", (f16(0.5),), f32(0.5)),
    ("cvt.f32.bf16 D, %h10;", "f", (bf16(0.5),), f32(0.5)),
    ("cvt.rn.f32.f64 D, %fd10;", "f", (f64(1 / 3),), f32(1 / 3)),
    ("cvt.f64.f32 D, %f10;", "fd", (f32(1.5),), f64(1.5)),
    ("cvt.rni.f32.f32 D, %f10;", "f", (f32(3.5),), f32(4)),
    ("cvt.sat.f32.f32 D, %f10;", "f", (f32(7),), f32(1)),
    ("cvt.s64.s32 D, %r10;", "rd", (-1,), 2**64 - 1),
    ("cvt.u32.u16 D, %h10;", "r", (0xFFFF,), 0xFFFF),
    ("cvt.s32.s8 D, %r10;", "r", (0x80,), 0xFFFFFF80),
    ("cvt.sat.s8.s32 D, %r10;", "r", (1000,), 127),
    # Constants: decimal ones take the type of the instruction
    ("add.f32 D, %f10, -1.5;", "f", (f32(1),), f32(-0.5)),
    ("add.f64 D, %fd10, 0.25;", "fd", (f64(1),), f64(1.25)),
    # mov: packing; cvta and isspacep
    ("mov.b64 D, {%r10, %r11};", "rd", (1, 2), 2 << 32 | 1),
    ("mov.b64 {%r21, D}, %rd10;", "r", (5 << 32 | 4,), 5),
    ("mov.b32 {%h1, D}, %r10;", "h", (5 << 16 | 4,), 5),
    ("isspacep.global D, %rd1;", "p", (0,), 1),
    ("isspacep.shared D, %rd1;", "p", (0,), 0),
]


@pytest.mark.parametrize(("instruction", "kind", "operands", "expected"), CASES)
def test_scalar(instruction, kind, operands, expected):
    (result,) = run_lanes(instruction, kind, [operands])
    bits = {"r": 32, "h": 16, "f": 32, "p": 1}.get(kind, 64)
    assert result & (2**bits - 1) == expected, f"{result:#x} instead of {expected:#x}"


def test_conversions_round_as_numpy_does():
    """cvt.rn.f16.f32 and cvt.rn.f32.f64 on random bits, NaN aside."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(32).astype(np.float32) * np.float32(2.0) ** rng.integers(
        -26, 17, 32
    )
    got = run_lanes("cvt.rn.f16.f32 D, %f10;", "h", [(f32(v),) for v in values])
    with np.errstate(over="ignore"):
        assert got == [f16(v) for v in values]
    doubles = rng.standard_normal(32) * 2.0 ** rng.integers(-150, 120, 32)
    got = run_lanes("cvt.rn.f32.f64 D, %fd10;", "f", [(f64(v),) for v in doubles])
    assert got == [f32(v) for v in doubles]


# --- shfl.sync, vote.sync, match.sync, redux.sync, activemask, elect.sync ---

WARP = """
  ld.param.u64 %rd1, [pd];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd2, %r1, 4;
  add.u64 %rd1, %rd1, %rd2;
  INSTRUCTION
  st.global.u32 [%rd1], %r20;
"""


def run_warp(instruction, lanes=32):
    result = np.full(32, 0xEEEEEEEE, np.uint32)
    module(WARP.replace("INSTRUCTION", instruction), "u64 pd").launch(block=lanes, args=[result])
    return result[:lanes].tolist()


LANE = np.arange(32)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("shfl.sync.idx.b32 %r20, %r1, 5, 31, -1;", np.full(32, 5)),
        ("shfl.sync.bfly.b32 %r20, %r1, 3, 31, -1;", LANE ^ 3),
        ("shfl.sync.up.b32 %r20, %r1, 4, 0, -1;", np.where(LANE >= 4, LANE - 4, LANE)),
        ("shfl.sync.down.b32 %r20, %r1, 4, 31, -1;", np.where(LANE < 28, LANE + 4, LANE)),
        # width 8: the segment mask is in bits 8 to 12 of c
        ("shfl.sync.down.b32 %r20, %r1, 2, 0x181f, -1;", np.where(LANE % 8 < 6, LANE + 2, LANE)),
        ("shfl.sync.idx.b32 %r20, %r1, 9, 0x181f, -1;", LANE // 8 * 8 + 1),
        ("shfl.sync.up.b32 %r2|%p1, %r1, 4, 0, -1; selp.u32 %r20, 1, 0, %p1;", LANE >= 4),
        ("setp.gt.u32 %p1, %r1, 29; vote.sync.ballot.b32 %r20, %p1, -1;", np.full(32, 0xC0000000)),
        (
            "setp.gt.u32 %p1, %r1, 29; vote.sync.any.pred %p2, %p1, -1; selp.u32 %r20, 1, 0, %p2;",
            np.ones(32),
        ),
        (
            "setp.gt.u32 %p1, %r1, 29; vote.sync.all.pred %p2, !%p1, -1; selp.u32 %r20, 1, 0, %p2;",
            np.zeros(32),
        ),
        (
            "and.b32 %r2, %r1, 1; match.any.sync.b32 %r20, %r2, -1;",
            np.where(LANE % 2, 0xAAAAAAAA, 0x55555555),
        ),
        ("redux.sync.add.s32 %r20, %r1, -1;", np.full(32, 496)),
        ("sub.s32 %r2, %r1, 40; redux.sync.max.s32 %r20, %r2, -1;", np.full(32, 2**32 - 9)),
        ("redux.sync.xor.b32 %r20, %r1, -1;", np.zeros(32)),
        ("activemask.b32 %r20;", np.full(32, 0xFFFFFFFF)),
        ("elect.sync %r2|%p1, -1; selp.u32 %r20, 1, 0, %p1;", LANE == 0),
    ],
)
def test_warp_instruction(instruction, expected):
    assert run_warp(instruction) == np.asarray(expected).astype(np.uint32).tolist()


def test_a_shuffle_waits_for_its_diverged_members():
    """shfl.sync: all threads of membermask execute it before any goes on."""
    diverged = """
      mov.u32 %r2, %r1;
      setp.lt.u32 %p1, %r1, 16;
      @%p1 bra DONE;
      add.u32 %r2, %r2, 100;
      add.u32 %r2, %r2, 100;
    DONE:
      shfl.sync.bfly.b32 %r20, %r2, 16, 31, -1;
    """
    lane = LANE ^ 16
    assert run_warp(diverged) == np.where(lane < 16, lane, lane + 200).tolist()


def test_partial_warps_and_exited_lanes():
    assert run_warp("activemask.b32 %r20;", lanes=5) == [31] * 5
    exits = "setp.gt.u32 %p1, %r1, 7; @%p1 exit; activemask.b32 %r20;"
    assert run_warp(exits) == [255] * 8 + [0xEEEEEEEE] * 24


# --- ld, st, atom, red, calls ---


def test_vector_and_narrow_accesses():
    """ld: a signed narrow value is extended to the register's width; vectors are consecutive."""
    source = np.arange(-8, 8, dtype=np.int8)
    result = np.zeros(4, np.int32)
    body = """
      ld.param.u64 %rd1, [ps]; ld.param.u64 %rd2, [pd];
      ld.global.s8 %r1, [%rd1];
      ld.global.u8 %r2, [%rd1+1];
      ld.global.v4.u8 {%r3, %r4, %r5, %r6}, [%rd1+8];
      ld.global.nc.v2.s16 {%h1, %h2}, [%rd1+4];
      cvt.s32.s16 %r7, %h2;
      st.global.v4.b32 [%rd2], {%r1, %r2, %r6, %r7};
    """
    module(body, "u64 ps, u64 pd").launch(block=1, args=[source, result])
    assert result.tolist() == [-8, 0xF9, 3, int(source[6:8].view(np.int16)[0])]


@pytest.mark.parametrize(
    ("operation", "start", "value", "expected"),
    [
        ("add.u32", 5, 1, 5 + 64),
        ("max.s32", -5, 3, 3),
        ("min.u32", 7, 9, 7),
        ("and.b32", 0xFF, 0x0F, 0x0F),
        ("or.b32", 1, 6, 7),
        ("inc.u32", 0, 9, 4),
        ("exch.b32", 1, 77, 77),
    ],
)
@pytest.mark.parametrize("where", ["global", "shared"])
def test_atomics(operation, start, value, expected, where):
    """atom, red: 64 threads, each once; inc wraps to 0 past its bound."""
    memory = np.array([start], np.int64).astype(np.int32)
    instruction = f"atom.global.{operation} %r4, [%rd1], %r3;"
    store = ""
    if where == "shared":
        instruction = f"red.shared.{operation} [cell], %r3;"
        store = "@%p1 st.global.u32 [%rd1], %r2;"
    body = f"""
      .shared .align 4 .b8 cell[4];
      ld.param.u64 %rd1, [pm];
      mov.u32 %r1, %tid.x; setp.eq.u32 %p1, %r1, 0;
      ld.global.u32 %r2, [%rd1];
      @%p1 st.shared.u32 [cell], %r2;
      bar.sync 0;
      mov.u32 %r3, {value};
      {instruction}
      bar.sync 0;
      ld.shared.u32 %r2, [cell];
      {store}
    """
    module(body, "u64 pm").launch(block=64, args=[memory])
    assert memory[0] == expected


def test_compare_and_swap_builds_a_lock():
    """atom.cas, atom.exch and fences: 4 CTAs x 2 warps each take a lock and count."""
    state = np.zeros(2, np.uint32)
    body = """
      ld.param.u64 %rd1, [pm];
      mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 31; setp.ne.u32 %p1, %r2, 0;
      @%p1 bra DONE;
    SPIN:
      atom.acquire.gpu.global.cas.b32 %r3, [%rd1], 0, 1;
      setp.ne.u32 %p2, %r3, 0;
      @%p2 bra SPIN;
      ld.global.u32 %r4, [%rd1+4];
      add.u32 %r4, %r4, 1;
      st.global.u32 [%rd1+4], %r4;
      atom.release.gpu.global.exch.b32 %r3, [%rd1], 0;
    DONE:
    """
    built = module(body, "u64 pm")
    for seed in range(4):
        state[:] = 0
        built.launch(grid=4, block=64, args=[state], seed=seed)
        assert state.tolist() == [0, 8]


CALLS = """
.func (.param .b32 result) twice(.param .b32 x)
{
  .reg .b32 %r<4>;
  .local .align 4 .b8 slot[4];
  .reg .b64 %rd<4>;
  mov.u64 %rd1, slot;
  cvta.local.u64 %rd2, %rd1;
  ld.param.u32 %r1, [x];
  st.u32 [%rd2], %r1;
  ld.local.u32 %r2, [%rd1];
  add.u32 %r3, %r1, %r2;
  st.param.b32 [result], %r3;
  ret;
}
.func (.param .b32 result) factorial(.param .b32 n)
{
  .reg .b32 %r<6>;
  .reg .pred %p<2>;
  ld.param.u32 %r1, [n];
  setp.gt.u32 %p1, %r1, 1;
  @%p1 bra MORE;
  st.param.b32 [result], 1;
  ret;
MORE:
  sub.u32 %r2, %r1, 1;
  {
    .param .b32 param0; .param .b32 retval0;
    st.param.b32 [param0], %r2;
    call.uni (retval0), factorial, (param0);
    ld.param.b32 %r3, [retval0];
  }
  mul.lo.u32 %r4, %r1, %r3;
  st.param.b32 [result], %r4;
  ret;
}
"""


def test_calls_recursion_and_function_pointers():
    """call: direct, recursive with a depth that differs by lane, and indirect."""
    body = """
      ld.param.u64 %rd1, [pd];
      mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 7;
      { .param .b32 param0; .param .b32 retval0;
        st.param.b32 [param0], %r2;
        call (retval0), factorial, (param0);
        ld.param.b32 %r3, [retval0]; }
      mov.u64 %rd5, twice; mov.u64 %rd6, factorial;
      setp.lt.u32 %p1, %r1, 16;
      selp.b64 %rd7, %rd5, %rd6, %p1;
      { .param .b32 param0; .param .b32 retval0;
        st.param.b32 [param0], %r2;
        proto: .callprototype (.param .b32 _) _ (.param .b32 _);
        call (retval0), %rd7, (param0), proto;
        ld.param.b32 %r4, [retval0]; }
      mad.lo.u32 %r3, %r3, 10000, %r4;
      mul.wide.u32 %rd2, %r1, 4; add.u64 %rd1, %rd1, %rd2;
      st.global.u32 [%rd1], %r3;
    """
    result = np.zeros(32, np.uint32)
    for seed in range(3):
        module(body, "u64 pd", before=CALLS).launch(args=[result], seed=seed)
        f = [math.factorial(i % 8) for i in range(32)]
        second = [2 * (i % 8) if i < 16 else f[i] for i in range(32)]
        assert result.tolist() == [a * 10000 + b for a, b in zip(f, second)]


EXTERNAL = """
.extern .func (.param .b32 r) vprintf (.param .b64 format, .param .b64 values);
.extern .func __assertfail
  (.param .b64 a, .param .b64 b, .param .b32 c, .param .b64 d, .param .b64 e);
.global .align 1 .b8 text[3] = {104, 105, 0};
"""


def test_printf_is_left_out_with_a_notice():
    body = """
      mov.u64 %rd1, text;
      { .param .b64 param0; .param .b64 param1; .param .b32 retval0;
        st.param.b64 [param0], %rd1; st.param.b64 [param1], 0;
        call.uni (retval0), vprintf, (param0, param1);
        ld.param.b32 %r1, [retval0]; }
    """
    stats = module(body, before=EXTERNAL).launch()
    assert stats["notices"] == ["printf was called and ignored"]


def test_a_failed_assertion_is_a_finding():
    body = """
      { .param .b64 a; .param .b64 b; .param .b32 c; .param .b64 d; .param .b64 e;
        call.uni __assertfail, (a, b, c, d, e); }
    """
    message = finding("trap", lambda: module(body, before=EXTERNAL).launch())
    assert "assertion failed" in message


def test_indexed_branch_and_globals():
    """brx.idx with .branchtargets; .global with initial values; .const."""
    before = ".global .align 4 .u32 table[4] = {10, 20, 30, 40};\n.const .align 4 .b32 scale = 3;\n"
    body = """
      ld.param.u64 %rd1, [pd];
      mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 3;
      mul.wide.u32 %rd3, %r2, 4; mov.u64 %rd4, table; add.u64 %rd4, %rd4, %rd3;
      ld.global.u32 %r3, [%rd4];
      ld.const.u32 %r4, [scale];
      targets: .branchtargets A, B, A, C;
      brx.idx %r2, targets;
    A: mul.lo.u32 %r3, %r3, %r4; bra DONE;
    B: add.u32 %r3, %r3, 1; bra DONE;
    C: mov.u32 %r3, 0;
    DONE:
      mul.wide.u32 %rd2, %r1, 4; add.u64 %rd1, %rd1, %rd2;
      st.global.u32 [%rd1], %r3;
    """
    result = np.zeros(8, np.uint32)
    built = module(body, "u64 pd", before=before)
    built.launch(block=8, args=[result])
    assert result.tolist() == [30, 21, 90, 0] * 2
    assert built.variable("table")[1] == 16


def test_unsupported_instructions_are_named():
    """Nothing is ignored by accident: an unknown modifier makes an instruction unsupported."""
    text = kernel("  add.f32.sideways %f1, %f2, %f3;\n  txq.width.b32 %r1, [%rd1];")
    built = ptxemu().Module(text)
    assert [u["line"] for u in built.unsupported] == [
        number
        for number, line in enumerate(text.split("\n"), 1)
        if "sideways" in line or "txq" in line
    ]
    message = finding("unsupported", lambda: built.launch())
    assert ".sideways of add" in message and "PTX line" in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("add.u32 %r1, %r2;", "too few operands for add"),
        ("setp.lt.and.s32 %p1, %r1, %r2;", "this form of setp is not supported"),
        ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 %fd1, %fd2, %fd3, %fd4;", "mma"),
        ("cvt.rn.satfinite.e4m3x2.f32 %h1, %f1, %f2;", ".satfinite of cvt"),
        ("add.cc.u32 %r1, %r2, %r3;", ".cc of add"),
        ("wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {%r1}, %rd1, %rd2, 1;", "wgmma"),
    ],
)
def test_what_is_not_supported_has_a_reason(text, reason):
    (refused,) = module("  " + text, target="sm_90a").unsupported
    assert reason in refused["reason"], refused


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("  bra NOWHERE;", "NOWHERE"),
        ("  add.u32 %r1, %r2, %q7;", "%q7"),
        ("  add.u32 %r1, %r2", "';'"),
    ],
)
def test_parse_errors_say_where(text, words):
    assert words in finding("parse", lambda: module(text))
