# SPDX-License-Identifier: Apache-2.0
"""Sparse attention for long-context language models: every head its own sparsity, one call.

>>> out = sparse_attn.attention(q, k, v, pattern)  # [batch, heads, seqlen, head_dim]
"""

from sparse_attn.attention import (
    attention,
    attention_decode,
    attention_ranges,
    attention_varlen,
    merge_states,
)
from sparse_attn.backends import UnsupportedError
from sparse_attn.calibration import calibrate
from sparse_attn.centroid_attention import centroid_attention
from sparse_attn.explain import Explanation, explain
from sparse_attn.heads import HeadPlan, PlannedHead
from sparse_attn.index import Density, HeadKind, SparseIndex
from sparse_attn.patterns import (
    Adaptive,
    AnchorAttention,
    AShape,
    BlockSparse,
    CentroidIndex,
    CentroidLookup,
    Dense,
    Dilated,
    FlexPrefill,
    GatedBlocks,
    HiP,
    HiPStage,
    HiPState,
    InfiniteHiP,
    Pattern,
    PatternState,
    PerHead,
    Quest,
    QuestState,
    SlidingWindow,
    SpargeAttention,
    StridedBlocks,
    VerticalSlash,
    XAttention,
    block_scores_index,
    calibrate_threshold,
    presets,
)
from sparse_attn.stages import Stage, attention_stages, dual_chunk_attention

__version__ = "0.1.0"

__all__ = [
    "AShape",
    "AnchorAttention",
    "Adaptive",
    "BlockSparse",
    "CentroidIndex",
    "CentroidLookup",
    "Dense",
    "Density",
    "Dilated",
    "Explanation",
    "FlexPrefill",
    "GatedBlocks",
    "HeadKind",
    "HeadPlan",
    "HiP",
    "HiPStage",
    "HiPState",
    "InfiniteHiP",
    "Pattern",
    "PatternState",
    "PerHead",
    "PlannedHead",
    "Quest",
    "QuestState",
    "SlidingWindow",
    "SpargeAttention",
    "SparseIndex",
    "Stage",
    "StridedBlocks",
    "UnsupportedError",
    "VerticalSlash",
    "XAttention",
    "attention",
    "attention_decode",
    "attention_ranges",
    "attention_stages",
    "attention_varlen",
    "block_scores_index",
    "calibrate",
    "calibrate_threshold",
    "centroid_attention",
    "dual_chunk_attention",
    "explain",
    "merge_states",
    "presets",
]
