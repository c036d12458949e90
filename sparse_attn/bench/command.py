# SPDX-License-Identifier: Apache-2.0
"""``python -m sparse_attn bench``: arguments, the run, and where its results go."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from sparse_attn.env import command_line

from . import accuracy, peers, report
from .cases import DTYPES, KINDS
from .machine import Machine, Unavailable
from .runner import Results, Settings, environment, machine_limits, run_group
from .suites import CAPABILITIES, SUITES, Options, custom

_EXAMPLES = """\
examples:
  python -m sparse_attn bench --suite prefill --json prefill.json
  python -m sparse_attn bench --seqlen 8192 --dtype bfloat16 --density 1 0.1 0.02 --plot plots
  python -m sparse_attn bench --phase decode --heads 32 --heads-kv 8 --seqlen 32768
  python -m sparse_attn bench --table prefill.json
"""


def add_command(commands: Any) -> None:
    """Add ``bench`` to the subcommands of an argument parser."""
    parser = commands.add_parser(
        "bench",
        help="speed beside other attention on this machine, and the machine's own limits",
        description="Times attention of this package and of its peers in turn, in one process.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--suite",
        nargs="+",
        choices=[*SUITES, "accuracy"],
        default=[],
        help="presets with goals, each under two minutes; the options below change them",
    )
    what.add_argument("--phase", choices=["prefill", "decode"], default="prefill")
    what.add_argument("--seqlen", type=int, nargs="+", default=[], help="lengths, tokens")
    what.add_argument("--head-dim", type=int, nargs="+", default=[])
    what.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=[])
    what.add_argument("--batch", type=int, default=1)
    what.add_argument("--heads", type=int, help="query heads; default 1, decode 8")
    what.add_argument("--heads-kv", type=int, help="default as many as query heads, decode suite 8")
    what.add_argument(
        "--density", type=float, nargs="+", default=[], help="in (0, 1]; 1 is dense attention"
    )
    what.add_argument(
        "--pattern", nargs="+", choices=KINDS, default=[], help="sparse choices; default blocks"
    )
    what.add_argument("--block-m", type=int, default=64, help="rows of a tile")
    what.add_argument("--block-n", type=int, default=64, help="keys of a block")
    what.add_argument(
        "--capability", nargs="+", choices=CAPABILITIES, help="instruction sets, one after another"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--peers", nargs="*", choices=list(peers.PEERS), default=list(peers.PEERS))
    how.add_argument("--vllm", help="vLLM's CPU kernels: its wheel, its folder or the .so")
    how.add_argument("--threads", type=int, default=1)
    how.add_argument("--rounds", type=int, default=9, help="at most; at least 3 are done")
    how.add_argument("--seconds", type=float, default=20.0, help="per group, after preparation")
    how.add_argument(
        "--clock", choices=["cpu", "wall"], default="cpu", help="what rates and ratios are from"
    )
    output = parser.add_argument_group("results")
    output.add_argument("--json", help="file to write")
    output.add_argument("--plot", help="folder for plots against density (needs matplotlib)")
    output.add_argument(
        "--table",
        nargs="+",
        metavar="FILE",
        help="run nothing: print the Markdown tables of --json files, and plot them with --plot",
    )


def options_of(arguments: argparse.Namespace) -> Options:
    """The options that suites read."""
    return Options(
        seqlen=tuple(arguments.seqlen),
        head_dim=tuple(arguments.head_dim),
        dtype=tuple(arguments.dtype),
        heads=arguments.heads,
        heads_kv=arguments.heads_kv,
        batch=arguments.batch,
        threads=arguments.threads,
        density=tuple(arguments.density),
        kind=tuple(arguments.pattern),
        block_m=arguments.block_m,
        block_n=arguments.block_n,
        capability=tuple(arguments.capability or (None,)),
        peers=tuple(arguments.peers),
        phase=arguments.phase,
    )


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run what the arguments ask for; the document that --json writes."""
    peers.use_vllm(arguments.vllm)
    results = Results()
    machine: Machine | None = None
    try:
        machine = Machine(arguments.threads)
    except Unavailable as error:
        results.skipped["limits of the machine", str(error)] = 1
    settings = Settings(
        machine, arguments.rounds, arguments.seconds, arguments.clock, lambda line: print(line)
    )
    limits = machine_limits(machine, min(5, arguments.rounds), arguments.clock)
    print(report.limits_table(limits), flush=True)
    options = options_of(arguments)
    for suite in arguments.suite or [""]:
        if suite == "accuracy":
            results.goals += accuracy.run(options, settings.say)
            continue
        for group in SUITES[suite](options) if suite else custom(options):
            run_group(group, settings, results, suite)
    return {
        "command": command_line(arguments.command_line),
        "env": environment(),
        "clock": arguments.clock,
        "machine": {"threads": arguments.threads, "limits": limits},
        "records": results.records,
        "goals": results.goals,
        "skipped": [
            {"implementation": who, "reason": reason, "cases": cases}
            for (who, reason), cases in results.skipped.items()
        ],
    }


def run(arguments: argparse.Namespace) -> int:
    """The subcommand; returns the exit status."""
    if arguments.table:
        documents = [json.loads(Path(file).read_text()) for file in arguments.table]
        print("\n\n".join(map(report.markdown, documents)))
        for document in documents if arguments.plot else ():
            report.plot(document, Path(arguments.plot))
        return 0
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            document = measure(arguments)
    finally:
        torch.set_num_threads(threads)
    for part in (
        report.text_table(document["records"]),
        report.goals_table(document["goals"]),
        report.skipped_table(document["skipped"]),
    ):
        if part:
            print(part + "\n")
    if arguments.json:
        path = Path(arguments.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.plot:
        for file in report.plot(document, Path(arguments.plot)):
            print(f"wrote {file}")
    return 0
