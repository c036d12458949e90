# SPDX-License-Identifier: Apache-2.0
"""mma.sync, ldmatrix, stmatrix, movmatrix: fragment layouts against the PTX ISA's tables."""

import numpy as np
import pytest
import torch
from ptxemu_tools import finding, module

LANES = np.arange(32)
GROUP, THREAD = LANES // 4, LANES % 4  # groupID and threadID_in_group of the ISA


def bits16(values, dtype):
    return (
        torch.tensor(values, dtype=torch.float64)
        .to(dtype)
        .view(torch.int16)
        .numpy()
        .view(np.uint16)
    )


def pack(low, high):
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


def fragments_a(a, per_register):
    """a[16, k] as registers: rows g and g+8 alternate, then the columns advance."""
    k = a.shape[1]
    registers = []
    for first in range(0, k, 4 * per_register):
        for rows in (GROUP, GROUP + 8):
            column = first + THREAD * per_register
            if per_register == 1:
                registers.append(a[rows, column].astype(np.uint32))
            else:
                registers.append(pack(a[rows, column], a[rows, column + 1]))
    return registers


def fragments_b(b, per_register):
    """b[k, 8] as registers."""
    registers = []
    for first in range(0, b.shape[0], 4 * per_register):
        row = first + THREAD * per_register
        if per_register == 1:
            registers.append(b[row, GROUP].astype(np.uint32))
        else:
            registers.append(pack(b[row, GROUP], b[row + 1, GROUP]))
    return registers


SHAPES = [
    ("m16n8k16", "f16", torch.float16, 16),
    ("m16n8k16", "bf16", torch.bfloat16, 16),
    ("m16n8k8", "f16", torch.float16, 8),
    ("m16n8k8", "bf16", torch.bfloat16, 8),
    ("m16n8k8", "tf32", torch.float32, 8),
    ("m16n8k4", "tf32", torch.float32, 4),
]


def mma(instruction, a, b, c):
    """d registers of one mma on register lists."""
    inputs = np.stack([*a, *b, *c], axis=1).astype(np.uint32)  # [32, registers]
    count = inputs.shape[1]
    outputs = np.zeros((32, len(c)), np.uint32)
    loads = "".join(f"ld.global.u32 %r{10 + i}, [%rd1+{4 * i}];\n" for i in range(count))
    names = [f"%r{10 + i}" for i in range(count)]
    operands = [names[: len(a)], names[len(a) : len(a) + len(b)], names[len(a) + len(b) :]]
    results = [f"%r{40 + i}" for i in range(len(c))]
    listed = ", ".join("{" + ", ".join(o) + "}" for o in (results, *operands))
    stores = "".join(f"st.global.u32 [%rd2+{4 * i}], {r};\n" for i, r in enumerate(results))
    body = f"""
      ld.param.u64 %rd1, [pa]; ld.param.u64 %rd2, [pd]; mov.u32 %r1, %tid.x;
      mad.wide.u32 %rd1, %r1, {4 * count}, %rd1;
      mad.wide.u32 %rd2, %r1, {4 * len(c)}, %rd2;
      {loads} {instruction} {listed}; {stores}
    """
    module(body, "u64 pa, u64 pd").launch(args=[inputs, outputs])
    return outputs


