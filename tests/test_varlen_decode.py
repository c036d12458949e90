# SPDX-License-Identifier: Apache-2.0
"""Packed sequences, padded batches, caches and merged states against the oracle."""

from dataclasses import replace

import pytest
import torch
from bounds import assert_matches_oracle, plain_attention
from cases import Case, build, compare, dense_bias, expected, make_index, same_bits

import sparse_attn
from sparse_attn import AShape, SparseIndex, reference

KINDS = ("dense", "streaming", "listed", "columns")


def random_qkv(seqlen_q, seqlen_k, *, batch=1, heads=4, heads_kv=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, seqlen_q, 40), (heads_kv, seqlen_k, 40), (heads_kv, seqlen_k, 24))
    return tuple(torch.randn(batch, *s, generator=generator).to(dtype) for s in shapes)


def stacked_index(ranges, *, bits=0.0, bias=None, seed=0):
    """A random index of each range (its parts) and the stack of them; the heads agree."""
    parts = []
    for s, (_, q_len, _, k_len, _) in enumerate(ranges):
        part = make_index(
            max(q_len, 1),
            max(k_len, 1),
            kinds=KINDS,
            block_m=16,
            block_n=8,
            bits=bits,
            bias=bias,
            seed=seed + s,
        )
        heads = torch.tensor([[0, 0, 0, 0], [1, 3, 20, 2], [2, 0, 0, 0], [2, 0, 0, 0]]).int()
        parts.append(replace(part, heads=heads))
    return parts, SparseIndex.stack(parts)


def ranges_expected(q, k, v, parts, ranges, **kwargs):
    """The oracle and plain torch over ranges, one range after another."""
    batch, heads, seqlen_q, _ = q.shape
    results = []
    for attend, dtype in ((reference.attention, torch.float64), (plain_attention, None)):
        out = torch.zeros(batch, heads, seqlen_q, v.shape[3], dtype=dtype or q.dtype)
        lse = torch.full((batch, heads, seqlen_q), -torch.inf, dtype=dtype or torch.float32)
        for s, (q_start, q_len, k_start, k_len, q_offset) in enumerate(ranges):
            b = s if batch > 1 else 0
            rows, keys = slice(q_start, q_start + q_len), slice(k_start, k_start + k_len)
            mask = bias = None
            if parts is not None:
                # dense_tail counts from the last row of the sequence, as the part's length does.
                mask = parts[s].to_dense_mask(q_offset)[:, :, :q_len, :k_len]
                bias = dense_bias(parts[s])
                bias = None if bias is None else bias[:, :, :q_len, :k_len]
            part_out, part_lse = attend(
                q[b : b + 1, :, rows],
                k[b : b + 1, :, keys],
                v[b : b + 1, :, keys],
                mask,
                bias=bias,
                q_offset=q_offset,
                **kwargs,
            )
            out[b, :, rows], lse[b, :, rows] = part_out[0], part_lse[0]
        results.append((out, lse))
    return results


# -------------------------------------------------------------------- ranges

