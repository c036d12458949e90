# SPDX-License-Identifier: Apache-2.0
"""explain: what a call would do, what it would cost, and what dense attention would."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_attn import backends, dispatch
from sparse_attn.attention import attention, build_index
from sparse_attn.index import Density, HeadKind, SparseIndex
from sparse_attn.patterns import Dense, resolve

if TYPE_CHECKING:
    from sparse_attn.attention import PatternLike

_PROBE_ROWS = 256  # rows of the dense probe: enough tiles for a few threads
_RUNS = 3


@dataclass(frozen=True, eq=False)
class Explanation:
    """What `explain` found; `print` shows it as a table.

    Attributes:
        pattern: as it was passed.
        backend: name of the kernel that would run.
        reasons: per backend that could not, "name: why".
        density: element and tile density of the index, also per head.
        kinds: what each head of the index is: "dense", "streaming" or "listed".
        selection_ms: median wall time of building the index, in milliseconds; 0 if one was passed.
        attention_ms: median wall time of the attention over it.
        dense_ms: the same for our dense kernel, from a band of rows scaled to all allowed pairs.
        num_threads: that these times were taken with.
        runs_dense: whether `attention` with fallback would run dense attention in the pattern's
            place, in all of its bands; density and times are the pattern's all the same.
        why: what that follows from.
    """

    pattern: str
    backend: str
    reasons: tuple[str, ...]
    density: Density
    kinds: tuple[str, ...]
    selection_ms: float
    attention_ms: float
    dense_ms: float
    num_threads: int
    runs_dense: bool
    why: str

    @property
    def selection_share(self) -> float:
        """Selection's part of the call's time, in [0, 1]."""
        return self.selection_ms / (self.selection_ms + self.attention_ms)

    @property
    def gain(self) -> float:
        """Time of dense attention over time of this call: above 1, the pattern pays."""
        return self.dense_ms / (self.selection_ms + self.attention_ms)

    def as_dict(self) -> dict[str, Any]:
        """The same as numbers, texts and lists, for json.dumps."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "density"}
        plain |= {"reasons": list(self.reasons), "kinds": list(self.kinds)}
        for name in ("element", "tile"):
            plain[f"{name}_density"] = getattr(self.density, name)
            plain[f"{name}_density_per_head"] = getattr(self.density, f"{name}_per_head").tolist()
        return {**plain, "selection_share": self.selection_share, "gain": self.gain}

    def __str__(self) -> str:
        verdict = "" if self.gain >= 1.0 else "  <- dense is faster: pass pattern='dense'"
        lines = [
            f"pattern     {self.pattern}",
            f"backend     {self.backend}, {self.num_threads} threads",
            *(f"            not {reason}" for reason in self.reasons),
            f"runs        {'dense attention' if self.runs_dense else 'the pattern'}: {self.why}",
            f"density     {self.density.element:.1%} of the pairs, "
            f"{self.density.tile:.1%} of the work in tiles",
            f"time        {self.selection_ms:.2f} ms selection ({self.selection_share:.0%}) + "
            f"{self.attention_ms:.2f} ms attention",
            f"gain        {self.gain:.2f} x over dense, {self.dense_ms:.2f} ms{verdict}",
            "head  kind       pairs    tiles",
        ]
        element = self.density.element_per_head.mean(0).tolist()
        tile = self.density.tile_per_head.mean(0).tolist()
        lines += [
            f"{head:4d}  {kind:9s} {pairs:6.1%}  {tiles:6.1%}"
            for head, (kind, pairs, tiles) in enumerate(zip(self.kinds, element, tile))
        ]
        return "\n".join(lines)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: PatternLike = "dense",
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    q_offset: int | None = None,
    backend: str = "auto",
    fallback: bool | None = None,
) -> Explanation:
    """Builds the index, runs the call a few times, and says what it does and whether it pays.

    Takes about four times as long as the call itself, and does not compute dense attention as a
    whole: its time is that of some rows in the middle, scaled to all pairs.

    Args:
        q, k, v, pattern, causal, softmax_scale, q_offset, backend, fallback: as in
            `attention`.

    Returns:
        An `Explanation`.

    Raises:
        TypeError, ValueError, UnsupportedError: as `attention`.

    Example:
        >>> import torch, sparse_attn
        >>> q, k, v = torch.randn(3, 1, 4, 1024, 64)
        >>> found = sparse_attn.explain(q, k, v, sparse_attn.AShape(sink=64, window=128))
        >>> found.density.element < 0.5
        True
    """
    numerics: dict[str, Any] = {"causal": causal, "softmax_scale": softmax_scale}
    offset = k.shape[2] - q.shape[2] if q_offset is None else q_offset
    attention(q[:, :, :0], k, v, causal=causal, q_offset=offset, backend=backend)  # checks
    problem = backends.Problem(q.device.type, q.dtype, q.shape[3], v.shape[3])
    chosen = backends.choose("explain", problem, backend)
    refused = [name for name in backends.BACKENDS if name != chosen]
    reasons = tuple(
        f"{name}: {reason}" for name in refused for reason in backends.BACKENDS[name](problem)
    )
    told = repr(pattern)
    if not isinstance(pattern, SparseIndex):  # a memory must stay as it is
        pattern = copy.deepcopy(pattern)
    selection = sparse = 0.0
    parts, verdicts = [], []
    kinds: tuple[str, ...] = ()
    for first, rows in _bands(pattern, q, k):
        band, at = q[:, :, first : first + rows], offset + first
        build = partial(build_index, pattern, band, k, q_offset=at, **numerics)
        index = build()
        verdicts.append(_verdict(pattern, index, band, k, causal, at, fallback))
        if index is not pattern:
            selection += _milliseconds(build, q.device)
        run = partial(attention, band, k, v, index, q_offset=at, backend=backend, **numerics)
        sparse += _milliseconds(run, q.device)
        index = index.expand_heads(q.shape[1])
        kinds = tuple(HeadKind(kind).name.lower() for kind in index.heads[:, 0].tolist())
        tiles = _pairs(at, rows, k.shape[2], causal, index.block_m)
        pairs = _pairs(at, rows, k.shape[2], causal)
        parts.append((index.density(causal=causal, q_offset=at), pairs, tiles))
    return Explanation(
        pattern=told,
        backend=chosen,
        reasons=reasons,
        density=_joined(parts),
        kinds=kinds,
        selection_ms=selection,
        attention_ms=sparse,
        dense_ms=_dense_milliseconds(q, k, v, offset, backend, numerics),
        num_threads=torch.get_num_threads(),
        runs_dense=bool(verdicts) and all(verdict.dense for verdict in verdicts),
        why=verdicts[-1].why,
    )


