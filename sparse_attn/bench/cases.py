# SPDX-License-Identifier: Apache-2.0
"""What is measured: a problem, a choice of keys, and who computes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from sparse_attn.index import SparseIndex

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = ("blocks", "columns", "streaming", "ragged")
_GRID_M = 64  # finer tiles are made by splitting these, so that they see the same keys


@dataclass(frozen=True)
class Problem:
    """Shapes and dtype of q, k and v.

    Rows stand at the end of the key axis, and each sees the keys up to its own (causal): decode is
    a problem with few rows.
    """

    dtype: str
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    heads: int = 1
    heads_kv: int = 1
    batch: int = 1

    @property
    def phase(self) -> str:
        """Either "prefill" or "decode"."""
        return "decode" if self.seqlen_q < self.seqlen_k else "prefill"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that `dtype` names."""
        return DTYPES[self.dtype]

    @property
    def offset(self) -> int:
        """Position of row 0 on the key axis."""
        return self.seqlen_k - self.seqlen_q

    @property
    def dense_flops(self) -> float:
        """Multiply-adds of q . k and p . v over all (row, key) pairs that causality allows, x 2."""
        pairs = self.seqlen_q * (self.offset + self.seqlen_k + 1) / 2
        return 4.0 * self.batch * self.heads * self.head_dim * pairs

    @property
    def dense_bytes(self) -> float:
        """Bytes of k and v."""
        return 2.0 * self.batch * self.heads_kv * self.seqlen_k * self.head_dim * self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return self.torch_dtype.itemsize

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Normal random q, k, v, the same at every call."""
        generator = torch.Generator().manual_seed(0)

        def draw(heads: int, seqlen: int) -> Tensor:
            shape = (self.batch, heads, seqlen, self.head_dim)
            return torch.randn(shape, generator=generator).to(self.torch_dtype)

        q, k, v = (
            draw(self.heads, self.seqlen_q),
            draw(self.heads_kv, self.seqlen_k),
            draw(self.heads_kv, self.seqlen_k),
        )
        return q, k, v


@dataclass(frozen=True)
class Choice:
    """Which keys: all, or about `density` of those that causality allows.

    Attributes:
        kind: "dense"; "blocks": the diagonal and random earlier blocks; "columns": the diagonal
            blocks and as many random keys as those blocks hold; "streaming": the first block and a
            window; "ragged": blocks, but the heads' densities differ up to 15-fold.
        density: wanted; what was made is measured (`SparseIndex.density`).
        block_m: query rows of a tile.
        block_n: keys of a block.
    """

    kind: str = "dense"
    density: float = 1.0
    block_m: int = 64
    block_n: int = 64

    def __str__(self) -> str:
        if self.kind == "dense":
            return "dense"
        usual = self.block_m in (1, 64) and self.block_n == 64
        tile = "" if usual else f" {self.block_m}x{self.block_n}"
        return f"{self.kind} {100 * self.density:g}%{tile}"


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        problem: shapes.
        choice: keys.
        by: who computes it: a name in `peers.IMPLEMENTATIONS`.
        capability: instruction set that ours is held to, None for the fastest.
        threads: as torch.set_num_threads.
    """

    problem: Problem
    choice: Choice = Choice()
    by: str = "sparse_attn"
    capability: str | None = None
    threads: int = 1

    def __str__(self) -> str:
        forced = f" [{self.capability}]" if self.capability else ""
        return f"{self.by}{forced} {self.problem.dtype} {self.choice}"

    def with_(self, **changes: object) -> Case:
        """A copy with other fields."""
        return replace(self, **changes)  # type: ignore[arg-type]


