# SPDX-License-Identifier: Apache-2.0
"""Times of several calls taken in turn, and what to say about them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

MIN_ROUNDS = 3
MAX_NUMBER = 10_000
WARM_SECONDS = 0.02


@dataclass
class Times:
    """Seconds per call, one entry a round.

    Attributes:
        cpu: processor time of the whole process, all threads together.
        wall: elapsed time.
        number: calls that one entry is the mean of.
    """

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    number: int = 1

    def add(self, cpu: float, wall: float) -> None:
        """Append an entry."""
        self.cpu.append(cpu)
        self.wall.append(wall)

    def of(self, clock: str) -> list[float]:
        """The times of one clock, "cpu" or "wall"."""
        return self.cpu if clock == "cpu" else self.wall


def sample(call: Callable[[], object], number: int = 1) -> tuple[float, float]:
    """Mean seconds of processor and wall time over `number` calls in a row."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(number):
        call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return cpu / number, wall / number


def interleaved(
    calls: Mapping[Key, Callable[[], object]],
    *,
    rounds: int = 9,
    seconds: float = math.inf,
    min_sample: float = 2e-3,
    before: Callable[[Key], None] | None = None,
) -> dict[Key, Times]:
    """Times of every call, taken in turn: A B C, A B C, ...

    A call shorter than `min_sample` runs several times in a row for one entry, so that the clock's
    own cost and grain vanish. Calls up to WARM_SECONDS also run untimed before each entry: what
    they work on may stay in caches, which the contestant before them has filled with its own.

    Args:
        calls: what to time; already warm (compiled, its pages touched).
        rounds: entries per call, at most.
        seconds: no round starts after this long, except the first three.
        min_sample: seconds that one entry should take at least.
        before: called, outside of the timing, with the key of what runs next.
    """
    prepare = before or (lambda _: None)
    times = {key: Times() for key in calls}
    warm_ups: dict[Key, int] = {}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.perf_counter() - begin > seconds:
            break
        for key, call in calls.items():
            prepare(key)
            entry = times[key]
            if done == 0:
                first = sample(call)
                entry.number = min(MAX_NUMBER, max(1, math.ceil(min_sample / max(first[1], 1e-9))))
                warm_ups[key] = -(-entry.number // 4) if first[1] <= WARM_SECONDS else 0
                if not warm_ups[key]:  # long enough to count
                    entry.add(*first)
                    continue
            if warm_ups[key]:
                sample(call, warm_ups[key])
            entry.add(*sample(call, entry.number))
    return times


def spread(values: Sequence[float], factor: float = 1.0) -> dict[str, float]:
    """20th, 50th and 80th percentile, linearly interpolated, times `factor`.

    Example:
        >>> spread([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
        {'p20': 2.0, 'p50': 3.5, 'p80': 5.0}
    """
    if len(values) == 1:
        p20 = p80 = values[0]
    else:
        p20, *_, p80 = quantiles(values, n=5, method="inclusive")
    return {"p20": factor * p20, "p50": factor * median(values), "p80": factor * p80}


def paired_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median over rounds of over / under: a drift that hits both in a round cancels.

    Example:
        >>> paired_ratio([2.0, 4.0, 30.0], [1.0, 2.0, 10.0])  # the machine slowed down
        2.0
    """
    return median(a / b for a, b in zip(over, under, strict=True))
