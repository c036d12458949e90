# SPDX-License-Identifier: Apache-2.0
"""Functions with flash-attn's signatures, and those of its sparse dialects, by sparse_attn.

    from sparse_attn.integrations import flash_attn

    out = flash_attn.flash_attn_func(q, k, v, causal=True, pattern="a_shape")

    with flash_attn.install("a_shape"):  # for code that says `from flash_attn import ...`
        import the_model

Tensors are [batch, seqlen, heads, head_dim], as in flash-attn; nothing is copied to transpose them.
Causality is aligned at the bottom right, as in flash-attn since 2.1. Each function has one argument
more, `pattern`. An argument that is not honoured raises if it has a value that asks for something.

Source: flash-attn 2.8.3, flash_attn/flash_attn_interface.py; vllm-flash-attn, `sparse_attn_func`;
Block-Sparse-Attention, `block_sparse_attn_func`.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sparse_attn.arguments import spans
from sparse_attn.attention import attention, attention_decode, attention_ranges, attention_varlen
from sparse_attn.index import SparseIndex
from sparse_attn.integrations._handle import Handle
from sparse_attn.patterns import Dense, Pattern, SlidingWindow
from sparse_attn.patterns.per_head import same_tiles

__all__ = [
    "block_sparse_attn_func",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "install",
    "sparse_attn_func",
]

PatternLike: TypeAlias = "Pattern | str | Sequence[Pattern | str] | SparseIndex"
Result: TypeAlias = "Tensor | tuple[Tensor, ...]"

_PREFIX = "sparse_attn.integrations.flash_attn"

#: What a caller may do about an argument that is not honoured.
_ADVICE = {
    "dropout_p": "pass 0.0; these kernels have no dropout",
    "alibi_slopes": "pass None; use a model with rotary positions, or flash-attn itself",
    "rotary_cos": "pass None and rotate q and k beforehand",
    "rotary_sin": "pass None and rotate q and k beforehand",
    "cache_leftpad": "pass None; use attention_ranges, which takes a start for each sequence",
    "cache_batch_idx": "pass None and index the cache beforehand, k_cache[cache_batch_idx]",
    "block_table": "use flash_attn_with_kvcache, which takes pages",
}


def _refuse(function: str, **given: Any) -> None:
    """Raise for the first of `given` that asks for something: not None, False or 0."""
    for name, value in given.items():
        if value is None or value is False or (not isinstance(value, Tensor) and value == 0):
            continue
        shown = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise NotImplementedError(
            f"{_PREFIX}.{function}: {name}={shown} is not supported; {_ADVICE[name]}."
        )


def _visible(
    function: str, window: Sequence[int | None], causal: bool, pattern: PatternLike
) -> tuple[PatternLike, bool]:
    """Pattern and causality of a call with window_size: tokens on the left and right of a row."""
    left, right = (-1 if side is None else int(side) for side in window)
    causal = causal or right == 0
    if left < 0 and (right < 0 or causal):
        return pattern, causal
    if not (isinstance(pattern, Dense) or (isinstance(pattern, str) and pattern == "dense")):
        raise NotImplementedError(
            f"{_PREFIX}.{function}: window_size={tuple(window)} together with a sparse pattern is "
            "not supported; pass one of them."
        )
    if causal or left == right:
        return SlidingWindow(left + 1), causal
    raise NotImplementedError(
        f"{_PREFIX}.{function}: window_size={tuple(window)} is not the same on both sides and "
        "causal is False; pass causal=True, or a pattern that says which keys to see."
    )


def _numerics(scale: float | None, softcap: float) -> dict[str, Any]:
    return {"softmax_scale": scale, "softcap": softcap if softcap > 0.0 else None}


def _with_lse(out: Tensor, lse: Tensor, wanted: bool) -> Result:
    """What flash-attn returns: with return_attn_probs also lse, and no probabilities."""
    return (out, lse, out.new_empty(0)) if wanted else out


def _order(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[batch, seqlen, heads, head_dim] as [batch, heads, seqlen, head_dim], or back: views."""
    return tuple(x.transpose(1, 2) for x in tensors)


