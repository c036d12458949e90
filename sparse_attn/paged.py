# SPDX-License-Identifier: Apache-2.0
"""Caches in pages: their arguments checked, and their keys gathered for patterns that read them."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.arguments import cache_ranges
from sparse_attn.backends import UnsupportedError


def check_pages(
    function: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor | int | None,
    q_offset: int | None,
) -> Tensor:
    """The sequences of a call over pages, once its arguments are found to fit.

    Args:
        function: caller's name, for the errors' text.
        q: [batch, num_heads, seqlen_q, head_dim].
        k_cache: [num_pages, page_size, num_heads_kv, head_dim].
        v_cache: [num_pages, page_size, num_heads_kv, head_dim_v].
        block_table: int32 [batch, max_pages].
        cache_seqlens: int32 [batch] or one int, keys of each sequence.
        q_offset: position of row 0, None for the keys minus the rows.

    Returns:
        seq_ranges as `attention_ranges` takes them, int32 [batch, 5].

    Raises:
        TypeError, ValueError: an argument is wrong; the text says what is allowed.
        UnsupportedError: a gradient is asked for.
    """
    _check_shapes(function, q, k_cache, v_cache)
    if not isinstance(block_table, Tensor):
        raise TypeError(
            f"sparse_attn.{function}: block_table is a {type(block_table).__name__}; "
            "pass an int32 tensor [batch, max_pages]."
        )
    batch, _, seqlen_q, _ = q.shape
    if (
        block_table.dtype != torch.int32
        or block_table.dim() != 2
        or block_table.shape[0] != batch
        or not block_table.is_contiguous()
    ):
        raise ValueError(
            f"sparse_attn.{function}: block_table is {block_table.dtype} "
            f"{tuple(block_table.shape)}; pass contiguous int32 [{batch}, max_pages]."
        )
    if cache_seqlens is None:
        raise ValueError(
            f"sparse_attn.{function}: block_table without cache_seqlens; pass the number of keys "
            "of each sequence, int32 [batch] or one int."
        )
    capacity = block_table.shape[1] * k_cache.shape[1]
    ranges = cache_ranges(function, cache_seqlens, batch, seqlen_q, capacity, q_offset)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_cache, v_cache)):
        reason = "cpu: it has no gradient through a paged cache (block_table)"
        raise UnsupportedError(
            f"sparse_attn.{function}: no backend can run this call: {reason}; "
            "call it under torch.no_grad(), or pass k and v as whole tensors.",
            [reason],
        )
    return ranges


def gather_pages(k: Tensor, pages: Tensor, seqlen_k: int) -> Tensor:
    """The first keys of one sequence, in order.

    Args:
        k: [num_pages, num_heads_kv, page_size, head_dim].
        pages: int32 [max_pages], the sequence's row of the block table.
        seqlen_k: how many keys.

    Returns:
        A copy [1, num_heads_kv, seqlen_k, head_dim].

    Raises:
        RuntimeError: a page does not exist.
    """
    num_pages, num_heads_kv, page_size, head_dim = k.shape
    own = pages[: -(-seqlen_k // page_size)]
    if own.numel() and not 0 <= int(own.min()) <= int(own.max()) < num_pages:
        raise RuntimeError(
            f"sparse_attn: block_table has page {int(own.min())} or {int(own.max())}, the cache "
            f"has {num_pages}."
        )
    rows = k[own.long()].transpose(0, 1).reshape(1, num_heads_kv, -1, head_dim)
    return rows[:, :, :seqlen_k]


def _check_shapes(function: str, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if not isinstance(x, Tensor):
            raise TypeError(
                f"sparse_attn.{function}: {name} is a {type(x).__name__}; pass a torch.Tensor."
            )
        if x.dim() != 4:
            raise ValueError(
                f"sparse_attn.{function}: {name} has {x.dim()} dimensions; pass q [batch, heads, "
                "seqlen, head_dim] and caches [num_pages, page_size, heads, head_dim]."
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"sparse_attn.{function}: {name} is {x.dtype} on {x.device}, q is {q.dtype} on "
                f"{q.device}; pass q and caches of one dtype on one device."
            )
        dim = x.shape[3]
        if dim == 0 or dim % 8 != 0 or x.stride(3) != 1:
            raise ValueError(
                f"sparse_attn.{function}: the last dimension of {name} is {dim} long with stride "
                f"{x.stride(3)}; pass a multiple of 8 numbers with stride 1."
            )
    if k_cache.shape[3] != q.shape[3] or k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(
            f"sparse_attn.{function}: q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)} and "
            f"v_cache {tuple(v_cache.shape)} do not fit; q and k_cache need one head_dim, k_cache "
            "and v_cache one number of pages, page_size and number of heads."
        )
    page_size, num_heads_kv = k_cache.shape[1:3]
    if page_size == 0 or page_size % 8 != 0:
        raise ValueError(
            f"sparse_attn.{function}: page_size={page_size} is not a positive multiple of 8."
        )
    if num_heads_kv == 0 or q.shape[1] % num_heads_kv != 0:
        raise ValueError(
            f"sparse_attn.{function}: {q.shape[1]} query heads are no multiple of {num_heads_kv} "
            "KV heads."
        )
