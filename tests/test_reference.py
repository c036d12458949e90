# SPDX-License-Identifier: Apache-2.0
"""The oracle against torch's own attention, against hand-worked examples, and against itself.

Everything else in the suite trusts `sparse_attn.reference` and `bounds`, so both are tested here,
including that the bound fails when it should.
"""

import doctest
import math

import pytest
import torch
from bounds import assert_matches_oracle, error_and_bound, plain_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparse_attn import reference

INF = math.inf


def make_qkv(
    batch: int = 2,
    num_heads: int = 4,
    num_heads_kv: int = 2,
    seqlen_q: int = 7,
    seqlen_k: int = 7,
    head_dim: int = 8,
    head_dim_v: int = 5,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    q = normal(batch, num_heads, seqlen_q, head_dim)
    k = normal(batch, num_heads_kv, seqlen_k, head_dim)
    v = normal(batch, num_heads_kv, seqlen_k, head_dim_v)
    return q, k, v


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Two fp64 ways to the same number: equal to 1e-12, -inf included."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def explicit_logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT


def rows(mask: Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in mask]


# attention ---------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_heads_kv", [1, 2, 4])
@pytest.mark.parametrize("softmax_scale", [None, 0.3])
def test_attention_equals_sdpa(
    causal: bool, num_heads_kv: int, softmax_scale: float | None
) -> None:
    q, k, v = make_qkv(num_heads_kv=num_heads_kv)
    out, lse = reference.attention(q, k, v, causal=causal, softmax_scale=softmax_scale)
    expected = scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True
    )
    assert_close(out, expected)
    logits = explicit_logits(q, k, 8**-0.5 if softmax_scale is None else softmax_scale)
    if causal:
        logits = logits.masked_fill(torch.ones(7, 7).triu(1).bool(), -INF)
    assert_close(lse, logits.logsumexp(-1))


def test_attention_with_mask_equals_sdpa() -> None:
    q, k, v = make_qkv(seqlen_q=5, seqlen_k=9)
    mask = torch.rand(2, 4, 5, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 0] = True
    out, _ = reference.attention(q, k, v, mask, causal=False)
    assert_close(out, scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))
    broadcast, _ = reference.attention(q, k, v, mask[:1, :1], causal=False)
    each, _ = reference.attention(q, k, v, mask[:1, :1].expand(2, 4, 5, 9), causal=False)
    assert torch.equal(broadcast, each)


def test_low_precision_inputs_are_computed_in_fp64() -> None:
    q, k, v = make_qkv(dtype=torch.bfloat16)
    out, lse = reference.attention(q, k, v)
    out64, lse64 = reference.attention(q.double(), k.double(), v.double())
    assert out.dtype == lse.dtype == torch.float64
    assert torch.equal(out, out64) and torch.equal(lse, lse64)


@pytest.mark.parametrize(
    ("q_offset", "visible"),
    [(None, [3, 4]), (0, [1, 2]), (-1, [0, 1]), (2, [3, 4]), (5, [4, 4]), (-9, [0, 0])],
)
def test_causal_alignment_by_hand(q_offset: int | None, visible: list[int]) -> None:
    # Equal logits: out is the mean of the visible values 0, 1, 2, 3 and exp(lse) their number.
    q, k = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 4, 8)
    v = torch.arange(4.0).reshape(1, 1, 4, 1)
    out, lse = reference.attention(q, k, v, q_offset=q_offset)
    assert_close(lse.exp().flatten(), torch.tensor(visible, dtype=torch.float64))
    means = [(n - 1) / 2 if n else 0.0 for n in visible]
    assert_close(out.flatten(), torch.tensor(means, dtype=torch.float64))


def test_more_rows_than_keys_leaves_first_rows_empty() -> None:
    q, k, v = make_qkv(seqlen_q=6, seqlen_k=4)
    out, lse = reference.attention(q, k, v)
    assert (out[:, :, :2] == 0).all() and (lse[:, :, :2] == -INF).all()
    expected = scaled_dot_product_attention(q[:, :, 2:], k, v, is_causal=True, enable_gqa=True)
    assert_close(out[:, :, 2:], expected)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(3, 0), (0, 3), (0, 0)])
