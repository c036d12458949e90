# SPDX-License-Identifier: Apache-2.0
"""Seeded faults that the simulator must find, each beside its correct version, which must pass.

PTX ISA: "Memory Consistency Model", "bar, barrier", "bar.warp.sync", "cp.async", "membar, fence".
"""

import numpy as np
import pytest
from ptxemu_tools import finding, module

SEEDS = range(3)


def check(body, parameters, launch, kind, fault, *, target="sm_80", words=()):
    """`body` must pass and, with `fault` = (old, new), be found, under several schedules."""
    old, new = fault
    assert body.count(old) == 1, "the fault must change exactly one place"
    good, bad = (module(b, parameters, target=target) for b in (body, body.replace(old, new)))
    for seed in SEEDS:
        launch(good, seed)
        message = finding(kind, lambda seed=seed: launch(bad, seed))
        for word in words:
            assert word in message, message


REVERSE = """
  .shared .align 4 .b8 s[512];
  ld.param.u64 %rd1, [px];
  mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 4; add.u64 %rd2, %rd1, %rd2;
  mov.u32 %r2, s; mad.lo.u32 %r3, %r1, 4, %r2;
  ld.global.u32 %r4, [%rd2];
  st.shared.u32 [%r3], %r4;
  bar.sync 0;
  sub.u32 %r5, 127, %r1; mad.lo.u32 %r6, %r5, 4, %r2;
  ld.shared.u32 %r7, [%r6];
  st.global.u32 [%rd2], %r7;
"""


def run_reverse(module_, seed, **options):
    x = np.arange(128, dtype=np.uint32)
    module_.launch(block=128, args=[x], seed=seed, **options)
    assert x.tolist() == list(range(127, -1, -1))


def run_reverse_races(module_, seed):
    """Only races: in some schedules the read comes first, and is one of uninitialised memory."""
    run_reverse(module_, seed, check_initialised=False)


def test_dropped_barrier():
    check(
        REVERSE,
        "u64 px",
        run_reverse_races,
        "race",
        ("bar.sync 0;", ""),
        words=("shared+", "CTA", "PTX line"),
    )


def test_off_by_one_in_shared_memory():
    fault = ("sub.u32 %r5, 127, %r1;", "sub.u32 %r5, 128, %r1;")
    check(REVERSE, "u64 px", run_reverse, "bounds", fault, words=("shared+512",))


def test_misaligned():
    fault = ("ld.shared.u32 %r7, [%r6];", "shr.u32 %r6, %r6, 1; ld.shared.u32 %r7, [%r6];")
    check(REVERSE, "u64 px", run_reverse, "misaligned", fault)


def test_uninitialised_shared_memory():
    fault = ("st.shared.u32 [%r3], %r4;", "")
    check(REVERSE, "u64 px", run_reverse, "uninitialised", fault)


def test_barrier_for_the_wrong_number_of_threads():
    fault = ("bar.sync 0;", "bar.sync 0, 64;")
    check(REVERSE, "u64 px", run_reverse_races, "race", fault)


def test_too_many_threads_at_a_barrier():
    check(
        REVERSE,
        "u64 px",
        run_reverse,
        "deadlock",
        ("bar.sync 0;", "bar.sync 0, 160;"),
        words=("barrier 0",),
    )


def test_divergent_barrier():
    """bar.sync is aligned: all threads of a warp execute it together."""
    fault = ("bar.sync 0;", "setp.lt.u32 %p1, %r1, 100;\n @%p1 bar.sync 0;\n @!%p1 bar.sync 0;")
    check(REVERSE, "u64 px", run_reverse, "barrier", fault, words=("waits for lanes",))


