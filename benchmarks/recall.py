# SPDX-License-Identifier: Apache-2.0
"""Attention-mass recall against tile density and time, per method, on captured heads.

    python benchmarks/heads.py --model smollm2 --text emma --tokens 8192 --deb FILE
    python benchmarks/recall.py --model smollm2 --text emma --tokens 8192 --json recall.json
    python benchmarks/recall.py --table recall.json --plot docs/recall.png

The recall of a row is the share of its dense softmax mass that lies on the keys of the index that
a method built: exp(lse of the sparse call - lse of the dense call), both from this package's own
kernels. Every method runs at several settings; density and time at a recall are interpolated
between them, for one setting that all heads share, and for a setting of its own for each head.
The oracle takes the best columns of each tile of 64 rows by their true mass, on every 16th tile.

Times are processor time of this process (use one thread); float32.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from heads import folder_of, layers
from safetensors.torch import load_file, save_file
from torch import Tensor

import sparse_attn
from sparse_attn import Pattern
from sparse_attn.demo import environment
from sparse_attn.env import command_line

RECALLS = (0.90, 0.95, 0.98)
ORACLE_SHARES = (0.01, 0.02, 0.04, 0.08, 0.12, 0.16, 0.24, 0.32, 0.48, 0.64, 0.8)
TENTH = 9  # place of the tenth worst of a tile's 64 rows
TILE = 64


def ladders(seqlen: int) -> dict[str, list[Pattern]]:
    """Every method with settings from sparse to dense."""
    p = sparse_attn
    return {
        "adaptive": [p.Adaptive(recall=r) for r in (0.88, *RECALLS, 0.99)],
        "a_shape": [
            p.AShape(sink=128, window=seqlen * share // 16) for share in (1, 2, 4, 6, 8, 12)
        ],
        "block_sparse top-k": [
            p.BlockSparse(density=share) for share in (0.05, 0.1, 0.2, 0.35, 0.5, 0.7)
        ],
        "block_sparse top-p": [p.BlockSparse(top_p=x) for x in (0.8, 0.9, 0.95, 0.98, 0.99)],
        "vertical_slash": [
            p.VerticalSlash(vertical=seqlen * a // 64, slash=seqlen * b // 64)
            for a, b in ((2, 2), (4, 4), (8, 8), (8, 16), (16, 32))
        ],
        **_optional(),
    }


def _optional() -> dict[str, list[Pattern]]:
    """Methods that only some versions of the package have."""
    p: Any = sparse_attn
    found: dict[str, list[Pattern]] = {}
    if hasattr(p, "HiP"):
        found["hip"] = [p.HiP(mask_k=k) for k in (512, 1024, 2048, 4096)]
    if hasattr(p, "XAttention"):
        found["xattention"] = [p.XAttention(threshold=t) for t in (0.7, 0.8, 0.9, 0.95, 0.98)]
    if hasattr(p, "FlexPrefill"):
        found["flexprefill"] = [p.FlexPrefill(gamma=g) for g in (0.8, 0.9, 0.95, 0.98)]
    if hasattr(p, "SpargeAttention"):
        found["sparge"] = [p.SpargeAttention(top_p=x) for x in (0.8, 0.9, 0.95, 0.98)]
    if hasattr(p, "AnchorAttention"):
        found["anchor"] = [p.AnchorAttention(theta=t, step=4) for t in (-4.0, 0.0, 4.0, 8.0)]
    return found


# ------------------------------------------------------------------------------ measuring


def timed(call: Any) -> tuple[Any, float]:
    """Result and processor seconds."""
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def dense_lse(folder: Path, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, float]:
    """lse of dense attention and its processor seconds, computed once for captured heads."""
    file = folder / f"dense_{layer:02d}.safetensors"
    if not file.exists():
        (_, lse), seconds = timed(lambda: sparse_attn.attention(q, k, v, return_lse=True))
        save_file({"lse": lse, "seconds": torch.tensor(seconds)}, file)
    kept = load_file(file)
    return kept["lse"], float(kept["seconds"])


def tenth_worst(mass: Tensor) -> Tensor:
    """Mean over tiles of 64 rows of the tenth worst row, [heads]; full tiles only."""
    full = mass[:, : mass.shape[1] // TILE * TILE]
    return full.unflatten(1, (-1, TILE)).sort(-1).values[..., TENTH].mean(-1)


def measure(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> dict[str, Any]:
    """What one pattern keeps and costs on the heads of one layer."""
    index, select = timed(lambda: pattern.build(q, k))
    (_, own), attend = timed(lambda: sparse_attn.attention(q, k, v, index, return_lse=True))
    mass = torch.exp(own - lse)[0].clamp(max=1.0)
    lists = (index.block_indices, index.column_indices)
    return {
        "recall": mass.mean(-1).tolist(),
        "tenth_worst": tenth_worst(mass).tolist(),
        "p10": torch.quantile(mass, 0.1, dim=-1).tolist(),
        "density": index.density().tile_per_head.mean(0).expand(q.shape[1]).tolist(),
        "select_seconds": select,
        "attend_seconds": attend,
        "index_bytes": sum(x.numel() * x.element_size() for x in lists),
    }


def oracle(q: Tensor, k: Tensor) -> list[dict[str, Any]]:
    """Best columns of every 16th tile by true mass, at several shares of the allowed keys."""
    heads, seqlen = q.shape[1], q.shape[2]
    keys = k[0].repeat_interleave(heads // k.shape[1], 0)
    kept = {share: [] for share in ORACLE_SHARES}  # type: ignore[var-annotated]
    counts = []
    hidden = torch.ones(TILE, TILE, dtype=torch.bool).triu(1)
    for first in range(15 * TILE, seqlen - TILE + 1, 16 * TILE):
        end = first + TILE
        scores = q[0, :, first:end] @ keys[:, :end].transpose(1, 2) / math.sqrt(q.shape[3])
        scores[..., first:].masked_fill_(hidden, -math.inf)
        mass = scores.softmax(-1).mean(1).sort(-1, descending=True).values.cumsum(-1)
        counts.append(end)
        for share in ORACLE_SHARES:
            kept[share].append(mass[:, max(1, round(share * end)) - 1])
    weights = torch.tensor(counts, dtype=torch.float32)
    return [
        {
            "recall": torch.stack(masses, 1).mean(1).tolist(),
            "density": [float((weights * share).round().sum() / weights.sum())] * heads,
        }
        for share, masses in kept.items()
    ]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every method on every layer asked for."""
    name = (arguments.model, arguments.text, arguments.tokens)
    only = [int(x) for x in arguments.layers.split(",")] if arguments.layers else None
    methods = ladders(arguments.tokens)
    wanted = arguments.methods.split(",") if arguments.methods else [*methods, "oracle"]
    report: dict[str, Any] = {
        "command": command_line(["python", "benchmarks/recall.py", *sys.argv[1:]]),
        "environment": environment(),
        "model": arguments.model,
        "text": arguments.text,
        "tokens": arguments.tokens,
        "records": [],
    }
    for layer, *tensors in layers(*name, only):
        q, k, v = (x.float() for x in tensors)
        lse, seconds = dense_lse(folder_of(*name), layer, q, k, v)
        for method in wanted:
            if method == "oracle":
                found = [{"pattern": "oracle", **x} for x in oracle(q, k)]
            else:
                found = [{"pattern": repr(p), **measure(p, q, k, v, lse)} for p in methods[method]]
            report["records"] += [
                {"method": method, "layer": layer, "dense_seconds": seconds, **x} for x in found
            ]
        if arguments.json:  # after every layer: a run may be cut short
            Path(arguments.json).write_text(json.dumps(report) + "\n", encoding="utf-8")
    return report


