# SPDX-License-Identifier: Apache-2.0
"""Sparse attention for every model that calls torch's `scaled_dot_product_attention`.

    from sparse_attn.integrations import sdpa

    with sdpa.enable(sparse_attn.AShape(sink=64, window=1024)) as handle:
        model(inputs)
    print(handle.calls)

It goes through torch's own registry of flash attention implementations
(`torch.nn.attention.register_flash_attention_impl`); no function of Python is replaced. A call that
the pattern is not for, or that these kernels cannot honour, is computed by torch as before, and
`Handle.calls` tells how many there were of each kind.

Source: ``torch/nn/attention/_registry.py`` and ``aten/src/ATen/native/transformers`` (2.13);
docs/adr/0004 has what was found there.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.attention as torch_attention
from torch import Tensor
from torch.nn.attention import _registry

from sparse_attn.attention import attention
from sparse_attn.backends import BACKENDS, Problem
from sparse_attn.dispatch import DECODE_MAX_ROWS
from sparse_attn.integrations._handle import Handle
from sparse_attn.patterns import Pattern

__all__ = ["Router", "SdpaHandle", "enable"]

_PREFIX = "sparse_attn.integrations.sdpa"
_OP = "_scaled_dot_product_flash_attention_for_cpu"

PatternLike: TypeAlias = "Pattern | str | Sequence[Pattern | str]"


@dataclass
class Router:
    """Decides, call by call, between a pattern and torch.

    Attributes:
        pattern: for calls with as many rows as keys (self-attention), and for causal ones.
        decode: for calls of a few rows over more keys, without causality; None leaves them to
            torch.
        calls: how many calls were "sparse", and how many torch computed, by reason.
    """

    pattern: PatternLike
    decode: PatternLike | None = None
    calls: Counter[str] = field(default_factory=Counter)

    def reason_for_torch(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool
    ) -> str | None:
        """Why torch has to compute a call; None if a pattern will."""
        if mask is not None:
            return "attn_mask"
        if dropout > 0.0:
            return "dropout_p"
        if not q.dim() == k.dim() == v.dim() == 4:
            return "tensors that are not four-dimensional"
        if q.dtype != k.dtype or q.dtype != v.dtype or k.shape[1] != v.shape[1]:
            return "dtypes or heads that differ"
        if q.shape[1] % max(k.shape[1], 1) or q.shape[0] != k.shape[0]:
            return "heads or batch that are broadcast"
        if q.shape[3] % 8 or v.shape[3] % 8:
            return "head_dim not a multiple of 8"
        why_not = BACKENDS["cpu"](Problem(q.device.type, q.dtype, q.shape[3], v.shape[3]))
        if why_not:
            return why_not[0]
        if not causal and q.shape[2] != k.shape[2]:
            if q.shape[2] > min(DECODE_MAX_ROWS, k.shape[2]):
                return "cross-attention"  # rows without a place among the keys
            if self.decode is None:
                return "decoding without a pattern for it"
        return None

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of a call that `reason_for_torch` has no objection to."""
        self.calls["sparse"] += 1
        decoding = not causal and q.shape[2] != k.shape[2]
        pattern = self.decode if decoding else self.pattern
        assert pattern is not None
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        # torch aligns a causal mask at the top left: row i sees keys j <= i whatever the lengths.
        offset = 0 if causal else None
        options: dict[str, Any] = {"causal": causal, "softmax_scale": scale, "q_offset": offset}
        out, lse = attention(q, k, v, pattern, return_lse=True, **options)
        return out, lse

    def call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`torch.nn.functional.scaled_dot_product_attention`, by the pattern or by torch."""
        tensors = (query, key, value)
        reason = self.reason_for_torch(*tensors, attn_mask, dropout_p, is_causal)
        if reason is None and not enable_gqa and query.shape[1] != key.shape[1]:
            reason = "dtypes or heads that differ"  # an error, and torch's to raise
        if reason is None:
            return self.run(*tensors, is_causal, scale)[0]
        self.calls[reason] += 1
        return torch.nn.functional.scaled_dot_product_attention(
            *tensors, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


@dataclass
class SdpaHandle(Handle):
    """A registration with torch that can be taken back; also a context manager.

    Attributes:
        name: under which the implementation is listed by `list_flash_attention_impls`.
        calls: how many calls were "sparse", and how many torch computed, by reason. Calls that
            torch sends to its plain kernels (dropout, a mask with a gradient, values of another
            head_dim) do not reach the registry and are not counted.
    """

    calls: Counter[str] = field(default_factory=Counter)


def _kernel(router: Router, theirs: Any, with_gradient: bool) -> Callable[..., Any]:
    """What stands in the dispatcher in front of torch's kernel `theirs`.

    Args:
        router: decides.
        theirs: the kernel that a call is handed on to.
        with_gradient: whether it stands above autograd: there only calls that need a gradient are
            computed, since torch's own would be that of dense attention. All others come to the
            kernel below, which counts them.
    """

    def kernel(
        keys: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Any:
        reason = router.reason_for_torch(q, k, v, attn_mask, dropout_p, is_causal)
        if reason is None:
            needed = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
            if needed or not with_gradient:
                return router.run(q, k, v, is_causal, scale)
        elif not with_gradient:
            router.calls[reason] += 1
        options = {"attn_mask": attn_mask, "scale": scale}
        return theirs.call_boxed(keys, q, k, v, dropout_p, is_causal, **options)

    return kernel


class _Override:
    """The kernels of one implementation, in torch's dispatcher as long as it lives."""

    def __init__(self, router: Router) -> None:
        op = getattr(torch.ops.aten, _OP).default
        below = torch.library.get_kernel(op, "CPU")
        above = torch.library.get_kernel(op, "AutogradCPU")

        self._library: Any = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():  # torch warns that a kernel is replaced, which is the point
            warnings.filterwarnings("ignore", message="(?s).*previously registered kernel")
            self._library.impl(_OP, _kernel(router, below, False), "CPU", with_keyset=True)
            self._library.impl(_OP, _kernel(router, above, True), "AutogradCPU", with_keyset=True)

    def remove(self) -> None:
        """Torch's protocol: take the kernels out."""
        self._library._destroy()