def test_global_bounds_and_read_only():
    body = """
      ld.param.u64 %rd1, [px]; ld.param.u64 %rd3, [py]; mov.u32 %r1, %tid.x;
      mad.wide.u32 %rd2, %r1, 4, %rd1;
      ld.global.f32 %f1, [%rd2];
      mad.wide.u32 %rd4, %r1, 4, %rd3;
      st.global.f32 [%rd4], %f1;
    """

    def launch(module_, seed):
        x, y = np.arange(40, dtype=np.float32), np.zeros(32, np.float32)
        x.flags.writeable = False
        module_.launch(args=[x[:32], y], seed=seed)

    check(
        body,
        "u64 px, u64 py",
        launch,
        "bounds",
        ("[%rd2];", "[%rd2+4];"),
        words=("4 bytes past the end of px",),
    )
    check(
        body,
        "u64 px, u64 py",
        launch,
        "bounds",
        ("st.global.f32 [%rd4]", "st.global.f32 [%rd2]"),
        words=("read-only",),
    )


WARP_EXCHANGE = """
  .shared .align 4 .b8 s[128];
  ld.param.u64 %rd1, [px]; mov.u32 %r1, %tid.x; mad.wide.u32 %rd2, %r1, 4, %rd1;
  mov.u32 %r2, s; mad.lo.u32 %r3, %r1, 4, %r2;
  st.shared.u32 [%r3], %r1;
  bar.warp.sync 0xffffffff;
  xor.b32 %r4, %r1, 1; mad.lo.u32 %r5, %r4, 4, %r2;
  ld.shared.u32 %r6, [%r5];
  st.global.u32 [%rd2], %r6;
"""


def test_dropped_syncwarp():
    """Lanes of a warp are threads: shared memory between them needs bar.warp.sync."""

    def launch(module_, seed):
        x = np.zeros(32, np.uint32)
        module_.launch(args=[x], seed=seed)
        assert x.tolist() == [i ^ 1 for i in range(32)]

    check(WARP_EXCHANGE, "u64 px", launch, "race", ("bar.warp.sync 0xffffffff;", ""))
    shuffle = (
        "bar.warp.sync 0xffffffff;",
        "shfl.sync.idx.b32 %r9, %r1, 0, 31, -1;",
    )  # orders nothing
    check(WARP_EXCHANGE, "u64 px", launch, "race", shuffle)


def test_neighbouring_bytes_are_no_race():
    """Each thread writes its own byte of a word; two threads on one byte do race."""
    body = """
      .shared .align 4 .b8 s[64];
      mov.u32 %r1, %tid.x; mov.u32 %r2, s; add.u32 %r3, %r1, %r2;
      st.shared.u8 [%r3], %r1;
    """
    fault = ("add.u32 %r3, %r1, %r2;", "and.b32 %r4, %r1, 62; add.u32 %r3, %r4, %r2;")
    check(body, "", lambda m, seed: m.launch(block=64, seed=seed), "race", fault)


def test_many_readers_are_remembered():
    """All 128 threads read one word; a write before the barrier conflicts with any of them."""
    body = """
      .shared .align 4 .b8 s[4];
      mov.u32 %r1, %tid.x; setp.eq.u32 %p1, %r1, 0; setp.eq.u32 %p2, %r1, 77;
      @%p1 st.shared.u32 [s], %r1;
      bar.sync 0;
      ld.shared.u32 %r2, [s];
      bar.sync 0;
      @%p2 st.shared.u32 [s], %r1;
    """
    fault = ("ld.shared.u32 %r2, [s];\n      bar.sync 0;", "ld.shared.u32 %r2, [s];")
    check(
        body, "", lambda m, seed: m.launch(block=128, seed=seed), "race", fault, words=("the read",)
    )


