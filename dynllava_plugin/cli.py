"""The command `dynllava`: evaluation suites, tables, benchmarks, data sets, versions."""

from __future__ import annotations

import argparse
import sys

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation import table_command
from dynllava_plugin.evaluation.generation import command as build_command
from dynllava_plugin.evaluation.minis import command as mini_command
from dynllava_plugin.evaluation.suite import command as suite_command


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status, 2 with one line for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="dynllava", description="Dynamic-LLaVA: evaluation suites, tables, benchmarks, versions."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (suite_command, table_command, build_command, mini_command):
        module.add_parser(commands)
    version = commands.add_parser("version", help="installed versions of what decides the numbers")
    version.set_defaults(run=_version)
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `dynllava table ... | head`
        sys.stderr.close()
        return 0


def _version(args: argparse.Namespace) -> int:
    from dynllava_plugin.evaluation.records import versions

    for name, number in versions().items():
        print(f"{name} {number}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
