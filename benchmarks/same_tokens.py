# SPDX-License-Identifier: Apache-2.0
"""Whether models generate what they generate with transformers' sdpa, in float32.

    python benchmarks/same_tokens.py --model smollm2
    python benchmarks/same_tokens.py --table

A model of `heads.py` continues real text greedily, with sdpa and with this package, over every kind
of cache (dynamic, static), padding (none, left) and batch (1, 2), with `Dense` and with patterns
whose budget is above the length, so that they choose every key, by their own code. Tokens must be
equal. The logits of each step are held against those of the same model in float64 (where
transformers' norms and rotations stay float32): their error may be twice that of sdpa's logits plus
two units of rounding, `tests/bounds.py`. Padding on the right, which `generate` cannot have, is
tried in one pass over the text without a cache.

Where tokens differ the record says at which step, by how much the two best logits differ there in
float64, and how wrong both runs' logits are: a tie within the rounding, or a fault.
Records go into `results/same_tokens.json`, in place of older ones of the same case.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from end_to_end import RESULTS, keep, opened
from heads import MODELS, load_model, load_text, tokens_of
from torch import Tensor

from sparse_attn import AShape, VerticalSlash
from sparse_attn.demo import environment
from sparse_attn.integrations.transformers import enable

#: The window of gemma3's sliding layers is 512: its text is longer.
TOKENS = {"smollm2": 192, "q05": 192, "gemma3": 640}
BEYOND = 4096
CHOICES: dict[str, Any] = {
    "Dense": "dense",
    "AShape": AShape(sink=0, window=BEYOND),
    "VerticalSlash": VerticalSlash(vertical=BEYOND, slash=BEYOND),
}


class Case(NamedTuple):
    """What is asked of a model; a pass without a cache generates nothing."""

    cache: str
    padding: str
    batch: int


class Run(NamedTuple):
    """What a model gave: tokens int64 [batch, new], and logits [batch, new, words] before each."""

    tokens: Tensor
    logits: Tensor


def cases() -> Iterator[Case]:
    """Every combination."""
    yield from itertools.starmap(
        Case, itertools.product(("dynamic", "static"), ("none", "left"), (1, 2))
    )
    yield from itertools.starmap(Case, itertools.product(("none",), ("none", "right"), (1, 2)))


def prompts(ids: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Tokens and padding mask, int64 [batch, length]: the last row is a quarter padding."""
    ids = ids[: case.batch]
    mask = torch.ones_like(ids)
    padding = ids.shape[1] // 4
    if case.padding == "left":
        mask[-1, :padding] = 0
    elif case.padding == "right":
        mask[-1, -padding:] = 0
    return ids * mask, mask


def run(model: Any, ids: Tensor, mask: Tensor, cache: str, new: int) -> Run:
    """One greedy generation; without a cache, logits of the last rows that are real in all."""
    if cache == "none":
        end = int(mask.sum(-1).min())
        rows = torch.arange(end - new, end)
        logits = model(ids, attention_mask=mask, use_cache=False, logits_to_keep=rows).logits
        return Run(logits.argmax(-1), logits)
    found = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        cache_implementation=cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return Run(found.sequences[:, ids.shape[1] :], torch.stack(found.logits, 1))


def oracle(model64: Any, ids: Tensor, mask: Tensor, cache: str, peer: Run) -> Tensor:
    """Logits in float64 where the tokens are the peer's, [batch, new, words]."""
    new = peer.tokens.shape[1]
    if cache == "none":
        return run(model64, ids, mask, cache, new).logits
    whole = torch.cat((ids, peer.tokens[:, :-1]), 1)
    seen = torch.cat((mask, torch.ones_like(peer.tokens[:, :-1])), 1)
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    given = {"attention_mask": seen, "position_ids": positions, "logits_to_keep": new}
    logits: Tensor = model64(whole, use_cache=False, **given).logits
    return logits


