# SPDX-License-Identifier: Apache-2.0
"""Checks of what the public calls are given; their texts say what is allowed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def check_qkv(function: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises unless q, k and v are tensors that fit each other.

    Args:
        function: caller's name, for the text.
        q: [batch, num_heads, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].

    Raises:
        TypeError: one is no tensor.
        ValueError: a shape, dtype, device or stride is wrong.
    """
    if not _fit(q, k, v):
        for name, x in (("q", q), ("k", k), ("v", v)):
            _check_tensor(function, name, x, q)
        _check_together(function, q, k, v)


def _fit(q: Any, k: Any, v: Any) -> bool:
    """All that the checks below ask, without a text for each: a short call feels every question."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return False
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if not (len(q_shape) == len(k_shape) == len(v_shape) == 4):
        return False
    batch, heads, _, dim = q_shape
    batch_k, heads_kv, seqlen_k, dim_k = k_shape
    batch_v, heads_v, seqlen_v, dim_v = v_shape
    dtype, device = q.dtype, q.device
    fits: bool = (
        batch == batch_k == batch_v
        and heads_kv == heads_v
        and seqlen_k == seqlen_v
        and dim == dim_k
        and dim > 0
        and dim_v > 0
        and dim % 8 == 0
        and dim_v % 8 == 0
        and heads_kv > 0
        and heads % heads_kv == 0
        and k.dtype == dtype
        and v.dtype == dtype
        and k.device == device
        and v.device == device
        and q.stride()[3] == 1
        and k.stride()[3] == 1
        and v.stride()[3] == 1
    )
    return fits


def _check_tensor(function: str, name: str, x: Tensor, q: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"sparse_attn.{function}: {name} is a {type(x).__name__}; pass a torch.Tensor."
        )
    if x.dim() != 4:
        raise ValueError(
            f"sparse_attn.{function}: {name} has {x.dim()} dimensions; "
            "pass [batch, heads, seqlen, head_dim]."
        )
    if x.dtype != q.dtype or x.device != q.device:
        raise ValueError(
            f"sparse_attn.{function}: {name} is {x.dtype} on {x.device}, q is {q.dtype} on "
            f"{q.device}; pass q, k and v of one dtype on one device."
        )
    dim = x.shape[3]
    if dim == 0 or dim % 8 != 0:
        label = "head_dim_v" if name == "v" else "head_dim"
        which = "v" if name == "v" else "q, k and v"
        raise ValueError(
            f"sparse_attn.{function}: {label}={dim} is not a multiple of 8; "
            f"pad {which} to {max(8, -(-dim // 8) * 8)}."
        )
    if x.stride(3) != 1:
        raise ValueError(
            f"sparse_attn.{function}: the last dimension of {name} has stride {x.stride(3)}; "
            f"pass {name}.contiguous()."
        )


def _check_together(function: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"sparse_attn.{function}: q {tuple(q.shape)}, k {tuple(k.shape)} and v "
            f"{tuple(v.shape)} do not fit; q and k need one batch and head_dim, k and v one "
            "batch, number of heads and length."
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"sparse_attn.{function}: {q.shape[1]} query heads are no multiple of {k.shape[1]} "
            "KV heads."
        )


def check_ranges(function: str, seq_ranges: Tensor, q: Tensor, k: Tensor) -> None:
    """Raises ValueError unless seq_ranges are rows of `attention_ranges` inside of q and k."""
    if seq_ranges.dtype != torch.int32 or seq_ranges.dim() != 2 or seq_ranges.shape[1] != 5:
        raise ValueError(
            f"sparse_attn.{function}: seq_ranges is {seq_ranges.dtype} {tuple(seq_ranges.shape)}; "
            "pass int32 [num_seqs, 5]."
        )
    if q.shape[0] != 1 and q.shape[0] != seq_ranges.shape[0]:
        raise ValueError(
            f"sparse_attn.{function}: seq_ranges has {seq_ranges.shape[0]} rows for batch "
            f"{q.shape[0]}; pass one for each batch entry."
        )
    # Values on a device would be waited for; kernels there bound them.
    if torch.compiler.is_compiling() or seq_ranges.numel() == 0 or not seq_ranges.is_cpu:
        return
    starts, lens = seq_ranges[:, [0, 2]], seq_ranges[:, [1, 3]]
    limits = torch.tensor([q.shape[2], k.shape[2]])
    bad = ((starts < 0) | (lens < 0) | (starts + lens > limits)).any(dim=1)
    if bool(bad.any()):
        s = int(bad.nonzero()[0])
        raise ValueError(
            f"sparse_attn.{function}: sequence {s} has (q_start, q_len, k_start, k_len) = "
            f"{seq_ranges[s, :4].tolist()}, outside of {q.shape[2]} rows and {k.shape[2]} keys."
        )


def check_numerics(
    function: str,
    num_heads: int,
    causal: bool,
    softmax_scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Raises unless these options of `attention` are what it says of them.

    Raises:
        TypeError: an option is of another type.
        ValueError: a number is out of range, or sinks of another shape or dtype.
    """
    if not isinstance(causal, bool):
        raise TypeError(
            f"sparse_attn.{function}: causal is a {type(causal).__name__}; pass True or False."
        )
    if isinstance(softmax_scale, float) and not math.isfinite(softmax_scale):
        raise ValueError(
            f"sparse_attn.{function}: softmax_scale={softmax_scale} is not finite; pass a number, "
            "or None for 1 / sqrt(head_dim)."
        )
    if softcap is not None and not softcap > 0.0:
        raise ValueError(
            f"sparse_attn.{function}: softcap={softcap} is not above 0; pass None for none."
        )
    if sinks is not None and (sinks.dtype != torch.float32 or sinks.shape != (num_heads,)):
        raise ValueError(
            f"sparse_attn.{function}: sinks is {sinks.dtype} {tuple(sinks.shape)}; "
            f"pass float32 [{num_heads}]."
        )