def _free_name(name: str) -> str:
    taken = set(torch_attention.list_flash_attention_impls())
    tries = [name, *(f"{name}_{n}" for n in range(2, len(taken) + 3))]
    return next(candidate for candidate in tries if candidate not in taken)


def _undo(name: str, previous: str | None) -> Callable[[], None]:
    """What takes implementation `name` back, and puts the one before it in place again."""

    def undo() -> None:
        active = torch_attention.current_flash_attention_impl() == name
        if active:
            torch_attention.restore_flash_attention_impl()
        _registry._FLASH_ATTENTION_IMPLS.pop(name, None)
        if active and previous in torch_attention.list_flash_attention_impls():
            torch_attention.activate_flash_attention_impl(previous)

    return undo


def enable(
    pattern: PatternLike, *, decode: PatternLike | None = None, name: str = "sparse_attn"
) -> SdpaHandle:
    """Register and activate sparse attention as torch's flash attention implementation on the CPU.

    From then on `torch.nn.functional.scaled_dot_product_attention` chooses keys by `pattern` where
    rows and keys are as many (self-attention) or the call is causal. Gradients are those of the
    sparse attention. torch computes, as before: calls with an attn_mask (whatever is in it) or
    dropout, cross-attention, float64, head dimensions that are no multiple of 8 or above 512, and
    tensors that are not on the CPU. Causality is torch's: aligned at the top left.

    torch keeps one implementation active: one that was active before comes back when this one is
    disabled.

    Args:
        pattern: a pattern, its name, or a list with one per head.
        decode: the same for calls without causality of at most 16 rows over more keys (a step of
            generation); None leaves them to torch.
        name: under which torch lists it; a number is added if it is taken.

    Returns:
        A handle; ``disable()`` it, or use it in a ``with`` statement.

    Raises:
        TypeError: `pattern` or `decode` is none of these.

    Example:
        >>> import torch
        >>> from sparse_attn.integrations import sdpa
        >>> q, k, v = torch.randn(3, 1, 4, 300, 64)
        >>> with sdpa.enable("a_shape") as handle:
        ...     _ = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> handle.calls
        Counter({'sparse': 1})
    """
    for argument, given in (("pattern", pattern), ("decode", decode)):
        if given is None and argument == "decode":
            continue
        if not isinstance(given, (Pattern, str, Sequence)):
            raise TypeError(
                f"{_PREFIX}.enable: {argument} is a {type(given).__name__}; pass a Pattern, a "
                "name, or a list of them with one per head."
            )
    router = Router(pattern, decode)
    name = _free_name(name)
    previous = torch_attention.current_flash_attention_impl()
    torch_attention.register_flash_attention_impl(name, register_fn=lambda: _Override(router))
    torch_attention.activate_flash_attention_impl(name)
    return SdpaHandle(name, [_undo(name, previous)], router.calls)
