# SPDX-License-Identifier: Apache-2.0
"""Times attention on a GPU beside torch SDPA, FlexAttention and flash-attn, if installed.

    python tools/gpu/benchmark.py --json FILE

Prefill by head_dim, length and density of random block lists, decode by batch and KV heads. The
contestants of a case run in turn; times are medians over rounds, of CUDA events. With --device cpu
and small sizes it is a test of this program.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import sparse_attn
from sparse_attn.bench.cases import Choice, Keys, Problem

ROUNDS, WARM_UP = 11, 3
DENSITIES = (0.5, 0.25, 0.1, 0.05, 0.02)


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """Time of one call."""
    if device == "cpu":
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def contestants(
    problem: Problem, choice: Choice, tensors: tuple[Tensor, Tensor, Tensor], device: str
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Who can compute a case, by name; peers that are not installed are left out."""
    q, k, v = tensors
    keys = Keys(problem, choice)
    pattern = "dense" if choice.kind == "dense" else keys.index.to(device)
    yield "sparse_attn", lambda: sparse_attn.attention(q, k, v, pattern)
    prefill = problem.seqlen_q == problem.seqlen_k
    gqa = problem.heads != problem.heads_kv
    if choice.kind == "dense":
        yield (
            "torch SDPA",
            lambda: scaled_dot_product_attention(q, k, v, is_causal=prefill, enable_gqa=gqa),
        )
        try:
            theirs = importlib.import_module("flash_attn").flash_attn_func
        except ImportError:
            return
        rows = tuple(x.transpose(1, 2) for x in tensors)
        yield "flash-attn", lambda: theirs(*rows, causal=True)
    elif prefill and device == "cuda":
        flex = importlib.import_module("torch.nn.attention.flex_attention").flex_attention
        mask = keys.index.to(device).to_block_mask(causal=True)
        compiled = torch.compile(flex, dynamic=False)
        yield "FlexAttention", lambda: compiled(q, k, v, block_mask=mask, enable_gqa=gqa)


def measure(problem: Problem, choice: Choice, device: str, rounds: int) -> dict[str, Any]:
    """One case: every contestant's median, and what it says of ours."""
    q, k, v = (x.to(device) for x in problem.inputs())
    calls = dict(contestants(problem, choice, (q, k, v), device))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-WARM_UP, rounds):
        for name, call in calls.items():
            taken = milliseconds(call, device)
            if number >= 0:
                times[name].append(taken)
    medians = {name: median(values) for name, values in times.items()}
    flops = problem.dense_flops * choice.density
    return {
        "case": f"{problem.phase} {problem.dtype}, {problem.heads}/{problem.heads_kv} heads x "
        f"{problem.batch}, {problem.seqlen_k} keys, head_dim {problem.head_dim}, {choice}",
        "density": choice.density,
        "milliseconds": medians,
        "tflops": flops / medians["sparse_attn"] / 1e9,
        "speed_up": {name: t / medians["sparse_attn"] for name, t in medians.items()},
    }


def cases(short: bool) -> Iterator[tuple[Problem, Choice]]:
    """The matrix."""
    lengths, dims = ((256,), (64,)) if short else ((4096, 16384, 65536), (64, 128))
    for head_dim in dims:
        for length in lengths:
            heads = 2 if short else 16
            problem = Problem("bfloat16", length, length, head_dim, heads, heads // 2)
            yield problem, Choice("dense", 1.0)
            for density in DENSITIES[:1] if short else DENSITIES:
                yield problem, Choice("blocks", density, block_n=64)
    for batch in (1,) if short else (1, 16):
        keys, head_dim = (512, 64) if short else (32768, 128)
        problem = Problem("bfloat16", 1, keys, head_dim, 32, 8, batch)
        yield problem, Choice("dense", 1.0)
        yield problem, Choice("blocks", 0.1, 1)
        yield problem, Choice("columns", 0.1, 1)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    device, short = arguments.device, arguments.device == "cpu"
    document: dict[str, Any] = {"torch": torch.__version__, "device": device, "records": []}
    if device == "cuda":
        document |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    for problem, choice in cases(short):
        with torch.no_grad():
            try:
                record = measure(problem, choice, device, arguments.rounds)
            except RuntimeError as error:  # out of memory, or a peer that refuses
                record = {"case": f"{problem} {choice}", "error": str(error).splitlines()[0]}
        document["records"].append(record)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")  # what there is so far
        print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
