# SPDX-License-Identifier: Apache-2.0
"""Patterns that are the same for every input: dense, A-shape, tri-shape, sliding window.

Their indexes hold no list at all, only a few numbers a head, so they cost nothing to build and
their kernels apply the exact element rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparse_attn.index import SparseIndex
from sparse_attn.patterns.base import Pattern, check_int, check_qk


@dataclass(frozen=True)
class Dense(Pattern):
    """Every key: ordinary attention.

    Example:
        >>> Dense()
        Dense()
    """

    data_dependent: ClassVar[bool] = False
    row_local: ClassVar[bool] = True

    def build(
        self,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool = True,
        softmax_scale: float | None = None,
        q_offset: int | None = None,
    ) -> SparseIndex:
        """See `Pattern.build`; one head that stands for all."""
        check_qk("Dense", q, k)
        return SparseIndex.dense(q.shape[2], k.shape[2], device=q.device)


@dataclass(frozen=True)
class AShape(Pattern):
    """Attention sinks and a local window; with `dense_tail`, the tri-shape.

    The row at position p sees key j iff j < sink or |p - j| < window (and j <= p where
    attention is causal); the last `dense_tail` rows see every key.

    Attributes:
        sink: first keys that every row sees, in tokens.
        window: keys that end with the row's own, in tokens: 1 is the row's own key alone. Where
            attention is not causal, as many lie ahead.
        dense_tail: last query rows that see everything, in rows; tri-shape uses 100.

    Raises:
        TypeError: a number is not an int.
        ValueError: a number is negative.

    Example:
        >>> AShape(sink=128, window=3968, dense_tail=100)
        AShape(sink=128, window=3968, dense_tail=100)

    Source:
        StreamingLLM (Xiao et al. 2023, arXiv:2309.17453); the numbers are those of MInference
        (Jiang et al. 2024, arXiv:2407.02490), whose n_init and n_local are sink and window.
        Tri-shape: SCBench (Li et al. 2024, arXiv:2412.10319).
    """

    sink: int = 128
    window: int = 3968
    dense_tail: int = 0
    data_dependent: ClassVar[bool] = False
    row_local: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_int("AShape", "sink", self.sink, 0)
        check_int("AShape", "window", self.window, 0)
        check_int("AShape", "dense_tail", self.dense_tail, 0)
        object.__setattr__(self, "row_local", self.dense_tail == 0)  # which rows are last?

    def build(
        self,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool = True,
        softmax_scale: float | None = None,
        q_offset: int | None = None,
    ) -> SparseIndex:
        """See `Pattern.build`; one head that stands for all."""
        check_qk("AShape", q, k)
        return SparseIndex.streaming(
            q.shape[2],
            k.shape[2],
            sink=self.sink,
            window=self.window,
            dense_tail=self.dense_tail,
            device=q.device,
        )


@dataclass(frozen=True)
class SlidingWindow(Pattern):
    """A local window alone: the row at position p sees key j iff |p - j| < window.

    Attributes:
        window: keys that end with the row's own, in tokens; see `AShape`.

    Raises:
        TypeError: `window` is not an int.
        ValueError: `window` is below 1.

    Example:
        >>> SlidingWindow(4096)
        SlidingWindow(window=4096)

    Source:
        Longformer (Beltagy et al. 2020, arXiv:2004.05150), section 3.1.
    """

    window: int
    data_dependent: ClassVar[bool] = False
    row_local: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_int("SlidingWindow", "window", self.window, 1)

    def build(
        self,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool = True,
        softmax_scale: float | None = None,
        q_offset: int | None = None,
    ) -> SparseIndex:
        """See `Pattern.build`; one head that stands for all."""
        check_qk("SlidingWindow", q, k)
        return SparseIndex.streaming(
            q.shape[2], k.shape[2], sink=0, window=self.window, device=q.device
        )
