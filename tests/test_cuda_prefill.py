# SPDX-License-Identifier: Apache-2.0
"""The CUDA prefill kernel, executed from its PTX: every type, head_dim and feature at small sizes.

Each case is a call of a public function, made under three schedules of the simulator. A race, an
access out of bounds or a read of uninitialised memory raises; results must be those of the oracle,
and the same bits under every schedule.
"""

import importlib
import math

import pytest
import torch
from bounds import assert_matches_oracle
from cases import Case, build, compare, expected, same_bits
from cuda_emulation import run
from ptxemu_tools import NVCC_REASON, nvcc

import sparse_attn
from sparse_attn import SparseIndex, reference

pytestmark = pytest.mark.skipif(nvcc() is None, reason=NVCC_REASON)

BF16, FP16 = torch.bfloat16, torch.float16


def check(case: Case, **settings) -> None:
    problem = build(case)
    oracle, plain = expected(problem)
    args = (problem.q, problem.k, problem.v, problem.index)
    results = run("attention", *args, return_lse=True, **problem.kwargs, **settings)
    out, lse = results[0]
    assert_matches_oracle(out, oracle[0], plain[0], name="out")
    assert_matches_oracle(lse, oracle[1], plain[1], name="lse")
    for other in results[1:]:
        assert same_bits(out, other[0]) and same_bits(lse, other[1])


