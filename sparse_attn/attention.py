# SPDX-License-Identifier: Apache-2.0
"""The public calls: check the arguments, build the index, choose a kernel, run it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from sparse_attn import backends, dispatch, known_calls, ops
from sparse_attn.arguments import (
    cache_ranges,
    check_numerics,
    check_offset,
    check_qkv,
    check_ranges,
    spans,
)
from sparse_attn.index import SparseIndex
from sparse_attn.paged import check_pages, gather_pages
from sparse_attn.patterns import Dense, Pattern, resolve
from sparse_attn.patterns.base import scale_or_default
from sparse_attn.patterns.per_head import same_tiles

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    PatternLike: TypeAlias = (
        Pattern | str | Sequence[Pattern | str] | Mapping[int, Pattern] | SparseIndex | BlockMask
    )


# List-free indexes of patterns that do not read q and k; emptied when full (a decode loop meets a
# new length at every step).
_static_indexes: dict[tuple[object, ...], SparseIndex] = {}
_MAX_STATIC_INDEXES = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: PatternLike = "dense",
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    q_offset: int | None = None,
    return_lse: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
    fallback: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the keys that `pattern` chooses, each head its own.

    out[i] = sum_j softmax_j(logit[i, j]) v[j] over the chosen keys j that row i may see, with
    logit = softcap(softmax_scale * q[i] . k[j]) + bias[j]. Row i stands at position i + q_offset
    on the key axis and, if causal, sees the keys up to its own position. Query head h reads KV
    head h // (num_heads / num_heads_kv). Arithmetic is exact over the chosen keys, accumulated in
    float32, and the same on any number of threads.

    Args:
        q: [batch, num_heads, seqlen_q, head_dim], float32, bfloat16 or float16; head_dim a
            multiple of 8 up to 512 (on CUDA 256); any strides with a contiguous last dimension.
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v]; head_dim_v as free as head_dim.
        pattern: a Pattern; a pattern's name; one of them per query head (a sequence, or a mapping
            of heads to patterns); a ready SparseIndex; or a torch BlockMask. Causality is added to
            each of them: pass causal=False for a BlockMask that shows rows keys after their own.
        causal: whether row i sees only keys j <= i + q_offset.
        softmax_scale: default 1 / sqrt(head_dim).
        q_offset: position of row 0 on the key axis, default seqlen_k - seqlen_q.
        return_lse: whether to return the log-sum-exp too.
        softcap: logits become softcap * tanh(logits / softcap); None for no bound.
        sinks: float32 [num_heads], a logit per head that takes part in the denominator and has no
            value (attention sinks as in GPT-OSS).
        backend: "auto", or the name of a kernel that must run ("cpu", "cuda").
        fallback: whether dense attention may run in place of a pattern that approximates it, where
            it is faster by the costs of `python -m sparse_attn tune` (or those that ship with the
            package); `explain` says what would run. Default True, or what the environment's
            SPARSE_ATTN_FALLBACK=0 says. Static patterns and indexes always run as they are.

    Returns:
        out [batch, num_heads, seqlen_q, head_dim_v] in q's dtype; with return_lse also lse
        float32 [batch, num_heads, seqlen_q], natural logarithm, sinks included. A row that sees
        no key gives out 0 and lse -inf (or its sink).

    Raises:
        TypeError, ValueError: an argument is wrong; the text says what is allowed.
        UnsupportedError: no kernel can run the call; `.reasons` says why.

    Example:
        >>> import torch, sparse_attn
        >>> q, k, v = (torch.randn(1, 4, 1024, 64) for _ in range(3))
        >>> sparse_attn.attention(q, k, v, sparse_attn.AShape(sink=64, window=256)).shape
        torch.Size([1, 4, 1024, 64])
    """
    plain = softcap is None and sinks is None and backend == "auto"
    key = known_calls.key_of(pattern, q, k, v, causal, softmax_scale, q_offset) if plain else None
    if key is not None and (known := known_calls.repeat(key, q, k, v, causal)) is not None:
        return known if return_lse else known[0]
    check_qkv("attention", q, k, v)
    check_numerics("attention", q.shape[1], causal, softmax_scale, softcap, sinks)
    check_offset("attention", q_offset)
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    offset = seqlen_k - seqlen_q if q_offset is None else q_offset
    numerics = (causal, softmax_scale, softcap, sinks, backend)
    if isinstance(pattern, SparseIndex):
        index = pattern
    elif _is_block_mask(pattern):
        index = SparseIndex.from_block_mask(pattern)  # type: ignore[arg-type]
    else:
        chosen = resolve(pattern, q.shape[1])  # type: ignore[arg-type]
        band = chosen.band_rows(q, k)
        if band is not None and band < seqlen_q:
            out, lse = _banded(q, k, v, chosen, band, offset, fallback, *numerics)
            return (out, lse) if return_lse else out
        index = _paying(chosen, q, k, causal, softmax_scale, offset, fallback)
    if index.seqlen_q != seqlen_q or index.seqlen_k != seqlen_k:
        raise ValueError(
            f"sparse_attn.attention: the index was built for seqlen_q={index.seqlen_q}, "
            f"seqlen_k={index.seqlen_k}, q and k have {seqlen_q} and {seqlen_k}; "
            "build it for these lengths."
        )
    out, lse = _run("attention", q, k, v, index, None, offset, *numerics)
    if key is not None:
        known_calls.keep(key, chosen, index, q, offset, softmax_scale)
    return (out, lse) if return_lse else out


