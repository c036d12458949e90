# SPDX-License-Identifier: Apache-2.0
"""What choosing keys costs, as a share of the attention that it saves.

    python benchmarks/selection_cost.py                        # every case, 8k, 32k and 131k keys
    python benchmarks/selection_cost.py --cases xattention --lengths 32768 --dtype bfloat16

share = time of pattern.build(q, k) / time of sparse_attn.attention over a random block index of 5 %
causal tile density; one head, head_dim 128, one thread, processor time, both in turn in one
process, medians of the ratios of the rounds. The attention is the same for every case, so shares
compare. A pattern of your own: add a function to this file under @case.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import sparse_attn
from sparse_attn.bench.runner import environment
from sparse_attn.bench.timing import interleaved, paired_ratio, spread
from sparse_attn.env import command_line
from sparse_attn.patterns import Pattern

DENSITY = 0.05
HEAD_DIM = 128
BLOCK = 64
RESULTS = Path(__file__).parent / "results" / "selection_cost.json"

# By name: what makes the pattern. Its work on q and k outside of `build` (a fit of a fixed prefix)
# is not timed.
CASES: dict[str, Callable[[Tensor, Tensor], Pattern]] = {}


def case(make: Callable[[Tensor, Tensor], Pattern]) -> Callable[[Tensor, Tensor], Pattern]:
    """Registers a function (q, k) -> Pattern under its name."""
    CASES[make.__name__] = make
    return make


@case
def block_sparse(q: Tensor, k: Tensor) -> Pattern:
    return sparse_attn.BlockSparse(density=DENSITY)


@case
def vertical_slash(q: Tensor, k: Tensor) -> Pattern:
    return sparse_attn.VerticalSlash(vertical=k.shape[2] // 64, slash=k.shape[2] // 32)


@case
def block_sparse_top_p(q: Tensor, k: Tensor) -> Pattern:
    return sparse_attn.BlockSparse(top_p=0.5)


@case
def xattention(q: Tensor, k: Tensor) -> Pattern:
    return sparse_attn.XAttention(stride=16, threshold=0.5)


@case
def xattention_stride_64(q: Tensor, k: Tensor) -> Pattern:
    return sparse_attn.XAttention(stride=64, threshold=0.5)


@case
def flexprefill(q: Tensor, k: Tensor) -> Pattern:
    return sparse_attn.FlexPrefill(gamma=0.5)


@case
def flexprefill_query_aware(q: Tensor, k: Tensor) -> Pattern:
    return sparse_attn.FlexPrefill(gamma=0.5, tau=1.0)


@case
def sparge(q: Tensor, k: Tensor) -> Pattern:
    return sparse_attn.SpargeAttention(top_p=0.5, similarity=0.0)


@case
def vertical_slash_exact(q: Tensor, k: Tensor) -> Pattern:
    return sparse_attn.VerticalSlash(vertical=k.shape[2] // 64, slash=k.shape[2] // 32, exact=True)


@case
def vertical_slash_chunks(q: Tensor, k: Tensor) -> Pattern:
    return sparse_attn.VerticalSlash(vertical=k.shape[2] // 64, slash=k.shape[2] // 32, chunk=8192)


@case
def adaptive(q: Tensor, k: Tensor) -> Pattern:
    return sparse_attn.Adaptive()


@case
def anchor_attention(q: Tensor, k: Tensor) -> Pattern:
    return sparse_attn.AnchorAttention()


@case
def strided_blocks(q: Tensor, k: Tensor) -> Pattern:
    return sparse_attn.StridedBlocks(local_blocks=8, vert_stride=32)


@case
def dilated(q: Tensor, k: Tensor) -> Pattern:
    return sparse_attn.Dilated(window=1024, sink=64)


@case
def hip_leaves_of_64(q: Tensor, k: Tensor) -> Pattern:
    return sparse_attn.HiP(
        mask_k=max(1, k.shape[2] // 4096) * 64, block_k=64, stride_k=16, stride_q=4
    )


@case
def hip(q: Tensor, k: Tensor) -> Pattern:
    return sparse_attn.HiP()


@case
def infinite_hip(q: Tensor, k: Tensor) -> Pattern:
    return sparse_attn.InfiniteHiP()


def inputs(seqlen: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [1, 1, seqlen, HEAD_DIM]: noise about a drifting topic, as neighbours are alike.

    The first key is one that every row looks at.
    """
    generator = torch.Generator().manual_seed(0)
    topics = torch.randn(seqlen // 256 + 1, HEAD_DIM, generator=generator)
    drift = topics.repeat_interleave(256, 0)[:seqlen]
    sink = topics.mean(0) + torch.randn(HEAD_DIM, generator=generator)
    q, k, v = torch.randn(3, seqlen, HEAD_DIM, generator=generator)
    q = q + drift + sink
    k = k + drift
    k[0] = sink * 2
    return tuple(x.to(dtype).view(1, 1, seqlen, HEAD_DIM) for x in (q, k, v))


def random_blocks(seqlen: int, density: float) -> sparse_attn.SparseIndex:
    """A causal index of square blocks: a tile's own block, and others at random up to `density`."""
    generator = torch.Generator().manual_seed(1)
    tiles = -(-seqlen // BLOCK)
    mask = torch.zeros(1, 1, tiles, tiles, dtype=torch.bool)
    for tile in range(tiles):
        wanted = max(1, round(density * (tile + 1)))
        mask[0, 0, tile, torch.randperm(tile, generator=generator)[: wanted - 1]] = True
        mask[0, 0, tile, tile] = True
    return sparse_attn.SparseIndex.from_blocks(
        mask, block_m=BLOCK, block_n=BLOCK, seqlen_q=seqlen, seqlen_k=seqlen
    )


def measure(seqlen: int, names: list[str], dtype: torch.dtype, rounds: int) -> list[dict]:
    """One record per case."""
    q, k, v = inputs(seqlen, dtype)
    index = random_blocks(seqlen, DENSITY)
    patterns = {name: CASES[name](q, k) for name in names}
    calls: dict[str, Callable[[], object]] = {
        name: (lambda pattern=pattern: pattern.build(q, k)) for name, pattern in patterns.items()
    }
    calls["attention"] = lambda: sparse_attn.attention(q, k, v, index)
    chosen = {name: call() for name, call in calls.items()}  # and warm
    times = interleaved(calls, rounds=rounds)
    attention = times["attention"].cpu
    records = []
    for name in names:
        found = times[name].cpu
        records.append(
            {
                "case": name,
                "pattern": repr(patterns[name]),
                "seqlen": seqlen,
                "dtype": str(dtype).removeprefix("torch."),
                "share": paired_ratio(found, attention),
                "select_ms": spread(found, 1e3),
                "attention_ms": spread(attention, 1e3),
                "attention_tile_density": index.density().tile,
                "chosen_tile_density": chosen[name].density().tile,
            }
        )
    return records


def table(records: list[dict]) -> str:
    """Shares in percent, a row per case and a column per length."""
    lengths = sorted({r["seqlen"] for r in records})
    rows = {(r["case"], r["dtype"], r["seqlen"]): r["share"] for r in records}
    lines = [f"{'share of attention at 5 %':34}" + "".join(f"{n:>10}" for n in lengths)]
    for name, dtype in sorted({(r["case"], r["dtype"]) for r in records}):
        shares = (rows.get((name, dtype, n)) for n in lengths)
        cells = ("-" if s is None else f"{100 * s:.1f} %" for s in shares)
        lines.append(f"{name + ', ' + dtype:34}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32768, 131072])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS, help="records are merged into it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for seqlen in arguments.lengths:
        dtype = getattr(torch, arguments.dtype)
        found += measure(seqlen, arguments.cases, dtype, arguments.rounds)
    command = command_line(["python", "benchmarks/selection_cost.py", *sys.argv[1:]])
    for record in found:
        record |= {"command": command, "env": environment()}
    old = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
    merged = {(r["case"], r["dtype"], r["seqlen"]): r for r in old + found}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(list(merged.values()), indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
