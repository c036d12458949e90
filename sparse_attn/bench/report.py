# SPDX-License-Identifier: Apache-2.0
"""What is made of records: a table of text, one of Markdown, plots."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Document = dict[str, Any]

_HEAD = (
    f"{'implementation':25} {'dtype':9} {'keys':26} {'density':>7} {'cpu ms p20/p50/p80':>26} "
    f"{'wall ms':>9} {'rate':>11} {'share':>6} {'x dense':>8} {'t/d':>5}"
)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ms(value: float) -> str:
    return f"{value:.4f}" if value < 1 else f"{value:.2f}"


def share(record: Record) -> float | None:
    """Of the limit that binds: the memory in decode, the multiply-adds else."""
    decode = record["problem"]["phase"] == "decode"
    value: float | None = record["share_of_read" if decode else "share_of_peak"]
    return value


def rate(record: Record) -> str:
    """GB/s in decode, GFLOP/s else."""
    if record["gbytes_per_s_read"] is not None:
        return f"{record['gbytes_per_s_read']:.1f} GB/s"
    return f"{record['gflops_of_work_done']:.1f} GF/s"


def name(record: Record) -> str:
    """The implementation, and the instruction set if one was forced."""
    forced = record["env"]["capability"]
    return f"{record['implementation']} [{forced}]" if forced else str(record["implementation"])


def _several_lengths(records: Sequence[Record]) -> bool:
    return len({(r["problem"]["seqlen_k"], r["problem"]["heads"]) for r in records}) > 1


def keys(record: Record, with_shape: bool) -> str:
    """Which keys; with the length and the heads where a group has several."""
    problem = record["problem"]
    shape = f"{problem['seqlen_k']} {problem['heads']}/{problem['heads_kv']} "
    threads = f" x{record['env']['threads']}" if record["env"]["threads"] > 1 else ""
    return f"{shape if with_shape else ''}{record['pattern']}{threads}"


def text_table(records: Sequence[Record]) -> str:
    """Records as aligned text, a heading per group."""
    lines = []
    for group, members in groupby(records, key=lambda r: r["group"]):
        rows = list(members)
        shaped = _several_lengths(rows)
        lines += ["", f"{group} ({rows[0]['rounds']} rounds)", _HEAD]
        for r in rows:
            spread = "/".join(_ms(r["cpu_ms"][p]) for p in ("p20", "p50", "p80"))
            lines.append(
                f"{name(r):25} {r['problem']['dtype']:9} {keys(r, shaped):26} "
                f"{r['tile_density']:7.3f} {spread:>26} {_ms(r['wall_ms']['p50']):>9} "
                f"{rate(r):>11} {_number(share(r), '6.1%'):>6} "
                f"{_number(r['ratio_to_best_dense_peer'], '.2f'):>8} "
                f"{_number(r['time_over_density_times_own_dense'], '.2f'):>5}"
            )
    return "\n".join(lines)


def goals_table(goals: Iterable[Record]) -> str:
    """Goals as aligned text, missed ones marked."""
    lines = []
    for goal in goals:
        sign = ">=" if goal["at_least"] else "<="
        bound = "" if goal["bound"] is None else f"{sign} {goal['bound']:g}"
        missed = "   missed" if goal["held"] is False else ""
        lines.append(f"{goal['what']:75} {goal['value']:8.3f}  {bound:8}{missed}")
    return "\n".join(lines)


def limits_table(limits: Iterable[Record]) -> str:
    """The machine's limits as aligned text."""
    return "\n".join(f"{x['limit']:9} {x['rate']:8.1f} {x['unit']}" for x in limits)


def skipped_table(skipped: Iterable[Record]) -> str:
    """Who did not take part, and why."""
    return "\n".join(
        f"skipped: {x['implementation']} ({x['cases']} cases): {x['reason']}" for x in skipped
    )


# ------------------------------------------------------------------------------ Markdown


