# SPDX-License-Identifier: Apache-2.0
"""The attention operator: its handle, its shapes for tracing, and its gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparse_attn.ops.library import OPS

if TYPE_CHECKING:
    from sparse_attn.index import SparseIndex

_attention_op = OPS.attention.default
_SINKS = [argument.name for argument in _attention_op._schema.arguments].index("sinks")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex,
    *,
    seq_ranges: Tensor | None,
    q_offset: int,
    causal: bool,
    softmax_scale: float,
    softcap: float,
    sinks: Tensor | None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention over the keys that `index` lists; arguments are checked by the callers.

    Args:
        q: [batch, num_heads, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        index: the choice of keys.
        seq_ranges: int32 [num_seqs, 5] rows of (q_start, q_len, k_start, k_len, q_offset), or
            None for one sequence of the full length per batch entry.
        q_offset: position of query row 0 on the key axis; unused with seq_ranges.
        causal: whether row i sees only keys up to its own position.
        softmax_scale: factor of q . k.
        softcap: bound of the logits, 0 for none.
        sinks: float32 [num_heads] logits that take part in the denominator, or None.
        block_table: int32 [num_seqs, max_pages], the pages that a sequence's keys lie in, or None.
            With it k is [num_pages, num_heads_kv, page_size, head_dim], and v accordingly.

    Returns:
        out [batch, num_heads, seqlen_q, head_dim_v] in q's dtype, lse float32
        [batch, num_heads, seqlen_q].

    Raises:
        RuntimeError: the index breaks a rule (see SparseIndex), a page does not exist, or shapes do
            not fit.
        NotImplementedError: q, k, v or sinks carry a forward-mode tangent.
    """
    arguments = (
        q,
        k,
        v,
        *index.op_args(),
        seq_ranges,
        q_offset,
        causal,
        softmax_scale,
        softcap,
        sinks,
        block_table,
    )
    if torch.compiler.is_compiling():
        out, lse = OPS.attention(*arguments)
        return out, lse
    if forward_ad._current_level >= 0:  # the cheap question first
        _refuse_tangents(q, k, v, sinks)
    if torch.is_grad_enabled() and _wants_gradient(q, k, v, sinks):
        out, lse = _attention_op(*arguments)
    else:
        # The gradient registered below runs in Python, half the cost of a short call.
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = _attention_op(*arguments)
    return out, lse


def _wants_gradient(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> bool:
    wanted = q.requires_grad or k.requires_grad or v.requires_grad
    return wanted or (sinks is not None and sinks.requires_grad)


def _refuse_tangents(*inputs: Tensor | None) -> None:
    """An operator without a forward-mode formula would drop tangents: a derivative of 0."""
    for x in inputs:
        if x is None:
            continue
        dual = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
        if dual.tangent is not None:
            raise NotImplementedError(
                "sparse_attn: attention has no forward-mode derivative; use reverse mode "
                "(backward, torch.autograd.grad)."
            )


def _empty_rows(like: Tensor, heads: int, seqlen: int, dim: int) -> Tensor:
    """As ops/common.cpp: the memory order of rows and heads follows `like`."""
    if like.stride(1) < like.stride(2):
        return like.new_empty(like.shape[0], seqlen, heads, dim).transpose(1, 2)
    return like.new_empty(like.shape[0], heads, seqlen, dim)


@torch.library.register_fake("sparse_attn::attention")  # type: ignore[untyped-decorator]
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = _empty_rows(q, q.shape[1], q.shape[2], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("sparse_attn::attention_backward")  # type: ignore[untyped-decorator]
def _attention_backward_fake(
    grad_out: Tensor, delta: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (_empty_rows(x, x.shape[1], x.shape[2], x.shape[3]) for x in (q, k, v))
    return grad_q, grad_k, grad_v


@torch.library.register_fake("sparse_attn::check_index")  # type: ignore[untyped-decorator]
def _check_index_fake(*_: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *rest = inputs
    out, lse = output
    *call_args, sinks, block_table = rest
    ctx.is_paged = block_table is not None
    ctx.is_tensor = [isinstance(x, Tensor) for x in call_args]
    ctx.numbers = [None if isinstance(x, Tensor) else x for x in call_args]
    tensors = [x for x in call_args if isinstance(x, Tensor)]
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(q, k, v, out, lse, sinks, *tensors)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and sinks; the lists and their biases are constants."""
    if ctx.is_paged:
        raise NotImplementedError(
            "sparse_attn: attention has no gradient through a paged cache (block_table); "
            "call it under torch.no_grad(), or pass k and v as whole tensors."
        )
    q, k, v, out, lse, sinks, *tensors = ctx.saved_tensors
    iterator = iter(tensors)
    call_args = [
        next(iterator) if is_tensor else number
        for is_tensor, number in zip(ctx.is_tensor, ctx.numbers, strict=True)
    ]
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    # d lse / d logit is the probability, as is d out / d logit up to (v - out): one row term.
    delta = (grad_out.float() * out.float()).sum(-1) - grad_lse
    grads = OPS.attention_backward(
        grad_out.to(q.dtype), delta.contiguous(), lse, q, k, v, *call_args
    )
    grad_sinks = None
    if sinks is not None and ctx.needs_input_grad[_SINKS]:
        probability = torch.exp(sinks[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
        grad_sinks = -(probability * delta).sum((0, 2))
    return (*grads, *([None] * (ctx.num_inputs - 5)), grad_sinks, None)


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "sparse_attn: attention has a first derivative only; call backward without create_graph, "
        "or compute what needs a second derivative with torch's own attention."
    )


torch.library.register_autograd("sparse_attn::attention", _backward, setup_context=_setup_context)
# Without a formula that raises, the gradient would pass for a constant.
torch.library.register_autograd("sparse_attn::attention_backward", _no_second_derivative)
