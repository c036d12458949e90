# SPDX-License-Identifier: Apache-2.0
"""sm_90a in the simulator: mbarrier, bulk and tensor copies, clusters, wgmma.

Each correct kernel must pass under several schedules, and each seeded fault must be found. PTX ISA:
"mbarrier", "cp.async.bulk", "cp.async.bulk.tensor", "Swizzling modes", "barrier.cluster", "mapa",
"wgmma.mma_async", "Matrix descriptor format", "Async proxy".
"""

import numpy as np
import pytest
import torch
from ptxemu_tools import finding, module, ptxemu

SEEDS = range(4)
TARGET = "sm_90a"

BF16, F32 = 9, 7  # CUtensorMapDataType


def check(body, parameters, launch, faults=()):
    """`faults`: (kind, old, new); each changes one place."""
    good = module(body, parameters, target=TARGET)
    assert good.unsupported == []
    for seed in SEEDS:
        launch(good, seed)
    for kind, old, new in faults:
        assert body.count(old) == 1, old
        bad = module(body.replace(old, new), parameters, target=TARGET)
        for seed in SEEDS:
            finding(kind, lambda bad=bad, seed=seed: launch(bad, seed))


WAIT = """
W{0}:
  mbarrier.try_wait.parity.shared::cta.b64 %p{0}, [{1}], {2};
  @!%p{0} bra W{0};
"""

BULK = f"""
  .shared .align 128 .b8 tile[1024];
  .shared .align 8 .b8 bar[8];
  ld.param.u64 %rd1, [px]; ld.param.u64 %rd2, [py];
  mov.u32 %r1, %tid.x; mov.u32 %r2, tile; mov.u32 %r3, bar;
  setp.ne.u32 %p1, %r1, 0;
  @%p1 bra READY;
  mbarrier.init.shared::cta.b64 [bar], 1;
  fence.mbarrier_init.release.cluster;
READY:
  bar.sync 0;
  @%p1 bra LOADED;
  mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 1024;
  cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [tile], [%rd1], 1024, [bar];
LOADED:
  {WAIT.format(3, "bar", 0)}
  mad.lo.u32 %r4, %r1, 16, %r2;
  ld.shared.v4.u32 {{%r5, %r6, %r7, %r8}}, [%r4];
  add.u32 %r5, %r5, 1;
  st.shared.u32 [%r4], %r5;
  fence.proxy.async.shared::cta;
  bar.sync 1;
  @%p1 bra DONE;
  cp.async.bulk.global.shared::cta.bulk_group [%rd2], [tile], 1024;
  cp.async.bulk.commit_group;
  cp.async.bulk.wait_group.read 0;
  st.shared.u32 [tile], 0;
DONE:
"""


def launch_bulk(built, seed):
    x, y = np.arange(256, dtype=np.uint32), np.zeros(256, np.uint32)
    # what is read too early may be read before the copy is issued: races only
    built.launch(block=64, args=[x, y], seed=seed, check_initialised=False)
    expected = x.copy()
    expected[::4] += 1
    np.testing.assert_array_equal(y, expected)


def test_bulk_copies():
    """There through an mbarrier, back through a bulk group."""
    wait = WAIT.format(3, "bar", 0)
    check(
        BULK,
        "u64 px, u64 py",
        launch_bulk,
        [
            ("race", wait, ""),
            ("race", "bar.sync 1;", ""),
            ("proxy", "fence.proxy.async.shared::cta;", ""),
            ("race", "cp.async.bulk.wait_group.read 0;", ""),
            ("deadlock", "[bar], 1024;\n  cp", "[bar], 1040;\n  cp"),
            (
                "deadlock",
                "mbarrier.init.shared::cta.b64 [bar], 1;",
                "mbarrier.init.shared::cta.b64 [bar], 2;",
            ),
            ("mbarrier", "mbarrier.init.shared::cta.b64 [bar], 1;", ""),
            ("misaligned", "[tile], [%rd1], 1024,", "[tile+8], [%rd1], 1008,"),
            ("bounds", "[%rd1], 1024, [bar]", "[%rd1+16], 1024, [bar]"),
        ],
    )