class Keys:
    """The keys that a choice means for a problem, in the forms that contestants take."""

    def __init__(self, problem: Problem, choice: Choice):
        self.problem = problem
        self.choice = choice
        decode = problem.seqlen_q < 16
        self.block_m = 1 if decode else max(_GRID_M, choice.block_m)
        self.block_n = choice.block_n

    @cached_property
    def grid(self) -> Tensor:
        """bool [1, heads_kv, tiles, blocks]: which blocks each tile sees.

        Tile t sees the blocks that its own rows lie in, and of those before as many random ones as
        bring it to the density.
        """
        problem, choice = self.problem, self.choice
        first = torch.arange(0, problem.seqlen_q, self.block_m) + problem.offset
        last = (first + self.block_m - 1).clamp(max=problem.seqlen_k - 1)
        block = torch.arange(-(-problem.seqlen_k // self.block_n))
        seen = block <= (last // self.block_n)[:, None]
        earlier = block < (first // self.block_n)[:, None]
        if choice.kind == "dense":
            return seen.expand(1, problem.heads_kv, -1, -1)
        wanted = (self._densities() * seen.sum(-1)).round() - (seen & ~earlier).sum(-1)
        generator = torch.Generator().manual_seed(1)
        grid = torch.empty(1, problem.heads_kv, *seen.shape, dtype=torch.bool)
        for head in range(problem.heads_kv):
            draw = torch.rand(seen.shape, generator=generator).where(earlier, 2.0)
            rank = draw.argsort(-1).argsort(-1)
            grid[0, head] = (earlier & (rank < wanted[head, :, None])) | (seen & ~earlier)
        return grid

    def _densities(self) -> Tensor:
        """[heads_kv, 1] wanted densities; "ragged" ones fall geometrically, with the same mean."""
        heads = self.problem.heads_kv
        if self.choice.kind != "ragged" or heads == 1:
            return torch.full((heads, 1), self.choice.density)
        weights = torch.logspace(0, -1.2, heads)
        return (weights / weights.mean() * self.choice.density).clamp(max=1)[:, None]

    @cached_property
    def index(self) -> SparseIndex:
        """The index of a sparse choice."""
        problem, choice = self.problem, self.choice
        if choice.kind == "dense":
            return SparseIndex.dense(problem.seqlen_q, problem.seqlen_k)
        if choice.kind == "streaming":
            # A window w over a triangle of side n covers 1 - (1 - w / n)^2 of it.
            share = 1 - (1 - choice.density) ** 0.5 if self.block_m > 1 else choice.density
            window = max(1, round(share * problem.seqlen_k) - choice.block_n)
            return SparseIndex.streaming(
                problem.seqlen_q, problem.seqlen_k, sink=choice.block_n, window=window
            )
        if choice.kind == "columns":
            index = self._columns()
        else:
            index = self._blocks(self.grid)
        if self.block_m > choice.block_m > 1:
            index = index.with_tiles(block_m=choice.block_m)
        return index.validate()

    def _blocks(self, grid: Tensor) -> SparseIndex:
        return SparseIndex.from_blocks(
            grid,
            block_m=self.block_m,
            block_n=self.block_n,
            seqlen_q=self.problem.seqlen_q,
            seqlen_k=self.problem.seqlen_k,
        )

    def _columns(self) -> SparseIndex:
        """Blocks of the tile's own rows, and random earlier keys, as many as the grid's blocks."""
        problem, heads = self.problem, self.problem.heads_kv
        generator = torch.Generator().manual_seed(2)
        tiles = self.grid.shape[2]
        first = (torch.arange(tiles) * self.block_m + problem.offset) // self.block_n
        own = torch.arange(self.grid.shape[3]) >= first[:, None]
        counts = ((self.grid & ~own).sum(-1) * self.block_n)[0]  # [heads, tiles]
        columns = [
            torch.randperm(int(first[tile]) * self.block_n, generator=generator)[:count].sort()[0]
            for head in range(heads)
            for tile, count in enumerate(counts[head].tolist())
        ]
        blocks = self._blocks(self.grid & own)
        ends = counts.flatten().cumsum(0).view(heads, tiles)
        indptr = torch.cat((ends[:, :1] - counts[:, :1], ends), dim=1)[None]
        return SparseIndex.from_lists(
            seqlen_q=problem.seqlen_q,
            seqlen_k=problem.seqlen_k,
            block_m=self.block_m,
            block_n=self.block_n,
            block_indptr=blocks.block_indptr,
            block_indices=blocks.block_indices,
            column_indptr=indptr.contiguous(),
            column_indices=torch.cat(columns).int(),
        )