def markdown(document: Document) -> str:
    """Tables for a README: a group each, then the goals, then the command and the machine."""
    lines: list[str] = []
    for group, members in groupby(document["records"], key=lambda r: r["group"]):
        rows = list(members)
        shaped = _several_lengths(rows)
        lines += [
            f"**{group}**",
            "",
            "| implementation | dtype | keys | density | ms | rate | share of peak "
            "| against the best dense peer |",
            "|---|---|---|---:|---:|---:|---:|---:|",
        ]
        for r in rows:
            best = r["ratio_to_best_dense_peer"]
            against = "–" if best is None else f"{best:.2f} × {r['best_dense_peer']}"
            milliseconds = _ms(r[f"{r['clock']}_ms"]["p50"])
            lines.append(
                f"| {name(r)} | {r['problem']['dtype']} | {keys(r, shaped)} "
                f"| {100 * r['tile_density']:.3g} % | {milliseconds} | {rate(r)} "
                f"| {_number(share(r), '.0%')} | {against} |"
            )
        lines.append("")
    if document["goals"]:
        lines += ["| figure | measured | goal |", "|---|---:|---:|"]
        for goal in document["goals"]:
            sign = "≥" if goal["at_least"] else "≤"
            bound = "" if goal["bound"] is None else f"{sign} {goal['bound']:g}"
            lines.append(f"| {goal['what']} | {goal['value']:.3g} | {bound} |")
        lines.append("")
    env = document["env"]
    limits = ", ".join(
        f"{x['limit']} {x['rate']:.0f} {x['unit']}" for x in document["machine"]["limits"]
    )
    lines.append(
        f"`{document['command']}` · {env['cpu']}, torch {env['torch']}; medians of "
        f"{document['clock'].upper()} time, contestants in turn; measured limits: {limits or '–'}."
    )
    return "\n".join(lines)


# ------------------------------------------------------------------------------ plots


def plot(document: Document, folder: Path) -> list[Path]:
    """Share of peak and speed-up over the best dense peer against density, an image per group.

    Args:
        document: of one or more runs.
        folder: made if missing.

    Returns:
        The files; none for groups of one density.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        raise ImportError(
            "sparse_attn bench: --plot needs matplotlib; `pip install 'sparse_attn[bench]'`."
        ) from error
    matplotlib.use("agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    ticker = importlib.import_module("matplotlib.ticker")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for group, members in groupby(document["records"], key=lambda r: r["group"]):
        lines = _lines(list(members))
        if not any(len({p["tile_density"] for p in points}) > 1 for points in lines.values()):
            continue
        figure, axes = pyplot.subplots(1, 2, figsize=(12, 4), layout="constrained")
        for (left, title), axis in zip(_PANELS, axes, strict=True):
            for label, points in lines.items():
                pairs = [(p["tile_density"], left(p)) for p in points]
                known = [(x, y) for x, y in pairs if y is not None]
                if known:  # without a compiler the peak is unknown
                    axis.plot(*zip(*known, strict=True), marker="o", label=label)
            axis.set(xscale="log", xlabel="density", title=title)
            axis.xaxis.set_major_formatter(ticker.PercentFormatter(1.0))
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
            axis.set_xticks(sorted({r["tile_density"] for p in lines.values() for r in p}))
            axis.tick_params(axis="x", rotation=60)
            axis.grid(alpha=0.3)
        axes[0].set_ylim(bottom=0)
        axes[1].set_yscale("log")
        axes[1].yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes[1].yaxis.set_minor_formatter(ticker.NullFormatter())
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize="small")
        figure.suptitle(group)
        path = folder / (re.sub(r"[^a-z0-9]+", "-", group.lower()).strip("-") + ".png")
        figure.savefig(path, dpi=90)
        pyplot.close(figure)
        files.append(path)
    return files


_PANELS: tuple[tuple[Callable[[Record], float | None], str], ...] = (
    (share, "share of the measured peak"),
    (lambda r: r["ratio_to_best_dense_peer"], "speed-up over the best dense peer"),
)


def _lines(records: list[Record]) -> dict[str, list[Record]]:
    """Points of each line, by density: an implementation, its dtype, and its kind of keys."""
    lines: dict[str, list[Record]] = {}
    kinds: dict[tuple[str, str], list[str]] = {}
    for r in records:
        if r["kind"] != "dense":
            found = kinds.setdefault((name(r), r["problem"]["dtype"]), [])
            found += [r["kind"]] * (r["kind"] not in found)
    for r in records:
        who = (name(r), r["problem"]["dtype"])
        # A dense point is the right end of each of the lines.
        for kind in kinds.get(who, [""]) if r["kind"] == "dense" else [r["kind"]]:
            lines.setdefault(" ".join(filter(None, (*who, kind))), []).append(r)
    return {label: sorted(p, key=lambda r: r["tile_density"]) for label, p in lines.items()}