@pytest.mark.parametrize("fault", ["bar.sync 0;", "  @!%p3 bra W3;"])
def test_faults_that_need_a_schedule(fault):
    """Another thread sees the mbarrier before its init; try_wait gives up and nobody asks again."""
    assert BULK.count(fault) == 1
    bad = module(BULK.replace(fault, ""), "u64 px, u64 py", target=TARGET)
    kinds = set()
    for seed in range(8):
        try:
            launch_bulk(bad, seed)
        except ptxemu().Finding as found:
            kinds.add(found.kind)
    assert kinds and kinds <= {"race", "mbarrier"}


RING = f"""
  .shared .align 128 .b8 tile[256];
  .shared .align 8 .b8 full[16];
  .shared .align 8 .b8 free[16];
  ld.param.u64 %rd1, [px]; ld.param.u64 %rd2, [py];
  mov.u32 %r1, %tid.x; mov.u32 %r2, tile; mov.u32 %r3, full; mov.u32 %r4, free;
  mov.u32 %r10, 0; mov.u32 %r11, 0;
  setp.ne.u32 %p1, %r1, 0;
  @%p1 bra READY;
  mbarrier.init.shared::cta.b64 [full], 1; mbarrier.init.shared::cta.b64 [full+8], 1;
  mbarrier.init.shared::cta.b64 [free], 32; mbarrier.init.shared::cta.b64 [free+8], 32;
READY:
  bar.sync 0;
  setp.lt.u32 %p2, %r1, 32;
  @%p2 bra CONSUME;
  setp.ne.u32 %p3, %r1, 32;
  @%p3 bra DONE;
PRODUCE:                                     // r10: step, stage = step & 1, phase = step / 2 & 1
  and.b32 %r12, %r10, 1; shr.u32 %r13, %r10, 1; and.b32 %r13, %r13, 1; xor.b32 %r14, %r13, 1;
  mad.lo.u32 %r15, %r12, 8, %r4; mad.lo.u32 %r16, %r12, 8, %r3; mad.lo.u32 %r17, %r12, 128, %r2;
  {WAIT.format(4, "%r15", "%r14")}
  mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r16], 128;
  mad.wide.u32 %rd3, %r10, 128, %rd1;
  cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r17], [%rd3], 128, [%r16];
  add.u32 %r10, %r10, 1; setp.lt.u32 %p5, %r10, 6;
  @%p5 bra PRODUCE;
  bra DONE;
CONSUME:
  and.b32 %r12, %r10, 1; shr.u32 %r13, %r10, 1; and.b32 %r13, %r13, 1;
  mad.lo.u32 %r15, %r12, 8, %r4; mad.lo.u32 %r16, %r12, 8, %r3; mad.lo.u32 %r17, %r12, 128, %r2;
  {WAIT.format(6, "%r16", "%r13")}
  mad.lo.u32 %r18, %r1, 4, %r17;
  ld.shared.u32 %r19, [%r18];
  add.u32 %r11, %r11, %r19;
  mbarrier.arrive.shared::cta.b64 _, [%r15];
  add.u32 %r10, %r10, 1; setp.lt.u32 %p5, %r10, 6;
  @%p5 bra CONSUME;
  mad.wide.u32 %rd4, %r1, 4, %rd2;
  st.global.u32 [%rd4], %r11;
DONE:
"""


def test_producer_and_consumer():
    """A warp-specialised ring of two stages, six rounds: parities wrap."""

    def launch(built, seed):
        x, y = np.arange(192, dtype=np.uint32), np.zeros(32, np.uint32)
        built.launch(block=64, args=[x, y], seed=seed)
        np.testing.assert_array_equal(y, x.reshape(6, 32).sum(0))

    check(
        RING,
        "u64 px, u64 py",
        launch,
        [
            ("race|mbarrier", WAIT.format(4, "%r15", "%r14"), ""),
            ("race|mbarrier|uninitialised", WAIT.format(6, "%r16", "%r13"), ""),
            ("deadlock", "mbarrier.arrive.shared::cta.b64 _, [%r15];", ""),
            ("deadlock", "xor.b32 %r14, %r13, 1;", "mov.u32 %r14, %r13;"),
        ],
    )


