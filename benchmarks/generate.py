# SPDX-License-Identifier: Apache-2.0
"""generate() of whole models with `Adaptive` against transformers' sdpa.

    python benchmarks/generate.py --model smollm2 --tokens 128,512,2048 --batch 1,2
    python benchmarks/generate.py --model smollm2 --tokens 8192 --rounds 1
    python benchmarks/generate.py --model smollm2 --table

A model of `heads.py` reads a real text and generates `--new` tokens greedily: prefill with the
pattern, decoding densely, as `enable` does by default. Both run in turn in one process, sdpa first
in even rounds and last in odd ones; times are processor time of this process (one thread), ratios
are medians of the rounds' ratios. The share of attention is what it takes of sdpa's prefill.

Records go into `results/generate_MODEL.json` after each case, in place of older ones of the same
case; a file of other conditions is refused.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from end_to_end import RESULTS, Stopwatch, keep, opened, parser_of, read
from heads import load_model, load_text, tokens_of
from torch import Tensor

from sparse_attn import Adaptive
from sparse_attn.demo import DTYPES, environment
from sparse_attn.integrations.transformers import enable


def seconds(model: Any, ids: Tensor, implementation: str, new: int) -> tuple[float, Tensor]:
    """Processor time of generate(), and what it gave."""
    model.set_attn_implementation(implementation)
    start = time.process_time()
    out: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )
    return time.process_time() - start, out[:, ids.shape[1] :]


def measure(model: Any, ids: Tensor, new: int, rounds: int) -> dict[str, Any]:
    """The record of one length and batch."""
    pattern = Adaptive()
    with enable(pattern=pattern) as handle:
        names = ("sdpa", handle.name)
        times: dict[str, list[float]] = {name: [] for name in names}
        given = {}
        try:
            for name in names:  # first calls allocate and load code
                seconds(model, ids[:, :64], name, 2)
            for turn in range(rounds):
                for name in names if turn % 2 == 0 else names[::-1]:
                    took, given[name] = seconds(model, ids, name, new)
                    times[name].append(took)
        finally:
            model.set_attn_implementation("sdpa")
        same = (given["sdpa"] == given[handle.name]).float().mean().item()
        ratios = [ours / theirs for theirs, ours in zip(*times.values(), strict=True)]
    reading = read(model, ids[:1], None)[1]  # a share, the same for every batch
    watches: tuple[Stopwatch, Stopwatch] = (reading.attention, reading.prefill)
    return {
        "tokens": ids.shape[1],
        "batch": ids.shape[0],
        "new": new,
        "rounds": rounds,
        "pattern": repr(pattern),
        "sdpa_cpu_s": median(times["sdpa"]),
        "ours_cpu_s": median(times[names[1]]),
        "ratio": median(ratios),
        "worst_ratio": max(ratios),
        "attention_share_of_prefill": watches[0].cpu / watches[1].cpu,
        "same_tokens": same,
    }


def table(report: dict[str, Any]) -> str:
    """Markdown, by batch and length."""
    lines = [
        "| tokens | batch | attention's share of prefill | sdpa, s | ours, s | ours / sdpa | "
        "worst round | rounds | same tokens |",
        "|---" * 9 + "|",
    ]
    for r in sorted(report["records"], key=lambda r: (r["batch"], r["tokens"])):
        lines.append(
            f"| {r['tokens']:,} | {r['batch']} | {r['attention_share_of_prefill']:.0%} | "
            f"{r['sdpa_cpu_s']:.2f} | {r['ours_cpu_s']:.2f} | {r['ratio']:.2f} | "
            f"{r['worst_ratio']:.2f} | {r['rounds']} | {r['same_tokens']:.0%} |"
        )
    return "\n".join(lines)


def run(arguments: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Every length and batch asked for, written after each."""
    torch.set_num_threads(1)
    conditions = {
        "environment": environment(),
        "model": arguments.model,
        "text": arguments.text,
        "dtype": arguments.dtype,
    }
    report = opened(file, conditions)
    model, tokenizer = load_model(arguments.model, DTYPES[arguments.dtype])
    text = load_text(arguments.text, arguments.deb)
    for batch in map(int, arguments.batch.split(",")):
        for tokens in map(int, arguments.tokens.split(",")):
            # Batch entries are neighbouring parts of the text, without padding.
            ids = tokens_of(tokenizer, text, tokens * batch).view(batch, tokens)
            record = measure(model, ids, arguments.new, arguments.rounds)
            keep(report, record, ["tokens", "batch"], file, "generate.py")
            print(f"{tokens} x {batch}: {record['ratio']:.3f} of sdpa", flush=True)
    return report


@torch.no_grad()
def main() -> None:
    """The command."""
    parser = parser_of(__doc__, "generate")
    parser.add_argument("--tokens", default="128,512,2048", help="lengths (%(default)s)")
    parser.add_argument("--batch", default="1", help="sizes (%(default)s)")
    parser.add_argument("--new", type=int, default=16, help="generated tokens (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    arguments = parser.parse_args()
    file = Path(arguments.json or RESULTS / f"generate_{arguments.model}.json")
    if arguments.table:
        report = json.loads(file.read_text(encoding="utf-8"))
    else:
        report = run(arguments, file)
    print(table(report))


if __name__ == "__main__":
    main()
