# SPDX-License-Identifier: Apache-2.0
"""What patterns are composed of: estimators give scores, selectors turn scores into choices.

Every function is plain torch, batched over its leading dimensions, deterministic, and runs where
its inputs are. Scores are float32; ties are broken by score descending, then index ascending.
"""

from sparse_attn.selection.estimators import (
    bands,
    column_sums,
    diagonal_maxima,
    diagonal_sums,
    mean_pool,
    pooled_scores,
    window_probs,
    window_scores,
)
from sparse_attn.selection.selectors import threshold_mask, top_k_indices, top_k_mask

__all__ = [
    "bands",
    "column_sums",
    "diagonal_maxima",
    "diagonal_sums",
    "mean_pool",
    "pooled_scores",
    "threshold_mask",
    "top_k_indices",
    "top_k_mask",
    "window_probs",
    "window_scores",
]
