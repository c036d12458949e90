# SPDX-License-Identifier: Apache-2.0
"""Prefill of a whole model with every method against torch SDPA: time, keys read, perplexity.

    python benchmarks/end_to_end.py --model smollm2 --text code --tokens 8192
    python benchmarks/end_to_end.py --model smollm2 --text emma --deb FILE --methods sdpa,adaptive
    python benchmarks/end_to_end.py --model smollm2 --table

A model of `heads.py` reads a real text once per method, all layers and heads with the same
setting, and each reading is timed: the whole, its attention, and of that the choice of keys; the
rest (projections, MLPs) is the same work for every method. Perplexity is teacher-forced over the
last `--scored` tokens, whose rows have the most keys to lose; the output layer is not timed.

Records go into `results/end_to_end_MODEL.json` after each method, in place of older ones of the
same method, so that a run may be cut into pieces; a file of other conditions is refused. Times are
processor time of this process (and wall time beside it, in the file).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from heads import MODELS, load_model, load_text, tokens_of
from torch import Tensor

from sparse_attn import Adaptive, AShape, BlockSparse, Dense, Pattern, VerticalSlash, presets
from sparse_attn.demo import DTYPES, answer_nll, densities, environment
from sparse_attn.env import command_line
from sparse_attn.index import SparseIndex
from sparse_attn.integrations.transformers import enable, wrapped_attention

RESULTS = Path(__file__).parent / "results"
WARM_UP_TOKENS = 64

#: None is transformers' own sdpa.
METHODS: dict[str, Pattern | None] = {
    "sdpa": None,
    "dense": Dense(),
    "adaptive 0.9": Adaptive(recall=0.9),
    "adaptive 0.95": Adaptive(recall=0.95),
    "adaptive 0.98": Adaptive(recall=0.98),
    "adaptive 0.99": Adaptive(recall=0.99),
    "vertical_slash 500+500": VerticalSlash(vertical=500, slash=500),
    "vertical_slash 1000+1500": VerticalSlash(vertical=1000, slash=1500),
    "a_shape 128+1024": AShape(sink=128, window=1024),
    "block_sparse top-p 0.95": BlockSparse(top_p=0.95),
    "block_sparse density 0.35": BlockSparse(density=0.35),
    "xattention": presets.xattention(),
    "flexprefill": presets.flexprefill(),
    "sparge": presets.sparge(),
    "hip": presets.hip(),
    "infinite_hip": presets.infinite_hip(),
    "anchor_attention": presets.anchor_attention(),
}


@dataclass
class Stopwatch:
    """Seconds that passed while it ran, added up."""

    cpu: float = 0.0
    wall: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts what the block takes."""
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.cpu += time.process_time() - cpu
        self.wall += time.perf_counter() - wall


@dataclass
class Reading:
    """What one pass over the text took, and the indexes that it built."""

    prefill: Stopwatch = field(default_factory=Stopwatch)
    attention: Stopwatch = field(default_factory=Stopwatch)
    selection: Stopwatch = field(default_factory=Stopwatch)
    indexes: list[SparseIndex] = field(default_factory=list)


@dataclass(frozen=True)
class _Watched(Pattern):
    """A pattern whose choices are timed, and kept to be weighed when no clock runs."""

    inner: Pattern
    reading: Reading = field(hash=False, compare=False)

    def build(self, q: Tensor, k: Tensor, **options: Any) -> SparseIndex:
        with self.reading.selection.running():
            index = self.inner.build(q, k, **options)
        self.reading.indexes.append(index)
        return index


def read(model: Any, ids: Tensor, pattern: Pattern | None) -> tuple[Tensor, Reading]:
    """One timed pass: the last hidden states [1, seqlen, width], and what it took."""
    reading = Reading()

    def clocked(function: Any, *args: Any, **kwargs: Any) -> Any:
        with reading.attention.running():
            return function(*args, **kwargs)

    watched = Dense() if pattern is None else _Watched(pattern, reading)
    with enable(pattern=watched) as handle:
        implementation = "sdpa" if pattern is None else handle.name
        model.set_attn_implementation(implementation)
        try:
            with wrapped_attention(implementation, clocked), reading.prefill.running():
                hidden = model.model(ids, use_cache=False).last_hidden_state
        finally:
            model.set_attn_implementation("sdpa")
    return hidden, reading


def measure(model: Any, ids: Tensor, method: str, scored: int) -> dict[str, Any]:
    """The record of one method."""
    pattern = METHODS[method]
    read(model, ids[:, :WARM_UP_TOKENS], pattern)  # first calls allocate and load code
    hidden, reading = read(model, ids, pattern)
    element, tile = densities(reading.indexes)
    record: dict[str, Any] = {"method": method, "pattern": repr(pattern)}
    for part in ("prefill", "attention", "selection"):
        watch: Stopwatch = getattr(reading, part)
        record |= {f"{part}_cpu_s": watch.cpu, f"{part}_wall_s": watch.wall}
    record["perplexity"] = math.exp(answer_nll(model, hidden, ids, ids.shape[1] - scored)[0])
    return {**record, "element_density": element, "tile_density": tile}


