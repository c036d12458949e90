# SPDX-License-Identifier: Apache-2.0
"""Estimators of a whole block at once: pooled rows, bounds, and antidiagonals.

All are float32 whatever the input dtype, and give one score for a tile of queries and a block of
keys. The matrix products are torch's; the reductions around them are native on the CPU.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn import ops
from sparse_attn.selection.estimators import bands

_BAND_CELLS = 256  # rows of one matrix product: long enough to be fast, short against the diagonal
_NATIVE = (torch.float32, torch.bfloat16, torch.float16)


def pool(x: Tensor, block: int, kind: str = "mean") -> Tensor:
    """Every run of `block` rows as one; a shorter last run counts its real rows alone.

    Args:
        x: [..., seqlen, head_dim], any floating dtype and strides.
        block: rows in a run.
        kind: "mean", "min", "max", or "direction": the mean of the rows divided by their norms
            (a row of zeros stays zero).

    Returns:
        float32 [..., ceil(seqlen / block), head_dim].
    """
    if ops.on_cpu(x) and x.dtype in _NATIVE and x.dim() == 4 and x.stride(-1) == 1:
        return ops.pool_blocks(x, block, kind)
    return _pool_torch(x, block, kind)


def _pool_torch(x: Tensor, block: int, kind: str) -> Tensor:
    """`pool` on any device."""
    if kind == "direction":
        x = F.normalize(x.float(), dim=-1, eps=torch.finfo(torch.float32).tiny)
    full = x.shape[-2] // block
    whole = x[..., : full * block, :]
    parts = [whole.reshape(*x.shape[:-2], full, block, x.shape[-1])]
    if full * block < x.shape[-2]:
        parts.append(x[..., full * block :, :].unsqueeze(-3))
    if kind == "min":
        pooled = [part.amin(-2).float() for part in parts]
    elif kind == "max":
        pooled = [part.amax(-2).float() for part in parts]
    else:
        pooled = [part.mean(-2, dtype=torch.float32) for part in parts]
    return torch.cat(pooled, dim=-2)


def mean_pool(x: Tensor, block: int) -> Tensor:
    """`pool` of kind "mean"."""
    return pool(x, block, "mean")


def block_similarity(x: Tensor, block: int) -> Tensor:
    """How alike the rows of every block are: the mean cosine over all pairs, a row with itself too.

    The mean of a Gram matrix of unit rows is the squared norm of their mean.

    Args:
        x: [..., seqlen, head_dim].
        block: rows in a block.

    Returns:
        float32 [..., ceil(seqlen / block)], in [0, 1].

    Source:
        SpargeAttention (Zhang et al. 2025, arXiv:2502.18137), self-similarity.
    """
    return pool(x, block, "direction").square().sum(-1)


def pooled_scores(q_means: Tensor, k_means: Tensor, softmax_scale: float) -> Tensor:
    """Logits between block means: softmax_scale * q_mean . k_mean.

    Args:
        q_means: float32 [..., tiles, head_dim].
        k_means: float32 [..., blocks, head_dim], same leading dimensions.
        softmax_scale: factor of the dot products.

    Returns:
        float32 [..., tiles, blocks].
    """
    return torch.matmul(q_means * softmax_scale, k_means.transpose(-1, -2))


def minmax_pool(k: Tensor, page: int) -> Tensor:
    """Bounds of every page of keys, per channel: the maxima, then the minima.

    Args:
        k: [..., seqlen, head_dim].
        page: keys in a page.

    Returns:
        float32 [..., ceil(seqlen / page), 2 * head_dim].
    """
    return torch.cat((pool(k, page, "max"), pool(k, page, "min")), dim=-1)


def minmax_bound_scores(q: Tensor, bounds: Tensor, softmax_scale: float) -> Tensor:
    """The largest logit that a key within a page's bounds could have.

    sum_d max(q_d high_d, q_d low_d) = max(q, 0) . high + min(q, 0) . low, one product for all.

    Args:
        q: [batch, heads, rows, head_dim].
        bounds: float32 [batch, heads_kv, pages, 2 * head_dim], from `minmax_pool`.
        softmax_scale: factor of q . k.

    Returns:
        float32 [batch, heads, rows, pages].

    Source:
        Quest (Tang et al. 2024, arXiv:2406.10774).
    """
    batch, heads, rows, _ = q.shape
    heads_kv, pages = bounds.shape[1:3]
    scaled = q.float() * softmax_scale
    halves = torch.cat((scaled.clamp(min=0.0), scaled.clamp(max=0.0)), dim=-1)
    grouped = halves.reshape(batch, heads_kv, heads // heads_kv * rows, bounds.shape[-1])
    return torch.matmul(grouped, bounds.transpose(-1, -2)).view(batch, heads, rows, pages)


def antidiagonal_scores(
    q: Tensor,
    k: Tensor,
    *,
    stride: int,
    block_m: int,
    block_n: int,
    softmax_scale: float,
    q_offset: int,
    causal: bool,
) -> Tensor:
    """Probabilities of cells of stride x stride (row, key) pairs, summed by tile and block.

    A cell's logit is softmax_scale times the mean of q . k over its antidiagonal: its stride pairs
    whose row and key numbers within the cell add up to stride - 1. A row of cells is normalised
    over the cells it may see: those that begin at or before the position of its last row. Rows and
    keys past the end count as zeros. Cost: seqlen_q * seqlen_k * head_dim / stride multiply-adds,
    half of them if causal.

    Args:
        q: [batch, heads, seqlen_q, head_dim].
        k: [batch, heads_kv, seqlen_k, head_dim].
        stride: rows and keys of a cell; a divisor of block_m and block_n.
        block_m: rows of a tile.
        block_n: keys of a block.
        softmax_scale: factor of q . k.
        q_offset: position of query row 0 on the key axis.
        causal: whether a row of cells sees only the cells up to its own position.

    Returns:
        float32 [batch, heads, tiles, blocks]; a tile's row sums to its rows of cells.

    Source:
        XAttention (Xu et al. 2025, arXiv:2503.16428).
    """
    batch, heads, seqlen_q, dim = q.shape
    heads_kv, seqlen_k = k.shape[1:3]
    group = heads // heads_kv
    tiles, blocks = -(-seqlen_q // block_m), -(-seqlen_k // block_n)
    num_cells, width = -(-seqlen_q // stride), -(-seqlen_k // stride)
    scores = q.new_zeros((batch * heads_kv, group, tiles, blocks), dtype=torch.float32)
    last = torch.arange(1, num_cells + 1, device=q.device) * stride
    last = last.clamp(max=seqlen_q) - 1 + q_offset
    limits = (last.div(stride, rounding_mode="floor") + 1).clamp(0, width)
    limits = limits if causal else torch.full_like(limits, width)
    tile_cells = block_m // stride
    step = max(1, _BAND_CELLS // (tile_cells * group))
    queries = q.reshape(batch * heads_kv, group, seqlen_q, dim)
    for some, _ in bands(batch * heads_kv, 1, max(1, width * stride * dim)):
        keys = _cells(k.flatten(0, 1)[some], stride).transpose(-1, -2)
        for tile in range(0, tiles, step):
            band = slice(tile * tile_cells, min((tile + step) * tile_cells, num_cells))
            # The band's last row of cells sees most; its number is known without the device.
            seen = min(band.stop * stride, seqlen_q) - 1 + q_offset
            seen = min(max(seen // stride + 1, 0), width) if causal else width
            part = queries[some, :, tile * block_m : (tile + step) * block_m]
            cells = _cells(part, stride, reverse=True).flatten(1, 2)
            logits = torch.matmul(cells, keys[..., :seen])
            sums = _cell_block_sums(
                logits.view(logits.shape[0], group, -1, seen),
                limits[band],
                tile_cells=tile_cells,
                block_cells=block_n // stride,
                scale=softmax_scale / stride,
            )
            scores[some, :, tile : tile + step, : sums.shape[-1]] = sums
    return scores.view(batch, heads, tiles, blocks)


def _cells(x: Tensor, stride: int, reverse: bool = False) -> Tensor:
    """Rows [..., seqlen, dim] as float32 cells [..., ceil(seqlen / stride), stride * dim]."""
    missing = -x.shape[-2] % stride
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    x = x.float().reshape(*x.shape[:-2], x.shape[-2] // stride, stride, x.shape[-1])
    if reverse:  # index_select copies whole rows, flip element by element
        x = x.index_select(-2, torch.arange(stride - 1, -1, -1, device=x.device))
    return x.flatten(-2)


def _cell_block_sums(
    logits: Tensor, limits: Tensor, *, tile_cells: int, block_cells: int, scale: float
) -> Tensor:
    """Softmax of rows of cells over the first limits[cell] of them, summed by tile and block.

    logits float32 [..., n, width], limits int64 [n]; returns [..., tiles, blocks].
    """
    if ops.on_cpu(logits):
        sums = ops.cell_block_sums(
            logits.reshape(math.prod(logits.shape[:-2]), *logits.shape[-2:]),
            limits,
            tile_cells=tile_cells,
            block_cells=block_cells,
            scale=scale,
        )
        return sums.view(*logits.shape[:-2], *sums.shape[1:])
    return _cell_block_sums_torch(logits, limits, tile_cells, block_cells, scale)


def _cell_block_sums_torch(
    logits: Tensor, limits: Tensor, tile_cells: int, block_cells: int, scale: float
) -> Tensor:
    """`_cell_block_sums` on any device."""
    hidden = torch.arange(logits.shape[-1], device=logits.device) >= limits[:, None]
    probs = torch.softmax((logits * scale).masked_fill(hidden, -math.inf), dim=-1).nan_to_num(0.0)
    probs = F.pad(probs, (0, -probs.shape[-1] % block_cells, 0, -probs.shape[-2] % tile_cells))
    tiles, blocks = probs.shape[-2] // tile_cells, probs.shape[-1] // block_cells
    return probs.view(*probs.shape[:-2], tiles, tile_cells, blocks, block_cells).sum((-3, -1))
