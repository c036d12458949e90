# SPDX-License-Identifier: Apache-2.0
"""Random problems for the kernels, and the comparison of a kernel with the oracle.

A `Case` is plain numbers; `build` makes tensors and a random SparseIndex of it, `check` runs it on
every instruction set of this CPU, on one thread and on two, and compares.
"""

import platform
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import pytest
import torch
from bounds import assert_matches_oracle, plain_attention
from torch import Tensor

import sparse_attn
from sparse_attn import HeadKind, SparseIndex, ops, reference

X86 = ("avx512_bf16", "avx512", "avx2", "scalar")
CAPABILITIES = ("neon", "scalar") if platform.machine() == "aarch64" else X86
CAPABILITY_VARIABLE = "SPARSE_ATTN_CPU_CAPABILITY"

# What stands in spare list capacity: a kernel that reads it fails.
_GARBAGE = 2**31 - 1


@dataclass(frozen=True)
class Case:
    """One call of attention with a random index.

    Attributes:
        kinds: kinds of the index's heads, repeated as often as needed: "dense", "streaming",
            "blocks", "columns", "listed" (both), "empty" (listed, no entries).
        index_heads: 1, "kv" or "all".
        index_batch: 1 or the batch.
        fill: how likely a block is listed after another.
        bias: None, "finite", "large" (up to 1e3) or "-inf" (some columns hidden).
        bits: share of blocks that carry row bits.
        layout: see `_laid_out`.
        magnitude: factor of q.
    """

    seqlen_q: int = 65
    seqlen_k: int = 129
    batch: int = 1
    heads: int = 6
    heads_kv: int = 6
    head_dim: int = 16
    head_dim_v: int = 24
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    causal: bool = True
    q_offset: int | None = None
    softcap: float | None = None
    softmax_scale: float | None = None
    sinks: bool = False
    magnitude: float = 1.0
    kinds: tuple[str, ...] = ("dense", "streaming", "listed")
    index_heads: int | str = "all"
    index_batch: int = 1
    block_m: int = 64
    block_n: int = 64
    fill: float = 0.5
    bias: str | None = None
    bits: float = 0.0
    seed: int = 0


@dataclass
class Problem:
    """Tensors of a case."""

    q: Tensor
    k: Tensor
    v: Tensor
    index: SparseIndex
    kwargs: dict = field(default_factory=dict)


# -------------------------------------------------------------------- instruction sets


@lru_cache
def missing_capability(name: str) -> str | None:
    """Why this CPU cannot run an instruction set; None if it can."""
    with forced_capability(name):
        try:
            assert ops.cpu_capability() == name
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return None


def capabilities() -> list[str]:
    """The instruction sets that this CPU runs."""
    return [name for name in CAPABILITIES if missing_capability(name) is None]


