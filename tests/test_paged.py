# SPDX-License-Identifier: Apache-2.0
"""Caches in pages: the same numbers as one contiguous cache, and nothing read out of bounds."""

import pytest
import torch
from cases import compare, same_bits
from test_varlen_decode import random_qkv, ranges_expected, stacked_index

import sparse_attn
from sparse_attn import AShape, BlockSparse, UnsupportedError, VerticalSlash

BIG = 2**31 - 1


def in_pages(k, v, lens, page_size, *, spare=3, seed=0):
    """k and v [batch, heads, seqlen, dim] as pools of pages in random order, and the block table.

    Pages of no sequence and keys past a sequence's end are NaN; unused entries of the table are
    the largest int32.
    """
    batch = k.shape[0]
    counts = [-(-n // page_size) for n in lens]
    order = torch.randperm(
        sum(counts) + spare, generator=torch.Generator().manual_seed(seed)
    ).tolist()
    table = torch.full((batch, max(counts) + 2), BIG, dtype=torch.int32)
    pools = [x.new_full((len(order), page_size, x.shape[1], x.shape[3]), torch.nan) for x in (k, v)]
    for b, (n, count) in enumerate(zip(lens, counts, strict=True)):
        for i in range(count):
            table[b, i] = page = order.pop()
            keys = slice(i * page_size, min(n, (i + 1) * page_size))
            for pool, x in zip(pools, (k, v), strict=True):
                pool[page, : keys.stop - keys.start] = x[b, :, keys].transpose(0, 1)
    return *pools, table


PATTERNS = ("dense", "streaming", "listed", "bias")


def choice(name, q, k, lens):
    """A pattern or an index by name, and its parts (one a sequence) for the oracle."""
    ranges = [(0, q.shape[2], 0, n, n - q.shape[2]) for n in lens]
    if name == "dense":
        return "dense", None
    if name == "streaming":
        pattern = AShape(sink=11, window=300)
        return pattern, [pattern.build(q, k[:, :, :n], q_offset=0) for n in lens]
    parts, index = stacked_index(
        ranges, bits=0.3 if name == "listed" else 0.0, bias="finite" if name == "bias" else None
    )
    return index, parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page_size", [8, 16, 24, 128])
@pytest.mark.parametrize("seqlen_q", [1, 5, 70])
@pytest.mark.parametrize("name", PATTERNS)
def test_pages_in_any_order(name, seqlen_q, page_size, dtype):
    """Within the oracle's bound, and to the bit what one contiguous cache gives."""
    lens = [1300, 1, page_size, 777]
    q, k, v = random_qkv(seqlen_q, 1300, batch=4, dtype=dtype)
    k_pool, v_pool, table = in_pages(k, v, lens, page_size)
    chosen, parts = choice(name, q, k, lens)
    ranges = [(0, seqlen_q, 0, n, n - seqlen_q) for n in lens]
    kwargs = {"sinks": torch.tensor([0.5, -0.5, 0.0, 2.0]), "softcap": 20.0}
    oracle, plain = ranges_expected(q, k, v, parts, ranges, **kwargs)
    kwargs |= {"cache_seqlens": torch.tensor(lens).int(), "return_lse": True}

    def run():
        return sparse_attn.attention_decode(q, k_pool, v_pool, chosen, block_table=table, **kwargs)

    compare(run, oracle, plain)
    whole = sparse_attn.attention_decode(q, k, v, chosen, **kwargs)
    for paged, contiguous in zip(run(), whole, strict=True):
        assert same_bits(paged, contiguous)


@pytest.mark.parametrize("causal", [True, False])
def test_pages_of_long_sequences_are_split_alike(causal):
    """Keys of one row over several pieces, one head of a group with lists of its own."""
    lens = [9000, 4001]
    q, k, v = random_qkv(3, 9000, batch=2)
    k_pool, v_pool, table = in_pages(k, v, lens, 16)
    pattern = ["dense", AShape(sink=4, window=2500), "dense", "dense"]
    kwargs = {"cache_seqlens": torch.tensor(lens).int(), "causal": causal, "q_offset": 3800}
    assert same_bits(
        sparse_attn.attention_decode(q, k_pool, v_pool, pattern, block_table=table, **kwargs),
        sparse_attn.attention_decode(q, k, v, pattern, **kwargs),
    )


@pytest.mark.parametrize(
    "pattern",
    [
        BlockSparse(top_k=3, block_m=16, block_n=16),
        VerticalSlash(vertical=20, slash=40, last_q=8, sink=4, local=8),
        AShape(sink=8, window=64),
    ],
    ids=["block_sparse", "vertical_slash", "a_shape"],
)
@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_patterns_over_pages(pattern, seqlen_q):
    """Those that read keys choose the same ones as over a contiguous cache."""
    lens = [350, 122]
    q, k, v = random_qkv(seqlen_q, 350, batch=2)
    k_pool, v_pool, table = in_pages(k, v, lens, 16)
    kwargs = {"cache_seqlens": torch.tensor(lens).int()}
    assert same_bits(
        sparse_attn.attention_decode(q, k_pool, v_pool, pattern, block_table=table, **kwargs),
        sparse_attn.attention_decode(q, k, v, pattern, **kwargs),
    )


def test_shared_pages_and_head_major_pools():
    """A common prefix stored once; [num_pages, heads, page_size, dim] through transpose."""
    q, k, v = random_qkv(1, 48, batch=2)
    k[1, :, :32], v[1, :, :32] = k[0, :, :32], v[0, :, :32]
    k_pool, v_pool, table = in_pages(k, v, [48, 48], 16)
    table[1, :2] = table[0, :2]
    expected = sparse_attn.attention_decode(q, k, v)
    for swap in (False, True):
        pools = [k_pool, v_pool]
        if swap:
            pools = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in pools]
        out = sparse_attn.attention_decode(q, *pools, cache_seqlens=48, block_table=table)
        assert same_bits(out, expected)


def test_sequences_without_keys():
    q = torch.randn(2, 2, 1, 16)
    pool = torch.full((0, 16, 1, 16), torch.nan)
    table = torch.full((2, 0), BIG, dtype=torch.int32)
    out, lse = sparse_attn.attention_decode(
        q, pool, pool, cache_seqlens=0, block_table=table, return_lse=True
    )
    assert not bool(out.any())
    assert bool((lse == -torch.inf).all())


# -------------------------------------------------------------------- errors


@pytest.mark.parametrize("page", [-1, 6, BIG, -(2**31)])
@pytest.mark.parametrize("seqlen_q", [1, 40])
@pytest.mark.parametrize("pattern", ["dense", BlockSparse(top_k=2, block_m=16, block_n=16)])
def test_pages_that_do_not_exist(page, seqlen_q, pattern):
    """Raise where a key lies in them; entries past the last key are free."""
    q, pool = torch.ones(1, 1, seqlen_q, 16), torch.ones(6, 16, 1, 16)
    table = torch.tensor([[0, page, 2, page]], dtype=torch.int32)
    args = (q, pool, pool, pattern)
    with pytest.raises(RuntimeError, match=r"block_table.* page -?\d+.*the cache has 6"):
        sparse_attn.attention_decode(*args, cache_seqlens=41, block_table=table)
    with pytest.raises(RuntimeError, match=r"block_table.* page -?\d+.*the cache has 6"):
        sparse_attn.attention_decode(*args, cache_seqlens=17, block_table=table)
    table[0, 1] = 5
    sparse_attn.attention_decode(*args, cache_seqlens=48, block_table=table)


def call(**changes):
    pool = torch.ones(6, 16, 2, 16)
    arguments = {
        "q": torch.ones(1, 4, 1, 16),
        "k_cache": pool,
        "v_cache": pool,
        "cache_seqlens": 40,
        "block_table": torch.tensor([[0, 1, 2]], dtype=torch.int32),
    }
    return sparse_attn.attention_decode(**(arguments | changes))


TABLE = torch.tensor([[0, 1, 2, 3]], dtype=torch.int32)
WRONG = {
    "no lengths": ({"cache_seqlens": None}, ValueError, "block_table without cache_seqlens"),
    "length past the pages": ({"cache_seqlens": 49}, ValueError, "holds 0 to 48"),
    "negative length": ({"cache_seqlens": -1}, ValueError, "holds 0 to 48"),
    "a list": ({"block_table": [[0, 1, 2]]}, TypeError, "block_table is a list"),
    "int64": ({"block_table": TABLE.long()}, ValueError, "contiguous int32"),
    "one dimension": ({"block_table": TABLE[0]}, ValueError, "contiguous int32"),
    "two rows": ({"block_table": TABLE.repeat(2, 1)}, ValueError, r"contiguous int32 \[1, max"),
    "strided": ({"block_table": TABLE.repeat(1, 2)[:, ::2]}, ValueError, "contiguous int32"),
    "page of 12": ({k: torch.ones(6, 12, 2, 16) for k in ("k_cache", "v_cache")}, ValueError,
                   "page_size=12 is not a positive multiple of 8"),
    "cache in 3 dimensions": ({"k_cache": torch.ones(6, 16, 16)}, ValueError, "has 3 dimensions"),
    "no tensor": ({"v_cache": None}, TypeError, "v_cache is a NoneType"),
    "dtypes": ({"v_cache": torch.ones(6, 16, 2, 16).half()}, ValueError, "of one dtype"),
    "pages differ": ({"v_cache": torch.ones(5, 16, 2, 16)}, ValueError, "do not fit"),
    "head_dim": ({"q": torch.ones(1, 4, 1, 24)}, ValueError, "do not fit"),
    "head_dim of 12": ({"q": torch.ones(1, 4, 1, 12)}, ValueError, "multiple of 8"),
    "heads": ({"q": torch.ones(1, 3, 1, 16)}, ValueError, "3 query heads are no multiple of 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    changes, error, text = WRONG[name]
    with pytest.raises(error, match=f"sparse_attn.attention_decode: .*{text}"):
        call(**changes)


def test_no_gradient_through_pages():
    with pytest.raises(UnsupportedError, match="no gradient through a paged cache") as caught:
        call(q=torch.ones(1, 4, 1, 16, requires_grad=True))
    assert "block_table" in caught.value.reasons[0]
    with torch.no_grad():
        call(q=torch.ones(1, 4, 1, 16, requires_grad=True))


# -------------------------------------------------------------------- the operator


def op_args(**changes):
    index = sparse_attn.SparseIndex.dense(1, 48)
    named = {
        "q": torch.ones(1, 4, 1, 16),
        "k": torch.ones(6, 2, 16, 16),
        "v": torch.ones(6, 2, 16, 24),
        "ranges": torch.tensor([[0, 1, 0, 40, 39]], dtype=torch.int32),
        "table": TABLE,
    } | changes
    return (
        *(named[name] for name in ("q", "k", "v")),
        *(*index.op_args(), named["ranges"], 0, True, 0.25, 0.0, None, named["table"]),
    )


OP_WRONG = {
    "int64": ({"table": TABLE.long()}, "wrong dtype"),
    "one dimension": ({"table": TABLE[0]}, "has 1 dimensions"),
    "two rows": ({"table": TABLE.repeat(2, 1)}, "block_table has 2 rows, the call has 1"),
    "strided": ({"table": TABLE.repeat(1, 2)[:, ::2]}, "not contiguous"),
    "page of 12": (
        {"k": torch.ones(6, 2, 12, 16), "v": torch.ones(6, 2, 12, 24)},
        "page_size=12 is not",
    ),
    "no keys in a page": (
        {"k": torch.ones(6, 2, 0, 16), "v": torch.ones(6, 2, 0, 24)},
        "page_size=0 is not",
    ),
    "keys past the table": ({"table": TABLE[:, :2].contiguous()}, "leaves k"),
    "page past the pool": ({"table": TABLE + 4}, r"block_table\[0, 2\] is page 6, the cache has 6"),
    "negative page": ({"table": TABLE - 1}, r"block_table\[0, 0\] is page -1"),
    "pools differ": ({"v": torch.ones(5, 2, 16, 24)}, "k and v differ"),
}


@pytest.mark.parametrize("name", OP_WRONG)
def test_operator_checks_pages(name):
    changes, text = OP_WRONG[name]
    with pytest.raises(RuntimeError, match=text):
        torch.ops.sparse_attn.attention(*op_args(**changes))


def test_operator_contract():
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.sparse_attn.attention.default, op_args(), test_utils=checks)


def test_operator_has_no_gradient_through_pages():
    out, _ = torch.ops.sparse_attn.attention(
        *op_args(q=torch.ones(1, 4, 1, 16, requires_grad=True))
    )
    with pytest.raises(NotImplementedError, match="no gradient through a paged cache"):
        out.sum().backward()


def test_compiles_into_one_graph():
    def step(q, k_pool, v_pool, table, lens):
        return sparse_attn.attention_decode(
            q, k_pool, v_pool, AShape(sink=4, window=16), cache_seqlens=lens, block_table=table
        )

    q, k, v = random_qkv(1, 90, batch=2)
    lens = torch.tensor([90, 41]).int()
    arguments = (q, *in_pages(k, v, lens.tolist(), 16), lens)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(*arguments), step(*arguments))
