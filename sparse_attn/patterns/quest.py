# SPDX-License-Identifier: Apache-2.0
"""Quest: pages of the cache by the largest logit that their bounds permit, for decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_attn.index import SparseIndex
from sparse_attn.patterns.base import (
    Pattern,
    PatternState,
    check_blocks,
    check_int,
    check_qk,
    offset_or_default,
    scale_or_default,
)
from sparse_attn.selection import (
    BlockGrid,
    block_top_k,
    blocks_index,
    minmax_bound_scores,
    minmax_pool,
)

_FEWEST_PAGES = 3
_BLOCK_M = 64  # a step is one row, but shares an index with prefills where sequences are packed


@dataclass(frozen=True)
class Quest(Pattern):
    """The pages whose bounds permit the largest logits; one query row, every query head its own.

    score(page) = softmax_scale * sum_d max(q_d * low_d, q_d * high_d) over the page's per-channel
    minima and maxima: no key of the page has a larger logit. max(3, budget // page) pages are kept,
    the current one among them. More than one row (prefill) sees every key.

    This form reads all keys at every step to bound their pages; `QuestState` keeps the bounds.

    Attributes:
        budget: keys that a step sees, in tokens.
        page: keys of a page, a multiple of 8.

    Raises:
        TypeError: an argument is no int.
        ValueError: a number is out of range.

    Example:
        >>> Quest(budget=4096).page
        16

    Source:
        Tang et al. 2024, arXiv:2406.10774.
    """

    budget: int = 2048
    page: int = 16
    data_dependent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_int("Quest", "budget", self.budget, 1)
        check_blocks("Quest", 1, self.page)

    def build(
        self,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool = True,
        softmax_scale: float | None = None,
        q_offset: int | None = None,
    ) -> SparseIndex:
        """See `Pattern.build`; every query head has its own pages."""
        check_qk("Quest", q, k)
        bounds = minmax_pool(k, self.page) if q.shape[2] == 1 else k.new_empty(0)
        return self.choose(
            q,
            bounds,
            seqlen_k=k.shape[2],
            q_offset=offset_or_default(q, k, q_offset),
            causal=causal,
            softmax_scale=scale_or_default(q, softmax_scale),
        )

    def choose(
        self,
        q: Tensor,
        bounds: Tensor,
        *,
        seqlen_k: int,
        q_offset: int,
        causal: bool,
        softmax_scale: float,
    ) -> SparseIndex:
        """The pages that q keeps, by given bounds.

        Args:
            q: [batch, heads, seqlen_q, head_dim].
            bounds: float32 [batch, heads_kv, pages, 2 * head_dim] from `minmax_pool`; read for a
                single row only.
            seqlen_k: keys.
            q_offset: position of row 0 on the key axis.
            causal: whether pages past the row are left out.
            softmax_scale: factor of q . k.
        """
        batch, heads, seqlen_q, _ = q.shape
        if seqlen_q != 1:
            return SparseIndex.dense(
                seqlen_q, seqlen_k, block_m=_BLOCK_M, block_n=self.page, device=q.device
            )
        grid = BlockGrid(1, seqlen_k, _BLOCK_M, self.page, q_offset, causal, local_blocks=1)
        scores = minmax_bound_scores(q, bounds, softmax_scale)
        mask = block_top_k(scores, max(_FEWEST_PAGES, self.budget // self.page), grid)
        return blocks_index([mask], grid, batch, heads, q.device)


class QuestState(PatternState):
    """`Quest` over one growing cache: a step reads new keys and the pages' bounds, not all keys.

    The bounds are append-only: keys that were seen must not change. A cache that is shorter than
    what was seen, or of another shape, is taken as a new one; call `reset` if it is as long.

    Args:
        pattern: page size and budget.

    Example:
        >>> import torch
        >>> state = QuestState(Quest(budget=64))
        >>> k = torch.randn(1, 2, 1000, 32)
        >>> for n in (998, 999, 1000):
        ...     index = state.build(torch.randn(1, 4, 1, 32), k[:, :, :n])
        >>> state.length
        1000
    """

    def __init__(self, pattern: Quest | None = None) -> None:
        self.pattern = Quest() if pattern is None else pattern
        if not isinstance(self.pattern, Quest):
            raise TypeError(
                f"sparse_attn.QuestState: pattern is a {type(pattern).__name__}; pass a Quest."
            )
        self.reset()

    def reset(self) -> None:
        """See `PatternState.reset`."""
        self.length = 0
        self._bounds = torch.empty(0)  # [batch, heads_kv, capacity, 2 * head_dim]
        self._sequences: dict[int, QuestState] = {}

    def of_sequence(self, sequence: int) -> Pattern:
        """See `PatternState.of_sequence`: each sequence has bounds of its own."""
        return self._sequences.setdefault(sequence, QuestState(self.pattern))

    def state_dict(self) -> dict[str, Tensor]:
        """See `PatternState.state_dict`."""
        state = {"length": torch.tensor(self.length), "bounds": self._seen().clone()}
        for sequence, member in self._sequences.items():
            for name, value in member.state_dict().items():
                state[f"{sequence}.{name}"] = value
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `PatternState.load_state_dict`."""
        fits = {"length", "bounds"} <= state.keys() and state["bounds"].dtype == torch.float32
        length = int(state["length"]) if fits else 0
        pages = -(-length // self.pattern.page)
        if not fits or (
            length > 0 and (state["bounds"].dim() != 4 or state["bounds"].shape[2] != pages)
        ):
            raise ValueError(
                f"sparse_attn.QuestState.load_state_dict: {sorted(state)} is not what a state of "
                f"{self.pattern} gives; pass the state_dict of one with the same page."
            )
        members: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            sequence, dot, name = key.partition(".")
            if dot:
                members.setdefault(int(sequence), {})[name] = value
        self.reset()
        self.length, self._bounds = length, state["bounds"].clone()
        for number, member in members.items():
            self._sequences[number] = QuestState(self.pattern)
            self._sequences[number].load_state_dict(member)

    def build(
        self,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool = True,
        softmax_scale: float | None = None,
        q_offset: int | None = None,
    ) -> SparseIndex:
        """See `Pattern.build`; what is new in k since the last call is added to the bounds."""
        check_qk("QuestState", q, k)
        self._append(k)
        return self.pattern.choose(
            q,
            self._seen(),
            seqlen_k=k.shape[2],
            q_offset=offset_or_default(q, k, q_offset),
            causal=causal,
            softmax_scale=scale_or_default(q, softmax_scale),
        )

    def _seen(self) -> Tensor:
        return (
            self._bounds[:, :, : -(-self.length // self.pattern.page)]
            if self.length
            else self._bounds
        )

    def _append(self, k: Tensor) -> None:
        """Bounds of the pages that the keys from `length` on lie in."""
        batch, heads_kv, seqlen_k, dim = k.shape
        page = self.pattern.page
        like = (batch, heads_kv, 2 * dim)
        known = self._bounds
        same = known.dim() == 4 and (*known.shape[:2], known.shape[3]) == like
        if not same or known.device != k.device or seqlen_k < self.length:
            self.length = 0
            known = k.new_empty((batch, heads_kv, 0, 2 * dim), dtype=torch.float32)
        first = self.length // page
        pages = -(-seqlen_k // page)
        if pages > known.shape[2]:  # doubled, so that growing costs little a step
            grown = known.new_empty((batch, heads_kv, max(pages, 2 * known.shape[2]), 2 * dim))
            grown[:, :, :first] = known[:, :, :first]
            known = grown
        if seqlen_k > self.length:
            known[:, :, first:pages] = minmax_pool(k[:, :, first * page :], page)
        self._bounds, self.length = known, seqlen_k
