# SPDX-License-Identifier: Apache-2.0
"""What transformers asks of a mask function, answered with a few numbers instead of a dense mask.

transformers builds masks by composing small closures (causal, sliding window, padding, packing) and
hands the composition to the mask function of the attention implementation. `build_mask` takes the
composition apart again; whatever it does not know it refuses, because a mask that is ignored is a
wrong answer that nobody notices.

Source: ``transformers.masking_utils`` (checked with 5.0 and 5.23).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_PREFIX = "sparse_attn.integrations.transformers"


@dataclass(frozen=True, eq=False)
class MaskInfo:
    """The visibility of one forward pass, in coordinates of the key tensor that a layer will see.

    Attributes:
        batch_size: rows of the batch.
        seqlen_q: query rows of this pass.
        seqlen_k: length of the key tensor that the cache hands out.
        keys_used: keys at the front of that tensor that hold something; a static cache is longer.
        q_offset: position of query row 0 on the key axis.
        causal: key j is visible to the row at p only if j <= p.
        window: key j is visible to the row at p only if ``|p - j| < window``; None is unlimited.
        seq_ranges: int32 [num_seqs, 5] on the CPU, of (q_start, q_len, k_start, k_len, q_offset),
            for padded or packed batches and for offsets that only a trace knows; None where every
            row of the batch sees the same keys.
    """

    batch_size: int
    seqlen_q: int
    seqlen_k: int
    keys_used: int
    q_offset: int
    causal: bool
    window: int | None
    seq_ranges: Tensor | None

    # `generate` makes the mask of a static cache ahead and passes it back in as `attention_mask`;
    # the three members below make it pass for a mask that is already four-dimensional.
    @property
    def ndim(self) -> int:
        """Number of dimensions of the dense mask that this stands for."""
        return 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the dense mask that this stands for."""
        return (self.batch_size, 1, self.seqlen_q, self.seqlen_k)

    def contiguous(self) -> MaskInfo:
        """Return self: there is no storage to lay out."""
        return self


@dataclass
class _Rule:
    """What a composed mask function says, gathered while taking it apart."""

    causal: bool = False
    window: int | None = None
    lower_only: bool = False  # a window that does not bound keys after the query
    chunk: int | None = None
    packed: Tensor | None = None

    def narrow(self, window: int) -> None:
        self.window = window if self.window is None else min(self.window, window)


def _captured(function: Callable[..., Any]) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return {n: c.cell_contents for n, c in zip(function.__code__.co_freevars, cells, strict=True)}


def _read(function: Callable[..., Any], rule: _Rule) -> None:
    """Add to `rule` what `function` demands; raise NotImplementedError where that is not known."""
    from transformers import masking_utils as utils  # optional, and traceable by torch.compile

    if function is utils.causal_mask_function:
        rule.causal = True
        return
    if function is utils.bidirectional_mask_function:
        return
    name = getattr(function, "__qualname__", repr(function))
    maker = name.split(".")[0] if getattr(function, "__module__", "") == utils.__name__ else ""
    if maker == "and_masks":
        for part in _captured(function)["mask_functions"]:
            _read(part, rule)
    elif maker == "sliding_window_overlay":
        rule.narrow(int(_captured(function)["sliding_window"]))
        rule.lower_only = True
    elif maker == "sliding_window_bidirectional_overlay":
        rule.narrow(int(_captured(function)["sliding_window"]) + 1)  # theirs includes the distance
    elif maker == "chunked_overlay":
        rule.chunk = int(_captured(function)["chunk_size"])
    elif maker == "packed_sequence_mask_function":
        rule.packed = _captured(function)["packed_sequence_mask"]
    elif maker == "remap_positions_for_packed_sequence":
        # Positions restart with each packed sequence: distances inside one are what they were.
        _read(_captured(function)["mask_function"], rule)
    else:
        raise NotImplementedError(
            f"{_PREFIX}: the model composes its mask from {name}, which is none of causal, sliding "
            "window, bidirectional, padding or packing; use attn_implementation='sdpa' for it."
        )


def _rule_of(function: Callable[..., Any] | None, hints: Mapping[str, Any]) -> _Rule:
    """What the mask function says; `hints` are the other arguments of transformers' call."""
    window = hints.get("local_size")
    chunked = getattr(hints.get("config"), "attention_chunk_size", None) is not None
    if function is None:
        return _Rule(causal=True)
    # A trace cannot look into closures. It need not: a mask that may be skipped as "causal" is
    # causal with, at most, the window that comes along; any other composition forbids skipping.
    simple = hints.get("allow_is_causal_skip", False) and window is not None and not chunked
    if torch.compiler.is_compiling() and simple:
        return _Rule(causal=True, window=window, lower_only=True)
    rule = _Rule()
    _read(function, rule)
    return rule


def _check_rule(rule: _Rule, total_k: int) -> None:
    if rule.chunk is not None and total_k > rule.chunk:
        raise NotImplementedError(
            f"{_PREFIX}: chunked attention (attention_chunk_size={rule.chunk}) over {total_k} keys "
            "is not supported; use at most one chunk, or attn_implementation='sdpa'."
        )
    if rule.lower_only and not rule.causal:
        raise NotImplementedError(
            f"{_PREFIX}: a one-sided sliding window without causality is not supported; "
            "use attn_implementation='sdpa'."
        )


