# SPDX-License-Identifier: Apache-2.0
"""Sparse attention for Hugging Face transformers, through its own registries.

    from sparse_attn.integrations import transformers as sparse_transformers

    sparse_transformers.enable(pattern=sparse_attn.AShape(sink=64, window=1024))
    model.set_attn_implementation("sparse_attn")

Nothing is patched: an attention function and a mask function are registered under one name, and a
model uses them once it is told to. Layers with a sliding window of their own keep exactly that
window; the pattern is for the layers that see everything.

Source: the contract of ``transformers.AttentionInterface`` and ``AttentionMaskInterface`` (5.23).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from sparse_attn.attention import attention, attention_ranges
from sparse_attn.dispatch import DECODE_MAX_ROWS
from sparse_attn.index import SparseIndex
from sparse_attn.integrations._cache_memory import CacheMemory, has_memory
from sparse_attn.integrations._handle import Handle
from sparse_attn.integrations._transformers_mask import MaskInfo, build_mask
from sparse_attn.patterns import Pattern, SlidingWindow

__all__ = ["Handle", "MaskInfo", "PatternChoice", "TransformersHandle", "build_mask", "enable"]

_PREFIX = "sparse_attn.integrations.transformers"

#: A pattern, its name or one per head; or which of these a layer gets (function or dict of layers).
PatternLike: TypeAlias = "Pattern | str | SparseIndex | Sequence[Pattern | str]"
PatternChoice: TypeAlias = (
    "PatternLike | Callable[[int | None], PatternLike] | Mapping[int, PatternLike]"
)


def _register(interface: Any, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Register `function` and return what undoes it."""
    entries: dict[str, Any] = interface._global_mapping
    missing = object()
    before = entries.get(name, missing)
    interface.register(name, function)

    def undo() -> None:
        if entries.get(name) is not function:
            return  # replaced by somebody else since: not ours to take away
        if before is missing:
            del entries[name]
        else:
            entries[name] = before

    return undo


def _pattern_of_layer(choice: PatternChoice, layer_idx: int | None) -> PatternLike:
    if isinstance(choice, Mapping):
        return choice.get(layer_idx, "dense") if layer_idx is not None else "dense"
    if callable(choice) and not isinstance(choice, Pattern):
        return choice(layer_idx)
    return choice


def _is_dense(pattern: PatternLike) -> bool:
    return pattern == "dense" or type(pattern).__name__ == "Dense"


_REFUSED = (
    ("position_bias", "use attn_implementation='sdpa' for this model"),
    ("cache", "continuous batching is not supported, use generate() with a plain cache"),
)


def _refuse(dropout: float, kwargs: Mapping[str, Any]) -> None:
    """Raise for arguments that would change the result and that no kernel here honours."""
    if dropout > 0.0:
        raise ValueError(
            f"{_PREFIX}: dropout={dropout} is not supported; set attention_dropout=0 in the "
            "model's config or call model.eval()."
        )
    for name, advice in _REFUSED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{_PREFIX}: argument {name!r} is not supported; {advice}.")


def _refuse_to_compile() -> None:
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{_PREFIX}: a pattern with a memory cannot be compiled; pass the pattern inside of "
            "it (state.pattern), or leave the model uncompiled."
        )


def _narrowest(*windows: int | None) -> int | None:
    given = [w for w in windows if w is not None]
    return min(given) if given else None


def _index_of_dense_mask(mask: Tensor, seqlen_k: int, pattern: PatternLike) -> SparseIndex:
    """The index that says what a caller's own 4-D mask [batch, heads or 1, q, k] says."""
    if not _is_dense(pattern):
        raise NotImplementedError(
            f"{_PREFIX}: a 4-D attention_mask together with a sparse pattern is not supported; "
            "pass sparse_pattern='dense', or a 2-D padding mask."
        )
    mask = mask[..., :seqlen_k]
    if mask.dtype != torch.bool:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if not bool((hidden | (mask == 0)).all()):
            raise NotImplementedError(
                f"{_PREFIX}: an additive 4-D attention_mask with values other than 0 and -inf is "
                "not supported; use attn_implementation='sdpa'."
            )
        mask = ~hidden
    return SparseIndex.from_dense_mask(mask)