def attention_ranges(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: PatternLike,
    seq_ranges: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
    fallback: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over parts of padded or packed tensors: what varlen, padding and caches share.

    Args:
        q: [batch, num_heads, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        pattern: as in `attention`; lists count rows and keys from the start of each sequence.
        seq_ranges: int32 [num_seqs, 5], on the CPU or where q is, rows of (q_start, q_len, k_start,
            k_len, q_offset) in tokens. With batch 1 any number of sequences lies one after the
            other in q (they must not overlap); else row b belongs to batch entry b.
        causal, softmax_scale, return_lse, softcap, sinks, backend, fallback: as in `attention`.

    Returns:
        As `attention`. Rows of q that no range covers give out 0 and lse -inf.

    Raises:
        TypeError, ValueError, UnsupportedError: as `attention`.
    """
    function = "attention_ranges"
    check_qkv(function, q, k, v)
    check_numerics(function, q.shape[1], causal, softmax_scale, softcap, sinks)
    check_ranges(function, seq_ranges, q, k)
    index = _ranges_index(pattern, q, k, seq_ranges, causal, softmax_scale, fallback)
    out, lse = _run(
        function, q, k, v, index, seq_ranges, 0, causal, softmax_scale, softcap, sinks, backend
    )
    return (out, lse) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    pattern: PatternLike = "dense",
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    q_offset: int | None = None,
    return_lse: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
    fallback: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over sequences of different lengths, packed one after the other.

    Args:
        q: [total_q, num_heads, head_dim], the rows of all sequences.
        k: [total_k, num_heads_kv, head_dim].
        v: [total_k, num_heads_kv, head_dim_v].
        cu_seqlens_q: int32 [num_seqs + 1], ascending from 0 to total_q: sequence s is rows
            cu_seqlens_q[s] to cu_seqlens_q[s + 1].
        cu_seqlens_k: int32 [num_seqs + 1], the same for k and v.
        max_seqlen_q: an upper bound of the sequences' rows (tokens).
        max_seqlen_k: an upper bound of the sequences' keys (tokens).
        pattern: as in `attention`, built for each sequence by itself.
        q_offset: position of row 0 of every sequence, default its keys minus its rows.
        causal, softmax_scale, return_lse, softcap, sinks, backend, fallback: as in `attention`.

    Returns:
        out [total_q, num_heads, head_dim_v]; with return_lse also lse float32
        [num_heads, total_q].

    Raises:
        TypeError, ValueError, UnsupportedError: as `attention`.
    """
    function = "attention_varlen"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(
                f"sparse_attn.{function}: {name} has {x.dim()} dimensions; "
                "pass [total tokens, heads, head_dim]."
            )
    check_offset(function, q_offset)
    starts_q, lens_q = spans(function, "cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    starts_k, lens_k = spans(function, "cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    if starts_q.shape != starts_k.shape:
        raise ValueError(
            f"sparse_attn.{function}: cu_seqlens_q tells of {starts_q.numel()} sequences, "
            f"cu_seqlens_k of {starts_k.numel()}; pass as many."
        )
    offsets = lens_k - lens_q if q_offset is None else torch.full_like(lens_q, q_offset)
    ranges = torch.stack((starts_q, lens_q, starts_k, lens_k, offsets), dim=1).contiguous()
    q4, k4, v4 = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out, lse = attention_ranges(
        q4,
        k4,
        v4,
        pattern,
        ranges,
        causal=causal,
        softmax_scale=softmax_scale,
        return_lse=True,
        softcap=softcap,
        sinks=sinks,
        backend=backend,
        fallback=fallback,
    )
    out, lse = out.squeeze(0).transpose(0, 1), lse.squeeze(0)
    return (out, lse) if return_lse else out


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pattern: PatternLike = "dense",
    *,
    cache_seqlens: Tensor | int | None = None,
    block_table: Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    q_offset: int | None = None,
    return_lse: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
    fallback: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of the newest rows over a cache that is longer than what is in it.

    Args:
        q: [batch, num_heads, seqlen_q, head_dim], usually seqlen_q 1; the last of its keys is the
            last one in the cache.
        k_cache: [batch, num_heads_kv, capacity, head_dim]; with block_table a pool of pages
            [num_pages, page_size, num_heads_kv, head_dim], page_size a multiple of 8.
        v_cache: [batch, num_heads_kv, capacity, head_dim_v], or accordingly in pages.
        pattern: as in `attention`. One that reads keys to choose among them is given a contiguous
            copy of each sequence's keys, if they lie in pages.
        cache_seqlens: int32 [batch] or one int, keys in the cache with those of q; default all.
            Keys past them are never read. On a GPU their values are not checked, which would wait
            for it: a sequence whose length does not fit counts as one without keys.
        block_table: int32 [batch, max_pages]: key j of sequence b lies in page
            block_table[b, j // page_size] at j % page_size. Entries past a sequence's keys are
            not read. Pages may be shared; for a pool in head-major order pass transpose(1, 2).
        q_offset: position of row 0, default cache_seqlens - seqlen_q.
        causal, softmax_scale, return_lse, softcap, sinks, backend, fallback: as in `attention`.

    Returns:
        As `attention`.

    Raises:
        TypeError, ValueError, UnsupportedError: as `attention`; also if a gradient through pages
            is asked for.
        RuntimeError: block_table names a page that the pool does not have.

    Example:
        >>> import torch, sparse_attn
        >>> q, pool = torch.randn(2, 8, 1, 64), torch.randn(10, 16, 2, 64)  # 10 pages of 16 keys
        >>> table = torch.tensor([[7, 2, 5], [0, 9, 0]], dtype=torch.int32)
        >>> lens = torch.tensor([40, 19], dtype=torch.int32)
        >>> sparse_attn.attention_decode(q, pool, pool, cache_seqlens=lens, block_table=table).shape
        torch.Size([2, 8, 1, 64])
    """
    function = "attention_decode"
    if block_table is not None:
        ranges = check_pages(function, q, k_cache, v_cache, block_table, cache_seqlens, q_offset)
        check_numerics(function, q.shape[1], causal, softmax_scale, softcap, sinks)
        k, v = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
        index = _paged_index(pattern, q, k, block_table, ranges, causal, softmax_scale, fallback)
        out, lse = _run(
            *(function, q, k, v, index, ranges, 0, causal, softmax_scale, softcap, sinks, backend),
            block_table=block_table,
        )
        return (out, lse) if return_lse else out
    if cache_seqlens is None:
        return attention(
            q,
            k_cache,
            v_cache,
            pattern,
            causal=causal,
            softmax_scale=softmax_scale,
            q_offset=q_offset,
            return_lse=return_lse,
            softcap=softcap,
            sinks=sinks,
            backend=backend,
            fallback=fallback,
        )
    check_qkv(function, q, k_cache, v_cache)
    batch, _, seqlen_q, _ = q.shape
    ranges = cache_ranges(function, cache_seqlens, batch, seqlen_q, k_cache.shape[2], q_offset)
    return attention_ranges(
        q,
        k_cache,
        v_cache,
        pattern,
        ranges,
        causal=causal,
        softmax_scale=softmax_scale,
        return_lse=return_lse,
        softcap=softcap,
        sinks=sinks,
        backend=backend,
        fallback=fallback,
    )


def merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over a union of disjoint sets of keys, from the attention over each set.

    Args:
        outs: tensors [..., seqlen_q, head_dim_v] of one shape and dtype.
        lses: float32 tensors [..., seqlen_q], as return_lse gives them; -inf for a row without
            keys. A sink must have taken part in one of them only.

    Returns:
        out in the dtype of `outs` and lse float32. Rows without keys in any part give 0 and -inf.

    Raises:
        ValueError: no parts, or parts of different shapes.

    Source: Rabe & Staats, arXiv 2112.05682, section 2; FlashAttention-2, arXiv 2307.08691, eq. 8.
    """
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(
            f"sparse_attn.merge_states: {len(outs)} outs and {len(lses)} lses; "
            "pass as many of both, at least one."
        )
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"sparse_attn.merge_states: part {i} has out {tuple(out.shape)} and lse "
                f"{tuple(lse.shape)}, part 0 has out {tuple(outs[0].shape)}; "
                "pass outs of one shape and lses of that shape without its last dimension."
            )
    stacked = torch.stack([lse.float() for lse in lses])
    lse = torch.logsumexp(stacked, dim=0)
    # -inf - -inf is NaN: a row without keys has weight 0 in every part.
    weights = torch.exp(stacked - lse).masked_fill(stacked == -torch.inf, 0.0)
    total = sum(w[..., None] * out.float() for w, out in zip(weights, outs, strict=True))
    assert isinstance(total, Tensor)
    return total.to(outs[0].dtype), lse


def _run(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex,
    seq_ranges: Tensor | None,
    q_offset: int,
    causal: bool,
    softmax_scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    backend: str,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, num_heads, _, head_dim = q.shape
    num_heads_kv = k.shape[1]
    # Spelt out: under torch.compile, `in` does not find a symbolic size in a tuple.
    given = index.num_heads
    if given != 1 and given != num_heads and given != num_heads_kv:
        raise ValueError(
            f"sparse_attn.{function}: the index has {given} heads; pass one with 1, "
            f"{num_heads_kv} (KV heads) or {num_heads} (query heads)."
        )
    sequences = batch if seq_ranges is None else seq_ranges.shape[0]
    given = index.batch_size
    if given != 1 and given != sequences:
        raise ValueError(
            f"sparse_attn.{function}: the index has batch {given}; pass one with 1 or {sequences}."
        )
    bias = index.column_bias
    problem = backends.Problem(
        "cpu" if q.is_cpu else q.device.type,  # the name takes longer than the question
        q.dtype,
        head_dim,
        v.shape[3],
        bias is not None and bias.requires_grad and torch.is_grad_enabled(),
        not q.is_cpu and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
    )
    backends.choose(function, problem, backend)
    if seq_ranges is not None and seq_ranges.device != q.device:
        seq_ranges = seq_ranges.to(q.device)
    return ops.attention(
        q,
        k,
        v,
        index,
        seq_ranges=seq_ranges,
        q_offset=q_offset,
        causal=causal,
        softmax_scale=scale_or_default(q, softmax_scale),
        softcap=softcap or 0.0,
        sinks=sinks,
        block_table=block_table,
    )


def _banded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    rows: int,
    q_offset: int,
    fallback: bool | None,
    *numerics: Any,
) -> tuple[Tensor, Tensor]:
    """`attention` a band of query rows at a time, so that only one band's index exists.

    The pattern is local to its rows, and `rows` is a multiple of its tile: the result is that of
    one piece, where no band falls back. `numerics` are what `_run` takes after q_offset.
    """
    causal, softmax_scale = numerics[:2]
    outs, lses = [], []
    for first in range(0, q.shape[2], rows):
        band, offset = q[:, :, first : first + rows], q_offset + first
        index = _paying(pattern, band, k, causal, softmax_scale, offset, fallback)
        out, lse = _run("attention", band, k, v, index, None, offset, *numerics)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def build_index(
    pattern: Any,
    q: Tensor,
    k: Tensor,
    causal: bool,
    softmax_scale: float | None,
    q_offset: int,
) -> SparseIndex:
    """The index that `pattern` is or builds."""
    if isinstance(pattern, SparseIndex):
        return pattern
    if _is_block_mask(pattern):
        return SparseIndex.from_block_mask(pattern)
    return _built(resolve(pattern, q.shape[1]), q, k, causal, softmax_scale, q_offset)


def _paying(
    chosen: Pattern,
    q: Tensor,
    k: Tensor,
    causal: bool,
    softmax_scale: float | None,
    q_offset: int,
    fallback: bool | None,
    read: Callable[[], Tensor] | None = None,
) -> SparseIndex:
    """The index that `chosen` builds, or a dense one where that is faster.

    `read` gives the keys where k only has their shape: they are not read for a dense index.
    """
    numerics = (causal, softmax_scale, q_offset)
    may_fall_back = not known_calls.is_tracing() and dispatch.applies(chosen, q, fallback)
    if may_fall_back and dispatch.before(chosen, q, k, causal, q_offset).dense:
        return _built(Dense(), q, k, *numerics)
    keys = k if read is None else read()
    index = _built(chosen, q, keys, *numerics)
    if may_fall_back and dispatch.after(index, q, keys, causal, q_offset).dense:
        return _built(Dense(), q, k, *numerics)
    return index


def _built(
    chosen: Pattern,
    q: Tensor,
    k: Tensor,
    causal: bool,
    softmax_scale: float | None,
    q_offset: int,
) -> SparseIndex:
    """The index that `chosen`, a pattern for the heads of q, builds."""
    if chosen.data_dependent or known_calls.is_tracing():
        with torch.no_grad():
            return chosen.build(q, k, causal=causal, softmax_scale=softmax_scale, q_offset=q_offset)
    # Such an index depends on shapes alone. Without lists it is a few small tensors, and making
    # them anew would be a third of a short call. Nobody outside this module can change them.
    _, heads, seqlen_q, _ = q.shape
    _, heads_kv, seqlen_k, _ = k.shape
    key = (chosen, heads, seqlen_q, heads_kv, seqlen_k, causal, q_offset, q.device)
    index = _static_indexes.get(key)
    if index is None:
        with torch.inference_mode(False), torch.no_grad():
            index = chosen.build(
                q, k, causal=causal, softmax_scale=softmax_scale, q_offset=q_offset
            )
        if len(_static_indexes) >= _MAX_STATIC_INDEXES:
            _static_indexes.clear()
        if index.is_list_free:
            _static_indexes[key] = index
    return index


def _ranges_index(
    pattern: Any,
    q: Tensor,
    k: Tensor,
    seq_ranges: Tensor,
    causal: bool,
    softmax_scale: float | None,
    fallback: bool | None,
) -> SparseIndex:
    """As `build_index`, over the sequences of seq_ranges."""
    if isinstance(pattern, SparseIndex) or _is_block_mask(pattern):
        return build_index(pattern, q, k, causal, softmax_scale, 0)
    chosen = resolve(pattern, q.shape[1])
    if not chosen.data_dependent:
        index = chosen.build(q, k, causal=causal, softmax_scale=softmax_scale, q_offset=0)
        if index.is_list_free:
            return index
    parts = []
    for s, (q_start, q_len, k_start, k_len, q_offset) in enumerate(seq_ranges.tolist()):
        b = slice(s, s + 1) if q.shape[0] > 1 else slice(0, 1)
        rows, keys = slice(q_start, q_start + q_len), slice(k_start, k_start + k_len)
        parts.append(
            _paying(
                chosen.of_sequence(s),
                q[b, :, rows],
                k[b, :, keys],
                causal,
                softmax_scale,
                q_offset,
                fallback,
            )
        )
    return SparseIndex.stack(same_tiles(parts))


def _paged_index(
    pattern: Any,
    q: Tensor,
    k: Tensor,
    block_table: Tensor,
    seq_ranges: Tensor,
    causal: bool,
    softmax_scale: float | None,
    fallback: bool | None,
) -> SparseIndex:
    """As `_ranges_index`, of keys [num_pages, num_heads_kv, page_size, head_dim] in pages."""
    chosen = pattern
    if not isinstance(pattern, SparseIndex) and not _is_block_mask(pattern):
        chosen = resolve(pattern, q.shape[1])
    if not getattr(chosen, "data_dependent", False):
        # What reads no keys sees a stand-in of their shape, which takes no memory.
        shape = (q.shape[0], k.shape[1], block_table.shape[1] * k.shape[2], k.shape[3])
        keys = k.new_empty(()).expand(shape)
        return _ranges_index(chosen, q, keys, seq_ranges, causal, softmax_scale, fallback)
    parts = []
    for s, (_, _, _, k_len, q_offset) in enumerate(seq_ranges.tolist()):
        shape = (1, k.shape[1], k_len, k.shape[3])
        parts.append(
            _paying(
                chosen.of_sequence(s),
                q[s : s + 1],
                k.new_empty(()).expand(shape),
                causal,
                softmax_scale,
                q_offset,
                fallback,
                functools.partial(gather_pages, k, block_table[s], k_len),
            )
        )
    return SparseIndex.stack(same_tiles(parts))


def _is_block_mask(pattern: Any) -> bool:
    return hasattr(pattern, "kv_num_blocks")  # without importing FlexAttention, which is slow
