# SPDX-License-Identifier: Apache-2.0
"""A call of the CUDA kernels can be captured in a CUDA graph: nothing waits, nothing is allocated.

The simulator's runtime captures as the real one does: what would wait or allocate is refused, and
what is launched is kept. Replays with other contents in the same buffers give what a call on them
gives, so that no number in a tensor decided what was launched.
"""

import math
from dataclasses import replace

import pytest
import torch
from bounds import assert_matches_oracle
from cases import Case, build, expected, same_bits
from cuda_emulation import replay, run
from ptxemu_tools import NVCC_REASON, nvcc

from sparse_attn import SparseIndex

pytestmark = pytest.mark.skipif(nvcc() is None, reason=NVCC_REASON)

NO_FAULT = 99  # of the build with faults
GARBAGE = 2**31 - 1
CAPACITY = 600  # entries of an index's buffers
LISTS = ("block_indices", "block_bits_ids", "column_indices", "column_bias")
CASE = Case(
    heads=4, heads_kv=2, head_dim=64, head_dim_v=64, dtype=torch.bfloat16, sinks=True,
    seqlen_q=100, seqlen_k=330, bits=0.5, bias="finite", block_n=16,
)  # fmt: skip
CONTENTS = (
    {"kinds": ("listed",), "seed": 1, "fill": 0.9},
    {"kinds": ("listed", "columns", "empty", "streaming"), "seed": 2, "fill": 0.2},
    {"kinds": ("dense", "blocks"), "seed": 3},
)


def with_capacity(index: SparseIndex) -> SparseIndex:
    """The same lists in buffers of one size for all."""
    room = {}
    for name in LISTS:
        buffer = getattr(index, name)
        room[name] = torch.full((CAPACITY,), GARBAGE).to(buffer.dtype)
        room[name][: len(buffer)] = buffer
    return replace(index, **room)


def call_of(problem, **more):
    return {
        "q": problem.q, "k": problem.k, "v": problem.v, "index": with_capacity(problem.index),
        "seq_ranges": None, "q_offset": 0, "causal": True, "softmax_scale": 0.125, "softcap": 0.0,
        "sinks": problem.kwargs["sinks"], "block_table": None, **more,
    }  # fmt: skip


def check_replays(calls, launches, fault=0):
    nodes, found = replay("ops.attention", *calls, fault=fault)
    kernels = [node["kernel"] for node in nodes if isinstance(node, dict)]
    assert len(kernels) == len(launches)
    assert all(name in kernel for name, kernel in zip(launches, kernels, strict=True))
    for call, result in zip(calls, found, strict=True):
        (wanted,) = run("ops.attention", seeds=(0,), fault=fault, **call)
        assert all(same_bits(x, y) for x, y in zip(wanted, result, strict=True))
    assert not any(same_bits(found[0][0], other[0]) for other in found[1:])
    return nodes, found


@pytest.mark.parametrize("seqlen_q", [100, 3])
def test_other_contents_are_replayed(seqlen_q):
    """Tensors, kinds of heads, lists, counts, biases and masks are read when the graph is run."""
    block_m = 64 if seqlen_q > 16 else 16
    problems = [
        build(replace(CASE, seqlen_q=seqlen_q, block_m=block_m, **contents, q_offset=0))
        for contents in CONTENTS
    ]
    calls = [call_of(problem) for problem in problems]
    launches = ["prefill_kernel"] if seqlen_q > 16 else ["plan", "decode_kernel", "decode_merge"]
    nodes, found = check_replays(calls, launches)
    for problem, (out, lse) in zip(problems, found, strict=True):
        problem.kwargs["softmax_scale"] = 0.125
        oracle, plain = expected(problem)
        assert_matches_oracle(out, oracle[0], plain[0], name="out")
        assert_matches_oracle(lse, oracle[1], plain[1], name="lse")
    # What is launched is the same, whichever contents are there while it is captured.
    for call in calls[1:]:
        assert replay("ops.attention", call)[0] == nodes


def decode_calls():
    """Two sequences in pages; lengths and pages differ from call to call."""
    generator = torch.Generator().manual_seed(0)
    calls = []
    forward, backward = range(12), range(11, -1, -1)
    for lengths, pages in (((90, 3), forward), ((1, 128), backward), ((0, 77), forward)):
        q = torch.randn(2, 4, 1, 64, generator=generator).bfloat16()
        k, v = torch.randn(2, 20, 2, 16, 64, generator=generator).bfloat16()
        table = torch.tensor([*pages, *range(12, 16)], dtype=torch.int32).view(2, 8)
        ranges = torch.tensor([[0, 1, 0, n, n - 1] for n in lengths], dtype=torch.int32)
        calls.append({
            "q": q, "k": k, "v": v, "index": SparseIndex.dense(1, 128, block_m=1),
            "seq_ranges": ranges, "q_offset": 0, "causal": True, "softmax_scale": 0.125,
            "softcap": 0.0, "sinks": None, "block_table": table,
        })  # fmt: skip
    return calls


def test_other_lengths_and_pages_are_replayed():
    _, found = check_replays(decode_calls(), ["plan", "decode_kernel", "decode_merge"])
    assert bool((found[2][1][0] == -math.inf).all())  # a sequence without keys


@pytest.mark.parametrize(
    ("fault", "rows", "refused"), [(19, 64, "cudaStreamSynchronize"), (20, 1, "cudaMemcpy")]
)
def test_a_launcher_that_waits_is_caught(fault, rows, refused):
    problem = build(replace(CASE, seqlen_q=rows, kinds=("dense",), seed=1))
    call = call_of(problem)
    replay("ops.attention", call, fault=NO_FAULT)
    with pytest.raises(RuntimeError, match=f"while a stream is captured: {refused}"):
        replay("ops.attention", call, fault=fault)
    run("ops.attention", seeds=(0,), fault=fault, **call)  # nothing else is wrong with it
