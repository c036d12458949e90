# SPDX-License-Identifier: Apache-2.0
"""The CUDA decode and merge kernels, executed from their PTX: few rows, keys split between CTAs.

Each case is a call of a public function, made under three schedules of the simulator. A race, an
access out of bounds or a read of uninitialised memory raises; results must be those of the oracle,
and the same bits under every schedule.
"""

import math
from dataclasses import replace

import pytest
import torch
from bounds import assert_matches_oracle, plain_attention
from cases import Case, build, expected, same_bits
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
    assert_results(results, oracle, plain)


def assert_results(results, oracle, plain) -> None:
    out, lse = results[0]
    assert_matches_oracle(out, oracle[0], plain[0], name="out")
    assert_matches_oracle(lse, oracle[1], plain[1], name="lse")
    for other in results[1:]:
        assert same_bits(out, other[0]) and same_bits(lse, other[1])


def decode(seqlen_k=331, heads=4, heads_kv=2, **settings) -> Case:
    """One row of 331 keys: three CTAs share each head."""
    settings = {"seqlen_q": 1, "index_heads": "kv", "block_m": 1, "block_n": 24, **settings}
    dims = {"head_dim": 64, "head_dim_v": settings.get("head_dim", 64), "dtype": BF16}
    return Case(seqlen_k=seqlen_k, heads=heads, heads_kv=heads_kv, **{**dims, **settings})


FEATURES = {
    "dense": decode(kinds=("dense",)),
    "kinds, two rows": decode(
        seqlen_q=2, heads=6, heads_kv=3, kinds=("streaming", "listed", "empty")
    ),
    "biases, bits, sinks": decode(kinds=("listed",), bias="finite", bits=0.6, sinks=True),
    "softcap, not causal": decode(softcap=3.0, magnitude=3.0, causal=False, kinds=("dense",)),
    "runs": decode(1500, kinds=("dense", "streaming", "listed"), heads=3, heads_kv=3, block_n=16),
    "many rows": decode(203, heads=14, seqlen_q=5, block_m=16, kinds=("listed", "streaming")),
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_types_and_head_dims(head_dim, dtype, feature):
    check(replace(FEATURES[feature], head_dim=head_dim, head_dim_v=head_dim, dtype=dtype))


MORE = {
    "sixteen rows": decode(100, seqlen_q=16, kinds=("dense", "listed"), block_m=64, bits=0.5),
    "a list a row": decode(140, seqlen_q=5, kinds=("listed", "dense"), bits=0.5),
    "lists of query heads": decode(index_heads="all", kinds=("listed", "streaming", "columns")),
    "shared by all heads": decode(index_heads=1, kinds=("listed",), heads=6, heads_kv=2),
    "groups of 32": decode(150, heads=32, heads_kv=1, kinds=("listed",)),
    "more rows than a tile": decode(70, seqlen_q=16, heads=16, block_m=16, kinds=("streaming",)),
    "fewer keys than rows": decode(3, seqlen_q=7, block_m=16, kinds=("dense", "listed")),
    "fewer keys, not causal": decode(3, seqlen_q=7, block_m=16, kinds=("dense",), causal=False),
    "one key": decode(1, kinds=("dense", "listed")),
    "no keys": decode(0, kinds=("dense", "empty"), sinks=True),
    "a chunk": decode(64, kinds=("dense",)),
    "a key more than a chunk": decode(65, kinds=("dense",)),
    "offset into the keys": decode(q_offset=21, kinds=("dense", "listed")),
    "offset before the keys": decode(q_offset=-3, seqlen_q=4, block_m=16, kinds=("dense",)),
    "padded head dims": decode(head_dim=72, head_dim_v=40, kinds=("listed",)),
    "head dims that differ": decode(head_dim=64, head_dim_v=128, kinds=("listed",)),
    "batches": decode(batch=3, index_batch=3, kinds=("listed", "streaming")),
    "transposed": decode(layout="transposed", kinds=("listed",)),
    "gaps": decode(layout="gaps", kinds=("listed",)),
    "expanded": decode(layout="expanded", batch=2, kinds=("dense", "listed")),
    "large biases": decode(bias="large", kinds=("columns", "listed")),
    "hidden columns": decode(bias="-inf", kinds=("columns", "listed")),
    "large logits": decode(magnitude=40.0, kinds=("dense", "listed")),
    "a negative scale": decode(softmax_scale=-0.3, kinds=("dense", "listed")),
    "many keys": decode(3000, heads=1, heads_kv=1, kinds=("dense",)),
    "ragged": decode(700, heads=12, heads_kv=12, kinds=("dense", "empty", "listed", "streaming")),
}


@pytest.mark.parametrize("name", MORE)
def test_more(name):
    check(replace(MORE[name], seed=1))


# --- ranges, pages ---


def random_cache(lengths, seqlen_q=1, heads=4, heads_kv=2, dim=64, seed=5):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(len(lengths), heads, seqlen_q, dim, generator=generator).to(BF16)
    shape = (len(lengths), heads_kv, max(lengths), dim)
    k, v = (torch.randn(*shape, generator=generator).to(BF16) for _ in range(2))
    for b, length in enumerate(lengths):
        k[b, :, length:], v[b, :, length:] = torch.nan, torch.nan
    return q, k, v


def expected_cache(q, k, v, lengths, mask_of=lambda rows, keys: None, **kwargs):
    """The oracle and plain torch, sequence by sequence."""
    results = []
    for attend in (reference.attention, plain_attention):
        parts = [
            attend(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n],
                   mask_of(q.shape[2], n), **kwargs)
            for b, n in enumerate(lengths)
        ]  # fmt: skip
        results.append(tuple(torch.cat(x) for x in zip(*parts, strict=True)))
    return results


