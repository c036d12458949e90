# SPDX-License-Identifier: Apache-2.0
"""VerticalSlash: key columns and diagonals chosen by the last queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn.index import SparseIndex
from sparse_attn.lists import indptr_from_counts
from sparse_attn.patterns.base import (
    Pattern,
    check_blocks,
    check_int,
    check_qk,
    offset_or_default,
    scale_or_default,
)
from sparse_attn.patterns.slash_lists import slash_lists
from sparse_attn.selection import top_k_indices, top_k_mask, window_scores

_BLOCK = 64  # rows of a tile and keys of a block
_MIN_SLASH = 50  # the original's least number of diagonals, whatever the budget


@dataclass(frozen=True)
class VerticalSlash(Pattern):
    """Key columns ("verticals") and diagonals ("slashes") that the last queries attend to most.

    With A the attention probabilities of the last L = min(last_q, seqlen_q) rows (float32, scaled,
    causal unless attention is not), p the position of a row:

        columns[j]   = sum over rows of A[row, j]          j in [0, seqlen_k)
        diagonals[s] = sum over rows of A[row, p - s]      s in [0, D)

    where D = max(seqlen_k, q_offset + seqlen_q) distances exist, and the first `sink` columns and
    the first `local` diagonals count as +inf. V is the best min(seqlen_k, max(vertical, sink))
    columns, S the best min(D, max(slash, 50)) diagonals; score descending, then index ascending.
    Row p then sees key j if j is in V or p - j in S.

    The index covers at least that: keys beside a slash that other rows of the tile need are
    visible to the whole tile, and a run of neighbouring slashes may be rounded up to a block (see
    `vertical_slash_index`). No vertical is ever dropped. With `exact` a row sees no other key than
    its own, at the same cost of attention, or more where a slash stands alone.

    Where `slash` < `local` all candidates are forced, and the tie-break decides: the nearest
    max(slash, 50) diagonals.

    With `chunk`, every `chunk` rows choose for themselves: the last `last_q` rows of a chunk look
    at the keys up to the chunk's end (at all, where attention is not causal), and their choice
    serves that chunk. One call then equals a prefill in chunks of that many rows, each a call of
    its own with the keys so far; without `chunk` the two differ, as the last rows of the prompt
    choose for all. docs/chunked_prefill.md says which patterns need no such care.

    Attributes:
        vertical: budget of columns.
        slash: budget of diagonals.
        last_q: rows of the observation window.
        sink: forced first columns.
        local: forced nearest diagonals, the row's own included.
        chunk: rows that choose together, in tokens, a multiple of 64; None: all.
        exact: element level, with row-validity bits for partly visible blocks. Lists of a device
            are then made on the CPU, so that a call waits for it.

    Raises:
        TypeError: a number is not an int, or `exact` no bool.
        ValueError: a number is too small, or `chunk` is not a multiple of 64.

    Example:
        >>> VerticalSlash(vertical=500, slash=700).last_q
        64

    Source:
        MInference (Jiang et al. 2024, arXiv:2407.02490), vertical-slash head, algorithm 2; with
        `chunk`, Qwen2.5-1M (Yang et al. 2025, arXiv:2501.15383), section 5.2.
    """

    vertical: int = 1000
    slash: int = 6096
    last_q: int = 64
    sink: int = 30
    local: int = 100
    chunk: int | None = None
    exact: bool = False
    data_dependent: ClassVar[bool] = True
    approximates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_int("VerticalSlash", "vertical", self.vertical, 0)
        check_int("VerticalSlash", "slash", self.slash, 0)
        check_int("VerticalSlash", "last_q", self.last_q, 1)
        check_int("VerticalSlash", "sink", self.sink, 0)
        check_int("VerticalSlash", "local", self.local, 0)
        if self.chunk is not None:
            check_int("VerticalSlash", "chunk", self.chunk, _BLOCK)
            if self.chunk % _BLOCK != 0:
                raise ValueError(
                    f"sparse_attn.VerticalSlash: chunk={self.chunk} is not a multiple of {_BLOCK}, "
                    "the rows of a tile; pass for instance 32768."
                )
        if not isinstance(self.exact, bool):
            raise TypeError(
                f"sparse_attn.VerticalSlash: exact={self.exact!r} is a "
                f"{type(self.exact).__name__}; pass a bool."
            )

    def build(
        self,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool = True,
        softmax_scale: float | None = None,
        q_offset: int | None = None,
    ) -> SparseIndex:
        """See `Pattern.build`; the index has every query head, with 64 x 64 tiles."""
        verticals, slashes = self._select(q, k, causal, softmax_scale, q_offset)
        batch, heads = q.shape[:2]
        return _index(
            verticals.flatten(0, 2),
            slashes.flatten(0, 2),
            batch=batch,
            heads=heads,
            seqlen_q=q.shape[2],
            seqlen_k=k.shape[2],
            q_offset=offset_or_default(q, k, q_offset),
            causal=causal,
            block_m=_BLOCK,
            block_n=_BLOCK,
            chunk=self.chunk,
            exact=self.exact,
        )

    def select(
        self,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool = True,
        softmax_scale: float | None = None,
        q_offset: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The choice itself, as `vertical_slash_index` takes it; arguments as `build`.

        Returns:
            (verticals int32 [batch, num_heads, v], slashes int32 [batch, num_heads, s]), ascending.
            With `chunk`, [batch, num_heads, chunks, v or s], where -1 stands behind the entries of
            chunks that have fewer.
        """
        verticals, slashes = self._select(q, k, causal, softmax_scale, q_offset)
        # As a score, the mask lists its ones first, then places that are not marked.
        count = min(slashes.shape[-1], max(self.slash, _MIN_SLASH))
        chosen = top_k_indices(slashes.float(), count)
        if self.chunk is None:
            return verticals.squeeze(2), chosen.squeeze(2)
        marked = slashes.gather(-1, chosen.long())
        order = chosen.masked_fill(~marked, slashes.shape[-1]).sort(-1).values
        chosen = order.masked_fill(order == slashes.shape[-1], -1)
        return verticals.masked_fill(verticals == k.shape[2], -1), chosen

    def _select(
        self,
        q: Tensor,
        k: Tensor,
        causal: bool,
        softmax_scale: float | None,
        q_offset: int | None,
    ) -> tuple[Tensor, Tensor]:
        """The choice of every chunk.

        Returns:
            Verticals int32 [batch, heads, chunks, v], ascending, seqlen_k for no entry; slashes
            bool [batch, heads, chunks, distances].
        """
        check_qk("VerticalSlash", q, k)
        seqlen_q, seqlen_k = q.shape[2], k.shape[2]
        offset = offset_or_default(q, k, q_offset)
        chunk = max(1, seqlen_q) if self.chunk is None else self.chunk
        verticals, slashes = [], []
        for start in range(0, max(1, seqlen_q), chunk):
            end = min(start + chunk, seqlen_q)
            keys = seqlen_k
            if self.chunk is not None and causal:
                keys = max(0, min(seqlen_k, end + offset))
            columns, diagonals = window_scores(
                q[:, :, start:end],
                k[:, :, :keys],
                last_q=self.last_q,
                num_distances=max(keys, end + offset),
                softmax_scale=scale_or_default(q, softmax_scale),
                q_offset=offset + start,
                causal=causal,
            )
            columns[..., : self.sink] = torch.inf
            diagonals[..., : self.local] = torch.inf
            verticals.append(top_k_indices(columns, max(self.vertical, self.sink)))
            slashes.append(top_k_mask(diagonals, max(self.slash, _MIN_SLASH)))
        return _stack(verticals, seqlen_k), _stack(slashes, False)