# (q_start, q_len, k_start, k_len, q_offset)
PACKED = {
    "one after another": [(0, 33, 0, 40, 7), (33, 65, 40, 64, -1), (98, 1, 104, 90, 89)],
    "empty ones": [(0, 0, 0, 9, 9), (0, 70, 9, 0, 0), (70, 0, 9, 0, 0), (70, 20, 9, 100, 80)],
    "gaps and any order": [(60, 30, 10, 50, 3), (5, 40, 100, 73, 33)],
    "the same keys": [(0, 20, 3, 70, 50), (20, 20, 3, 70, 0), (40, 20, 3, 71, -5)],
    "short rows": [(s * 3, 3, s * 11, 11 - s, 8 - s) for s in range(12)],
    "one key each": [(s, 1, 5 * s, 1, 0) for s in range(20)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("name", PACKED)
def test_ranges_of_a_packed_tensor(name, causal, dtype):
    """Rows outside of every range give 0 and -inf; NaN keys outside of them are not read."""
    ranges = PACKED[name]
    q, k, v = random_qkv(102, 210, dtype=dtype)
    unread = torch.ones(210, dtype=torch.bool)
    for _, _, start, length, _ in ranges:
        unread[start : start + length] = False
    k[:, :, unread], v[:, :, unread] = torch.nan, torch.nan
    parts, index = stacked_index(ranges, bits=0.5, bias="finite")
    kwargs = {"causal": causal, "softcap": 9.0}
    oracle, plain = ranges_expected(q, k, v, parts, ranges, **kwargs)
    seq_ranges = torch.tensor(ranges, dtype=torch.int32)

    def run():
        return sparse_attn.attention_ranges(q, k, v, index, seq_ranges, return_lse=True, **kwargs)

    compare(run, oracle, plain)
    covered = torch.zeros(102, dtype=torch.bool)
    for start, length, *_ in ranges:
        covered[start : start + length] = True
    out, lse = run()
    assert not bool(out[:, :, ~covered].any())
    assert bool((lse[:, :, ~covered] == -torch.inf).all())


@pytest.mark.parametrize("seqlen_q", [3, 70])
@pytest.mark.parametrize("sinks", [False, True])
def test_ranges_of_a_padded_batch(seqlen_q, sinks):
    """Left padding, right padding and none, each row of the batch its own index."""
    ranges = [(0, seqlen_q, 0, 99, 99 - seqlen_q), (2, seqlen_q - 2, 29, 70, 60), (0, 1, 0, 5, 4)]
    q, k, v = random_qkv(seqlen_q, 99, batch=3)
    k[1, :, :29], v[1, :, :29], k[2, :, 5:], v[2, :, 5:] = (torch.nan,) * 4
    parts, index = stacked_index(ranges, bits=0.5)
    kwargs = {"sinks": torch.tensor([0.0, -1.0, 3.0, 1.0]) if sinks else None}
    oracle, plain = ranges_expected(q, k, v, parts, ranges, **kwargs)
    seq_ranges = torch.tensor(ranges, dtype=torch.int32)
    compare(
        lambda: sparse_attn.attention_ranges(q, k, v, index, seq_ranges, return_lse=True, **kwargs),
        oracle,
        plain,
    )


def test_ranges_of_no_sequence():
    q, k, v = random_qkv(5, 7)
    none = torch.zeros(0, 5, dtype=torch.int32)
    out, lse = sparse_attn.attention_ranges(q, k, v, SparseIndex.dense(5, 7), none, return_lse=True)
    assert torch.equal(out, torch.zeros(1, 4, 5, 24))
    assert torch.equal(lse, torch.full((1, 4, 5), -torch.inf))


# -------------------------------------------------------------------- varlen

LENGTHS = {
    "mixed": ([65, 1, 30, 17], [65, 64, 100, 5]),
    "zero-length": ([0, 40, 0, 9, 0], [12, 40, 0, 0, 0]),
    "one": ([129], [129]),
    "short": ([1, 2, 16, 5], [400, 3, 90, 1]),
    "all zero": ([0, 0], [0, 0]),
}


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("pattern", ["dense", "streaming", "listed"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("name", LENGTHS)
def test_varlen(name, causal, pattern):
    lengths_q, lengths_k = LENGTHS[name]
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    q, k, v = (
        x[0].transpose(0, 1).contiguous() for x in random_qkv(sum(lengths_q), sum(lengths_k))
    )
    ranges = [(0, n, 0, m, 0) for n, m in zip(lengths_q, lengths_k, strict=True)]
    if pattern == "listed":
        parts, chosen = stacked_index(ranges)
        masks = [
            part.to_dense_mask(m - n)[0, :, :n, :m]
            for part, (_, n, _, m, _) in zip(parts, ranges, strict=True)
        ]
    elif pattern == "streaming":
        chosen = AShape(sink=4, window=16)
        masks = [reference.streaming_mask(n, m, 4, 16) for _, n, _, m, _ in ranges]
    else:
        chosen, masks = "dense", [None] * len(ranges)
    kwargs = {"causal": causal, "sinks": torch.tensor([0.5, -0.5, 0.0, 2.0])}
    oracle = reference.attention_varlen(q, k, v, cu_q, cu_k, masks, **kwargs)

    packed = [(a, n, b, m, m - n) for (_, n, _, m, _), a, b in
              zip(ranges, cu_q.tolist(), cu_k.tolist())]  # fmt: skip
    four = [x.transpose(0, 1)[None] for x in (q, k, v)]
    plain_out, plain_lse = torch.zeros(1, 4, len(q), 24), torch.full((1, 4, len(q)), -torch.inf)
    for (a, n, b, m, offset), mask in zip(packed, masks, strict=True):
        rows, keys = slice(a, a + n), slice(b, b + m)
        part = [four[0][:, :, rows], four[1][:, :, keys], four[2][:, :, keys]]
        part_out, part_lse = plain_attention(*part, mask, q_offset=offset, **kwargs)
        plain_out[:, :, rows], plain_lse[:, :, rows] = part_out, part_lse
    compare(
        lambda: sparse_attn.attention_varlen(
            *(q, k, v, cu_q, cu_k, max(lengths_q), max(lengths_k), chosen),
            return_lse=True,
            **kwargs,
        ),
        oracle,
        (plain_out[0].transpose(0, 1), plain_lse[0]),
    )


def test_varlen_offset_is_that_of_every_sequence():
    cu = cumulative([30, 20])
    q, k, v = (x[0].transpose(0, 1) for x in random_qkv(50, 50))
    oracle = reference.attention_varlen(q, k, v, cu, cu, q_offset=-3)
    plain = [
        plain_attention(*(x[rows].transpose(0, 1)[None] for x in (q, k, v)), q_offset=-3)
        for rows in (slice(0, 30), slice(30, 50))
    ]
    plain_out, plain_lse = (torch.cat(x, 2)[0] for x in zip(*plain, strict=True))
    compare(
        lambda: sparse_attn.attention_varlen(q, k, v, cu, cu, 30, 30, q_offset=-3, return_lse=True),
        oracle,
        (plain_out.transpose(0, 1), plain_lse),
    )


def test_varlen_equals_one_call_per_sequence():
    """To the bit: packing changes where rows lie and nothing else."""
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in random_qkv(90, 120))
    cu_q, cu_k = cumulative([60, 30]), cumulative([70, 50])
    pattern = ["dense", AShape(sink=4, window=16), "dense", AShape(sink=4, window=16)]
    out = sparse_attn.attention_varlen(q, k, v, cu_q, cu_k, 60, 70, pattern)
    for rows, keys in ((slice(0, 60), slice(0, 70)), (slice(60, 90), slice(70, 120))):
        alone = sparse_attn.attention(
            *(x[s].transpose(0, 1)[None] for x, s in ((q, rows), (k, keys), (v, keys))), pattern
        )
        assert same_bits(out[rows], alone[0].transpose(0, 1))


# -------------------------------------------------------------------- decode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seqlen_q", [1, 4, 30])
@pytest.mark.parametrize("pattern", ["dense", "streaming", "listed"])
def test_cache_lengths(pattern, seqlen_q, dtype):
    """Each sequence ends where its length says; what the cache holds past it is not read."""
    lens = [3000, 1, 65, 2]
    q, k, v = random_qkv(seqlen_q, 3000, batch=4, dtype=dtype)
    for b, n in enumerate(lens):
        k[b, :, n:], v[b, :, n:] = torch.nan, torch.nan
    ranges = [(0, seqlen_q, 0, n, n - seqlen_q) for n in lens]
    parts, chosen = None, "dense"
    if pattern == "listed":
        parts, chosen = stacked_index(ranges, bits=0.3)
    elif pattern == "streaming":
        chosen = AShape(sink=70, window=1500)
        parts = [chosen.build(q, k[:, :, :n], q_offset=0) for n in lens]
    kwargs = {"sinks": torch.tensor([0.5, -0.5, 0.0, 2.0])}
    oracle, plain = ranges_expected(q, k, v, parts, ranges, **kwargs)
    compare(
        lambda: sparse_attn.attention_decode(
            q, k, v, chosen, cache_seqlens=torch.tensor(lens).int(), return_lse=True, **kwargs
        ),
        oracle,
        plain,
    )


def test_lists_past_the_length_are_clipped():
    """An index of the whole cache: its blocks and columns past a sequence's keys do not count."""
    q, k, v = random_qkv(2, 200, batch=2, heads=2)
    k[0, :, 77:], v[0, :, 77:], k[1, :, 130:], v[1, :, 130:] = (torch.nan,) * 4
    index = make_index(2, 200, kinds=["blocks", "listed"], fill=0.9, bias="finite", seed=3)
    ranges = [(0, 2, 0, n, n) for n in (77, 130)]
    for causal in (True, False):
        oracle, plain = ranges_expected(q, k, v, [index] * 2, ranges, causal=causal)
        lens = torch.tensor([77, 130]).int()
        compare(
            lambda c=causal, n=lens: sparse_attn.attention_ranges(
                *(q, k, v, index, torch.tensor(ranges).int()), causal=c, return_lse=True
            ),
            oracle,
            plain,
        )


def test_cache_length_forms():
    """None is the whole cache, an int is every sequence's length, q_offset moves the rows."""
    q, k, v = random_qkv(3, 50, batch=2)
    call = sparse_attn.attention_decode
    assert same_bits(call(q, k, v), sparse_attn.attention(q, k, v))
    assert same_bits(
        call(q, k, v, cache_seqlens=20), sparse_attn.attention(q, k[:, :, :20], v[:, :, :20])
    )
    assert same_bits(
        call(q, k, v, cache_seqlens=torch.tensor([20, 20]).int(), q_offset=5),
        sparse_attn.attention(q, k[:, :, :20], v[:, :, :20], q_offset=5),
    )
    assert same_bits(call(q, k, v, q_offset=5), sparse_attn.attention(q, k, v, q_offset=5))
    out, lse = call(q, k, v, cache_seqlens=0, return_lse=True)
    assert not bool(out.any()) and bool((lse == -torch.inf).all())


# -------------------------------------------------------------------- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seqlen_q", [1, 65])
def test_merged_parts_are_the_whole(seqlen_q, dtype):
    """Three disjoint sets of keys; rows that see none of a part, and one of no part at all."""
    q, k, v = random_qkv(seqlen_q, 90, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    owner = torch.randint(0, 3, (1, 1, seqlen_q, 90), generator=generator)
    owner[:, :, 0] = 2
    visible = torch.rand(1, 4, seqlen_q, 90, generator=generator) < 0.5
    visible[:, 1, 0] = False
    outs, lses = [], []
    for part in range(3):
        index = SparseIndex.from_dense_mask((owner == part) & visible, block_m=16, block_n=16)
        out, lse = sparse_attn.attention(q, k, v, index, causal=False, return_lse=True)
        outs.append(out)
        lses.append(lse)
    assert bool((lses[0] == -torch.inf).any())
    out, lse = sparse_attn.merge_states(outs, lses)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert bool((lse[:, 1, 0] == -torch.inf).all())
    oracle = reference.attention(q, k, v, visible, causal=False)
    plain = plain_attention(q, k, v, visible, causal=False)
    assert_matches_oracle(out, oracle[0], plain[0], name="merged out")
    assert_matches_oracle(lse, oracle[1], plain[1], name="merged lse")


def test_merged_sink_counts_once():
    case = Case(20, 60, kinds=("dense",), causal=False, sinks=True)
    problem = build(case)
    oracle, plain = expected(problem)
    q, k, v, sinks = problem.q, problem.k, problem.v, problem.kwargs["sinks"]
    first, second = (
        sparse_attn.attention(q, k[:, :, s], v[:, :, s], causal=False, sinks=x, return_lse=True)
        for s, x in ((slice(0, 25), sinks), (slice(25, 60), None))
    )
    out, lse = sparse_attn.merge_states(*zip(first, second, strict=True))
    assert_matches_oracle(out, oracle[0], plain[0], name="merged out")
    assert_matches_oracle(lse, oracle[1], plain[1], name="merged lse")


def test_merging_far_apart_states():
    """lse of +-2e4: no overflow, the smaller state counts for nothing; one state is itself."""
    out = torch.randn(2, 3, 8)
    high, low = torch.full((2, 3), 2e4), torch.full((2, 3), -2e4)
    merged, lse = sparse_attn.merge_states([out, out + 9], [high, low])
    assert torch.equal(merged, out) and torch.equal(lse, high)
    merged, lse = sparse_attn.merge_states([out], [low])
    assert torch.equal(merged, out) and torch.equal(lse, low)
    wanted = reference.merge_states([out, out + 9], [high, high + 1.0])
    merged, lse = sparse_attn.merge_states([out, out + 9], [high, high + 1.0])
    torch.testing.assert_close(merged.double(), wanted[0], rtol=1e-3, atol=0.0)
