# SPDX-License-Identifier: Apache-2.0
"""Sparse self-attention in models of diffusers, through their attention processors.

    from sparse_attn.integrations import diffusers as sparse_diffusers

    with sparse_diffusers.enable(pipe.transformer, sparse_attn.BlockSparse(density=0.25)) as handle:
        image = pipe(prompt).images[0]
    print(handle.calls)

diffusers has no public registry of attention backends, but every attention layer has a processor
that can be exchanged, and each of them calls torch's `scaled_dot_product_attention`. A
`SparseProcessor` lets the layer's own processor do its work and computes that one call.

Source: ``diffusers/models/attention.py`` and ``attention_processor.py`` (0.42).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from sparse_attn.integrations.sdpa import PatternLike, Router, SdpaHandle
from sparse_attn.patterns import Pattern

__all__ = ["SparseProcessor", "enable"]

_PREFIX = "sparse_attn.integrations.diffusers"

#: A pattern for all layers; or for each by its processor's name, None leaving the layer as it is.
LayerChoice: TypeAlias = (
    "PatternLike | Callable[[str], PatternLike | None] | Mapping[str, PatternLike]"
)


class _OneCall(TorchFunctionMode):
    """Within it, `scaled_dot_product_attention` is what a router makes of it."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self._router = router

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._router.call(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class SparseProcessor:
    """An attention processor that does what another one does, with sparse self-attention.

    Attributes are those of the processor inside, to read and to set.

    Args:
        inner: the layer's own processor.
        router: the pattern, and the count of its calls.
    """

    def __init__(self, inner: Callable[..., Any], router: Router) -> None:
        # What diffusers asks about a processor's arguments, it asks of the instance's __call__.
        call = functools.wraps(inner.__call__)(functools.partial(self._call))  # type: ignore[operator]
        self.__dict__.update(inner=inner, router=router, __call__=call)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        with _OneCall(self.router):
            return self.inner(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the processor inside."""
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["inner"], name, value)


def _pattern_of(choice: LayerChoice, name: str) -> PatternLike | None:
    if isinstance(choice, Mapping):
        return choice.get(name)
    if callable(choice) and not isinstance(choice, Pattern):
        return choice(name)
    return choice


def enable(model: Any, pattern: LayerChoice) -> SdpaHandle:
    """Give the attention layers of a diffusers model sparse processors.

    Self-attention (also joint attention over text and image) goes by the pattern. Cross-attention,
    masks and dropout stay with torch and are counted in `SdpaHandle.calls`.

    Args:
        model: one with `attn_processors` and `set_attn_processor`: a pipeline's `transformer` or
            `unet`.
        pattern: a pattern, its name or a list with one per head, for every layer; a dict by the
            names in `model.attn_processors` (layers that are missing stay as they are); or a
            function of such a name, which may return None.

    Returns:
        A handle; ``disable()`` it, or use it in a ``with`` statement, to put the very same
        processors back.

    Raises:
        TypeError: the model has no processors.
        ValueError: a dict names a layer that does not exist.
        NotImplementedError: a layer's processor has weights of its own.
    """
    if not hasattr(model, "attn_processors") or not hasattr(model, "set_attn_processor"):
        raise TypeError(
            f"{_PREFIX}.enable: model is a {type(model).__name__} without attn_processors; pass a "
            "pipeline's transformer or unet, or use sparse_attn.integrations.sdpa."
        )
    before = dict(model.attn_processors)
    if isinstance(pattern, Mapping) and not pattern.keys() <= before.keys():
        wrong = sorted(pattern.keys() - before.keys())[0]
        raise ValueError(
            f"{_PREFIX}.enable: the model has no layer {wrong!r}; its layers are "
            f"{', '.join(sorted(before))}."
        )
    calls: Counter[str] = Counter()
    after = {}
    for name, processor in before.items():
        chosen = _pattern_of(pattern, name)
        if chosen is None:
            after[name] = processor
            continue
        if isinstance(processor, torch.nn.Module):
            raise NotImplementedError(
                f"{_PREFIX}.enable: the processor {name!r} has weights of its own "
                f"({type(processor).__name__}), which exchanging it would take out of the model; "
                "leave this layer out, or use sparse_attn.integrations.sdpa."
            )
        after[name] = SparseProcessor(processor, Router(chosen, calls=calls))
    model.set_attn_processor(after)
    return SdpaHandle("diffusers", [lambda: model.set_attn_processor(dict(before))], calls)
