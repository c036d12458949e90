# SPDX-License-Identifier: Apache-2.0
"""Gradients of q, k, v and sinks against autograd through the fp64 oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from bounds import assert_matches_oracle, plain_attention
from cases import CAPABILITIES
from torch import Tensor

import sparse_attn
from sparse_attn import AShape, SparseIndex, UnsupportedError, ops, reference
from sparse_attn.attention import attention_ranges

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("dq", "dk", "dv", "dsinks")


@dataclass(frozen=True)
class Case:
    """A problem, in small numbers; `name` is what the test is called."""

    name: str
    pattern: str = "dense"  # dense, streaming or listed
    batch: int = 1
    heads: int = 4
    heads_kv: int = 2
    seqlen_q: int = 37
    seqlen_k: int = 53
    head_dim: int = 16
    head_dim_v: int = 16
    block_m: int = 16
    block_n: int = 8
    bias: bool = False
    bits: bool = False
    causal: bool = True
    q_offset: int | None = None
    softmax_scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    layout: str = "bhsd"


CASES = [
    Case("dense"),
    Case("dense-full", causal=False, batch=2),
    Case("dense-mha", heads=2, heads_kv=2),
    Case("dense-group3", heads=6, heads_kv=2),
    Case("dense-group4", heads=8, heads_kv=2, head_dim=24),
    Case("dense-dims", head_dim=40, head_dim_v=72, seqlen_q=19),
    Case("dense-wide", head_dim=512, head_dim_v=320, seqlen_q=19),
    Case("dense-long", seqlen_q=150, seqlen_k=301, head_dim=64, head_dim_v=64, heads=2),
    # Enough tiles for the keys' gradients to be added up from several parts.
    Case("dense-parts", seqlen_q=1000, seqlen_k=1050, heads_kv=1),
    Case("blocks-parts", "listed", seqlen_q=530, seqlen_k=500, heads=2, heads_kv=1),
    Case("dense-square", seqlen_q=65, seqlen_k=65, batch=2),
    Case("dense-one-row", seqlen_q=1, seqlen_k=67),
    Case("dense-one-key", seqlen_q=5, seqlen_k=1, causal=False),
    # Rows 0 to 19 stand before the first key: they see none, and their gradients are zero.
    Case("dense-empty-rows", seqlen_q=40, seqlen_k=20),
    Case("dense-offset", q_offset=3),
    Case("dense-past-the-end", q_offset=60),
    Case("dense-softcap", softcap=2.0, softmax_scale=0.7),
    # With a number per head, dsinks needs many heads for its largest error not to be luck.
    Case("dense-sinks", sinks=True, batch=2, heads=16),
    Case("dense-sinks-empty-rows", sinks=True, q_offset=-11, heads=16),
    Case("dense-bshd", layout="bshd", batch=2),
    Case("dense-padded", layout="padded", batch=2),
    Case("streaming", "streaming", seqlen_q=70, seqlen_k=90),
    Case("streaming-full", "streaming", causal=False, softcap=3.0, batch=2),
    Case("streaming-sinks", "streaming", sinks=True, q_offset=-5, heads=16),
    Case("blocks", "listed", batch=2),
    Case("blocks-full", "listed", causal=False, heads=6, heads_kv=2),
    Case("blocks-64", "listed", block_m=64, block_n=64, seqlen_q=150, seqlen_k=300, heads=2),
    Case("blocks-row-tiles", "listed", block_m=1, seqlen_q=9, heads_kv=1),
    Case("bias", "listed", bias=True, batch=2),
    Case("bias-softcap-sinks", "listed", bias=True, softcap=2.0, sinks=True, heads=16),
    Case("bits", "listed", bits=True, causal=False),
    Case("bits-bias", "listed", bits=True, bias=True, block_m=80, seqlen_q=101, layout="bshd"),
    Case(
        "everything",
        "listed",
        heads=16,
        head_dim_v=40,
        bits=True,
        bias=True,
        sinks=True,
        softcap=2.0,
    ),
]
CORE = [
    case
    for case in CASES
    if case.name in ("dense-group3", "dense-dims", "streaming-full", "everything")
]


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@dataclass(frozen=True)
class Problem:
    """A case with its numbers.

    `mask` and `bias` are dense, or None. The gradients that come in, `grad_out` and `grad_lse`,
    are as random as the inputs.
    """

    case: Case
    inputs: tuple[Tensor, ...]  # q, k, v and perhaps sinks
    grad_out: Tensor
    grad_lse: Tensor
    index: SparseIndex
    mask: Tensor | None
    bias: Tensor | None

    @property
    def settings(self) -> dict:
        case = self.case
        return {
            "causal": case.causal,
            "q_offset": case.q_offset,
            "softmax_scale": case.softmax_scale,
            "softcap": case.softcap,
        }


def random_lists(case: Case, gen: torch.Generator) -> tuple[SparseIndex, Tensor, Tensor | None]:
    """An index with lists, and the mask and bias [batch, heads, rows, keys] that it stands for.

    Blocks start anywhere, some tiles have no entry at all, and one has blocks alone.
    """

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=gen))

    tiles = math.ceil(case.seqlen_q / case.block_m)
    shape = (case.batch, case.heads, tiles * case.block_m, case.seqlen_k + case.block_n)
    mask, bias = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
    masks = torch.rand(3, case.block_n, case.block_m, generator=gen) < 0.6
    starts, ids, columns, biases = [], [], [], []
    block_ends, column_ends = [], []
    for row in range(case.batch * case.heads * tiles):
        b, h, t = row // (case.heads * tiles), row // tiles % case.heads, row % tiles
        tile = slice(t * case.block_m, (t + 1) * case.block_m)
        free = torch.ones(case.seqlen_k, dtype=torch.bool)
        empty = row % 5 == 3
        start = case.seqlen_k if empty else draw(0, case.block_n)
        while start < case.seqlen_k:
            keys = slice(start, start + case.block_n)
            which = draw(-1, 3) if case.bits else -1
            mask[b, h, tile, keys] = True if which < 0 else masks[which].T
            free[keys] = False
            starts.append(start)
            ids.append(which)
            start += case.block_n + draw(0, 2 * case.block_n)
        chosen = free & (torch.rand(case.seqlen_k, generator=gen) < 0.2)
        for key in [] if empty or row % 7 == 2 else chosen.nonzero().flatten().tolist():
            value = float(torch.randn((), generator=gen))
            mask[b, h, tile, key] = True
            bias[b, h, tile, key] = value
            columns.append(key)
            biases.append(value)
        block_ends.append(len(starts))
        column_ends.append(len(columns))

    def indptr(ends: list[int]) -> Tensor:
        begins = torch.tensor([0, *ends]).unfold(0, tiles + 1, tiles)
        return begins.reshape(case.batch, case.heads, tiles + 1).contiguous()

    # Bit r of word w is row 64 * w + r; 2 ** 63 wraps to the sign bit, as it should.
    words = math.ceil(case.block_m / 64)
    bits = torch.zeros(3, case.block_n, words, dtype=torch.int64)
    for r in range(case.block_m):
        bits[:, :, r // 64] |= masks[:, :, r].long() << (r % 64)
    index = SparseIndex.from_lists(
        seqlen_q=case.seqlen_q,
        seqlen_k=case.seqlen_k,
        block_m=case.block_m,
        block_n=case.block_n,
        block_indptr=indptr(block_ends),
        block_indices=torch.tensor(starts, dtype=torch.int32),
        column_indptr=indptr(column_ends),
        column_indices=torch.tensor(columns, dtype=torch.int32),
        column_bias=torch.tensor(biases) if case.bias else None,
        block_bits_ids=torch.tensor(ids, dtype=torch.int32) if case.bits else None,
        block_bits=bits if case.bits else None,
    ).validate()
    inside = (..., slice(case.seqlen_q), slice(case.seqlen_k))
    return index, mask[inside], bias[inside] if case.bias else None


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with the strides of another layout."""
    if layout == "bshd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "padded":  # rows of a wider tensor
        return torch.cat((x, x), dim=-1)[..., : x.shape[-1]]
    return x


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> Problem:
    gen = torch.Generator().manual_seed(seed)

    def rows(heads: int, seqlen: int, dim: int) -> Tensor:
        x = torch.randn(case.batch, heads, seqlen, dim, generator=gen)
        return laid_out(x.to(dtype), case.layout)

    q = rows(case.heads, case.seqlen_q, case.head_dim)
    k = rows(case.heads_kv, case.seqlen_k, case.head_dim)
    v = rows(case.heads_kv, case.seqlen_k, case.head_dim_v)
    grad_out = rows(case.heads, case.seqlen_q, case.head_dim_v)
    grad_lse = torch.randn(case.batch, case.heads, case.seqlen_q, generator=gen)
    sinks = (torch.randn(case.heads, generator=gen),) if case.sinks else ()
    mask = bias = None
    lengths = (case.seqlen_q, case.seqlen_k)
    if case.pattern == "dense":
        index = SparseIndex.dense(*lengths)
    elif case.pattern == "streaming":
        rule = {"sink": 3, "window": 11, "dense_tail": 4}
        index = SparseIndex.streaming(*lengths, **rule)
        mask = reference.streaming_mask(*lengths, **rule, q_offset=case.q_offset)
    else:
        index, mask, bias = random_lists(case, gen)
    return Problem(case, (q, k, v, *sinks), grad_out, grad_lse, index, mask, bias)