# ------------------------------------------------------------------------------ reading


def at_recall(recalls: Sequence[float], values: Sequence[float], wanted: float) -> float:
    """`values` where the recall is `wanted`, by linear interpolation; NaN outside."""
    points = sorted(zip(recalls, values, strict=True))
    for (low, a), (high, b) in zip(points, points[1:], strict=False):
        if low <= wanted <= high:
            return a if high == low else a + (b - a) * (wanted - low) / (high - low)
    return points[0][1] if wanted < points[0][0] else math.nan


def curve(records: list[dict[str, Any]], method: str) -> list[dict[str, float]]:
    """Means over all layers and heads, one point a setting."""
    settings: dict[str, list[dict[str, Any]]] = {}
    place: dict[tuple[str, int], int] = {}
    for record in records:
        if record["method"] != method:
            continue
        key = (record["method"], record["layer"])
        place[key] = place.get(key, -1) + 1
        settings.setdefault(str(place[key]), []).append(record)
    points = []
    for group in settings.values():
        point = {}
        for field in ("recall", "density", "tenth_worst", "p10"):
            flat = [x for r in group for x in r.get(field, [])]
            point[field] = sum(flat) / len(flat) if flat else math.nan
        dense = sum(r["dense_seconds"] for r in group)
        for field in ("select_seconds", "attend_seconds"):
            point[field] = sum(r.get(field, math.nan) for r in group) / dense
        points.append(point)
    return sorted(points, key=lambda p: p["recall"])


