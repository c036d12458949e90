# SPDX-License-Identifier: Apache-2.0
"""``python -m sparse_attn tune``: measures on this machine where a pattern pays.

Times dense attention, attention over gathered keys at several densities, and the choice of keys of
every pattern that approximates dense attention, at some lengths and in every dtype: processor time
of one thread, the least of some runs. The table goes into the cache folder (SPARSE_ATTN_CACHE, or
~/.cache/sparse_attn) and decides from then on which calls run densely (`sparse_attn.dispatch`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_attn import dispatch
from sparse_attn.attention import attention
from sparse_attn.dispatch import DENSITIES, Costs
from sparse_attn.index import SparseIndex
from sparse_attn.lists import indptr_from_counts
from sparse_attn.patterns import Dense, Pattern, resolve
from sparse_attn.patterns.names import pattern_names

LENGTHS = (64, 128, 256, 512, 1024, 2048)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HEADS, _HEAD_DIM, _TILE = 2, 64, 128
_MIN_RUNS, _MAX_RUNS, _SECONDS = 3, 15, 0.02


def seconds(function: Callable[..., object], *arguments: Any) -> float:
    """Least processor time of a few runs, after one that does not count: others' work only adds."""
    function(*arguments)
    times: list[float] = []
    while len(times) < _MIN_RUNS or (len(times) < _MAX_RUNS and sum(times) < _SECONDS):
        start = time.thread_time()
        function(*arguments)
        times.append(time.thread_time() - start)
    return min(times)


def approximating() -> list[Pattern]:
    """The named patterns whose choice of keys has a cost to weigh, at their defaults."""
    named = [resolve(name, _HEADS) for name in pattern_names()]
    return [pattern for pattern in named if pattern.approximates]


def columns_index(seqlen: int, density: float, generator: torch.Generator) -> SparseIndex:
    """An index of single keys, drawn at random: what costs a kernel most at this density."""
    tiles = -(-seqlen // _TILE)
    limit = (torch.arange(1, tiles + 1) * _TILE).clamp(max=seqlen)
    keep = torch.rand(1, _HEADS, tiles, seqlen, generator=generator) < density
    keep &= torch.arange(seqlen) < limit[:, None]
    return SparseIndex.from_lists(
        seqlen_q=seqlen,
        seqlen_k=seqlen,
        block_m=_TILE,
        block_n=16,
        block_indptr=torch.zeros(1, _HEADS, tiles + 1, dtype=torch.int64),
        block_indices=torch.zeros(0, dtype=torch.int32),
        column_indptr=indptr_from_counts(keep.sum(-1)),
        column_indices=torch.arange(seqlen, dtype=torch.int32).expand(keep.shape)[keep],
    )


def measure(dtype: torch.dtype, lengths: tuple[int, ...] = LENGTHS) -> Costs:
    """The costs of one dtype on this machine, one thread."""
    generator = torch.Generator().manual_seed(0)
    patterns = approximating()

    def inputs(seqlen: int) -> list[Tensor]:
        return [
            torch.randn(1, _HEADS, seqlen, _HEAD_DIM, generator=generator).to(dtype)
            for _ in range(3)
        ]

    q, k, _ = inputs(16)
    selection = {type(p).__name__: [seconds(p.build, q, k)] for p in patterns}
    dense, sparse = [], []
    for seqlen in lengths:
        q, k, v = inputs(seqlen)
        exact = seconds(attention, q, k, v, Dense())
        pairs = seqlen * (seqlen + 1) // 2
        dense.append(exact / (_HEADS * pairs))
        sparse.append(
            tuple(
                seconds(attention, q, k, v, index) / exact
                for index in (columns_index(seqlen, d, generator) for d in DENSITIES)
            )
        )
        for pattern in patterns:
            costs = selection[type(pattern).__name__]
            beyond = seconds(pattern.build, q, k) - costs[0]
            costs.append(max(0.0, beyond) / (_HEADS * seqlen * seqlen))
    chosen = {name: tuple(costs) for name, costs in selection.items()}
    return Costs(tuple(lengths), tuple(dense), tuple(sparse), chosen)


def add_command(commands: Any) -> None:
    """Add ``tune`` to the subcommands of ``python -m sparse_attn``."""
    parser = commands.add_parser(
        "tune",
        help="measure on this machine where a pattern pays (seconds)",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", metavar="FILE", help="write there, not into the cache folder")
    parser.set_defaults(run=run)


@torch.no_grad()
def run(arguments: argparse.Namespace) -> int:
    """The subcommand; returns the exit status."""
    threads = torch.get_num_threads()
    start = time.perf_counter()
    torch.set_num_threads(1)
    try:
        costs = {str(dtype).removeprefix("torch."): measure(dtype) for dtype in DTYPES}
    finally:
        torch.set_num_threads(threads)
    file = Path(arguments.json) if arguments.json else dispatch.cache_file()
    dispatch.save(costs, file)
    print(f"measured in {time.perf_counter() - start:.1f} s, kept in {file}")
    return 0