def test_state_tokens_and_test_wait():
    """mbarrier.arrive returns a state; test_wait does not block."""
    body = """
      .shared .align 8 .b8 bar[8];
      .shared .align 4 .b8 word[4];
      ld.param.u64 %rd1, [px]; mov.u32 %r1, %tid.x; setp.ne.u32 %p1, %r1, 0;
      @%p1 bra READY;
      mbarrier.init.shared.b64 [bar], 64;
    READY:
      bar.sync 0;
      @!%p1 st.shared.u32 [word], 5;
      mbarrier.arrive.shared.b64 %rd2, [bar];
    SPIN:
      mbarrier.test_wait.shared.b64 %p2, [bar], %rd2;
      @!%p2 bra SPIN;
      ld.shared.u32 %r2, [word];
      mad.wide.u32 %rd3, %r1, 4, %rd1;
      st.global.u32 [%rd3], %r2;
    """

    def launch(built, seed):
        x = np.zeros(64, np.uint32)
        built.launch(block=64, args=[x], seed=seed)
        assert (x == 5).all()

    check(body, "u64 px", launch, [("deadlock", "[bar], 64;", "[bar], 65;")])


def test_cp_async_arrives_on_an_mbarrier():
    """cp.async.mbarrier.arrive.noinc: the copies of all threads are there when the phase ends."""
    body = f"""
      .shared .align 16 .b8 s[512];
      .shared .align 8 .b8 bar[8];
      ld.param.u64 %rd1, [px]; ld.param.u64 %rd2, [py];
      mov.u32 %r1, %tid.x; mov.u32 %r2, s; setp.ne.u32 %p1, %r1, 0;
      @!%p1 mbarrier.init.shared.b64 [bar], 32;
      bar.sync 0;
      mad.lo.u32 %r3, %r1, 16, %r2; mad.wide.u32 %rd3, %r1, 16, %rd1;
      cp.async.cg.shared.global [%r3], [%rd3], 16;
      cp.async.mbarrier.arrive.noinc.shared.b64 [bar];
      {WAIT.format(3, "bar", 0)}
      xor.b32 %r4, %r1, 1; mad.lo.u32 %r4, %r4, 16, %r2;
      ld.shared.u32 %r5, [%r4];
      mad.wide.u32 %rd4, %r1, 4, %rd2;
      st.global.u32 [%rd4], %r5;
    """

    def launch(built, seed):
        x, y = np.arange(128, dtype=np.uint32), np.zeros(32, np.uint32)
        built.launch(args=[x, y], seed=seed)
        assert y.tolist() == [4 * (i ^ 1) for i in range(32)]

    check(body, "u64 px, u64 py", launch, [("race", WAIT.format(3, "bar", 0), "")])


# --- clusters ---

DSMEM = """
  .shared .align 4 .b8 s[128];
  ld.param.u64 %rd1, [px];
  mov.u32 %r1, %tid.x; mov.u32 %r2, s; mad.lo.u32 %r3, %r1, 4, %r2;
  mov.u32 %r4, %cluster_ctarank; mov.u32 %r5, %cluster_nctarank;
  mad.lo.u32 %r6, %r4, 100, %r1;
  st.shared.u32 [%r3], %r6;
  barrier.cluster.arrive.aligned;
  barrier.cluster.wait.aligned; // first
  add.u32 %r7, %r4, 1; rem.u32 %r7, %r7, %r5;
  mapa.shared::cluster.u32 %r8, %r3, %r7;
  ld.shared::cluster.u32 %r9, [%r8];
  barrier.cluster.arrive.relaxed.aligned;
  barrier.cluster.wait.aligned; // last
  mov.u32 %r10, %ctaid.x; mad.lo.u32 %r10, %r10, 32, %r1;
  mad.wide.u32 %rd2, %r10, 4, %rd1;
  st.global.u32 [%rd2], %r9;
"""