def _check_rank(function: str, rank: int, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or x.dim() != rank:
            layout = (
                "[batch, seqlen, heads, head_dim]" if rank == 4 else "[tokens, heads, head_dim]"
            )
            if rank == 5:
                layout = "[batch, seqlen, 2 or 3, heads, head_dim]"
            shown = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{_PREFIX}.{function}: {name} is {shown}; pass a tensor {layout}.")


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    pattern: PatternLike = "dense",
) -> Result:
    """flash-attn's `flash_attn_func`, over the keys that `pattern` chooses.

    Args:
        q: [batch, seqlen_q, num_heads, head_dim].
        k: [batch, seqlen_k, num_heads_kv, head_dim].
        v: [batch, seqlen_k, num_heads_kv, head_dim_v].
        dropout_p: 0 only.
        softmax_scale: default 1 / sqrt(head_dim).
        causal: bottom-right aligned.
        window_size: keys to see on the left and on the right of a row's own; -1 for all.
        softcap: bound of the logits; 0 for none.
        alibi_slopes: None only.
        deterministic: results are always deterministic.
        return_attn_probs: whether to return the log-sum-exp too.
        pattern: as in `sparse_attn.attention`.

    Returns:
        [batch, seqlen_q, num_heads, head_dim_v]; with return_attn_probs also the log-sum-exp,
        float32 [batch, num_heads, seqlen_q], -inf for a row without keys, and an empty tensor in
        place of the probabilities, which are never formed.

    Raises:
        ValueError: a tensor does not fit.
        NotImplementedError: an argument that is not honoured has a value.

    Example:
        >>> import torch
        >>> q = torch.randn(1, 300, 8, 64)
        >>> k, v = torch.randn(2, 1, 300, 2, 64)
        >>> flash_attn_func(q, k, v, causal=True, window_size=(63, 0)).shape
        torch.Size([1, 300, 8, 64])
    """
    name = "flash_attn_func"
    _refuse(name, dropout_p=dropout_p, alibi_slopes=alibi_slopes)
    _check_rank(name, 4, q=q, k=k, v=v)
    chosen, causal = _visible(name, window_size, causal, pattern)
    q, k, v = _order(q, k, v)
    options = _numerics(softmax_scale, softcap)
    out, lse = attention(q, k, v, chosen, causal=causal, return_lse=True, **options)
    return _with_lse(out.transpose(1, 2), lse, return_attn_probs)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **options: Any) -> Result:
    """`flash_attn_func` of keys and values in one tensor [batch, seqlen_k, 2, num_heads_kv, dim].

    Args:
        q: [batch, seqlen_q, num_heads, head_dim].
        kv: keys and values.
        args: what follows v in `flash_attn_func`.
        options: as in `flash_attn_func`.
    """
    _check_rank("flash_attn_kvpacked_func", 5, kv=kv)
    k, v = kv.unbind(2)
    return flash_attn_func(q, k, v, *args, **options)


