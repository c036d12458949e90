# SPDX-License-Identifier: Apache-2.0
"""Other libraries' descriptions of sparsity, converted to a SparseIndex without any loss.

All of them read how many entries there are, so they wait for the device; they are for plans that
are made once, not for the inside of a captured graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from .index import HeadKind, SparseIndex
from .lists import (
    check_tile_sizes,
    indptr_from_counts,
    list_blocks,
    pack_bits,
    sort_lists,
    tile_entries,
)

__all__ = [
    "all_blocks",
    "from_block_mask",
    "from_block_sparse_attention",
    "from_blocks",
    "from_bsr",
    "from_dense_mask",
    "from_vertical_slash_lists",
    "to_block_mask",
]

# A mask_mod is evaluated on this many elements at a time, which bounds memory.
_CHUNK = 1 << 24


def _ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


# -------------------------------------------------------------------- masks and block grids


def from_dense_mask(mask: Tensor, *, block_m: int = 64, block_n: int = 64) -> SparseIndex:
    """The index of any boolean mask, exactly: `from_dense_mask(m).to_dense_mask() == m`.

    An aligned block that its whole tile sees becomes a block; one of which the tile sees whole
    columns becomes columns; any other becomes a block with row-validity bits.

    Args:
        mask: bool [batch, heads, seqlen_q, seqlen_k], true where the row sees the key.
        block_m: rows of a tile.
        block_n: keys of a block.

    Returns:
        An index of listed heads, with the mask's batch and heads.

    Raises:
        TypeError: the mask is not bool.
        ValueError: the mask has not four dimensions, or a tile size is not legal.
    """
    if mask.dtype != torch.bool:
        raise TypeError(
            f"sparse_attn.SparseIndex.from_dense_mask: mask is {mask.dtype}; it must be torch.bool."
        )
    if mask.dim() != 4:
        raise ValueError(
            f"sparse_attn.SparseIndex.from_dense_mask: mask has shape {tuple(mask.shape)}; "
            "[batch, heads, seqlen_q, seqlen_k] is needed."
        )
    check_tile_sizes(block_m, block_n)
    batch, heads, seqlen_q, seqlen_k = mask.shape
    tiles, width = _ceil_div(seqlen_q, block_m), _ceil_div(seqlen_k, block_n)
    pad = (0, width * block_n - seqlen_k, 0, tiles * block_m - seqlen_q)
    grid = F.pad(mask, pad).view(batch, heads, tiles, block_m, width, block_n).transpose(3, 4)
    # What lies outside the mask must not keep its edge from being whole: it agrees with anything.
    row_exists = (
        torch.arange(tiles * block_m, device=mask.device).view(tiles, 1, block_m) < seqlen_q
    )
    key_exists = torch.arange(width * block_n, device=mask.device).view(width, block_n) < seqlen_k
    seen_by_all = (grid | ~row_exists[..., None]).all(4)
    seen_by_any = grid.any(4)
    full = (seen_by_all | ~key_exists).all(-1)
    in_columns = (seen_by_all == seen_by_any).all(-1) & ~full
    partial = seen_by_any.any(-1) & ~full & ~in_columns

    columns = (seen_by_any & in_columns[..., None]).flatten(3)
    blocks = full | partial
    ids, bits = None, None
    is_partial = partial[blocks]
    if partial.any():
        ids, bits = _bits(pack_bits(grid[partial]), is_partial)
    return SparseIndex.from_lists(
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        block_m=block_m,
        block_n=block_n,
        block_indptr=indptr_from_counts(blocks.sum(-1)),
        block_indices=(blocks.nonzero()[:, 3] * block_n).int(),
        block_bits_ids=ids,
        block_bits=bits,
        column_indptr=indptr_from_counts(columns.sum(-1)),
        column_indices=columns.nonzero()[:, 3].int(),
    )


def _bits(packed: Tensor, is_partial: Tensor) -> tuple[Tensor, Tensor]:
    """block_bits_ids and block_bits from the words of the partial blocks, each mask kept once."""
    masks, which = torch.unique(packed.flatten(1), dim=0, return_inverse=True)
    ids = torch.full(is_partial.shape, -1, dtype=torch.int32, device=packed.device)
    ids[is_partial] = which.int()
    return ids, masks.view(-1, *packed.shape[1:])


def from_blocks(
    block_mask: Tensor, *, block_m: int, block_n: int, seqlen_q: int, seqlen_k: int
) -> SparseIndex:
    """The index of a grid of visible blocks.

    Args:
        block_mask: bool [batch, heads, ceil(seqlen_q / block_m), ceil(seqlen_k / block_n)].
        block_m: rows of a block.
        block_n: keys of a block.
        seqlen_q: query rows.
        seqlen_k: keys.

    Raises:
        TypeError: the grid is not bool.
        ValueError: the grid does not fit the lengths.
    """
    if block_mask.dtype != torch.bool:
        raise TypeError(
            f"sparse_attn.SparseIndex.from_blocks: block_mask is {block_mask.dtype}; it must be "
            "torch.bool."
        )
    check_tile_sizes(block_m, block_n)
    grid = (_ceil_div(seqlen_q, block_m), _ceil_div(seqlen_k, block_n))
    if block_mask.dim() != 4 or tuple(block_mask.shape[2:]) != grid:
        raise ValueError(
            f"sparse_attn.SparseIndex.from_blocks: block_mask has shape "
            f"{tuple(block_mask.shape)}; [batch, heads, {grid[0]}, {grid[1]}] is needed for "
            f"seqlen_q={seqlen_q}, seqlen_k={seqlen_k}, block_m={block_m}, block_n={block_n}."
        )
    counts, indices = list_blocks(block_mask, block_n)
    return SparseIndex.from_lists(
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        block_m=block_m,
        block_n=block_n,
        block_indptr=indptr_from_counts(counts),
        block_indices=indices,
    )


def all_blocks(index: SparseIndex) -> SparseIndex:
    """One listed head with every block of the index's size: a dense head, spelt out."""
    shape = (1, 1, index.num_tiles, _ceil_div(index.seqlen_k, index.block_n))
    return from_blocks(
        torch.ones(shape, dtype=torch.bool, device=index.device),
        block_m=index.block_m,
        block_n=index.block_n,
        seqlen_q=index.seqlen_q,
        seqlen_k=index.seqlen_k,
    )


