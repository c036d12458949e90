# SPDX-License-Identifier: Apache-2.0
"""Captures attention in a CUDA graph and replays it with other tensors and other lists.

    python tools/gpu/graph_replay.py --json FILE

A capture fails by itself if a call waits for the device. The replay must give the bits of an
ordinary call on the same inputs, also after the index's buffers were overwritten: counts are read
on the device. With --device cpu the calls are made without a graph, which tests this program and
nothing else.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import sparse_attn
from sparse_attn import SparseIndex
from sparse_attn.bench.cases import Choice, Keys, Problem

LISTS = ("block_indptr", "block_indices", "column_indptr", "column_indices")


def captured(call: Callable[[], Tensor], device: str) -> tuple[Callable[[], None], Tensor]:
    """What replays `call`, and the tensor that its result appears in."""
    if device == "cpu":
        result = call()

        def again() -> None:
            result.copy_(call())

        return again, result
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


def overwrite(index: SparseIndex, other: SparseIndex) -> None:
    """Puts other lists into the buffers of an index, up to their capacity."""
    for name in LISTS:
        to, source = getattr(index, name).view(-1), getattr(other, name).view(-1)
        if source.numel() > to.numel():
            raise ValueError(f"{name}: {source.numel()} entries do not fit into {to.numel()}")
        to[: source.numel()].copy_(source)


def check(name: str, problem: Problem, choice: Choice, device: str) -> dict[str, object]:
    """One case: capture, replay, replay over other tensors, replay over other lists."""
    q, k, v = (x.to(device) for x in problem.inputs())
    index = Keys(problem, choice).index.to(device)

    def call() -> Tensor:
        return sparse_attn.attention(q, k, v, index)

    replay, result = captured(call, device)
    equal, seen = {}, []
    for step in ("same", "other tensors", "other lists"):
        if step == "other tensors":
            for x in (q, k, v):
                x.copy_(x.flip(2) * 0.5)
        elif step == "other lists":
            if choice.kind == "dense":
                continue
            thinner = Choice(choice.kind, choice.density / 2, choice.block_m, choice.block_n)
            overwrite(index, Keys(problem, thinner).index)
        replay()
        equal[step] = torch.equal(result, call()) and not any(torch.equal(result, x) for x in seen)
        seen.append(result.clone())
    return {"case": name, "equal": equal, "passed": all(equal.values())}


def cases(short: bool) -> list[tuple[str, Problem, Choice]]:
    """Prefill and decode, of every kind of list."""
    rows, keys = (64, 300) if short else (1000, 3000)
    found = []
    for seqlen_q in (rows, 1):
        problem = Problem("bfloat16", seqlen_q, keys, 64 if short else 128, heads=4, heads_kv=2)
        for kind in ("dense", "blocks", "columns"):
            block_m = 1 if seqlen_q == 1 else 64
            choice = Choice(kind, 1.0 if kind == "dense" else 0.8, block_m, 16)
            found.append((f"{kind}, {seqlen_q} rows", problem, choice))
    return found


def main() -> int:
    """The command; 1 if a replay differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    with torch.no_grad():
        records = [check(*case, arguments.device) for case in cases(arguments.device == "cpu")]
    document = {"device": arguments.device, "records": records}
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    for record in records:
        print("passed" if record["passed"] else "FAILED", record["case"], record["equal"])
    return 0 if all(record["passed"] for record in records) else 1


if __name__ == "__main__":
    raise SystemExit(main())
