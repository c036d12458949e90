# SPDX-License-Identifier: Apache-2.0
"""Prefill attention against torch SDPA: one process, interleaved, CPU time.

    python benchmarks/prefill_vs_sdpa.py --json benchmarks/results/prefill_vs_sdpa.json

For each dtype it times dense causal attention of this package and of SDPA in turn (A B A B ...),
and this package at the given block densities. Ratios are medians of neighbouring pairs, so a
machine whose speed drifts does not distort them; absolute times of a shared machine mean little.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import sparse_attn
from sparse_attn import ops


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def interleaved(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each call, taken in turn `repeats` times after one warm-up round."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(cpu_seconds(call))
    return seconds


def spread_ms(seconds: list[float]) -> dict[str, float]:
    p20, *_, p80 = quantiles(seconds, n=5) if len(seconds) > 1 else (seconds[0], seconds[0])
    return {"p20": 1e3 * p20, "p50": 1e3 * median(seconds), "p80": 1e3 * p80}


def random_blocks(seqlen: int, density: float, generator: torch.Generator) -> torch.Tensor:
    """bool [1, 1, tiles, blocks]: the diagonal and random earlier 64 x 64 blocks."""
    tiles = -(-seqlen // 64)
    earlier = torch.rand(tiles, tiles, generator=generator) < density
    return (earlier.tril(-1) | torch.eye(tiles, dtype=torch.bool))[None, None]


def run(args: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, args.heads, args.seqlen, args.head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    calls: dict[str, Callable[[], object]] = {
        "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
        "dense": lambda: sparse_attn.attention(q, k, v, "dense"),
    }
    densities = {"dense": (1.0, 1.0)}
    for density in args.density:
        blocks = random_blocks(args.seqlen, density, generator)
        index = sparse_attn.SparseIndex.from_blocks(
            blocks, block_m=64, block_n=64, seqlen_q=args.seqlen, seqlen_k=args.seqlen
        )
        name = f"blocks {density:g}"
        measured = index.density()
        densities[name] = (measured.element, measured.tile)
        calls[name] = lambda index=index: sparse_attn.attention(q, k, v, index)  # type: ignore[misc]
    seconds = interleaved(calls, args.repeats)
    flops = 2 * args.seqlen * (args.seqlen + 1) * args.head_dim * args.heads
    records = []
    for name, (element, tile) in densities.items():
        ratios = [b / a for a, b in zip(seconds[name], seconds["sdpa"], strict=True)]
        to_dense = [a / b for a, b in zip(seconds[name], seconds["dense"], strict=True)]
        records.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "pattern": name,
                "element_density": element,
                "tile_density": tile,
                "cpu_ms": spread_ms(seconds[name]),
                "sdpa_cpu_ms": spread_ms(seconds["sdpa"]),
                "gflops_of_work_done": flops * element / median(seconds[name]) / 1e9,
                "speedup_over_sdpa": median(ratios),
                "time_over_density_times_dense": median(to_dense) / tile,
            }
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seqlen", type=int, default=8192, help="tokens")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--density", type=float, nargs="*", default=[0.5, 0.25, 0.1, 0.05])
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16", "float16"], help="torch dtypes"
    )
    parser.add_argument("--json", help="file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    records = [r for name in args.dtype for r in run(args, getattr(torch, name))]
    print(f"{'dtype':9} {'pattern':12} {'tile':>6} {'ms':>9} {'GF/s':>7} {'x SDPA':>7} {'eff':>6}")
    for r in records:
        print(
            f"{r['dtype']:9} {r['pattern']:12} {r['tile_density']:6.3f} {r['cpu_ms']['p50']:9.2f} "
            f"{r['gflops_of_work_done']:7.1f} {r['speedup_over_sdpa']:7.2f} "
            f"{r['time_over_density_times_dense']:6.2f}"
        )
    if args.json:
        document = {
            "command": f"python {shlex.join(sys.argv)}",
            "env": {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "cpu_capability": ops.cpu_capability(),
                "threads": args.threads,
            },
            "problem": {
                "seqlen": args.seqlen,
                "head_dim": args.head_dim,
                "heads": args.heads,
                "causal": True,
            },
            "records": records,
        }
        with open(args.json, "w") as file:
            json.dump(document, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