def check_offset(function: str, q_offset: int | None) -> None:
    """Raises TypeError unless q_offset is an int or None."""
    if isinstance(q_offset, float | str | Tensor):  # not "no int": a traced size is none either
        raise TypeError(
            f"sparse_attn.{function}: q_offset is a {type(q_offset).__name__}; pass an int, the "
            "position of row 0 on the key axis."
        )


def cache_ranges(
    function: str,
    cache_seqlens: Tensor | int,
    batch: int,
    seqlen_q: int,
    capacity: int,
    q_offset: int | None,
) -> Tensor:
    """Ranges, as `attention_ranges` takes them, of rows that follow the keys of a cache.

    Args:
        function: caller's name, for the text.
        cache_seqlens: int [batch] or one int, keys of each sequence.
        batch: sequences.
        seqlen_q: rows of each sequence.
        capacity: keys that the cache can hold of a sequence.
        q_offset: position of row 0, None for the keys minus the rows.

    Returns:
        int32 [batch, 5], on the device of cache_seqlens, whose values are looked at on the CPU
        only: to do that elsewhere would wait for the device, and kernels there bound them.

    Raises:
        TypeError: a length or the offset is no integer.
        ValueError: there are more or fewer lengths than sequences, or one is out of range.
    """
    check_offset(function, q_offset)
    given = torch.as_tensor(cache_seqlens)
    if given.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"sparse_attn.{function}: cache_seqlens is {given.dtype}; pass int32 [{batch}] or one "
            "int."
        )
    if given.dim() > 1 or given.numel() not in (1, batch):
        raise ValueError(
            f"sparse_attn.{function}: cache_seqlens has shape {tuple(given.shape)}; pass int32 "
            f"[{batch}] or one int."
        )
    looked_at = given.is_cpu and not torch.compiler.is_compiling()
    if looked_at and bool(((given < 0) | (given > capacity)).any()):
        raise ValueError(
            f"sparse_attn.{function}: cache_seqlens is {given.tolist()}; a sequence of the cache "
            f"holds 0 to {capacity} keys."
        )
    lens = given.to(torch.int32).expand(batch)
    zeros = torch.zeros_like(lens)
    offsets = lens - seqlen_q if q_offset is None else torch.full_like(lens, q_offset)
    ranges = torch.stack((zeros, torch.full_like(lens, seqlen_q), zeros, lens, offsets), dim=1)
    return ranges.contiguous()


def spans(
    function: str, name: str, cu_seqlens: Tensor, total: int, longest: int
) -> tuple[Tensor, Tensor]:
    """Starts and lengths of packed sequences, int32; raises ValueError unless they fit.

    On another device than the CPU they stay there, and their values are not looked at: to do that
    would wait for the device, and kernels there bound them.

    Args:
        function: caller's name, for the text.
        name: of `cu_seqlens`, for the text.
        cu_seqlens: int32 [num_seqs + 1].
        total: tokens of all sequences.
        longest: tokens that a sequence has at most.
    """
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(
            f"sparse_attn.{function}: {name} is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}; "
            "pass int32 [num_seqs + 1]."
        )
    lens = cu_seqlens.diff()
    if not cu_seqlens.is_cpu:
        return cu_seqlens[:-1], lens
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total or bool((lens < 0).any()):
        raise ValueError(
            f"sparse_attn.{function}: {name} does not ascend from 0 to {total}, the number of "
            f"tokens: {cu_seqlens.tolist()}."
        )
    if lens.numel() > 0 and int(lens.max()) > longest:
        raise ValueError(
            f"sparse_attn.{function}: a sequence of {name} has {int(lens.max())} tokens, more than "
            f"max_seqlen={longest}."
        )
    return cu_seqlens[:-1], lens
