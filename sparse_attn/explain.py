# SPDX-License-Identifier: Apache-2.0
"""explain: what a call would do, what it would cost, and what dense attention would."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_attn import backends
from sparse_attn.attention import attention, build_index
from sparse_attn.index import Density, HeadKind
from sparse_attn.patterns import Dense

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

    @property
    def selection_share(self) -> float:
        """Selection's part of the call's time, in [0, 1]."""
        return self.selection_ms / (self.selection_ms + self.attention_ms)

    @property
    def gain(self) -> float:
        """Time of dense attention over time of this call: above 1, the pattern pays."""
        return self.dense_ms / (self.selection_ms + self.attention_ms)

    def __str__(self) -> str:
        verdict = "" if self.gain >= 1.0 else "  <- dense is faster: pass pattern='dense'"
        lines = [
            f"pattern     {self.pattern}",
            f"backend     {self.backend}, {self.num_threads} threads",
            *(f"            not {reason}" for reason in self.reasons),
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
) -> Explanation:
    """Builds the index, runs the call a few times, and says what it does and whether it pays.

    Takes about four times as long as the call itself, and does not compute dense attention as a
    whole: its time is that of some rows in the middle, scaled to all pairs.

    Args:
        q, k, v, pattern, causal, softmax_scale, q_offset, backend: as in `attention`.

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

    index = build_index(pattern, q, k, q_offset=offset, **numerics)
    problem = backends.Problem(q.device.type, q.dtype, q.shape[3], v.shape[3])
    chosen = backends.choose("explain", problem, backend)
    refused = [name for name in backends.BACKENDS if name != chosen]
    reasons = tuple(
        f"{name}: {reason}" for name in refused for reason in backends.BACKENDS[name](problem)
    )
    selection = 0.0
    if index is not pattern:
        selection = _milliseconds(
            lambda: build_index(pattern, q, k, q_offset=offset, **numerics), q.device
        )
    sparse = _milliseconds(
        lambda: attention(q, k, v, index, q_offset=offset, backend=backend, **numerics), q.device
    )
    index = index.expand_heads(q.shape[1])
    return Explanation(
        pattern=repr(pattern),
        backend=chosen,
        reasons=reasons,
        density=index.density(causal=causal, q_offset=offset),
        kinds=tuple(HeadKind(kind).name.lower() for kind in index.heads[:, 0].tolist()),
        selection_ms=selection,
        attention_ms=sparse,
        dense_ms=_dense_milliseconds(q, k, v, offset, backend, numerics),
        num_threads=torch.get_num_threads(),
    )


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

    def pairs(low: int, high: int) -> int:
        last = torch.arange(low, high) + offset + 1
        seen = (
            last.clamp(0, k.shape[2]) if numerics["causal"] else torch.full_like(last, k.shape[2])
        )
        return int(seen.sum())

    return time_of_band * pairs(0, q.shape[2]) / max(1, pairs(first, first + rows))


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
