# SPDX-License-Identifier: Apache-2.0
"""Whether a pattern pays: the costs of this machine, and the calls that dense attention wins.

A pattern that approximates dense attention is asked for to save time. Where it would lose time,
dense attention runs in its place, which also keeps more. Two questions decide, both answered from
a table of costs and never by a measurement during a call:

* before the index is built: does dense attention take less than choosing keys and reading the
  fewest that a pattern would, a tenth of them or those near every row?
* after: does the kernel take longer over this many keys, gathered, than over all?

The table ships with the package; `python -m sparse_attn tune` measures one for this machine and
keeps it in the cache folder, where it is read once a process. One of another version, processor or
instruction set is ignored. `SPARSE_ATTN_FALLBACK=0`, or `attention(..., fallback=False)`, runs
exactly what was asked for. Masks that are a model's own (static patterns, gates, indexes) and
patterns with a memory always do.
"""

from __future__ import annotations

import json
import math
import os
import platform
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_attn.env import cache_folder, cpu_model
from sparse_attn.index import SparseIndex
from sparse_attn.patterns import Pattern
from sparse_attn.patterns.preset import Preset

FORMAT = 1
DECODE_MAX_ROWS = 16
"""Calls of at most this many query rows decode: one token, or a few speculated ones."""
DENSITIES = (0.1, 0.25, 0.5, 0.75, 1.0)
_SHIPPED = Path(__file__).parent / "costs.json"
_MEASURED_DIM = 64
_NEAR = 128  # keys at and before a row that every pattern keeps, about


class Verdict(NamedTuple):
    """What runs in a pattern's place, or not.

    Attributes:
        dense: whether dense attention runs in place of the pattern.
        why: a sentence for people.
    """

    dense: bool
    why: str


@dataclass(frozen=True)
class Costs:
    """Costs of one dtype, one thread, head_dim 64, causal.

    Attributes:
        lengths: at which the others were measured, ascending (tokens).
        dense: seconds a head and allowed pair, per length.
        sparse: per length, time over dense attention's at each of DENSITIES.
        selection: of a pattern's class name: seconds of the smallest call, then seconds a head
            and row x key beyond that, per length.
    """

    lengths: tuple[int, ...]
    dense: tuple[float, ...]
    sparse: tuple[tuple[float, ...], ...]
    selection: dict[str, tuple[float, ...]]

    def before(self, name: str, call: Call) -> Verdict:
        """The first question."""
        fixed, *slopes = self.selection.get(name) or self.selection["Adaptive"]
        work = call.heads * call.head_dim / _MEASURED_DIM / call.threads
        dense = self._at(self.dense, call.seqlen_k) * call.pairs * work
        choose = fixed + self._at(slopes, call.seqlen_k) * call.rows * call.seqlen_k * work
        fewest = min(1.0, _NEAR * call.rows / max(1, call.pairs))
        least = self._read(fewest, call.seqlen_k) * dense
        told = f"choosing {choose * 1e3:.2f} ms, dense attention {dense * 1e3:.2f} ms (estimates)"
        return Verdict(dense <= choose + least, told)

    def after(self, density: float, call: Call) -> Verdict:
        """The second question; `density` is the tile density of the index."""
        ratio = self._read(density, call.seqlen_k)
        return Verdict(
            ratio >= 1.0,
            f"{density:.0%} of the keys take {ratio:.2f} of dense attention (estimate)",
        )

    def _read(self, density: float, length: int) -> float:
        """Time of gathered keys over dense attention's."""
        return self._at([_line(DENSITIES, row, density) for row in self.sparse], length)

    def _at(self, values: Sequence[float], length: int) -> float:
        return _line([math.log2(x) for x in self.lengths], values, math.log2(max(1, length)))


def _line(places: Sequence[float], values: Sequence[float], at: float) -> float:
    """Linear between the places, level beyond them."""
    right = bisect_right(places, at)
    if right == 0 or right == len(places):
        return values[0 if right == 0 else -1]
    low, high = places[right - 1], places[right]
    return values[right - 1] + (values[right] - values[right - 1]) * (at - low) / (high - low)


class Call(NamedTuple):
    """The shape of a call; heads counts those of all batch entries."""

    heads: int
    rows: int
    seqlen_k: int
    pairs: int
    head_dim: int
    threads: int


