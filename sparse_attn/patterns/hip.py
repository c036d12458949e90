# SPDX-License-Identifier: Apache-2.0
"""HiP: keys found by a hierarchical search that scores few of them, for every query tile.

Two searches, and one form of index for both: the row at position p sees key j <= p iff

    j < sink,  or j is in a leaf that its tile chose,  or p - j < window,

exactly, row by row. Written from the papers' text alone.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparse_attn.index import SparseIndex
from sparse_attn.lists import indptr_from_counts
from sparse_attn.ops.hip import Pieces
from sparse_attn.patterns.base import (
    Pattern,
    check_blocks,
    check_int,
    check_qk,
    offset_or_default,
    scale_or_default,
)
from sparse_attn.selection.hip import hip_stage, hip_tree, leaf_lists

_SHARES = ("none", "kv", "all")


class HierarchicalPattern(Pattern):
    """What the two searches share: stages that choose pieces of the key axis, and the index.

    Attributes:
        block_m: rows of a tile.
        sink: first keys, which every row sees (tokens).
        window: keys back that a row sees, itself included (tokens).
        share: whose choice is one: "none" (every query head has its own), "kv" (the query heads
            of a KV head) or "all" heads; the score of a piece is then the best over the heads.
    """

    row_local: ClassVar[bool] = True
    approximates: ClassVar[bool] = True
    block_m: int
    sink: int
    window: int
    share: str

    def build(
        self,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool = True,
        softmax_scale: float | None = None,
        q_offset: int | None = None,
    ) -> SparseIndex:
        """See `Pattern.build`; the index has num_heads, num_heads_kv or 1 heads, as `share` says.

        Raises:
            ValueError: attention is not causal, or q and k do not fit each other.
        """
        self.check_call(q, k, causal)
        scale, offset = scale_or_default(q, softmax_scale), offset_or_default(q, k, q_offset)
        pieces = None
        for stage in range(self.num_stages):
            pieces = self.run_stage(stage, q, k, pieces, softmax_scale=scale, q_offset=offset)
        assert pieces is not None
        return self.index_of(pieces, seqlen_q=q.shape[2], seqlen_k=k.shape[2], q_offset=offset)

    @property
    @abstractmethod
    def num_stages(self) -> int:
        """Stages of the search; each can be run by itself on what the one before kept."""

    @property
    @abstractmethod
    def leaf(self) -> int:
        """Keys of the pieces that the last stage keeps (tokens)."""

    @abstractmethod
    def run_stage(
        self,
        stage: int,
        q: Tensor,
        k: Tensor,
        before: Pieces | None,
        *,
        softmax_scale: float,
        q_offset: int,
    ) -> Pieces:
        """What one stage keeps.

        Args:
            stage: its number, from 0.
            q: [batch, num_heads, seqlen_q, head_dim].
            k: [batch, num_heads_kv, seqlen_k, head_dim].
            before: what the stage before kept; None for stage 0.
            softmax_scale: factor of q . k.
            q_offset: position of query row 0.

        Returns:
            (starts int32 [batch, lists, tiles, n] ascending, counts int32 [batch, lists, tiles]).
        """

    def index_of(
        self, leaves: Pieces, *, seqlen_q: int, seqlen_k: int, q_offset: int
    ) -> SparseIndex:
        """The index in which every row sees the sinks, its tile's leaves and its own window."""
        # Small leaves become single keys, which cost a kernel no more; blocks serve the window.
        block_n = self.leaf if self.leaf % 8 == 0 else 64
        block_counts, blocks, mask_ids, masks, column_counts, columns = leaf_lists(
            leaves,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            q_offset=q_offset,
            block_m=self.block_m,
            block_n=block_n,
            leaf=self.leaf,
            sink=self.sink,
            window=self.window,
        )
        # A tile of one row has no row bits.
        partly = seqlen_q > 1 and self.block_m > 1
        return SparseIndex.from_lists(
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            block_m=self.block_m,
            block_n=block_n,
            block_indptr=indptr_from_counts(block_counts),
            block_indices=blocks,
            block_bits_ids=mask_ids if partly else None,
            block_bits=masks.view(-1, block_n, -(-self.block_m // 64)) if partly else None,
            column_indptr=indptr_from_counts(column_counts),
            column_indices=columns,
        )

    def check_call(self, q: Tensor, k: Tensor, causal: bool) -> None:
        """Raises ValueError unless the search is defined for these tensors."""
        name = type(self).__name__
        check_qk(name, q, k)
        if not causal:
            raise ValueError(
                f"sparse_attn.{name}.build: causal=False; the method searches the keys before a "
                "row's window. Pass causal=True, or another pattern, for instance BlockSparse."
            )

    def lists_of(self, q: Tensor, k: Tensor) -> int:
        """Lists of a batch entry."""
        return {"none": q.shape[1], "kv": k.shape[1], "all": 1}[self.share]

    def _check_shared(self) -> None:
        name = type(self).__name__
        check_blocks(name, self.block_m, 8)
        check_int(name, "sink", self.sink, 0)
        check_int(name, "window", self.window, 0)
        if self.share not in _SHARES:
            raise ValueError(
                f"sparse_attn.{name}: share={self.share!r}; pass one of {', '.join(_SHARES)}."
            )


@dataclass(frozen=True)
class HiP(HierarchicalPattern):
    """A tree search over the keys between the sinks and the window, for every query tile.

    Let T be the position of a tile's last row, plus 1. The candidates are the keys
    [sink, T - window), cut from `sink` on into leaves of `block_k` keys (the last may be shorter),
    and K = mask_k / block_k. Up to K leaves are all kept. Otherwise the n leaves are cut into K
    pieces, piece g being the leaves [g n // K, (g + 1) n // K), and until no piece has more than
    one leaf:

    * every piece [a, b) of two leaves or more is halved, into [a, m) and [m, b), m = (a + b) // 2;
    * a half is scored by its representative leaf: leaf a ("first") or (a + b) // 2 ("center");
      its score is the best softmax_scale * q . k over every `stride_q`-th row of the tile, from
      its first, and every `stride_k`-th key of that leaf, from its first; a NaN counts as -inf;
    * the K best stay, by score descending, then position ascending.

    The cost of a tile is K log(T / K) leaves, whatever the length. A tile's choice depends on its
    own rows, and on no key after them.

    Attributes:
        mask_k: keys to keep, a multiple of block_k (tokens).
        block_k: keys of a leaf (tokens).
        block_m: rows of a tile, 1 or a multiple of 16.
        stride_q: rows from one that is scored to the next.
        stride_k: keys of a leaf from one that is scored to the next.
        representative: "first" or "center". With "first" the left half's score is the one of the
            whole, so that a step costs half as much.
        sink: first keys, which every row sees (tokens).
        window: keys back that a row sees, itself included (tokens).
        share: "none", "kv" or "all": whose heads share a choice. A score is then the best over
            the rows of all of them.

    Raises:
        TypeError: a number is not an int.
        ValueError: a number is out of range, or mask_k is no multiple of block_k.

    Example:
        >>> HiP(mask_k=1024, block_k=64, stride_k=16).num_groups
        16

    Source:
        HiP (Lee et al. 2024, arXiv:2406.09827), in its second version's parameters.
    """

    mask_k: int = 512
    block_k: int = 2
    block_m: int = 64
    stride_q: int = 2
    stride_k: int = 1
    representative: str = "center"
    sink: int = 16
    window: int = 256
    share: str = "none"

    def __post_init__(self) -> None:
        self._check_shared()
        for name in ("mask_k", "block_k", "stride_q", "stride_k"):
            check_int("HiP", name, getattr(self, name), 1)
        if self.mask_k % self.block_k != 0:
            raise ValueError(
                f"sparse_attn.HiP: mask_k={self.mask_k} is not a multiple of "
                f"block_k={self.block_k}; pass for instance {self.block_k * 8}."
            )
        if self.representative not in ("first", "center"):
            raise ValueError(
                f"sparse_attn.HiP: representative={self.representative!r}; "
                "pass 'first' or 'center'."
            )

    @property
    def num_groups(self) -> int:
        """Leaves that a tile keeps at most."""
        return self.mask_k // self.block_k

    @property
    def num_stages(self) -> int:
        """The tree search is one stage."""
        return 1

    @property
    def leaf(self) -> int:
        """Keys of a leaf."""
        return self.block_k

    def run_stage(
        self,
        stage: int,
        q: Tensor,
        k: Tensor,
        before: Pieces | None,
        *,
        softmax_scale: float,
        q_offset: int,
    ) -> Pieces:
        """See `HierarchicalPattern.run_stage`."""
        return hip_tree(
            q,
            k,
            q_offset=q_offset,
            softmax_scale=softmax_scale,
            block_m=self.block_m,
            stride_q=self.stride_q,
            lists=self.lists_of(q, k),
            sink=self.sink,
            window=self.window,
            groups=self.num_groups,
            leaf=self.block_k,
            stride_k=self.stride_k,
            center=self.representative == "center",
        )


@dataclass(frozen=True)
class HiPStage:
    """One stage of `InfiniteHiP`.

    Attributes:
        chunk: keys of a chunk, a power of two (tokens).
        stride_q: neighbouring rows of a tile that are averaged into one before they are scored.
        k_in: keys that the stage before leaves to this one (tokens); None for the first stage.
    """

    chunk: int
    stride_q: int = 1
    k_in: int | None = None

    def __post_init__(self) -> None:
        check_int("HiPStage", "chunk", self.chunk, 1)
        check_int("HiPStage", "stride_q", self.stride_q, 1)
        if self.k_in is not None:
            check_int("HiPStage", "k_in", self.k_in, 1)
        if self.chunk & (self.chunk - 1) != 0:
            raise ValueError(
                f"sparse_attn.HiPStage: chunk={self.chunk} is not a power of two; "
                "pass for instance 32."
            )


@dataclass(frozen=True)
class InfiniteHiP(HierarchicalPattern):
    """Stages of pruning: chunks of keys are scored by a walk to one key, the best are cut smaller.

    For a tile whose rows stand at p .. T - 1, W' = max(0, window - first chunk), the chunks of the
    first stage are [sink + c chunk, sink + (c + 1) chunk) for all c with
    sink + c chunk < T - window, and those of a later one what the stage before kept, cut into this
    stage's chunks. A chunk [l, r) is a candidate if l <= p - W' and l < T - W'; its end is cut to
    T - W'. With q' the means of every `stride_q` neighbouring rows of the tile, a chunk is walked:

        for size = chunk, chunk / 2, ..., 1:
            m = (l + r) // 2;  the left half's key is (l + m) // 2, the right one's (m + r) // 2
            a key's score is the best softmax_scale * q' . k over all q'; NaN counts as -inf
            the left half stays if its score is greater, else the right one

    The chunk's score is the best of its winners, and with `share` the best of these over the
    heads, each of which walks by itself. The best k_in(next stage) / chunk stay, after the last
    stage the best k / chunk; by score descending, then position ascending.

    A tile's choice depends on its own rows, and on no key after them.

    Attributes:
        stages: the stages, each chunk dividing the one before.
        k: keys to keep, a multiple of the last chunk (tokens); the paper's second_stage_k.
        block_m: rows of a tile, 1 or a multiple of 16.
        sink: first keys, which every row sees (tokens).
        window: keys back that a row sees, itself included (tokens).
        share: "none", "kv" or "all": whose heads share a choice.

    Raises:
        TypeError: a number is not an int, or a stage no HiPStage.
        ValueError: a number is out of range, or stages do not fit each other.

    Example:
        >>> InfiniteHiP(k=4096).leaf
        8

    Source:
        InfiniteHiP (Lee et al. 2025, arXiv:2502.08910).
    """

    stages: tuple[HiPStage, ...] = (
        HiPStage(chunk=256, stride_q=4),
        HiPStage(chunk=32, stride_q=4, k_in=32768),
        HiPStage(chunk=8, stride_q=1, k_in=8192),
    )
    k: int = 2048
    block_m: int = 64
    sink: int = 256
    window: int = 1024
    share: str = "all"

    def __post_init__(self) -> None:
        self._check_shared()
        check_int("InfiniteHiP", "k", self.k, 1)
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise ValueError("sparse_attn.InfiniteHiP: no stages; pass at least one HiPStage.")
        for stage in self.stages:
            if not isinstance(stage, HiPStage):
                raise TypeError(
                    f"sparse_attn.InfiniteHiP: a stage is a {type(stage).__name__}; "
                    "pass HiPStage objects."
                )
        if self.stages[0].k_in is not None:
            raise ValueError(
                f"sparse_attn.InfiniteHiP: k_in={self.stages[0].k_in} of the first stage; it takes "
                "the whole key axis, pass None."
            )
        for before, stage in zip(self.stages, self.stages[1:], strict=False):
            if stage.k_in is None or stage.chunk > before.chunk or stage.k_in % before.chunk != 0:
                raise ValueError(
                    f"sparse_attn.InfiniteHiP: chunk={stage.chunk}, k_in={stage.k_in} after "
                    f"chunk={before.chunk}; pass no larger a chunk, and a k_in that is a multiple "
                    f"of {before.chunk}."
                )
        if self.k % self.leaf != 0:
            raise ValueError(
                f"sparse_attn.InfiniteHiP: k={self.k} is not a multiple of the last "
                f"chunk={self.leaf}; pass for instance {self.leaf * 256}."
            )

    @property
    def num_stages(self) -> int:
        """As many as `stages`."""
        return len(self.stages)

    @property
    def leaf(self) -> int:
        """Keys of the last stage's chunks."""
        return self.stages[-1].chunk

    def run_stage(
        self,
        stage: int,
        q: Tensor,
        k: Tensor,
        before: Pieces | None,
        *,
        softmax_scale: float,
        q_offset: int,
    ) -> Pieces:
        """See `HierarchicalPattern.run_stage`."""
        own = self.stages[stage]
        left = self.k if stage + 1 == self.num_stages else self.stages[stage + 1].k_in
        assert left is not None
        return hip_stage(
            q,
            k,
            q_offset=q_offset,
            softmax_scale=softmax_scale,
            block_m=self.block_m,
            stride_q=own.stride_q,
            lists=self.lists_of(q, k),
            sink=self.sink,
            window=self.window,
            chunk=own.chunk,
            keep=left // own.chunk,
            overlap=self.stages[0].chunk,
            parents=before,
            parent_chunk=self.stages[stage - 1].chunk if stage > 0 else own.chunk,
        )