@pytest.mark.parametrize(("shape", "type_", "dtype", "k"), SHAPES)
def test_mma_with_f32_accumulators(shape, type_, dtype, k):
    """Warp-level matrix fragments of mma.m16n8k{4,8,16}: exact on small integers."""
    rng = np.random.default_rng(k)
    a, b = rng.integers(-8, 9, (16, k)), rng.integers(-8, 9, (k, 8))
    c = rng.integers(-99, 100, (16, 8)).astype(np.float32)
    per_register = 1 if type_ == "tf32" else 2
    if type_ == "tf32":
        bits_a, bits_b = a.astype(np.float32).view(np.uint32), b.astype(np.float32).view(np.uint32)
        bits_a = bits_a | 0x1FFF  # the low 13 bits do not count
    else:
        bits_a, bits_b = bits16(a, dtype), bits16(b, dtype)
    c_registers = [c[GROUP + 8 * (i // 2), 2 * THREAD + i % 2].view(np.uint32) for i in range(4)]
    d = mma(
        f"mma.sync.aligned.{shape}.row.col.f32.{type_}.{type_}.f32",
        fragments_a(bits_a, per_register),
        fragments_b(bits_b, per_register),
        c_registers,
    ).view(np.float32)
    expected = a @ b + c
    for i in range(4):
        np.testing.assert_array_equal(d[:, i], expected[GROUP + 8 * (i // 2), 2 * THREAD + i % 2])


def test_mma_with_f16_accumulators():
    rng = np.random.default_rng(3)
    a, b, c = (
        rng.integers(-4, 5, (16, 16)),
        rng.integers(-4, 5, (16, 8)),
        rng.integers(-9, 9, (16, 8)),
    )
    c_bits = bits16(c, torch.float16)
    c_registers = [
        pack(c_bits[GROUP + 8 * i, 2 * THREAD], c_bits[GROUP + 8 * i, 2 * THREAD + 1])
        for i in (0, 1)
    ]
    d = mma(
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16",
        fragments_a(bits16(a, torch.float16), 2),
        fragments_b(bits16(b, torch.float16), 2),
        c_registers,
    )
    halves = d.view(np.float16).reshape(32, 2, 2)
    for i in (0, 1):
        for e in (0, 1):
            expected = (a @ b + c)[GROUP + 8 * i, 2 * THREAD + e]
            np.testing.assert_array_equal(halves[:, i, e].astype(np.float64), expected)


def test_mma_rounds_the_exact_sum_once():
    """The rounding model of README.md: 1 + 2^-24 + 2^-24 is 1 + 2^-23, whatever the order."""
    a = np.zeros((16, 16))
    a[:, 0], a[:, 1] = 2.0**-24, 2.0**-24
    b = np.ones((16, 8))
    one = np.full(32, np.float32(1)).view(np.uint32)
    d = mma(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        fragments_a(bits16(a, torch.bfloat16), 2),
        fragments_b(bits16(b, torch.bfloat16), 2),
        [one] * 4,
    ).view(np.float32)
    assert (d == np.float32(1 + 2.0**-23)).all()


LDMATRIX = """
  .shared .align 16 .b8 tile[512];
  ld.param.u64 %rd1, [ps]; ld.param.u64 %rd2, [pd]; mov.u32 %r1, %tid.x;
  mov.u32 %r2, tile;
  mad.lo.u32 %r3, %r1, 16, %r2;
  mad.wide.u32 %rd1, %r1, 16, %rd1;
  ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%rd1];
  st.shared.v4.u32 [%r3], {%r4, %r5, %r6, %r7};
  bar.warp.sync -1;
  INSTRUCTION
  mad.wide.u32 %rd2, %r1, 16, %rd2;
  st.global.v4.u32 [%rd2], {%r10, %r11, %r12, %r13};
"""


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, trans):
    """ldmatrix: lane l gets elements 2(l%4), 2(l%4)+1 of row l/4; .trans: of column l/4."""
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    result = np.zeros((32, 4), np.uint32)
    targets = ", ".join(f"%r{10 + i}" for i in range(count))
    zero = "".join(f"mov.u32 %r{10 + i}, 0; " for i in range(4))
    load = f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{targets}}}, [%r3];"
    module(LDMATRIX.replace("INSTRUCTION", zero + load), "u64 ps, u64 pd").launch(
        args=[matrices, result]
    )
    for m in range(count):
        matrix = matrices[m].T if trans else matrices[m]
        expected = pack(matrix[GROUP, 2 * THREAD], matrix[GROUP, 2 * THREAD + 1])
        np.testing.assert_array_equal(result[:, m], expected)
    assert not result[:, count:].any()


def test_stmatrix_undoes_ldmatrix():
    """stmatrix (sm_90): the transposed tile, stored where the rows of the address lanes say."""
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    result = np.zeros((4, 8, 8), np.uint16)
    body = LDMATRIX.replace(
        "INSTRUCTION",
        """ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r3];
           bar.warp.sync -1;
           stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%r3], {%r20, %r21, %r22, %r23};
           bar.warp.sync -1;
           ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r3];""",
    )
    module(body, "u64 ps, u64 pd", target="sm_90").launch(args=[matrices, result])
    np.testing.assert_array_equal(result, matrices.transpose(0, 2, 1))


def test_movmatrix():
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    source = np.repeat(
        pack(matrix[GROUP, 2 * THREAD], matrix[GROUP, 2 * THREAD + 1])[:, None], 4, 1
    )
    source, result = np.ascontiguousarray(source), np.zeros((32, 4), np.uint32)
    body = LDMATRIX.replace(
        "INSTRUCTION",
        "movmatrix.sync.aligned.m8n8.trans.b16 %r10, %r4;"
        "mov.u32 %r11, 0; mov.u32 %r12, 0; mov.u32 %r13, 0;",
    )
    module(body, "u64 ps, u64 pd").launch(args=[source, result])
    expected = pack(matrix.T[GROUP, 2 * THREAD], matrix.T[GROUP, 2 * THREAD + 1])
    np.testing.assert_array_equal(result[:, 0], expected)


def test_ldmatrix_needs_aligned_rows_inside_shared_memory():
    def run(address):
        body = LDMATRIX.replace(
            "INSTRUCTION",
            f"add.u32 %r3, %r3, {address};"
            "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r3];"
            "mov.u32 %r11, 0; mov.u32 %r12, 0; mov.u32 %r13, 0;",
        )
        module(body, "u64 ps, u64 pd").launch(
            args=[np.zeros(256, np.uint16), np.zeros((32, 4), np.uint32)]
        )

    finding("misaligned", lambda: run(8))
    finding("bounds", lambda: run(512))