def shape_of(q: Tensor, k: Tensor, causal: bool, q_offset: int) -> Call:
    """What the table is asked about."""
    batch, heads, rows, head_dim = q.shape
    seqlen_k = k.shape[2]
    pairs = rows * seqlen_k
    if causal:  # rows see first, first + 1, ... keys, clamped to [0, seqlen_k]
        first, last = q_offset + 1, q_offset + rows
        low, high = max(first, 0), min(last, seqlen_k)
        rising = max(0, high - low + 1)
        pairs = rising * (low + high) // 2 if rising else 0
        pairs += seqlen_k * max(0, last - max(first - 1, seqlen_k))
    return Call(batch * heads, rows, seqlen_k, pairs, head_dim, torch.get_num_threads())


# ------------------------------------------------------------------------------ the questions


def is_on(fallback: bool | None) -> bool:
    """Whether dense attention may run in a pattern's place; None asks the environment."""
    return os.environ.get("SPARSE_ATTN_FALLBACK", "1") != "0" if fallback is None else fallback


def applies(pattern: Pattern, q: Tensor, fallback: bool | None) -> bool:
    """Whether the questions below are to be asked; q is [batch, num_heads, seqlen_q, head_dim]."""
    return pattern.approximates and q.is_cpu and q.shape[2] > DECODE_MAX_ROWS and is_on(fallback)


def before(pattern: Pattern, q: Tensor, k: Tensor, causal: bool, q_offset: int) -> Verdict:
    """Whether dense attention wins before `pattern` has looked at anything."""
    inner = pattern.pattern if isinstance(pattern, Preset) else pattern
    call = shape_of(q, k, causal, q_offset)
    return table()[str(q.dtype).removeprefix("torch.")].before(type(inner).__name__, call)


def after(index: SparseIndex, q: Tensor, k: Tensor, causal: bool, q_offset: int) -> Verdict:
    """Whether dense attention wins over what a pattern chose."""
    call = shape_of(q, k, causal, q_offset)
    density = _listed_density(index, call, causal)
    return table()[str(q.dtype).removeprefix("torch.")].after(density, call)


def _listed_density(index: SparseIndex, call: Call, causal: bool) -> float:
    """Tile density from the lengths of the lists alone; a list-free head counts as dense."""
    if index.is_list_free:
        return 0.0  # dense and streaming heads cost no gathering: nothing to win
    blocks = int((index.block_indptr[..., -1] - index.block_indptr[..., 0]).sum())
    columns = int((index.column_indptr[..., -1] - index.column_indptr[..., 0]).sum())
    lists = index.block_indptr.shape[0] * index.block_indptr.shape[1]
    keys = (blocks * index.block_n + columns) * index.block_m / lists
    # Causal tiles are taken up to their last row, half a tile above the pairs.
    allowed = call.pairs + (call.rows * index.block_m / 2 if causal else 0)
    return min(1.0, keys / max(1.0, allowed))


# ------------------------------------------------------------------------------ the table


def machine() -> dict[str, Any]:
    """What a table is of; one of another machine says nothing."""
    return {
        "format": FORMAT,
        "processor": platform.processor() or platform.machine(),
        "model": cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def cache_file() -> Path:
    """Where `tune` keeps this machine's table."""
    return cache_folder() / "costs.json"


@lru_cache(maxsize=1)
def table() -> dict[str, Costs]:
    """Costs by dtype name: this machine's, or else those that ship with the package."""
    try:
        kept = json.loads(cache_file().read_text(encoding="utf-8"))
        if kept["machine"] == machine():
            return _loaded(kept)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no table, or a damaged one: as if it had never been measured
    return _loaded(json.loads(_SHIPPED.read_text(encoding="utf-8")))


def _loaded(kept: dict[str, Any]) -> dict[str, Costs]:
    return {
        dtype: Costs(
            tuple(c["lengths"]),
            tuple(c["dense"]),
            tuple(tuple(row) for row in c["sparse"]),
            {name: tuple(x) for name, x in c["selection"].items()},
        )
        for dtype, c in kept["costs"].items()
    }


def save(costs: dict[str, Costs], file: Path) -> None:
    """Writes a table for this machine, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = {"machine": machine(), "costs": {name: asdict(c) for name, c in costs.items()}}
    scratch = file.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(kept) + "\n", encoding="utf-8")
    scratch.replace(file)
    table.cache_clear()