@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("pattern", ["dense", "streaming"])
def test_cache_lengths(pattern, seqlen_q):
    """NaN lies in the cache past every sequence's length."""
    lengths = [290, 3, 65, 130]
    q, k, v = random_cache(lengths, seqlen_q)
    chosen, mask_of = "dense", lambda rows, keys: None
    if pattern == "streaming":
        chosen = sparse_attn.AShape(sink=70, window=33)

        def mask_of(rows, keys):
            return reference.streaming_mask(rows, keys, 70, 33)

    sinks = torch.tensor([0.5, -0.5, 0.0, 2.0])
    results = run(
        *("attention_decode", q, k, v, chosen),
        cache_seqlens=torch.tensor(lengths).int(),
        sinks=sinks,
        return_lse=True,
    )
    assert_results(results, *expected_cache(q, k, v, lengths, mask_of, sinks=sinks))


def paged(k, v, lengths, page_size, seed=3):
    """The same keys in pages of random order; pages of no sequence hold NaN."""
    batch, heads_kv, _, dim = k.shape
    need = [-(-n // page_size) for n in lengths]
    pages = torch.randperm(sum(need) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
    table = torch.full((batch, max(need) + 1), -(2**31), dtype=torch.int32)
    caches = [x.new_full((len(pages), page_size, heads_kv, dim), torch.nan) for x in (k, v)]
    for b, n in enumerate(lengths):
        for i in range(need[b]):
            page = table[b, i] = pages.pop()
            for cache, x in zip(caches, (k, v), strict=True):
                rows = x[b, :, i * page_size : min(n, (i + 1) * page_size)].transpose(0, 1)
                cache[page, : len(rows)] = rows
    return (*caches, table)


@pytest.mark.parametrize("page_size", [8, 16, 64])
def test_pages(page_size):
    """Pages in any order; entries of the table past a sequence's keys are garbage."""
    lengths = [200, 3, 65]
    q, k, v = random_cache(lengths, 2)
    k_cache, v_cache, table = paged(k, v, lengths, page_size)
    results = run(
        *("attention_decode", q, k_cache, v_cache),
        cache_seqlens=torch.tensor(lengths).int(),
        block_table=table,
        return_lse=True,
    )
    assert_results(results, *expected_cache(q, k, v, lengths))


def test_pages_with_lists():
    lengths = [200, 140]
    q, k, v = random_cache(lengths, 1)
    k_cache, v_cache, table = paged(k, v, lengths, 16)
    index = build(decode(200, kinds=("listed",), bits=0.5)).index
    mask = index.to_dense_mask(199).repeat_interleave(2, 1)
    results = run(
        *("attention_decode", q, k_cache, v_cache, index),
        cache_seqlens=torch.tensor(lengths).int(),
        block_table=table,
        return_lse=True,
    )
    wanted = expected_cache(q, k, v, lengths, lambda _, keys: mask[..., :keys])
    assert_results(results, *wanted)


def test_packed_sequences():
    lengths_q, lengths_k = [1, 3, 0, 16], [70, 3, 12, 150]
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(sum(lengths_q), 4, 64, generator=generator).to(BF16)
    k, v = (torch.randn(sum(lengths_k), 2, 64, generator=generator).to(BF16) for _ in range(2))
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k))
    results = run("attention_varlen", q, k, v, cu_q, cu_k, 16, 150, return_lse=True)
    oracle = reference.attention_varlen(q, k, v, cu_q, cu_k)
    plain = torch.zeros_like(q), torch.full((4, len(q)), -math.inf)
    for s in range(4):
        rows, keys = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        part = [x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])]
        if lengths_q[s] == 0:
            continue
        out, lse = plain_attention(*part)
        plain[0][rows], plain[1][:, rows] = out[0].transpose(0, 1), lse[0]
    assert_results(results, oracle, plain)