def own_budget(records: list[dict[str, Any]], method: str, wanted: float) -> float:
    """Mean density at a recall when each head has a setting of its own; dense where none does."""
    found = []
    of_layer: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        if record["method"] == method:
            of_layer.setdefault(record["layer"], []).append(record)
    for group in of_layer.values():
        for head in range(len(group[0]["recall"])):
            recalls = [r["recall"][head] for r in group] + [1.0]
            density = [r["density"][head] for r in group] + [1.0]
            found.append(at_recall(recalls, density, wanted))
    return sum(found) / len(found)


def table(report: dict[str, Any]) -> str:
    """Markdown: density at each recall, and time as a share of our dense attention."""
    records = report["records"]
    lines = [
        "| method | "
        + " | ".join(f"density at {r}" for r in RECALLS)
        + " | own budget a head, at 0.95 | selection at 0.95 | selection + attention at 0.95 |",
        "|---" * (len(RECALLS) + 4) + "|",
    ]
    for method in dict.fromkeys(r["method"] for r in records):
        points = curve(records, method)
        recalls = [p["recall"] for p in points]
        cells = [at_recall(recalls, [p["density"] for p in points], r) for r in RECALLS]
        cells.append(own_budget(records, method, 0.95))
        select = at_recall(recalls, [p["select_seconds"] for p in points], 0.95)
        total = [p["select_seconds"] + p["attend_seconds"] for p in points]
        cells += [select, at_recall(recalls, total, 0.95)]
        shown = ["–" if math.isnan(c) else f"{c:.3f}" for c in cells]
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def plot(report: dict[str, Any], file: str) -> None:
    """Recall against tile density, one curve a method."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(7, 5))
    for method in dict.fromkeys(r["method"] for r in report["records"]):
        points = curve(report["records"], method)
        style = {"color": "black", "linestyle": "--"} if method == "oracle" else {"marker": "o"}
        x, y = ([p[field] for p in points] for field in ("density", "recall"))
        axes.plot(x, y, label=method, **style)
    axes.set(xlabel="tile density", ylabel="attention-mass recall", xlim=(0, 1), ylim=(0.5, 1))
    axes.set_title(f"{report['model']}, {report['text']}, {report['tokens']} tokens")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120, bbox_inches="tight")


def merged(files: Sequence[str]) -> dict[str, Any]:
    """Reports of other layers or methods of one model and text as one."""
    reports = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
    return {**reports[0], "records": [r for report in reports for r in report["records"]]}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="topics")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", help="comma-separated; default all")
    parser.add_argument("--methods", help="comma-separated; default all")
    parser.add_argument("--json", metavar="FILE", help="write every number to FILE")
    parser.add_argument("--table", metavar="FILE", nargs="+", help="only show these reports")
    parser.add_argument("--plot", metavar="FILE", help="with --table: draw the curves")
    arguments = parser.parse_args()
    if arguments.table:
        report = merged(arguments.table)
    else:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        report = run(arguments)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report) + "\n", encoding="utf-8")
    if arguments.plot:
        plot(report, arguments.plot)
    for method in dict.fromkeys(r["method"] for r in report["records"]):
        for point in curve(report["records"], method):
            print(method, {name: round(value, 4) for name, value in point.items()})
    print(table(report))


if __name__ == "__main__":
    main()
