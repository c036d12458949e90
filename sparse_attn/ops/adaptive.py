# SPDX-License-Identifier: Apache-2.0
"""The operator behind `Adaptive`: its handle, and its shapes for tracing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn.ops.library import OPS


def adaptive_lists(
    q: Tensor,
    k: Tensor,
    *,
    mass: float,
    guard: float,
    block_m: int,
    sink: int,
    window: int,
    q_offset: int,
    causal: bool,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`patterns.adaptive.adaptive_lists` on CPU tensors: its four tensors, in their order."""
    block_counts, block_indices, column_counts, column_indices = OPS.adaptive_lists(
        q, k, mass, guard, block_m, sink, window, q_offset, causal, softmax_scale
    )
    return block_counts, block_indices, column_counts, column_indices


@torch.library.register_fake("sparse_attn::adaptive_lists")  # type: ignore[untyped-decorator]
def _adaptive_lists_fake(
    q: Tensor, k: Tensor, mass: float, guard: float, block_m: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts = (q.shape[0], q.shape[1], (q.shape[2] + block_m - 1) // block_m)
    context = torch.library.get_ctx()
    blocks, columns = context.new_dynamic_size(), context.new_dynamic_size()
    return (
        q.new_empty(counts, dtype=torch.int64),
        q.new_empty(blocks, dtype=torch.int32),
        q.new_empty(counts, dtype=torch.int64),
        q.new_empty(columns, dtype=torch.int32),
    )