# ------------------------------------------------------------------------------ reporting


def table(report: dict[str, Any]) -> str:
    """Markdown, methods in the order of METHODS; ratios are to sdpa, if it was measured."""
    of_method = {r["method"]: r for r in report["records"]}
    peer = of_method.get("sdpa")
    titles = (
        "prefill, s",
        "speed-up",
        "selection, s",
        "kernel, s",
        "attention speed-up",
        "rest, s",
    )
    titles += (f"perplexity, last {report['scored']:,}", "to sdpa", "tile density")
    lines = ["| method | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for method in filter(of_method.__contains__, METHODS):
        r = of_method[method]
        prefill, attention, selection = (
            r[f"{part}_cpu_s"] for part in ("prefill", "attention", "selection")
        )
        cells = [
            f"{prefill:.1f}",
            f"{peer['prefill_cpu_s'] / prefill:.2f}" if peer else "–",
            f"{selection:.2f}",
            f"{attention - selection:.2f}",
            f"{peer['attention_cpu_s'] / attention:.2f}" if peer else "–",
            f"{prefill - attention:.1f}",
            f"{r['perplexity']:.3f}",
            f"{r['perplexity'] / peer['perplexity'] - 1:+.2%}" if peer else "–",
            f"{r['tile_density']:.3f}",
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def opened(file: Path, conditions: dict[str, Any]) -> dict[str, Any]:
    """The report in `file`, or a new one.

    Raises:
        SystemExit: the file was measured under other conditions.
    """
    if not file.exists():
        return {**conditions, "records": []}
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    other = [name for name, value in conditions.items() if report.get(name) != value]
    if other:
        raise SystemExit(
            f"{file} has another {', '.join(other)}; remove it, or pass another --json."
        )
    return report


def keep(
    report: dict[str, Any], record: dict[str, Any], case: Sequence[str], file: Path, program: str
) -> None:
    """Puts a record into the report, in place of the one of the same case, and writes it.

    Args:
        report: as `opened` gave it.
        record: the new record; the command is added.
        case: names of the entries that say which case a record is of.
        file: the report's.
        program: the benchmark's file name.
    """
    record["command"] = command_line(["python", f"benchmarks/{program}", *sys.argv[1:]])
    others = [r for r in report["records"] if any(r[name] != record[name] for name in case)]
    report["records"] = [*others, record]
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def run(arguments: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Every method asked for, written after each."""
    wanted = arguments.methods.split(",") if arguments.methods else list(METHODS)
    unknown = [name for name in wanted if name not in METHODS]
    if unknown:
        raise SystemExit(f"unknown methods {unknown}; there are: {', '.join(METHODS)}")
    torch.set_num_threads(arguments.threads)
    report = opened(
        file,
        {
            "environment": environment(),
            "model": arguments.model,
            "text": arguments.text,
            "tokens": arguments.tokens,
            "scored": arguments.scored,
            "dtype": arguments.dtype,
        },
    )
    model, tokenizer = load_model(arguments.model, DTYPES[arguments.dtype])
    ids = tokens_of(tokenizer, load_text(arguments.text, arguments.deb), arguments.tokens)
    for method in wanted:
        record = measure(model, ids, method, arguments.scored)
        keep(report, record, ["method"], file, "end_to_end.py")
        print(f"{method}: {record['prefill_cpu_s']:.1f} s, {record['perplexity']:.3f}", flush=True)
    return report


def parser_of(description: str | None, name: str) -> argparse.ArgumentParser:
    """Arguments that benchmarks of whole models have in common.

    Args:
        description: the module's docstring.
        name: of its results.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=tuple(MODELS), default="smollm2")
    parser.add_argument("--text", default="code", help="as in heads.py (%(default)s)")
    parser.add_argument("--deb", metavar="FILE", help="r-cran-janeaustenr_*.deb, for emma")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(%(default)s)")
    parser.add_argument("--json", metavar="FILE", help=f"default results/{name}_MODEL.json")
    parser.add_argument("--table", action="store_true", help="only show what the file holds")
    return parser


@torch.no_grad()
def main() -> None:
    """The command."""
    parser = parser_of(__doc__, "end_to_end")
    parser.add_argument("--tokens", type=int, default=8192, help="(%(default)s)")
    parser.add_argument("--scored", type=int, default=2048, help="last tokens (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--methods", help="comma-separated; default all")
    arguments = parser.parse_args()
    if not 0 < arguments.scored < arguments.tokens:
        raise SystemExit("--scored must be at least 1 and below --tokens.")
    file = Path(arguments.json or RESULTS / f"end_to_end_{arguments.model}.json")
    if arguments.table:
        report = json.loads(file.read_text(encoding="utf-8"))
    else:
        report = run(arguments, file)
    print(table(report))


if __name__ == "__main__":
    main()
