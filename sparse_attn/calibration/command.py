# SPDX-License-Identifier: Apache-2.0
"""Calibrate a model: choose a pattern for every head from what it does on a text.

    python -m sparse_attn calibrate smollm2 --budget 5m --output plan.json --report plan.html

The model reads the first tokens of the text with exact attention while candidates are tried on
every head; then it reads the tokens that follow twice, exactly and with the plan, to say what the
plan costs in perplexity. What was measured is kept in a state file beside the plan: the same
command goes on where it stopped. The budget is kept on any machine: what it has no time for is
left out (candidates, then layers, then tokens of the check), and the plan says what.
"""

from __future__ import annotations

import argparse
import importlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_attn.attention import attention
from sparse_attn.calibration.calibrate import calibrate_with_trials, seconds_of
from sparse_attn.calibration.measure import TimeUp, default_candidates
from sparse_attn.calibration.report import check_file, write_report
from sparse_attn.demo import DTYPES, answer_nll, read_text
from sparse_attn.heads import HeadPlan
from sparse_attn.heads.plan import text_config
from sparse_attn.integrations import smollm2
from sparse_attn.integrations.transformers import enable, wrapped_attention
from sparse_attn.patterns import Dense

MEASURING = 0.6  # part of the budget for trials; the check takes the rest
ENDING = 0.06  # part of the budget that is left for the report and for starting Python
PROBE = 512  # tokens that are read to know how long the check will take