def from_bsr(
    indptr: Tensor, indices: Tensor, *, block_m: int, block_n: int, seqlen_q: int, seqlen_k: int
) -> SparseIndex:
    """The index of block compressed sparse rows (SciPy's BSR, FlashInfer's block-sparse plan).

    Args:
        indptr: integers [ceil(seqlen_q / block_m) + 1], one pattern for every batch entry and
            head, or [batch, heads, ceil(seqlen_q / block_m) + 1], offsets into `indices` each.
        indices: integers [nnz], block columns, in any order within a row.
        block_m: rows of a block.
        block_n: keys of a block.
        seqlen_q: query rows.
        seqlen_k: keys.

    Raises:
        ValueError: the shapes do not fit the lengths, indptr decreases or points outside of
            indices, or a row's columns are out of range or repeated.
    """
    name = "sparse_attn.SparseIndex.from_bsr"
    check_tile_sizes(block_m, block_n)
    tiles, width = _ceil_div(seqlen_q, block_m), _ceil_div(seqlen_k, block_n)
    if indptr.dim() not in (1, 3) or indptr.shape[-1] != tiles + 1 or indices.dim() != 1:
        raise ValueError(
            f"{name}: indptr has shape {tuple(indptr.shape)} and indices {tuple(indices.shape)}; "
            f"[{tiles + 1}] or [batch, heads, {tiles + 1}], and [nnz], are needed for "
            f"seqlen_q={seqlen_q}, block_m={block_m}."
        )
    indptr = indptr.long().expand(1, 1, -1) if indptr.dim() == 1 else indptr.long()
    if (indptr.diff() < 0).any() or (indptr < 0).any() or (indptr > indices.shape[0]).any():
        raise ValueError(f"{name}: indptr must ascend within [0, {indices.shape[0]}].")
    tile, entry = tile_entries(indptr)
    column = indices[entry].long()
    _check_range(name, "indices", column, width)
    shape = (indptr.shape[0], indptr.shape[1], tiles)
    new_indptr, order = sort_lists(tile, column, shape)
    tile, column = tile[order], column[order]
    if ((tile[1:] == tile[:-1]) & (column[1:] == column[:-1])).any():
        raise ValueError(f"{name}: a row lists a block column twice; drop the repeats.")
    return SparseIndex.from_lists(
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        block_m=block_m,
        block_n=block_n,
        block_indptr=new_indptr,
        block_indices=(column * block_n).int(),
    )


