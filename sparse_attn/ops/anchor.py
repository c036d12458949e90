# SPDX-License-Identifier: Apache-2.0
"""The operator that finds anchor attention's keys: its handle, and its shapes for tracing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn.ops.library import OPS


def anchor_lists(
    q: Tensor,
    k: Tensor,
    *,
    block: int,
    step: int,
    sink: int,
    theta: float,
    q_offset: int,
    causal: bool,
    softmax_scale: float,
    block_n: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The lists of `patterns.AnchorAttention` on CPU tensors.

    Returns:
        Block counts int64 [batch, num_heads, superblocks], block starts int32, column counts and
        columns likewise, all tiles in order.
    """
    lists: tuple[Tensor, Tensor, Tensor, Tensor] = OPS.anchor_lists(
        q, k, block, step, sink, theta, q_offset, causal, softmax_scale, block_n
    )
    return lists


@torch.library.register_fake("sparse_attn::anchor_lists")  # type: ignore[untyped-decorator]
def _anchor_lists_fake(
    q: Tensor, k: Tensor, block: int, step: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = block * step
    counts = (*q.shape[:2], (q.shape[2] + rows - 1) // rows)
    context = torch.library.get_ctx()
    blocks, columns = context.new_dynamic_size(), context.new_dynamic_size()
    return (
        q.new_empty(counts, dtype=torch.int64),
        q.new_empty(blocks, dtype=torch.int32),
        q.new_empty(counts, dtype=torch.int64),
        q.new_empty(columns, dtype=torch.int32),
    )