def _stack(parts: list[Tensor], fill: int | bool) -> Tensor:
    """[batch, heads, parts, longest] of tensors [batch, heads, length]."""
    if len(parts) == 1:
        return parts[0].unsqueeze(2)
    longest = max(part.shape[-1] for part in parts)
    padded = [F.pad(part, (0, longest - part.shape[-1]), value=fill) for part in parts]
    return torch.stack(padded, 2)


def vertical_slash_index(
    vertical_indices: Tensor,
    slash_indices: Tensor,
    *,
    seqlen_q: int,
    seqlen_k: int,
    q_offset: int | None = None,
    causal: bool = True,
    block_m: int = 64,
    block_n: int = 64,
    exact: bool = False,
) -> SparseIndex:
    """An index that covers chosen columns and diagonals.

    For the tile whose first row is at position a, slash s covers the keys [a - s, a - s + block_m),
    clipped to those that exist. Neighbouring slashes merge; the union is cut into blocks of
    block_n, with a short rest (under block_n / 4 keys) as columns and a longer one as a block that
    runs on past it. Every vertical outside those blocks is a column. So a row sees all keys it
    should; more only where another row of the tile, or another key of the block, needs them; and
    no key twice. With `exact` it sees no more at all: every covered key is in a block, and blocks
    that not every row sees whole carry row-validity bits. Tiles share equal ones; a block with a
    vertical in it has its own, 8 bytes a key and 64 rows.

    Args:
        vertical_indices: int [batch, heads, count], key columns in any order, -1 for no entry.
        slash_indices: int [batch, heads, count], distances p - j >= 0 from a row's own position p,
            in any order, -1 for no entry. A distance that reaches no key is ignored.
        seqlen_q: query rows.
        seqlen_k: keys.
        q_offset: position of query row 0 on the key axis, default seqlen_k - seqlen_q.
        causal: leave out keys past a tile's last row.
        block_m: rows of a tile, 1 or a multiple of 16.
        block_n: keys of a block, a multiple of 8.
        exact: row p sees key j only if j is a vertical or p - j a slash.

    Returns:
        An index with the batch and heads of the arguments.

    Raises:
        TypeError: indices are not integers.
        ValueError: shapes do not fit, block sizes are not legal, or a column is outside
            [-1, seqlen_k).

    Source:
        The union is that of MInference (Jiang et al. 2024, arXiv:2407.02490).
    """
    owner = "vertical_slash_index"
    check_blocks(owner, block_m, block_n)
    _check_indices(owner, vertical_indices, slash_indices, seqlen_k)
    offset = seqlen_k - seqlen_q if q_offset is None else q_offset
    batch, heads = vertical_indices.shape[:2]
    # -1 goes behind every key, where the converter ignores it; so do repeats.
    verticals = vertical_indices.flatten(0, 1).long()
    verticals = torch.where(verticals < 0, seqlen_k, verticals).sort(-1).values
    repeated = F.pad(verticals[:, 1:] == verticals[:, :-1], (1, 0))[:, : verticals.shape[1]]
    verticals = torch.where(repeated, seqlen_k, verticals).sort(-1).values
    distances = max(1, seqlen_q + offset)
    slashes = slash_indices.flatten(0, 1).long()
    slashes = torch.where((slashes < 0) | (slashes >= distances), distances, slashes)
    marks = torch.zeros(
        batch * heads, distances + 1, dtype=torch.bool, device=slash_indices.device
    ).scatter_(1, slashes, True)
    return _index(
        verticals,
        marks[:, :distances],
        batch=batch,
        heads=heads,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        q_offset=offset,
        causal=causal,
        block_m=block_m,
        block_n=block_n,
        exact=exact,
    )