def test_distributed_shared_memory():
    """mapa, ld.shared::cluster, barrier.cluster with release and acquire."""

    def launch(built, seed):
        x = np.zeros(128, np.uint32)
        built.launch(grid=4, cluster=2, args=[x], seed=seed, check_initialised=False)
        lane = np.arange(32)
        assert x.tolist() == np.concatenate([lane + 100, lane] * 2).tolist()

    first = "barrier.cluster.arrive.aligned;\n  barrier.cluster.wait.aligned; // first"
    check(
        DSMEM,
        "u64 px",
        launch,
        [
            ("race", first, ""),
            ("race", "barrier.cluster.arrive.aligned;", "barrier.cluster.arrive.relaxed.aligned;"),
            ("barrier", "barrier.cluster.arrive.aligned;", ""),
            ("bounds", "rem.u32 %r7, %r7, %r5;", "add.u32 %r7, %r7, 1;"),
        ],
    )


def test_remote_arrivals():
    """mbarrier.arrive.shared::cluster: one CTA signals the other's mbarrier."""
    body = f"""
      .shared .align 8 .b8 bar[8];
      .shared .align 4 .b8 word[4];
      ld.param.u64 %rd1, [px]; mov.u32 %r1, %tid.x; mov.u32 %r2, %cluster_ctarank;
      setp.ne.u32 %p1, %r1, 0; mov.u32 %r3, bar; mov.u32 %r4, word;
      @!%p1 mbarrier.init.shared.b64 [bar], 1;
      barrier.cluster.arrive; barrier.cluster.wait;
      setp.eq.u32 %p2, %r2, 0; @%p2 bra ZERO;
      @%p1 bra DONE;
      mapa.shared::cluster.u32 %r5, %r4, 0; mapa.shared::cluster.u32 %r6, %r3, 0;
      st.shared::cluster.u32 [%r5], 9;
      mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r6];
      bra DONE;
    ZERO:
      {WAIT.format(3, "bar", 0)}
      ld.shared.u32 %r7, [word];
      mad.wide.u32 %rd2, %r1, 4, %rd1; st.global.u32 [%rd2], %r7;
    DONE:
    """

    def launch(built, seed):
        x = np.zeros(32, np.uint32)
        built.launch(grid=2, cluster=2, args=[x], seed=seed)
        assert (x == 9).all()

    check(
        body,
        "u64 px",
        launch,
        [("deadlock", "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r6];", "")],
    )


# --- tensor copies ---

TENSOR = f"""
  .shared .align 1024 .b8 tile[4096];
  .shared .align 8 .b8 bar[8];
  ld.param.u64 %rd2, [py]; ld.param.u32 %r20, [x]; ld.param.u32 %r21, [y];
  mov.b64 %rd1, pmap; cvta.param.u64 %rd1, %rd1;
  mov.u32 %r1, %tid.x; mov.u32 %r2, tile; setp.ne.u32 %p1, %r1, 0;
  @%p1 bra READY;
  mbarrier.init.shared::cta.b64 [bar], 1;
READY:
  bar.sync 0;
  @%p1 bra LOADED;
  mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], BYTES;
  cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
      [tile], [%rd1, {{%r20, %r21}}], [bar];
LOADED:
  {WAIT.format(3, "bar", 0)}
  mov.u32 %r3, %r1;
COPY:
  mad.lo.u32 %r4, %r3, 4, %r2; ld.shared.u32 %r5, [%r4];
  mad.wide.u32 %rd3, %r3, 4, %rd2; st.global.u32 [%rd3], %r5;
  add.u32 %r3, %r3, 32; setp.lt.u32 %p4, %r3, WORDS;
  @%p4 bra COPY;
"""
TENSOR_PARAMETERS = "align 64 .b8 pmap[128], u64 py, u32 x, u32 y"


