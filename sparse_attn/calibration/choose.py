# SPDX-License-Identifier: Apache-2.0
"""Choosing a pattern per head from what was measured: recall, time, and change of the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_attn.patterns import Pattern

_STEPS = 60  # bisections of the price


@dataclass(frozen=True)
class Trial:
    """What one pattern did on one head.

    Attributes:
        pattern: which.
        milliseconds: processor time of selection and attention, on one thread.
        recall: mean over rows of exp(lse sparse - lse dense), the share of the softmax mass kept.
        change: mean square of what the head's output lost, after the output projection, over the
            mean square of all heads' outputs of the layer.
    """

    pattern: Pattern
    milliseconds: float
    recall: float
    change: float


def choose(
    heads: Sequence[Sequence[Trial]], *, recall: float = 0.98, floor: float = 0.9
) -> list[Trial]:
    """One trial per head: the cheapest choice whose mean recall is at least `recall`.

    No head keeps less than `floor`. Within that, heads share the time so that the outputs change
    least: with a price p, the same for all heads, each takes the trial with the least milliseconds
    + p * change, and p is the lowest for which the mean recall is reached.

    Args:
        heads: of every head its trials, one of which has recall 1 (dense attention).
        recall: mean over heads to reach, in (0, 1].
        floor: recall of every head, in [0, 1].

    Example:
        >>> from sparse_attn.patterns import AShape, Dense
        >>> dense, near = Trial(Dense(), 9.0, 1.0, 0.0), Trial(AShape(4, 64), 1.0, 0.97, 0.01)
        >>> [trial.milliseconds for trial in choose([[dense, near]] * 2, recall=0.96)]
        [1.0, 1.0]
    """
    allowed = [[trial for trial in trials if trial.recall >= floor] for trials in heads]

    def at(price: float) -> list[Trial]:
        return [min(trials, key=lambda t: t.milliseconds + price * t.change) for trials in allowed]

    def enough(chosen: list[Trial]) -> bool:
        return sum(trial.recall for trial in chosen) >= recall * len(chosen)

    low, high = -12.0, 18.0  # powers of ten
    if enough(at(0.0)):
        return at(0.0)
    if not enough(at(10.0**high)):
        return [max(trials, key=lambda t: t.recall) for trials in allowed]
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(at(10.0**middle)) else (middle, high)
    return at(10.0**high)