def add_command(commands: Any) -> None:
    """Add ``calibrate`` to the subcommands of ``python -m sparse_attn``."""
    parser = commands.add_parser(
        "calibrate",
        help="choose a pattern for every head of a model from what it does on a text",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="smollm2, or what transformers loads: a folder or a name")
    add("--text", metavar="FILE", help="UTF-8 text (default: Python's help topics)")
    add("--budget", default="5m", help="wall time for all: 90s, 5m, 1h (%(default)s)")
    add("--tokens", type=int, default=8192, help="to calibrate with (%(default)s)")
    add("--recall", type=float, default=0.98, help="mean over heads (%(default)s)")
    add("--floor", type=float, default=0.9, help="recall of every head (%(default)s)")
    add("--output", metavar="FILE", default="plan.json", help="the plan (%(default)s)")
    add("--state", metavar="FILE", help="measurements (default: OUTPUT.state)")
    add("--report", metavar="FILE", help="write a report, .html or .png")
    add("--dtype", choices=DTYPES, default="float32", help="(%(default)s)")
    add("--threads", type=int, help="torch threads (default: torch's own choice)")
    add("--no-check", action="store_true", help="don't measure perplexity at the end")
    add("--dry-run", action="store_true", help="say what would be done and how long it takes")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The subcommand; returns the exit status."""
    try:
        return _run(arguments)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(error)
        return 1


def _run(arguments: argparse.Namespace) -> int:
    begin = time.monotonic()
    budget = seconds_of(arguments.budget)
    if arguments.report:
        check_file(arguments.report)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model, tokenizer = _load(arguments.model, DTYPES[arguments.dtype])
    text, source = read_text(arguments.text)
    ids, rest = _split(tokenizer, text, arguments.tokens, model)
    print(f"{arguments.model}: {ids.shape[1]} tokens of {source}, {arguments.dtype}")
    if arguments.dry_run:
        print(_forecast(model, ids.shape[1]))
        return 0
    state = arguments.state or f"{arguments.output}.state"
    end = begin + budget * (1 - ENDING)
    result = calibrate_with_trials(
        model,
        ids,
        budget=max(1e-3, (end - time.monotonic()) * (1.0 if arguments.no_check else MEASURING)),
        recall=arguments.recall,
        floor=arguments.floor,
        state=state,
        model_id=_name(arguments.model),
        progress=_progress,
    )
    plan = result.plan
    plan.measured["text"] = source  # type: ignore[index]
    if not arguments.no_check and rest.shape[1] >= 2:
        _checked(model, rest, plan, end)
    plan.measured["seconds"] = round(time.monotonic() - begin, 1)  # type: ignore[index]
    plan.save(arguments.output)
    use = _lines_to_paste(arguments.output)
    if arguments.report:
        write_report(arguments.report, result, use)
    print(f"\n{plan}\n\nwrote {arguments.output}; in Python:\n\n{use}")
    return 0


def _load(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    if name == "smollm2":
        smollm2.require_packages()
        return smollm2.load_model(dtype)
    transformers = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(name)


def _name(name: str) -> str:
    return smollm2.MODEL_NAME if name == "smollm2" else Path(name).name


def _split(tokenizer: Any, text: str, tokens: int, model: Any) -> tuple[Tensor, Tensor]:
    """Tokens to calibrate with, and those that follow for the check, at most as many."""
    longest = getattr(text_config(model), "max_position_embeddings", None) or tokens
    tokens = min(tokens, longest)
    ids: Tensor = tokenizer(text[: 16 * 2 * tokens], return_tensors="pt").input_ids
    if ids.shape[1] < 2:
        raise ValueError("sparse_attn.calibrate: the text has no two tokens; pass a longer one.")
    return ids[:, :tokens], ids[:, tokens : 2 * tokens]


def _progress(done: int, total: int, seconds: float) -> None:
    bar = "#" * (done * 30 // total)
    print(f"\r[{bar:30s}] layer {done} of {total}, {seconds:4.0f} s left ", end="", flush=True)


def _forecast(model: Any, tokens: int) -> str:
    """What a calibration does: candidates, and the time that they take on random heads."""
    config = text_config(model)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    q, k, v = torch.randn(3, 1, 1, tokens, size, generator=torch.Generator().manual_seed(0))
    lines, total = [], 0.0
    for pattern in (Dense(), *default_candidates(tokens)):
        start = time.thread_time()
        attention(q, k, v, pattern, fallback=False)
        spent = (time.thread_time() - start) * heads * layers
        total += spent
        lines.append(f"{spent:8.1f} s  {pattern}")
    wall = total / torch.get_num_threads()
    head = f"{layers} layers of {heads} heads; processor time of each candidate on all of them:"
    last = f"{wall:8.1f} s  together, on {torch.get_num_threads()} threads; less where heads need"
    return "\n".join([head, *lines, f"{last} no dear one, and never more than the budget allows"])


@torch.no_grad()
def reading(
    model: Any, ids: Tensor, choice: Any, start: int = 1, end: float = math.inf
) -> tuple[float, float]:
    """One pass over a text: perplexity from token `start` on, and attention's processor seconds.

    Args:
        model: a transformers model; it is left as it was.
        ids: int64 [1, tokens].
        choice: what `integrations.transformers.enable` takes.
        start: first position that is scored, at least 1.
        end: of the time, by `time.monotonic`.

    Raises:
        TimeUp: `end` came before the text's.
    """
    spent = 0.0

    def clocked(function: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal spent
        if time.monotonic() > end:
            raise TimeUp
        begin = time.process_time()
        out = function(*args, **kwargs)
        spent += time.process_time() - begin
        return out

    before = model.config._attn_implementation
    with enable(choice, name="sparse_attn_check") as handle:
        model.set_attn_implementation(handle.name)
        try:
            with wrapped_attention(handle.name, clocked):
                hidden = model.base_model(ids, use_cache=False).last_hidden_state
        finally:
            model.set_attn_implementation(before)
        return math.exp(answer_nll(model, hidden, ids, start)[0]), spent


def check(model: Any, ids: Tensor, plan: HeadPlan, end: float = math.inf) -> dict[str, float]:
    """Perplexity and attention's processor time over `ids`, exact and with the plan.

    As many tokens are read as the time up to `end` allows, by what the first few take.

    Raises:
        TimeUp: there is none, or it took longer than that.
    """
    probe, times = ids[:, :PROBE], []
    for _ in range(2):  # a first pass may load code, and others may be at work
        begin = time.monotonic()
        reading(model, probe, "dense", end=end)
        times.append(time.monotonic() - begin)
        if times[-1] > (end - time.monotonic()) / 20:
            break  # no time for another
    pace = min(times) / probe.shape[1]
    ids = ids[:, : _readable(pace, end - time.monotonic(), ids.shape[1], plan)]
    if ids.shape[1] < 2:
        raise TimeUp
    found: dict[str, float] = {"tokens": ids.shape[1]}
    for name, choice in (("dense", "dense"), ("plan", plan)):
        perplexity, seconds = reading(model, ids, choice, end=end)
        found[f"{name}_perplexity"] = round(perplexity, 4)
        found[f"{name}_attention_cpu_s"] = round(seconds, 3)
    return found


def _readable(pace: float, seconds: float, tokens: int, plan: HeadPlan) -> int:
    """How many of `tokens` can be read twice in `seconds`, `pace` being those of one of the first.

    Attention grows with the square: what it took of the calibrated tokens, on one thread, is added.
    """
    dense = plan.measured["dense_ms"] / 1e3 / plan.measured["tokens"] ** 2
    left = max(0.0, seconds)
    while tokens > 0 and 2 * (pace * tokens + dense * tokens**2) > left:
        tokens = tokens * 7 // 8
    return tokens


def _checked(model: Any, ids: Tensor, plan: HeadPlan, end: float) -> None:
    """Writes into the plan what its check found, or that there was no time for one."""
    try:
        found = plan.measured["check"] = check(model, ids, plan, end)  # type: ignore[index]
        cut = f"the check read {found['tokens']} of {ids.shape[1]} tokens"
        if found["tokens"] == ids.shape[1]:
            return
    except TimeUp:
        cut = "no time for the check: perplexity was not measured"
    plan.measured["cut"] = [*plan.measured.get("cut", ()), cut]  # type: ignore[index]


def _lines_to_paste(file: str) -> str:
    return f"from sparse_attn import HeadPlan\nHeadPlan.load({file!r}).enable(model)"