def test_no_keys_or_no_rows(seqlen_q: int, seqlen_k: int) -> None:
    q, k, v = make_qkv(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    out, lse = reference.attention(q, k, v)
    assert out.shape == (2, 4, seqlen_q, 5) and lse.shape == (2, 4, seqlen_q)
    assert (out == 0).all() and (lse == -INF).all()


def test_gradients_equal_sdpa_and_are_zero_for_empty_rows() -> None:
    mask = torch.rand(2, 4, 7, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[:, :, 3] = False
    mask[:, :, [0, 1, 2, 4, 5, 6], 0] = True
    inputs = [x.requires_grad_() for x in make_qkv()]
    out, lse = reference.attention(*inputs, mask, softcap=5.0)
    assert (out[:, :, 3] == 0).all() and (lse[:, :, 3] == -INF).all()
    (out.sin().sum() + lse[lse > -INF].sum()).backward()
    for x in inputs:
        assert x.grad is not None and torch.isfinite(x.grad).all()
    assert inputs[0].grad is not None and (inputs[0].grad[:, :, 3] == 0).all()

    ours = [x.requires_grad_() for x in make_qkv()]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    reference.attention(*ours)[0].sin().sum().backward()
    expected = scaled_dot_product_attention(*theirs, is_causal=True, enable_gqa=True)
    expected.sin().sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        assert x.grad is not None and y.grad is not None
        assert_close(x.grad, y.grad)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_gradcheck_with_everything(with_sinks: bool) -> None:
    q, k, v = make_qkv(batch=1, num_heads=2, num_heads_kv=1, seqlen_q=3, seqlen_k=4, head_dim=2)
    bias = torch.linspace(-1, 1, 4, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, bias)]
    if with_sinks:
        inputs.append(torch.tensor([0.5, -1.0], dtype=torch.float64).requires_grad_())

    def out_and_lse(*args: Tensor) -> tuple[Tensor, Tensor]:
        sinks = args[4] if with_sinks else None
        return reference.attention(*args[:3], bias=args[3], softcap=2.0, sinks=sinks)

    assert torch.autograd.gradcheck(out_and_lse, inputs)


def test_sinks_are_a_key_without_value() -> None:
    q, k, v = make_qkv(seqlen_q=6, seqlen_k=5)
    sinks = torch.tensor([0.0, 2.0, -3.0, -INF])
    out, lse = reference.attention(q, k, v, sinks=sinks)
    logits = explicit_logits(q, k, 8**-0.5).masked_fill(torch.ones(6, 5).triu(0).bool(), -INF)
    column = sinks.double()[None, :, None, None].expand(2, 4, 6, 1)
    # The head with sink -inf has an empty first row, which torch.softmax makes NaN.
    weights = torch.cat([logits, column], -1).softmax(-1)[..., :-1].nan_to_num(0.0)
    assert_close(out, weights @ v.repeat_interleave(2, dim=1))
    assert_close(lse, torch.cat([logits, column], -1).logsumexp(-1))
    assert (out[:, :, 0] == 0).all()
    assert_close(lse[:, :, 0], sinks.double().expand(2, 4))


def test_sink_far_above_the_logits_does_not_underflow_lse() -> None:
    q, k, v = make_qkv()
    out, lse = reference.attention(q, k, v, sinks=torch.full((4,), 1e4))
    assert (lse == 1e4).all() and (out == 0).all()


def test_softcap_by_formula() -> None:
    q, k, v = make_qkv()
    out, lse = reference.attention(3 * q, k, v, causal=False, softcap=1.5)
    logits = 1.5 * torch.tanh(explicit_logits(3 * q, k, 8**-0.5) / 1.5)
    assert_close(out, logits.softmax(-1) @ v.repeat_interleave(2, dim=1))
    assert_close(lse, logits.logsumexp(-1))
    uncapped, _ = reference.attention(q, k, v, softcap=0.0)
    assert torch.equal(uncapped, reference.attention(q, k, v)[0])


def test_bias_counts_keys_and_comes_after_softcap() -> None:
    q, k, v = make_qkv(seqlen_q=4, seqlen_k=4)
    # A bias of ln 3 makes one key weigh as much as three copies of it.
    bias = torch.tensor([0.0, math.log(3), 0.0, 0.0])
    out, lse = reference.attention(q, k, v, bias=bias, causal=False, softcap=0.7)
    copies = torch.tensor([0, 1, 1, 1, 2, 3])
    expected, expected_lse = reference.attention(
        q, k[:, :, copies], v[:, :, copies], causal=False, softcap=0.7
    )
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)  # ln 3 was given in fp32
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)
    hidden = torch.tensor([0.0, -INF, 0.0, 0.0])
    assert_close(
        reference.attention(q, k, v, bias=hidden)[0],
        reference.attention(q, k, v, torch.tensor([True, False, True, True]))[0],
    )


def test_attention_rejects_wrong_arguments() -> None:
    q, k, v = make_qkv(num_heads=4, num_heads_kv=3)
    with pytest.raises(ValueError, match="num_heads=4 is not a multiple of num_heads_kv=3"):
        reference.attention(q, k, v)
    q, k, v = make_qkv()
    with pytest.raises(ValueError, match=r"mask has dtype torch\.float32"):
        reference.attention(q, k, v, torch.zeros(7, 7))