# Every kind of head in one call; awkward lengths; GQA.
KINDS = ("dense", "streaming", "listed", "blocks", "columns", "empty")
FEATURES = {
    "causal": Case(kinds=KINDS),
    "not causal": Case(kinds=KINDS, causal=False, seqlen_q=40, seqlen_k=131),
    "lists of KV heads": Case(
        heads=4, heads_kv=2, index_heads="kv", kinds=("listed", "dense"), block_m=16, seqlen_q=37
    ),
    "biases, bits, sinks": Case(
        heads=3, heads_kv=1, kinds=("listed",), bias="finite", bits=0.6, sinks=True, block_n=24
    ),
    "softcap": Case(heads=2, heads_kv=1, softcap=3.0, magnitude=3.0, sinks=True),
    "runs": Case(
        kinds=("dense", "streaming", "listed"),
        heads=3,
        heads_kv=1,
        seqlen_q=20,
        seqlen_k=600,
        block_n=16,
        fill=0.9,
    ),
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_types_and_head_dims(head_dim, dtype, feature):
    case = FEATURES[feature]
    check(Case(**{**vars(case), "head_dim": head_dim, "head_dim_v": head_dim, "dtype": dtype}))


MORE = {
    "one row more than decode": Case(seqlen_q=17, seqlen_k=17, heads=2, heads_kv=2),
    "fewer keys than rows": Case(seqlen_q=70, seqlen_k=33, heads=3, heads_kv=3),
    "fewer keys, not causal": Case(seqlen_q=70, seqlen_k=33, heads=3, heads_kv=3, causal=False),
    "no keys": Case(seqlen_q=20, seqlen_k=0, heads=2, heads_kv=2, kinds=("dense", "empty")),
    "offset into the keys": Case(q_offset=21),
    "offset past the keys": Case(q_offset=200, heads=3, heads_kv=3),
    "offset before the keys": Case(q_offset=-30, heads=3, heads_kv=3),
    "padded head dims": Case(head_dim=72, head_dim_v=40, heads=3, heads_kv=3),
    "head dims that differ": Case(head_dim=64, head_dim_v=128, heads=2, heads_kv=2),
    "shared by all heads": Case(index_heads=1, kinds=("listed",), heads=4, heads_kv=2),
    "batches": Case(batch=3, index_batch=3, heads=2, heads_kv=1, kinds=("listed", "streaming")),
    "transposed": Case(layout="transposed", heads=3, heads_kv=3),
    "gaps": Case(layout="gaps", heads=3, heads_kv=3),
    "expanded": Case(layout="expanded", batch=2, heads=4, heads_kv=2),
    "tiles of 16": Case(block_m=16, block_n=8, seqlen_q=49, heads=3, heads_kv=3, bits=0.5),
    "tiles of 80": Case(
        block_m=80, block_n=40, seqlen_q=170, heads=4, heads_kv=2, index_heads="kv", bits=0.7
    ),
    "tiles of 128": Case(
        block_m=128, block_n=128, seqlen_q=190, seqlen_k=300, bits=0.5, heads=3, heads_kv=3
    ),
    "tiles of one row": Case(block_m=1, seqlen_q=18, seqlen_k=80, heads=3, heads_kv=3),
    "tiles longer than the call": Case(block_m=1024, seqlen_q=65, heads=3, heads_kv=3, bits=0.5),
    "groups that do not fill tiles": Case(
        block_m=48, seqlen_q=50, heads=10, heads_kv=2, index_heads="kv", kinds=("listed", "dense")
    ),
    "large biases": Case(bias="large", kinds=("columns", "listed"), heads=2, heads_kv=2),
    "hidden columns": Case(bias="-inf", kinds=("columns", "listed"), heads=2, heads_kv=2),
    "large logits": Case(magnitude=40.0, heads=3, heads_kv=3),
    "a scale of zero": Case(softmax_scale=0.0, heads=3, heads_kv=3),
    "a negative scale": Case(softmax_scale=-0.3, heads=3, heads_kv=3),
    "many runs": Case(
        seqlen_q=20, seqlen_k=2300, heads=2, heads_kv=1, block_n=32, fill=0.98, kinds=("blocks",)
    ),
    "many keys": Case(seqlen_q=20, seqlen_k=1500, heads=3, heads_kv=1, block_n=64, fill=0.9),
}


@pytest.mark.parametrize("name", MORE)
def test_more(name):
    settings = vars(MORE[name])
    if name not in ("padded head dims", "head dims that differ"):
        settings = {**settings, "head_dim": 64, "head_dim_v": 64}
    check(Case(**{**settings, "dtype": BF16, "seed": 1}))


def test_against_the_cpu_operator():
    """Both kernels are as far from the oracle as a result of their type may be."""
    problem = build(Case(head_dim=64, head_dim_v=64, dtype=BF16, bits=0.3, bias="finite"))
    oracle, plain = expected(problem)
    args = (problem.q, problem.k, problem.v, problem.index)
    call = {"return_lse": True, **problem.kwargs}
    compare(lambda: sparse_attn.attention(*args, **call), oracle, plain)
    (cuda,) = run("attention", *args, seeds=(3,), **call)
    cpu = sparse_attn.attention(*args, **call)
    assert_matches_oracle(cuda[0], cpu[0].double(), plain[0], name="out")
    assert_matches_oracle(cuda[1], cpu[1].double(), plain[1], name="lse")


def varlen_inputs(lengths_q, lengths_k, heads=4, heads_kv=2, dim=64):
    generator = torch.Generator().manual_seed(5)

    def rows(count, heads):
        return torch.randn(count, heads, dim, generator=generator).to(BF16)

    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    return rows(total_q, heads), rows(total_k, heads_kv), rows(total_k, heads_kv), cu_q, cu_k


@pytest.mark.parametrize("causal", [True, False])
def test_varlen(causal):
    lengths_q, lengths_k = [19, 0, 66, 1, 30], [40, 12, 66, 90, 0]
    q, k, v, cu_q, cu_k = varlen_inputs(lengths_q, lengths_k)
    pattern = sparse_attn.AShape(sink=3, window=20)
    args = (q, k, v, cu_q, cu_k, max(lengths_q), max(lengths_k))
    results = run("attention_varlen", *args, pattern=pattern, causal=causal, return_lse=True)
    out, lse = sparse_attn.attention_varlen(*args, pattern=pattern, causal=causal, return_lse=True)
    assert_close_to_cpu(results, out, lse)


def assert_close_to_cpu(results, out, lse):
    """Two kernels that round P differently: each is within two units of the other's largest."""
    for result in results:
        assert_matches_oracle(result[0], out.double(), out, name="out")
        assert_matches_oracle(result[1], lse.double(), lse, name="lse")
        assert same_bits(result[0], results[0][0]) and same_bits(result[1], results[0][1])


def test_paged():
    generator = torch.Generator().manual_seed(6)
    q = torch.randn(2, 4, 20, 64, generator=generator).to(BF16)
    k, v = torch.randn(2, 9, 16, 2, 64, generator=generator).to(BF16)
    block_table = torch.tensor([[3, 1, 7, 0], [8, 2, 5, 6]], dtype=torch.int32)
    lengths = torch.tensor([51, 33], dtype=torch.int32)
    args = (q, k, v)
    call = {"cache_seqlens": lengths, "block_table": block_table, "return_lse": True}
    results = run("attention_decode", *args, sparse_attn.AShape(sink=2, window=11), **call)
    assert_close_to_cpu(
        results, *sparse_attn.attention_decode(*args, sparse_attn.AShape(sink=2, window=11), **call)
    )


# --- what an index or a range says wrong hides keys, and is never followed ---


def corrupt(name: str, position: int, value: int) -> SparseIndex:
    problem = build(Case(kinds=("listed",), heads=1, heads_kv=1, seqlen_q=64, bits=0.5, fill=0.9))
    index = problem.index
    tensor = getattr(index, name).clone()
    tensor.view(-1)[position] = value
    return SparseIndex(**{**vars(index), name: tensor})


@pytest.mark.parametrize("value", [-1, 200, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("name", ["block_indices", "column_indices", "block_bits_ids", "heads"])
def test_corrupt_lists_are_not_followed(name, value):
    index = corrupt(name, 1 if name != "heads" else 0, value)
    q = torch.ones(1, 1, 64, 64, dtype=BF16)
    k = torch.ones(1, 1, 129, 64, dtype=BF16)
    (out,) = run("attention", q, k, k, index, seeds=(0,))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("value", [-(2**62), -1, 5000, 2**62])
@pytest.mark.parametrize("name", ["block_indptr", "column_indptr"])
@pytest.mark.parametrize("end", [0, 1])
def test_corrupt_offsets_are_not_followed(name, end, value):
    index = corrupt(name, end, value)
    q = torch.ones(1, 1, 64, 64, dtype=BF16)
    k = torch.ones(1, 1, 129, 64, dtype=BF16)
    (out,) = run("attention", q, k, k, index, seeds=(0,))
    assert torch.isfinite(out).all()


# --- the build ---


def test_instantiations_are_those_of_the_script(monkeypatch):
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools" / "cuda"))
    script = importlib.import_module("instantiate")
    assert script.differences() == []
    assert len(script.files()) <= 40


def test_float32_is_refused():
    q = torch.ones(1, 1, 64, 64)
    with pytest.raises(RuntimeError, match="bfloat16 and float16, not float32"):
        run("attention", q, q, q, seeds=(0,))


def test_rows_without_keys_are_empty():
    q = torch.ones(1, 2, 40, 64, dtype=BF16)
    k = torch.ones(1, 2, 8, 64, dtype=BF16)
    for out, lse in run("attention", q, k, k, return_lse=True):
        assert (out[:, :, :32] == 0).all() and (lse[:, :, :32] == -math.inf).all()
        oracle, _ = reference.attention(q, k, k)
        assert torch.equal(out, oracle.to(BF16))
