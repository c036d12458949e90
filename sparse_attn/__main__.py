# SPDX-License-Identifier: Apache-2.0
"""Command line: ``python -m sparse_attn`` and a subcommand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sparse_attn import bench, demo, env, tune
from sparse_attn.calibration import command as calibration
from sparse_attn.heads import command as heads


def print_environment(arguments: argparse.Namespace) -> int:
    """The subcommand ``env``; returns the exit status."""
    print(env.text())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that `argv` names; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sparse_attn",
        description="Attention where every head reads only the keys it needs.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    demo.add_command(commands)
    bench.add_command(commands)
    heads.add_command(commands)
    tune.add_command(commands)
    calibration.add_command(commands)
    parser_of_env = commands.add_parser(
        "env", help="print what a bug report needs to know of this installation"
    )
    parser_of_env.set_defaults(run=print_environment)
    arguments = parser.parse_args(argv)
    arguments.command_line = ["python", "-m", "sparse_attn", *(argv or sys.argv[1:])]
    status: int = arguments.run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
