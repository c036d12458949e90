# SPDX-License-Identifier: Apache-2.0
"""A head plan against uniform A-shapes of equal time, on a text that it has not seen.

    python -m sparse_attn calibrate smollm2 --output plan.json
    python benchmarks/calibrated.py --plan plan.json --text emma --deb FILE --json FILE

One reading each: exact, with the plan, and with an A-shape of 64 sinks and each of `--windows` in
all heads; processor time of attention, and perplexity of the last `--scored` tokens. The plan is
compared with the cheapest A-shape that takes at least as long, so the A-shape has the advantage.
Needles are those of the demo, hidden in the first 2,048 tokens: perplexity hardly shows lost facts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from heads import MODELS, load_model, load_text, tokens_of

from sparse_attn import AShape, Dense, HeadPlan
from sparse_attn.calibration.command import reading
from sparse_attn.demo import DTYPES, NEEDLES, Variant, environment, find_needles
from sparse_attn.env import command_line

SINK = 64
WARM_UP_TOKENS = 64


def record(
    model: Any, tokenizer: Any, ids: torch.Tensor, name: str, choice: Any, scored: int
) -> dict[str, Any]:
    """One reading."""
    reading(model, ids[:, :WARM_UP_TOKENS], choice)
    perplexity, seconds = reading(model, ids, choice, ids.shape[1] - scored)
    layers = range(model.config.num_hidden_layers)
    variant = Variant(name, tuple(choice(n) if callable(choice) else choice for n in layers))
    found, nll = find_needles(model, tokenizer, ids, variant)
    print(
        f"{name}: {seconds:.1f} s of attention, perplexity {perplexity:.3f}, "
        f"{found} of {len(NEEDLES)} needles",
        flush=True,
    )
    return {
        "choice": name,
        "attention_cpu_s": seconds,
        "perplexity": perplexity,
        "needles_found": found,
        "needles": len(NEEDLES),
        "needle_nll": nll,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=tuple(MODELS), default="smollm2")
    parser.add_argument("--plan", required=True, help="a file, or the name of a ready plan")
    parser.add_argument("--text", default="code", help="as in heads.py (%(default)s)")
    parser.add_argument("--deb", metavar="FILE", help="r-cran-janeaustenr_*.deb, for emma")
    parser.add_argument("--tokens", type=int, default=8192, help="(%(default)s)")
    parser.add_argument("--scored", type=int, default=2048, help="last tokens (%(default)s)")
    parser.add_argument("--windows", default="1536,2048,2560", help="(%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write every number to FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(arguments.model, DTYPES[arguments.dtype])
    ids = tokens_of(tokenizer, load_text(arguments.text, arguments.deb), arguments.tokens)
    file = Path(arguments.plan)
    plan = HeadPlan.load(file) if file.exists() else HeadPlan.ready(arguments.plan)
    plan.check_model(model)

    choices: dict[str, Any] = {"dense": Dense(), "plan": plan}
    for window in sorted(map(int, arguments.windows.split(","))):
        choices[f"a_shape {SINK}+{window}"] = AShape(sink=SINK, window=window)
    records = [record(model, tokenizer, ids, *item, arguments.scored) for item in choices.items()]
    ours = records[1]
    rivals = [r for r in records[2:] if r["attention_cpu_s"] >= ours["attention_cpu_s"]]
    rival = min(rivals, key=lambda r: r["attention_cpu_s"], default=None)
    report = {
        "command": command_line(["python", "benchmarks/calibrated.py", *sys.argv[1:]]),
        "environment": environment(),
        "model": arguments.model,
        "text": arguments.text,
        "tokens": arguments.tokens,
        "scored": arguments.scored,
        "dtype": arguments.dtype,
        "records": records,
        "a_shape_of_equal_time": rival and rival["choice"],
    }
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    exact = records[0]["perplexity"]
    for r in filter(None, (ours, rival)):
        print(f"{r['choice']}: perplexity {r['perplexity'] / exact - 1:+.2%} of dense")


if __name__ == "__main__":
    with torch.no_grad():
        main()