def test_as_the_cpu_operator():
    case = decode(kinds=("listed", "streaming"), bits=0.3, bias="finite", sinks=True)
    problem = build(case)
    _, plain = expected(problem)
    args = (problem.q, problem.k, problem.v, problem.index)
    call = {"return_lse": True, **problem.kwargs}
    (cuda,) = run("attention", *args, seeds=(3,), **call)
    cpu = sparse_attn.attention(*args, **call)
    assert_matches_oracle(cuda[0], cpu[0].double(), plain[0], name="out")
    assert_matches_oracle(cuda[1], cpu[1].double(), plain[1], name="lse")


# --- what an index, a range or a table says wrong hides keys, and is never followed ---


def corrupt(name: str, position: int, value: int) -> SparseIndex:
    index = build(decode(129, heads=1, heads_kv=1, kinds=("listed",), bits=0.9, fill=0.9)).index
    tensor = getattr(index, name).clone()
    tensor.view(-1)[position] = value
    return replace(index, **{name: tensor})


LISTS = [(name, 1, value)
         for name in ("block_indices", "column_indices", "block_bits_ids")
         for value in (-1, 200, 2**31 - 1, -(2**31))]  # fmt: skip
OFFSETS = [(name, end, value)
           for name in ("block_indptr", "column_indptr") for end in (0, 1)
           for value in (-(2**62), 5000, 2**62)]  # fmt: skip


@pytest.mark.parametrize(("name", "position", "value"), [*LISTS, *OFFSETS, ("heads", 0, 77)])
def test_corrupt_lists_are_not_followed(name, position, value):
    q, k = torch.ones(1, 1, 1, 64, dtype=BF16), torch.ones(1, 1, 129, 64, dtype=BF16)
    (out,) = run("attention", q, k, k, corrupt(name, position, value), seeds=(0,))
    assert ((out == 0) | (out == 1)).all()


def operator_call(q, k, v, index, seq_ranges, *, block_table=None, **settings):
    """The operator itself: the public functions check values first, where they are on the host."""
    return run(
        *("ops.attention", q, k, v, index),
        seq_ranges=seq_ranges,
        q_offset=0,
        causal=True,
        softmax_scale=0.125,
        softcap=0.0,
        sinks=None,
        block_table=block_table,
        **settings,
    )