def _check_range(function: str, name: str, values: Tensor, end: int) -> None:
    wrong = values[(values < 0) | (values >= end)]
    if wrong.shape[0]:
        raise ValueError(f"{function}: {name} has {wrong[0].item()}; it must be in [0, {end}).")


# -------------------------------------------------------------------- FlexAttention


def from_block_mask(block_mask: BlockMask) -> SparseIndex:
    """The index of a FlexAttention BlockMask; its Q and KV block sizes become block_m and block_n.

    Full blocks are taken as they are. mask_mod is evaluated once on each element of the partial
    blocks: what it leaves partly visible becomes a block with row-validity bits. Whatever causality
    mask_mod has is therefore in the index too. A mask from
    `torch.nn.attention.flex_attention.create_block_mask` or `BlockMask.from_kv_blocks` will do.

    Args:
        block_mask: its batch and heads may be 1 (broadcast).

    Raises:
        ValueError: a block size is not one that an index may have.
    """
    name = "sparse_attn.SparseIndex.from_block_mask"
    seqlen_q, seqlen_k = block_mask.seq_lengths
    # A mask of one block may give it any size (FlexAttention's own empty mask has 2**30).
    block_m = min(block_mask.BLOCK_SIZE[0], _ceil_div(seqlen_q, 16) * 16)
    block_n = min(block_mask.BLOCK_SIZE[1], _ceil_div(seqlen_k, 8) * 8)
    check_tile_sizes(block_m, block_n)
    rows = _ceil_div(seqlen_q, block_m)
    if block_mask.kv_indices.dim() != 4 or block_mask.kv_indices.shape[2] != rows:
        raise ValueError(
            f"{name}: kv_indices has shape {tuple(block_mask.kv_indices.shape)}; "
            f"[batch, heads, {rows}, columns] is needed for seq_lengths="
            f"{tuple(block_mask.seq_lengths)} and BLOCK_SIZE={tuple(block_mask.BLOCK_SIZE)}."
        )
    batch, heads, tiles = block_mask.kv_num_blocks.shape
    shape = (batch, heads, tiles)
    tile, block = _ordered_blocks(block_mask.kv_num_blocks, block_mask.kv_indices)
    tile, block, words, full = _evaluate_partial(block_mask, tile, block, block_m, block_n, shape)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        more_tile, more_block = _ordered_blocks(
            block_mask.full_kv_num_blocks, block_mask.full_kv_indices
        )
        tile, block = torch.cat([tile, more_tile]), torch.cat([block, more_block])
        full = F.pad(full, (0, more_tile.shape[0]), value=True)
    indptr, order = sort_lists(tile, block, shape)
    ids, bits = None, None
    if words.shape[0]:
        ids, bits = _bits(words, ~full)
        ids = ids[order]
    return SparseIndex.from_lists(
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        block_m=block_m,
        block_n=block_n,
        block_indptr=indptr,
        block_indices=(block[order] * block_n).int(),
        block_bits_ids=ids,
        block_bits=bits,
    )


