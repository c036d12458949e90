# SPDX-License-Identifier: Apache-2.0
"""Presets: the configurations that papers publish, each with its source and its deviations.

    out = sparse_attn.attention(q, k, v, sparse_attn.presets.minference())

A preset is a pattern: what it builds is what `preset.pattern` builds.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparse_attn.index import SparseIndex
from sparse_attn.patterns.base import Pattern
from sparse_attn.patterns.static import AShape
from sparse_attn.patterns.vertical_slash import VerticalSlash

__all__ = ["Preset", "a_shape", "minference", "streaming_llm", "tri_shape"]


@dataclass(frozen=True)
class Preset(Pattern):
    """A pattern under its paper's name.

    Attributes:
        name: of the method.
        pattern: what chooses the keys.
        source: paper and arXiv number.
        deviations: where this differs from the published code, a sentence each.
    """

    name: str
    pattern: Pattern
    source: str
    deviations: tuple[str, ...]

    def __post_init__(self) -> None:
        # An instance knows better than its class.
        object.__setattr__(self, "data_dependent", self.pattern.data_dependent)
        object.__setattr__(self, "row_local", self.pattern.row_local)

    def build(
        self,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool = True,
        softmax_scale: float | None = None,
        q_offset: int | None = None,
    ) -> SparseIndex:
        """See `Pattern.build`."""
        return self.pattern.build(
            q, k, causal=causal, softmax_scale=softmax_scale, q_offset=q_offset
        )


def streaming_llm(sink: int = 4, window: int = 1024) -> Preset:
    """Attention sinks and a sliding window.

    Args:
        sink: first keys that every row sees, in tokens.
        window: keys back that a row sees, itself included, in tokens.
    """
    return Preset(
        "streaming_llm",
        AShape(sink=sink, window=window),
        "Xiao et al. 2023, arXiv:2309.17453",
        ("Positions are not re-numbered inside the cache: keys keep the rotation they came with.",),
    )


def a_shape(sink: int = 128, window: int = 3968) -> Preset:
    """MInference's A-shape head: sinks and a sliding window, prefill.

    Args:
        sink: first keys that every row sees, in tokens.
        window: keys back that a row sees, itself included, in tokens.
    """
    return Preset(
        "a_shape",
        AShape(sink=sink, window=window),
        "MInference, Jiang et al. 2024, arXiv:2407.02490",
        (),
    )


def tri_shape(sink: int = 128, window: int = 3968, dense_tail: int = 100) -> Preset:
    """A-shape whose last rows see every key.

    Args:
        sink: first keys that every row sees, in tokens.
        window: keys back that a row sees, itself included, in tokens.
        dense_tail: last rows that see every key, in tokens.
    """
    return Preset(
        "tri_shape",
        AShape(sink=sink, window=window, dense_tail=dense_tail),
        "SCBench, Li et al. 2024, arXiv:2412.10319; MInference's code",
        (),
    )


def minference(vertical: int = 1000, slash: int = 6096) -> Preset:
    """MInference's default head, for models without a searched configuration.

    Args:
        vertical: budget of columns, in keys.
        slash: budget of diagonals.
    """
    return Preset(
        "minference",
        VerticalSlash(vertical=vertical, slash=slash),
        "Jiang et al. 2024, arXiv:2407.02490, algorithm 2",
        (
            "Equal scores are broken towards the lower index; the original leaves it to the "
            "device.",
            "Every chosen column is kept; the original loses those after the nearest diagonal.",
            "Diagonals are merged into bands before they are cut into blocks, so a block is not "
            "always 64 keys from a diagonal's start.",
        ),
    )