PIPELINE = """
  .shared .align 16 .b8 s[1024];
  ld.param.u64 %rd1, [px]; ld.param.u64 %rd2, [py]; mov.u32 %r1, %tid.x;
  mad.wide.u32 %rd3, %r1, 16, %rd1;
  mov.u32 %r2, s; mad.lo.u32 %r3, %r1, 16, %r2;
  cp.async.cg.shared.global [%r3], [%rd3], 16;
  cp.async.commit_group;
  cp.async.ca.shared.global [%r3+512], [%rd3+512], 16, 8;
  cp.async.commit_group;
  cp.async.wait_group 1;
  bar.sync 0;
  xor.b32 %r4, %r1, 3; mad.lo.u32 %r4, %r4, 16, %r2;
  ld.shared.u32 %r5, [%r4];
  cp.async.wait_all;
  bar.warp.sync -1;
  ld.shared.v4.u32 {%r6, %r7, %r8, %r9}, [%r4+512];
  add.u32 %r5, %r5, %r6; add.u32 %r5, %r5, %r9;
  mad.wide.u32 %rd4, %r1, 4, %rd2;
  st.global.u32 [%rd4], %r5;
"""


def run_pipeline(module_, seed):
    x, y = np.arange(256, dtype=np.uint32), np.zeros(32, np.uint32)
    module_.launch(args=[x, y], seed=seed)
    lane = np.arange(32) ^ 3  # the copy of 8 of 16 bytes leaves zeros behind them
    assert y.tolist() == (4 * lane + 128 + 4 * lane).tolist()


@pytest.mark.parametrize(
    "fault",
    [
        ("cp.async.wait_group 1;", ""),
        ("cp.async.wait_group 1;", "cp.async.wait_group 2;"),
        ("bar.sync 0;", ""),
        ("cp.async.wait_all;", ""),
        ("bar.warp.sync -1;", ""),
        ("[%rd3+512], 16, 8;\n  cp.async.commit_group;", "[%rd3+512], 16, 8;"),
    ],
    ids=[
        "no wait",
        "wait for too few",
        "no barrier",
        "no second wait",
        "no second barrier",
        "no commit",
    ],
)
def test_cp_async(fault):
    """cp.async groups: the data are there after wait_group, for others after a barrier, too."""
    if "no commit" in str(fault) or fault[1].endswith("16, 8;"):
        # without its commit the second copy joins no group: wait_group 1 then waits for nothing
        check(PIPELINE, "u64 px, u64 py", run_pipeline, "race", fault)
        return
    check(PIPELINE, "u64 px, u64 py", run_pipeline, "race", fault, words=("cp.async",))


def test_refill_while_others_still_read():
    """cp.async into a buffer whose readers have not been waited for."""
    body = PIPELINE.replace(
        "cp.async.wait_all;",
        "bar.sync 0; /*refill*/ cp.async.cg.shared.global [%r3], [%rd3], 16; cp.async.wait_all;",
    )
    check(body, "u64 px, u64 py", run_pipeline, "race", ("bar.sync 0; /*refill*/", ""))


def test_cp_async_source_bounds():
    fault = (
        "cp.async.ca.shared.global [%r3+512], [%rd3+512], 16, 8;",
        "cp.async.ca.shared.global [%r3+512], [%rd3+528], 16, 8;",
    )
    check(PIPELINE, "u64 px, u64 py", run_pipeline, "bounds", fault)


# --- between CTAs ---

LAST_BLOCK = """
  ld.param.u64 %rd1, [px]; ld.param.u64 %rd2, [pcount]; ld.param.u64 %rd3, [psum];
  mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %nctaid.x;
  setp.ne.u32 %p1, %r1, 0;
  @%p1 bra DONE;
  mad.wide.u32 %rd4, %r2, 4, %rd1;
  add.u32 %r4, %r2, 1;
  st.global.u32 [%rd4], %r4;
  membar.gl;
  atom.global.add.u32 %r5, [%rd2], 1;
  sub.u32 %r6, %r3, 1;
  setp.ne.u32 %p2, %r5, %r6;
  @%p2 bra DONE;
  fence.acq_rel.gpu;
  mov.u32 %r7, 0; mov.u32 %r8, 0;
LOOP:
  mad.wide.u32 %rd5, %r8, 4, %rd1;
  ld.global.u32 %r9, [%rd5];
  add.u32 %r7, %r7, %r9; add.u32 %r8, %r8, 1;
  setp.lt.u32 %p3, %r8, %r3;
  @%p3 bra LOOP;
  st.global.u32 [%rd3], %r7;
DONE:
"""


