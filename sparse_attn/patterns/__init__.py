# SPDX-License-Identifier: Apache-2.0
"""Patterns: frozen descriptions of how to choose keys. Each builds a SparseIndex."""

from sparse_attn.patterns import presets
from sparse_attn.patterns.adaptive import Adaptive
from sparse_attn.patterns.anchor import AnchorAttention
from sparse_attn.patterns.base import Pattern, PatternState
from sparse_attn.patterns.block_sparse import BlockSparse
from sparse_attn.patterns.centroid_index import CentroidIndex
from sparse_attn.patterns.centroid_lookup import CentroidLookup, calibrate_threshold
from sparse_attn.patterns.flexprefill import FlexPrefill
from sparse_attn.patterns.gated_blocks import GatedBlocks, block_scores_index
from sparse_attn.patterns.hip import HiP, HiPStage, InfiniteHiP
from sparse_attn.patterns.hip_state import HiPState
from sparse_attn.patterns.names import pattern_names, resolve
from sparse_attn.patterns.per_head import PerHead
from sparse_attn.patterns.quest import Quest, QuestState
from sparse_attn.patterns.sparge import SpargeAttention
from sparse_attn.patterns.static import AShape, Dense, SlidingWindow
from sparse_attn.patterns.strided import Dilated, StridedBlocks
from sparse_attn.patterns.vertical_slash import VerticalSlash, vertical_slash_index
from sparse_attn.patterns.xattention import XAttention

__all__ = [
    "AShape",
    "AnchorAttention",
    "Adaptive",
    "BlockSparse",
    "CentroidIndex",
    "CentroidLookup",
    "Dense",
    "Dilated",
    "FlexPrefill",
    "GatedBlocks",
    "HiP",
    "HiPStage",
    "HiPState",
    "InfiniteHiP",
    "Pattern",
    "PatternState",
    "PerHead",
    "Quest",
    "QuestState",
    "SlidingWindow",
    "SpargeAttention",
    "StridedBlocks",
    "VerticalSlash",
    "XAttention",
    "block_scores_index",
    "calibrate_threshold",
    "pattern_names",
    "presets",
    "resolve",
    "vertical_slash_index",
]