@contextmanager
def forced_capability(name: str) -> Iterator[None]:
    """Runs kernels of one instruction set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CAPABILITY_VARIABLE, name)
        yield


# -------------------------------------------------------------------- random indexes


def make_index(
    seqlen_q: int,
    seqlen_k: int,
    *,
    kinds: Sequence[str],
    batch: int = 1,
    block_m: int = 64,
    block_n: int = 64,
    fill: float = 0.5,
    bias: str | None = None,
    bits: float = 0.0,
    seed: int = 0,
) -> SparseIndex:
    """A random valid index with one head per entry of `kinds` (see `Case`).

    Blocks start anywhere, the last one may run past the keys, and there is spare capacity full of
    garbage before, between and after the lists.
    """
    rng = random.Random(seed)
    tiles = -(-seqlen_q // block_m)
    heads = torch.tensor([_head_row(rng, kind, seqlen_q, seqlen_k) for kind in kinds])
    blocks, columns = [_GARBAGE], [_GARBAGE]
    block_indptr = torch.zeros(batch, len(kinds), tiles + 1, dtype=torch.int64)
    column_indptr = torch.zeros_like(block_indptr)
    for b in range(batch):
        for h, kind in enumerate(kinds):
            block_indptr[b, h, 0], column_indptr[b, h, 0] = len(blocks), len(columns)
            for t in range(tiles):
                starts = []
                if kind in ("blocks", "listed"):
                    starts = _random_blocks(rng, seqlen_k, block_n, fill)
                    blocks += starts
                if kind in ("columns", "listed"):
                    columns += _random_columns(rng, seqlen_k, block_n, starts)
                block_indptr[b, h, t + 1], column_indptr[b, h, t + 1] = len(blocks), len(columns)
            blocks.append(-_GARBAGE)
            columns.append(-_GARBAGE)
    generator = torch.Generator().manual_seed(seed)
    index = SparseIndex(
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        block_m=block_m,
        block_n=block_n,
        heads=heads.int(),
        block_indptr=block_indptr,
        block_indices=torch.tensor(blocks, dtype=torch.int32),
        column_indptr=column_indptr,
        column_indices=torch.tensor(columns, dtype=torch.int32),
        column_bias=None if bias is None else _random_bias(len(columns), bias, generator),
        **(_random_bits(len(blocks), bits, block_m, block_n, generator) if bits else {}),
    )
    return index.validate()


def _head_row(rng: random.Random, kind: str, seqlen_q: int, seqlen_k: int) -> list[int]:
    if kind == "dense":
        return [HeadKind.DENSE, 0, 0, 0]
    if kind == "streaming":
        sink = rng.choice([0, 1, 5, 70, seqlen_k + 3])
        window = rng.choice([0, 1, 2, 33, 64, 100, seqlen_k + 3])
        dense_tail = rng.choice([0, 0, 1, 20, seqlen_q + 3])
        return [HeadKind.STREAMING, min(sink, 70), window, dense_tail]
    return [HeadKind.LISTED, 0, 0, 0]


def _random_blocks(rng: random.Random, seqlen_k: int, block_n: int, fill: float) -> list[int]:
    starts, key = [], rng.randrange(block_n) if rng.random() < 0.7 else 0
    while key < seqlen_k:
        if rng.random() < fill:
            starts.append(key)
            key += block_n
        else:
            key += rng.randint(1, 2 * block_n)
    return starts


def _random_columns(
    rng: random.Random, seqlen_k: int, block_n: int, starts: Sequence[int]
) -> list[int]:
    count = rng.choice([0, 1, 3, 20, 70, 200])
    keys = rng.sample(range(seqlen_k), min(count, seqlen_k))
    inside = {key for start in starts for key in range(start, start + block_n)}
    return sorted(set(keys) - inside)


def _random_bias(count: int, kind: str, generator: torch.Generator) -> Tensor:
    bias = torch.randn(count, generator=generator) * (300.0 if kind == "large" else 2.0)
    if kind == "-inf":
        bias[torch.rand(count, generator=generator) < 0.4] = -torch.inf
    return bias


def _random_bits(
    count: int, share: float, block_m: int, block_n: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Three random masks (garbage in the bits past block_m), an empty one and a full one."""
    words = -(-block_m // 64)
    masks = torch.randint(-(2**63), 2**63 - 1, (5, block_n, words), generator=generator)
    masks[3], masks[4] = 0, -1
    ids = torch.randint(0, 5, (count,), generator=generator)
    ids[torch.rand(count, generator=generator) >= share] = -1
    return {"block_bits_ids": ids.int(), "block_bits": masks}


def dense_bias(index: SparseIndex) -> Tensor | None:
    """The column biases as a matrix float64 [batch, heads, seqlen_q, seqlen_k]."""
    if index.column_bias is None:
        return None
    shape = (index.batch_size, index.num_heads, index.seqlen_q, index.seqlen_k)
    bias = torch.zeros(shape, dtype=torch.float64)
    for b in range(index.batch_size):
        for h in range(index.num_heads):
            indptr = index.column_indptr[b, h].tolist()
            for t in range(index.num_tiles):
                entries = slice(indptr[t], indptr[t + 1])
                rows = slice(t * index.block_m, (t + 1) * index.block_m)
                keys = index.column_indices[entries].long()
                bias[b, h, rows, keys] = index.column_bias[entries].double()
    return bias


# -------------------------------------------------------------------- tensors


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """A [batch, heads, seqlen, dim] tensor of the same values in another memory layout.

    contiguous; transposed: [batch, seqlen, heads, dim] in memory; gaps: every second element of
    the outer axes and a middle piece of the last, NaN in between.
    """
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "gaps":
        b, h, s, d = x.shape
        room = x.new_full((2 * b, 2 * h, 2 * s, d + 11), torch.nan)
        view = room[::2, 1::2, ::2, 3 : 3 + d]
        view.copy_(x)
        return view
    return x


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v of a case; "expanded" shares one k and v between batch and heads."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q = normal(case.batch, case.heads, case.seqlen_q, case.head_dim) * case.magnitude
    if case.layout == "expanded":
        k = normal(1, 1, case.seqlen_k, case.head_dim).to(case.dtype)
        v = normal(1, 1, case.seqlen_k, case.head_dim_v).to(case.dtype)
        outer = (case.batch, case.heads_kv)
        return q.to(case.dtype), k.expand(*outer, -1, -1), v.expand(*outer, -1, -1)
    k = normal(case.batch, case.heads_kv, case.seqlen_k, case.head_dim)
    v = normal(case.batch, case.heads_kv, case.seqlen_k, case.head_dim_v)
    q, k, v = (_laid_out(x.to(case.dtype), case.layout) for x in (q, k, v))
    return q, k, v


def build(case: Case) -> Problem:
    """The tensors, the index and the keyword arguments of a case."""
    q, k, v = tensors(case)
    count = {"kv": case.heads_kv, "all": case.heads}.get(case.index_heads, 1)
    index = make_index(
        case.seqlen_q,
        case.seqlen_k,
        kinds=[case.kinds[h % len(case.kinds)] for h in range(count)],
        batch=case.index_batch,
        block_m=case.block_m,
        block_n=case.block_n,
        fill=case.fill,
        bias=case.bias,
        bits=case.bits,
        seed=case.seed,
    )
    kwargs = {
        "causal": case.causal,
        "q_offset": case.q_offset,
        "softcap": case.softcap,
        "softmax_scale": case.softmax_scale,
        "sinks": torch.linspace(-2.0, 3.0, case.heads) if case.sinks else None,
    }
    return Problem(q, k, v, index, kwargs)


# -------------------------------------------------------------------- comparison

Result = tuple[Tensor, Tensor]


def expected(problem: Problem) -> tuple[Result, Result]:
    """(out, lse) of the oracle in fp64 and of plain torch in the precision of the inputs."""
    index, num_heads = problem.index, problem.q.shape[1]
    group = num_heads // index.num_heads
    mask = index.to_dense_mask(problem.kwargs.get("q_offset")).repeat_interleave(group, 1)
    bias = dense_bias(index)
    if bias is not None:
        bias = bias.repeat_interleave(group, 1)
    args = (problem.q, problem.k, problem.v, mask)
    oracle = reference.attention(*args, bias=bias, **problem.kwargs)
    plain = plain_attention(*args, bias, **problem.kwargs)
    return oracle, plain


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two results are equal to the last bit."""
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def compare(run: Callable[[], Result], oracle: Result, plain: Result, label: str = "") -> None:
    """Runs a call on every instruction set, on 1 and 2 threads, and compares out and lse."""
    results: dict[int, list[Result]] = {1: [], 2: []}
    for threads, of_threads in results.items():
        torch.set_num_threads(threads)
        for name in capabilities():
            with forced_capability(name):
                of_threads.append(run())
    for name, (out, lse), (out2, lse2) in zip(capabilities(), results[1], results[2], strict=True):
        where = f"{label} on {name}".strip()
        assert same_bits(out, out2) and same_bits(lse, lse2), f"{where}: 2 threads differ from 1"
        assert_matches_oracle(out, oracle[0], plain[0], name=f"out {where}")
        assert_matches_oracle(lse, oracle[1], plain[1], name=f"lse {where}")


def check(case: Case) -> None:
    """Compares the kernels with the oracle on a case."""
    problem = build(case)
    oracle, plain = expected(problem)
    compare(
        lambda: sparse_attn.attention(
            problem.q, problem.k, problem.v, problem.index, return_lse=True, **problem.kwargs
        ),
        oracle,
        plain,
    )