def leaves(inputs: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Differentiable views on the inputs (strides kept), or copies in another dtype."""
    return [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]


def pulled_back(
    results: tuple[Tensor, Tensor], inputs: list[Tensor], problem: Problem
) -> tuple[Tensor, ...]:
    """Gradients of <out, grad_out> + <lse, grad_lse>, which for an empty row's lse is nothing."""
    out, lse = results
    grads = (problem.grad_out.to(out.dtype), problem.grad_lse.to(lse.dtype))
    return torch.autograd.grad((out, lse), inputs, grads)


def kernel_gradients(problem: Problem, pattern=None, **more) -> tuple[Tensor, ...]:
    inputs = leaves(problem.inputs)
    results = sparse_attn.attention(
        *inputs[:3],
        problem.index if pattern is None else pattern,
        sinks=inputs[3] if len(inputs) > 3 else None,
        return_lse=True,
        **problem.settings,
        **more,
    )
    return pulled_back(results, inputs, problem)


def expected_gradients(function, problem: Problem, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    inputs = leaves(problem.inputs, dtype)
    results = function(
        *inputs[:3],
        problem.mask,
        bias=problem.bias,
        sinks=inputs[3] if len(inputs) > 3 else None,
        **problem.settings,
    )
    return pulled_back(results, inputs, problem)


def check(problem: Problem) -> None:
    actual = kernel_gradients(problem)
    oracle = expected_gradients(reference.attention, problem, torch.float64)
    plain = expected_gradients(plain_attention, problem, None)
    for x, given in zip(actual, problem.inputs, strict=True):
        assert x.dtype == given.dtype and x.shape == given.shape
    assert_gradients(actual, oracle, plain)


def assert_gradients(
    actual: tuple[Tensor, ...], oracle: tuple[Tensor, ...], plain: tuple[Tensor, ...]
) -> None:
    """Each within its bound, in the unit of rounding of q.

    That matters to dsinks alone: float32, but a sum over numbers that were rounded as q is.
    """
    for name, x, o, p in zip(NAMES, actual, oracle, plain, strict=False):
        assert_matches_oracle(x.to(actual[0].dtype), o, p, name=name)


# --- against the oracle ---------------------------------------------------------------------------


@each(CASES)
@each_dtype
def test_gradients_match_the_oracle(case, dtype):
    check(make(case, dtype))


@each(CORE)
@each_dtype
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_gradients_on_every_instruction_set(case, dtype, capability, monkeypatch):
    monkeypatch.setenv("SPARSE_ATTN_CPU_CAPABILITY", capability)
    try:
        assert ops.cpu_capability() == capability
    except RuntimeError as error:
        pytest.skip(f"not on this machine: {error}")
    check(make(case, dtype))


def test_the_bound_sees_a_wrong_gradient():
    """A kernel that forgot the gradient of lse, or of one key, is outside of the bound."""
    problem = make(CASES[0], torch.float32)
    oracle = expected_gradients(reference.attention, problem, torch.float64)
    plain = expected_gradients(plain_attention, problem, None)
    no_lse = replace(problem, grad_lse=torch.zeros_like(problem.grad_lse))
    one_key_less = kernel_gradients(problem)[1].clone()
    one_key_less[:, :, 7] = 0
    for wrong, which in ((kernel_gradients(no_lse)[0], 0), (one_key_less, 1)):
        with pytest.raises(AssertionError, match="above the bound"):
            assert_matches_oracle(wrong, oracle[which], plain[which])


@each_dtype
def test_rows_without_keys_have_no_gradient(dtype):
    """Gradients stay finite, and what an empty row is given goes nowhere."""
    case = Case("empty", "listed", seqlen_q=40, seqlen_k=20)
    problem = make(case, dtype)
    out, lse = sparse_attn.attention(
        *problem.inputs, problem.index, return_lse=True, **problem.settings
    )
    empty = lse == -math.inf
    assert bool(empty.any()) and not bool(empty.all())
    assert not bool(out[empty].any())
    before = kernel_gradients(problem)
    assert all(bool(x.isfinite().all()) for x in before)
    assert not bool(before[0][empty].any())
    grad_out = problem.grad_out.masked_fill(empty[..., None], 100.0)
    grad_lse = problem.grad_lse.masked_fill(empty, -100.0)
    after = kernel_gradients(replace(problem, grad_out=grad_out, grad_lse=grad_lse))
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("seqlens", [(0, 7), (5, 0)], ids=["no_rows", "no_keys"])
def test_empty_tensors_have_zero_gradients(seqlens):
    case = Case("empty", seqlen_q=seqlens[0], seqlen_k=seqlens[1])
    for x, given in zip(kernel_gradients(make(case, torch.float32)), (0, 1, 2), strict=True):
        assert not bool(x.any()), given


@each_dtype
def test_a_key_that_no_row_sees_has_no_gradient(dtype):
    problem = make(Case("dense", seqlen_q=9, seqlen_k=40, q_offset=4), dtype)
    _, dk, dv = kernel_gradients(problem)
    assert not bool(dk[:, :, 13:].any()) and not bool(dv[:, :, 13:].any())
    assert bool(dk[:, :, 12].any()) and bool(dv[:, :, 12].any())


# --- what comes in from autograd ------------------------------------------------------------------


def test_gradients_of_out_alone_and_of_lse_alone():
    """The gradients are linear in the two that come in, and either may be missing."""
    problem = make(Case("listed", "listed", bias=True, sinks=True), torch.float32)
    inputs = leaves(problem.inputs)
    out, lse = sparse_attn.attention(
        *inputs[:3], problem.index, sinks=inputs[3], return_lse=True, **problem.settings
    )
    of_out = torch.autograd.grad(out, inputs, problem.grad_out, retain_graph=True)
    of_lse = torch.autograd.grad(lse, inputs, problem.grad_lse)
    zero_lse = replace(problem, grad_lse=torch.zeros_like(problem.grad_lse))
    zero_out = replace(problem, grad_out=torch.zeros_like(problem.grad_out))
    for of_one, other in ((of_out, zero_lse), (of_lse, zero_out)):
        for x, y in zip(of_one, kernel_gradients(other), strict=True):
            assert torch.equal(x, y)
    assert not bool(of_lse[2].any())  # lse does not depend on v


GRAD_OUTS = {
    "expanded": lambda g: g.new_tensor(0.5).expand_as(g),
    "expanded_rows": lambda g: g[:, :, :1].expand_as(g),
    "last_dim_strided": lambda g: torch.stack((g, g), dim=-1)[..., 0],
    "transposed": lambda g: laid_out(g, "bshd"),
    "head_dim_first": lambda g: g.transpose(2, 3).contiguous().transpose(2, 3),
    "padded": lambda g: laid_out(g, "padded"),
}


@pytest.mark.parametrize("form", GRAD_OUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_grad_out_with_any_strides(form, dtype):
    problem = make(Case("dense", batch=2), dtype)
    grad_out = GRAD_OUTS[form](problem.grad_out)
    strided = kernel_gradients(replace(problem, grad_out=grad_out))
    dense = kernel_gradients(replace(problem, grad_out=grad_out.contiguous()))
    assert all(torch.equal(x, y) for x, y in zip(strided, dense, strict=True))


def test_backward_of_a_sum():
    problem = make(CASES[0], torch.float32)
    q, k, v = leaves(problem.inputs)
    sparse_attn.attention(q, k, v).sum().backward()
    ones, zeros = torch.ones_like(problem.grad_out), torch.zeros_like(problem.grad_lse)
    expected = kernel_gradients(replace(problem, grad_out=ones, grad_lse=zeros), "dense")
    for x, y in zip((q, k, v), expected, strict=True):
        assert torch.equal(x.grad, y)


@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "sinks"])
def test_one_gradient_alone(which):
    problem = make(Case("dense", sinks=True), torch.float32)
    inputs = [x.detach().clone() for x in problem.inputs]
    inputs[which].requires_grad_()
    out, lse = sparse_attn.attention(*inputs[:3], sinks=inputs[3], return_lse=True)
    (x,) = torch.autograd.grad((out, lse), inputs[which], (problem.grad_out, problem.grad_lse))
    assert torch.equal(x, kernel_gradients(problem)[which])


def test_one_tensor_as_k_and_v():
    """Gradients of an input that is used twice add up."""
    problem = make(CASES[0], torch.float32)
    q, k, _ = leaves(problem.inputs)
    sparse_attn.attention(q, k, k).backward(problem.grad_out)
    twice = replace(
        problem,
        inputs=(problem.inputs[0], problem.inputs[1], problem.inputs[1]),
        grad_lse=torch.zeros_like(problem.grad_lse),
    )
    _, dk, dv = kernel_gradients(twice)
    assert torch.equal(k.grad, dk + dv)


def test_gradients_have_the_layout_of_their_inputs():
    problem = make(Case("dense", layout="bshd", batch=2), torch.bfloat16)
    for x, given in zip(kernel_gradients(problem), problem.inputs, strict=True):
        assert x.stride() == given.stride()


def test_no_gradient_is_recorded_where_none_is_asked_for():
    q, k, v = make(CASES[0], torch.float32).inputs
    assert not sparse_attn.attention(q, k, v).requires_grad
    with torch.no_grad():
        assert not sparse_attn.attention(q.clone().requires_grad_(), k, v).requires_grad


# --- several sequences ----------------------------------------------------------------------------

LENS_Q, LENS_K = (19, 0, 33, 1, 7), (25, 4, 33, 18, 3)


@pytest.mark.parametrize(
    "pattern",
    ["dense", AShape(sink=2, window=6), AShape(sink=2, window=6, dense_tail=1)],
    ids=["dense", "a_shape", "tri_shape"],
)
@each_dtype
def test_varlen_gradients_match_the_oracle(pattern, dtype):
    """The last sequence has fewer keys than rows: four of its rows see none."""
    gen = torch.Generator().manual_seed(0)
    heads, total_q, total_k = 16, sum(LENS_Q), sum(LENS_K)
    shapes = ((total_q, heads, 16), (total_k, heads // 2, 16), (total_k, heads // 2, 24))
    given = tuple(torch.randn(shape, generator=gen).to(dtype) for shape in shapes)
    sinks = torch.randn(heads, generator=gen)
    grad_out = torch.randn(total_q, heads, 24, generator=gen).to(dtype)
    grad_lse = torch.randn(heads, total_q, generator=gen)
    cu_q, cu_k = (
        torch.tensor([0, *lens]).cumsum(0, dtype=torch.int32) for lens in (LENS_Q, LENS_K)
    )
    masks = None
    if pattern != "dense":
        lengths = zip(LENS_Q, LENS_K, strict=True)
        masks = [
            reference.streaming_mask(*both, pattern.sink, pattern.window, pattern.dense_tail)
            for both in lengths
        ]

    def plain(q, k, v, sinks):
        parts = []
        for s in range(len(LENS_Q)):
            rows, keys = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
            packed = (x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
            parts.append(plain_attention(*packed, masks and masks[s], sinks=sinks))
        out = torch.cat([out[0].transpose(0, 1) for out, _ in parts])
        return out, torch.cat([lse[0] for _, lse in parts], dim=1)

    def pull(function, dtype=None):
        inputs = leaves((*given, sinks), dtype)
        out, lse = function(*inputs)
        return torch.autograd.grad((out, lse), inputs, (grad_out.to(out), grad_lse.to(lse)))

    actual = pull(
        lambda q, k, v, sinks: sparse_attn.attention_varlen(
            q, k, v, cu_q, cu_k, 33, 33, pattern, sinks=sinks, return_lse=True
        )
    )
    oracle = pull(
        lambda q, k, v, sinks: reference.attention_varlen(q, k, v, cu_q, cu_k, masks, sinks=sinks),
        torch.float64,
    )
    assert_gradients(actual, oracle, pull(plain))


@each_dtype
def test_padded_batch_gradients_match_the_oracle(dtype):
    """Rows and keys outside every range take part in nothing: their gradients are zero."""
    problem = make(Case("dense", batch=2), dtype)
    ranges = torch.tensor([[0, 37, 0, 53, 16], [4, 20, 9, 31, 11]], dtype=torch.int32)

    def by_sequence(function):
        def run(q, k, v):
            out = q.new_zeros(*q.shape[:3], v.shape[3])
            lse = q.new_zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
            for b, (q_start, q_len, k_start, k_len, offset) in enumerate(ranges.tolist()):
                r, c = slice(q_start, q_start + q_len), slice(k_start, k_start + k_len)
                one = slice(b, b + 1)
                out[one, :, r], lse[one, :, r] = function(
                    q[one, :, r], k[one, :, c], v[one, :, c], q_offset=offset
                )
            return out, lse

        return run

    def pull(function, dtype=None):
        inputs = leaves(problem.inputs, dtype)
        return pulled_back(function(*inputs), inputs, problem)

    actual = pull(lambda q, k, v: attention_ranges(q, k, v, "dense", ranges, return_lse=True))
    oracle = pull(by_sequence(reference.attention), torch.float64)
    assert_gradients(actual, oracle, pull(by_sequence(plain_attention)))
    assert not bool(actual[0][1, :, :4].any()) and not bool(actual[1][1, :, 40:].any())


def test_sequences_that_share_keys_have_no_gradient():
    """Forward, a prefix may be shared; two gradients of one key would overwrite each other."""
    q, k, v = leaves(make(Case("dense", seqlen_q=20), torch.float32).inputs)
    ranges = torch.tensor([[0, 10, 0, 30, 20], [10, 10, 20, 33, 23]], dtype=torch.int32)
    out = attention_ranges(q, k, v, "dense", ranges)
    with pytest.raises(RuntimeError, match="overlap in k at token 20"):
        out.sum().backward()


# --- the same numbers every time ------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["dense", "listed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bit_identical_on_any_number_of_threads(pattern, dtype):
    case = Case("threads", pattern, batch=2, heads=6, seqlen_q=700, seqlen_k=760, block_m=32)
    problem = make(replace(case, bias=pattern == "listed", sinks=True), dtype)
    torch.set_num_threads(1)
    one = kernel_gradients(problem)
    torch.set_num_threads(2)
    for _ in range(3):
        two = kernel_gradients(problem)
        assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


# --- torch's own checks ---------------------------------------------------------------------------

# The kernels compute in float32, so a difference quotient is as good as its step allows: rounding
# costs about 2 ** -24 * |loss| / step and truncation step ** 2 / 6 times a third derivative. With
# sums of a few hundred terms of size 1 the two meet near step 1e-2, at 1e-4 to 1e-3 each.
GRADCHECK = {"eps": 1e-2, "atol": 2e-3, "rtol": 1e-2}


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double precision")
@pytest.mark.parametrize(
    "case",
    [
        Case("dense", seqlen_q=5, seqlen_k=7, heads=2, heads_kv=1, head_dim=8, head_dim_v=8),
        Case("sinks", seqlen_q=4, seqlen_k=3, heads=1, heads_kv=1, head_dim=8, sinks=True),
        Case("listed", "listed", seqlen_q=4, seqlen_k=20, heads=1, heads_kv=1, head_dim=8,
             bits=True, bias=True, softcap=2.0, head_dim_v=8),
    ],
    ids=lambda case: case.name,
)  # fmt: skip
def test_gradcheck(case):
    problem = make(case, torch.float32)

    def call(q, k, v, sinks=None):
        out, lse = sparse_attn.attention(
            q, k, v, problem.index, sinks=sinks, return_lse=True, **problem.settings
        )
        return out, torch.where(lse == -math.inf, 0.0, lse)

    assert torch.autograd.gradcheck(call, leaves(problem.inputs), nondet_tol=0.0, **GRADCHECK)


def test_a_second_derivative_is_an_error():
    """It would be silently zero if the backward passed for a constant."""
    problem = make(CASES[0], torch.float32)
    q, k, v = leaves(problem.inputs)
    out = sparse_attn.attention(q, k, v)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    assert torch.equal(dq, torch.autograd.grad(out.square().sum(), q)[0])
    with pytest.raises(NotImplementedError, match="first derivative only"):
        dq.sum().backward()


def test_a_gradient_penalty_is_an_error():
    q, k, v = leaves(make(CASES[0], torch.float32).inputs)
    loss = sparse_attn.attention(q, k, v).sum()
    (dk,) = torch.autograd.grad(loss, k, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivative only"):
        (loss + dk.square().sum()).backward()


@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "sinks"])
def test_a_forward_derivative_is_an_error(which):
    given = make(Case("dense", sinks=True), torch.float32).inputs

    def call(x):
        inputs = [*given[:which], x, *given[which + 1 :]]
        return sparse_attn.attention(*inputs[:3], sinks=inputs[3])

    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(call, (given[which],), (torch.ones_like(given[which]),))


def test_functorch_grad_is_an_error():
    q, k, v = make(CASES[0], torch.float32).inputs
    with pytest.raises(RuntimeError, match="functorch|setup_context"):
        torch.func.grad(lambda q: sparse_attn.attention(q, k, v).sum())(q)


def test_a_gradient_of_the_bias_is_an_error():
    problem = make(Case("bias", "listed", bias=True), torch.float32)
    index = replace(problem.index, column_bias=problem.index.column_bias.clone().requires_grad_())
    q, k, v = problem.inputs
    with pytest.raises(UnsupportedError, match="column_bias") as error:
        sparse_attn.attention(q, k, v, index)
    assert error.value.reasons == ("cpu: it has no gradient of column_bias; detach it",)
    with torch.no_grad():
        expected = sparse_attn.attention(q, k, v, problem.index)
        assert torch.equal(sparse_attn.attention(q, k, v, index), expected)
