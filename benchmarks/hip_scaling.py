# SPDX-License-Identifier: Apache-2.0
"""How hierarchical search and attention over what it chose grow with the length, beside dense.

    python benchmarks/hip_scaling.py                        # every case, 8k to 131k tokens
    python benchmarks/hip_scaling.py --cases infinite_hip --lengths 8192 16384 32768

One head, head_dim 128, float32, one thread, processor time; choosing, attention over the choice
and dense attention (where it takes seconds, not minutes) in turn in one process, medians. The
exponent is the slope of log(choosing + attention) against log(tokens), least squares; that of
T log T is the same fit of the function itself at the same lengths.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from selection_cost import HEAD_DIM, inputs

import sparse_attn
from sparse_attn.bench.runner import environment
from sparse_attn.bench.timing import interleaved, paired_ratio, spread
from sparse_attn.env import command_line

PATTERNS = {
    "hip_leaves_of_64": sparse_attn.HiP(block_k=64, stride_k=16, stride_q=4),
    "hip": sparse_attn.HiP(),
    "infinite_hip": sparse_attn.InfiniteHiP(),
}
LONGEST_DENSE = 32768
RESULTS = Path(__file__).parent / "results" / "hip_scaling.json"


def measure(name: str, seqlen: int, rounds: int) -> dict:
    """One record."""
    q, k, v = inputs(seqlen, torch.float32)
    pattern = PATTERNS[name]
    index = pattern.build(q, k)
    calls: dict[str, Callable[[], object]] = {
        "select": lambda: pattern.build(q, k),
        "attend": lambda: sparse_attn.attention(q, k, v, index),
    }
    if seqlen <= LONGEST_DENSE:
        calls["dense"] = lambda: sparse_attn.attention(q, k, v)
    times = interleaved(calls, rounds=rounds)
    both = [a + b for a, b in zip(times["select"].cpu, times["attend"].cpu, strict=True)]
    record = {
        "case": name,
        "pattern": repr(pattern),
        "seqlen": seqlen,
        "head_dim": HEAD_DIM,
        "tile_density": index.density().tile,
        "select_ms": spread(times["select"].cpu, 1e3),
        "attend_ms": spread(times["attend"].cpu, 1e3),
        "both_ms": spread(both, 1e3),
    }
    if "dense" in times:
        record["dense_over_both"] = paired_ratio(times["dense"].cpu, both)
    return record


def slope(lengths: list[int], values: list[float]) -> float:
    """Least-squares slope of log(values) against log(lengths)."""
    x = [math.log(n) for n in lengths]
    y = [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def table(records: list[dict]) -> str:
    """A row per case and length, and the exponents below."""
    lines = [f"{'case':18}{'tokens':>8}{'select ms':>11}{'attend ms':>11}{'dense over both':>17}"]
    for r in records:
        select, attend = r["select_ms"]["p50"], r["attend_ms"]["p50"]
        dense = f"{r['dense_over_both']:.2f}" if "dense_over_both" in r else "-"
        lines.append(f"{r['case']:18}{r['seqlen']:8}{select:11.1f}{attend:11.1f}{dense:>17}")
    for name in dict.fromkeys(r["case"] for r in records):
        own = [r for r in records if r["case"] == name]
        lengths = [r["seqlen"] for r in own]
        if len(lengths) > 1:
            found = slope(lengths, [r["both_ms"]["p50"] for r in own])
            bound = slope(lengths, [n * math.log(n) for n in lengths])
            lines.append(f"{name}: exponent {found:.3f} (T log T: {bound:.3f})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", nargs="+", default=list(PATTERNS), choices=list(PATTERNS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 16384, 32768, 131072])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS, help="records are merged into it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = [measure(c, n, arguments.rounds) for c in arguments.cases for n in arguments.lengths]
    command = command_line(["python", "benchmarks/hip_scaling.py", *sys.argv[1:]])
    for record in found:
        record |= {"command": command, "env": environment()}
    old = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
    merged = {(r["case"], r["seqlen"]): r for r in old + found}
    arguments.json.write_text(json.dumps(list(merged.values()), indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
