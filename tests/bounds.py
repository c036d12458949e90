# SPDX-License-Identifier: Apache-2.0
"""The error bound of the test suite: derived from data, never a hand-picked tolerance.

A result may be at most twice as wrong as torch's own straightforward computation in the same
precision, plus one unit of rounding of the largest value, and one of fp32, in which a kernel
rescales and divides what the plain computation never touches again (of a few entries in fp32 the
plain ones may all be exact by luck):

    max|actual - oracle| <= 2 * (max|plain - oracle| + (eps(dtype) + eps(fp32)) * max|oracle|)

`oracle` is `sparse_attn.reference` in fp64, `plain` the same problem in `plain_attention`.
"""

import math

import torch
from torch import Tensor


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    q_offset: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention as one writes it in torch, in the precision of its inputs.

    Scores, scale and softcap in the input dtype; bias, softmax and lse in fp32 (fp64 for fp64
    inputs); the probabilities go back to the input dtype for the product with v. Differentiable,
    so that its gradients are the plain result for a backward pass.

    Args:
        q: [batch, num_heads, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim], same dtype.
        v: [batch, num_heads_kv, seqlen_k, head_dim_v], same dtype.
        mask: bool, broadcastable to [batch, num_heads, seqlen_q, seqlen_k].
        bias: logit bias, same broadcasting.
        causal: bottom-right aligned, or as q_offset says.
        softmax_scale: default ``1 / sqrt(head_dim)``.
        q_offset: position of row 0; default ``seqlen_k - seqlen_q``.
        softcap: None or 0: none.
        sinks: [num_heads].

    Returns:
        out: [batch, num_heads, seqlen_q, head_dim_v] in the dtype of q.
        lse: float32 (float64 for fp64 inputs) [batch, num_heads, seqlen_q]; -inf for empty rows.
    """
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)
    scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    logits = scores.to(torch.promote_types(q.dtype, torch.float32))
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    if causal:
        offset = k.shape[2] - q.shape[2] if q_offset is None else q_offset
        rows = torch.arange(q.shape[2], device=q.device) + offset
        keys = torch.arange(k.shape[2], device=q.device)
        logits = logits.masked_fill(keys > rows[:, None], -math.inf)
    sink = logits.new_full((q.shape[1],), -math.inf) if sinks is None else sinks.to(logits.dtype)
    sink = sink[None, :, None, None].expand(*logits.shape[:3], 1)
    logits = torch.cat([logits, sink], dim=-1)
    empty = (logits == -math.inf).all(dim=-1, keepdim=True)
    # Rows without a key take any finite logits, so that neither they nor their gradients are NaN.
    logits = torch.where(empty, 0.0, logits)
    probabilities = torch.where(empty, 0.0, torch.softmax(logits, dim=-1))
    out = probabilities[..., :-1].to(q.dtype) @ v
    lse = torch.where(empty.squeeze(-1), -math.inf, torch.logsumexp(logits, dim=-1))
    return out, lse


def error_and_bound(actual: Tensor, oracle64: Tensor, plain: Tensor) -> tuple[float, float]:
    """Largest absolute error over the finite entries of the oracle, and what it may be.

    The unit of rounding is that of the dtype of `actual`.

    Args:
        actual: the result under test.
        oracle64: float64, same shape.
        plain: the plain same-precision result, same shape.

    Returns:
        error: ``max|actual - oracle|``.
        bound: ``2 * (max|plain - oracle| + (eps + eps(fp32)) * max|oracle|)``; without the fp32
            term for float64.
    """
    finite = torch.isfinite(oracle64)
    oracle = oracle64[finite]
    if oracle.numel() == 0:
        return 0.0, 0.0
    error = (actual[finite].double() - oracle).abs().max().item()
    plain_error = (plain[finite].double() - oracle).abs().max().item()
    eps = torch.finfo(actual.dtype).eps
    if actual.dtype != torch.float64:
        eps += torch.finfo(torch.float32).eps
    return error, 2.0 * (plain_error + eps * oracle.abs().max().item())


def assert_matches_oracle(
    actual: Tensor, oracle64: Tensor, plain: Tensor, *, name: str = ""
) -> None:
    """Assert that `actual` is as good as a result of its precision can be asked to be.

    NaN is an error, -inf must stand exactly where the oracle has it (an lse of an empty row), and
    over the other entries the error must be within the bound of `error_and_bound`.

    Args:
        actual: the result under test: out, lse or a gradient, in the dtype it came in.
        oracle64: what `sparse_attn.reference` gives, float64, same shape.
        plain: what `plain_attention` gives, same shape.
        name: what is compared, for the message.

    Raises:
        AssertionError: with the measured error and the bound.
    """
    actual, oracle64, plain = actual.detach().cpu(), oracle64.detach().cpu(), plain.detach().cpu()
    label = name or "result"
    assert oracle64.dtype == torch.float64, f"{label}: the oracle is {oracle64.dtype}, not float64"
    assert actual.shape == oracle64.shape == plain.shape, (
        f"{label}: shapes differ: actual {tuple(actual.shape)}, oracle {tuple(oracle64.shape)}, "
        f"plain {tuple(plain.shape)}"
    )
    minus_inf = oracle64 == -math.inf
    finite = torch.isfinite(oracle64)
    assert bool((finite | minus_inf).all()), f"{label}: the oracle itself has NaN or +inf"
    # A plain result that is not finite would make any error pass.
    assert bool(torch.isfinite(plain[finite]).all()), f"{label}: the plain result is not finite"

    nan = torch.isnan(actual)
    assert not bool(nan.any()), f"{label}: {_count(nan)} NaN"
    wrong = (actual == -math.inf) != minus_inf
    assert not bool(wrong.any()), f"{label}: {_count(wrong)} -inf where the oracle has none or v.v."
    error, bound = error_and_bound(actual, oracle64, plain)
    if not error <= bound:
        difference = torch.where(finite, (actual.double() - oracle64).abs(), 0.0)
        index = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
        raise AssertionError(
            f"{label}: error {error:.3e} is above the bound {bound:.3e} ({actual.dtype}); "
            f"largest at {index}: {actual[index].item():.6g}, "
            f"oracle {oracle64[index].item():.6g}, plain {plain[index].item():.6g}"
        )


def _count(wrong: Tensor) -> str:
    first = tuple(wrong.nonzero()[0].tolist())
    return f"{int(wrong.sum())} of {wrong.numel()} entries (first at {first}) are"