def _padding_bounds(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First and one-past-last real key of each row of a bool mask [batch, seqlen_k], int64."""
    ones = mask.to(torch.int64)
    length = mask.shape[-1]
    any_key = ones.amax(-1)
    start = ones.argmax(-1)
    end = (length - ones.flip(-1).argmax(-1)) * any_key
    if not torch.compiler.is_compiling():
        holes = (end - start != ones.sum(-1)).nonzero().flatten()
        if holes.numel():
            raise ValueError(
                f"{_PREFIX}: attention_mask row {int(holes[0])} has padding between real tokens; "
                "only left and right padding can be handled; move the padding to one end."
            )
    return start, end


def _padded_ranges(
    mask: Tensor, seqlen_q: int, q_offset: int | Tensor, causal: bool
) -> Tensor | None:
    """seq_ranges of a batch with left or right padding; None if nothing is padded.

    Rows of a causal pass that are padding themselves belong to no range, so patterns that look at
    first or last rows look at real ones.
    """
    if not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    start, end = _padding_bounds(mask)
    first = torch.zeros_like(start)
    last = first + seqlen_q
    if causal:
        first = (start - q_offset).clamp(0, seqlen_q)
        last = (end - q_offset).clamp(0, seqlen_q)
    q_len = (last - first).clamp(min=0)
    columns = (first, q_len, start, (end - start).clamp(min=0), first + q_offset - start)
    return torch.stack(columns, dim=-1).to("cpu", torch.int32)


def _packed_ranges(packed: Tensor) -> Tensor:
    """seq_ranges of sequences packed in one batch row; packed int [1, seqlen] numbers them."""
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{_PREFIX}: packed sequences cannot be told apart while compiling; "
            "pass attention_mask or use_cache=True for a batch that is not packed."
        )
    if packed.shape[0] != 1:
        raise NotImplementedError(
            f"{_PREFIX}: packed sequences (position_ids that restart) in a batch of "
            f"{packed.shape[0]} are not supported; pack them into one row."
        )
    lengths = torch.unique_consecutive(packed[0], return_counts=True)[1]
    starts = lengths.cumsum(0) - lengths
    zeros = torch.zeros_like(starts)
    return torch.stack((starts, lengths, starts, lengths, zeros), dim=-1).to("cpu", torch.int32)


def _visible(attention_mask: Tensor, kv_offset: int, keys: int) -> Tensor:
    """The 2-D padding mask over the key tensor: cut to it, and False past its own end."""
    mask = attention_mask[:, kv_offset : kv_offset + keys].to(torch.bool)
    return torch.nn.functional.pad(mask, (0, keys - mask.shape[-1]))


def build_mask(
    batch_size: int,
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | MaskInfo | None = None,
    cache_position: Tensor | None = None,
    **hints: Any,
) -> MaskInfo | None:
    """Mask function for transformers' AttentionMaskInterface.

    Args:
        batch_size: rows of the batch.
        q_length: query rows of this pass.
        kv_length: length of the key tensor that the cache will hand out.
        q_offset: absolute position of query row 0; a tensor with static caches.
        kv_offset: absolute position of key 0 (sliding caches drop old keys).
        mask_function: transformers' composed mask function; None means causal.
        attention_mask: bool [batch, seen tokens] padding mask, or a `MaskInfo` made earlier.
        cache_position: int64 [q_length], the positions of the query rows: how the first releases of
            transformers 5 say what q_length and q_offset say since.
        hints: what else transformers passes; only a trace needs some of it.

    Returns:
        None where the layer needs no word beyond "causal, bottom-right"; a `MaskInfo` otherwise.

    Raises:
        NotImplementedError: the mask function holds something this module cannot express.
        ValueError: padding in the middle of a row.
    """
    if isinstance(attention_mask, MaskInfo):
        return attention_mask
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    rule = _rule_of(mask_function, hints)
    _check_rule(rule, kv_offset + kv_length)

    traced_offset = isinstance(q_offset, Tensor) and torch.compiler.is_compiling()
    offset: int | Tensor = (q_offset if traced_offset else int(q_offset)) - kv_offset
    keys_used = kv_length
    if rule.causal and isinstance(offset, int):
        keys_used = min(kv_length, offset + q_length)

    ranges = None
    if rule.packed is not None:
        ranges = _packed_ranges(rule.packed)
    elif attention_mask is not None or isinstance(offset, Tensor):
        device = attention_mask.device if attention_mask is not None else None
        mask = torch.ones(batch_size, keys_used, dtype=torch.bool, device=device)
        if attention_mask is not None:
            mask = _visible(attention_mask, kv_offset, keys_used)
        if isinstance(offset, Tensor):  # keys past the last query are not written yet
            mask = mask & (torch.arange(keys_used, device=mask.device) < offset + q_length)
        ranges = _padded_ranges(mask, q_length, offset, rule.causal)

    host_offset = offset if isinstance(offset, int) else 0
    plain = rule.causal and rule.window is None and ranges is None
    if plain and kv_length == host_offset + q_length:
        return None
    return MaskInfo(
        batch_size=batch_size,
        seqlen_q=q_length,
        seqlen_k=kv_length,
        keys_used=keys_used,
        q_offset=host_offset,
        causal=rule.causal,
        window=rule.window,
        seq_ranges=ranges,
    )