def flash_attn_qkvpacked_func(qkv: Tensor, *args: Any, **options: Any) -> Result:
    """`flash_attn_func` of one tensor [batch, seqlen, 3, num_heads, head_dim].

    Args:
        qkv: queries, keys and values.
        args: what follows v in `flash_attn_func`.
        options: as in `flash_attn_func`.
    """
    _check_rank("flash_attn_qkvpacked_func", 5, qkv=qkv)
    q, k, v = qkv.unbind(2)
    return flash_attn_func(q, k, v, *args, **options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    pattern: PatternLike = "dense",
) -> Result:
    """flash-attn's `flash_attn_varlen_func`: sequences packed one after the other.

    Args:
        q: [total_q, num_heads, head_dim].
        k: [total_k, num_heads_kv, head_dim].
        v: [total_k, num_heads_kv, head_dim_v].
        cu_seqlens_q: int32 [num_seqs + 1], where each sequence's rows begin.
        cu_seqlens_k: int32 [num_seqs + 1], where each sequence's keys begin.
        max_seqlen_q: most rows of a sequence.
        max_seqlen_k: most keys of a sequence.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs, pattern: as in `flash_attn_func`.
        block_table: None only.

    Returns:
        [total_q, num_heads, head_dim_v]; with return_attn_probs also the log-sum-exp, float32
        [num_heads, total_q], and an empty tensor.

    Raises:
        ValueError, NotImplementedError: as `flash_attn_func`.
    """
    name = "flash_attn_varlen_func"
    _refuse(name, dropout_p=dropout_p, alibi_slopes=alibi_slopes, block_table=block_table)
    _check_rank(name, 3, q=q, k=k, v=v)
    chosen, causal = _visible(name, window_size, causal, pattern)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = _numerics(softmax_scale, softcap)
    out, lse = attention_varlen(
        q, k, v, *lengths, chosen, causal=causal, return_lse=True, **options
    )
    return _with_lse(out, lse, return_attn_probs)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    pattern: PatternLike = "dense",
) -> Result:
    """flash-attn's `flash_attn_with_kvcache`: new rows over a cache, in which k and v are written.

    Args:
        q: [batch, seqlen_q, num_heads, head_dim].
        k_cache: [batch, capacity, num_heads_kv, head_dim]; with block_table pages
            [num_pages, page_size, num_heads_kv, head_dim].
        v_cache: the same of the values.
        k: [batch, seqlen_new, num_heads_kv, head_dim], written into the cache behind what is there.
        v: the same of the values.
        rotary_cos, rotary_sin: None only.
        cache_seqlens: int32 [batch] or one int, keys in the cache without k; default: all of it.
        cache_batch_idx, cache_leftpad: None only.
        block_table: int32 [batch, max_pages].
        rotary_interleaved: means nothing without rotary_cos.
        num_splits: how work is split; results do not depend on it and it is not used.
        return_softmax_lse: whether to return the log-sum-exp too.
        softmax_scale, causal, window_size, softcap, alibi_slopes, pattern: as in
            `flash_attn_func`.

    Returns:
        [batch, seqlen_q, num_heads, head_dim_v]; with return_softmax_lse also float32
        [batch, num_heads, seqlen_q].

    Raises:
        ValueError, NotImplementedError: as `flash_attn_func`.
    """
    name = "flash_attn_with_kvcache"
    _refuse(
        name,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        alibi_slopes=alibi_slopes,
    )
    _check_rank(name, 4, q=q, k_cache=k_cache, v_cache=v_cache)
    batch = q.shape[0]
    capacity = k_cache.shape[1] * (block_table.shape[1] if block_table is not None else 1)
    lens = capacity if cache_seqlens is None else cache_seqlens
    lens = torch.as_tensor(lens, dtype=torch.int32, device="cpu").expand(batch)
    if k is not None:
        if v is None:
            raise ValueError(f"{_PREFIX}.{name}: k without v; pass both or none.")
        _check_rank(name, 4, k=k, v=v)
        lens = _append(name, k_cache, v_cache, k, v, lens, capacity, block_table)
    chosen, causal = _visible(name, window_size, causal, pattern)
    if block_table is None:
        k_cache, v_cache = _order(k_cache, v_cache)
    out, lse = attention_decode(
        q.transpose(1, 2),
        k_cache,
        v_cache,
        chosen,
        cache_seqlens=lens,
        block_table=block_table,
        causal=causal,
        return_lse=True,
        **_numerics(softmax_scale, softcap),
    )
    return (out.transpose(1, 2), lse) if return_softmax_lse else out.transpose(1, 2)