def _index(
    verticals: Tensor,
    slashes: Tensor,
    *,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    q_offset: int,
    causal: bool,
    block_m: int,
    block_n: int,
    chunk: int | None = None,
    exact: bool = False,
) -> SparseIndex:
    """From what `slash_lists` takes (heads are batch * heads there) to an index."""
    lists = slash_lists(
        verticals,
        slashes,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        q_offset=q_offset,
        causal=causal,
        block_m=block_m,
        block_n=block_n,
        chunk=chunk,
        exact=exact,
    )
    return SparseIndex.from_lists(
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        block_m=block_m,
        block_n=block_n,
        block_indptr=indptr_from_counts(lists.block_counts.view(batch, heads, -1)),
        block_indices=lists.block_indices,
        column_indptr=indptr_from_counts(lists.column_counts.view(batch, heads, -1)),
        column_indices=lists.column_indices,
        block_bits_ids=lists.block_bits_ids,
        block_bits=lists.block_bits,
    )


def _check_indices(owner: str, verticals: Tensor, slashes: Tensor, seqlen_k: int) -> None:
    for name, indices in (("vertical_indices", verticals), ("slash_indices", slashes)):
        if indices.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"sparse_attn.{owner}: {name} is {indices.dtype}; pass int32 or int64.")
        if indices.dim() != 3:
            raise ValueError(
                f"sparse_attn.{owner}: {name} has {indices.dim()} dimensions; "
                "pass [batch, heads, count], -1 for no entry."
            )
    if verticals.shape[:2] != slashes.shape[:2]:
        raise ValueError(
            f"sparse_attn.{owner}: vertical_indices {tuple(verticals.shape)} and slash_indices "
            f"{tuple(slashes.shape)} differ in batch or heads; these must be equal."
        )
    if verticals.numel():
        low, high = int(verticals.min()), int(verticals.max())
        if low < -1 or high >= seqlen_k:
            raise ValueError(
                f"sparse_attn.{owner}: vertical_indices hold {low if low < -1 else high}; "
                f"pass keys in [0, {seqlen_k}), -1 for no entry."
            )
    if slashes.numel() and int(slashes.min()) < -1:
        raise ValueError(
            f"sparse_attn.{owner}: slash_indices hold {int(slashes.min())}; "
            "pass distances of 0 or more, -1 for no entry."
        )