def _index_without(masked: Any, q: Tensor, k: Tensor) -> SparseIndex:
    """The index of all keys but those that a press of kvpress has masked, per batch and KV head.

    Args:
        masked: int64 tensors (batch entries, KV heads, keys), as kvpress leaves them on a module.
        q: [batch, num_heads, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim].
    """
    visible = torch.ones(k.shape[0], k.shape[1], 1, k.shape[2], dtype=torch.bool, device=k.device)
    visible[masked[0], masked[1], 0, masked[2]] = False
    of_one_row = SparseIndex.from_dense_mask(visible)
    return SparseIndex.from_lists(  # one tile that holds all rows: they see the same keys
        seqlen_q=q.shape[2],
        seqlen_k=k.shape[2],
        block_m=-(-q.shape[2] // 16) * 16,
        block_n=of_one_row.block_n,
        block_indptr=of_one_row.block_indptr,
        block_indices=of_one_row.block_indices,
        column_indptr=of_one_row.column_indptr,
        column_indices=of_one_row.column_indices,
    )


def _without_masked_keys(
    module: Any, q: Tensor, k: Tensor, mask: MaskInfo | None, pattern: PatternLike
) -> PatternLike:
    """`pattern`, or what stands for it where kvpress hides keys of single heads.

    kvpress puts keys of its own in their place, of a norm of 1e5, and only if it was imported after
    this module's function was registered. Such a key has no weight, but it spoils every pooled
    score; so the keys are left out by their positions, whether they were replaced or not.
    """
    masked = module.__dict__.get("masked_key_indices")  # a module asks long for what it lacks
    if masked is None or q.shape[2] == k.shape[2]:  # prefill starts anew, as in kvpress
        return pattern
    if not _is_dense(pattern):
        raise NotImplementedError(
            f"{_PREFIX}: a kvpress press that masks keys of single heads together with a sparse "
            "pattern is not supported; pass sparse_pattern='dense' for passes over its cache, or "
            "use a press that removes keys from the cache."
        )
    if mask is not None and (mask.seq_ranges is not None or mask.keys_used != mask.seqlen_k):
        raise NotImplementedError(
            f"{_PREFIX}: a kvpress press that masks keys of single heads works without padding and "
            "with a dynamic cache only; run the sequences of the batch one by one."
        )
    return _index_without(masked, q, k)


def _causal_without_mask(module: Any, kwargs: Mapping[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskInfo | None, pattern: PatternLike, **numerics: Any
) -> Tensor:
    """Run attention over the keys that `mask` leaves; numerics go to the kernel as they are."""
    if mask is None:
        return _out(attention(q, k, v, pattern, **numerics))
    if (q.shape[-2], k.shape[-2]) != (mask.seqlen_q, mask.seqlen_k):
        raise ValueError(
            f"{_PREFIX}: the mask was made for {mask.seqlen_q} queries and {mask.seqlen_k} keys "
            f"but the layer has {q.shape[-2]} and {k.shape[-2]}; use attn_implementation='sdpa'."
        )
    if mask.seq_ranges is not None:
        return _out(attention_ranges(q, k, v, pattern, mask.seq_ranges, **numerics))
    k, v = k[:, :, : mask.keys_used], v[:, :, : mask.keys_used]
    return _out(attention(q, k, v, pattern, q_offset=mask.q_offset, **numerics))


def _out(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


class _Chosen(NamedTuple):
    """What a layer does in passes of one kind.

    Attributes:
        pattern: which keys they see.
        has_memory: whether it remembers earlier passes.
        watched: whether it does, or the layer's choice for passes of the other kind.
    """

    pattern: PatternLike
    has_memory: bool
    watched: bool


class _Plan:
    """What the user asked for: a choice for long passes and one for decoding, layer by layer.

    A layer's choices are asked for once: a short pass feels each question, and where a function
    makes a new memory at each call, the first one counts.
    """

    def __init__(self, pattern: PatternChoice, decode: PatternChoice) -> None:
        self._choices = (pattern, decode)
        self._known: dict[tuple[bool, int | None], _Chosen] = {}

    def of_layer(self, seqlen_q: int, layer_idx: int | None) -> _Chosen:
        """The choice for a pass of `seqlen_q` rows."""
        decoding = seqlen_q <= DECODE_MAX_ROWS
        if torch.compiler.is_compiling():  # a trace would depend on what is known so far
            return self._of_layer(layer_idx)[decoding]
        known = self._known.get((decoding, layer_idx))
        if known is None:
            both = self._of_layer(layer_idx)
            self._known[False, layer_idx], self._known[True, layer_idx] = both
            known = both[decoding]
        return known

    def _of_layer(self, layer_idx: int | None) -> list[_Chosen]:
        patterns = [_pattern_of_layer(choice, layer_idx) for choice in self._choices]
        remember = [has_memory(pattern) for pattern in patterns]
        return [_Chosen(*one, any(remember)) for one in zip(patterns, remember, strict=True)]


@dataclass
class TransformersHandle(Handle):
    """What `enable` returns: a way back, and another choice for a while."""

    _plans: list[_Plan] = field(default_factory=list, repr=False)

    @contextlib.contextmanager
    def choosing(
        self, pattern: PatternChoice = "dense", *, decode: PatternChoice = "dense"
    ) -> Iterator[None]:
        """Another choice than `enable` was given, for what runs inside of a ``with`` statement.

        It is for ``generate``, which takes no argument that it does not know: there a call chooses
        with ``with handle.choosing(...): model.generate(...)``. It holds for every model that uses
        this handle's name, in all threads.

        Args:
            pattern: as in `enable`.
            decode: as in `enable`.
        """
        plan = _Plan(pattern, decode)
        self._plans.append(plan)
        try:
            yield
        finally:
            self._plans.remove(plan)


def _attention_function(plans: list[_Plan], memory: CacheMemory) -> Callable[..., Any]:
    """The function that transformers' attention layers call; the last of `plans` holds."""

    def sparse_attention_forward(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | MaskInfo | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        sparse_pattern: PatternChoice | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        _refuse(dropout, kwargs)
        layer_idx = getattr(module, "layer_idx", None)
        chosen, remembers, watched = plans[-1].of_layer(query.shape[2], layer_idx)
        if sparse_pattern is not None:
            chosen = _pattern_of_layer(sparse_pattern, layer_idx)
            remembers = has_memory(chosen)
        template = None
        if remembers or watched:
            _refuse_to_compile()
            memory.watch(module)
        if remembers:
            template = chosen
            chosen = memory.take(module, template)
        numerics: dict[str, Any] = {
            "softmax_scale": scaling,
            "softcap": softcap,
            "sinks": None if s_aux is None else s_aux.float(),
        }
        if isinstance(attention_mask, Tensor):  # the caller's own: it says everything there is
            index = _index_of_dense_mask(attention_mask, key.shape[2], chosen)
            out = _attend(query, key, value, None, index, causal=False, **numerics)
            return out.transpose(1, 2).contiguous(), None
        causal = _causal_without_mask(module, kwargs)
        window = sliding_window
        if attention_mask is not None:
            causal = attention_mask.causal
            window = _narrowest(attention_mask.window, sliding_window)
        chosen = _without_masked_keys(module, query, key, attention_mask, chosen)
        if window is not None and window < key.shape[2]:
            chosen = SlidingWindow(window)
        out = _attend(query, key, value, attention_mask, chosen, causal=causal, **numerics)
        if template is not None:
            memory.keep(module, template, chosen, key)
        return out.transpose(1, 2).contiguous(), None

    return sparse_attention_forward


def enable(
    pattern: PatternChoice = "dense",
    *,
    decode: PatternChoice = "dense",
    name: str = "sparse_attn",
) -> TransformersHandle:
    """Register sparse attention with transformers under `name`.

    Any model that supports ``set_attn_implementation`` can use it from then on; its weights, its
    cache and its code stay as they are. Padding on either side, dynamic and static caches, chunked
    prefill, grouped-query heads, logit soft-capping, attention sinks, sliding-window layers, packed
    sequences and bidirectional encoders are honoured; anything else raises.

    Args:
        pattern: which keys prefill sees: a pattern, its name, a list with one per head, a dict
            {layer: pattern} (layers that are missing stay dense), or a function of the layer index.
            Each layer's choice is asked for once.
        decode: the same for passes of at most 16 query rows; exact by default.
        name: the name to register; an entry of that name comes back when the handle is disabled.

    A call can choose for itself: ``model(input_ids, sparse_pattern=...)`` takes the same choices
    and stands above both. ``generate`` refuses arguments that it does not know; there it is
    ``with handle.choosing(...): model.generate(input_ids)``.

    A pattern with a memory (`HiPState`, `QuestState`, also as one of a head) is a template here:
    each layer of each cache works with a copy of its own, which lives as long as the cache grows.
    Where a cache is rearranged (beam search) or cropped, the copy starts anew.

    Two models can have two plans: enable each under a `name` of its own.

    Returns:
        A `TransformersHandle`; ``disable()`` it, or use it in a ``with`` statement, to take the
        entries back.

    Raises:
        ImportError: transformers is missing.

    Example:
        >>> from sparse_attn.integrations.transformers import enable
        >>> with enable(pattern="a_shape") as handle:
        ...     print(handle.name)
        sparse_attn
    """
    try:
        models = importlib.import_module("transformers.modeling_utils")
        masks = importlib.import_module("transformers.masking_utils")
    except ImportError as error:
        raise ImportError(
            f"{_PREFIX}.enable: needs the package transformers (5.0 or later); "
            "install it with: pip install transformers"
        ) from error
    handle = TransformersHandle(name, _plans=[_Plan(pattern, decode)])
    memory = CacheMemory()
    handle._undo.append(memory.forget)
    function = _attention_function(handle._plans, memory)
    handle._undo.append(_register(models.AttentionInterface, name, function))
    handle._undo.append(_register(masks.AttentionMaskInterface, name, build_mask))
    return handle


@contextlib.contextmanager
def wrapped_attention(implementation: str, wrapper: Any) -> Iterator[None]:
    """Let `wrapper(function, *args, **kwargs)` stand for a registered attention function."""
    registry = importlib.import_module("transformers.modeling_utils").AttentionInterface
    function = registry._global_mapping[implementation]
    registry.register(implementation, lambda *args, **kwargs: wrapper(function, *args, **kwargs))
    try:
        yield
    finally:
        registry.register(implementation, function)
