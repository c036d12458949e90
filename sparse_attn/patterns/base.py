# SPDX-License-Identifier: Apache-2.0
"""Pattern: a frozen description of how to choose keys, and the checks that patterns share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from sparse_attn.index import SparseIndex
from sparse_attn.selection.blocks import BlockGrid

MAX_INDEX_BYTES = 64 << 20
"""What the lists of one call may take where a pattern can be built a band of rows at a time."""


class Pattern(ABC):
    """How to choose the keys of every query tile; it never computes attention.

    A pattern is immutable and hashable: it holds numbers, never tensors. `build` is where q and k
    are looked at, and all it returns is the choice.

    Attributes:
        data_dependent: whether `build` reads the values of q and k. If not, it only looks at their
            shapes and device, and is traceable by torch.compile with fullgraph.
        row_local: whether a query tile's choice depends on that tile's rows alone, and not on
            other rows of q. Then a prefill in chunks that are multiples of the tile chooses what
            one in a single call chooses, and a long call may be built and run a band of rows at a
            time.
        approximates: whether the choice stands for dense attention and is made to save time, so
            that dense attention may run where it is faster (`sparse_attn.dispatch`). False where
            the mask is the model's own, or calls must not be left out.
    """

    data_dependent: ClassVar[bool] = True
    row_local: ClassVar[bool] = False
    approximates: ClassVar[bool] = False

    @abstractmethod
    def build(
        self,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool = True,
        softmax_scale: float | None = None,
        q_offset: int | None = None,
    ) -> SparseIndex:
        """Chooses keys, for all batch entries and heads at once.

        Args:
            q: [batch, num_heads, seqlen_q, head_dim].
            k: [batch, num_heads_kv, seqlen_k, head_dim]; query head h reads KV head
                h // (num_heads / num_heads_kv).
            causal: whether row i will only see keys j <= i + q_offset. The index never repeats
                it, but a pattern spends no budget on keys that no row of the tile can see.
            softmax_scale: factor of q . k in every score, default 1 / sqrt(head_dim).
            q_offset: position of query row 0 on the key axis, default seqlen_k - seqlen_q.

        Returns:
            An index with batch 1 or batch, and 1 or num_heads heads.

        Raises:
            ValueError: q and k do not fit each other.
        """

    def of_sequence(self, sequence: int) -> Pattern:
        """What stands for this pattern where sequences are built one by one (padding, varlen).

        That is the pattern itself, unless it holds something of every sequence.

        Args:
            sequence: number of the sequence, from 0.
        """
        return self

    def of_heads_kv(self, heads: Sequence[int]) -> Pattern:
        """What stands for this pattern where `build` sees some KV heads only (`PerHead`).

        Args:
            heads: the KV heads, in the order in which k will have them.
        """
        return self

    def band_rows(self, q: Tensor, k: Tensor) -> int | None:
        """How many query rows `attention` builds and runs at once, to bound the index's memory.

        A pattern that is `row_local` and whose lists can grow large gives a multiple of its tile
        for which they stay below MAX_INDEX_BYTES whatever the data; None means all rows at once.

        Args:
            q: [batch, num_heads, seqlen_q, head_dim]; only its shape counts.
            k: [batch, num_heads_kv, seqlen_k, head_dim].
        """
        return None


class PatternState(Pattern):
    """A pattern with a memory: what it chose or computed before decides what it does next.

    Unlike a pattern it is mutable and not hashable; it belongs to one cache of one layer. Pass it
    wherever a pattern is taken. Call `reset` when the cache starts anew.
    """

    data_dependent: ClassVar[bool] = True
    __hash__ = None  # type: ignore[assignment]

    @abstractmethod
    def of_sequence(self, sequence: int) -> Pattern:
        """The state of one sequence; the same object in every call, until `reset`."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The memory as tensors; `load_state_dict` of an equal pattern's state restores it."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            ValueError: the tensors do not fit this pattern.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forgets everything."""


class BlockPattern(Pattern):
    """A pattern that chooses whole blocks: the fields and the grid that such patterns share."""

    block_m: int
    block_n: int
    sink_blocks: int
    local_blocks: int

    def _check_fields(self) -> None:
        """Raises TypeError or ValueError unless the fields are ones that an index can have."""
        owner = type(self).__name__
        check_blocks(owner, self.block_m, self.block_n)
        check_int(owner, "sink_blocks", self.sink_blocks, 0)
        check_int(owner, "local_blocks", self.local_blocks, 0)

    def _grid(self, q: Tensor, k: Tensor, *, causal: bool, q_offset: int | None) -> BlockGrid:
        """Tiles and blocks of a call, and which of them may and which must be chosen."""
        return BlockGrid(
            seqlen_q=q.shape[2],
            seqlen_k=k.shape[2],
            block_m=self.block_m,
            block_n=self.block_n,
            q_offset=offset_or_default(q, k, q_offset),
            causal=causal,
            sink_blocks=self.sink_blocks,
            local_blocks=self.local_blocks,
        )


def check_qk(owner: str, q: Tensor, k: Tensor) -> None:
    """Raises ValueError unless q and k are two 4-D tensors that fit each other.

    Args:
        owner: name of the pattern, for the text.
        q: [batch, num_heads, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim].
    """
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            f"sparse_attn.{owner}.build: q has {q.dim()} dimensions and k {k.dim()}; "
            "pass both as [batch, heads, seqlen, head_dim]."
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"sparse_attn.{owner}.build: q {tuple(q.shape)} and k {tuple(k.shape)} differ in "
            "batch or head_dim; these must be equal."
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"sparse_attn.{owner}.build: q has {q.shape[1]} heads and k {k.shape[1]}; the heads of "
            "q must be a multiple of the heads of k."
        )


def scale_or_default(q: Tensor, softmax_scale: float | None) -> float:
    """`softmax_scale`, or 1 / sqrt(head_dim)."""
    return 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale


def offset_or_default(q: Tensor, k: Tensor, q_offset: int | None) -> int:
    """`q_offset`, or seqlen_k - seqlen_q (bottom-right alignment)."""
    return k.shape[2] - q.shape[2] if q_offset is None else q_offset


def check_int(owner: str, name: str, value: object, minimum: int) -> None:
    """Raises unless `value` is an int (no bool) and at least `minimum`.

    Raises:
        TypeError: not an int.
        ValueError: below `minimum`.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"sparse_attn.{owner}: {name}={value!r} is a {type(value).__name__}; pass an int."
        )
    if value < minimum:
        raise ValueError(
            f"sparse_attn.{owner}: {name}={value} is below {minimum}; pass {minimum} or more."
        )


def check_blocks(owner: str, block_m: object, block_n: object) -> None:
    """Raises unless the block sizes are ones an index can have.

    Raises:
        TypeError: not an int.
        ValueError: block_m neither 1 nor a multiple of 16, or block_n no multiple of 8.
    """
    check_int(owner, "block_m", block_m, 1)
    check_int(owner, "block_n", block_n, 8)
    assert isinstance(block_m, int) and isinstance(block_n, int)
    if block_m != 1 and block_m % 16 != 0:
        raise ValueError(
            f"sparse_attn.{owner}: block_m={block_m} is neither 1 nor a multiple of 16; "
            "pass for instance 64."
        )
    if block_n % 8 != 0:
        raise ValueError(
            f"sparse_attn.{owner}: block_n={block_n} is not a multiple of 8; pass for instance 64."
        )
