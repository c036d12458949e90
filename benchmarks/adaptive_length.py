# SPDX-License-Identifier: Apache-2.0
"""What choosing keys costs `Adaptive` as the keys grow, and how large a band's index is.

    python benchmarks/adaptive_length.py

Bands of 1,024 query rows of two heads at the end of 8k to 131k keys, float32, head_dim 64, one
thread; processor time of selection as a share of dense attention of the same rows. The queries of a
head lie around a direction of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import sparse_attn

ROWS, HEADS, HEAD_DIM, ROUNDS = 1024, 2, 64, 3


def seconds(call: Callable[[], Any]) -> float:
    """Processor time of one call."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def main() -> None:
    """The command."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    pattern = sparse_attn.Adaptive()
    generator = torch.Generator().manual_seed(0)
    for seqlen in (8192, 16384, 32768, 65536, 131072):
        k, v = torch.randn(2, 1, 1, seqlen, HEAD_DIM, generator=generator)
        q = torch.randn(1, HEADS, ROWS, HEAD_DIM, generator=generator)
        q += 2 * torch.randn(1, HEADS, 1, HEAD_DIM, generator=generator)
        shares = []
        for _ in range(ROUNDS):
            dense = seconds(lambda q=q, k=k, v=v: sparse_attn.attention(q, k, v))
            shares.append(seconds(lambda q=q, k=k: pattern.build(q, k)) / dense)
        print(f"{seqlen} keys: selection / dense attention {median(shares):.4f}", flush=True)
    q, k = torch.randn(2, 1, 8, 131072, HEAD_DIM, generator=generator)
    rows = pattern.band_rows(q, k)
    index = pattern.build(q[:, :, -rows:], k)
    lists = (index.block_indices, index.column_indices)
    size = sum(x.numel() * x.element_size() for x in lists) / 2**20
    print(f"131072 keys, 8 heads: bands of {rows} rows, whose lists take {size:.1f} MiB here")


if __name__ == "__main__":
    main()
