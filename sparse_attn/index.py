# SPDX-License-Identifier: Apache-2.0
"""SparseIndex: which keys every tile of queries attends to, as plain tensors.

It is the only thing a kernel accepts: patterns make one, kernels read one, and neither knows the
other. Converters from and to other libraries' formats live in `sparse_attn.convert`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .lists import (
    HeadKind,
    cat_lists,
    check_same,
    check_shapes,
    check_tile_sizes,
    densities,
    keys_mask,
    numbers,
    shifted_indptrs,
    tensors,
)
from .refine import refined

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["Density", "HeadKind", "SparseIndex"]

OpArgs = tuple[
    Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None, int, int
]


@dataclass(frozen=True, eq=False)
class Density:
    """Two densities of an index, as `SparseIndex.density` defines them.

    Attributes:
        element: visible (row, key) pairs over allowed pairs, all heads together, in [0, 1].
        tile: keys that a kernel visits, times rows, over the same for a dense head, in [0, 1].
        element_per_head: float64 [batch, heads].
        tile_per_head: float64 [batch, heads].
    """

    element: float
    tile: float
    element_per_head: Tensor
    tile_per_head: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class SparseIndex:
    """The keys that each tile of `block_m` query rows sees, for every batch entry and head.

    With num_tiles = ceil(seqlen_q / block_m), batch either 1 (broadcast) or the batch size, and
    heads either 1 (broadcast), num_heads_kv (a list shared by a group) or num_heads. Causality is
    never in the index: the kernel adds it. Tile t of a list is [indptr[..., t], indptr[..., t+1]);
    list entries outside every tile are spare capacity and undefined.

    * dense head: every key is visible.
    * streaming head: the row at position p = i + q_offset sees key j iff j < sink or
      |p - j| < window; the last dense_tail rows see every key.
    * listed head: a row sees the keys of its tile's blocks (where their bits allow) and columns.

    Attributes:
        seqlen_q: query rows.
        seqlen_k: keys.
        block_m: rows of a tile; 1 or a multiple of 16.
        block_n: keys of a block; a multiple of 8.
        heads: int32 [heads, 4], (HeadKind, sink, window, dense_tail); 0 where it means nothing.
        block_indptr: int64 [batch, heads, num_tiles + 1], offsets into block_indices.
        block_indices: int32 [block_capacity], first keys of runs of block_n keys (tokens; they
            need not be aligned), ascending and disjoint in a tile; the last may run past seqlen_k.
        column_indptr: int64 [batch, heads, num_tiles + 1], offsets into column_indices.
        column_indices: int32 [column_capacity], single keys, strictly ascending in a tile and
            outside its blocks.
        column_bias: float32 [column_capacity] added to a column's logit (natural log), or None.
        block_bits_ids: int32 [block_capacity], -1 for a fully visible block or else a row of
            block_bits; or None where every block is fully visible.
        block_bits: int64 [num_masks, block_n, ceil(block_m / 64)]; bit r of word w of a key says
            that row 64 * w + r of the tile sees it; or None.
    """

    seqlen_q: int
    seqlen_k: int
    block_m: int
    block_n: int
    heads: Tensor
    block_indptr: Tensor
    block_indices: Tensor
    column_indptr: Tensor
    column_indices: Tensor
    column_bias: Tensor | None = None
    block_bits_ids: Tensor | None = None
    block_bits: Tensor | None = None

    # ---------------------------------------------------------------- construction

    @classmethod
    def dense(
        cls,
        seqlen_q: int,
        seqlen_k: int,
        *,
        num_heads: int = 1,
        block_m: int = 64,
        block_n: int = 64,
        device: torch.device | str | None = None,
    ) -> SparseIndex:
        """An index whose heads all see every key; it holds no list."""
        heads = torch.zeros(num_heads, 4, dtype=torch.int32, device=device)
        return _list_free(heads, seqlen_q, seqlen_k, block_m, block_n)

    @classmethod
    def streaming(
        cls,
        seqlen_q: int,
        seqlen_k: int,
        *,
        sink: int,
        window: int,
        dense_tail: int = 0,
        num_heads: int = 1,
        block_m: int = 64,
        block_n: int = 64,
        device: torch.device | str | None = None,
    ) -> SparseIndex:
        """An index of streaming heads (attention sinks and a sliding window); it holds no list.

        Args:
            seqlen_q: query rows.
            seqlen_k: keys.
            sink: how many first keys every row sees.
            window: how many keys back a row sees, itself included (and as many ahead of it where
                attention is not causal).
            dense_tail: how many last rows see every key (tri-shape).
            num_heads: heads of the index.
            block_m: rows of a tile.
            block_n: keys of a block.
            device: where the tensors live.
        """
        for name, value in (("sink", sink), ("window", window), ("dense_tail", dense_tail)):
            if value < 0:
                raise ValueError(
                    f"sparse_attn.SparseIndex: {name}={value} is negative; pass 0 for none."
                )
        # Fills, unlike torch.tensor, need no copy from the host: legal in a CUDA graph.
        kind = int(HeadKind.STREAMING)
        heads = torch.full((num_heads, 4), kind, dtype=torch.int32, device=device)
        for column, value in ((1, sink), (2, window), (3, dense_tail)):
            heads.select(1, column).fill_(value)
        return _list_free(heads, seqlen_q, seqlen_k, block_m, block_n)

    @classmethod
    def from_lists(
        cls,
        *,
        seqlen_q: int,
        seqlen_k: int,
        block_m: int,
        block_n: int,
        block_indptr: Tensor | None = None,
        block_indices: Tensor | None = None,
        column_indptr: Tensor | None = None,
        column_indices: Tensor | None = None,
        column_bias: Tensor | None = None,
        block_bits_ids: Tensor | None = None,
        block_bits: Tensor | None = None,
        heads: Tensor | None = None,
    ) -> SparseIndex:
        """An index from ragged lists; dtypes and shapes are checked, values are not (`validate`).

        Blocks or columns may be left out. `heads` defaults to all LISTED. See the class for the
        shapes.

        Raises:
            TypeError: a tensor has the wrong dtype.
            ValueError: a size or shape is wrong, or half of a pair is missing.
        """
        indptr = block_indptr if block_indptr is not None else column_indptr
        for name, pointers, values in (
            ("block", block_indptr, block_indices),
            ("column", column_indptr, column_indices),
        ):
            if indptr is None or (pointers is None) != (values is None):
                raise ValueError(
                    f"sparse_attn.SparseIndex: {name}_indptr and {name}_indices go together, and "
                    "blocks or columns are needed; pass both tensors of a list."
                )
        assert indptr is not None
        empty = torch.empty(0, dtype=torch.int32, device=indptr.device)
        if heads is None:
            heads = empty.new_zeros(indptr.shape[1:-1].numel(), 4)
            heads[:, 0] = int(HeadKind.LISTED)
        index = cls(
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            block_m=block_m,
            block_n=block_n,
            heads=heads,
            block_indptr=torch.zeros_like(indptr) if block_indptr is None else block_indptr,
            block_indices=empty if block_indices is None else block_indices,
            column_indptr=torch.zeros_like(indptr) if column_indptr is None else column_indptr,
            column_indices=empty if column_indices is None else column_indices,
            column_bias=column_bias,
            block_bits_ids=block_bits_ids,
            block_bits=block_bits,
        )
        check_shapes(index)
        return index

    @classmethod
    def from_dense_mask(cls, mask: Tensor, *, block_m: int = 64, block_n: int = 64) -> SparseIndex:
        """From a bool mask [batch, heads, seqlen_q, seqlen_k]: `convert.from_dense_mask`."""
        from . import convert  # imports this module

        return convert.from_dense_mask(mask, block_m=block_m, block_n=block_n)

    @classmethod
    def from_blocks(
        cls, block_mask: Tensor, *, block_m: int, block_n: int, seqlen_q: int, seqlen_k: int
    ) -> SparseIndex:
        """From a bool grid of blocks [batch, heads, M, N]: `convert.from_blocks`."""
        from . import convert

        return convert.from_blocks(
            block_mask, block_m=block_m, block_n=block_n, seqlen_q=seqlen_q, seqlen_k=seqlen_k
        )

    @classmethod
    def from_bsr(
        cls,
        indptr: Tensor,
        indices: Tensor,
        *,
        block_m: int,
        block_n: int,
        seqlen_q: int,
        seqlen_k: int,
    ) -> SparseIndex:
        """From block rows as FlashInfer and SciPy write them: `convert.from_bsr`."""
        from . import convert

        return convert.from_bsr(
            indptr,
            indices,
            block_m=block_m,
            block_n=block_n,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
        )

    @classmethod
    def from_block_mask(cls, block_mask: BlockMask) -> SparseIndex:
        """From a FlexAttention BlockMask: `convert.from_block_mask`."""
        from . import convert

        return convert.from_block_mask(block_mask)

    @classmethod
    def from_block_sparse_attention(
        cls,
        head_mask_type: Tensor,
        streaming_info: Tensor | None,
        base_blockmask: Tensor | None,
        *,
        seqlen_q: int,
        seqlen_k: int,
        block: int = 128,
        causal: bool = True,
        exact_streaming: bool = False,
    ) -> SparseIndex:
        """From Block-Sparse-Attention's arguments: `convert.from_block_sparse_attention`."""
        from . import convert

        return convert.from_block_sparse_attention(
            head_mask_type,
            streaming_info,
            base_blockmask,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            block=block,
            causal=causal,
            exact_streaming=exact_streaming,
        )

    @classmethod
    def from_vertical_slash_lists(
        cls,
        block_count: Tensor,
        block_offset: Tensor,
        column_count: Tensor,
        column_index: Tensor,
        *,
        seqlen_q: int,
        seqlen_k: int,
        block_m: int = 64,
        block_n: int = 64,
    ) -> SparseIndex:
        """From vLLM's four vertical-slash lists: `convert.from_vertical_slash_lists`."""
        from . import convert

        return convert.from_vertical_slash_lists(
            block_count,
            block_offset,
            column_count,
            column_index,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            block_m=block_m,
            block_n=block_n,
        )

    def to_block_mask(self, *, causal: bool = False, q_offset: int | None = None) -> BlockMask:
        """A FlexAttention BlockMask that sees the same keys: `convert.to_block_mask`."""
        from . import convert

        return convert.to_block_mask(self, causal=causal, q_offset=q_offset)

    # ---------------------------------------------------------------- sizes

    @property
    def batch_size(self) -> int:
        """Batch entries of the index; 1 may stand for any number."""
        return self.block_indptr.shape[0]

    @property
    def num_heads(self) -> int:
        """Heads of the index: 1, num_heads_kv or num_heads."""
        return self.heads.shape[0]

    @property
    def num_tiles(self) -> int:
        """Tiles of query rows, ceil(seqlen_q / block_m)."""
        return (self.seqlen_q + self.block_m - 1) // self.block_m

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.heads.device

    @property
    def is_list_free(self) -> bool:
        """Whether there is no capacity for list entries: a listed head, if any, sees no key."""
        return self.block_indices.shape[0] == 0 and self.column_indices.shape[0] == 0

    def __repr__(self) -> str:
        kinds = self.heads[:, 0].tolist()
        counted = ", ".join(
            f"{kinds.count(kind)} {kind.name.lower()}" for kind in HeadKind if kind in kinds
        )
        return (
            f"SparseIndex(batch_size={self.batch_size}, heads=[{counted}], "
            f"seqlen_q={self.seqlen_q}, seqlen_k={self.seqlen_k}, "
            f"block_m={self.block_m}, block_n={self.block_n}, "
            f"blocks<={self.block_indices.shape[0]}, columns<={self.column_indices.shape[0]}, "
            f"device={str(self.device)!r})"
        )

    def __str__(self) -> str:
        return self.draw()

    def draw(self, *, causal: bool = True, q_offset: int | None = None) -> str:
        """The index in characters, as `print` shows it: `drawing.text`.

        Args:
            causal: whether keys after a row's own are hidden, as `attention` hides them.
            q_offset: position of row 0, default seqlen_k - seqlen_q.
        """
        from . import drawing

        return drawing.text(self, causal=causal, q_offset=q_offset)

    def op_args(self) -> OpArgs:
        """The index as the native ops take it, in the order of their schemas."""
        return (
            self.heads,
            self.block_indptr,
            self.block_indices,
            self.block_bits_ids,
            self.block_bits,
            self.column_indptr,
            self.column_indices,
            self.column_bias,
            self.block_m,
            self.block_n,
        )

    def to(self, device: torch.device | str) -> SparseIndex:
        """The same index with its tensors on `device`."""
        moved: dict[str, Any] = {name: t.to(device) for name, t in tensors(self).items()}
        return replace(self, **moved)

    def validate(self) -> SparseIndex:
        """Reads every list (on the CPU) and checks all that the class states; returns self.

        Raises:
            TypeError: a tensor has the wrong dtype.
            ValueError: a shape is wrong or the lists are corrupt; the text names the place.
        """
        check_shapes(self)
        try:
            torch.ops.sparse_attn.check_index(
                *self.to("cpu").op_args(), self.seqlen_q, self.seqlen_k
            )
        except RuntimeError as error:
            fault = str(error).split("\n")[0].split("sparse_attn::check_index: ")[-1]
            raise ValueError(f"sparse_attn.SparseIndex: {fault}") from None
        return self

    # ---------------------------------------------------------------- meaning

    def to_dense_mask(self, q_offset: int | None = None) -> Tensor:
        """The keys each row sees, as a bool matrix; for tests and small sizes.

        Args:
            q_offset: position of row 0, for streaming heads; default seqlen_k - seqlen_q.

        Returns:
            bool [batch, heads, seqlen_q, seqlen_k] of the index's own batch and heads; causality
            is not applied.
        """
        return keys_mask(self, self._offset(q_offset))

    def density(self, *, causal: bool = True, q_offset: int | None = None) -> Density:
        """How much of dense attention is left, counted in elements and in kernel work.

        Row i, at p = i + q_offset, may see limit(i) = clamp(p + 1, 0, seqlen_k) keys (causal) or
        seqlen_k keys. Per head, over the rows i < seqlen_q,

            element = sum_i |visible keys of row i below limit(i)| / sum_i limit(i).

        A kernel visits, for a tile of r rows, the union of what its rows may see, with partly
        visible blocks taken whole, below the limit of the tile's last row:

            tile = sum_t r_t * |visited keys of tile t| / sum_t r_t * limit(last row of t).

        Both are 1 for a dense head, and 0 where no pair is allowed at all. The cost grows with the
        lists and with heads x seqlen_q, never with seqlen_q x seqlen_k.

        Args:
            causal: whether the attention will be causal.
            q_offset: position of row 0; default seqlen_k - seqlen_q.
        """
        element, tile = densities(self, causal, self._offset(q_offset))
        return Density(element.mean().item(), tile.mean().item(), element, tile)

    def _offset(self, q_offset: int | None) -> int:
        return self.seqlen_k - self.seqlen_q if q_offset is None else q_offset

    # ---------------------------------------------------------------- heads and batch

    def select_heads(self, heads: Sequence[int]) -> SparseIndex:
        """The index of some heads, in the order given; the lists stay where they are.

        Raises:
            ValueError: a head is not in [0, num_heads).
        """
        wrong = [h for h in heads if not 0 <= h < self.num_heads]
        if wrong:
            raise ValueError(
                f"sparse_attn.SparseIndex.select_heads: head {wrong[0]} is not in "
                f"[0, {self.num_heads}); use expand_heads first if heads share an entry."
            )
        return self._with_heads(numbers(heads, self.device))

    def expand_heads(self, num_heads: int) -> SparseIndex:
        """One entry per query head, of an index shared by all heads or by groups of heads.

        Head h takes entry h // (num_heads // self.num_heads); the lists stay where they are.

        Raises:
            ValueError: num_heads is no multiple of the index's heads.
        """
        if num_heads == self.num_heads:
            return self
        if num_heads % self.num_heads != 0:
            raise ValueError(
                f"sparse_attn.SparseIndex.expand_heads: num_heads={num_heads} is not a multiple "
                f"of the index's {self.num_heads} heads."
            )
        group = num_heads // self.num_heads
        return self._with_heads(torch.arange(num_heads, device=self.device) // group)

    def _with_heads(self, which: Tensor) -> SparseIndex:
        return replace(
            self,
            heads=self.heads[which],
            block_indptr=self.block_indptr[:, which],
            column_indptr=self.column_indptr[:, which],
        )

    @classmethod
    def cat_heads(cls, parts: Sequence[SparseIndex]) -> SparseIndex:
        """The heads of several indexes after one another; a batch of 1 is broadcast.

        Raises:
            ValueError: no parts, or their lengths, tile sizes or batch sizes differ.
        """
        if len(parts) == 1:
            return parts[0]
        check_same(parts, "cat_heads", ("seqlen_q", "seqlen_k", "block_m", "block_n"))
        batch_size = max(part.batch_size for part in parts)
        for part in parts:
            if part.batch_size not in (1, batch_size):
                raise ValueError(
                    f"sparse_attn.SparseIndex.cat_heads: batch sizes {part.batch_size} and "
                    f"{batch_size} differ; each part needs 1 or the same."
                )
        blocks, columns = shifted_indptrs(parts)
        return replace(
            parts[0],
            heads=torch.cat([part.heads for part in parts]),
            block_indptr=torch.cat([t.expand(batch_size, -1, -1) for t in blocks], 1),
            column_indptr=torch.cat([t.expand(batch_size, -1, -1) for t in columns], 1),
            **cat_lists(parts),
        )

    @classmethod
    def stack(cls, parts: Sequence[SparseIndex]) -> SparseIndex:
        """One batch of the indexes of several sequences, of any lengths.

        The lengths become the largest ones and the tiles that a shorter sequence lacks are empty;
        a kernel takes the true lengths from its `seq_ranges`. A head may be dense in one sequence
        and listed in another (its dense tiles are then listed), but streaming heads must agree.

        Raises:
            ValueError: no parts, or their tile sizes, heads or streaming rules differ.
        """
        if len(parts) == 1:
            return parts[0]
        check_same(parts, "stack", ("block_m", "block_n"))
        num_heads = max(part.num_heads for part in parts)
        parts = _agree_on_heads([part.expand_heads(num_heads) for part in parts])
        seqlen_q = max(part.seqlen_q for part in parts)
        num_tiles = max(part.num_tiles for part in parts)
        blocks, columns = (
            [
                torch.cat([t, t[..., -1:].expand(-1, -1, num_tiles + 1 - t.shape[-1])], -1)
                for t in indptrs
            ]
            for indptrs in shifted_indptrs(parts)
        )
        return replace(
            parts[0],
            seqlen_q=seqlen_q,
            seqlen_k=max(part.seqlen_k for part in parts),
            block_indptr=torch.cat(blocks),
            column_indptr=torch.cat(columns),
            **cat_lists(parts),
        )

    # ---------------------------------------------------------------- granularity

    def with_tiles(
        self, *, block_m: int | None = None, block_n: int | None = None, shared: bool = True
    ) -> SparseIndex:
        """The same keys in smaller tiles or blocks; without lists, in any tiles.

        Args:
            block_m: new rows of a tile; it divides the old.
            block_n: new keys of a block; it divides the old.
            shared: whether heads may list the same entries (as `expand_heads` leaves them). Where
                none does, False lets a GPU set less room aside; elsewhere it changes nothing.

        Raises:
            ValueError: a new size does not divide the old one, or is not a legal size.
        """
        block_m = self.block_m if block_m is None else block_m
        block_n = self.block_n if block_n is None else block_n
        check_tile_sizes(block_m, block_n)
        if self.is_list_free:
            lengths = (self.seqlen_q, self.seqlen_k)
            return _list_free(self.heads, *lengths, block_m, block_n, self.batch_size)
        for name, old, new in (("m", self.block_m, block_m), ("n", self.block_n, block_n)):
            if old % new != 0:
                raise ValueError(
                    f"sparse_attn.SparseIndex.with_tiles: block_{name}={new} does not divide "
                    f"{old}; lists can only be refined."
                )
        if (block_m, block_n) == (self.block_m, self.block_n):
            return self
        return replace(
            self, block_m=block_m, block_n=block_n, **refined(self, block_m, block_n, shared)
        )


# -------------------------------------------------------------------- helpers


def _list_free(
    heads: Tensor, seqlen_q: int, seqlen_k: int, block_m: int, block_n: int, batch_size: int = 1
) -> SparseIndex:
    """An index without lists; shape arithmetic and tensor factories only, so that it traces."""
    check_tile_sizes(block_m, block_n)
    tiles = (seqlen_q + block_m - 1) // block_m
    indptr = heads.new_zeros(batch_size, heads.shape[0], tiles + 1, dtype=torch.int64)
    indices = torch.empty(0, dtype=torch.int32, device=heads.device)
    return SparseIndex(
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        block_m=block_m,
        block_n=block_n,
        heads=heads,
        block_indptr=indptr,
        block_indices=indices,
        column_indptr=indptr,
        column_indices=indices,
    )


def _agree_on_heads(parts: list[SparseIndex]) -> list[SparseIndex]:
    """Lists the tiles of dense heads that are listed in another part."""
    if all(part.heads is parts[0].heads for part in parts):
        return parts
    from . import convert

    rows = [part.heads.tolist() for part in parts]
    agreed = []
    for part, own in zip(parts, rows, strict=True):
        chosen = list(range(part.num_heads))
        for h, row in enumerate(own):
            kinds = {other[h][0] for other in rows}
            if all(other[h] == row for other in rows):
                continue
            if HeadKind.STREAMING in kinds:
                raise ValueError(
                    f"sparse_attn.SparseIndex.stack: head {h} streams with different rules in "
                    "different sequences; run those sequences separately or list their keys."
                )
            if row[0] == HeadKind.DENSE:
                chosen[h] = part.num_heads
        if max(chosen, default=0) == part.num_heads:
            every = convert.all_blocks(part)
            part = SparseIndex.cat_heads([part, every]).select_heads(chosen)
        agreed.append(part)
    return agreed