def _verdict(
    pattern: PatternLike,
    index: SparseIndex,
    q: Tensor,
    k: Tensor,
    causal: bool,
    q_offset: int,
    fallback: bool | None,
) -> dispatch.Verdict:
    """What `attention` would decide about these rows."""
    if isinstance(pattern, SparseIndex) or hasattr(pattern, "kv_num_blocks"):
        return dispatch.Verdict(False, "an index runs as it is")
    chosen = resolve(pattern, q.shape[1])
    if not chosen.approximates:
        return dispatch.Verdict(False, "this pattern always runs as asked")
    if not dispatch.applies(chosen, q, fallback):
        off = not dispatch.is_on(fallback)
        return dispatch.Verdict(False, "fallback is off" if off else "decoding runs as asked")
    early = dispatch.before(chosen, q, k, causal, q_offset)
    return early if early.dense else dispatch.after(index, q, k, causal, q_offset)


def _bands(pattern: PatternLike, q: Tensor, k: Tensor) -> list[tuple[int, int]]:
    """(first row, rows) of the pieces in which `attention` builds and runs the call."""
    known = isinstance(pattern, SparseIndex) or hasattr(pattern, "kv_num_blocks")
    step = None if known else resolve(pattern, q.shape[1]).band_rows(q, k)  # type: ignore[arg-type]
    if step is None or step >= q.shape[2]:
        return [(0, q.shape[2])]
    return [(first, min(step, q.shape[2] - first)) for first in range(0, q.shape[2], step)]


def _pairs(first: int, rows: int, seqlen_k: int, causal: bool, block_m: int = 1) -> int:
    """Pairs that rows at positions first, first + 1, ... may see; each as its tile's last row."""
    if not causal:
        return rows * seqlen_k
    row = torch.arange(rows)
    last = ((row // block_m + 1) * block_m).clamp(max=rows)
    return int((first + last).clamp(0, seqlen_k).sum())


def _joined(parts: list[tuple[Density, int, int]]) -> Density:
    """The density of bands of rows together, from each band's own with its pairs as weights."""
    if len(parts) == 1:
        return parts[0][0]
    element = sum(d.element_per_head * pairs for d, pairs, _ in parts)
    tile = sum(d.tile_per_head * tiles for d, _, tiles in parts)
    assert isinstance(element, Tensor) and isinstance(tile, Tensor)
    element = element / max(1, sum(pairs for _, pairs, _ in parts))
    tile = tile / max(1, sum(tiles for _, _, tiles in parts))
    return Density(element.mean().item(), tile.mean().item(), element, tile)


def _dense_milliseconds(
    q: Tensor, k: Tensor, v: Tensor, offset: int, backend: str, numerics: dict[str, Any]
) -> float:
    """Time of dense attention, from a band of rows in the middle of q."""
    rows = min(q.shape[2], _PROBE_ROWS)
    first = (q.shape[2] - rows) // 2
    band = slice(first, first + rows)
    time_of_band = _milliseconds(
        lambda: attention(
            q[:, :, band], k, v, Dense(), q_offset=offset + first, backend=backend, **numerics
        ),
        q.device,
    )

    whole = _pairs(offset, q.shape[2], k.shape[2], numerics["causal"])
    return (
        time_of_band * whole / max(1, _pairs(offset + first, rows, k.shape[2], numerics["causal"]))
    )


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Median wall time of a few runs, after one that does not count."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    times = []
    for _ in range(_RUNS):
        finish()
        begin = time.perf_counter()
        call()
        finish()
        times.append(time.perf_counter() - begin)
    return median(times) * 1e3
