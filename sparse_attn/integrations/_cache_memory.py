# SPDX-License-Identifier: Apache-2.0
"""Which copy of a pattern with a memory belongs to which cache and layer of a transformers model.

An attention function is not told which cache it serves. What it does get is the key tensor that
the cache hands out, and that tensor tells everything: a cache that only grew since the last pass
still holds, before it grows again, the very tensor object of that pass. Whatever rearranges a cache
(beam search, cropping, a reset) puts another object there. A hook on the attention module looks at
it just before each pass.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_attn.patterns import PatternState, PerHead


class _Memory(NamedTuple):
    """What one pass left for the next one over the same cache."""

    keys: weakref.ref[Tensor]  # the tensor that the cache held after the pass
    template: Any  # the user's pattern, of which `pattern` is a copy
    pattern: Any


def has_memory(pattern: Any) -> bool:
    """Whether a pattern, or one of its heads' patterns, remembers earlier calls."""
    return bool(_states(pattern))


class CacheMemory:
    """Copies of patterns with a memory: one for each layer of each cache that is in use."""

    def __init__(self) -> None:
        self._hooks: weakref.WeakKeyDictionary[torch.nn.Module, Any] = weakref.WeakKeyDictionary()
        self._kept: weakref.WeakKeyDictionary[torch.nn.Module, list[_Memory]] = (
            weakref.WeakKeyDictionary()
        )
        self._arrived: weakref.WeakKeyDictionary[torch.nn.Module, _Memory] = (
            weakref.WeakKeyDictionary()
        )

    def watch(self, module: torch.nn.Module) -> None:
        """Look at the cache of `module` before each of its passes from now on."""
        if module not in self._hooks:
            hook = module.register_forward_pre_hook(self._before_pass, with_kwargs=True)
            self._hooks[module] = hook

    def forget(self) -> None:
        """Drop every memory, and stop looking."""
        for hook in self._hooks.values():
            hook.remove()
        for store in (self._hooks, self._kept, self._arrived):
            store.clear()

    def take(self, module: torch.nn.Module, template: Any) -> Any:
        """The copy of `template` that belongs to the pass under way; a new one if there is none."""
        memory = self._arrived.pop(module, None)
        if memory is not None and memory.template is template:
            return memory.pattern
        fresh = copy.deepcopy(template)
        for state in _states(fresh):
            state.reset()
        return fresh

    def keep(self, module: torch.nn.Module, template: Any, pattern: Any, keys: Tensor) -> None:
        """Remember `pattern` for the next pass over the cache that handed out `keys`."""
        kept = self._kept.setdefault(module, [])
        kept.append(_Memory(weakref.ref(keys), template, pattern))

    def _before_pass(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        self._arrived.pop(module, None)  # of a pass that another function served
        kept = [memory for memory in self._kept.get(module, []) if memory.keys() is not None]
        held = _held_keys(_cache_of(kwargs), getattr(module, "layer_idx", None))
        for memory in kept:
            if memory.keys() is held:
                self._arrived[module] = memory
        self._kept[module] = [memory for memory in kept if memory.keys() is not held]


def _cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The cache among an attention module's arguments: "cache" since transformers 5.24."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def _held_keys(cache: Any, layer_idx: int | None) -> Tensor | None:
    """The key tensor that a cache holds for a layer; None if it holds none that can be told."""
    layers = getattr(cache, "self_attention_cache", cache)  # of an encoder and decoder
    layers = getattr(layers, "layers", None)
    if layers is None or layer_idx is None or layer_idx >= len(layers):
        return None
    return getattr(layers[layer_idx], "keys", None)


def _states(pattern: Any) -> list[PatternState]:
    """The members of a pattern, of a list or of a dict of them that remember earlier calls."""
    if isinstance(pattern, PatternState):
        return [pattern]
    members: list[Any] = []
    if isinstance(pattern, PerHead):
        members = [*(member for _, member in pattern.patterns), pattern.default]
    elif isinstance(pattern, Mapping):
        members = list(pattern.values())
    elif isinstance(pattern, Sequence) and not isinstance(pattern, str):
        members = list(pattern)
    return [state for member in members for state in _states(member)]