def run_last_block(module_, seed):
    x, count, total = np.zeros(6, np.uint32), np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    module_.launch(grid=6, block=64, args=[x, count, total], seed=seed)
    assert total[0] == 21


@pytest.mark.parametrize(
    "fault", [("membar.gl;", ""), ("fence.acq_rel.gpu;", ""), ("membar.gl;", "membar.cta;")]
)
def test_last_block_reduction(fault):
    """Release and acquire patterns: fence, atomic, fence; a CTA-scope fence is not enough."""
    check(
        LAST_BLOCK,
        "u64 px, u64 pcount, u64 psum",
        run_last_block,
        "race",
        fault,
        words=("global 0x",),
    )


WHOLE_BLOCK = """
  .shared .align 4 .b8 last[4];
  ld.param.u64 %rd1, [px]; ld.param.u64 %rd2, [pcount]; ld.param.u64 %rd3, [py];
  mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %nctaid.x; setp.ne.u32 %p1, %r1, 0;
  mad.lo.u32 %r4, %r2, 64, %r1;
  mad.wide.u32 %rd4, %r4, 4, %rd1;
  st.global.u32 [%rd4], %r4;
  membar.gl;
  bar.sync 0;
  @%p1 bra COUNTED;
  atom.global.add.u32 %r5, [%rd2], 1;
  st.shared.u32 [last], %r5;
COUNTED:
  bar.sync 1;
  ld.shared.u32 %r5, [last];
  add.u32 %r5, %r5, 1; setp.ne.u32 %p2, %r5, %r3;
  @%p2 bra DONE;
  fence.acq_rel.gpu;
  mov.u32 %r6, 0; mov.u32 %r7, 0;
LOOP:
  mad.lo.u32 %r8, %r7, 64, %r1; mad.wide.u32 %rd5, %r8, 4, %rd1;
  ld.global.u32 %r9, [%rd5];
  add.u32 %r6, %r6, %r9; add.u32 %r7, %r7, 1; setp.lt.u32 %p3, %r7, %r3;
  @%p3 bra LOOP;
  mad.wide.u32 %rd6, %r1, 4, %rd3; st.global.u32 [%rd6], %r6;
DONE:
"""


@pytest.mark.parametrize(
    "fault", [("membar.gl;", ""), ("bar.sync 0;", ""), ("fence.acq_rel.gpu;", "")], ids=str
)
def test_fences_reach_through_barriers(fault):
    """Split-K's way: all threads write and fence, one counts; one learns, all fence and read."""

    def launch(module_, seed):
        x, count, y = np.zeros(192, np.uint32), np.zeros(1, np.uint32), np.zeros(64, np.uint32)
        module_.launch(grid=3, block=64, args=[x, count, y], seed=seed)
        assert y.tolist() == np.arange(192).reshape(3, 64).sum(0).tolist()

    check(WHOLE_BLOCK, "u64 px, u64 pcount, u64 py", launch, "race", fault)


def test_two_ctas_write_one_word():
    body = """
      ld.param.u64 %rd1, [px]; mov.u32 %r2, %ctaid.x; mad.wide.u32 %rd4, %r2, 4, %rd1;
      mov.u32 %r1, %tid.x; setp.eq.u32 %p1, %r1, 0;
      @%p1 st.global.u32 [%rd4], %r2;
    """

    def launch(module_, seed):
        module_.launch(grid=3, args=[np.zeros(3, np.uint32)], seed=seed)

    check(body, "u64 px", launch, "race", ("%r2, 4, %rd1;", "%r2, 0, %rd1;"), words=("cluster",))