def compared(ours: Run, peer: Run, exact: Tensor) -> dict[str, Any]:
    """What two runs have in common; logits are compared up to the first token that differs."""
    differs = (ours.tokens != peer.tokens).any(0)
    equal = int(differs.to(torch.int64).argmax()) if bool(differs.any()) else len(differs)
    upto = slice(0, min(equal + 1, len(differs)))
    error = (ours.logits[:, upto].double() - exact[:, upto]).abs().amax().item()
    peer_error = (peer.logits[:, upto].double() - exact[:, upto]).abs().amax().item()
    unit = 2 * torch.finfo(torch.float32).eps * exact[:, upto].abs().amax().item()
    record: dict[str, Any] = {
        "equal_tokens": equal,
        "logit_error": error,
        "sdpa_logit_error": peer_error,
        "bound": 2 * (peer_error + unit),
        "within": error <= 2 * (peer_error + unit),
    }
    if equal < len(differs):
        row = int((ours.tokens[:, equal] != peer.tokens[:, equal]).to(torch.int64).argmax())
        best = exact[row, equal].topk(2).values
        record |= {"row": row, "margin_in_float64": (best[0] - best[1]).item()}
    return record


def measure(
    model: Any, model64: Any, ids: Tensor, new: int, wanted: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The records of one model."""
    exact: dict[tuple[str, int, bool], tuple[Tensor, Tensor]] = {}
    for case in cases():
        if any(str(getattr(case, name)) not in getattr(wanted, name) for name in Case._fields):
            continue
        given = prompts(ids, case)
        model.set_attn_implementation("sdpa")
        peer = run(model, *given, case.cache, new)
        key = (case.padding, case.batch, case.cache == "none")
        if key not in exact or not torch.equal(exact[key][0], peer.tokens):
            exact[key] = (peer.tokens, oracle(model64, *given, case.cache, peer))
        for name in wanted.choice:
            choice = CHOICES[name]
            with enable(choice, decode=choice) as handle:
                model.set_attn_implementation(handle.name)
                ours = run(model, *given, case.cache, new)
            record = {**case._asdict(), "choice": name, "tokens": ids.shape[1], "new": new}
            yield record | compared(ours, peer, exact[key][1])


def table(report: dict[str, Any]) -> str:
    """Markdown: a row for each model and choice."""
    lines = [
        "| model | choice | cases | tokens a case | cases with the tokens of sdpa | "
        "largest error of a logit / sdpa's | largest error / bound |",
        "|---" * 7 + "|",
    ]
    for model, choice in itertools.product(MODELS, CHOICES):
        own = [r for r in report["records"] if (r["model"], r["choice"]) == (model, choice)]
        if own:
            same = sum(r["equal_tokens"] == r["new"] for r in own)
            errors = (max(r[name] for r in own) for name in ("logit_error", "sdpa_logit_error"))
            used = max(r["logit_error"] / r["bound"] for r in own)
            lines.append(
                f"| {model} | {choice} | {len(own)} | {own[0]['new']} | {same} | "
                + " / ".join(f"{x:.1e}" for x in errors)
                + f" | {used:.2f} |"
            )
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=tuple(MODELS), default="smollm2")
    parts = {"cache": "dynamic,static,none", "padding": "none,left,right", "batch": "1,2"}
    for name, default in (parts | {"choice": ",".join(CHOICES)}).items():
        text = "only these (%(default)s)"
        parser.add_argument(f"--{name}", type=lambda x: x.split(","), default=default, help=text)
    parser.add_argument("--new", type=int, default=64, help="generated tokens (%(default)s)")
    parser.add_argument("--json", metavar="FILE", default=str(RESULTS / "same_tokens.json"))
    parser.add_argument("--table", action="store_true", help="only show what the file holds")
    arguments = parser.parse_args()
    file = Path(arguments.json)
    if arguments.table:
        print(table(json.loads(file.read_text(encoding="utf-8"))))
        return
    os.environ["SPARSE_ATTN_FALLBACK"] = "0"  # a pattern that is not run tests nothing
    torch.set_num_threads(1)
    report = opened(file, {"environment": environment(), "dtype": "float32", "text": "topics"})
    model, tokenizer = load_model(arguments.model, torch.float32)
    length = TOKENS[arguments.model]
    ids = tokens_of(tokenizer, load_text("topics"), 2 * length).view(2, length)
    model64 = copy.deepcopy(model).double()
    for record in measure(model, model64, ids, arguments.new, arguments):
        record["model"] = arguments.model
        keep(report, record, ["model", *Case._fields, "choice"], file, Path(__file__).name)
        print(
            *(record[name] for name in (*Case._fields, "choice", "equal_tokens", "within")),
            f"{record['logit_error']:.2e} {record['sdpa_logit_error']:.2e}",
            flush=True,
        )
    print(table(report))


if __name__ == "__main__":
    main()