def check_corrupt_table(**settings):
    """Two pages that do not exist: their keys are hidden."""
    q, k, v = random_cache([100], 1)
    k_cache, v_cache, table = paged(k, v, [100], 16)
    table[0, 2], table[0, 4] = 1 << 20, -5
    pages = (k_cache.transpose(1, 2), v_cache.transpose(1, 2))
    ranges = torch.tensor([[0, 1, 0, 100, 99]], dtype=torch.int32)
    index = SparseIndex.dense(1, 128, block_m=1)
    results = operator_call(q, *pages, index, ranges, block_table=table, **settings)
    mask = torch.ones(1, 100, dtype=torch.bool)
    mask[:, 32:48], mask[:, 64:80] = False, False
    assert_results(results, *expected_cache(q, k, v, [100], lambda *_: mask))


def test_pages_that_do_not_exist_hide_their_keys():
    check_corrupt_table()


RANGES = [(0, 5, 0, 9, 8), (-1, 1, 0, 9, 8), (0, 1, -1, 9, 8), (0, 1, 60, 9, 8), (0, 1, 0, -7, 0)]


@pytest.mark.parametrize("wrong", RANGES)
def test_ranges_out_of_bounds_are_empty(wrong):
    q, k, v = random_cache([64, 64], 1)
    ranges = torch.tensor([wrong, (0, 1, 0, 64, 63)], dtype=torch.int32)
    index = SparseIndex.dense(1, 64, block_m=1)
    for out, lse in operator_call(q, k, v, index, ranges):
        assert not bool(out[0].any()) and bool((lse[0] == -math.inf).all()) and bool(out[1].any())


# --- seeded faults ---

FAULTS = {
    "rescaling forgotten": (6, decode(kinds=("dense",), magnitude=4.0)),
    "no wait for a copy": (21, decode(kinds=("dense",))),
    "no barrier": (22, decode(kinds=("dense",))),
    "no barrier behind the plan of runs": (
        36,
        decode(17500, heads=1, heads_kv=1, kinds=("dense",)),
    ),
    "a split lost": (23, decode(kinds=("dense",))),
    "warps met with a stale maximum": (26, decode(kinds=("dense",))),
    "mask bits not looked at": (28, decode(kinds=("blocks",), bits=1.0)),
    "a key past the tail": (29, decode(seqlen_q=3, block_m=16, kinds=("dense",))),
    "wrong map of grouped heads": (30, decode(kinds=("dense",))),
    "the sink in every split": (32, decode(kinds=("dense",), sinks=True)),
    "a stale maximum in the merge": (33, decode(600, magnitude=400.0, kinds=("dense",))),
    "splits not weighted": (34, decode(kinds=("dense",), magnitude=4.0)),
}


def caught(call) -> bool:
    try:
        call()
    except (RuntimeError, AssertionError):
        return True
    return False


@pytest.mark.parametrize("name", FAULTS)
def test_a_seeded_fault_is_caught(name):
    """And the same build passes where no fault is seeded."""
    number, case = FAULTS[name]
    check(case, fault=-1, seeds=(0,))
    assert caught(lambda: check(case, fault=number))


def test_a_page_of_another_sequence_is_caught():
    lengths = [60, 90]
    q, k, v = random_cache(lengths, 1)
    k_cache, v_cache, table = paged(k, v, lengths, 16)
    call = {"cache_seqlens": torch.tensor(lengths).int(), "block_table": table}

    def check_pages():
        results = run("attention_decode", q, k_cache, v_cache, return_lse=True, fault=24, **call)
        assert_results(results, *expected_cache(q, k, v, lengths))

    assert caught(check_pages)


def test_pages_and_keys_without_bounds_are_caught():
    with pytest.raises(RuntimeError, match=r"bounds|past the end|outside"):
        check_corrupt_table(fault=14)
    q, k = torch.ones(1, 1, 1, 64, dtype=BF16), torch.ones(1, 1, 129, 64, dtype=BF16)
    with pytest.raises(RuntimeError, match=r"bounds|past the end|outside"):
        run("attention", q, k, k, corrupt("block_indices", 1, 100000), seeds=(0,), fault=7)
