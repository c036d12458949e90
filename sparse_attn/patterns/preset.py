# SPDX-License-Identifier: Apache-2.0
"""Preset: a pattern with the paper that it is from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from sparse_attn.index import SparseIndex
from sparse_attn.patterns.base import Pattern


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
        object.__setattr__(self, "approximates", self.pattern.approximates)

    def band_rows(self, q: Tensor, k: Tensor) -> int | None:
        """See `Pattern.band_rows`."""
        return self.pattern.band_rows(q, k)

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

    def of_sequence(self, sequence: int) -> Preset:
        """See `Pattern.of_sequence`."""
        return replace(self, pattern=self.pattern.of_sequence(sequence))

    def of_heads_kv(self, heads: Sequence[int]) -> Preset:
        """See `Pattern.of_heads_kv`."""
        return replace(self, pattern=self.pattern.of_heads_kv(heads))