# varlen and merging ------------------------------------------------------------------


def test_varlen_equals_a_call_per_sequence() -> None:
    lengths_q, lengths_k = [3, 0, 5, 1], [4, 2, 0, 6]
    cu_q, cu_k = (
        torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32)
        for n in (lengths_q, lengths_k)
    )
    q, k, v = make_qkv(batch=1, seqlen_q=9, seqlen_k=12)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    masks = [None, None, None, torch.tensor([1, 0, 1, 0, 1, 1]).bool()]
    biases = [torch.linspace(0, 1, 4), None, None, None]
    sinks = torch.tensor([0.0, 1.0, -1.0, -INF])
    options = {"softmax_scale": 0.4, "softcap": 3.0, "sinks": sinks}
    out, lse = reference.attention_varlen(
        q, k, v, cu_q, cu_k, masks, bias=biases, q_offset=[1, 0, 0, 3], **options
    )
    assert out.shape == (9, 4, 5) and lse.shape == (4, 9)
    for s, offset in enumerate([1, 0, 0, 3]):
        in_q, in_k = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        qkv = [x[i].transpose(0, 1)[None] for x, i in ((q, in_q), (k, in_k), (v, in_k))]
        out_s, lse_s = reference.attention(
            *qkv, masks[s], bias=biases[s], q_offset=offset, **options
        )
        assert torch.equal(out[in_q], out_s[0].transpose(0, 1))
        assert torch.equal(lse[:, in_q], lse_s[0])


def test_varlen_default_offset_is_per_sequence() -> None:
    q, k, v = make_qkv(batch=1, seqlen_q=2, seqlen_k=7)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    cu_q, cu_k = torch.tensor([0, 1, 2]), torch.tensor([0, 5, 7])
    _, lse = reference.attention_varlen(0 * q, k, v, cu_q, cu_k)
    assert_close(lse.exp()[0], torch.tensor([5.0, 2.0], dtype=torch.float64))


def test_merge_states_equals_joint_softmax() -> None:
    q, k, v = make_qkv(seqlen_q=6, seqlen_k=9)
    sinks = torch.tensor([0.0, 1.0, -1.0, -INF])
    # The causal part over the last keys leaves some rows with no key in one or more parts.
    parts = [torch.arange(9) < 2, (torch.arange(9) >= 2) & (torch.arange(9) < 7)]
    parts.append(~(parts[0] | parts[1]))
    states = [
        reference.attention(q, k, v, part, q_offset=-1, sinks=sinks if t == 0 else None)
        for t, part in enumerate(parts)
    ]
    assert (states[2][1] == -INF).any()
    out, lse = reference.merge_states(*zip(*states, strict=True))
    expected, expected_lse = reference.attention(q, k, v, q_offset=-1, sinks=sinks)
    assert (expected_lse == -INF).any()
    assert_close(out, expected)
    assert_close(lse, expected_lse)


def test_merge_states_ignores_the_value_of_an_absent_part() -> None:
    outs = [torch.tensor([[math.nan], [math.nan]]), torch.tensor([[2.0], [math.nan]])]
    lses = [torch.tensor([-INF, -INF]), torch.tensor([1.0, -INF])]
    out, lse = reference.merge_states(outs, lses)
    assert out.flatten().tolist() == [2.0, 0.0]
    assert lse.tolist() == [1.0, -INF]


def test_merge_states_rejects_unpaired_parts() -> None:
    with pytest.raises(ValueError, match="2 outs and 1 lses"):
        reference.merge_states([torch.zeros(1, 1)] * 2, [torch.zeros(1)])
    with pytest.raises(ValueError, match="0 outs and 0 lses"):
        reference.merge_states([], [])


# static masks ------------------------------------------------------------------------


def test_dense_mask() -> None:
    assert reference.dense_mask(2, 3).tolist() == [[True] * 3] * 2


def test_streaming_mask_by_hand() -> None:
    # Rows at positions 3, 4, 5 of 6 keys; sink 1, window 2.
    assert rows(reference.streaming_mask(3, 6, 1, 2)) == [[0, 2, 3, 4], [0, 3, 4, 5], [0, 4, 5]]
    moved = reference.streaming_mask(3, 6, 1, 2, q_offset=0)
    assert rows(moved) == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert rows(reference.streaming_mask(3, 6, 0, 1, dense_tail=1)) == [[3], [4], list(range(6))]
    assert rows(reference.streaming_mask(2, 3, 1, 0)) == [[0], [0]]


