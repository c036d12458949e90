# SPDX-License-Identifier: Apache-2.0
"""Patterns that skip at regular distances: dilated diagonals, strided blocks.

They depend on lengths alone, as those of `static` do, but their indexes hold lists.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_attn import ops
from sparse_attn.index import HeadKind, SparseIndex
from sparse_attn.lists import ListBuffer, indptr_from_counts, pack_bits, tensors
from sparse_attn.patterns.base import Pattern, check_int, check_qk, offset_or_default
from sparse_attn.patterns.slash_lists import slash_lists
from sparse_attn.selection import bands
from sparse_attn.selection.estimators import MAX_BAND_ELEMENTS

# On a CPU, temporaries of this many elements stay in cache.
_CPU_BAND_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Dilated(Pattern):
    """Attention sinks, a dense window, and every `stride`-th diagonal of a wider window.

    The row at position p sees key j, at distance s = p - j, iff j < sink, or 0 <= s < local, or
    0 <= s < window and s is a multiple of `stride`. Keys ahead of the row, which only attention
    that is not causal could see, are seen if they are sinks.

    The index is exact, by row-validity bits. Tiles of 64 rows meet every key of the window whatever
    the stride, so a stride saves no time there: this is a pattern to compare others with.

    Attributes:
        sink: first keys that every row sees, in tokens.
        local: nearest keys that a row sees all, its own included, in tokens.
        window: keys back within which a row sees every `stride`-th, in tokens.
        stride: distance of the diagonals, in tokens; multiples of it are seen.

    Raises:
        TypeError: a number is not an int.
        ValueError: a number is negative, or `stride` is below 1.

    Example:
        >>> Dilated(sink=0, local=2048, window=4096)
        Dilated(sink=0, local=2048, window=4096, stride=2)

    Source:
        MInference (Jiang et al. 2024, arXiv:2407.02490), the dilated baselines of its code.
    """

    sink: int = 1024
    local: int = 0
    window: int = 8192
    stride: int = 2
    data_dependent: ClassVar[bool] = False
    row_local: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_int("Dilated", "sink", self.sink, 0)
        check_int("Dilated", "local", self.local, 0)
        check_int("Dilated", "window", self.window, 0)
        check_int("Dilated", "stride", self.stride, 1)

    def build(
        self,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool = True,
        softmax_scale: float | None = None,
        q_offset: int | None = None,
    ) -> SparseIndex:
        """See `Pattern.build`; one head that stands for all, with 64 x 64 tiles."""
        check_qk("Dilated", q, k)
        sizes = (q.shape[2], k.shape[2], offset_or_default(q, k, q_offset), causal)
        if ops.on_cpu(q):
            return self._index(*sizes)
        return _uploaded(self, *sizes, q.device)

    def _index(self, seqlen_q: int, seqlen_k: int, q_offset: int, causal: bool) -> SparseIndex:
        """The index on the CPU, which packs bits whatever the device."""
        distance = torch.arange(max(self.local, self.window, 1))
        chosen = (distance < self.local) | (
            (distance < self.window) & (distance % self.stride == 0)
        )
        lists = slash_lists(
            torch.arange(self.sink, dtype=torch.int32)[None],
            chosen[None],
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            q_offset=q_offset,
            causal=causal,
            block_m=64,
            block_n=64,
            exact=True,
        )
        return SparseIndex.from_lists(
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            block_m=64,
            block_n=64,
            block_indptr=indptr_from_counts(lists.block_counts[None]),
            block_indices=lists.block_indices,
            column_indptr=indptr_from_counts(lists.column_counts[None]),
            column_indices=lists.column_indices,
            block_bits_ids=lists.block_bits_ids,
            block_bits=lists.block_bits,
        )


@functools.lru_cache(maxsize=16)
def _uploaded(
    pattern: Dilated,
    seqlen_q: int,
    seqlen_k: int,
    q_offset: int,
    causal: bool,
    device: torch.device,
) -> SparseIndex:
    """Its index on a device, kept: a CUDA graph must find it there, and nobody changes it."""
    with torch.inference_mode(False):
        index = pattern._index(seqlen_q, seqlen_k, q_offset, causal)
        if device.type != "cuda":
            return index.to(device)
        # A copy from pinned memory does not wait for what the device is at.
        pinned = {name: x.pin_memory() for name, x in tensors(index).items()}
        moved: dict[str, Any] = {n: x.to(device, non_blocking=True) for n, x in pinned.items()}
        return replace(index, **moved)


@dataclass(frozen=True)
class StridedBlocks(Pattern):
    """A local window of blocks, and every `vert_stride`-th block column, shifted from head to head.

    With I the block of a row's position (position // block), J that of a key and h the KV head, the
    row sees the key iff

        |I - J| < local_blocks  or  (J + h * head_step + offset) mod vert_stride = 0

    (and, where attention is causal, the key is not past the row). Blocks lie at fixed positions, so
    a block that one row has stopped to see stays unseen by later ones, and a cache may drop it.

    Inside a `PerHead`, heads with equal patterns are built together and do not know their numbers:
    give each its own `offset` there, and `head_step` 0.

    Attributes:
        block: tokens of a block, a multiple of 16; also the tile of the index.
        local_blocks: blocks back that a row sees, its own included.
        vert_stride: every how many blocks a block column is seen by all.
        offset: shift of these columns, in blocks.
        head_step: further shift from one KV head to the next, in blocks; None:
            max(1, vert_stride // num_heads_kv).
        dense_heads: last KV heads that see everything.

    Raises:
        TypeError: a number is not an int.
        ValueError: a number is out of range.

    Example:
        >>> StridedBlocks(local_blocks=16, vert_stride=8).block
        64

    Source:
        S2-Attention (Lin et al. 2024, arXiv:2407.17678) and its DKernel; with head_step=0 the
        strided layers of LongGen (Ge et al. 2024, arXiv:2410.01485).
    """

    block: int = 64
    local_blocks: int = 32
    vert_stride: int = 8
    offset: int = 0
    head_step: int | None = None
    dense_heads: int = 0
    data_dependent: ClassVar[bool] = False
    row_local: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_int("StridedBlocks", "block", self.block, 16)
        check_int("StridedBlocks", "local_blocks", self.local_blocks, 1)
        check_int("StridedBlocks", "vert_stride", self.vert_stride, 1)
        check_int("StridedBlocks", "offset", self.offset, 0)
        check_int("StridedBlocks", "dense_heads", self.dense_heads, 0)
        if self.head_step is not None:
            check_int("StridedBlocks", "head_step", self.head_step, 0)
        if self.block % 16 != 0:
            raise ValueError(
                f"sparse_attn.StridedBlocks: block={self.block} is not a multiple of 16; "
                "pass for instance 64."
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
        """See `Pattern.build`; the index has the KV heads, or one head where all are alike."""
        check_qk("StridedBlocks", q, k)
        seqlen_q, seqlen_k, heads_kv = q.shape[2], k.shape[2], k.shape[1]
        q_offset = offset_or_default(q, k, q_offset)
        step = self.head_step
        if step is None:
            step = max(1, self.vert_stride // heads_kv)
        alike = self.dense_heads == 0 and step % self.vert_stride == 0
        heads = 1 if alike else heads_kv
        listed = max(0, heads - self.dense_heads)
        tiles, blocks = -(-seqlen_q // self.block), -(-seqlen_k // self.block)
        # Positions that are no multiple of the block let a tile's last rows lie in the next block.
        beyond = q_offset % self.block
        own = torch.arange(tiles, device=q.device)[:, None] + (q_offset - beyond) // self.block
        key_block = torch.arange(blocks, device=q.device)
        counts = [own.new_zeros(0)]
        starts, masks = (ListBuffer(heads * tiles * blocks, q.device) for _ in range(2))
        most = _CPU_BAND_ELEMENTS if q.device.type == "cpu" else MAX_BAND_ELEMENTS
        for outer, inner in bands(heads, tiles, blocks, most):
            head = torch.arange(outer.start, outer.stop, device=q.device)[:, None, None]
            column = (key_block + head * step + self.offset) % self.vert_stride == 0
            back = own[inner] - key_block
            near, near_next = back.abs() < self.local_blocks, (back + 1).abs() < self.local_blocks
            if beyond == 0:
                near_next = near
            kept = (near | near_next | column) & (head < listed)
            if causal:
                last = (torch.arange(tiles, device=q.device)[inner, None] + 1) * self.block
                last = last.clamp(max=seqlen_q) - 1 + q_offset
                kept &= key_block * self.block <= last
            counts.append(kept.sum(-1).flatten())
            starts.append(kept, (key_block * self.block).int())
            if beyond != 0:
                # Mask 0 is for the rows before the border, 1 for those after it.
                mask = torch.where(near_next, 1, 0).where((near != near_next) & ~column, -1)
                masks.append(kept, mask.int())
        return SparseIndex.from_lists(
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            block_m=self.block,
            block_n=self.block,
            block_indptr=indptr_from_counts(torch.cat(counts).view(1, heads, tiles)),
            block_indices=starts.values,
            heads=self._heads(heads, listed, q.device),
            block_bits_ids=masks.values if beyond != 0 else None,
            block_bits=self._border(beyond, q.device) if beyond != 0 else None,
        )

    def _heads(self, heads: int, listed: int, device: torch.device) -> Tensor:
        rows = torch.zeros(heads, 4, dtype=torch.int32, device=device)
        rows[:, 0] = int(HeadKind.DENSE)
        rows[:listed, 0] = int(HeadKind.LISTED)
        return rows

    def _border(self, beyond: int, device: torch.device) -> Tensor:
        """Row-validity bits of the two sides of the border that a tile straddles."""
        before = torch.arange(self.block, device=device) < self.block - beyond
        sides = torch.stack((before, ~before))[:, :, None]
        return pack_bits(sides.expand(2, self.block, self.block))
