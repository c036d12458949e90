# SPDX-License-Identifier: Apache-2.0
"""The compiled operators: loading them, their shapes for tracing, and their gradients.

The schemas are in csrc/registration.cpp. Everything else in the package calls the functions here,
never torch.ops.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from sparse_attn.index import SparseIndex


def _load() -> None:
    library = Path(__file__).with_name("_C.abi3.so")
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except (OSError, FileNotFoundError) as error:
        causes = (
            f"the compiled library {library.name} is missing: the source tree is imported instead "
            "of the installed package (run `pip install .` and import from another directory, or "
            "`pip install -e .`)"
            if not library.exists()
            else f"it does not fit this torch ({torch.__version__}; 2.11 or newer is needed), or "
            "was built for another kind of CPU or C library; rebuild with `pip install .`"
        )
        raise ImportError(
            f"sparse_attn: cannot load its operators: {error}. Likely: {causes}."
        ) from error


_load()
_ops = torch.ops.sparse_attn
_attention_op = _ops.attention.default


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

    Returns:
        out [batch, num_heads, seqlen_q, head_dim_v] in q's dtype, lse float32
        [batch, num_heads, seqlen_q].

    Raises:
        RuntimeError: the index breaks a rule (see SparseIndex), or shapes do not fit.
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
    )
    if torch.compiler.is_compiling():
        out, lse = _ops.attention(*arguments)
        return out, lse
    if forward_ad._current_level >= 0:  # the cheap question first
        _refuse_tangents(q, k, v, sinks)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)):
        out, lse = _attention_op(*arguments)
    else:
        # The gradient registered below runs in Python, half the cost of a short call.
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = _attention_op(*arguments)
    return out, lse


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


def window_scores(
    q: Tensor,
    k: Tensor,
    *,
    last_q: int,
    num_distances: int,
    q_offset: int,
    causal: bool,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """`selection.window_scores` on CPU tensors."""
    columns, diagonals = _ops.window_scores(
        q, k, last_q, num_distances, q_offset, causal, softmax_scale
    )
    return columns, diagonals


def top_k(scores: Tensor, k: int) -> Tensor:
    """`selection.top_k_indices` on a contiguous float32 CPU tensor [rows, n], 0 <= k <= n."""
    indices: Tensor = _ops.top_k(scores, k)
    return indices


def vertical_slash_lists(
    verticals: Tensor,
    slashes: Tensor,
    *,
    seqlen_q: int,
    seqlen_k: int,
    q_offset: int,
    causal: bool,
    block_m: int,
    block_n: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`patterns.slash_lists.slash_lists` on CPU tensors: its four tensors, in their order."""
    block_counts, block_indices, column_counts, column_indices = _ops.vertical_slash_lists(
        verticals, slashes, seqlen_q, seqlen_k, q_offset, causal, block_m, block_n
    )
    return block_counts, block_indices, column_counts, column_indices


def cpu_capability() -> str:
    """Name of the instruction set that the CPU kernels run on now."""
    name: str = _ops.cpu_capability()
    return name


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


@torch.library.register_fake("sparse_attn::window_scores")  # type: ignore[untyped-decorator]
def _window_scores_fake(
    q: Tensor, k: Tensor, last_q: int, num_distances: int, *_: Any
) -> tuple[Tensor, Tensor]:
    columns = q.new_empty((*q.shape[:2], k.shape[2]), dtype=torch.float32)
    return columns, q.new_empty((*q.shape[:2], num_distances), dtype=torch.float32)


@torch.library.register_fake("sparse_attn::top_k")  # type: ignore[untyped-decorator]
def _top_k_fake(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty((scores.shape[0], k), dtype=torch.int32)


@torch.library.register_fake("sparse_attn::vertical_slash_lists")  # type: ignore[untyped-decorator]
def _vertical_slash_lists_fake(
    verticals: Tensor,
    slashes: Tensor,
    seqlen_q: int,
    seqlen_k: int,
    q_offset: int,
    causal: bool,
    block_m: int,
    block_n: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts = (verticals.shape[0], (seqlen_q + block_m - 1) // block_m)
    context = torch.library.get_ctx()
    blocks, columns = context.new_dynamic_size(), context.new_dynamic_size()
    return (
        verticals.new_empty(counts, dtype=torch.int64),
        verticals.new_empty(blocks),
        verticals.new_empty(counts, dtype=torch.int64),
        verticals.new_empty(columns),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *rest = inputs
    out, lse = output
    *call_args, sinks = rest
    ctx.is_tensor = [isinstance(x, Tensor) for x in call_args]
    ctx.numbers = [None if isinstance(x, Tensor) else x for x in call_args]
    tensors = [x for x in call_args if isinstance(x, Tensor)]
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(q, k, v, out, lse, sinks, *tensors)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and sinks; the lists and their biases are constants."""
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
    grads = _ops.attention_backward(
        grad_out.to(q.dtype), delta.contiguous(), lse, q, k, v, *call_args
    )
    grad_sinks = None
    if sinks is not None and ctx.needs_input_grad[-1]:
        probability = torch.exp(sinks[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
        grad_sinks = -(probability * delta).sum((0, 2))
    return (*grads, *([None] * (ctx.num_inputs - 4)), grad_sinks)


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "sparse_attn: attention has a first derivative only; call backward without create_graph, "
        "or compute what needs a second derivative with torch's own attention."
    )


torch.library.register_autograd("sparse_attn::attention", _backward, setup_context=_setup_context)
# Without a formula that raises, the gradient would pass for a constant.
torch.library.register_autograd("sparse_attn::attention_backward", _no_second_derivative)
