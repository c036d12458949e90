# SPDX-License-Identifier: Apache-2.0
"""calibrate: a head plan for a model, from its own heads on a text."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_attn import ops
from sparse_attn.calibration.choose import Trial, choose
from sparse_attn.calibration.measure import State, default_candidates, measure, measured_layers
from sparse_attn.heads import HeadPlan, PlannedHead, config_hash, describe
from sparse_attn.heads.plan import text_config
from sparse_attn.patterns import Dense, Pattern

_CUT = "no time for {} of {} layers: they stay dense"
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Calibration:
    """A plan and what it was chosen from.

    Attributes:
        plan: the choice.
        trials: per layer and head everything that was tried; a layer with a window of its own has
            none.
    """

    plan: HeadPlan
    trials: dict[int, list[list[Trial]]]


def seconds_of(budget: float | str) -> float:
    """Seconds of a budget: a number, or "300", "90s", "5m", "1.5h".

    Raises:
        ValueError: it is none of these, or not above 0.

    Example:
        >>> seconds_of("5m")
        300.0
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([smh]?)\s*", str(budget))
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if seconds <= 0:
        raise ValueError(
            f"sparse_attn.calibrate: budget={budget!r} is no time; pass seconds, or for instance "
            "'90s', '5m', '1h'."
        )
    return seconds


def calibrate(
    model: Any,
    ids: Tensor,
    *,
    budget: float | str = "5m",
    recall: float = 0.98,
    floor: float = 0.9,
    candidates: Sequence[Pattern] | None = None,
    state: str | Path | None = None,
    model_id: str | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> HeadPlan:
    """A head plan for `model`: each head's pattern by measured recall and measured time.

    The model reads `ids` once, exactly. Every candidate is tried on every head's own queries, keys
    and values: its recall exp(lse_sparse - lse_dense), the processor time of selection and
    attention, and how much the layer's output changes. Of all choices in which no head keeps less
    than `floor`, the plan is the cheapest with a mean recall of `recall`; which head gets how much
    is what changes the outputs least for the time.

    Args:
        model: a transformers model, on the CPU.
        ids: int64 [1, tokens], a text like those that the plan is for, and as long.
        budget: wall time for measuring: seconds, or "90s", "5m", "1h". With little of it fewer
            candidates are tried; layers that it doesn't reach stay dense, and
            `plan.measured["cut"]` says so.
        recall: mean over all heads, in (0, 1].
        floor: of every single head, in [0, recall].
        candidates: patterns to try, in this order; default: A-shapes and vertical-slashes.
        state: a file to keep measurements in; if it exists, what it has is not measured again.
        model_id: the model's name for the plan.
        progress: called after each layer with (layers done, layers, seconds that remain).

    Returns:
        The plan; `plan.measured` has the conditions and the sums.

    Raises:
        TypeError, ValueError: an argument is wrong, or `state` is of something else.
    """
    return calibrate_with_trials(
        model,
        ids,
        budget=budget,
        recall=recall,
        floor=floor,
        candidates=candidates,
        state=state,
        model_id=model_id,
        progress=progress,
    ).plan


def calibrate_with_trials(
    model: Any,
    ids: Tensor,
    *,
    budget: float | str = "5m",
    recall: float = 0.98,
    floor: float = 0.9,
    candidates: Sequence[Pattern] | None = None,
    state: str | Path | None = None,
    model_id: str | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Calibration:
    """`calibrate`, with everything that was tried."""
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise ValueError(
            f"sparse_attn.calibrate: ids is {tuple(ids.shape)}; pass one text, int64 [1, tokens]."
        )
    if not 0 <= floor <= recall <= 1 or recall == 0:
        raise ValueError(
            f"sparse_attn.calibrate: recall={recall} and floor={floor}; both must be in [0, 1], "
            "floor at most recall, for instance 0.98 and 0.9."
        )
    begin = time.monotonic()
    tokens = ids.shape[1]
    tried = tuple(default_candidates(tokens) if candidates is None else candidates)
    key = {
        "model": config_hash(model),
        "text": hashlib.sha256(repr(ids.tolist()).encode()).hexdigest()[:16],
        "dtype": str(model.dtype).removeprefix("torch."),
        "candidates": [describe(pattern) for pattern in tried],
    }
    kept = State(key, None if state is None else Path(state))
    measure(model, ids, tried, kept, seconds=seconds_of(budget), progress=progress)

    trials = {number: layer.heads for number, layer in sorted(kept.layers.items())}
    flat = [heads for layer in trials.values() for heads in layer]
    chosen = iter(choose(flat, recall=recall, floor=floor) if flat else [])
    picked = {number: [next(chosen) for _ in layer] for number, layer in trials.items()}
    config = text_config(model)
    heads = config.num_attention_heads
    everything = [trial for layer in picked.values() for trial in layer]
    recalls = [trial.recall for trial in everything] or [1.0]
    total = measured_layers(config, tokens)
    missing = total - len(trials)
    plan = HeadPlan(
        tuple(
            tuple(map(_head, picked.get(number, [None] * heads)))  # its own window stays exact
            for number in range(config.num_hidden_layers)
        ),
        num_heads_kv=getattr(config, "num_key_value_heads", None) or heads,
        model_id=model_id or getattr(config, "_name_or_path", "") or config.model_type,
        config_hash=config_hash(model),
        created_by="sparse_attn.calibrate",
        measured={
            "tokens": tokens,
            "dtype": key["dtype"],
            "cpu": ops.cpu_capability(),
            "recall_asked": recall,
            "recall_mean": round(sum(recalls) / len(recalls), 5),
            "attention_ms": round(sum(t.milliseconds for t in everything), 1),
            "dense_ms": round(sum(trials[0].milliseconds for trials in flat), 1),
            "seconds": round(time.monotonic() - begin, 1),
            "threads": torch.get_num_threads(),
            **({"cut": [_CUT.format(missing, total)]} if missing else {}),
        },
    )
    return Calibration(plan, trials)


def _head(trial: Trial | None) -> PlannedHead:
    if trial is None:
        return PlannedHead(Dense(), 1.0)
    return PlannedHead(trial.pattern, round(trial.recall, 5), round(trial.milliseconds, 3))
