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
from sparse_attn.patterns.hip import HiP, InfiniteHiP
from sparse_attn.patterns.static import AShape
from sparse_attn.patterns.vertical_slash import VerticalSlash

__all__ = [
    "Preset",
    "a_shape",
    "hip",
    "infinite_hip",
    "minference",
    "streaming_llm",
    "tri_shape",
]


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


def hip(mask_k: int = 512, window: int = 256) -> Preset:
    """HiP's tree search in the parameters of its second version.

    Args:
        mask_k: keys to keep, in tokens.
        window: keys back that a row sees, itself included, in tokens.
    """
    return Preset(
        "hip",
        HiP(mask_k=mask_k, window=window),
        "Lee et al. 2024, arXiv:2406.09827",
        (
            "Scores are scaled by softmax_scale; the original leaves that to its caller.",
            "Equal scores are broken towards the lower position; the original leaves it to the "
            "device.",
            "Leaves that do not divide evenly are dealt to pieces which differ by one leaf, and "
            "the last leaf may be shorter.",
            "Every query head has its own choice, and no first rows are dense.",
        ),
    )


def infinite_hip(k: int = 2048, window: int = 1024) -> Preset:
    """InfiniteHiP's three stages of pruning: chunks of 256, 32 and 8 keys.

    Args:
        k: keys to keep, in tokens.
        window: keys back that a row sees, itself included, in tokens.
    """
    return Preset(
        "infinite_hip",
        InfiniteHiP(k=k, window=window),
        "Lee et al. 2025, arXiv:2502.08910",
        (
            "Scores are scaled by softmax_scale; the original leaves that to its caller.",
            "Equal scores are broken towards the lower position; the original leaves it to the "
            "device.",
            "The key axis of a tile ends with its own last row instead of with the sequence, so "
            "that a prefill in chunks chooses what one call chooses.",
            "Chunks keep to the grid that begins with the first key after the sinks.",
            "A window of less than the first chunk stays as it is; the original widens it.",
            "No layer, and not the last rows of a prefill, is treated apart.",
            "Keys keep the rotation they came with; positions are not extended.",
        ),
    )
