"""`dynllava bench PHASE`: which measurement the command line asks for."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dynllava_plugin.bench.parsers import REPORT, add_arguments
from dynllava_plugin.errors import UserError

__all__ = ["add_arguments", "main", "run"]


def run(args: argparse.Namespace) -> int:
    """Measure; 130 where the user interrupts, with the rows so far kept."""
    if args.phase == REPORT:
        from dynllava_plugin.bench.report import report

        report(args.files, args.output)
        return 0
    if args.phase == "train":
        from dynllava_plugin.bench.train import run_train

        return run_train(args)
    if args.phase == "harness":
        from dynllava_plugin.bench.harness import run_harness

        return run_harness(args)
    if args.phase == "serve":
        from dynllava_plugin.bench.serving import run_serve

        return run_serve(args)
    from dynllava_plugin.bench.measuring import measure

    return measure(args)


def main(arguments: list[str] | None = None) -> int:
    """`python -m dynllava_plugin.bench`."""
    parser = argparse.ArgumentParser(
        prog="dynllava bench", description="Time and memory with random weights."
    )
    add_arguments(parser)
    args: Any = parser.parse_args(arguments)
    try:
        return run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
