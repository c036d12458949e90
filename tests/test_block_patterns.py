# SPDX-License-Identifier: Apache-2.0
"""Patterns that choose whole blocks, against their rules written as loops in float64."""

import math

import oracle_blocks as oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparse_attn import BlockSparse

MARGIN = 1e-4
"""Far above what float32 scores of these sizes can be off by."""


@st.composite
def problems(draw, *, most=300, heads_kv=2):
    """q, k and the keyword arguments of `build`."""
    seqlen_k = draw(st.integers(1, most))
    seqlen_q = draw(st.integers(1, seqlen_k))
    batch, kv = draw(st.integers(1, 3)), draw(st.integers(1, heads_kv))
    heads = kv * draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    q = torch.randn(batch, heads, seqlen_q, 16, generator=generator) * 2
    k = torch.randn(batch, kv, seqlen_k, 16, generator=generator)
    options = {
        "causal": draw(st.booleans()),
        "softmax_scale": 0.5,
        "q_offset": draw(st.sampled_from([None, None, 0, 7, seqlen_k])),
    }
    return q, k, options


def grid_of(q, k, options, block_m, block_n, sink, local) -> oracle.Grid:
    offset = options["q_offset"]
    offset = k.shape[2] - q.shape[2] if offset is None else offset
    return oracle.Grid(
        q.shape[2], k.shape[2], block_m, block_n, offset, options["causal"], sink, local
    )


def expected_index(q, k, grid, rule) -> tuple[torch.Tensor, float]:
    """rule(q of a head, k of its KV head, float64) -> (chosen, margin), for all heads."""
    group = q.shape[1] // k.shape[1]
    masks, margin = [], math.inf
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            chosen, close = rule(q[b, h].double(), k[b, h // group].double())
            masks.append(oracle.grid_mask(chosen, grid))
            margin = min(margin, close)
    return torch.stack(masks).view(*q.shape[:2], grid.tiles, grid.blocks), margin


def block_grid(index) -> torch.Tensor:
    """The blocks of an index whose blocks are aligned, bool [batch, heads, tiles, blocks]."""
    index.validate()
    assert index.column_indices.numel() == 0
    mask = torch.zeros(
        index.batch_size,
        index.num_heads,
        index.num_tiles,
        -(-index.seqlen_k // index.block_n),
        dtype=torch.bool,
    )
    ends = index.block_indptr.tolist()
    for b in range(index.batch_size):
        for h in range(index.num_heads):
            for t in range(index.num_tiles):
                starts = index.block_indices[ends[b][h][t] : ends[b][h][t + 1]]
                assert bool((starts % index.block_n == 0).all())
                mask[b, h, t, starts.long() // index.block_n] = True
    return mask


BUDGETS = [{"top_k": 1}, {"top_k": 4}, {"density": 0.3}, {"top_p": 0.7}, {"threshold": 0.08}]


@settings(max_examples=250, deadline=None)
@given(
    problems(most=700),
    st.sampled_from(BUDGETS),
    st.sampled_from([16, 64]),
    st.sampled_from([8, 64]),
    st.integers(0, 2),
    st.integers(0, 2),
)
def test_block_sparse_equals_the_rule(problem, budget, block_m, block_n, sink, local):
    q, k, options = problem
    grid = grid_of(q, k, options, block_m, block_n, sink, local)
    assume(grid.tiles * grid.blocks * q.shape[0] * q.shape[1] < 20_000)

    def rule(queries, keys):
        scores = oracle.pooled_scores(queries, keys, block_m, block_n, 0.5)
        if "top_p" in budget:
            return oracle.top_p(scores, grid, budget["top_p"], logits=True)
        if "threshold" in budget:
            return oracle.threshold(scores, grid, budget["threshold"])

        def wanted(tile):
            share = budget.get("density", 0) * len(grid.allowed(tile))
            return budget.get("top_k") or math.ceil(share - 1e-9)

        return oracle.top_k(scores, grid, wanted)

    want, margin = expected_index(q, k, grid, rule)
    assume(margin > MARGIN / 10)
    pattern = BlockSparse(
        **budget, block_m=block_m, block_n=block_n, sink_blocks=sink, local_blocks=local
    )
    assert torch.equal(block_grid(pattern.build(q, k, **options)), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_block_sparse_of_half_precision_is_that_of_its_values(dtype):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 4, 333, 64, generator=generator).to(dtype) for _ in range(2))
    pattern = BlockSparse(top_p=0.8)
    assert torch.equal(
        pattern.build(q, k).block_indices, pattern.build(q.float(), k.float()).block_indices
    )


def test_top_p_of_one_keeps_every_allowed_block():
    q, k = torch.randn(1, 2, 200, 16) * 30, torch.randn(1, 1, 260, 16) * 30  # masses underflow
    mask = block_grid(BlockSparse(top_p=1.0).build(q, k))
    assert torch.equal(mask, torch.ones(4, 5).tril(1).bool().expand(1, 2, 4, 5))