@settings(max_examples=50, deadline=None)
@given(
    seqlen_q=st.integers(1, 12),
    seqlen_k=st.integers(1, 12),
    sink=st.integers(0, 5),
    window=st.integers(1, 5),
)
def test_streaming_mask_equals_the_two_published_formulas(
    seqlen_q: int, seqlen_k: int, sink: int, window: int
) -> None:
    # MInference's n_local and Block-Sparse-Attention's local both count the row's own key.
    mask = reference.streaming_mask(seqlen_q, seqlen_k, sink, window)
    for i in range(seqlen_q):
        p = i + seqlen_k - seqlen_q
        for j in range(min(p + 1, seqlen_k)):
            distance = p - j
            a_shape = 0 <= distance < window or (j < sink and distance >= window)
            block_sparse_attention = j >= p - (window - 1) or j < sink
            assert mask[i, j] == a_shape == block_sparse_attention


# block-sparse ------------------------------------------------------------------------


def block_problem(means: list[float]) -> tuple[Tensor, Tensor]:
    """q = 1 and keys in pairs around the given block means, head_dim 1."""
    k = torch.tensor([[m - 0.5, m + 0.5] for m in means]).reshape(1, 1, -1, 1)
    return torch.ones_like(k), k


BLOCKS = {"block_m": 2, "block_n": 2, "softmax_scale": 1.0}


def test_mean_pooled_scores_by_hand() -> None:
    q, k = block_problem([3.0, 1.0, 2.0])
    scores = reference.mean_pooled_block_scores(q, k, 2, 2, softmax_scale=2.0)
    assert scores.tolist() == [[[[6, -INF, -INF], [6, 2, -INF], [6, 2, 4]]]]
    # Five keys, three rows at positions 2, 3, 4: the tails are means of what exists.
    scores = reference.mean_pooled_block_scores(q[:, :, :3], k[:, :, :5], 2, 2, softmax_scale=1.0)
    assert scores.tolist() == [[[[3, 1, -INF], [3, 1, 1.5]]]]
    scores = reference.mean_pooled_block_scores(
        q[:, :, :3], k[:, :, :5], 2, 4, softmax_scale=1.0, causal=False, q_offset=0
    )
    assert scores.tolist() == [[[[2, 1.5], [2, 1.5]]]]


