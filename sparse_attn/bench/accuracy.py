# SPDX-License-Identifier: Apache-2.0
"""Two figures that are no times: the error against float64, and the memory that a call takes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

import sparse_attn

from .cases import Choice, Keys, Problem
from .runner import Record, goal_record
from .suites import Options

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def errors(options: Options) -> list[Record]:
    """Largest error against float64 over torch SDPA's, dense and causal, float32 inputs."""
    records = []
    for dim in options.head_dim or (64, 128):
        seqlen = min(2048, *(options.seqlen or (2048,)))
        q, k, v = Problem("float32", seqlen, seqlen, dim, heads=2, heads_kv=2).inputs()
        exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
        out = sparse_attn.attention(q, k, v)
        assert isinstance(out, torch.Tensor)  # no lse was asked for
        ours = (out - exact).abs().max()
        theirs = (scaled_dot_product_attention(q, k, v, is_causal=True) - exact).abs().max()
        text = f"largest error over torch SDPA's, float32, {seqlen} tokens, head_dim {dim}"
        records.append(goal_record(text, float(ours / theirs), 1.5, at_least=False))
    return records


def memory(options: Options) -> list[Record]:
    """Peak resident memory over the inputs, in MB: 131,072 tokens, 2 % of the blocks."""
    seqlen = max(options.seqlen or (131072,))
    problem = Problem("float32", seqlen, seqlen, (options.head_dim or (128,))[0])
    q, k, v = problem.inputs()
    index = Keys(problem, Choice("blocks", 0.02)).index
    peak = peak_growth(lambda: sparse_attn.attention(q, k, v, index))
    if peak is None:
        return []
    text = f"memory over the inputs in MB, {seqlen} tokens, 1 head, blocks 2%"
    return [goal_record(text, peak / 1e6, 200.0, at_least=False)]


def peak_growth(call: Callable[[], object]) -> int | None:
    """Bytes by which resident memory peaks during a call; None where Linux is not there to ask."""
    try:
        before = _resident("VmRSS")
        _CLEAR.write_text("5")  # the peak starts anew from what is resident now
    except (OSError, ValueError):
        return None
    call()
    return max(0, _resident("VmHWM") - before)


def _resident(what: str) -> int:
    found = re.search(rf"^{what}:\s+(\d+) kB", _STATUS.read_text(), flags=re.M)
    if found is None:
        raise ValueError(f"{_STATUS} has no {what}")
    return 1024 * int(found.group(1))


def run(options: Options, say: Callable[[str], object]) -> list[Record]:
    """All of the above."""
    begin = time.perf_counter()
    torch.set_num_threads(options.threads)
    figures = errors(options) + memory(options)
    say(f"accuracy and memory: {time.perf_counter() - begin:.0f} s")
    return [{**figure, "suite": "accuracy", "group": "accuracy and memory"} for figure in figures]
