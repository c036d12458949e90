# SPDX-License-Identifier: Apache-2.0
"""Calls of static patterns that were made before: what their checks and their index came to.

Of a call of a few rows, checks and index take longer than the arithmetic. Where shapes, dtypes and
numbers are those of an earlier call they would come to the same again; strides and devices are
asked for anew, by the operator and by `key_of`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn import ops
from sparse_attn.arguments import check_qkv
from sparse_attn.index import SparseIndex
from sparse_attn.patterns import Pattern
from sparse_attn.patterns.base import scale_or_default

Key = tuple[object, ...]

# Index, q_offset and softmax_scale. Emptied when full: a decode loop meets a new length at every
# step.
_known: dict[Key, tuple[SparseIndex, int, float]] = {}
_MAX_KNOWN = 256


def is_tracing() -> bool:
    """Whether tensors may be stand-ins, which must not be kept."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def key_of(
    pattern: Any,
    q: Any,
    k: Any,
    v: Any,
    causal: bool,
    softmax_scale: float | None,
    q_offset: int | None,
) -> Key | None:
    """All that decides what a call of a static pattern comes to, or None: not such a call.

    The types of numbers are asked for, since True equals 1 as a key and is no length.
    """
    if type(pattern) is not str and getattr(pattern, "data_dependent", True):
        return None
    if not (type(q) is type(k) is type(v) is Tensor) or is_tracing():
        return None
    if not (q.is_cpu and k.is_cpu and v.is_cpu and type(causal) is bool):
        return None
    if not (softmax_scale is None or type(softmax_scale) is float):
        return None
    if not (q_offset is None or type(q_offset) is int):
        return None
    shapes = (q.shape, k.shape, v.shape)
    return (pattern, shapes, q.dtype, k.dtype, v.dtype, causal, softmax_scale, q_offset)


def keep(
    key: Key, chosen: Pattern, index: SparseIndex, q: Tensor, offset: int, scale: float | None
) -> None:
    """Keeps what the call `key` of the pattern `chosen` came to, if shapes alone decided it."""
    if chosen.data_dependent or chosen.approximates or not index.is_list_free:
        return
    if len(_known) >= _MAX_KNOWN:
        _known.clear()
    _known[key] = (index, offset, scale_or_default(q, scale))


def repeat(key: Key, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor] | None:
    """The out and lse of a call that is known, or None."""
    known = _known.get(key)
    if known is None:
        return None
    index, offset, scale = known
    try:
        return ops.attention(
            q,
            k,
            v,
            index,
            seq_ranges=None,
            q_offset=offset,
            causal=causal,
            softmax_scale=scale,
            softcap=0.0,
            sinks=None,
        )
    except RuntimeError:
        check_qkv("attention", q, k, v)  # says what is allowed of strides
        raise
