# SPDX-License-Identifier: Apache-2.0
"""Presets: the configurations that papers publish, each with its source and its deviations.

    out = sparse_attn.attention(q, k, v, sparse_attn.presets.minference())

A preset is a pattern: what it builds is what `preset.pattern` builds.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparse_attn.patterns.anchor import AnchorAttention
from sparse_attn.patterns.base import check_int
from sparse_attn.patterns.block_presets import (
    flexprefill,
    minference_block_sparse,
    moba,
    quest,
    seer,
    sparge,
    xattention,
)
from sparse_attn.patterns.centroid_index import CentroidIndex
from sparse_attn.patterns.centroid_lookup import CentroidLookup
from sparse_attn.patterns.hip import HiP, InfiniteHiP
from sparse_attn.patterns.per_head import PerHead
from sparse_attn.patterns.preset import Preset
from sparse_attn.patterns.static import AShape, Dense
from sparse_attn.patterns.strided import Dilated, StridedBlocks
from sparse_attn.patterns.vertical_slash import VerticalSlash

__all__ = [
    "Preset",
    "a_shape",
    "anchor_attention",
    "dilated",
    "duo_attention",
    "flexprefill",
    "hip",
    "infinite_hip",
    "lm_infinite",
    "longgen",
    "minference",
    "minference_block_sparse",
    "moba",
    "quest",
    "qwen2_5_1m",
    "s2",
    "seer",
    "sparge",
    "squeezed",
    "streaming_llm",
    "tri_shape",
    "xattention",
]


def streaming_llm(sink: int = 4, window: int = 1024) -> Preset:
    """Attention sinks and a sliding window.

    Args:
        sink: first keys that every row sees, in tokens.
        window: keys back that a row sees, itself included, in tokens.
    """
    return Preset(
        "streaming_llm",
        AShape(sink=sink, window=window),
        "Xiao et al. 2023, arXiv:2309.17453",
        ("Positions are not re-numbered inside the cache: keys keep the rotation they came with.",),
    )


def a_shape(sink: int = 128, window: int = 3968) -> Preset:
    """MInference's A-shape head: sinks and a sliding window, prefill.

    Args:
        sink: first keys that every row sees, in tokens.
        window: keys back that a row sees, itself included, in tokens.
    """
    return Preset(
        "a_shape",
        AShape(sink=sink, window=window),
        "MInference, Jiang et al. 2024, arXiv:2407.02490",
        (),
    )


def tri_shape(sink: int = 128, window: int = 3968, dense_tail: int = 100) -> Preset:
    """A-shape whose last rows see every key.

    Args:
        sink: first keys that every row sees, in tokens.
        window: keys back that a row sees, itself included, in tokens.
        dense_tail: last rows that see every key, in tokens.
    """
    return Preset(
        "tri_shape",
        AShape(sink=sink, window=window, dense_tail=dense_tail),
        "SCBench, Li et al. 2024, arXiv:2412.10319; MInference's code",
        (),
    )


def minference(vertical: int = 1000, slash: int = 6096) -> Preset:
    """MInference's default head, for models without a searched configuration.

    Args:
        vertical: budget of columns, in keys.
        slash: budget of diagonals.
    """
    return Preset(
        "minference",
        VerticalSlash(vertical=vertical, slash=slash),
        "Jiang et al. 2024, arXiv:2407.02490, algorithm 2",
        (
            "Equal scores are broken towards the lower index; the original leaves it to the "
            "device.",
            "Every chosen column is kept; the original loses those after the nearest diagonal.",
            "Diagonals are merged into bands before they are cut into blocks, so a block is not "
            "always 64 keys from a diagonal's start.",
        ),
    )


def qwen2_5_1m(vertical: int = 1000, slash: int = 6096, chunk: int = 32768) -> Preset:
    """Qwen2.5-1M's prefill: MInference's rule, chosen anew by the last 64 rows of every chunk.

    Args:
        vertical: budget of columns, in keys.
        slash: budget of diagonals.
        chunk: rows that choose together, in tokens.
    """
    return Preset(
        "qwen2_5_1m",
        VerticalSlash(vertical=vertical, slash=slash, chunk=chunk),
        "Yang et al. 2025, arXiv:2501.15383, section 5.2",
        (
            "Dual chunk attention's positions are not part of it: sparse_attn.dual_chunk_attention "
            "runs its three stages with queries that the caller has rotated.",
            "Budgets are the same for all heads; the original searches one for each, and raises "
            "them until enough attention is recalled.",
            "Prompts below 32,768 tokens are sparse too; the original runs them dense.",
            *minference().deviations,
        ),
    )


def dilated(variant: int = 1) -> Preset:
    """MInference's dilated baselines.

    Args:
        variant: 1: 1,024 sinks and every second of the last 8,192 diagonals; 2: 1,024 sinks, 2,048
            dense diagonals and every second up to 4,096.

    Raises:
        ValueError: there is no such variant.
    """
    if variant not in (1, 2):
        raise ValueError(
            f"sparse_attn.presets.dilated: variant={variant!r} is unknown; pass 1 or 2."
        )
    pattern = Dilated() if variant == 1 else Dilated(local=2048, window=4096)
    return Preset(
        "dilated",
        pattern,
        "MInference, Jiang et al. 2024, arXiv:2407.02490, its code's dilated1 and dilated2",
        (
            "Single diagonals are seen; the original's tiles of 64 keys cover what lies between "
            "them, so that it attends to the whole window.",
            "Distances are multiples of 2, the row's own key included.",
        ),
    )


def s2(
    local_blocks: int = 32, vert_stride: int = 8, block: int = 64, dense_heads: int = 0
) -> Preset:
    """S2-Attention: local blocks, and block columns that are shifted from head to head.

    Args:
        local_blocks: blocks back that a row sees.
        vert_stride: every how many blocks a column is seen by all.
        block: tokens of a block.
        dense_heads: last KV heads that see everything.
    """
    return Preset(
        "s2",
        StridedBlocks(
            block=block, local_blocks=local_blocks, vert_stride=vert_stride, dense_heads=dense_heads
        ),
        "Lin et al. 2024, arXiv:2407.17678; DKernel",
        (
            "Where attention is not causal, columns stay at fixed positions; the original counts "
            "them from the row.",
        ),
    )


def longgen(local_blocks: int = 16, vert_stride: int = 8, block: int = 64) -> Preset:
    """LongGen's sparse layers with strided blocks: the same in every head.

    Args:
        local_blocks: blocks back that a row sees.
        vert_stride: every how many blocks a column is seen by all.
        block: tokens of a block.
    """
    return Preset(
        "longgen",
        StridedBlocks(block=block, local_blocks=local_blocks, vert_stride=vert_stride, head_step=0),
        "Ge et al. 2024, arXiv:2410.01485",
        (
            "A preset is for one layer: the middle third of the layers stays Dense().",
            "The paper's model is trained with the pattern; nothing is trained here.",
            "The sizes are S2-Attention's; the paper leaves them to the length.",
        ),
    )


def lm_infinite(sink: int = 10, window: int = 4096) -> Preset:
    """LM-Infinite's lambda-shaped mask.

    Args:
        sink: first keys that every row sees, in tokens.
        window: keys back that a row sees, itself included, in tokens.
    """
    return Preset(
        "lm_infinite",
        AShape(sink=sink, window=window),
        "Han et al. 2023, arXiv:2308.16137",
        (
            "The mask only: positions of far sinks are not capped at the window. For that, run "
            "sinks and window as two stages with their own queries (sparse_attn.attention_stages).",
        ),
    )


def duo_attention(
    mask: Sequence[bool], *, group: int = 1, sink: int = 64, recent: int = 256
) -> Preset:
    """DuoAttention: retrieval heads see everything, the others sinks and recent keys.

    Args:
        mask: one flag per KV head of the layer, True for a retrieval head.
        group: query heads of a KV head.
        sink: first keys that a streaming head sees, in tokens.
        recent: keys back that it sees, the row's own included, in tokens.

    Raises:
        TypeError: a flag is not a bool, or `group` not an int.
        ValueError: there is no flag, or `group` is below 1.

    Example:
        >>> duo_attention([True, False], group=4).pattern.pattern_of(3)
        Dense()
    """
    check_int("presets.duo_attention", "group", group, 1)
    flags = list(mask)
    if not flags:
        raise ValueError(
            "sparse_attn.presets.duo_attention: mask is empty; pass a flag per KV head."
        )
    for flag in flags:
        if not isinstance(flag, bool):
            raise TypeError(
                f"sparse_attn.presets.duo_attention: mask holds a {type(flag).__name__}, "
                f"{flag!r}; pass bools, True for a retrieval head."
            )
    streaming = AShape(sink=sink, window=recent)
    return Preset(
        "duo_attention",
        PerHead([Dense() if flag else streaming for flag in flags for _ in range(group)]),
        "Xiao et al. 2024, arXiv:2410.10819",
        (
            "A row sees the same keys however the prompt is cut; the original's streaming heads "
            "see the whole chunk that a row is prefilled in, and the first chunk is dense.",
            "Heads stay in their order; the original permutes the weights so that those of a kind "
            "are neighbours.",
        ),
    )


def hip(mask_k: int = 512, window: int = 256) -> Preset:
    """HiP's tree search in the parameters of its second version.

    Args:
        mask_k: keys to keep, in tokens.
        window: keys back that a row sees, itself included, in tokens.
    """
    return Preset(
        "hip",
        HiP(mask_k=mask_k, window=window),
        "Lee et al. 2024, arXiv:2406.09827",
        (
            "Scores are scaled by softmax_scale; the original leaves that to its caller.",
            "Equal scores are broken towards the lower position; the original leaves it to the "
            "device.",
            "Leaves that do not divide evenly are dealt to pieces which differ by one leaf, and "
            "the last leaf may be shorter.",
            "Every query head has its own choice, and no first rows are dense.",
        ),
    )


def infinite_hip(k: int = 2048, window: int = 1024) -> Preset:
    """InfiniteHiP's three stages of pruning: chunks of 256, 32 and 8 keys.

    Args:
        k: keys to keep, in tokens.
        window: keys back that a row sees, itself included, in tokens.
    """
    return Preset(
        "infinite_hip",
        InfiniteHiP(k=k, window=window),
        "Lee et al. 2025, arXiv:2502.08910",
        (
            "Scores are scaled by softmax_scale; the original leaves that to its caller.",
            "Equal scores are broken towards the lower position; the original leaves it to the "
            "device.",
            "The key axis of a tile ends with its own last row instead of with the sequence, so "
            "that a prefill in chunks chooses what one call chooses.",
            "Chunks keep to the grid that begins with the first key after the sinks.",
            "A window of less than the first chunk stays as it is; the original widens it.",
            "No layer, and not the last rows of a prefill, is treated apart.",
            "Keys keep the rotation they came with; positions are not extended.",
        ),
    )


def anchor_attention(theta: float = 12.0, step: int = 16) -> Preset:
    """AnchorAttention: stripes of single keys that come near the scores of an anchor.

    Args:
        theta: how far below the anchor's best logits a key may lie, in logits.
        step: tiles of 128 rows that share their keys.
    """
    return Preset(
        "anchor_attention",
        AnchorAttention(block=128, step=step, theta=theta, sink=128),
        "Zhang et al. 2025, arXiv:2505.23520",
        (
            "The anchor's sinks are one block of 128 keys, as in the paper; the original's code "
            "takes the first 2,048.",
            "Every key between sinks and superblock is a candidate; the original leaves out the "
            "last block before the superblock.",
            "The anchor's best logits are computed for the choice alone; the original keeps the "
            "anchor's attention and resumes it.",
            "Any length, and rows that do not begin at a superblock; the original runs dense "
            "attention on what is left over.",
        ),
    )


def squeezed(
    index: CentroidIndex | None = None,
    percentile: float = 0.7,
    *,
    threshold: float | None = None,
    coarse_percentile: float | None = None,
) -> Preset:
    """Squeezed Attention: keys of a fixed prefix by the score of their cluster.

    Args:
        index: clusters of the prefix, `CentroidIndex.fit(keys, ratio=0.05)`; None to cluster what
            stands in front of a call's rows at every call, which is for trying the method out.
        percentile: share of the prefix's keys to leave out, over all heads of the call.
        threshold: the calibrated threshold instead (`calibrate_threshold`), for all layers.
        coarse_percentile: for the lookup in two levels, the share that the coarse clusters leave
            out; `index` must have two levels.
    """
    lookup = CentroidLookup(
        index=index,
        percentile=None if threshold is not None else percentile,
        threshold=threshold,
        coarse_percentile=coarse_percentile,
    )
    return Preset(
        "squeezed",
        lookup,
        "Hooper et al. 2024, arXiv:2411.09688",
        (
            "Clusters are found by spherical k-means, whose directions are unit vectors; the "
            "original runs ordinary k-means on unit keys.",
            "k-means++ draws its centroids in eight rounds, not one by one, and Lloyd's algorithm "
            "stops after ten iterations.",
            "Keys are clustered per KV head, and a cluster's score is the mean over the query "
            "heads of its group; the original has no grouped heads.",
            "The observation window is always kept; the original drops it from 1 / threshold "
            "queries on.",
            "Without a calibrated threshold the quantile is taken over the scores of the call "
            "itself, not over those of the prefix's last queries.",
            "In two levels the fine clusters under a dropped coarse one are not scored at all, "
            "calibration uses the same denominator as the lookup, and a coarse centroid is the "
            "mean of all its keys; the original scores all, calibrates without the restriction, "
            "and takes the mean of the fine centroids.",
        ),
    )