def _ordered_blocks(counts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(tile, block) pairs, int64 [n] each, of counts [b, h, t] and indices [b, h, t, capacity]."""
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    tile = torch.arange(counts.numel(), device=indices.device).view(counts.shape)
    return tile[..., None].expand_as(used)[used], indices[used].long()


def _evaluate_partial(
    block_mask: BlockMask,
    tile: Tensor,
    block: Tensor,
    block_m: int,
    block_n: int,
    shape: tuple[int, int, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Evaluates mask_mod on blocks and drops those that nobody sees.

    Args:
        block_mask: whose mask_mod is evaluated.
        tile: int64 [n], counted over batch, heads and tiles together.
        block: int64 [n], block columns.
        block_m: rows of a block.
        block_n: keys of a block.
        shape: batch, heads, tiles.

    Returns:
        tile and block of the m blocks that are left, row-validity words int64
        [not full, block_n, ceil(block_m / 64)] of the blocks that are partly visible, and bool [m],
        whether a block is fully visible.
    """
    seqlen_q, seqlen_k = block_mask.seq_lengths
    device = tile.device
    rows = torch.arange(block_m, device=device)[:, None]
    keys = torch.arange(block_n, device=device)
    kept, words, full = [], [], []
    step = max(_CHUNK // (block_m * block_n), 1)
    for first in range(0, tile.shape[0], step):
        part = slice(first, first + step)
        row0, key0 = tile[part] % shape[2] * block_m, block[part] * block_n
        batch = tile[part] // (shape[1] * shape[2])
        head = tile[part] // shape[2] % shape[1]

        # One "batch" entry per block: create_mask keeps FlexAttention's own rules for mask_mod.
        # Loop variables are bound as values would be, since it is called within the iteration.
        def at_block(
            n: Tensor,
            _: Tensor,
            q: Tensor,
            k: Tensor,
            origin: tuple[Tensor, Tensor, Tensor, Tensor] = (batch, head, row0, key0),
        ) -> Tensor:
            b, h, row, key = (t[n] for t in origin)
            # Past the ends a mask_mod may not be asked: it may look the position up.
            q, k = (row + q).clamp(max=seqlen_q - 1), (key + k).clamp(max=seqlen_k - 1)
            return block_mask.mask_mod(b, h, q, k)

        count = row0.shape[0]
        visible = create_mask(at_block, count, 1, block_m, block_n, device)[:, 0]
        exists = (row0[:, None, None] + rows < seqlen_q) & (key0[:, None, None] + keys < seqlen_k)
        is_full, visible = (visible | ~exists).all((1, 2)), visible & exists
        seen = visible.any(2).any(1)
        kept.append(seen)
        full.append(is_full[seen])
        words.append(pack_bits(visible[seen & ~is_full]))
    if not kept:
        empty = torch.empty(0, block_n, _ceil_div(block_m, 64), dtype=torch.int64, device=device)
        return tile, block, empty, tile.bool()
    keep = torch.cat(kept)
    return tile[keep], block[keep], torch.cat(words), torch.cat(full)


def to_block_mask(
    index: SparseIndex, *, causal: bool = False, q_offset: int | None = None
) -> BlockMask:
    """A FlexAttention BlockMask with which `flex_attention` computes what our kernels do.

    Without list entries that are finer than whole aligned blocks, the mask costs one byte per
    block; otherwise it holds the dense mask, batch x heads x seqlen_q x seqlen_k bytes, which its
    mask_mod looks up.

    Args:
        index: with heads 1 or num_heads (use `expand_heads` for a list shared by a group).
        causal: whether to add causality, key j <= i + q_offset, which an index never holds.
        q_offset: position of row 0; default seqlen_k - seqlen_q.

    Raises:
        ValueError: the index has column biases, which no mask can say.
    """
    if index.column_bias is not None:
        raise ValueError(
            "sparse_attn.SparseIndex.to_block_mask: the columns have a bias and a BlockMask holds "
            "none; add it in a score_mod and convert the index without column_bias."
        )
    offset = index.seqlen_k - index.seqlen_q if q_offset is None else q_offset
    block_m, block_n = index.block_m, index.block_n
    tiles, width = index.num_tiles, _ceil_div(index.seqlen_k, block_n)
    grid = _aligned_grid(index)
    table = index.to_dense_mask(offset) if grid is None else grid
    # Sizes of one cell of the table.
    cell_m, cell_n = (1, 1) if grid is None else (block_m, block_n)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        batch, heads = table.shape[:2]
        seen = table[b % batch, h % heads, q // cell_m, k // cell_n]
        return seen & (k <= q + offset) if causal else seen

    row = torch.arange(tiles, device=index.device)[:, None] * block_m
    key = torch.arange(width, device=index.device) * block_n
    if grid is None:
        pad = (0, width * block_n - index.seqlen_k, 0, tiles * block_m - index.seqlen_q)
        cells = F.pad(table, pad).view(*table.shape[:2], tiles, block_m, width, block_n)
        any_seen, all_seen = cells.any(5).any(3), cells.all(5).all(3)
    else:
        inside = (row + block_m <= index.seqlen_q) & (key + block_n <= index.seqlen_k)
        any_seen, all_seen = grid, grid & inside
    if causal:
        any_seen = any_seen & (key <= row + block_m - 1 + offset)
        all_seen = all_seen & (key + block_n - 1 <= row + offset)
    partial = any_seen & ~all_seen
    return BlockMask.from_kv_blocks(
        *_dense_to_ordered(partial),
        *_dense_to_ordered(all_seen),
        BLOCK_SIZE=(block_m, block_n),
        mask_mod=mask_mod,
        seq_lengths=(index.seqlen_q, index.seqlen_k),
    )


def _aligned_grid(index: SparseIndex) -> Tensor | None:
    """The index as a bool grid of blocks [batch, heads, tiles, width]; None if it is not one."""
    kind = index.heads[:, 0]
    columns = (index.column_indptr[..., 1:] > index.column_indptr[..., :-1]).any()
    if columns or (kind == HeadKind.STREAMING).any() or index.block_bits is not None:
        return None
    tile, entry = tile_entries(index.block_indptr)
    start = index.block_indices[entry].long()
    if (start % index.block_n != 0).any():
        return None
    shape = (index.batch_size, index.num_heads, index.num_tiles)
    width = _ceil_div(index.seqlen_k, index.block_n)
    grid = torch.zeros(*shape, width, dtype=torch.bool, device=index.device)
    grid.view(-1, width)[tile, start // index.block_n] = True
    return grid | (kind == HeadKind.DENSE)[:, None, None]


def _dense_to_ordered(grid: Tensor) -> tuple[Tensor, Tensor]:
    """A BlockMask's counts [b, h, t] and indices [b, h, t, width], int32, of a bool grid."""
    order = torch.argsort(grid.byte(), dim=-1, descending=True, stable=True)
    return grid.sum(-1).int(), order.int().contiguous()


# -------------------------------------------------------------------- Block-Sparse-Attention


def from_block_sparse_attention(
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
    """The index of the arguments of Block-Sparse-Attention's `block_sparse_attn_func`.

    Args:
        head_mask_type: integers [heads]; 0 is a dense head, -1 a streaming head, the k-th head
            that has a 1 takes base_blockmask[:, k - 1], and n > 1 base_blockmask[:, n - 1].
        streaming_info: integers [2 * heads], (sink, local) of each head, counted in blocks, or in
            tokens with `exact_streaming`; None if no head streams.
        base_blockmask: bool [batch, sparse heads, ceil(seqlen_q / block), ceil(seqlen_k / block)];
            None if no head is block-sparse.
        seqlen_q: query rows (of every sequence).
        seqlen_k: keys.
        block: rows and keys of a block.
        causal: the call's is_causal, which places the local blocks of a streaming head: row block r
            ends at block ceil(max(seqlen_k - seqlen_q, 0) / block) + 1 + r, less the row blocks
            before the first key; not causal, it ends at the last block.
        exact_streaming: token-exact streaming heads: j < sink or i + q_offset - j < local.

    Raises:
        ValueError: shapes do not fit, or exact_streaming without causality.

    Source: github.com/mit-han-lab/Block-Sparse-Attention, block_sparse_tests.
    """
    name = "sparse_attn.SparseIndex.from_block_sparse_attention"
    check_tile_sizes(block, block)
    kind, device = head_mask_type.long(), head_mask_type.device
    if kind.dim() != 1 or (kind < -1).any():
        raise ValueError(
            f"{name}: head_mask_type must be [heads] of 0 (dense), -1 (streaming) or positive "
            "(block-sparse)."
        )
    streams = bool((kind < 0).any())
    if streams and (streaming_info is None or streaming_info.shape != (2 * kind.shape[0],)):
        shown = None if streaming_info is None else tuple(streaming_info.shape)
        raise ValueError(
            f"{name}: streaming_info is {shown}; [{2 * kind.shape[0]}] is needed, a (sink, local) "
            "pair for each head."
        )
    if exact_streaming and streams and not causal:
        raise ValueError(f"{name}: exact_streaming is causal only; pass causal=True.")
    if streaming_info is None:
        streaming_info = torch.zeros(2 * kind.shape[0], device=device)
    sink, local = streaming_info.to(device).long().view(-1, 2).unbind(1)

    shape = (_ceil_div(seqlen_q, block), _ceil_div(seqlen_k, block))
    number = torch.where(kind == 1, (kind == 1).cumsum(0), kind.clamp(min=0))
    if base_blockmask is None:
        base_blockmask = torch.zeros(1, 0, *shape, dtype=torch.bool, device=device)
    given = tuple(base_blockmask.shape)
    if len(given) != 4 or given[2:] != shape or (number > given[1]).any():
        raise ValueError(
            f"{name}: base_blockmask has shape {given} for {int((kind > 0).sum())} block-sparse "
            f"heads; [batch, sparse heads, {shape[0]}, {shape[1]}] is needed."
        )
    # A head without a mask of its own takes an empty one, number 0.
    masks = F.pad(base_blockmask, (0, 0, 0, 0, 1, 0))[:, number]
    listed = kind > 0
    if not exact_streaming:
        rule = _block_streaming(sink, local, shape, seqlen_q, seqlen_k, block, causal)
        masks = torch.where((kind < 0)[:, None, None], rule, masks)
        listed = kind != 0
    index = from_blocks(masks, block_m=block, block_n=block, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    exact = (kind < 0) & exact_streaming
    heads = torch.zeros_like(index.heads)
    heads[:, 0] = torch.where(listed, int(HeadKind.LISTED), int(HeadKind.DENSE))
    heads[:, 0] = torch.where(exact, int(HeadKind.STREAMING), heads[:, 0])
    heads[:, 1], heads[:, 2] = torch.where(exact, sink, 0), torch.where(exact, local, 0)
    return SparseIndex.from_lists(
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        block_m=block,
        block_n=block,
        block_indptr=index.block_indptr,
        block_indices=index.block_indices,
        heads=heads,
    )


def _block_streaming(
    sink: Tensor,
    local: Tensor,
    shape: tuple[int, int],
    seqlen_q: int,
    seqlen_k: int,
    block: int,
    causal: bool,
) -> Tensor:
    """bool [heads, M, N]: the blocks of block-streaming heads with `sink` and `local` [heads]."""
    row = torch.arange(shape[0], device=sink.device)[:, None]
    column = torch.arange(shape[1], device=sink.device)
    sink, local = sink[:, None, None], local[:, None, None]
    first_row = max((seqlen_q - seqlen_k) // block, 0) if causal else 0
    end = row - first_row + _ceil_div(max(seqlen_k - seqlen_q, 0), block) + 1
    if not causal:
        end = torch.full_like(row, shape[1])
    return (row >= first_row) & ((column < sink) | ((column >= end - local) & (column < end)))


# -------------------------------------------------------------------- vertical-slash lists


def from_vertical_slash_lists(
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
    """The index of MInference's and vLLM's four lists (`sparse_attn_func`), key for key.

    Lists may come in any order. Repeats are dropped, and so are columns inside a block; overlapping
    blocks are laid out anew from where they begin, with the rest that fills no block as columns.

    Args:
        block_count: integers [batch, heads, rows], rows = ceil(seqlen_q / block_m).
        block_offset: integers [batch, heads, rows, max blocks], first tokens of blocks.
        column_count: integers [batch, heads, rows].
        column_index: integers [batch, heads, rows, max columns], tokens.
        seqlen_q: query rows.
        seqlen_k: keys.
        block_m: rows of a tile.
        block_n: keys of a block.

    Raises:
        ValueError: shapes do not fit, a count exceeds its list, or a used entry is not in
            [0, seqlen_k).
    """
    name = "sparse_attn.SparseIndex.from_vertical_slash_lists"
    check_tile_sizes(block_m, block_n)
    shape = (*block_count.shape[:2], _ceil_div(seqlen_q, block_m))
    for kind, count, entries in (
        ("block", block_count, block_offset),
        ("column", column_count, column_index),
    ):
        if tuple(count.shape) != shape or tuple(entries.shape[:-1]) != shape:
            raise ValueError(
                f"{name}: {kind} lists have shapes {tuple(count.shape)} and "
                f"{tuple(entries.shape)}; [batch, heads, {shape[-1]}] and "
                f"[batch, heads, {shape[-1]}, entries] are needed."
            )
        _check_range(name, f"{kind}_count", count.flatten(), entries.shape[-1] + 1)
    tile, start = _ordered_blocks(block_count, block_offset)
    column_tile, column = _ordered_blocks(column_count, column_index)
    _check_range(name, "block_offset", start, seqlen_k)
    _check_range(name, "column_index", column, seqlen_k)

    # Positions of all tiles on one axis, with room for a last block that runs past seqlen_k.
    axis = seqlen_k + block_n + 1
    first = torch.unique(tile * axis + start)
    new_run = torch.ones_like(first, dtype=torch.bool)
    new_run[1:] = first[1:] > first[:-1] + block_n
    run_low = first[new_run]
    run_high = first[new_run.roll(-1)] + block_n  # the last of a run precedes the next one's first
    run_end = run_low - run_low % axis + seqlen_k
    # Only at the end of the keys may a block be cut off; elsewhere the rest becomes columns.
    clipped = run_high >= run_end
    length = torch.minimum(run_high, run_end) - run_low
    num_blocks = torch.where(clipped, (length + block_n - 1) // block_n, length // block_n)
    blocks = _aranges(run_low, num_blocks, block_n)
    rest = torch.where(clipped, 0, length - num_blocks * block_n)
    rest_columns = _aranges(run_low + num_blocks * block_n, rest, 1)

    columns = torch.unique(column_tile * axis + column)
    if run_low.shape[0]:
        run = (torch.searchsorted(run_low, columns, right=True) - 1).clamp(min=0)
        columns = columns[(columns < run_low[run]) | (columns >= run_high[run])]
    columns = torch.cat([columns, rest_columns]).sort().values

    def indptr(positions: Tensor) -> Tensor:
        counts = torch.bincount(positions // axis, minlength=block_count.numel())
        return indptr_from_counts(counts.view(shape))

    return SparseIndex.from_lists(
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        block_m=block_m,
        block_n=block_n,
        block_indptr=indptr(blocks),
        block_indices=(blocks % axis).int(),
        column_indptr=indptr(columns),
        column_indices=(columns % axis).int(),
    )


def _aranges(first: Tensor, count: Tensor, step: int) -> Tensor:
    """first[i] + step * [0, count[i]), for every i after another; int64."""
    which = torch.repeat_interleave(count)
    before = count.cumsum(0) - count
    inside = torch.arange(which.shape[0], device=first.device) - before[which]
    return first[which] + step * inside
