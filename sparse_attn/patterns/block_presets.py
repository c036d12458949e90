# SPDX-License-Identifier: Apache-2.0
"""Presets of the methods that choose whole blocks; `presets` has them all."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sparse_attn.patterns.block_sparse import BlockSparse
from sparse_attn.patterns.flexprefill import FlexPrefill
from sparse_attn.patterns.gated_blocks import GatedBlocks
from sparse_attn.patterns.preset import Preset
from sparse_attn.patterns.quest import Quest
from sparse_attn.patterns.sparge import SpargeAttention
from sparse_attn.patterns.xattention import XAttention

_TIES = "Equal scores are broken towards the lower block; the original leaves it to the device."


def minference_block_sparse(top_k: int = 100) -> Preset:
    """MInference's block-sparse head: the best 64 x 64 blocks by mean-pooled scores.

    Args:
        top_k: blocks that a tile keeps.
    """
    return Preset(
        "minference_block_sparse",
        BlockSparse(top_k=top_k),
        "Jiang et al. 2024, arXiv:2407.02490, block-sparse head",
        (
            _TIES,
            "The first and the diagonal block are kept and count towards the budget; the original "
            "forces none, so that a tile can lose its own keys.",
            "A shorter last block is averaged over its real rows, and none is added; the original "
            "averages zero padding, and pads a whole block where none is needed.",
        ),
    )


def xattention(stride: int = 16, threshold: float = 0.9) -> Preset:
    """XAttention: 128 x 128 blocks by the sums of their antidiagonals.

    Args:
        stride: rows and keys of a cell, in tokens; a divisor of 128.
        threshold: share of a tile's estimated mass, in (0, 1].
    """
    return Preset(
        "xattention",
        XAttention(stride=stride, threshold=threshold),
        "Xu et al. 2025, arXiv:2503.16428",
        (
            _TIES,
            "The first block of keys is kept by every tile; the original's option marks the first "
            "tile of queries instead.",
            "Sums reach the end of the keys exactly; the original pads them to a chunk's length.",
            "One threshold serves all heads; put patterns in PerHead for a searched table.",
            "Decoding uses the same rule; the original decodes densely.",
        ),
    )


def flexprefill(gamma: float = 0.9, tau: float = 0.1) -> Preset:
    """FlexPrefill: pooled blocks or vertical-slash, as the last rows tell of a head.

    Args:
        gamma: share of the mass to keep, in (0, 1].
        tau: distance of the two estimates below which a head goes by pooled blocks.
    """
    return Preset(
        "flexprefill",
        FlexPrefill(gamma=gamma, tau=tau),
        "Lai et al. 2025, arXiv:2502.20766",
        (
            _TIES,
            "Budgets are counted in blocks of the configured size; the original divides by 128 "
            "whatever the block.",
            "Short prompts are not dense by rule; the dispatcher decides.",
            "Rows may be fewer than keys: the last rows decide for every chunk of a prefill.",
            "gamma of 1 keeps every allowed block, also where probabilities round to zero.",
        ),
    )


def sparge(top_p: float = 0.98, similarity: float = 0.6) -> Preset:
    """SpargeAttention's choice of 128 x 64 blocks.

    Args:
        top_p: share of a tile's probability among the blocks that their means stand for.
        similarity: mean cosine below which a block is always attended.
    """
    return Preset(
        "sparge",
        SpargeAttention(top_p=top_p, similarity=similarity),
        "Zhang et al. 2025, arXiv:2502.18137",
        (
            _TIES,
            "Nothing is quantised, keys are not smoothed, and no product is skipped inside the "
            "kernel.",
            "The two blocks that end with a tile's own rows are kept; the original forces none, so "
            "that a row can be left without a key.",
            "Attention is causal row by row; the original's calls are causal by block alone.",
        ),
    )


def quest(budget: int = 2048, page: int = 16) -> Preset:
    """Quest: decoding over the pages whose bounds permit the largest logits.

    Args:
        budget: keys that a step sees, in tokens.
        page: keys of a page.
    """
    return Preset(
        "quest",
        Quest(budget=budget, page=page),
        "Tang et al. 2024, arXiv:2406.10774",
        (
            _TIES,
            "No layer is treated apart; the original keeps the first two dense.",
            "Grouped heads and any batch are allowed: every query head chooses for itself.",
            "Bounds are computed from the keys at every step; QuestState keeps them between steps.",
        ),
    )


def moba(chunk_size: int = 2048, top_k: int = 3, block_m: int = 1) -> Preset:
    """MoBA's gate without parameters: the chunks whose mean key a row likes best, and its own.

    Args:
        chunk_size: keys of a chunk, a multiple of 8.
        top_k: chunks that a row keeps, its own included.
        block_m: rows that share a choice, by their mean; 1, as in the paper, is slow in prefill.
    """
    deviations = [_TIES, "Decoding uses the same rule; the original decodes densely."]
    if block_m != 1:
        deviations.append("A tile of rows shares one choice, by the mean of its rows.")
    return Preset(
        "moba",
        BlockSparse(
            top_k=top_k, block_m=block_m, block_n=chunk_size, sink_blocks=0, local_blocks=1
        ),
        "Lu et al. 2025, arXiv:2502.13189",
        tuple(deviations),
    )


def seer(
    gate: Callable[[Tensor, Tensor], Tensor],
    threshold: float | None = 2e-3,
    top_k: int | None = None,
) -> Preset:
    """SeerAttention: 64 x 64 blocks by a learned gate.

    Args:
        gate: called with (q, k); returns its scores before the softmax, [batch, heads or heads_kv,
            tiles, blocks].
        threshold: probability above which a block is kept; None with top_k.
        top_k: blocks that a tile keeps.
    """
    return Preset(
        "seer",
        GatedBlocks(gate, threshold=threshold, top_k=top_k),
        "Gao et al. 2024, arXiv:2410.13276",
        (
            _TIES,
            "The gate is the caller's, and gets the rotated q and k that attention gets.",
            "The last two tiles of rows are not dense; the original's are.",
            "The diagonal block is kept by every tile.",
        ),
    )
