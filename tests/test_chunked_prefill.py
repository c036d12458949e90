# SPDX-License-Identifier: Apache-2.0
"""What docs/chunked_prefill.md says: which patterns give in chunks what they give in one call."""

from __future__ import annotations

import pytest
import torch

import sparse_attn
from sparse_attn import (
    AnchorAttention,
    AShape,
    BlockSparse,
    Dense,
    Dilated,
    HiP,
    SlidingWindow,
    SpargeAttention,
    StridedBlocks,
    VerticalSlash,
    XAttention,
)

# By name: the pattern, and chunk lengths at which the calls must agree.
EQUAL = {
    "Dense": (Dense(), (64, 100)),
    "AShape": (AShape(sink=5, window=40), (64, 100)),
    "SlidingWindow": (SlidingWindow(33), (64, 100)),
    "Dilated": (Dilated(sink=5, local=9, window=90, stride=3), (64, 100)),
    "StridedBlocks": (StridedBlocks(block=16, local_blocks=2, vert_stride=5), (64, 100)),
    "BlockSparse": (BlockSparse(top_k=3, block_m=32, block_n=16), (32, 96)),
    "XAttention": (XAttention(stride=16, threshold=0.5), (128, 256)),
    "SpargeAttention": (SpargeAttention(top_p=0.5, similarity=0.0), (128, 256)),
    "HiP": (HiP(mask_k=32, window=40, sink=3), (64, 128)),
    "AnchorAttention": (AnchorAttention(block=16, step=4, theta=1.0, sink=8), (64, 128)),
    "VerticalSlash": (VerticalSlash(vertical=9, slash=60, sink=2, local=8, chunk=64), (64, 128)),
}
DIFFERENT = {
    "AShape, tail": AShape(sink=5, window=40, dense_tail=7),
    "VerticalSlash": VerticalSlash(vertical=9, slash=60, sink=2, local=8),
}


def tensors():
    gen = torch.Generator().manual_seed(3)
    q = torch.randn(1, 4, 500, 16, generator=gen)
    k, v = torch.randn(2, 1, 2, 500, 16, generator=gen)
    return q, k, v


def in_chunks(q, k, v, pattern, length):
    parts = []
    for start in range(0, q.shape[2], length):
        end = min(start + length, q.shape[2])
        call = (q[:, :, start:end], k[:, :, :end], v[:, :, :end])
        parts.append(sparse_attn.attention(*call, pattern))
    return torch.cat(parts, 2)


@pytest.mark.parametrize("name", EQUAL)
def test_in_chunks_as_in_one_call(name):
    pattern, lengths = EQUAL[name]
    q, k, v = tensors()
    whole = sparse_attn.attention(q, k, v, pattern)
    for length in lengths:
        torch.testing.assert_close(in_chunks(q, k, v, pattern, length), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DIFFERENT)
def test_where_chunks_differ_by_intent(name):
    q, k, v = tensors()
    whole = sparse_attn.attention(q, k, v, DIFFERENT[name])
    assert not torch.allclose(in_chunks(q, k, v, DIFFERENT[name], 64), whole, atol=1e-3)