def _append(
    function: str,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lens: Tensor,
    capacity: int,
    block_table: Tensor | None,
) -> Tensor:
    """Write k and v behind `lens` keys of each sequence's cache; returns the new lengths."""
    batch, new = k.shape[:2]
    after = lens + new
    if bool((lens < 0).any()) or bool((after > capacity).any()):
        raise ValueError(
            f"{_PREFIX}.{function}: {new} new keys behind cache_seqlens={lens.tolist()} do not fit "
            f"a cache of {capacity}; pass a longer cache, or cache_seqlens without k."
        )
    rows = torch.arange(batch)[:, None].to(k.device)
    position = (lens[:, None] + torch.arange(new)).to(k.device).long()
    if block_table is not None:
        page_size = k_cache.shape[1]
        rows = block_table.long()[rows, position // page_size]
        position = position % page_size
    with torch.no_grad():
        k_cache[rows, position] = k
        v_cache[rows, position] = v
    return after


# ---------------------------------------------------------------------------- sparse dialects


def sparse_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_count: Tensor,
    block_offset: Tensor,
    column_count: Tensor,
    column_index: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
) -> Result:
    """vllm-flash-attn's `sparse_attn_func`: blocks of 64 keys and single columns for 64 rows each.

    Args:
        q: [batch, seqlen_q, num_heads, head_dim].
        k: [batch, seqlen_k, num_heads_kv, head_dim].
        v: the same of the values.
        block_count: int32 [batch, num_heads, ceil(seqlen_q / 64)].
        block_offset: int32 [batch, num_heads, ceil(seqlen_q / 64), max blocks], first tokens.
        column_count: int32 [batch, num_heads, ceil(seqlen_q / 64)].
        column_index: int32 [batch, num_heads, ceil(seqlen_q / 64), max columns], tokens.
        return_softmax_lse: whether to return the log-sum-exp too, float32
            [batch, num_heads, seqlen_q].
        out: where to write the result.
        dropout_p, softmax_scale, causal, softcap, alibi_slopes, deterministic, return_attn_probs:
            as in `flash_attn_func`.

    Returns:
        [batch, seqlen_q, num_heads, head_dim]; with return_softmax_lse also the log-sum-exp.

    Raises:
        ValueError, NotImplementedError: as `flash_attn_func`.
    """
    name = "sparse_attn_func"
    _refuse(name, dropout_p=dropout_p, alibi_slopes=alibi_slopes)
    _check_rank(name, 4, q=q, k=k, v=v)
    index = SparseIndex.from_vertical_slash_lists(
        block_count,
        block_offset,
        column_count,
        column_index,
        seqlen_q=q.shape[1],
        seqlen_k=k.shape[1],
    )
    options = _numerics(softmax_scale, softcap)
    q, k, v = _order(q, k, v)
    result, lse = attention(q, k, v, index, causal=causal, return_lse=True, **options)
    result = result.transpose(1, 2)
    if out is not None:
        result = out.copy_(result)
    if return_softmax_lse:
        return result, lse
    return _with_lse(result, lse, return_attn_probs)


