# SPDX-License-Identifier: Apache-2.0
"""Groups of cases, run in turn with the machine's limits, and the records they give."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

import sparse_attn
from sparse_attn import ops
from sparse_attn.env import cpu_model
from sparse_attn.index import Density

from . import peers
from .cases import Case, Choice, Keys, Problem
from .machine import Limit, Machine, Unavailable, peak_name
from .timing import Times, interleaved, paired_ratio, sample, spread

Record = dict[str, Any]
_CAPABILITY = "SPARSE_ATTN_CPU_CAPABILITY"


@dataclass(frozen=True)
class Goal:
    """A figure of a group that has a bound.

    Attributes:
        text: what it is.
        case: the case it is about.
        over: None: the share of the peak (decode: of the memory's read rate) that `case` reaches.
            A case: time of `case` over its time.
        bound: what the figure should keep to; None if nothing was promised.
        at_least: whether the bound is a lower one.
        per_density: whether the figure is divided by the tile density of `case`.
        inverse: whether the figure is the other way round, time of `over` over time of `case`.
        clock: "cpu" or "wall" where it is not the run's.
        microseconds: whether the figure is the time of `case` itself.
    """

    text: str
    case: Case
    over: Case | None = None
    bound: float | None = None
    at_least: bool = True
    per_density: bool = False
    inverse: bool = False
    clock: str | None = None
    microseconds: bool = False


@dataclass(frozen=True)
class Group:
    """Cases that are timed in turn, one round after another.

    Attributes:
        title: names the group in tables.
        cases: contestants.
        goals: figures over them.
    """

    title: str
    cases: list[Case]
    goals: list[Goal] = field(default_factory=list)


@dataclass
class Settings:
    """How to run.

    Attributes:
        machine: the compiled loops, None without a compiler.
        rounds: at most this many.
        seconds: time for one group, at least three rounds are done.
        clock: "cpu" or "wall": what rates and ratios are from.
        say: takes a line of progress.
    """

    machine: Machine | None
    rounds: int = 9
    seconds: float = 20.0
    clock: str = "cpu"
    say: Callable[[str], object] = lambda _: None


@dataclass
class Results:
    """What a run gives; `skipped` holds (implementation, reason) with how many cases it hit."""

    records: list[Record] = field(default_factory=list)
    goals: list[Record] = field(default_factory=list)
    skipped: dict[tuple[str, str], int] = field(default_factory=dict)


def environment() -> dict[str, Any]:
    """Versions and the machine, as every record carries them."""
    return {
        "sparse_attn": getattr(sparse_attn, "__version__", "unknown"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "cpu_capability": ops.cpu_capability(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


@contextlib.contextmanager
def capability(name: str | None) -> Iterator[None]:
    """Hold our kernels to an instruction set; None leaves the environment as it is."""
    before = os.environ.get(_CAPABILITY)
    if name is not None:
        os.environ[_CAPABILITY] = name
    try:
        yield
    finally:
        if name is not None:
            del os.environ[_CAPABILITY]
            if before is not None:
                os.environ[_CAPABILITY] = before


def _prepared(
    group: Group, settings: Settings, results: Results
) -> tuple[dict[Case, Callable[[], object]], dict[Case, float], dict[Case, Density]]:
    """Warm calls of the cases that can run, how far their outputs are from ours, and densities."""
    inputs: dict[Problem, tuple[Tensor, Tensor, Tensor]] = {}
    keys: dict[tuple[Problem, Choice], Keys] = {}
    outputs: dict[tuple[Problem, Choice], Tensor] = {}
    densities: dict[tuple[Problem, Choice], Density] = {}
    calls: dict[Case, Callable[[], object]] = {}
    differences: dict[Case, float] = {}
    for case in sorted(group.cases, key=lambda c: not peers.is_ours(c.by)):  # ours first
        what = (case.problem, case.choice)
        if case.problem not in inputs:
            inputs[case.problem] = case.problem.inputs()
        if what not in keys:
            keys[what] = Keys(*what)
        torch.set_num_threads(case.threads)
        with capability(case.capability):
            try:
                prepared = peers.IMPLEMENTATIONS[case.by](case, inputs[case.problem], keys[what])
                output = prepared.output(prepared.call()).float()
            except Unavailable as error:
                skip = (case.by, str(error))
                results.skipped[skip] = results.skipped.get(skip, 0) + 1
                continue
            except Exception as error:
                # Peers are other people's code at versions unknown: one that fails is left out,
                # ours may not.
                if peers.is_ours(case.by):
                    raise
                skip = (case.by, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
                results.skipped[skip] = results.skipped.get(skip, 0) + 1
                continue
        calls[case] = prepared.call
        differences[case] = float((output - outputs.setdefault(what, output)).abs().max())
        if what not in densities:
            densities[what] = keys[what].index.density()
    return calls, differences, {case: densities[case.problem, case.choice] for case in calls}


def _limit_names(case: Case) -> list[str]:
    """The limits that a case is held against."""
    held = case.capability if peers.is_ours(case.by) else None
    names = [peak_name(case.problem.torch_dtype, held)]
    return [*names, "dram"] if case.problem.phase == "decode" else names


def _limits(machine: Machine | None, cases: list[Case]) -> dict[str, Limit]:
    if machine is None:
        return {}
    names = dict.fromkeys(name for case in cases for name in _limit_names(case))
    found = {name: machine.limit(name) for name in names}
    return {name: limit for name, limit in found.items() if limit is not None}


def run_group(group: Group, settings: Settings, results: Results, suite: str = "") -> None:
    """Time a group and append its records and goals to `results`."""
    begin = time.perf_counter()
    calls, differences, densities = _prepared(group, settings, results)
    limits = _limits(settings.machine, list(calls))
    plan: dict[Case | str, Callable[[], object]] = {n: limit.call for n, limit in limits.items()}
    # In the order of the group, not that of the preparation: neighbours are what is compared.
    plan |= {case: calls[case] for case in group.cases if case in calls}

    several = any(case.threads > 1 for case in calls)
    with contextlib.ExitStack() as held:

        def before(key: Case | str) -> None:
            held.close()
            if isinstance(key, Case):
                held.enter_context(capability(key.capability))
                torch.set_num_threads(key.threads)
            if several:
                time.sleep(0.01)  # else threads of the last call still spin at this one's expense

        times = interleaved(plan, rounds=settings.rounds, seconds=settings.seconds, before=before)
    for case in calls:
        results.records.append(
            _record(case, times, limits, densities, differences, settings.clock)
            | {"suite": suite, "group": group.title}
        )
    for goal in group.goals:
        figure = _figure(goal, times, limits, densities, goal.clock or settings.clock)
        if figure is not None:
            results.goals.append(figure | {"suite": suite, "group": group.title})
    settings.say(f"{group.title}: {time.perf_counter() - begin:.0f} s")


AllTimes = dict[Case | str, Times]


def _is_backward(case: Case) -> bool:
    return case.by in (peers.BACKWARD, peers.SDPA_BACKWARD)


def _work(case: Case, density: Density) -> dict[str, float]:
    """FLOP over the visible pairs, and bytes of the keys and values that must be read."""
    passes = peers.BACKWARD_WORK if _is_backward(case) else 1.0
    return {
        "flop": case.problem.dense_flops * density.element * passes,
        "byte": case.problem.dense_bytes * density.tile,
    }


def _share(case: Case, limit: Limit, times: AllTimes, density: Density, clock: str) -> float:
    """Rate of the case over the limit's, the median over rounds."""
    work = _work(case, density)[limit.unit]
    ratio = paired_ratio(times[limit.name].of(clock), times[case].of(clock))
    return ratio * work / limit.amount


def _record(
    case: Case,
    times: AllTimes,
    limits: dict[str, Limit],
    densities: dict[Case, Density],
    differences: dict[Case, float],
    clock: str,
) -> Record:
    """One record; ratios are other's time over this one's, above 1 where this one is faster."""
    mine = times[case]
    seconds = median(mine.of(clock))
    density = densities[case]
    work = _work(case, density)
    decode = case.problem.phase == "decode"
    shares = {
        name: _share(case, limits[name], times, density, clock)
        for name in _limit_names(case)
        # Per second of processor time the number of threads does not matter.
        if name in limits and (clock == "cpu" or limits[name].threads == case.threads)
    }
    speedups = {
        f"{other.by}, {other.choice}": paired_ratio(times[other].of(clock), mine.of(clock))
        for other in densities
        if other != case
        and not peers.is_ours(other.by)
        and other.problem == case.problem
        and other.choice in (Choice(), case.choice)
        and _is_backward(other) == _is_backward(case)
    }
    dense_peers = [
        other
        for other in densities
        if not peers.is_ours(other.by)
        and other.problem == case.problem
        and other.choice.kind == "dense"
        and _is_backward(other) == _is_backward(case)
    ]
    best = min(dense_peers, key=lambda c: median(times[c].of(clock)), default=None)
    own = case.with_(choice=Choice())
    own_ratio = paired_ratio(mine.of(clock), times[own].of(clock)) if own in densities else None
    return {
        "implementation": case.by,
        "env": environment() | {"threads": case.threads, "capability": case.capability},
        "problem": {"phase": case.problem.phase, **asdict(case.problem), "causal": True},
        "pattern": str(case.choice),
        **{name: getattr(case.choice, name) for name in ("kind", "block_m", "block_n")},
        "element_density": density.element,
        "tile_density": density.tile,
        "clock": clock,
        "rounds": len(mine.cpu),
        "calls_per_round": mine.number,
        "cpu_ms": spread(mine.cpu, 1e3),
        "wall_ms": spread(mine.wall, 1e3),
        "gflops_of_work_done": work["flop"] / seconds / 1e9,
        "gbytes_per_s_read": work["byte"] / seconds / 1e9 if decode else None,
        "peak": next((n for n in shares if n != "dram"), None),
        "share_of_peak": next((s for n, s in shares.items() if n != "dram"), None),
        "share_of_read": shares.get("dram"),
        "best_dense_peer": best.by if best else None,
        "ratio_to_best_dense_peer": (
            paired_ratio(times[best].of(clock), mine.of(clock)) if best else None
        ),
        "speedup_over": speedups,
        "time_over_density_times_own_dense": own_ratio / density.tile if own_ratio else None,
        "max_difference_to_ours": differences[case],
    }


def _figure(
    goal: Goal,
    times: AllTimes,
    limits: dict[str, Limit],
    densities: dict[Case, Density],
    clock: str,
) -> Record | None:
    """What a goal came to; None if a contestant is missing."""
    if goal.case not in densities or (goal.over is not None and goal.over not in densities):
        return None
    density = densities[goal.case]
    if goal.microseconds:
        value = 1e6 * median(times[goal.case].of(clock))
    elif goal.over is None:
        name = _limit_names(goal.case)[-1]
        if name not in limits:
            return None
        value = _share(goal.case, limits[name], times, density, clock)
    else:
        pair = times[goal.case].of(clock), times[goal.over].of(clock)
        value = paired_ratio(*(pair[::-1] if goal.inverse else pair))
        value /= density.tile if goal.per_density else 1.0
    return goal_record(goal.text, value, goal.bound, goal.at_least)


def goal_record(text: str, value: float, bound: float | None, at_least: bool) -> Record:
    """One line of the goals' table, for reports."""
    held = None if bound is None else (value >= bound if at_least else value <= bound)
    return {
        "what": text,
        "value": value,
        "bound": bound,
        "at_least": at_least,
        "held": held,
    }


def machine_limits(machine: Machine | None, rounds: int, clock: str) -> list[Record]:
    """All limits of the machine, measured in turn: name, unit, rate in GFLOP/s or GB/s, spread."""
    if machine is None:
        return []
    from .machine import FMA_BITS, READ_BYTES

    found = {name: machine.limit(name) for name in (*FMA_BITS, *READ_BYTES)}
    limits = {name: limit for name, limit in found.items() if limit is not None}
    for limit in limits.values():
        sample(limit.call)
    times = interleaved(
        {name: limit.call for name, limit in limits.items()}, rounds=rounds, seconds=math.inf
    )
    return [
        {
            "limit": name,
            "unit": "GFLOP/s" if limit.unit == "flop" else "GB/s",
            "rate": limit.amount / median(times[name].of(clock)) / 1e9,
            "ms": spread(times[name].of(clock), 1e3),
        }
        for name, limit in limits.items()
    ]