FLAG = """
  ld.param.u64 %rd1, [px]; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %tid.x;
  setp.ne.u32 %p1, %r2, 0; @%p1 bra DONE;
  setp.eq.u32 %p2, %r1, 0; @%p2 bra PRODUCE;
WAIT:
  ld.acquire.gpu.global.u32 %r3, [%rd1];
  setp.eq.u32 %p3, %r3, 0;
  @%p3 bra WAIT;
  ld.global.u32 %r4, [%rd1+4];
  st.global.u32 [%rd1+8], %r4;
  bra DONE;
PRODUCE:
  st.global.u32 [%rd1+4], 7;
  st.release.gpu.global.u32 [%rd1], 1;
DONE:
"""


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("race", ("st.release.gpu", "st.relaxed.gpu")),
        ("race", ("ld.acquire.gpu", "ld.relaxed.gpu")),
        ("race", ("st.release.gpu.global", "st.global")),
        ("deadlock", ("st.release.gpu.global.u32 [%rd1], 1;", "")),
    ],
)
def test_flag_between_ctas(kind, fault):
    def launch(module_, seed):
        x = np.zeros(3, np.uint32)
        module_.launch(grid=2, args=[x], seed=seed)
        assert x.tolist() == [1, 7, 7]

    check(FLAG, "u64 px", launch, kind, fault)


GRID_BARRIER = """
  ld.param.u64 %rd1, [px]; ld.param.u64 %rd2, [pcount];
  mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %nctaid.x; setp.ne.u32 %p1, %r1, 0;
  mad.lo.u32 %r4, %r2, 32, %r1; mad.wide.u32 %rd3, %r4, 4, %rd1;
  st.global.u32 [%rd3], %r4;
  bar.sync 0;
  @%p1 bra ARRIVED;
  membar.gl;
  atom.global.add.u32 %r5, [%rd2], 1;
WAIT:
  ld.volatile.global.u32 %r6, [%rd2];
  setp.lt.u32 %p2, %r6, %r3;
  @%p2 bra WAIT;
  membar.gl;
ARRIVED:
  bar.sync 0; // after the grid's
  add.u32 %r7, %r2, 1; rem.u32 %r7, %r7, %r3;
  mad.lo.u32 %r8, %r7, 32, %r1; mad.wide.u32 %rd4, %r8, 4, %rd1;
  ld.global.u32 %r9, [%rd4];
  mad.wide.u32 %rd5, %r4, 4, %rd1;
  st.global.u32 [%rd5+1024], %r9;
"""


def test_barrier_of_a_grid():
    """All CTAs of a cooperative launch run side by side; otherwise they may wait for ever."""

    def launch(module_, seed, **options):
        x, count = np.zeros(512, np.uint32), np.zeros(1, np.uint32)
        options = {"cooperative": True, **options}
        module_.launch(grid=8, args=[x, count], seed=seed, **options)
        assert x[256:].tolist() == np.roll(np.arange(256), -32).tolist()

    parameters = "u64 px, u64 pcount"
    check(GRID_BARRIER, parameters, launch, "race", ("bar.sync 0; // after the grid's", ""))
    check(
        GRID_BARRIER, parameters, launch, "race", ("@%p2 bra WAIT;\n  membar.gl;", "@%p2 bra WAIT;")
    )
    alone = module(GRID_BARRIER, parameters)
    finding("deadlock", lambda: launch(alone, 0, cooperative=False, resident=2))


def test_trap_and_instruction_limit():
    finding("trap", lambda: module("  trap;").launch())
    endless = module("LOOP:\n  bra LOOP;")
    finding("limit", lambda: endless.launch(max_instructions=1000))


def test_launch_limits():
    finding("launch", lambda: module("").launch(block=2048))
    finding("launch", lambda: module("").launch(shared=300 * 1024))


def test_findings_name_the_source_line():
    """.file and .loc, with inlined_at: the innermost line and where it was inlined."""
    body = """
      .loc 1 10 0
      .loc 2 77 3, function_name $L__info, inlined_at 1 10 0
      ld.global.u32 %r1, [16];
    """
    files = '.file 1 "/src/kernel.cu"\n.file 2 "/src/inlined.h"\n'
    message = finding("bounds", lambda: module(body, before=files).launch())
    assert "inlined.h:77, inlined at kernel.cu:10" in message
