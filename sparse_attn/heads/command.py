# SPDX-License-Identifier: Apache-2.0
"""Head plans: convert those of other projects, check them, show them.

    python -m sparse_attn heads convert minference.json plan.json --config config.json
    python -m sparse_attn heads validate plan.json --config config.json
    python -m sparse_attn heads show smollm2

FILE is a plan of this project, one of its ready plans, or a plan of MInference, DuoAttention, MoA
or Qwen2.5-1M as it was published.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from sparse_attn.heads.plan import HeadPlan, ready_plans
from sparse_attn.heads.readers import FORMS, read_plan


def add_command(commands: Any) -> None:
    """Add ``heads`` to the subcommands of ``python -m sparse_attn``."""
    parser = commands.add_parser(
        "heads",
        help="head plans: convert those of other projects, check them, show them",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    for name, say, text in (
        ("convert", _convert, "write a plan of another project as one of this"),
        ("validate", _validate, "check a plan, and whether it fits a model"),
        ("show", str, "print which head has which pattern"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument(
            "file", metavar="FILE", help="a plan; ready: " + ", ".join(ready_plans())
        )
        if name == "convert":
            action.add_argument("output", metavar="OUTPUT", help="the plan to write")
        _add_options(action)
        action.set_defaults(run=run, say=say)


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--form", choices=("auto", *FORMS), default="auto", help="(%(default)s)")
    add("--config", metavar="FILE", help="the model's config.json: its heads, and a check")
    add("--num-heads", type=int, metavar="N", help="query heads of a layer, without --config")
    add("--num-heads-kv", type=int, metavar="N", help="KV heads of a layer, without --config")
    add("--tokens", type=int, metavar="N", help="MoA: prompt and new tokens")
    add("--sparsity", type=float, metavar="SHARE", help="DuoAttention: share that streams")
    add("--sink", type=int, default=64, metavar="N", help="DuoAttention (%(default)s)")
    add("--recent", type=int, default=256, metavar="N", help="DuoAttention (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """The subcommand; returns the exit status."""
    options = vars(arguments)
    names = ("form", "config", "num_heads", "num_heads_kv", "tokens", "sparsity", "sink", "recent")
    try:
        if arguments.file in ready_plans():
            plan = HeadPlan.ready(arguments.file)
        else:
            plan = read_plan(arguments.file, **{name: options[name] for name in names})
        say: Callable[..., str] = arguments.say
        print(say(plan) if say is str else say(plan, arguments))
    except (OSError, TypeError, ValueError) as error:
        print(error)
        return 1
    return 0


def _convert(plan: HeadPlan, arguments: argparse.Namespace) -> str:
    plan.save(arguments.output)
    return f"wrote {arguments.output}: {_summary(plan)}"


def _validate(plan: HeadPlan, arguments: argparse.Namespace) -> str:
    fits = f", fits {arguments.config}" if arguments.config else ""
    return f"{arguments.file}: valid, {_summary(plan)}{fits}"


def _summary(plan: HeadPlan) -> str:
    return (
        f"{plan.num_layers} layers of {plan.num_heads} query heads ({plan.num_heads_kv} KV heads), "
        f"{len(plan.counts())} patterns"
    )