def test_mean_pooled_scores_are_per_query_head_and_scaled_by_default() -> None:
    q, k, _ = make_qkv(seqlen_q=6, seqlen_k=6)
    scores = reference.mean_pooled_block_scores(q, k, 3, 2, causal=False)
    assert scores.shape == (2, 4, 2, 3)
    expected = q[1, 3, 3:].mean(0) @ k[1, 1, 2:4].mean(0) * 8**-0.5
    assert_close(scores[1, 3, 1, 1], expected)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"top_k": 2}, [[0], [0, 1], [0, 2], [0, 2]]),
        ({"top_k": 9}, [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]),
        ({"top_k": 2, "causal": False}, [[0, 2]] * 4),
        ({"top_k": 2, "local_blocks": 1}, [[0], [0, 1], [0, 2], [0, 3]]),
        ({"top_k": 1, "sink_blocks": 1, "local_blocks": 2}, [[0], [0, 1], [0, 1, 2], [0, 2, 3]]),
        ({"top_k": 0, "sink_blocks": 2}, [[0], [0, 1], [0, 1], [0, 1]]),
        ({"density": 0.5}, [[0], [0], [0, 2], [0, 2]]),
        ({"density": 0.5, "local_blocks": 1}, [[0], [1], [0, 2], [0, 3]]),
        ({"density": 1.0}, [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]),
        # Softmax of 3, 1, 2, 0: .644 .087 .237 .032; of the first three: .665 .090 .245; of the
        # first two: .881 .119.
        ({"threshold": 0.2}, [[0], [0], [0, 2], [0, 2]]),
        ({"threshold": 0.1, "local_blocks": 1}, [[0], [0, 1], [0, 2], [0, 2, 3]]),
        ({"threshold": 0.0}, [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]),
        ({"top_k": 1, "local_blocks": 1, "q_offset": 2}, [[1], [2], [3], [0]]),
        ({"top_k": 1, "local_blocks": 2, "q_offset": -4}, [[], [], [0], [0, 1]]),
    ],
)
def test_block_sparse_by_hand(rule: dict[str, float], expected: list[list[int]]) -> None:
    q, k = block_problem([3.0, 1.0, 2.0, 0.0])
    blocks = reference.block_sparse_blocks(q, k, **BLOCKS, **rule)
    assert rows(blocks[0, 0]) == expected
    mask = reference.block_sparse_mask(q, k, **BLOCKS, **rule)
    assert rows(mask[0, 0]) == [
        [j for n in expected[i // 2] for j in (2 * n, 2 * n + 1)] for i in range(8)
    ]


def test_block_sparse_ties_go_to_the_lower_index() -> None:
    q, k = block_problem([1.0, 5.0, 5.0, 5.0, 1.0])
    blocks = reference.block_sparse_blocks(q, k, **BLOCKS, top_k=2, causal=False)
    assert rows(blocks[0, 0]) == [[1, 2]] * 5


def test_block_sparse_tails_and_unequal_lengths() -> None:
    # Rows at positions 2..6 in tiles of 4; keys 0..6 in blocks of 3: the last block holds key 6.
    q, k = torch.ones(1, 1, 5, 1), torch.tensor([0.0, 0, 0, 1, 1, 1, 9]).reshape(1, 1, 7, 1)
    rule = {"block_m": 4, "block_n": 3, "softmax_scale": 1.0}
    mask = reference.block_sparse_mask(q, k, top_k=1, **rule)
    assert rows(mask[0, 0]) == [[3, 4, 5]] * 4 + [[6]]
    # Rows at positions 0..4: the second tile ends at 4, so keys 6 and 7 are not allowed.
    q, k = torch.ones(1, 1, 5, 1), torch.arange(10.0).reshape(1, 1, 10, 1)
    rule = {"block_m": 4, "block_n": 2, "q_offset": 0}
    blocks = reference.block_sparse_blocks(q, k, top_k=9, **rule)
    assert rows(blocks[0, 0]) == [[0, 1], [0, 1, 2]]
    scores = reference.mean_pooled_block_scores(q, k, 4, 2, q_offset=0)
    assert torch.equal(scores > -INF, blocks)
    blocks = reference.block_sparse_blocks(q, k, top_k=0, local_blocks=1, causal=False, **rule)
    assert rows(blocks[0, 0]) == [[1], [2]]


def test_threshold_is_strict() -> None:
    q, k = block_problem([1.0, 1.0])
    blocks = reference.block_sparse_blocks(q, k, **BLOCKS, threshold=0.5, causal=False)
    assert not blocks.any()
    blocks = reference.block_sparse_blocks(q, k, **BLOCKS, threshold=0.4999, causal=False)
    assert blocks.all()


def test_density_budget_is_exact() -> None:
    q, k = torch.ones(1, 1, 1, 1), torch.arange(100.0).reshape(1, 1, 100, 1)
    assert math.ceil(0.07 * 100) == 8  # what the product in floating point would give
    blocks = reference.block_sparse_blocks(q, k, density=0.07, block_m=1, block_n=1)
    assert blocks.sum() == 7
    blocks = reference.block_sparse_blocks(q, k, density=0.071, block_m=1, block_n=1)
    assert blocks.sum() == 8


@pytest.mark.parametrize("rule", [{}, {"top_k": 1, "density": 0.5}])
def test_block_sparse_takes_one_rule(rule: dict[str, float]) -> None:
    q, k = block_problem([1.0])
    with pytest.raises(ValueError, match="give exactly one of them"):
        reference.block_sparse_mask(q, k, **rule)


# vertical-slash ----------------------------------------------------------------------


def causal(mask: Tensor) -> Tensor:
    offset = mask.shape[-1] - mask.shape[-2]
    return mask & torch.ones(mask.shape[-2:]).tril(offset).bool()


def test_vertical_slash_mask_by_hand() -> None:
    mask = reference.vertical_slash_mask([[[0, 5]]], [[[0, 3]]], 8, 8)[0, 0]
    assert rows(mask) == [
        [0, 5], [0, 1, 5], [0, 2, 5], [0, 3, 5], [0, 1, 4, 5], [0, 2, 5], [0, 3, 5, 6], [0, 4, 5, 7]
    ]  # fmt: skip
    # Rows at positions 6 and 7: distances count from the aligned diagonal.
    mask = reference.vertical_slash_mask([[[1]]], [[[0, 2]]], 2, 8)[0, 0]
    assert rows(mask) == [[1, 4, 6], [1, 5, 7]]
    mask = reference.vertical_slash_mask([[[]]], [[[1]]], 2, 8, q_offset=0)[0, 0]
    assert rows(mask) == [[], [0]]
    mask = reference.vertical_slash_mask([[[]]], [[[-1]]], 3, 3)[0, 0]
    assert rows(mask) == [[], [], []]


@pytest.mark.parametrize("merge_runs", [False, True])
def test_vertical_slash_tiles_of_the_known_toys(merge_runs: bool) -> None:
    # n = 8, tile 2: blocks [0], [0, 2], [1, 4], [3, 6]; columns [], [], [0], [0, 5].
    mask = reference.vertical_slash_tile_mask(
        [[[0, 5]]], [[[0, 3]]], 8, 8, block_m=2, block_n=2, merge_runs=merge_runs
    )
    by_tile = [[0, 1], [0, 1, 2, 3], [0, 1, 2, 4, 5], [0, 3, 4, 5, 6, 7]]
    by_row = [[j for j in by_tile[i // 2] if j <= i] for i in range(8)]
    assert rows(causal(mask)[0, 0]) == by_row
    # n = 4, tile 2, V = {1, 3}, S = {2}: columns [1] and [3], block 0 in the second tile only.
    mask = reference.vertical_slash_tile_mask(
        [[[1, 3]]], [[[2]]], 4, 4, block_m=2, block_n=2, merge_runs=merge_runs
    )
    assert rows(causal(mask)[0, 0]) == [[], [1], [0, 1], [0, 1, 3]]


def test_merged_runs_overshoot_by_less_than_a_block() -> None:
    # The tile of rows 12..15: slashes 7 and 6 cover [5, 9) and [6, 10); blocks 5 and 9 reach 13.
    union = reference.vertical_slash_tile_mask([[[]]], [[[6, 7]]], 16, 16, block_m=4, block_n=4)
    assert rows(union[0, 0])[12] == [5, 6, 7, 8, 9]
    merged = reference.vertical_slash_tile_mask(
        [[[]]], [[[6, 7]]], 16, 16, block_m=4, block_n=4, merge_runs=True
    )
    assert rows(merged[0, 0])[12] == [5, 6, 7, 8, 9, 10, 11, 12]


@settings(max_examples=60, deadline=None)
@given(
    seqlen_q=st.integers(1, 20),
    extra=st.integers(0, 9),
    columns=st.sets(st.integers(0, 28), max_size=5),
    slashes=st.sets(st.integers(0, 28), max_size=5),
    block_m=st.sampled_from([1, 2, 4]),
    block_n=st.sampled_from([2, 3, 4]),
)
def test_tiles_contain_the_meaning_and_little_else(
    seqlen_q: int, extra: int, columns: set[int], slashes: set[int], block_m: int, block_n: int
) -> None:
    seqlen_k = seqlen_q + extra
    cols = [[[j for j in columns if j < seqlen_k]]]
    dists = [[[s for s in slashes if s < seqlen_k]]]
    meant = reference.vertical_slash_mask(cols, dists, seqlen_q, seqlen_k)
    tiles, merged = (
        reference.vertical_slash_tile_mask(
            cols, dists, seqlen_q, seqlen_k, block_m=block_m, block_n=block_n, merge_runs=merge_runs
        )
        for merge_runs in (False, True)
    )
    assert (meant <= tiles).all() and (tiles <= merged).all()
    width = -(-block_m // block_n) * block_n
    for i, j in tiles[0, 0].nonzero().tolist():
        a = extra + i // block_m * block_m
        from_slash = any(max(0, a - s) <= j < max(0, a - s) + width for s in dists[0][0])
        assert j in cols[0][0] or from_slash


def naive_selection(
    q: Tensor, k: Tensor, last_q: int, offset: int
) -> tuple[list[float], list[float]]:
    """Column and diagonal sums of one head, entry by entry."""
    n = k.shape[0]
    ver, sla = [0.0] * n, [0.0] * n
    for i in range(max(0, q.shape[0] - last_q), q.shape[0]):
        p = i + offset
        weights = [math.exp(float(q[i] @ k[j]) * q.shape[1] ** -0.5) for j in range(p + 1)]
        for j in range(p + 1):
            ver[j] += weights[j] / sum(weights)
            sla[p - j] += weights[j] / sum(weights)
    return ver, sla


@pytest.mark.parametrize("last_q", [1, 4, 64])
def test_vertical_slash_selection_equals_naive_sums(last_q: int) -> None:
    q, k, _ = make_qkv(seqlen_q=9, seqlen_k=14)
    options = {"sink": 2, "local": 3, "min_slash": 0}
    cols, dists = reference.vertical_slash_selection(q, k, 5, 6, last_q, **options)
    for b in range(2):
        for h in range(4):
            ver, sla = naive_selection(q[b, h], k[b, h // 2], last_q, 5)
            best = sorted(range(2, 14), key=lambda j: -ver[j])[:3]
            assert cols[b][h] == sorted([0, 1, *best])
            best = sorted(range(3, 14), key=lambda s: -sla[s])[:3]
            assert dists[b][h] == sorted([0, 1, 2, *best])


def test_vertical_slash_selection_by_hand() -> None:
    # One voting row at position 3 with weights 1/8, 4/8, 2/8, 1/8 on keys 0..3.
    k = torch.tensor([1.0, 4.0, 2.0, 1.0]).log().reshape(1, 1, 4, 1)
    q = torch.ones(1, 1, 4, 1)
    free = {"last_q": 1, "sink": 0, "local": 0, "min_slash": 0}
    cols, dists = reference.vertical_slash_selection(q, k, 2, 1, **free)
    assert cols == [[[1, 2]]] and dists == [[[2]]]
    # Keys 0 and 3 tie, at columns 0, 3 and at distances 3, 0: the lower index goes first.
    cols, dists = reference.vertical_slash_selection(q, k, 3, 3, **free)
    assert cols == [[[0, 1, 2]]] and dists == [[[0, 1, 2]]]


def test_vertical_slash_forced_sets_and_minimum_budgets() -> None:
    q, k, _ = make_qkv(batch=1, num_heads=1, num_heads_kv=1, seqlen_q=160, seqlen_k=160)
    cols, dists = reference.vertical_slash_selection(q, k, 1, 1)
    # Below the minimum budgets; the 100 forced diagonals tie, so the 50 nearest stay.
    assert cols == [[list(range(30))]] and dists == [[list(range(50))]]
    cols, dists = reference.vertical_slash_selection(q, k, 31, 101)
    assert cols[0][0][:30] == list(range(30)) and len(cols[0][0]) == 31
    assert dists[0][0][:100] == list(range(100)) and len(dists[0][0]) == 101
    cols, dists = reference.vertical_slash_selection(q, k, 999, 999)
    assert cols == dists == [[list(range(160))]]


def test_vertical_slash_selection_skips_rows_without_keys() -> None:
    q, k, _ = make_qkv(batch=1, num_heads=1, num_heads_kv=1, seqlen_q=6, seqlen_k=3)
    options = {"sink": 0, "local": 0, "min_slash": 0, "last_q": 6}
    cols, dists = reference.vertical_slash_selection(q, k, 1, 1, **options)
    last, _ = reference.vertical_slash_selection(q[:, :, 3:], k, 1, 1, **options)
    assert cols == last and len(dists[0][0]) == 1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("q_offset", [-9, -2, 1, 9])
def test_vertical_slash_selection_off_the_key_axis(q_offset: int, causal: bool) -> None:
    # Whatever the alignment, what is selected is what the dense weights of the rows say.
    q, k, _ = make_qkv(batch=1, num_heads=1, num_heads_kv=1, seqlen_q=4, seqlen_k=6)
    options = {"sink": 0, "local": 0, "min_slash": 0, "causal": causal, "q_offset": q_offset}
    cols, dists = reference.vertical_slash_selection(q, k, 2, 2, **options)
    distance = torch.arange(4)[:, None] + q_offset - torch.arange(6)
    logits = explicit_logits(q, k, 8**-0.5)[0, 0]
    if causal:
        logits = logits.masked_fill(distance < 0, -INF)
    weights = logits.softmax(-1).nan_to_num(0.0)
    ver = weights.sum(0)
    sla = torch.stack([weights[distance == s].sum() for s in range(max(6, 4 + q_offset))])
    for chosen, scores in ((cols[0][0], ver), (dists[0][0], sla)):
        best = scores.argsort(descending=True, stable=True)[:2]
        assert chosen == sorted(best.tolist())


def test_equal_keys_tie_exactly() -> None:
    generator = torch.Generator().manual_seed(3)
    key = torch.randn(1, 1, 1, 24, generator=generator)
    k = key.expand(1, 1, 37, 24)
    q = torch.randn(1, 1, 37, 24, generator=generator)
    options = {"sink": 0, "local": 0, "min_slash": 0, "last_q": 1}
    cols, dists = reference.vertical_slash_selection(q, k, 5, 5, **options)
    assert cols == dists == [[[0, 1, 2, 3, 4]]]
    rule = {"block_m": 4, "block_n": 4, "causal": False}
    blocks = reference.block_sparse_blocks(q[:, :, :36], k[:, :, :36], top_k=3, **rule)
    assert rows(blocks[0, 0]) == [[0, 1, 2]] * 9


# the bound ---------------------------------------------------------------------------


def cases() -> list[dict[str, object]]:
    sinks = torch.tensor([0.0, 1.0, -1.0, -INF])
    mask = torch.rand(2, 4, 33, 40, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[:, :, 5] = False
    return [
        {},
        {"causal": False, "softmax_scale": 0.3},
        {"mask": mask},
        {"mask": mask, "sinks": sinks, "softcap": 4.0, "bias": torch.linspace(-2, 2, 40)},
        {"q_offset": -3},
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", cases())
def test_plain_attention_means_what_the_oracle_means(
    case: dict[str, object], dtype: torch.dtype
) -> None:
    q, k, v = make_qkv(seqlen_q=33, seqlen_k=40, dtype=dtype)
    out, lse = reference.attention(q, k, v, **case)
    plain, plain_lse = plain_attention(q, k, v, **case)
    assert plain.dtype == dtype
    assert plain_lse.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(plain_lse == -INF, lse == -INF)
    # A few roundings of scores and probabilities; a wrong convention is off by far more.
    allowed = 16 * torch.finfo(dtype).eps
    finite = lse > -INF
    assert (plain.double() - out).abs().max() <= allowed * v.abs().max()
    assert (plain_lse.double() - lse)[finite].abs().max() <= allowed * lse[finite].abs().max()
    # So does torch's fused kernel, whose rounding differs: the bound holds for an honest peer.
    if case == {}:
        fused_mask = causal(torch.ones(33, 40).bool())
        fused = scaled_dot_product_attention(q, k, v, attn_mask=fused_mask, enable_gqa=True)
        assert_matches_oracle(fused, out, plain, name="fused")
    assert_matches_oracle(plain, out, plain)
    assert_matches_oracle(plain_lse, lse, plain_lse)


def test_plain_attention_gradients_are_finite_with_empty_rows() -> None:
    inputs = [x.requires_grad_() for x in make_qkv(dtype=torch.float32)]
    out, _ = plain_attention(*inputs, q_offset=-3)
    out.sum().backward()
    for x in inputs:
        assert x.grad is not None and torch.isfinite(x.grad).all()


def test_bound_is_twice_the_plain_error_plus_the_rounding() -> None:
    fp32 = torch.finfo(torch.float32).eps
    oracle = torch.tensor([1.0, -4.0, -INF], dtype=torch.float64)
    plain = torch.tensor([1.25, -4.0, -INF])
    actual = torch.tensor([1.0, -4.5, -INF])
    error, bound = error_and_bound(actual, oracle, plain)
    assert error == 0.5 and bound == 2 * (0.25 + 4 * 2 * fp32)
    for dtype, eps in ((torch.bfloat16, 2.0**-7 + fp32), (torch.float64, 2.0**-52)):
        _, bound = error_and_bound(actual.to(dtype), oracle, plain.to(dtype))
        assert bound == 2 * (0.25 + 4 * eps)
    assert_matches_oracle(actual, oracle, plain)
    actual[1] = -4.5001
    message = r"out: error 5\.001e-01 is above the bound 5\.000e-01 .* largest at \(1,\)"
    with pytest.raises(AssertionError, match=message):
        assert_matches_oracle(actual, oracle, plain, name="out")


@pytest.mark.parametrize(
    ("actual", "plain", "message"),
    [
        ([1.0, math.nan], [1.0, -INF], "1 of 2 entries .* NaN"),
        ([1.0, 0.0], [1.0, -INF], "-inf where"),
        ([-INF, -INF], [1.0, -INF], "-inf where"),
        ([1.0, INF], [1.0, -INF], "-inf where"),
        ([INF, -INF], [1.0, -INF], "error inf"),
        ([1.0, -INF], [math.nan, -INF], "plain result is not finite"),
        ([1.0, -INF], [INF, -INF], "plain result is not finite"),
        ([1.0], [1.0, -INF], "shapes differ"),
    ],
)
def test_bound_fails_on_what_is_not_a_number(
    actual: list[float], plain: list[float], message: str
) -> None:
    oracle = torch.tensor([1.0, -INF], dtype=torch.float64)
    with pytest.raises(AssertionError, match=message):
        assert_matches_oracle(torch.tensor(actual), oracle, torch.tensor(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bound_catches_seeded_mistakes(dtype: torch.dtype) -> None:
    q, k, v = make_qkv(seqlen_q=64, seqlen_k=64, head_dim=32, head_dim_v=32, dtype=dtype)
    out, lse = reference.attention(q, k, v)
    plain, plain_lse = plain_attention(q, k, v)
    mistakes = {
        "strictly causal": {"q_offset": -1},
        "scale 10 % off": {"softmax_scale": 1.1 * 32**-0.5},
        "one key lost": {"mask": torch.arange(64) != 11},
    }
    for name, mistake in mistakes.items():
        wrong, wrong_lse = reference.attention(q, k, v, **mistake)
        with pytest.raises(AssertionError):
            assert_matches_oracle(wrong.to(dtype), out, plain, name=name)
        with pytest.raises(AssertionError):
            assert_matches_oracle(wrong_lse.float(), lse, plain_lse, name=name)
    heads_modulo = k[:, [0, 1, 0, 1]]
    wrong, _ = reference.attention(q, heads_modulo, v[:, [0, 1, 0, 1]])
    with pytest.raises(AssertionError):
        assert_matches_oracle(wrong.to(dtype), out, plain, name="h % num_heads_kv")


def test_docstring_examples() -> None:
    result = doctest.testmod(reference, extraglobs={"torch": torch})
    assert result.attempted >= 5 and result.failed == 0
