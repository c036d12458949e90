# SPDX-License-Identifier: Apache-2.0
"""PerHead: a pattern of its own for every query head, in one index."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparse_attn.index import SparseIndex
from sparse_attn.lists import numbers
from sparse_attn.patterns.base import Pattern, check_qk


@dataclass(frozen=True, init=False)
class PerHead(Pattern):
    """One pattern per query head.

    Heads with equal patterns are built together, each group on its own query heads and the KV
    heads that these read. Groups whose lists have different tile sizes are refined to the greatest
    common divisors, so the kernel sees one index; heads without lists take any size.

    Attributes:
        patterns: (head, pattern) pairs, sorted by head. Given as a sequence (one pattern per query
            head) or as a mapping from head to pattern.
        default: pattern of the heads that `patterns` leaves out; None: none may be left out.

    Raises:
        TypeError: something is not a Pattern, or a head is not an int.
        ValueError: there is no pattern, a head is negative, or a PerHead is nested.

    Example:
        >>> from sparse_attn.patterns import AShape, Dense
        >>> PerHead({2: Dense()}, default=AShape()).pattern_of(2)
        Dense()
    """

    patterns: tuple[tuple[int, Pattern], ...]
    default: Pattern | None
    data_dependent: ClassVar[bool] = True

    def __init__(
        self,
        patterns: Sequence[Pattern] | Mapping[int, Pattern],
        default: Pattern | None = None,
    ) -> None:
        pairs = _pairs(patterns)
        if not pairs and default is None:
            raise ValueError(
                "sparse_attn.PerHead: no pattern given; pass one per query head, or a default."
            )
        for head, pattern in pairs:
            if isinstance(head, bool) or not isinstance(head, int):
                raise TypeError(f"sparse_attn.PerHead: head {head!r} is not an int; pass an int.")
            if head < 0:
                raise ValueError(f"sparse_attn.PerHead: head {head} is negative; count from 0.")
            _check_member(f"the pattern of head {head}", pattern)
        if default is not None:
            _check_member("default", default)
        pairs.sort(key=lambda pair: pair[0])
        object.__setattr__(self, "patterns", tuple(pairs))
        object.__setattr__(self, "default", default)
        # An instance knows better than its class: it reads the data only if a member does.
        object.__setattr__(self, "data_dependent", any(p.data_dependent for p in self._members()))

    def pattern_of(self, head: int) -> Pattern:
        """The pattern of one query head.

        Raises:
            ValueError: the head has no pattern and there is no default.
        """
        pattern = dict(self.patterns).get(head, self.default)
        if pattern is None:
            raise ValueError(
                f"sparse_attn.PerHead: head {head} has no pattern; add one, or pass a default."
            )
        return pattern

    def of_sequence(self, sequence: int) -> PerHead:
        """See `Pattern.of_sequence`: every member's own."""
        members = {id(p): p.of_sequence(sequence) for p in self._members()}
        return PerHead(
            {head: members[id(p)] for head, p in self.patterns},
            None if self.default is None else members[id(self.default)],
        )

    def _members(self) -> list[Pattern]:
        return [p for _, p in self.patterns] + ([] if self.default is None else [self.default])

    def check_num_heads(self, num_heads: int) -> None:
        """Raises ValueError unless the patterns fit `num_heads` query heads."""
        if self.patterns and self.patterns[-1][0] >= num_heads:
            raise ValueError(
                f"sparse_attn.PerHead: head {self.patterns[-1][0]} has a pattern, but q has "
                f"{num_heads} heads; pass patterns for heads 0 to {num_heads - 1}."
            )
        if self.default is None and len(self.patterns) < num_heads:
            raise ValueError(
                f"sparse_attn.PerHead: {len(self.patterns)} of {num_heads} heads have a pattern; "
                "give every head one, or pass a default."
            )

    def band_rows(self, q: Tensor, k: Tensor) -> int | None:
        """See `Pattern.band_rows`: all rows at once unless every member is local to its rows."""
        members = [pattern for _, pattern in self.patterns]  # a state has no hash
        members += [] if self.default is None else [self.default]
        bounds = [rows for pattern in members if (rows := pattern.band_rows(q, k)) is not None]
        if not bounds or not all(pattern.row_local for pattern in members):
            return None
        tiles = (getattr(getattr(p, "pattern", p), "block_m", 1) for p in members)
        step = math.lcm(*tiles)
        return max(1, min(bounds) // step) * step

    def build(
        self,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool = True,
        softmax_scale: float | None = None,
        q_offset: int | None = None,
    ) -> SparseIndex:
        """See `Pattern.build`; the index has every query head.

        Raises:
            ValueError: the patterns do not fit the heads of q.
        """
        check_qk("PerHead", q, k)
        num_heads = q.shape[1]
        self.check_num_heads(num_heads)
        groups = self._groups(num_heads)
        parts = []
        for pattern, heads in groups:
            q_part, k_part = q, k
            if len(heads) < num_heads:
                q_part, of = _heads_of(q, k, heads, reads_data=pattern.data_dependent)
                k_part, pattern = k[:, numbers(of, k.device)], pattern.of_heads_kv(of)
            index = pattern.build(
                q_part, k_part, causal=causal, softmax_scale=softmax_scale, q_offset=q_offset
            )
            parts.append(index)
        order = [head for _, heads in groups for head in heads]
        # Refined before heads come to share entries.
        parts = [
            part.expand_heads(len(heads))
            for part, (_, heads) in zip(same_tiles(parts, shared=False), groups, strict=True)
        ]
        index = SparseIndex.cat_heads(parts)
        if order == sorted(order):
            return index
        return index.select_heads([order.index(head) for head in range(num_heads)])

    def _groups(self, num_heads: int) -> list[tuple[Pattern, list[int]]]:
        """Every pattern and its heads. A pattern with a memory equals itself alone, unhashed."""
        groups: list[tuple[Pattern, list[int]]] = []
        for head in range(num_heads):
            pattern = self.pattern_of(head)
            for other, heads in groups:
                if other == pattern:
                    heads.append(head)
                    break
            else:
                groups.append((pattern, [head]))
        return groups


def _pairs(patterns: object) -> list[tuple[int, Pattern]]:
    """(head, pattern) of a mapping or sequence; members are not looked at."""
    if isinstance(patterns, Mapping):
        return list(patterns.items())
    if isinstance(patterns, Sequence) and not isinstance(patterns, (str, bytes)):
        return list(enumerate(patterns))
    raise TypeError(
        f"sparse_attn.PerHead: patterns is a {type(patterns).__name__}; pass a sequence "
        "with one pattern per query head, or a dict from head to pattern."
    )


def _heads_of(
    q: Tensor, k: Tensor, heads: list[int], *, reads_data: bool
) -> tuple[Tensor, list[int]]:
    """The query heads `heads`, and numbers of KV heads that fit them by the rule h // group."""
    if not reads_data:
        return q[:, : len(heads)], [0]
    group = q.shape[1] // k.shape[1]
    of = [head // group for head in heads]
    q_part = q[:, numbers(heads, q.device)]
    # Where every KV head in use has as many of these query heads, h // group still holds.
    used = sorted(set(of))
    size = len(heads) // len(used)
    if of == [head for head in used for _ in range(size)]:
        return q_part, used
    return q_part, of


def same_tiles(parts: list[SparseIndex], shared: bool = True) -> list[SparseIndex]:
    """The same indexes with one block_m and block_n, refined where they differ: `with_tiles`."""
    listed = [part for part in parts if not part.is_list_free] or parts
    block_m = math.gcd(*(part.block_m for part in listed))
    block_n = math.gcd(*(part.block_n for part in listed))
    return [part.with_tiles(block_m=block_m, block_n=block_n, shared=shared) for part in parts]


def _check_member(what: str, pattern: object) -> None:
    if not isinstance(pattern, Pattern):
        raise TypeError(
            f"sparse_attn.PerHead: {what} is a {type(pattern).__name__}; pass a Pattern."
        )
    # A preset may wrap one.
    if isinstance(pattern, PerHead) or isinstance(getattr(pattern, "pattern", None), PerHead):
        raise ValueError(
            f"sparse_attn.PerHead: {what} is a PerHead itself; give each head its own pattern."
        )