def swizzle(offsets, mode):
    """Byte offsets after the 32-, 64- or 128-byte swizzle (mode 1 to 3)."""
    return offsets ^ ((offsets >> 7) & ((1 << mode) - 1)) << 4


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize("start", [(0, 0), (8, 3), (56, 30), (-8, -2)], ids=str)
def test_tensor_load(mode, start):
    """cp.async.bulk.tensor.2d: swizzles, and zeros outside of the tensor."""
    array = np.arange(33 * 64, dtype=np.uint16).reshape(33, 64) + 1
    width, height = 8 << mode, 8
    x, y = start
    box = np.zeros((height, width), np.uint16)
    for r in range(height):
        for c in range(width):
            if 0 <= y + r < 33 and 0 <= x + c < 64:
                box[r, c] = array[y + r, x + c]
    offsets = swizzle(np.arange(box.size) * 2, mode)
    expected = np.zeros(box.size, np.uint16)
    expected[offsets // 2] = box.ravel()

    map_ = ptxemu().tensor_map(array, (height, width), data_type=BF16, swizzle=mode)
    text = TENSOR.replace("BYTES", str(box.nbytes)).replace("WORDS", str(box.size // 2))
    built = module(text, TENSOR_PARAMETERS, target=TARGET)
    for seed in (0, 1):
        result = np.zeros(box.size, np.uint16)
        built.launch(args=[map_, result, x, y], buffers=[array], seed=seed)
        np.testing.assert_array_equal(result, expected)


def test_tensor_load_faults():
    array = np.zeros((32, 64), np.uint16)
    map_ = ptxemu().tensor_map(array, (8, 64), data_type=BF16, swizzle=3)
    text = TENSOR.replace("BYTES", "1024").replace("WORDS", "256")

    def launch(built, seed, map_=map_):
        built.launch(args=[map_, np.zeros(512, np.uint16), 0, 0], buffers=[array], seed=seed)

    check(
        text,
        TENSOR_PARAMETERS,
        launch,
        [
            ("race", WAIT.format(3, "bar", 0), ""),
            (
                "deadlock",
                "[bar], 1024;",
                "[bar], 512;\n mbarrier.expect_tx.shared::cta.b64 [bar], 256;",
            ),
            ("misaligned", "[tile], [%rd1", "[tile+64], [%rd1"),
            ("bounds", "tensor.2d", "tensor.1d"),
        ],
    )
    good = module(text, TENSOR_PARAMETERS, target=TARGET)
    finding("bounds", lambda: launch(good, 0, map_=bytes(128)))
    with pytest.raises(ptxemu().Finding, match="wider than the swizzle"):
        ptxemu().tensor_map(array, (8, 64), data_type=BF16, swizzle=1)


@pytest.mark.parametrize("reduce", [False, True])
def test_tensor_store(reduce):
    """cp[.reduce].async.bulk.tensor to global memory; rows outside are not written."""
    name = "cp.reduce.async.bulk.tensor.2d" if reduce else "cp.async.bulk.tensor.2d"
    body = f"""
      .shared .align 128 .b8 tile[512];
      mov.b64 %rd1, pmap; cvta.param.u64 %rd1, %rd1;
      mov.u32 %r1, %tid.x; mov.u32 %r2, tile; mad.lo.u32 %r3, %r1, 16, %r2;
      cvt.rn.f32.u32 %f1, %r1;
      st.shared.v4.f32 [%r3], {{%f1, %f1, %f1, %f1}};
      fence.proxy.async;
      bar.warp.sync -1;
      elect.sync _|%p1, -1;
      @!%p1 bra DONE;
      {name}.global.shared::cta{".add" if reduce else ""}.tile.bulk_group [%rd1, {{4, 3}}], [tile];
      cp.async.bulk.commit_group;
      cp.async.bulk.wait_group 0;
    DONE:
    """
    array = np.ones((16, 16), np.float32)
    map_ = ptxemu().tensor_map(array, (16, 8), data_type=F32)

    def launch(built, seed):
        array[:] = 1
        built.launch(args=[map_], buffers=[array], seed=seed)
        expected = np.ones((16, 16), np.float32)
        block = np.repeat(np.arange(32, dtype=np.float32), 4).reshape(16, 8)[:13]
        expected[3:, 4:12] = block + (1 if reduce else 0)
        np.testing.assert_array_equal(array, expected)

    faults = [("proxy", "fence.proxy.async;", ""), ("race", "bar.warp.sync -1;", "")]
    check(body, "align 64 .b8 pmap[128]", launch, faults)


def test_multicast():
    """One load lands at the same place in every CTA of the mask and signals each one's mbarrier."""
    body = f"""
      .shared .align 128 .b8 tile[128];
      .shared .align 8 .b8 bar[8];
      ld.param.u64 %rd1, [px]; ld.param.u64 %rd2, [py];
      mov.u32 %r1, %tid.x; mov.u32 %r2, tile; mov.u32 %r3, %cluster_ctarank;
      setp.ne.u32 %p1, %r1, 0; mov.u16 %h1, 3;
      @%p1 bra READY;
      mbarrier.init.shared::cta.b64 [bar], 1;
      mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 128;
    READY:
      barrier.cluster.arrive; barrier.cluster.wait;
      setp.eq.or.u32 %p2, %r3, 1, %p1; @%p2 bra LOADED;
      cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
          [tile], [%rd1], 128, [bar], %h1;
    LOADED:
      {WAIT.format(3, "bar", 0)}
      mad.lo.u32 %r4, %r1, 4, %r2; ld.shared.u32 %r5, [%r4];
      mad.lo.u32 %r6, %r3, 32, %r1; mad.wide.u32 %rd3, %r6, 4, %rd2; st.global.u32 [%rd3], %r5;
      barrier.cluster.arrive; barrier.cluster.wait;
    """

    def launch(built, seed):
        x, y = np.arange(32, dtype=np.uint32), np.zeros(64, np.uint32)
        built.launch(grid=2, cluster=2, args=[x, y], seed=seed)
        assert y.tolist() == [*range(32), *range(32)]

    check(body, "u64 px, u64 py", launch, [("deadlock", "mov.u16 %h1, 3;", "mov.u16 %h1, 1;")])


# --- wgmma ---


def descriptor(address, leading, stride, layout):
    return (address >> 4) | (leading >> 4) << 16 | (stride >> 4) << 32 | layout << 62


SPAN = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes, by the descriptor's layout type
SWIZZLE = {0: 0, 1: 3, 2: 2, 3: 1}


def k_major(matrix, layout):
    """Bytes of a [rows, k] operand of one wgmma in shared memory, and its strides."""
    rows, k = matrix.shape
    size = matrix.itemsize
    out = np.zeros(1 << 15, np.uint8)
    row, column = np.meshgrid(np.arange(rows), np.arange(k), indexing="ij")
    byte = column * size
    if layout == 0:  # core matrices of 8 rows x 16 bytes; those along K 128 bytes apart
        leading, stride = 128, 256
        at = row // 8 * stride + byte // 16 * leading + row % 8 * 16 + byte % 16
    else:
        leading, stride = 16, 8 * SPAN[layout]
        at = swizzle(row // 8 * stride + row % 8 * SPAN[layout] + byte, SWIZZLE[layout])
    for b in range(size):
        out[at + b] = matrix.view(np.uint8).reshape(rows, k, size)[:, :, b]
    return out, leading, stride


def mn_major(matrix, layout):
    """The same for an operand whose rows are consecutive in memory (16-bit types)."""
    rows, k = matrix.shape
    out = np.zeros(1 << 15, np.uint8)
    row, column = np.meshgrid(np.arange(rows), np.arange(k), indexing="ij")
    if layout == 0:
        stride, leading = 128, 128 * (rows // 8)
        at = row // 8 * stride + column // 8 * leading + column % 8 * 16 + row % 8 * 2
    else:
        atom = SPAN[layout] // 2
        stride = 8 * SPAN[layout]
        leading = 2 * stride
        at = row // atom * leading + column // 8 * stride + column % 8 * SPAN[layout]
        at = swizzle(at + row % atom * 2, SWIZZLE[layout])
    for b in range(2):
        out[at + b] = matrix.view(np.uint8).reshape(rows, k, 2)[:, :, b]
    return out, leading, stride


B_AT = 1 << 15

WGMMA = """
  .extern .shared .align 1024 .b8 smem[];
  .reg .f32 %d<NREG>;
  ld.param.u64 %rd1, [pimage]; ld.param.u64 %rd2, [pd];
  ld.param.u64 %rd5, [da]; ld.param.u64 %rd6, [db];
  mov.u32 %r1, %tid.x; mov.u32 %r2, smem; mov.u32 %r3, %r1;
FILL:
  mad.lo.u32 %r4, %r3, 16, %r2; mad.wide.u32 %rd3, %r3, 16, %rd1;
  ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%rd3];
  st.shared.v4.u32 [%r4], {%r5, %r6, %r7, %r8};
  add.u32 %r3, %r3, 128; setp.lt.u32 %p1, %r3, 4096;
  @%p1 bra FILL;
  fence.proxy.async.shared::cta;
  bar.sync 0;
  ZERO
  FRAGMENTS
  wgmma.fence.sync.aligned;
  setp.ne.u32 %p2, %r2, -1;
  wgmma.mma_async.sync.aligned.SHAPE {DREGS}, A, %rd6, %p2, 1, 1FLAGS;
  wgmma.mma_async.sync.aligned.SHAPE {DREGS}, A, %rd6, 1, -1, 1FLAGS;
  wgmma.mma_async.sync.aligned.SHAPE {DREGS}, A, %rd6, 1, 1, 1FLAGS;
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
  mad.wide.u32 %rd2, %r1, OUTBYTES, %rd2;
  STORE
"""
WGMMA_PARAMETERS = "u64 pimage, u64 pd, u64 da, u64 db"


def wgmma_text(n, type_, *, transposed=(0, 0), registers=False):
    k = 8 if type_ == "tf32" else 16
    count = n // 2
    names = [f"%d{i}" for i in range(count)]
    flags = ""  # transpose-a and transpose-b; the first only for a in shared memory
    if type_ != "tf32":
        flags = f", {transposed[1]}" if registers else f", {transposed[0]}, {transposed[1]}"
    fragments = ""
    if registers:  # rows of a, K-major without swizzle, read as the fragment layout says
        fragments = """
          shr.u32 %r9, %r1, 5; and.b32 %r10, %r1, 31; shr.u32 %r11, %r10, 2; and.b32 %r12, %r10, 3;
          mad.lo.u32 %r13, %r9, 512, %r2; mad.lo.u32 %r13, %r11, 16, %r13;
          mad.lo.u32 %r13, %r12, 4, %r13;
          ld.shared.u32 %r20, [%r13]; ld.shared.u32 %r21, [%r13+256];
          ld.shared.u32 %r22, [%r13+128]; ld.shared.u32 %r23, [%r13+384];
        """
    return (
        WGMMA.replace("NREG", str(count))
        .replace("SHAPE", f"m64n{n}k{k}.f32.{type_}.{type_}")
        .replace("DREGS", ", ".join(names))
        .replace("ZERO", "".join(f"mov.f32 {d}, 0f3F800000; " for d in names))
        .replace("FRAGMENTS", fragments)
        .replace(" A,", " {%r20, %r21, %r22, %r23}," if registers else " %rd5,")
        .replace("FLAGS", flags)
        .replace("OUTBYTES", str(4 * count))
        .replace(
            "STORE", "".join(f"st.global.f32 [%rd2+{4 * i}], {d};\n" for i, d in enumerate(names))
        )
    )


def accumulators(result, n):
    """[128 threads, n / 2] registers as the [64, n] matrix of the ISA's table for D."""
    d = np.zeros((64, n), np.float32)
    thread = np.arange(128)
    row, column = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
    for i in range(n // 2):
        d[row + 8 * (i // 2 % 2), i // 4 * 8 + column + i % 2] = result[:, i]
    return d


def operands(n, type_, seed=0):
    rng = np.random.default_rng(seed)
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}[type_]
    k = 8 if type_ == "tf32" else 16
    values = [rng.integers(-8, 9, (rows, k)).astype(np.float64) for rows in (64, n)]
    raw = torch.int32 if type_ == "tf32" else torch.int16
    arrays = [torch.tensor(v).to(dtype).view(raw).numpy() for v in values]
    return values, arrays


def run_wgmma(text, n, images, seed):
    (image_a, leading_a, stride_a, layout_a), (image_b, leading_b, stride_b, layout_b) = images
    image = np.concatenate([image_a, image_b])
    result = np.zeros((128, n // 2), np.float32)
    built = module(text, WGMMA_PARAMETERS, target=TARGET)
    a = descriptor(0, leading_a, stride_a, layout_a)
    b = descriptor(B_AT, leading_b, stride_b, layout_b)
    built.launch(block=128, shared=1 << 16, args=[image, result, a, b], seed=seed)
    return accumulators(result, n)


@pytest.mark.parametrize("layout", [0, 1, 2, 3])
@pytest.mark.parametrize(("n", "type_"), [(64, "bf16"), (8, "f16"), (128, "tf32")])
def test_wgmma_k_major(n, type_, layout):
    (a, b), raw = operands(n, type_)
    images = [(*k_major(m, layout), layout) for m in raw]
    d = run_wgmma(wgmma_text(n, type_), n, images, seed=1)
    np.testing.assert_array_equal(d, 1 + a @ b.T)


@pytest.mark.parametrize("layout", [0, 1, 2, 3])
def test_wgmma_mn_major(layout):
    """Both operands transposed (16-bit types only)."""
    (a, b), raw = operands(128, "bf16")
    images = [(*mn_major(m, layout), layout) for m in raw]
    d = run_wgmma(wgmma_text(128, "bf16", transposed=(1, 1)), 128, images, seed=0)
    np.testing.assert_array_equal(d, 1 + a @ b.T)


def test_wgmma_with_a_in_registers():
    (a, b), raw = operands(32, "bf16")
    images = [(*k_major(raw[0], 0), 0), (*mn_major(raw[1], 3), 3)]
    text = wgmma_text(32, "bf16", transposed=(0, 1), registers=True)
    np.testing.assert_array_equal(run_wgmma(text, 32, images, seed=2), 1 + a @ b.T)


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("wgmma", "wgmma.wait_group.sync.aligned 0;", ""),
        ("wgmma", "wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;"),
        ("wgmma", "wgmma.commit_group.sync.aligned;", ""),
        ("wgmma", "wgmma.fence.sync.aligned;", ""),
        ("proxy", "fence.proxy.async.shared::cta;", ""),
        ("race", "bar.sync 0;", ""),
        (
            "race",
            "wgmma.wait_group.sync.aligned 0;",
            "st.shared.u32 [%r4], 0; wgmma.wait_group.sync.aligned 0;",
        ),
    ],
)
def test_wgmma_faults(kind, old, new):
    _, raw = operands(64, "bf16")
    images = [(*k_major(m, 1), 1) for m in raw]
    text = wgmma_text(64, "bf16")
    assert text.count(old) == 1
    text = text.replace(old, new).replace("smem; mov.u32 %r3", "smem; mov.u32 %r4, 0; mov.u32 %r3")
    if "st.shared.u32 [%r4], 0" in new:
        text = text.replace("st.shared.u32 [%r4], 0", "st.shared.u32 [%r2], 0")
    for seed in SEEDS:
        message = finding(kind, lambda seed=seed: run_wgmma(text, 64, images, seed))
        assert "PTX line" in message


def test_setmaxnreg_and_griddepcontrol_change_nothing():
    body = """
      ld.param.u64 %rd1, [px];
      griddepcontrol.wait;
      setmaxnreg.dec.sync.aligned.u32 40;
      st.global.u32 [%rd1], 3;
      griddepcontrol.launch_dependents;
    """
    x = np.zeros(1, np.uint32)
    module(body, "u64 px", target=TARGET).launch(block=1, args=[x])
    assert x[0] == 3