def block_sparse_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    head_mask_type: Tensor,
    streaming_info: Tensor | None,
    base_blockmask: Tensor | None,
    max_seqlen_q_: int,
    max_seqlen_k_: int,
    p_dropout: float,
    deterministic: bool = False,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    exact_streaming: bool = False,
    return_attn_probs: bool = False,
    *,
    block: int = 128,
) -> Result:
    """Block-Sparse-Attention's `block_sparse_attn_func`: dense, streaming and block-sparse heads.

    Args:
        q: [total_q, num_heads, head_dim], sequences one after the other.
        k: [total_k, num_heads_kv, head_dim].
        v: the same of the values.
        cu_seqlens_q: int32 [num_seqs + 1].
        cu_seqlens_k: int32 [num_seqs + 1].
        head_mask_type: integers [num_heads]: 0 dense, -1 streaming, positive block-sparse.
        streaming_info: integers [2 * num_heads], (sink, local) of each head.
        base_blockmask: bool [num_seqs, block-sparse heads, row blocks, key blocks].
        max_seqlen_q_: most rows of a sequence.
        max_seqlen_k_: most keys of a sequence.
        p_dropout: 0 only.
        deterministic: results are always deterministic.
        softmax_scale: default 1 / sqrt(head_dim).
        is_causal: bottom-right aligned.
        exact_streaming: streaming heads exact to the token instead of to the block.
        return_attn_probs: as in `flash_attn_varlen_func`.
        block: rows and keys of a block.

    Returns:
        [total_q, num_heads, head_dim]; with return_attn_probs as `flash_attn_varlen_func`.

    Raises:
        ValueError, NotImplementedError: as `flash_attn_func`.
    """
    name = "block_sparse_attn_func"
    _refuse(name, dropout_p=p_dropout)
    _check_rank(name, 3, q=q, k=k, v=v)
    starts_q, lens_q = spans(name, "cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q_)
    starts_k, lens_k = spans(name, "cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k_)
    if lens_q.shape != lens_k.shape or lens_q.numel() == 0:
        raise ValueError(
            f"{_PREFIX}.{name}: cu_seqlens_q tells of {lens_q.numel()} sequences, cu_seqlens_k of "
            f"{lens_k.numel()}; pass as many, at least one."
        )
    parts = []
    for s, (rows, keys) in enumerate(zip(lens_q.tolist(), lens_k.tolist(), strict=True)):
        mask = base_blockmask
        if mask is not None:
            mask = mask[s : s + 1, :, : -(-rows // block), : -(-keys // block)]
        index = SparseIndex.from_block_sparse_attention(
            head_mask_type,
            streaming_info,
            mask,
            seqlen_q=rows,
            seqlen_k=keys,
            block=block,
            causal=is_causal,
            exact_streaming=exact_streaming,
        )
        parts.append(index)
    ranges = torch.stack((starts_q, lens_q, starts_k, lens_k, lens_k - lens_q), dim=1)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out, lse = attention_ranges(
        q,
        k,
        v,
        SparseIndex.stack(same_tiles(parts)),
        ranges.contiguous(),
        causal=is_causal,
        softmax_scale=softmax_scale,
        return_lse=True,
    )
    return _with_lse(out.squeeze(0).transpose(0, 1), lse.squeeze(0), return_attn_probs)


# ---------------------------------------------------------------------------- under its name


def _bound(function: Callable[..., Any], pattern: PatternLike) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        return function(*args, **({"pattern": pattern} | options))

    call.__name__, call.__doc__ = function.__name__, function.__doc__
    return call


def install(pattern: PatternLike = "dense") -> Handle:
    """Put a module named `flash_attn` in place, for code that imports it.

    The modules `flash_attn` and `flash_attn.flash_attn_interface` then hold the functions of this
    module, with `pattern` unless a call names its own. A flash-attn that is installed, or imported
    before, comes back when the handle is disabled; what has been imported from this one stays.

    Args:
        pattern: which keys calls without a window of their own see.

    Returns:
        A handle; ``disable()`` it, or use it in a ``with`` statement.

    Example:
        >>> import torch
        >>> with install("a_shape"):
        ...     from flash_attn import flash_attn_func
        >>> flash_attn_func(torch.ones(1, 9, 2, 8), *torch.ones(2, 1, 9, 2, 8), causal=True).sum()
        tensor(144.)
    """
    names = ("flash_attn", "flash_attn.flash_attn_interface")
    modules = {name: types.ModuleType(name, __doc__) for name in names}
    packed = (flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func)
    for module in modules.values():
        for function in (*packed, flash_attn_varlen_func, flash_attn_with_kvcache):
            setattr(module, function.__name__, _bound(function, pattern))
    top, interface = modules.values()
    top.__path__ = []
    top.flash_attn_interface = interface  # type: ignore[attr-defined]
    top.__version__ = "2.8.3"  # type: ignore[attr-defined]  # whose signatures these are
    before = {
        name: sys.modules[name]
        for name in list(sys.modules)
        if name == "flash_attn" or name.startswith("flash_attn.")
    }
    for name in before:
        del sys.modules[name]
    sys.modules.update(modules)

    def undo() -> None:
        if sys.modules.get("flash_attn") is not top:
            return  # replaced by somebody else since: not ours to take away
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)

    return Handle("flash_attn", [undo])
